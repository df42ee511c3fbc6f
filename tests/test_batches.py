# SPDX-License-Identifier: Apache-2.0
"""What a data set may yield: whose mask counts, what a decoder reads, and what is refused with the way out."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fisherfast as ff
from fisherfast.data.batches import Batch

CPU = torch.device("cpu")
N, L = 4, 7


def measure(model, item, likelihood="categorical", fisher_type="empirical", **options):
    return ff.fisher(model, [item], "diagonal", fisher_type, likelihood=likelihood, progress=False, **options)


class Packed(nn.Module):
    """Reads sequences that are packed already, or packs them."""

    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(4, 5), nn.Linear(5, 3)

    def forward(self, x, lengths=None):
        x = x if lengths is None else pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.head(self.cells(x)[1][0][-1])


@pytest.mark.parametrize("given", [lambda x: x, lambda x: (x,), lambda x: {"x": x}], ids=["alone", "tuple", "dict"])
def test_a_packed_sequence_is_refused_with_the_ways_out(given):
    model, lengths, y = Packed().double(), torch.tensor([3, 2, 1]), torch.tensor([0, 1, 2])
    x = torch.randn(3, 3, 4).double()
    packed = given(pack_padded_sequence(x, lengths, batch_first=True))
    item = {**packed, "labels": y} if isinstance(packed, dict) else (packed, y)
    for ask in (
        lambda: measure(model, item),
        lambda: ff.plan(model, item),
        lambda: ff.FisherOperator(model, [item]) @ torch.ones(238),
    ):
        with pytest.raises(
            (TypeError, ValueError), match="got a PackedSequence; pass padded sequences and their lengths, and pack them"
        ):
            ask()
    inside = measure(model, ((x, lengths), y))
    with ff.collect(model, ff.Diagonal()) as stats:
        stats.backward(F.cross_entropy(model(pack_padded_sequence(x, lengths, batch_first=True)), y, reduction="none"))
    assert inside.trace() == pytest.approx(stats.result().trace(), rel=1e-12)


class Copies(nn.Module):
    """Reads tokens and scores as many."""

    def __init__(self, classes=11):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 5), nn.Linear(5, classes)

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None):
        return self.head(self.embed(input_ids if decoder_input_ids is None else decoder_input_ids))


def encoder_decoder():
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    return transformers.T5ForConditionalGeneration(config).eval()


def tokens(high=11):
    return torch.randint(1, high, (N, L))


@pytest.mark.parametrize("kept", [2, L])
def test_positions_of_a_decoder_are_those_of_its_own_mask(kept):
    """The encoder's mask has the same shape by chance."""
    ids, encoder, decoder = tokens(), torch.ones(N, L).long(), torch.ones(N, L).long()
    encoder[:, 5:], decoder[:, kept:] = 0, 0
    item = {"input_ids": ids, "attention_mask": encoder, "decoder_input_ids": tokens()}
    assert measure(Copies(), item, fisher_type="mc").num_positions == N * L
    batch = Batch.of({**item, "decoder_attention_mask": decoder}, CPU)
    assert torch.equal(batch.output_mask, decoder) and torch.equal(batch.mask, encoder)


def test_an_encoder_decoder_is_given_what_its_labels_make_it_read():
    model, ids, labels = encoder_decoder(), tokens(30), tokens(30)
    labels[0, 5:] = -100
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    spelled = {**plain, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels)}
    for one, other in zip(*(measure(model, item).diagonal().values() for item in (plain, spelled)), strict=True):
        assert torch.equal(one, other)
    kfac, expected = (ff.fisher(model, [item], "kfac", seed=3, progress=False).trace() for item in (plain, spelled))
    assert kfac == expected
    assert float(ff.mean_loss(model, [plain])) == pytest.approx(float(ff.mean_loss(model, [spelled])))


def test_indices_are_no_weights():
    """A data set that yields each sample's number is not weighted by it."""
    x, y = torch.randn(N, 3), torch.randint(0, 2, (N,))
    with pytest.raises(
        TypeError,
        match=r"third entry of a batch is the weights .* must be floating, got torch.int64; several inputs are one entry",
    ):
        measure(nn.Linear(3, 2), (x, y, torch.arange(N)))
    twice = measure(nn.Linear(3, 2), (x, y, torch.full((N,), 2.0)))
    assert twice.num_samples == N


def test_labels_that_are_the_inputs_are_pointed_out():
    """The labels of a causal language model are shifted by its likelihood, not by its data."""
    ids, model = tokens(), Copies()
    with pytest.warns(ff.FisherWarning, match=r"labels are the input_ids themselves.*likelihood=ff.CausalLM\(\)"):
        measure(model, {"input_ids": ids, "labels": ids.masked_fill(ids == 1, -100)})


@pytest.mark.parametrize("likelihood", ["categorical", ff.CausalLM()], ids=["categorical", "causal-lm"])
def test_labels_that_a_model_may_have_are_not(likelihood, recwarn):
    ids = tokens()
    labels = ids if isinstance(likelihood, ff.CausalLM) else torch.where(torch.arange(L) == 3, ids % 10 + 1, ids)
    measure(Copies(), {"input_ids": ids, "labels": labels}, likelihood)
    assert not [warning for warning in recwarn if "input_ids" in str(warning.message)]


@pytest.mark.parametrize("labels", ["masked", "shifted"])
def test_labels_that_a_causal_model_did_not_read_are_pointed_out(labels):
    """``CausalLM`` shifts them, whatever they are."""
    ids, hidden = tokens(10), torch.arange(L) == 3
    if labels == "masked":
        item = {"input_ids": ids.masked_fill(hidden, 10), "labels": ids.masked_fill(~hidden, -100)}
    else:
        item = {"input_ids": ids[:, :-1] % 9, "labels": ids[:, 1:] % 9 + 1}
    with pytest.warns(ff.FisherWarning, match=r"some labels are not the input_ids.*pass likelihood='categorical'"):
        measure(Copies(), item, "causal_lm")
    with pytest.warns(ff.FisherWarning, match="some labels are not the input_ids"):
        ff.mean_loss(Copies(), [item], "causal_lm")


def test_labels_that_are_not_counted_may_be_anything(recwarn):
    """Those of the first position, which none predicts, of padding, and ignored ones."""
    ids, mask = tokens(), torch.ones(N, L).long()
    mask[0, 5:] = 0
    labels = ids.masked_fill(mask == 0, 0)
    labels[:, 0], labels[1] = 10, -100
    measure(Copies(), {"input_ids": ids, "attention_mask": mask, "labels": labels}, "causal_lm")
    assert not [warning for warning in recwarn if "input_ids" in str(warning.message)]


@pytest.mark.parametrize("ask", ["fisher", "plan", "operator", "loss"])
def test_an_encoder_decoder_is_no_causal_language_model(ask):
    model, item = encoder_decoder(), {"input_ids": tokens(30), "labels": tokens(30)}
    calls = {
        "fisher": lambda: measure(model, item, "causal_lm"),
        "plan": lambda: ff.plan(model, item, likelihood="causal_lm"),
        "operator": lambda: ff.FisherOperator(model, [item], likelihood="causal_lm"),
        "loss": lambda: ff.mean_loss(model, [item], "causal_lm"),
    }
    with pytest.raises(ValueError, match=r"must be a decoder alone, got the encoder-decoder T5.*use likelihood='categorical'"):
        calls[ask]()


class Square(nn.Module):
    """As many positions as classes, in either order."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, x, attention_mask=None):
        return self.layer(x)


def test_an_axis_that_may_be_the_classes_is_asked_for(recwarn):
    x, y = torch.randn(N, 5, 3), torch.randint(0, 5, (N, 5))
    with pytest.warns(
        ff.FisherWarning, match=r"\[N, 5, 5\] was taken as \[N, L, C\].*Categorical\(axis=2\).*Categorical\(axis=1\)"
    ):
        default = measure(Square(), (x, y))
    assert default.num_positions == 5 * N
    recwarn.clear()
    torch.manual_seed(0)
    model = Square()
    first, last = (measure(model, (x, y), ff.Categorical(axis=axis)) for axis in (1, 2))
    measure(model, {"x": x, "attention_mask": torch.ones(N, 5), "labels": y})  # a mask says where the positions are
    measure(model, (x[:, :4], y[:, :4]))
    assert not [warning for warning in recwarn if "axis" in str(warning.message)]
    assert first.trace() != pytest.approx(last.trace())
    losses = [nn.functional.cross_entropy(model(one), labels, reduction="sum") for one, labels in zip(x, y, strict=True)]
    squares = [torch.autograd.grad(loss, model.layer.weight)[0].square() for loss in losses]
    torch.testing.assert_close(last.diagonal()["layer.weight"], torch.stack(squares).mean(0))


@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
@pytest.mark.parametrize("axis", [-1, 1])
def test_class_probabilities_are_no_label(fisher_type, axis):
    x, likelihood = torch.randn(N, 3), ff.Categorical(axis=axis)
    with pytest.raises(
        ValueError, match=rf"got class probabilities .*\(inputs, None\) .*argmax\({axis}\).*ff.collect, or ff.LogL"
    ):
        measure(nn.Linear(3, 2), (x, torch.randn(N, 2).softmax(-1)), likelihood, fisher_type)
    for others in (torch.randn(N, 2), torch.zeros(N), 2 * torch.rand(N, 2).softmax(-1)):
        with pytest.raises(ValueError, match=r"must be class indices \(integers\), got torch.float32; pass targets.long\(\)"):
            measure(nn.Linear(3, 2), (x, others), likelihood, fisher_type)


@pytest.mark.parametrize(
    ("likelihood", "last", "undone"),
    [("categorical", nn.Softmax(-1), "log"), ("bernoulli", nn.Sigmoid(), "logit")],
    ids=["categorical", "bernoulli"],
)
def test_probabilities_are_no_logits(likelihood, last, undone, recwarn):
    x = torch.randn(33, 3, dtype=torch.float64)
    plain = nn.Linear(3, 2).double()
    with pytest.warns(ff.FisherWarning, match=rf"{likelihood}: the output looks like probabilities .*result.{undone}\(\)"):
        measure(nn.Sequential(plain, last), (x, None), likelihood, "mc")
    recwarn.clear()
    back = measure(nn.Sequential(plain, last), (x, None), likelihood, "exact", output=lambda result: getattr(result, undone)())
    assert back.trace() == pytest.approx(measure(plain, (x, None), likelihood, "exact").trace(), rel=1e-6)
    untrained = nn.Linear(3, 2)
    nn.init.zeros_(untrained.weight), nn.init.zeros_(untrained.bias)
    measure(untrained, (x.float(), None), likelihood, "mc")
    assert not [warning for warning in recwarn if "probabilities" in str(warning.message)]


def test_a_few_outputs_between_zero_and_one_say_nothing(recwarn):
    measure(nn.Sequential(nn.Linear(3, 2), nn.Sigmoid()), (torch.randn(31, 3), None), "bernoulli", "mc")
    assert not [warning for warning in recwarn if "probabilities" in str(warning.message)]


def test_one_logit_is_no_class():
    with pytest.raises(ValueError, match=r"at least 2 classes, got an output \(4, 1\); .*likelihood='bernoulli'"):
        measure(nn.Linear(3, 1), (torch.randn(N, 3), None), fisher_type="mc")


@pytest.mark.parametrize(
    ("likelihood", "targets", "note"),
    [
        ("categorical", torch.zeros(9, 1).long(), "targets.squeeze"),
        ("categorical", torch.zeros(9, 3).long(), "targets.argmax"),
        ("gaussian", torch.zeros(9), "squeeze"),
    ],
)
def test_shapes_that_do_not_fit_come_with_the_way_out(likelihood, targets, note):
    """And without a number of samples that is the probe's."""
    C = 3 if likelihood == "categorical" else 1
    with pytest.raises(ValueError, match=rf"targets must be \[N.* for an output \[N, {C}\], got \[N.*; .*{note}"):
        measure(nn.Linear(3, C), (torch.randn(9, 3), targets), likelihood)


def test_what_is_no_model_no_likelihood_and_no_batch():
    model, x, y = nn.Linear(3, 2), torch.randn(N, 3), torch.zeros(N).long()
    with pytest.raises(TypeError, match=r"model: must be a torch.nn.Module, got list; it comes first"):
        ff.fisher([(x, y)], model)
    with pytest.raises(TypeError, match="got CrossEntropyLoss; of a cross entropy that is 'categorical'"):
        measure(model, (x, y), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="is this a Dataset"):
        measure(model, (x, 1))
    with pytest.raises(ValueError, match=r"a sample axis, got \['ndarray'\]; arrays become tensors"):
        measure(model, (x.numpy(), y))


def test_a_key_that_holds_labels_by_another_name():
    item = {"input_ids": tokens(), "label": tokens()}
    with pytest.raises(
        ValueError, match=r"a batch without the key 'labels', \['input_ids', 'label'\]; rename 'label' to 'labels'"
    ):
        measure(Copies(), item)
    with pytest.raises(TypeError, match="unexpected keyword argument 'label'") as caught:
        measure(Copies(), item, fisher_type="mc")
    assert "the key 'labels' is held back" in caught.value.__notes__[0]


@pytest.mark.filterwarnings("ignore:.*DataParallel")
def test_a_data_parallel_model_has_the_names_of_the_one_inside():
    inner, item = nn.Linear(3, 2), (torch.randn(N, 3), torch.zeros(N).long())
    assert measure(nn.DataParallel(inner), item).names == measure(inner, item).names


def test_output_is_a_name_or_a_function():
    model, data = nn.Linear(3, 2), [(torch.randn(4, 3), torch.randint(2, (4,)))]
    with pytest.raises(TypeError, match=r"output: must be a name, or a function .* got 0; of a tuple, lambda"):
        ff.fisher(model, data, output=0, progress=False)


class Named(nn.Linear):
    """Returns its output by a name, in a mapping or as an attribute."""

    def __init__(self, kind):
        super().__init__(3, 2)
        self.kind = kind

    def forward(self, x):
        return self.kind(logits=super().forward(x), extra=x)


@pytest.mark.parametrize("kind", [dict, SimpleNamespace])
def test_a_part_of_the_output_is_one_that_there_is(kind):
    item = (torch.randn(4, 3), torch.zeros(4).long())
    assert measure(Named(kind), item, output="logits").num_samples == 4
    there = r"of a mapping of \['logits', 'extra'\]" if kind is dict else "of a SimpleNamespace without it"
    with pytest.raises(ValueError, match=rf"output: must be the name of a part .*, got 'logit' {there}; or pass a function"):
        measure(Named(kind), item, output="logit")


@pytest.mark.parametrize(
    ("item", "way"),
    [
        (torch.zeros(N, 5), r"data is a list of batches, \[\(inputs, targets\)\]"),
        (torch.utils.data.DataLoader([(0, 1)]), r"next\(iter\(loader\)\)"),
        ((torch.zeros(N, 5),) * 4, r"of 4; several inputs are one entry, \(\(x1, x2\), targets\)"),
        ((torch.zeros(N, 5), torch.zeros(N, 5), torch.zeros(N).long()), r"several inputs are one entry, \(\(x1, x2\), y\)"),
    ],
)
def test_another_container_is_told_the_right_one(item, way):
    with pytest.raises(TypeError, match=way):
        measure(nn.Linear(5, 3), item)


def test_only_a_model_that_fails_is_told_of_inputs_that_hold_no_samples():
    hint, x = "must hold its samples", torch.zeros(9, 5)
    with pytest.raises(ValueError, match="labels must lie in") as ours:
        measure(nn.Linear(5, 3), (x, torch.full((9,), 7)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as theirs:
        measure(nn.Linear(4, 3), (x, torch.zeros(9).long()))
    assert [hint in "".join(getattr(error.value, "__notes__", [])) for error in (ours, theirs)] == [False, True]
    assert not any("0 samples" in note for error in (ours, theirs) for note in getattr(error.value, "__notes__", []))


def test_an_output_without_a_graph_is_named():
    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(
        ValueError, match=r"the output must depend on the parameters, got one without a graph; leave out detach\(\)"
    ):
        measure(Detached(5, 3), (torch.zeros(N, 5), torch.zeros(N).long()))


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_with_a_number_for_each_sample_is_cut_like_a_tensor(kind):
    batch = Batch.of(((torch.randn(3, 4), kind([5, 6, 7]), kind(["a", "b", "c"]), kind([8, 9])), None), torch.device("cpu"))
    assert batch.nested
    assert batch.cut(1, 3).inputs[1:] == (kind([6, 7]), kind(["b", "c"]), kind([8, 9]))
    assert batch.repeated(2, 4).inputs[1:] == (kind([7] * 4), kind(["c"] * 4), kind([8, 9]))


@pytest.mark.parametrize("kind", [torch.tensor, list, tuple])
def test_lengths_in_a_list_reach_the_fallback_sample_by_sample(kind):
    class Nearest(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.centres = nn.Linear(3, 6), nn.Parameter(torch.randn(5, 6))

        def forward(self, x, lengths):
            means = [h[:length].mean(0) for h, length in zip(self.layer(x).relu(), lengths, strict=True)]
            return -torch.cdist(torch.stack(means), self.centres)  # which no rule covers

    model, lengths = Nearest().double(), [1, 2, 3, 4, 2, 1]
    x, y = torch.randn(6, 4, 3).double(), torch.randint(5, (6,))
    alone = [((x[n : n + 1], torch.tensor(lengths[n : n + 1])), y[n : n + 1]) for n in range(6)]
    found, true = (
        ff.fisher(model, data, fisher_type="empirical", progress=False).diagonal(dtype=torch.float64)
        for data in ([((x, kind(lengths)), y)], alone)
    )
    for name, values in true.items():
        torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lengths", [(3, 2, 4, 3, 6, 5), (6, 2, 4, 3, 3, 5)])
def test_labels_as_long_as_the_longest_sample_which_is_not_among_the_first(lengths):
    """An output as long as the longest sample of what the model is given, as ``pad_packed_sequence`` makes it."""

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 4)

        def forward(self, x, lengths):
            return self.layer(x[:, : int(lengths.max())])

    model, length = Tagger().double(), torch.tensor(lengths)
    x = torch.randn(6, 6, 5).double()
    y = torch.randint(4, (6, 6)).masked_fill(torch.arange(6) >= length[:, None], -100)
    found = ff.fisher(model, [((x, length), y)], fisher_type="empirical", progress=False)
    losses = F.cross_entropy(model(x, length).mT, y, reduction="none").sum(1)
    true = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)]) for loss in losses
    ]
    assert found.trace() == pytest.approx(float(torch.stack(true).square().sum() / 6), rel=1e-9)


class Bags(nn.Module):
    """Means over bags of tokens; ``offsets`` say where each begins."""

    def __init__(self, mode="mean"):
        super().__init__()
        self.embed, self.head = nn.EmbeddingBag(11, 5, mode=mode), nn.Linear(5, 3)

    def forward(self, ids, offsets):
        return self.head(self.embed(ids, offsets).tanh())


def bags(sizes):
    offsets = torch.tensor([0, *sizes]).cumsum(0)[:-1]
    return (torch.randint(11, (sum(sizes),)), offsets), torch.randint(3, (len(sizes),))


def diagonal_by_autograd(model, data):
    """Of the losses, each in its batch."""
    named, rows = dict(model.named_parameters()), []
    for inputs, y in data:
        losses = F.cross_entropy(model(*inputs), y, reduction="none")
        rows += [torch.autograd.grad(loss, list(named.values()), retain_graph=True) for loss in losses]
    return {name: torch.stack(own).square().mean(0) for name, own in zip(named, zip(*rows, strict=True), strict=True)}


@pytest.mark.filterwarnings("error::fisherfast.FisherWarning")
@pytest.mark.parametrize("mode", ["mean", "max"])  # no rule covers max
@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
def test_there_are_as_many_samples_as_targets(structure, mode):
    """The tokens of all bags come first, and are more, but for the last batch."""
    model, data = Bags(mode).double(), [bags([3, 2, 4, 3, 4, 4]), bags([1, 2]), bags([5]), bags([1, 1, 1])]
    found = ff.fisher(model, data, structure, "empirical", progress=False)
    assert found.num_samples == 12
    if structure == "diagonal":
        expected = diagonal_by_autograd(model, data)
        torch.testing.assert_close(found.diagonal(dtype=torch.float64), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("fisher_type", ["exact", "mc"])
def test_samples_that_cannot_be_cut_out_have_all_passes(fisher_type):
    """One loss after the other, on the graph of all bags."""
    model, data = Bags("max").double(), [bags([3, 2, 4]), bags([1, 2])]
    model.head.requires_grad_(False)
    by_loop = ff.fisher(model, data, "diagonal", fisher_type, progress=False)
    assert by_loop.coverage["embed.weight"].startswith("loop")
    alone = [
        ((ids[a:b], torch.tensor([0])), torch.zeros(1).long()) for (ids, offsets), _ in data for a, b in _bounds(ids, offsets)
    ]
    expected = ff.fisher(model, alone, "diagonal", fisher_type, progress=False).diagonal(dtype=torch.float64)
    torch.testing.assert_close(by_loop.diagonal(dtype=torch.float64), expected, rtol=1e-6, atol=1e-12)


def _bounds(ids, offsets):
    return zip(offsets.tolist(), [*offsets[1:].tolist(), len(ids)], strict=True)


def test_graphs_are_referred_to_collect():
    x, owner, y = torch.randn(20, 5), torch.arange(20) // 4, torch.randint(3, (5,))
    with pytest.raises(ValueError, match=r"the same samples, got 20 and targets \(5,\); graphs, .*with ff\.collect"):
        measure(nn.Linear(5, 3), ((x, owner), y))
