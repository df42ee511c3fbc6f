# SPDX-License-Identifier: Apache-2.0
"""KFAC's input factor of padded sequences: A is over the positions that exist, however samples are batched and padded."""

import pytest
import torch
import torch.nn.functional as F
from networks import BesideMask
from torch import nn

import fisherfast as ff
from fisherfast.fisher.blocks import block_sums, kronecker_sums

IGNORED = -100


class Experts(nn.Module):
    """Two experts of tokens, chosen by whether their number is odd."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(10, 5).requires_grad_(False), nn.Linear(5, 4)
        self.experts = nn.ModuleList(nn.Linear(5, 5, bias=False) for _ in range(2))

    def forward(self, input_ids, attention_mask):
        h, chosen = self.table(input_ids).flatten(0, 1), input_ids.flatten() % 2
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            at = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, at, expert(h[at]))
        return self.head(out).unflatten(0, input_ids.shape)


class Gated(nn.Module):
    """A layer that the first token of a sample switches on."""

    def __init__(self):
        super().__init__()
        self.table, self.layer, self.head = (
            nn.Embedding(10, 5).requires_grad_(False),
            nn.Linear(5, 5, bias=False),
            nn.Linear(5, 4),
        )

    def forward(self, input_ids, attention_mask):
        h = self.table(input_ids)
        return self.head(h + (input_ids[:, :1, None] % 2).to(h.dtype) * self.layer(h))


class Chosen(nn.Module):
    """A convolution with a bias, of the samples that begin with an even token."""

    def __init__(self):
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(10, 5).requires_grad_(False), nn.Conv1d(5, 5, 2), nn.Linear(5, 4)

    def forward(self, input_ids, attention_mask):
        h, at = self.table(input_ids), (input_ids[:, 0] % 2 == 0).nonzero()[:, 0]
        return self.head(h.index_add(0, at, self.layer(F.pad(h[at].mT, (1, 0))).mT.tanh()))


class Translator(nn.Module):
    """Reads one sequence, and scores the positions of another."""

    def __init__(self):
        super().__init__()
        self.table, self.encoder, self.decoder = (
            nn.Embedding(10, 5).requires_grad_(False),
            nn.Linear(5, 5),
            nn.Linear(5, 5, bias=False),
        )
        self.head = nn.Linear(5, 4)

    def forward(self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask):
        read = (self.encoder(self.table(input_ids)).tanh() * attention_mask.unsqueeze(2)).sum(1, keepdim=True)
        return self.head((self.decoder(self.table(decoder_input_ids)) + read).tanh())


def factor(model, data, layer):
    return ff.fisher(model, data, "kfac", "empirical", progress=False).factors(dtype=torch.float64)[layer][0]


def singles(batch):
    return [{key: value[n : n + 1] for key, value in batch.items()} for n in range(len(batch["labels"]))]


def padded(batch, more):
    fills = {"attention_mask": 0, "decoder_attention_mask": 0, "labels": IGNORED}
    return {key: F.pad(value, (0, more), value=fills.get(key, 1)) for key, value in batch.items()}


def of_rows(model, ids):
    rows = model.table(ids)
    return rows.mT @ rows / len(rows)


def gated_batch(first, lengths):
    ids, mask = torch.randint(2, 10, (2, 5)), (torch.arange(5) < torch.tensor(lengths).unsqueeze(1)).long()
    ids[:, 0] = torch.tensor(first)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 4, (2, 5)).masked_fill(mask == 0, IGNORED)}


def test_an_expert_counts_no_padding_though_as_many_rows_of_each_sample_chose_it():
    model = Experts().double()
    batch = {
        "input_ids": torch.tensor([[3, 5, 2, 4], [7, 6, 8, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "labels": torch.tensor([[0, 1, 2, 3], [1, 2, 3, IGNORED]]),
    }
    expected = of_rows(model, torch.tensor([3, 5, 7]))
    for data in ([batch], singles(batch), [padded(batch, 1)], [padded(batch, 2)]):
        torch.testing.assert_close(factor(model, data, "experts.1"), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("order", ["off first", "on first", "together", "one by one", "off alone"])
def test_a_layer_that_is_off_has_the_inputs_of_the_positions_that_exist(order):
    model, off, on = Gated().double(), gated_batch([2, 4], [5, 3]), gated_batch([3, 5], [4, 5])
    both = {key: torch.cat([off[key], on[key]]) for key in off}
    data = {"off first": [off, on], "on first": [on, off], "together": [both], "one by one": singles(both), "off alone": [off]}[
        order
    ]
    ids = torch.cat([batch["input_ids"][batch["attention_mask"] == 1] for batch in data])
    torch.testing.assert_close(factor(model, data, "layer"), of_rows(model, ids), rtol=1e-11, atol=1e-13)


def test_a_convolution_of_chosen_samples_keeps_its_bias():
    """Whole images are left out of its rows, and single ones of its bias's."""
    model = Chosen().double()
    ids = torch.tensor([[2, 5, 2, 4], [3, 6, 8, 1], [4, 4, 3, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": (ids % 4).masked_fill(mask == 0, IGNORED)}
    found, expected = (ff.fisher(model, data, "kfac", "empirical", progress=False) for data in ([batch], singles(batch)))
    assert found.trace() == pytest.approx(expected.trace(), rel=1e-6)
    assert factor(model, [batch], "layer").shape == (11, 11)


@pytest.mark.parametrize("more", [0, 2, 3])
def test_a_decoder_has_a_mask_of_its_own(more):
    """With two more positions it is as long as the encoder's."""
    model = Translator().double()
    batch = {
        "decoder_input_ids": torch.randint(2, 10, (2, 4)),
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "labels": torch.randint(0, 4, (2, 4)),
    }
    batch["labels"][1, 2:] = IGNORED
    encoder = {"input_ids": torch.randint(2, 10, (2, 6)), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    expected = of_rows(model, batch["decoder_input_ids"][batch["decoder_attention_mask"] == 1])
    torch.testing.assert_close(factor(model, [padded(batch, more) | encoder], "decoder"), expected, rtol=1e-11, atol=1e-13)
    rows = torch.cat([model.table(encoder["input_ids"][encoder["attention_mask"] == 1]), torch.ones(10, 1).double()], 1)
    torch.testing.assert_close(
        factor(model, [padded(batch, more) | encoder], "encoder"), rows.mT @ rows / 10, rtol=1e-11, atol=1e-13
    )


class Indexed(nn.Module):
    """Experts whose weight and bias are entries of stacks, at a place that is a tensor without axes."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 5, 4)), nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        h = x.flatten(0, 1)
        chosen, out = (h[:, 0] > 0).long() + (h[:, 0] > 1).long(), h.new_zeros(len(h), 4)
        for k in torch.arange(3):
            at = (chosen == k).nonzero()[:, 0]
            out = out.index_add(0, at, h[at] @ self.weight[k] + self.bias[k])
        return out.unflatten(0, x.shape[:2])


def test_an_entry_at_a_place_that_is_a_tensor_is_a_part():
    """The structure is that of any batching, a first batch of one sample included."""
    model, x, y = Indexed().double(), torch.randn(4, 6, 5).double(), torch.randint(0, 4, (4, 6))
    whole = ff.fisher(model, [(x, y)], "kfac", "empirical", progress=False)
    for first in (1, 2):
        parts = ff.fisher(model, [(x[:first], y[:first]), (x[first:], y[first:])], "kfac", "empirical", progress=False)
        assert dict(parts.coverage) == dict(whole.coverage) and parts.trace() == pytest.approx(whole.trace(), rel=1e-6)


@pytest.mark.parametrize("copied", [1, 1000, 2**25])
@pytest.mark.parametrize("padded", [False, True])
def test_padding_is_not_multiplied(copied, padded, monkeypatch):
    """The factor is that of the tokens; neither padding nor a mask of ones makes rows weighted: 16-bit ones would be six products."""
    seen, multiply = [], block_sums.gram_

    def spied(acc, rows, *more, weight=None, **options):
        if rows.shape[-1] == 5 and acc.shape[0] == 6:  # inputs of the head, with the bias
            seen.append((rows.shape[:-1].numel(), weight))
        multiply(acc, rows, *more, weight=weight, **options)

    monkeypatch.setattr(block_sums, "gram_", spied)
    monkeypatch.setattr(kronecker_sums, "_COPIED", copied)
    model, ids = Gated().eval(), torch.randint(1, 10, (4, 7))
    mask = (torch.arange(7) < torch.tensor([7, 3, 1, 5]).unsqueeze(1)) if padded else torch.ones(4, 7, dtype=torch.bool)
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.where(mask, ids % 4, IGNORED)}
    found = factor(model, [batch], "head")
    assert all(weight is None for _, weight in seen) and sum(rows for rows, _ in seen) == mask.sum()
    h = model.table(ids)
    inputs = F.pad(h + (ids[:, :1, None] % 2) * model.layer(h), (0, 1), value=1.0)[mask].double()
    torch.testing.assert_close(found, inputs.mT @ inputs / mask.sum(), rtol=1e-5, atol=1e-6)


def test_collect_is_told_of_padding():
    """By ``mask``; without one all positions exist, as before."""
    model = nn.Sequential(nn.Embedding(10, 5), nn.Linear(5, 4)).double()
    ids, mask = torch.randint(2, 10, (4, 6)), torch.ones(4, 6, dtype=torch.long)
    mask[1:, 4:], mask[3, 1:] = 0, 0
    batch = {"x": ids, "attention_mask": mask, "labels": (ids % 4).masked_fill(mask == 0, IGNORED)}
    expected = ff.fisher(BesideMask(model), [batch], "kfac", "empirical", progress=False)

    def collected(**given):
        with ff.collect(model, ff.KFAC(), fisher_type="empirical") as stats:
            losses = F.cross_entropy(model(ids).flatten(0, 1), batch["labels"].flatten(), reduction="none", ignore_index=IGNORED)
            stats.backward(losses.view(4, 6).sum(1), **given)
        return stats.result()

    for found, reference in zip(collected(mask=mask).factors()["1"], expected.factors()["inner.1"], strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-11, atol=1e-13)
    assert not torch.allclose(collected().factors()["1"][0], expected.factors()["inner.1"][0])
    with pytest.raises(ValueError, match=r"collect: mask must be \[N, L\], which positions of 4 samples exist, got \(6,\)"):
        collected(mask=mask[0])
