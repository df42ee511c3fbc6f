# SPDX-License-Identifier: Apache-2.0
"""What a data set may yield: whose mask counts, what a decoder reads, and what is refused with the way out."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fisherfast as ff
from fisherfast.batches import Batch

CPU = torch.device("cpu")
N, L = 4, 7


def measure(model, item, likelihood="categorical", fisher_type="empirical", **options):
    return ff.fisher(model, [item], "diagonal", fisher_type, likelihood=likelihood, progress=False, **options)


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
        TypeError, match=r"third entry of a batch is the weights .* must be floating, got torch.int64; leave it out"
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
    with pytest.raises(ValueError, match=r"got a batch without the key 'labels', \['input_ids', 'label'\]"):
        measure(Copies(), item)
    with pytest.raises(TypeError) as caught:
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
