# SPDX-License-Identifier: Apache-2.0
"""Samples of different length packed into one row, with their boundaries: the same Fisher as of each sample by itself."""

from itertools import pairwise

import architectures
import oracle
import pytest
import torch
import transformers as hf
from torch import nn

import fisherfast as ff
from fisherfast import timing
from fisherfast.batches import Batch
from fisherfast.likelihood import predictions_of

EXACT = 1e-12
V = architectures.V


def packed(lengths, key="cu_seq_lens_q", labels=True):
    """Token ids [1, M], positions that start again with each sample, boundaries."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(1, V, (1, int(offsets[-1])))
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    batch = {"input_ids": ids, "position_ids": positions, key: offsets.int()}
    return {**batch, "labels": ids} if labels else batch


def apart(batch, key="cu_seq_lens_q"):
    """The same samples, each a batch of its own."""
    bounds = batch[key].tolist()
    names = [name for name in batch if name != key]
    return [{name: batch[name][:, a:b] for name in names} for a, b in pairwise(bounds)]


def llama():
    config = hf.LlamaConfig(**architectures.grouped(1), vocab_size=V, attn_implementation="eager", use_cache=False)
    return hf.LlamaForCausalLM(config).double().eval()


class Positions(nn.Module):
    """Embeddings, positions and a tied head: nothing that looks from one position to another."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places, self.mix = nn.Embedding(V, 11), nn.Embedding(32, 11), nn.Linear(11, 11)

    def forward(self, input_ids, position_ids):
        """Logits [1, M, V]."""
        return nn.functional.linear(self.mix(self.tokens(input_ids) + self.places(position_ids)).tanh(), self.tokens.weight)


@pytest.mark.parametrize("fisher_type", ["empirical", "mc"])
def test_packed_transformer_equals_its_samples(fisher_type):
    model, batches = llama(), [packed([5, 3, 7]), packed([2, 9]), packed([4, 4, 4])]
    options = {"fisher_type": fisher_type, "likelihood": ff.CausalLM(), "progress": False}
    singles = [one for batch in batches for one in apart(batch)]
    expected, found = ff.fisher(model, singles, **options), ff.fisher(model, batches, **options)
    assert (found.num_samples, found.num_positions) == (expected.num_samples, expected.num_positions) == (8, 30)
    assert oracle.error(found.diagonal(dtype=torch.float64), expected.diagonal(dtype=torch.float64)) < EXACT
    assert not {way for way in found.coverage.ways.values() if way in ("loop", "vmap")}


def test_a_plan_of_packed_samples_of_one_length_is_exact():
    model, batch = Positions(), packed([5] * 11, "sample_offsets")
    options = {"fisher_type": "empirical", "likelihood": ff.CausalLM()}
    planned = ff.plan(model, batch, "gram", **options)
    F = ff.fisher(model, [batch], "gram", progress=False, **options)
    tensors = [t for pieces in F.pieces.values() for piece in pieces for t in piece.state()[0].values()]
    assert planned.total_bytes == sum({t.data_ptr(): t.nbytes for t in tensors}.values())
    few, many = (ff.plan(model, packed([5] * n, "sample_offsets"), **options).activation_bytes for n in (4, 11))
    assert few * 11 == many * 4


@pytest.mark.parametrize("fisher_type", ["empirical", "mc", "exact"])
def test_own_key_is_not_passed_to_the_model(fisher_type):
    model, batches = Positions().double(), [packed([2, 1, 3], "sample_offsets"), packed([3, 1], "sample_offsets")]
    options = {"fisher_type": fisher_type, "progress": False}
    singles = [one for batch in batches for one in apart(batch, "sample_offsets")]
    expected, found = ff.fisher(model, singles, **options), ff.fisher(model, batches, **options)
    assert oracle.error(found.diagonal(dtype=torch.float64), expected.diagonal(dtype=torch.float64)) < EXACT


@pytest.mark.parametrize("labels", [True, False], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize("likelihood", [ff.Categorical(), ff.CausalLM()], ids=lambda likelihood: likelihood.name)
def test_plain_pass_equals_its_samples(likelihood, labels):
    """What ``fisherfast info`` times a Fisher against: labels of the data, else the ones drawn for each sample's number."""
    model, batch = Positions().double(), packed([2, 1, 5], "sample_offsets", labels)
    timing._plain(model, [batch], likelihood)
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    for number, one in enumerate(apart(batch, "sample_offsets")):
        single = Batch.of(one, torch.device("cpu"))
        predictions = predictions_of(likelihood, single, single.feed(model), number)
        labelled = predictions.detached()
        predictions.values.backward(likelihood.empirical(labelled) if labels else likelihood.sampled(labelled, 0, 0))
    assert oracle.error(found, {name: p.grad for name, p in model.named_parameters()}) < EXACT
    assert timing.against_plain(lambda _: None, model, [batch], likelihood, rounds=1).num_samples == 3


def test_samples_that_look_at_each_other_are_refused():
    """Without positions that start again, attention reaches over the boundaries."""
    batch = packed([5, 3, 7], "sample_offsets")
    batch["position_ids"] = torch.arange(15).unsqueeze(0)
    with pytest.raises(ValueError, match=r"samples must not depend on each other|a row must belong to one sample"):
        ff.fisher(llama(), [batch], likelihood=ff.CausalLM(), progress=False)


@pytest.mark.parametrize("offsets", [[0, 5, 3, 15], [1, 15], [0, 9], [0, 7, 7, 15]])
def test_rejects_offsets_that_do_not_cover_the_rows(offsets):
    batch = {**packed([5, 3, 7], "sample_offsets"), "sample_offsets": torch.tensor(offsets)}
    with pytest.raises(ValueError, match="offsets of packed samples must rise from 0 to M"):
        ff.fisher(Positions(), [batch], progress=False)


@pytest.mark.parametrize("likelihood", [ff.Gaussian(0.5), ff.Bernoulli()], ids=str)
def test_one_output_a_position_needs_no_axis_of_its_own(likelihood):
    """``[1, M]`` says the same as ``[1, M, 1]``: what is past a short sample's end is not counted."""
    layer, x, y = nn.Linear(3, 1).double(), torch.randn(1, 7, 3).double(), torch.rand(1, 7).double()
    inputs = {"input": x, "sample_offsets": torch.tensor([0, 2, 7])}
    flat, deep = nn.Sequential(layer, nn.Flatten(1)), layer
    for options in ({"fisher_type": "exact"}, {"fisher_type": "empirical"}):
        one = ff.fisher(flat, [inputs | {"labels": y}], likelihood=likelihood, progress=False, **options)
        other = ff.fisher(deep, [inputs | {"labels": y.unsqueeze(-1)}], likelihood=likelihood, progress=False, **options)
        assert one.num_positions == other.num_positions == 7
        assert one.trace() == pytest.approx(other.trace(), rel=1e-12)
    losses = [ff.mean_loss(m, [inputs | {"labels": t}], likelihood) for m, t in ((flat, y), (deep, y.unsqueeze(-1)))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_what_a_loss_of_your_own_sees_past_a_samples_end_is_minus_100():
    model, ids = nn.Embedding(5, 4), torch.randint(0, 5, (1, 7))
    batch = {"input": ids, "labels": torch.zeros_like(ids), "sample_offsets": torch.tensor([0, 2, 7])}
    model.weight.data.zero_()[:, 0] = 1.0  # always right: what is past an end could only be wrong
    assert ff.mean_loss(model, [batch], ff.Categorical(ignore_index=-1), loss=ff.zero_one) == 0.0
