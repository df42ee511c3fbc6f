# SPDX-License-Identifier: Apache-2.0
"""Norms, moments and standard errors after a fault, pooled, in files, from a checkpoint and of several ranks."""

import os
import subprocess
import sys
import textwrap

import networks
import oracle
import pytest
import torch
from asked import WITH_MOMENTS, measure
from oracle import close
from torch import nn

import fisherfast as ff
from fisherfast.fisher import serialize

EXACT = 1e-11


def test_a_fault_keeps_the_samples_of_whole_batches():
    class Faulty(nn.Module):
        def forward(self, x):
            if len(x) == 5:
                raise RuntimeError("lost")
            return x

    model = nn.Sequential(nn.Linear(3, 11), Faulty(), nn.Linear(11, 4)).double()
    x, y = networks.vectors(15)
    batches = [(x[:6].double(), y[:6]), (x[6:10].double(), y[6:10]), (x[10:].double(), y[10:])]
    with pytest.raises(RuntimeError, match="lost") as caught:
        measure(model, batches, WITH_MOMENTS, fisher_type="empirical")
    whole = measure(model, batches[:2], WITH_MOMENTS, fisher_type="empirical")
    fisher, _, norms, moments = caught.value.fisher
    assert torch.equal(norms.squared_norms, whole[2].squared_norms) and fisher.stderr("trace") == whole[0].stderr("trace")
    assert oracle.error(moments.variance(), whole[3].variance()) == 0


def test_parts_pool_to_the_whole():
    model, x, y = networks.doubles("embedding", 6)
    whole = measure(model, [(x, y)], WITH_MOMENTS, fisher_type="empirical")
    a, b = (measure(model, [(x[s], y[s])], WITH_MOMENTS, fisher_type="empirical") for s in (slice(0, 2), slice(2, 6)))
    fisher, by_layer, norms, moments = (first + second for first, second in zip(a, b, strict=True))
    assert fisher.stderr("trace") == pytest.approx(whole[0].stderr("trace"), rel=1e-9)
    assert fisher.stderr("by_layer") == pytest.approx(whole[0].stderr("by_layer"), rel=1e-9)
    assert close(norms.squared_norms, whole[2].squared_norms, EXACT) and norms.num_samples == 6
    assert all(close(v, whole[1].by_layer()[k], EXACT) for k, v in by_layer.by_layer().items())
    assert oracle.error(moments.variance(dtype=torch.float64), whole[3].variance(dtype=torch.float64)) < EXACT
    assert moments.noise_scale() == pytest.approx(whole[3].noise_scale(), rel=1e-9)
    other = measure(model, [(x, y)], (ff.PerSampleNorm(), ff.GradientMoments()))
    for mine, theirs in zip((norms, moments), other, strict=True):
        with pytest.raises(ValueError, match="same fisher_type"):
            mine + theirs


def test_a_sum_with_a_fisher_that_recorded_no_spread_has_none():
    model, x, y = networks.doubles("mlp-inplace-relu", 6)
    a, b = (measure(model, [(x[s], y[s])], fisher_type="empirical") for s in (slice(0, 2), slice(2, 6)))
    a.spread = None
    for pooled in (a + b, b + a):
        with pytest.raises(ValueError, match="must have been recorded, got none"):
            pooled.stderr("trace")


def test_files_give_everything_back(tmp_path):
    model, x, y = networks.doubles("scale-of-a-weight", 6)
    results = measure(model, [(x, y)], WITH_MOMENTS, fisher_type="empirical")
    for number, result in enumerate(results):
        result.save(tmp_path / str(number))
        again = ff.load(tmp_path / str(number))
        (tensors, fields), (others, other_fields) = result.state(), again.state()
        assert fields == other_fields and tensors.keys() == others.keys()
        assert all(torch.equal(tensors[k], others[k]) for k in tensors)
    assert ff.load(tmp_path / "0").stderr("by_layer") == results[0].stderr("by_layer")
    assert ff.load(tmp_path / "0").coverage.share_of_time() == results[0].coverage.share_of_time()
    serialize.save(serialize.Several(results), tmp_path / "all")
    assert [type(r) for r in ff.load(tmp_path / "all")] == [type(r) for r in results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("structure", ["diagonal", WITH_MOMENTS], ids=["diagonal", "everything"])
def test_checkpoint_resumes_to_the_same_numbers(structure, dtype, tmp_path):
    class Faulty(nn.Module):
        on = True

        def forward(self, x):
            if self.on and len(x) == 5:
                raise RuntimeError("power cut")
            return x

    model = nn.Sequential(nn.Linear(3, 11), Faulty(), nn.Linear(11, 4)).to(dtype)
    model.register_parameter("idle", nn.Parameter(torch.ones(3)))
    x, y = networks.vectors(17)
    batches = [(a.to(dtype), b) for a, b in zip(x.split([6, 4, 5, 2]), y.split([6, 4, 5, 2]), strict=True)]
    options = {"draws": 2, "allow_missing": True, "checkpoint": tmp_path / "run"}
    with pytest.raises(RuntimeError, match="power cut"):
        measure(model, batches, structure, **options)
    model[1].on = False
    with pytest.raises(ValueError, match="must be of the same measurement"):
        measure(model, batches, (ff.Diagonal(stderr=False),), **options)
    resumed = measure(model, batches, structure, **options)
    whole = measure(model, batches, structure, draws=2, allow_missing=True)
    if structure == "diagonal":
        resumed, whole = (resumed,), (whole,)
    assert resumed[0].num_samples == 17
    assert resumed[0].stderr("by_layer") == pytest.approx(
        whole[0].stderr("by_layer"), rel=1e-9 if dtype == torch.float64 else 1e-5
    )
    if structure != "diagonal":
        assert all(torch.equal(a.squared_norms, b.squared_norms) for a, b in zip(resumed[1:3], whole[1:3], strict=True))
        assert oracle.error(resumed[3].variance(), whole[3].variance()) < 1e-6


RANK = """
    import sys, torch, torch.distributed as dist, fisherfast as ff
    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, x, y = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)), torch.randn(7, 3), torch.randint(4, (7,))
    part = slice(0, 3) if rank == 0 else slice(3, 7)
    fisher, moments = ff.fisher(
        model, [(x[part], y[part])], (ff.Diagonal(), ff.GradientMoments()), fisher_type="empirical", progress=False)
    fisher.all_reduce().save(f"{folder}/fisher{rank}")
    moments.all_reduce().save(f"{folder}/moments{rank}")
    fisher.spread = fisher.spread if rank else None
    fisher.all_reduce().save(f"{folder}/bare{rank}")
    if rank == 0:
        whole = ff.fisher(model, [(x, y)], (ff.Diagonal(), ff.GradientMoments()), fisher_type="empirical", progress=False)
        whole[0].save(f"{folder}/fisher"), whole[1].save(f"{folder}/moments")
    dist.destroy_process_group()
"""


def test_ranks_pool_to_the_whole(tmp_path):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(RANK)]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    fisher, moments = ff.load(tmp_path / "fisher"), ff.load(tmp_path / "moments")
    for rank in range(2):
        pooled, pooled_moments = ff.load(tmp_path / f"fisher{rank}"), ff.load(tmp_path / f"moments{rank}")
        assert pooled.stderr("trace") == pytest.approx(fisher.stderr("trace"), rel=1e-6)
        assert pooled.stderr("by_layer") == pytest.approx(fisher.stderr("by_layer"), rel=1e-6)
        assert pooled_moments.noise_scale() == pytest.approx(moments.noise_scale(), rel=1e-4)
        assert pooled_moments.num_samples == 7 and oracle.error(pooled_moments.variance(), moments.variance()) < 1e-5
        with pytest.raises(ValueError, match="must have been recorded, got none"):
            ff.load(tmp_path / f"bare{rank}").stderr("trace")
