# SPDX-License-Identifier: Apache-2.0
"""It lives with the user's tools: gradient checkpointing, compiled models, autocast."""

import warnings

import networks
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fisherfast as ff

EXACT = 1e-12


def diagonals(model, batches):
    """The empirical diagonal by ``ff.fisher`` and by ``ff.collect``."""
    one = ff.fisher(model, batches, fisher_type="empirical", progress=False)
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        for x, y in batches:
            losses = F.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="none")
            stats.backward(losses.view(len(x), -1).sum(1))
    return [result.diagonal(dtype=torch.float64) for result in (one, stats.result())]


def doubles(data, *sizes):
    return [(x.double(), y) for x, y in map(data, sizes)]


class Checkpointed(nn.Module):
    """Blocks whose activations are thrown away and computed again in the backward pass."""

    def __init__(self, reentrant=False):
        super().__init__()
        self.first, self.head, self.reentrant = nn.Linear(networks.I, networks.D), nn.Linear(networks.D, networks.C), reentrant
        D = networks.D
        self.inplace = nn.Sequential(nn.Linear(D, D), nn.ReLU(inplace=True), nn.Linear(D, D))
        self.normed = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.Tanh())
        self.both = networks.parameter(2 * D, D)

    def halves(self, h):
        """Views of one weight."""
        up, gate = self.both.chunk(2)
        return F.linear(h, up).tanh() * F.linear(h, gate)

    def forward(self, x):
        """Three checkpointed blocks."""
        h = self.first(x)
        for block in (self.inplace, self.normed, self.halves):
            h = h + checkpoint(block, h, use_reentrant=self.reentrant)
        return self.head(h)


def test_checkpointed_blocks_are_caught_again():
    model, batches = Checkpointed().double(), doubles(networks.sequences, 7, 5, 1)
    expected = oracle.diagonal(model, batches, oracle.cross_entropy)
    assert all(oracle.error(found, expected) < EXACT for found in diagonals(model, batches))
    exact = ff.fisher(model, [(x[:2], None) for x, _ in batches], fisher_type="exact", progress=False)
    plain = oracle.diagonal(model, [(x[:2], None) for x, _ in batches], oracle.every_label)
    assert oracle.error(exact.diagonal(dtype=torch.float64), plain) < EXACT


def test_reentrant_checkpointing_is_refused_by_name():
    model, (batch,) = Checkpointed(reentrant=True).double(), doubles(networks.sequences, 5)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        ff.fisher(model, [batch], fisher_type="empirical", progress=False)


@pytest.mark.parametrize("part", ["whole", "module", "in-place"])
def test_compiled_models_run_as_written(part):
    model, batches = Checkpointed().double(), doubles(networks.sequences, 7, 5)
    expected = oracle.diagonal(model, batches, oracle.cross_entropy)
    measured = model
    if part == "whole":
        measured = torch.compile(model, backend="eager")
    elif part == "module":
        model.normed = torch.compile(model.normed, backend="eager")
    else:
        model.normed.compile(backend="eager")
    with torch.no_grad():
        measured(batches[0][0])  # compiled before it is measured
    for found in diagonals(measured, batches):
        found = {name.replace("_orig_mod.", ""): value for name, value in found.items()}
        assert oracle.error(found, expected) < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_as_exact_as_autograd_under_autocast(dtype):
    model, batches = Checkpointed(), [networks.sequences(31)]
    wide = [(x.double(), y) for x, y in batches]
    expected = oracle.diagonal(oracle.doubled(model), wide, oracle.cross_entropy)
    with torch.autocast("cpu", dtype=dtype):
        plain = oracle.error(oracle.diagonal(model, batches, oracle.cross_entropy), expected)
        for found in diagonals(model, batches):
            assert oracle.error(found, expected) <= 2 * plain


def test_float16_underflow_is_counted_reported_and_cured_by_a_loss_scale():
    """Gradients of 1e-7 and less: float16 keeps a digit or none of them."""
    model = nn.Sequential(nn.Linear(3, 11), nn.Tanh(), nn.Linear(11, 4), networks.Wrapped(lambda _, x: x.float() * 1e-6))
    batches = [networks.vectors(31)]
    expected = ff.fisher(model, batches, fisher_type="empirical", progress=False).diagonal()
    errors = []
    with torch.autocast("cpu", dtype=torch.float16):
        with pytest.warns(ff.FisherWarning, match=r"float16 gradients must not underflow.*pass loss_scale"):
            lost = ff.fisher(model, batches, fisher_type="empirical", progress=False)
        kept = ff.fisher(model, batches, fisher_type="empirical", progress=False, loss_scale=2.0**12)
        x, y = batches[0]
        with ff.collect(model, ff.Diagonal(), fisher_type="empirical", loss_scale=2.0**12) as stats:
            stats.backward(F.cross_entropy(model(x), y, reduction="none"))
    for result in (lost, kept, stats.result()):
        errors.append(oracle.error({"0.weight": result.diagonal()["0.weight"]}, {"0.weight": expected["0.weight"]}))
    assert errors[0] > 0.05 and max(errors[1:]) < 0.01
    small, every = lost.coverage.underflow["0.weight"]
    assert every == 31 * 11 and small > every / 2 and "underflow" in str(lost.coverage)
    with pytest.raises(ValueError, match="loss_scale must be"):
        ff.fisher(model, batches, loss_scale=0.0)


def test_inplace_activations_after_every_kind_of_layer():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.GroupNorm(2, 4), nn.ELU(inplace=True), nn.ConvTranspose2d(4, 2, 2),
        nn.Hardtanh(inplace=True), nn.Flatten(), nn.Linear(2 * 6 * 7, networks.C), nn.SiLU(inplace=True),
    ).double()  # fmt: skip
    batches = doubles(networks.pictures, 7, 3)
    expected = oracle.diagonal(model, batches, oracle.cross_entropy)
    assert all(oracle.error(found, expected) < EXACT for found in diagonals(model, batches))


def test_parameters_on_several_devices_are_refused():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4, device="meta"))
    with pytest.raises(ValueError, match=r"one device, got \['cpu', 'meta'\]"):
        ff.fisher(model, [networks.vectors()], progress=False)


def test_a_data_parallel_wrapper_is_not_run(tmp_path):
    """Its forward pass is a collective: a rank with more batches would wait for the others."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).eval()
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel.forward = None
        data = [(torch.randn(6, 3), torch.randint(4, (6,)))]
        for structure in ("diagonal", "kfac"):
            found, alone = (ff.fisher(m, data, structure, progress=False) for m in (parallel, model))
            assert found.trace() == alone.trace() and set(found.shapes) == set(dict(model.named_parameters()))
        for static in (False, True):
            with warnings.catch_warnings(record=True) as said:
                ff.collect(nn.parallel.DistributedDataParallel(model, static_graph=static), ff.Diagonal())
            assert ["must have taken an ordinary step before" in str(one.message) for one in said] == [True] * static
    finally:
        dist.destroy_process_group()


def test_a_sharded_model_is_refused(tmp_path):
    """No rank has whole parameters, nor what functions receive."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def model():
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = {
            "DTensor": fully_shard(model(), mesh=init_device_mesh("cpu", (1,))),
            "FullyShardedDataParallel": FullyShardedDataParallel(model(), device_id=torch.device("cpu")),
        }
        for kind, shards in sharded.items():
            with pytest.raises(ValueError, match=f"must be whole tensors of their own, got {kind}; measure the model before"):
                ff.fisher(shards, [(torch.randn(6, 3), torch.randint(4, (6,)))], progress=False)
    finally:
        dist.destroy_process_group()
