# SPDX-License-Identifier: Apache-2.0
"""KFAC's inputs of padded samples are those of the same samples unpadded, in whatever order a layer meets the positions."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfast as ff

D, V, LENGTHS = 8, 11, (6, 3, 2, 4, 5, 2)


class Reader(nn.Module):
    """A frozen table of words, and a layer that meets them in some order."""

    def __init__(self, width=D):
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(V, D).requires_grad_(False), nn.Linear(width, width), nn.Linear(D, V)
        self.prompt = nn.Parameter(torch.randn(2, D), requires_grad=False)
        self.places = nn.Parameter(torch.randn(9, D), requires_grad=False)

    def forward(self, ids, attention_mask):
        return self.head(self.meet(self.table(ids), attention_mask.bool()).tanh())


class Heads(Reader):
    def __init__(self):
        super().__init__(D // 2)

    def meet(self, x, exists):
        return self.layer(x.unflatten(-1, (2, -1))).flatten(2)


class HeadsFirst(Heads):
    def meet(self, x, exists):
        return self.layer(x.unflatten(-1, (2, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)


class Prompted(Reader):
    def meet(self, x, exists):
        h = self.layer(torch.cat([self.prompt.expand(len(x), -1, -1), x], 1))
        first = h[:, :2]
        return (h + (h @ first.mT).softmax(-1) @ first)[:, 2:]


class WithMean(Reader):
    def meet(self, x, exists):
        mean = (x * exists[..., None]).sum(1) / exists.sum(1, keepdim=True)
        return self.layer(x) + self.layer(mean)[:, None]


class Backwards(Reader):
    def meet(self, x, exists):
        return self.layer(x.flip(1)).flip(1)


class Pairs(Reader):
    def meet(self, x, exists):
        pairs = self.layer(x.unsqueeze(1) * x.unsqueeze(2))
        return (pairs * exists[:, None, :, None]).sum(2) / exists.sum(1)[:, None, None]


class Placed(Reader):
    """A frozen parameter whose rows are looked up chooses no rows."""

    def meet(self, x, exists):
        return self.layer(x + self.places[torch.arange(x.shape[1])])


class Permuted(Reader):
    """The padding first: by data, and each sample by itself."""

    def meet(self, x, exists):
        order = exists.to(torch.uint8).argsort(dim=1, stable=True)
        at = torch.arange(len(x))[:, None]
        return self.layer(x[at, order])[at, order.argsort(dim=1)]


class LongPrompt(Reader):
    """Beside as many rows that always exist, or more: before the positions or behind them."""

    rows, behind = 6, False

    def meet(self, x, exists):
        prompt = self.prompt.repeat(self.rows // 2, 1).expand(len(x), -1, -1)
        h = self.layer(torch.cat([x, prompt] if self.behind else [prompt, x], 1))
        h, first = (h[:, : x.shape[1]], h[:, x.shape[1] :]) if self.behind else (h[:, self.rows :], h[:, : self.rows])
        return h + (h @ first.mT).softmax(-1) @ first


class LongerPrompt(LongPrompt):
    rows = 14


class LongPromptBehind(LongPrompt):
    behind = True


class LongerPromptBehind(LongerPrompt):
    behind = True


MODELS = [Heads, HeadsFirst, Prompted, WithMean, Backwards, Pairs, Placed, Permuted]
MODELS += [LongPrompt, LongerPrompt, LongPromptBehind, LongerPromptBehind]


def batches():
    """All samples in a padded batch, and one by one. The first position of each has no label, as a prompt has none."""
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(V, mask.shape)
    labels = ids.roll(-1, 1).masked_fill(mask == 0, -100)
    padded = {"ids": ids, "attention_mask": mask, "labels": labels}
    return padded, [{key: value[n : n + 1, :length] for key, value in padded.items()} for n, length in enumerate(LENGTHS)]


def fisher(model, data, sharing):
    return ff.fisher(model, data, ff.KFAC(sharing=sharing), "empirical", progress=False)


def collected(model, data, sharing):
    with ff.collect(model, ff.KFAC(sharing=sharing)) as stats:
        for batch in data:
            losses = F.cross_entropy(model(batch["ids"], batch["attention_mask"]).mT, batch["labels"], reduction="none").sum(1)
            stats.backward(losses, mask=batch["attention_mask"])
    return stats.result()


@pytest.mark.parametrize("way", [fisher, collected])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", MODELS)
def test_padding_is_no_input(kind, sharing, way):
    model = kind().double()
    padded, alone = batches()
    (A, B), (A_alone, B_alone) = (way(model, data, sharing).factors(dtype=torch.float64)["layer"] for data in ([padded], alone))
    torch.testing.assert_close(A, A_alone, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(B, B_alone, rtol=1e-9, atol=1e-12)


class Halved(Reader):
    """Every second position: no mask is of these."""

    def meet(self, x, exists):
        return (self.layer(x[:, ::2]) * exists[:, ::2, None]).repeat_interleave(2, 1)[:, : x.shape[1]]


def test_rows_that_no_mask_describes_are_warned_of_once():
    padded, _ = batches()
    with pytest.warns(ff.FisherWarning, match=r"got 3 rows a sample beside a mask of 6, the fewer with a") as said:
        fisher(Halved(), [padded] * 3, "expand")
    assert sum("positions of a mask" in str(one.message) for one in said) == 1


CHOOSING = {
    "array": lambda x, order: x[order.numpy()],
    "embedding": lambda x, order: F.embedding(order, x.flatten(1)).view_as(x),
    "take": lambda x, order: torch.take(x, torch.arange(x.numel()).view_as(x)[order]),
    "scatter": lambda x, order: torch.zeros_like(x).scatter(0, order.argsort().view(-1, 1, 1).expand_as(x), x),
    "index_add": lambda x, order: torch.zeros_like(x).index_add(0, order.argsort(), x),
}


@pytest.mark.parametrize("how", CHOOSING)
def test_samples_that_data_bring_into_another_order_are_found_in_a_late_batch(how):
    """Batches 1 and 2 lie in order, batch 3, which would not be looked at, does not: weights of samples tell."""
    model = nn.ModuleDict({"below": nn.Linear(5, 5), "layer": nn.Linear(5, 5), "head": nn.Linear(5, 3)}).double()

    class Sorting(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            order = x[:, 0, 0].argsort()
            h = CHOOSING[how](model["below"](x).tanh(), order)
            return model["head"](model["layer"](h).tanh().mean(1))[order.argsort()]

    data = []
    for number in range(3):
        x = torch.randn(6, 2, 5).double()
        x = x if number == 2 else x[x[:, 0, 0].argsort()]
        data.append((x, torch.randint(3, (6,)), torch.rand(6) + 0.1))
    alone = [(x[n : n + 1], y[n : n + 1], w[n : n + 1]) for x, y, w in data for n in range(6)]
    F_, true = (
        ff.fisher(Sorting(), batches, fisher_type="empirical", progress=False).diagonal(dtype=torch.float64)
        for batches in (data, alone)
    )
    for name, values in true.items():
        torch.testing.assert_close(F_[name], values, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("structure", [ff.KFAC(max_exact_dim=0), ff.EKFAC(max_exact_dim=0)], ids=["kfac", "ekfac"])
def test_a_scalar_parameter_has_a_diagonal_where_no_block_is_exact(structure):
    class Distances(nn.Module):
        def __init__(self):
            super().__init__()
            self.centres, self.power, self.head = nn.Linear(4, 4), nn.Parameter(torch.tensor(0.3)), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.centres(x) * torch.linalg.matrix_exp(self.power.view(1, 1)).view(()))

    model, data = Distances().double(), [(torch.randn(5, 4).double(), torch.randint(2, (5,)))]
    found = ff.fisher(model, data, structure, "empirical", progress=False).diagonal(dtype=torch.float64)["power"]
    true = ff.fisher(model, data, "diagonal", "empirical", progress=False).diagonal(dtype=torch.float64)["power"]
    assert float(found) == pytest.approx(float(true), rel=1e-9)


class Towers(nn.Module):
    """Words beside patches of an image, of whose last layer one row is read: it fits any mask, and is of none."""

    def __init__(self):
        super().__init__()
        self.table, self.text, self.first = nn.Embedding(V, D).requires_grad_(False), nn.Linear(D, D), nn.Linear(D, D)
        self.layer, self.head = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, ids, patches, attention_mask):
        words = (self.text(self.table(ids)) * attention_mask[..., None]).sum(1)
        h = self.first(patches).tanh()
        h = self.layer(h + h.mean(1, keepdim=True)).tanh()
        return self.head(h[:, 0] + words)


@pytest.mark.filterwarnings("error::fisherfast.FisherWarning")
@pytest.mark.parametrize("patches", [5, 7, 8, 12])
def test_rows_of_which_one_is_read_are_not_taken_for_words(patches):
    """Neither by a mask of 6 words, nor with a warning."""
    padded, _ = batches()
    batch = {"ids": padded["ids"], "attention_mask": padded["attention_mask"], "labels": torch.randint(3, (len(LENGTHS),))}
    batch["patches"] = torch.randn(len(LENGTHS), patches, D).double()
    model, seen = Towers().double(), []
    model.layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(**{key: value for key, value in batch.items() if key != "labels"})
    x = F.pad(seen[0].flatten(0, 1), (0, 1), value=1.0)
    A, _ = fisher(model, [batch], "expand").factors(dtype=torch.float64)["layer"]
    torch.testing.assert_close(A, x.T @ x / len(x), rtol=1e-9, atol=1e-12)


class Translator(nn.Module):
    """A decoder that is as long as its encoder, and has no mask of its own."""

    def __init__(self):
        super().__init__()
        self.table, self.encoder, self.layer = nn.Embedding(V, D).requires_grad_(False), nn.Linear(D, D), nn.Linear(D, D)
        self.head = nn.Linear(D, V)

    def forward(self, input_ids, attention_mask, decoder_input_ids):
        source = (self.encoder(self.table(input_ids)) * attention_mask[..., None]).sum(1, keepdim=True)
        return self.head(self.layer(self.table(decoder_input_ids)) + source)


def test_a_decoder_without_a_mask_does_not_get_the_encoders():
    padded, _ = batches()
    read = torch.randint(V, padded["ids"].shape)
    labels = read.masked_fill(torch.arange(read.shape[1]) > 1, -100)  # within what the encoder's mask leaves
    batch = {"input_ids": padded["ids"], "attention_mask": padded["attention_mask"], "decoder_input_ids": read, "labels": labels}
    model = Translator().double()
    factors = fisher(model, [batch], "expand").factors(dtype=torch.float64)
    for name, x in (("layer", model.table(read)), ("encoder", model.table(padded["ids"])[padded["attention_mask"] > 0])):
        x = F.pad(x.reshape(-1, D), (0, 1), value=1.0)
        torch.testing.assert_close(factors[name][0], x.T @ x / len(x), rtol=1e-9, atol=1e-12)


class Masked(Translator):
    """A decoder with a mask of its own, whose layer is the encoder's if ``shared``."""

    def __init__(self, shared):
        super().__init__()
        self.layer = self.encoder if shared else self.layer

    def forward(self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask):
        source = (self.encoder(self.table(input_ids)).tanh() * attention_mask[..., None]).sum(1, keepdim=True)
        return self.head(self.layer(self.table(decoder_input_ids)).tanh() + source)


def translation(sources, targets, unlabelled):
    """Padded sources and targets; ``"first"``, ``"last"`` or ``"none"`` of several targets has no label."""
    exist = [torch.arange(max(lengths)) < torch.tensor(lengths)[:, None] for lengths in (sources, targets)]
    ids = [torch.randint(V, mask.shape) for mask in exist]
    labels = torch.randint(V, exist[1].shape).masked_fill(~exist[1], -100)
    for n, length in enumerate(targets):
        if length > 1 and unlabelled != "none":
            labels[n, 0 if unlabelled == "first" else length - 1] = -100
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    return dict(zip(names, (ids[0], exist[0].long(), ids[1], exist[1].long()), strict=True), labels=labels)


def second_moment(*rows):
    x = F.pad(torch.cat(rows), (0, 1), value=1.0)
    return x.T @ x / len(x)


def inputs(model, batch):
    """Of the encoder and of the decoder's layer: the words that there are."""
    read = ((batch["input_ids"], batch["attention_mask"]), (batch["decoder_input_ids"], batch["decoder_attention_mask"]))
    return [model.table(ids)[mask > 0] for ids, mask in read]


@pytest.mark.parametrize("unlabelled", ["first", "last"])
@pytest.mark.parametrize(
    ("sources", "targets", "doubts"),
    [
        ([5] * 5, [2, 4, 1, 3, 5], 1),
        ([2] * 5, [4, 2, 1, 3, 1], 0),
        ([4, 2, 3, 1, 4], [5, 3, 4, 2, 5], 0),
        ([3, 6, 6, 4], [5, 6, 4, 2], 0),
    ],
)
def test_a_decoders_positions_without_a_label_are_inputs(sources, targets, doubts, unlabelled):
    """Although those with one are among the encoder's, too, or are just as many as these."""
    model, batch = Masked(shared=False).double(), translation(sources, targets, unlabelled)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        factors = fisher(model, [batch], "expand").factors(dtype=torch.float64)
    assert sum("layer.weight: its rows should have gradients that tell" in str(one.message) for one in said) == doubts
    for name, x in zip(("encoder", "layer"), inputs(model, batch), strict=True):
        torch.testing.assert_close(factors[name][0], second_moment(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("sources", "targets"), [([6, 3, 5, 2], [2, 6, 4, 3]), ([5, 3, 4, 2], [3, 2, 4, 4])])
def test_a_layer_of_encoder_and_decoder_has_the_positions_of_both(sources, targets):
    model, batch = Masked(shared=True).double(), translation(sources, targets, "last")
    factors = fisher(model, [batch], "expand").factors(dtype=torch.float64)
    torch.testing.assert_close(factors["encoder"][0], second_moment(*inputs(model, batch)), rtol=1e-9, atol=1e-12)


def test_a_mask_that_was_the_only_one_to_fit_stays_that_of_the_weight():
    """In batch 2 the decoder's rows with a gradient are exactly the encoder's positions."""
    model = Masked(shared=False).double()
    data = [translation([3, 2, 5], [5, 4, 2], "last"), translation([4, 2, 3], [5, 3, 4], "last")]
    data[1] = {key: value if key.startswith("dec") or key == "labels" else F.pad(value, (0, 1)) for key, value in data[1].items()}
    factors = fisher(model, data, "expand").factors(dtype=torch.float64)
    for name, each in zip(("encoder", "layer"), zip(*(inputs(model, batch) for batch in data), strict=True), strict=True):
        torch.testing.assert_close(factors[name][0], second_moment(*each), rtol=1e-9, atol=1e-12)


def test_uses_that_were_told_once_stay_those_of_the_weight():
    """In batch 2 the rows of both uses with a gradient are exactly the encoder's positions, twice."""
    model = Masked(shared=True).double()
    data = [translation([4, 2, 3], [2, 4, 1], "none"), translation([1, 2], [2, 3], "last")]
    data[1] = {
        key: F.pad(value, (0, (2 if "dec" not in key and key != "labels" else 1)), value=-100 * (key == "labels"))
        for key, value in data[1].items()
    }
    factors = fisher(model, data, "expand").factors(dtype=torch.float64)
    x = [rows for batch in data for rows in inputs(model, batch)]
    torch.testing.assert_close(factors["encoder"][0], second_moment(*x), rtol=1e-9, atol=1e-12)


def test_masks_that_differ_in_samples_without_a_label_alone_are_in_doubt():
    model, batch = Masked(shared=False).double(), translation([4, 4], [4, 2], "none")
    batch["labels"][1] = -100
    with pytest.warns(ff.FisherWarning, match=r"encoder.weight: its rows should have gradients that tell which mask"):
        factors = fisher(model, [batch], "expand").factors(dtype=torch.float64)
    torch.testing.assert_close(factors["layer"][0], second_moment(inputs(model, batch)[1]), rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::fisherfast.FisherWarning")
def test_a_decoder_that_is_given_embeddings_does_not_get_the_encoders_mask():
    class Embedded(Translator):
        def forward(self, input_ids, attention_mask, decoder_inputs_embeds):
            source = (self.encoder(self.table(input_ids)).tanh() * attention_mask[..., None]).sum(1, keepdim=True)
            return self.head(self.layer(decoder_inputs_embeds) + source)

    padded, _ = batches()
    read = torch.randn(*padded["ids"].shape, D).double()
    labels = torch.randint(V, read.shape[:2]).masked_fill(torch.arange(read.shape[1]) > 1, -100)
    batch = {
        "input_ids": padded["ids"],
        "attention_mask": padded["attention_mask"],
        "decoder_inputs_embeds": read,
        "labels": labels,
    }
    model = Embedded().double()
    A, _ = fisher(model, [batch], "expand").factors(dtype=torch.float64)["layer"]
    torch.testing.assert_close(A, second_moment(read.flatten(0, 1)), rtol=1e-9, atol=1e-12)


class Chunked(Reader):
    """Two positions at a time, as ``chunk_size_feed_forward`` has it."""

    def meet(self, x, exists):
        return torch.cat([self.layer(part) for part in x.split(2, 1)], 1)


class Recurrent(Reader):
    """Step by step; a sample that has ended keeps its state."""

    def meet(self, x, exists):
        h, states = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = torch.where(exists[:, t, None], self.layer(h + x[:, t]).tanh(), h)
            states.append(h)
        return torch.stack(states, 1)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("sizes", [(6,), (4, 2)])
@pytest.mark.parametrize("kind", [Chunked, Recurrent])
def test_uses_of_a_part_of_the_positions_lie_in_the_order_of_the_forward_pass(kind, sizes, left):
    """Also where the first samples, which are looked at first, do not reach the later uses."""
    model = kind().double()
    padded, _ = batches()
    padded = {key: value[torch.tensor([2, 5, 1, 3, 4, 0])] for key, value in padded.items()}
    padded = {key: value.flip(1) for key, value in padded.items()} if left else padded
    cut = {key: value.split(list(sizes)) for key, value in padded.items()}
    data = [dict(zip(cut, each, strict=True)) for each in zip(*cut.values(), strict=True)]
    alone = [
        {key: value[n : n + 1, padded["attention_mask"][n] > 0] for key, value in padded.items()} for n in range(len(LENGTHS))
    ]
    A, A_alone = (fisher(model, each, "expand").factors(dtype=torch.float64)["layer"][0] for each in (data, alone))
    torch.testing.assert_close(A, A_alone, rtol=1e-9, atol=1e-12)
