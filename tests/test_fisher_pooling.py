# SPDX-License-Identifier: Apache-2.0
"""Fishers of parts pool to the Fisher of the whole, in one process and over ranks; unlike measurements are refused."""

import itertools
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from diagonals import SHAPES, example, of_sums
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fisherfast as ff
from fisherfast.accumulator import Accumulator
from fisherfast.fisher import DiagonalFisher, Provenance, load

ENTRIES = st.lists(st.integers(0, 2**40), min_size=4, max_size=4)


@given(ENTRIES, ENTRIES, ENTRIES)
def test_pooling_equals_one_pass(first, second, third):
    parts = (first, second, third)

    def measured(*rows, samples):
        total = Accumulator.zeros((4,))
        for row in rows:
            total += Accumulator(torch.tensor(row, dtype=torch.float64), samples)
        return of_sums({"w": total}, num_samples=samples * len(rows), num_positions=5 * samples * len(rows), batches=len(rows))

    a, b, c = (measured(part, samples=3) for part in parts)
    whole = measured(*parts, samples=3)
    for pooled in ((a + b) + c, a + (b + c), c + b + a):
        assert torch.equal(pooled.diagonal(dtype=torch.float64)["w"], whole.diagonal(dtype=torch.float64)["w"])
        assert (pooled.num_samples, pooled.num_positions, pooled.batches) == (9, 45, 3)


def test_pooling_leaves_its_terms_alone():
    a, b = example(0), example(1)
    before = a.diagonal(), b.diagonal()
    a + b
    assert all(torch.equal(x[n], y.diagonal()[n]) for x, y in zip(before, (a, b), strict=True) for n in SHAPES)


def test_pooling_keeps_what_is_common():
    a = example(provenance=Provenance("mc", "categorical", 1, 5, "Net"), coverage={"scale": "loop", "head.weight": "linear_sq_"})
    b = example(
        provenance=Provenance("mc", "categorical", 4, 5, "Net"), coverage={"scale": "scale_sq_", "head.weight": "linear_sq_"}
    )
    assert (a + a).provenance == a.provenance
    assert (a + b).provenance == Provenance("mc", "categorical", None, 5, "Net")
    assert (a + b).coverage == {"scale": "loop + scale_sq_", "head.weight": "linear_sq_"}
    c = example(provenance=Provenance("mc", "categorical", 1, 6, "Net"))
    assert (a + c).provenance == Provenance("mc", "categorical", 1, None, "Net")


def test_pooling_rejects_other_measurements():
    base = Provenance("mc", "categorical", model="Net")
    F = example(provenance=base)
    for other, reason in [
        (Provenance("empirical", "categorical", model="Net"), "same fisher_type, got 'mc' and 'empirical'"),
        (Provenance("mc", "gaussian", model="Net"), "same likelihood, got 'categorical' and 'gaussian'"),
        (Provenance("mc", "categorical", model="Other"), "same model, got 'Net' and 'Other'"),
        (None, "same fisher_type, got 'mc' and None"),
    ]:
        with pytest.raises(ValueError, match=reason):
            F + example(provenance=other)
    small = DiagonalFisher({"w": torch.ones(2, 3)}, 1)
    with pytest.raises(ValueError, match=r"same parameters, got \[2, 3\] and \[3, 2\] for 'w'"):
        small + DiagonalFisher({"w": torch.ones(3, 2)}, 1)
    with pytest.raises(ValueError, match=r"same parameters, got nothing and \[2\] for 'b'"):
        small + DiagonalFisher({"w": torch.ones(2, 3), "b": torch.ones(2)}, 1)
    with pytest.raises(ValueError, match="same aliases, got nothing and w for 'tied'"):
        small + DiagonalFisher({"w": torch.ones(2, 3)}, 1, aliases={"tied": "w"})
    with pytest.raises(TypeError, match="unsupported operand"):
        small + 1
    net, data = torch.nn.Linear(3, 2), [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))]
    kinds = [ff.fisher(net, data, structure, progress=False) for structure in ("diagonal", "kfac", "ekfac", "gram")]
    for one, other in itertools.permutations(kinds, 2):
        with pytest.raises(TypeError, match=f"one structure, got {type(one).__name__} and {type(other).__name__}"):
            one + other


def two_layers_of_one_input(samples):
    """The Kronecker factors of some of six samples; the layers' input factor is shared."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x):
            return self.q(x) * self.k(x).tanh()

    torch.manual_seed(0)
    model, x, y = Model().double(), torch.randn(6, 5, 3).double(), torch.randint(0, 4, (6, 5))
    return ff.fisher(model, [(x[samples], y[samples])], "kfac", "empirical", progress=False)


def norms_of(samples, by_layer=True):
    """The gradient norms of some of seven samples."""
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double(),
        torch.randn(7, 3).double(),
        torch.randint(0, 5, (7,)),
    )
    with ff.collect(model, ff.PerSampleNorm(by_layer=by_layer), fisher_type="empirical") as stats:
        stats.backward(nn.functional.cross_entropy(model(x[samples]), y[samples], reduction="none"))
    return stats.result()


class Two(nn.Module):
    """Two layers of one size, defined in either order."""

    def __init__(self, names):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(6, 6))

    def forward(self, x):
        """[N, 6]."""
        return self.b(self.a(x).tanh())


def in_two_orders():
    """Two models of the same parameters, inputs and labels."""
    models = [Two("ab").double(), Two("ba").double()]
    models[1].load_state_dict(models[0].state_dict())
    return models, torch.randn(8, 6).double(), torch.randint(0, 6, (8,))


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
def test_blocks_pool_by_name_whatever_the_order_of_the_parameters(structure):
    models, x, y = in_two_orders()
    options = {"fisher_type": "empirical", "progress": False}
    if structure == "ekfac":
        basis = ff.fisher(models[0], [(x, y)], "kfac", **options)
        structure = (ff.EKFAC(basis=basis),)
        models[1] = models[0]  # a basis has the order of its parameters
    parts = [
        ff.fisher(model, [(x[s], y[s])], structure, **options)
        for model, s in zip(models, (slice(0, 3), slice(3, 8)), strict=True)
    ]
    whole = ff.fisher(models[0], [(x, y)], structure, **options)
    (first, second), whole = (
        ((one[0] if isinstance(one, tuple) else one) for one in parts),
        (whole[0] if isinstance(whole, tuple) else whole),
    )
    pooled, expected = (first + second).diagonal(dtype=torch.float64), whole.diagonal(dtype=torch.float64)
    for name, diagonal in expected.items():
        torch.testing.assert_close(pooled[name], diagonal, rtol=1e-6, atol=1e-9)


def test_standard_errors_pool_by_layer_whatever_the_order_of_the_layers():
    models, x, y = in_two_orders()
    options = {"fisher_type": "empirical", "progress": False}
    one, other = (ff.fisher(m, [(x[s], y[s])], **options) for m, s in zip(models, (slice(0, 3), slice(3, 8)), strict=True))
    whole = ff.fisher(models[0], [(x, y)], **options).stderr("by_layer")
    for pooled in (one + other, other + one):
        assert pooled.stderr("by_layer") == pytest.approx(whole, rel=1e-9)


def test_norms_of_other_parameters_do_not_pool():
    layers, whole = norms_of(slice(0, 3)), norms_of(slice(3, 7), by_layer=False)
    for one, other in ((layers, whole), (whole, layers)):
        with pytest.raises(ValueError, match="must have the same layers"):
            one + other
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.zeros(4).long()
    every = ff.fisher(model, [(x, y)], ff.PerSampleNorm(), progress=False)
    model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="must have the same parameters"):
        every + ff.fisher(model, [(x, y)], ff.PerSampleNorm(), progress=False)


RANK = """
    from diagonals import of_sums
    from test_fisher_pooling import norms_of, two_layers_of_one_input
    import sys, torch, torch.distributed as dist, fisherfast as ff
    from fisherfast.accumulator import Accumulator
    from fisherfast.fisher import Provenance

    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def measured(fisher_type="mc", order=1):
        g = torch.Generator().manual_seed(rank)
        sums = {n: Accumulator(torch.randint(2**40, s, generator=g).double(), 3 + 4 * rank + len(n)) for n, s in
                [("w", (5, 3)), ("b", (5,)), ("unseen", (2, 2))][::order]}
        return of_sums(
            sums, num_samples=7 + rank, num_positions=70 + rank, batches=1 + rank, aliases={"tied": "w"},
            provenance=Provenance(fisher_type, "categorical", 1, rank, "Net"))

    F = measured()
    F.save(f"{folder}/alone{rank}")
    assert F.all_reduce() is F
    F.save(f"{folder}/pooled{rank}")
    measured(order=-1 if rank else 1).all_reduce()  # the order of names may differ: no deadlock
    try:
        measured(["mc", "empirical"][rank]).all_reduce()
    except ValueError as error:
        open(f"{folder}/error{rank}", "w").write(str(error))
    mine = [slice(0, 2), slice(2, 6)][rank]
    try:
        (measured() if rank else two_layers_of_one_input(mine)).all_reduce()
    except ValueError as error:
        open(f"{folder}/structure{rank}", "w").write(str(error))
    two_layers_of_one_input(mine).all_reduce().save(f"{folder}/kfac{rank}")
    norms = norms_of([slice(0, 2), slice(2, 7)][rank])
    assert norms.all_reduce() is norms
    norms.save(f"{folder}/norms{rank}")
    try:
        norms_of(mine, by_layer=bool(rank)).all_reduce()
    except ValueError as error:
        open(f"{folder}/layers{rank}", "w").write(str(error))
    try:  # what cannot be pooled says so to the other rank, too, which would wait for it
        model, x, y = torch.nn.Linear(3, 2), torch.randn(4, 3), torch.zeros(4).long()
        ff.fisher(model, [(x, y)], ["diagonal", "gram"][rank], progress=False).all_reduce()
    except ValueError as error:
        open(f"{folder}/gram{rank}", "w").write(str(error))
    dist.destroy_process_group()
"""


def run_ranks(script, folder):
    """Two processes, which are given their rank and the folder."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    ranks = [subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()


def test_all_reduce_equals_pooling(tmp_path):
    run_ranks(RANK, tmp_path)
    whole = two_layers_of_one_input(slice(None))
    expected = load(tmp_path / "alone0") + load(tmp_path / "alone1")
    for rank in range(2):
        F = load(tmp_path / f"pooled{rank}")
        (tensors, fields), (expected_tensors, expected_fields) = F.state(), expected.state()
        assert fields == expected_fields and F.provenance == Provenance("mc", "categorical", 1, None, "Net")
        assert all(torch.equal(tensors[name], expected_tensors[name]) for name in expected.names)
        kind = ["mc", "empirical"][rank]
        K = load(tmp_path / f"kfac{rank}")
        N, seven = load(tmp_path / f"norms{rank}"), norms_of(slice(None))
        assert N.num_samples == 7 and N.squared_norms.equal(seven.squared_norms)
        assert all(N.by_layer()[layer].equal(norms) for layer, norms in seven.by_layer().items())
        assert (tmp_path / f"layers{rank}").read_text().startswith("all_reduce: layers must be the same on all ranks, got ")
        v = torch.linspace(-1, 1, K.num_parameters).double()
        assert sum(block.place.input_of is not None for block in K.blocks) == 1
        torch.testing.assert_close(K @ v, whole @ v, rtol=1e-12, atol=1e-12)
        assert (tmp_path / f"structure{rank}").read_text().startswith("all_reduce: structure must be the same on all ranks, got ")
        assert (
            tmp_path / f"error{rank}"
        ).read_text() == f"all_reduce: fisher_type must be the same on all ranks, got {kind!r} here; measure them alike"
    for rank in range(2):
        assert "structure must be the same on all ranks" in (tmp_path / f"gram{rank}").read_text()


RANKS_OF_DTYPES = """
    import sys, torch, torch.distributed as dist, fisherfast as ff
    from torch import nn

    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(40, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=rank == 0):
        K = ff.fisher(model, [(x[20 * rank : 20 * rank + 20], None)], ff.KFAC(max_exact_dim=0), "exact", progress=False)
    K.all_reduce().save(f"{folder}/dtypes{rank}")
    dist.destroy_process_group()
"""


def test_ranks_that_measured_in_several_precisions_have_one_answer(tmp_path):
    run_ranks(RANKS_OF_DTYPES, tmp_path)
    first, second = (load(tmp_path / f"dtypes{rank}") for rank in range(2))
    assert {block.rounding.rows_of_g for F in (first, second) for block in F.blocks} == {torch.finfo(torch.bfloat16).eps}
    for one, other in zip(first.spectra(), second.spectra(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.factors, other.factors, strict=True))
    with pytest.warns(ff.FisherWarning, match="eigenvalues of .* are zero: -inf"):
        assert first.logdet() == second.logdet() == -math.inf


RANK_WITH_ROWS = """
    import sys, torch, torch.distributed as dist, fisherfast as ff
    from torch import nn

    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, x, y = nn.Linear(30, 3).double(), torch.randn(4, 30).double(), torch.tensor([0, 1, 2, 0])
    options = {"fisher_type": "empirical", "progress": False}
    mine = slice(2 * rank, 2 * rank + 2)
    (K,) = ff.fisher(model, [(x[mine], y[mine])], (ff.KFAC(keep_rows=True),), **options)
    v = torch.randn(K.num_parameters).double()
    K.logdet(0.1), K.solve(v, 0.1)  # what is computed of the rank's own data, and the rows behind its factors, are void below
    K.all_reduce()
    whole = ff.fisher(model, [(x, y)], "kfac", **options)
    torch.testing.assert_close(K.solve(v, 0.1), whole.solve(v, 0.1), rtol=1e-9, atol=1e-9)
    assert abs(K.logdet(0.1) - whole.logdet(0.1)) < 1e-9 * abs(whole.logdet(0.1))
    E, D = ff.fisher(model, [(x, y)], ff.EKFAC(basis=K), **options), ff.fisher(model, [(x, y)], **options)
    assert abs(E.trace() - D.trace()) < 1e-9 * D.trace()
    dist.destroy_process_group()
"""


def test_what_a_rank_knew_of_its_own_data_is_void_once_pooled(tmp_path):
    run_ranks(RANK_WITH_ROWS, tmp_path)


def test_results_of_two_kinds_are_refused_by_name():
    """Norms and moments as Fishers: not by Python's own words, which give no reason."""
    model, data = torch.nn.Linear(3, 2), [(torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1]))]
    norms, moments = ff.fisher(model, data, (ff.PerSampleNorm(), ff.GradientMoments()), "empirical", progress=False)
    for one, other in ((norms, moments), (moments, norms)):
        with pytest.raises(TypeError, match=f"must have one structure, got {type(one).__name__} and {type(other).__name__}"):
            one + other


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "gram", ff.PerSampleNorm(), ff.GradientMoments()], ids=str)
def test_a_list_of_results_has_a_sum(structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    parts = [
        ff.fisher(model, [(torch.randn(6, 4), torch.arange(6) % 3)], structure, "empirical", progress=False) for _ in range(3)
    ]
    assert sum(parts).num_samples == 18
    assert sum(parts[:1]) is parts[0]
    with pytest.raises(TypeError, match="unsupported operand type"):
        sum(parts, 1)
