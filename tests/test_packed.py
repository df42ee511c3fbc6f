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
from fisherfast.data import packing
from fisherfast.data.batches import Batch
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


def without(batch, *keys):
    return {key: value for key, value in batch.items() if key not in keys}


def same_as(expected, model, batches, **options):
    found = ff.fisher(model, batches, progress=False, fisher_type="empirical", likelihood=ff.CausalLM(), **options)
    assert (found.num_samples, found.num_positions) == (expected.num_samples, expected.num_positions)
    assert oracle.error(found.diagonal(dtype=torch.float64), expected.diagonal(dtype=torch.float64)) < EXACT


def of_singles(model, batch, key="cu_seq_lens_q"):
    return ff.fisher(model, apart(batch, key), progress=False, fisher_type="empirical", likelihood=ff.CausalLM())


class TakesBounds(Positions):
    """A model of flash-attention's, which is given where its samples begin."""

    def forward(self, input_ids, position_ids, cu_seqlens=None):
        assert cu_seqlens is None or int(cu_seqlens[-1]) == input_ids.shape[1]
        return super().forward(input_ids, position_ids)


@pytest.mark.parametrize("bounds", ["int", "long", "tolist"])
def test_flash_attentions_key_is_one_of_offsets(bounds):
    model, batch = TakesBounds().double(), packed([5, 3, 7, 2, 6, 4])
    offsets = getattr(batch["cu_seq_lens_q"], bounds)()
    same_as(of_singles(model, batch), model, [{**without(batch, "cu_seq_lens_q"), "cu_seqlens": offsets}])


@pytest.mark.parametrize("lengths", [[5, 3, 7], [1, 4, 1, 1, 3, 1]], ids=str)
def test_positions_that_start_again_are_samples(lengths):
    """Also those of a model that counts from 2, and with a mask that says nothing."""
    model, batch = Positions().double(), packed(lengths)
    expected, plain = of_singles(model, batch), without(batch, "cu_seq_lens_q")
    same_as(expected, model, [plain])
    same_as(expected, model, [{**plain, "position_ids": plain["position_ids"][0]}])
    later = {**batch, "position_ids": batch["position_ids"] + 2}
    same_as(of_singles(model, later), model, [without(later, "cu_seq_lens_q")])
    assert Batch.of({**plain, "attention_mask": torch.ones_like(plain["input_ids"])}, torch.device("cpu")).N == len(lengths)


@pytest.mark.parametrize("flash", [True, False])
def test_what_the_flattening_collator_returns_is_its_samples(flash):
    model, samples = llama(), [torch.randint(1, V, (n,)) for n in (4, 6, 3)]
    collate = hf.DataCollatorWithFlattening(return_flash_attn_kwargs=flash)
    batch = collate([{"input_ids": one.tolist(), "labels": one.tolist()} for one in samples])
    options = {"fisher_type": "empirical", "likelihood": ff.CausalLM(), "progress": False}
    singles = [{"input_ids": one[None], "labels": one[None]} for one in samples]
    same_as(ff.fisher(model, singles, **options), model, [batch])


ALONE = {
    "left-padded": (torch.tensor([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [1, 1, 0, 1, 2, 3]]), None),
    "right-padded": (torch.tensor([[0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 4, 5]]), None),
    "masked": (torch.tensor([[0, 1, 0, 1, 2, 3]]), torch.tensor([[0, 0, 1, 1, 1, 1]])),
    "several-masked": (torch.tensor([[0, 1, 2, 0, 1, 2]] * 2), torch.tensor([[1, 1, 1, 0, 0, 0]] * 2)),
    "constant": (torch.zeros(1, 6).long(), None),
    "no-counting": (torch.tensor([[0, 2, 0, 3, 0, 5]]), None),
    "three-axes": (torch.tensor([0, 1, 2, 0, 1, 2]).expand(3, 2, 6), None),
    "one-a-sample": (torch.tensor([0, 1, 0, 1]), None),
}


@pytest.mark.parametrize("name", ALONE)
def test_positions_that_are_not_packed_are_left_alone(name):
    positions, mask = ALONE[name]
    rows = {1: 4, 2: len(positions), 3: 2}[positions.dim()]
    batch = {"input_ids": torch.ones(rows, 6).long(), "position_ids": positions}
    batch |= {} if mask is None else {"attention_mask": mask}
    assert Batch.of(batch, torch.device("cpu")).N == rows


def test_rows_that_hold_several_samples_are_refused():
    ids, positions = torch.ones(2, 6).long(), torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    for given in (positions, positions[:1]):  # one row for all
        with pytest.raises(
            ValueError, match=r"position_ids must not start again within a row of several, got 2 rows, .*; flatten"
        ):
            Batch.of({"input_ids": ids, "position_ids": given}, torch.device("cpu"))


def test_offsets_go_before_positions():
    batch = {**without(packed([5, 3]), "cu_seq_lens_q"), "sample_offsets": [0, 8]}
    assert Batch.of(batch, torch.device("cpu")).N == 1


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


@pytest.mark.parametrize("why", ["cache", "mask"])
def test_packed_samples_that_a_cache_or_a_mask_joins_are_refused_with_the_way_out(why):
    """Hugging Face's attention then does not look at the positions."""
    model, batch = llama(), without(packed([5, 3, 7]), "cu_seq_lens_q")
    model.config.use_cache = why == "cache"
    batch |= {"attention_mask": torch.ones_like(batch["input_ids"])} if why == "mask" else {}
    with pytest.raises(
        ValueError, match=r"must not depend on each other.*no attention_mask and config.use_cache=False .*'sample_offsets': None"
    ):
        ff.fisher(model, [batch], likelihood=ff.CausalLM(), progress=False)
    assert ff.fisher(model, [batch | {"sample_offsets": [0, 15]}], likelihood=ff.CausalLM(), progress=False).num_samples == 1


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


class Segments(nn.Module):
    """Reads two segments, each with positions from 0 on, and classifies both together."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe, self.head = nn.Embedding(7, 5), nn.Embedding(4, 5), nn.Linear(5, 3)

    def forward(self, input_ids, position_ids):
        return self.head((self.wte(input_ids) + self.wpe(position_ids)).tanh().mean(1))


@pytest.mark.parametrize("fisher_type", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("N", [1, 4])
def test_parts_of_a_sample_that_are_numbered_are_no_samples(N, fisher_type):
    model = Segments().double()
    batch = {"input_ids": torch.randint(7, (N, 8)), "position_ids": torch.tensor([[0, 1, 2, 3] * 2] * N)}
    labelled = batch | {"labels": torch.randint(3, (N,))}
    for one in (labelled, batch | {"sample_offsets": None}) if fisher_type != "empirical" else (labelled,):
        assert ff.fisher(model, [one], fisher_type=fisher_type, progress=False).num_samples == N


@pytest.mark.parametrize(("positions", "N"), [([0, 1, 2, 0, 1, 0], 3), ([0, 1, 2, 3, 0], 1), ([0, 0, 1, 2], 1)])
def test_samples_of_one_token_may_be_padding(positions, N):
    batch = {"input_ids": torch.zeros(1, len(positions), dtype=torch.long), "position_ids": torch.tensor([positions])}
    with pytest.warns(ff.FisherWarning, match="should tell samples of one token from padding"):
        found = Batch.of(batch, torch.device("cpu"))
    assert found.N == N
    assert Batch.of(batch | {"sample_offsets": None}, torch.device("cpu")).N == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "positions",
    [
        torch.nested.nested_tensor([torch.arange(3), torch.arange(2)], layout=torch.jagged),
        torch.tensor([[True, False, True, False]]),
        torch.zeros(3, 1, 4, dtype=torch.long),
    ],
    ids=["nested", "bool", "three axes"],
)
def test_what_cannot_be_positions_says_nothing(positions):
    assert packing.offsets({"input_ids": torch.zeros(1, 4, dtype=torch.long), "position_ids": positions}) is None


def test_a_mask_of_four_axes_says_nothing_of_padding():
    block = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3))[None, None]
    batch = {
        "input_ids": torch.zeros(1, 5, dtype=torch.long),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2]]),
        "attention_mask": block,
    }
    assert packing.offsets(batch) == [0, 2, 5]


class Flattened(Positions):
    """Without the row's axis, as flash attention has it."""

    def forward(self, input_ids, position_ids):
        """Logits [1, M, V]."""
        return super().forward(input_ids.squeeze(0), position_ids.squeeze(0)).unsqueeze(0)


@pytest.mark.parametrize("lengths", [([5, 3, 4], [2, 2, 5, 4]), ([3, 3, 3], [2, 2, 5, 3])])
def test_packed_rows_without_an_axis_for_the_row(lengths):
    model, batches = Flattened().double(), [packed(each) for each in lengths]
    options = {"progress": False, "fisher_type": "empirical"}
    expected = ff.fisher(model, [one for batch in batches for one in apart(batch)], **options)
    found = ff.fisher(model, [without(batch, "cu_seq_lens_q") for batch in batches], **options)
    assert (found.num_samples, found.num_positions) == (expected.num_samples, expected.num_positions)
    assert oracle.error(found.diagonal(dtype=torch.float64), expected.diagonal(dtype=torch.float64)) < EXACT
