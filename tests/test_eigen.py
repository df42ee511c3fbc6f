# SPDX-License-Identifier: Apache-2.0
"""Eigenvectors and what is computed with them, of factors that are zero, of rank one, huge, tiny, repeated, or not finite."""

import importlib
import math

import pytest
import torch
from oracle import close
from torch import nn

import fisherfast as ff
from fisherfast.accumulator import Accumulator
from fisherfast.fisher.blocks.eigen import EigenBlock
from fisherfast.fisher.blocks.exact import ExactBlock, Flat
from fisherfast.fisher.blocks.kronecker import KroneckerBlock, Place
from fisherfast.fisher.blocks.rank import Rounding
from fisherfast.fisher.counts import Counts
from fisherfast.fisher.coverage import Coverage
from fisherfast.fisher.protocol import Provenance

eigen = importlib.import_module("fisherfast.fisher.blocks.eigen")
graded = importlib.import_module("fisherfast.fisher.blocks._graded")
EXACT = 1e-9


def random(D, scale=1.0):
    rows = torch.randn(2 * D, D).double()
    return scale * rows.mT @ rows


def rank_one(D, scale=1.0):
    v = torch.randn(D).double()
    return scale * torch.outer(v, v)


FACTORS = {
    "zero": lambda D: torch.zeros(D, D).double(),
    "rank one": rank_one,
    "rank one, tiny": lambda D: rank_one(D, 1e-60),
    "rank one, huge": lambda D: rank_one(D, 1e60),
    "tiny": lambda D: random(D, 1e-60),
    "huge": lambda D: random(D, 1e60),
    "repeated": lambda D: 3 * torch.eye(D).double(),
    "repeated twice": lambda D: torch.block_diag(2 * torch.eye(D // 2), 5 * torch.eye(D - D // 2)).double(),
    "graded": lambda D: torch.diag(torch.logspace(-20, 20, D).double()),
}
SIZES = [(1, 1), (1, 5), (7, 5)]
COUNTS = Counts(1, 1, 1, Provenance(), Coverage({"w": "built here"}), {})


def kronecker(kind_a, kind_b, D, O):
    return KroneckerBlock(
        Place("w"),
        *(Accumulator(FACTORS[kind](n).unsqueeze(0), 1.0) for kind, n in ((kind_a, D), (kind_b, O))),
        Rounding.of(torch.float32),
    )


def with_its_own_values(block, dtype):
    """The EKFAC block in the eigenbasis of a Kronecker block, of the same matrix."""
    U, V = (eigen.eigenbasis(factor.mean(), None, dtype) for factor in (block.A, block.B))
    a, b = (((Q[0].double().mT @ F.mean()[0]) * Q[0].double().mT).sum(1) for Q, F in ((U, block.A), (V, block.B)))
    return EigenBlock(block, U, V, Accumulator(torch.outer(b, a).unsqueeze(0), 1.0))


CASES = [
    (name_a, name_b, D, O)
    for name_a, name_b in [*((name, "random") for name in FACTORS), *zip(FACTORS, reversed(FACTORS), strict=True)]
    for D, O in SIZES
]
FACTORS["random"] = random


WAYS = {"kfac": torch.float64, "ekfac-float32": torch.float32, "ekfac-float64": torch.float64}


@pytest.mark.parametrize(("structure", "dtype"), [(way.split("-")[0], dtype) for way, dtype in WAYS.items()], ids=WAYS)
@pytest.mark.parametrize(("A", "B", "D", "O"), CASES)
def test_damped_answers_are_those_of_the_matrix(A, B, D, O, structure, dtype):
    block = kronecker(A, B, D, O)
    matrix = torch.kron(block.B.mean()[0], block.A.mean()[0])
    damping = 1e-3 * float(matrix.diagonal().max()) or 0.5
    tolerance = 1e-9
    if structure == "ekfac":
        block = with_its_own_values(block, dtype)
        tolerance = 1e-9 if dtype == torch.float64 else 1e-3  # the basis is off by 1e-7, which a condition of 1e3 shows
    F = (ff.KFACFisher if structure == "kfac" else ff.EKFACFisher)([block], {}, COUNTS, {"w": torch.Size((O, D))})
    damped = matrix + damping * torch.eye(O * D).double()
    assert F.logdet(damping) == pytest.approx(float(torch.linalg.slogdet(damped)[1]), rel=1e-9, abs=tolerance)
    v = torch.randn(O, D).double()
    solved = F.solve({"w": v}, damping)["w"].flatten()
    assert close(damped @ solved / damping, v.flatten() / damping, tolerance * 1e3)
    draw = F.sample(1, damping=damping, generator=torch.Generator().manual_seed(5), dtype=torch.float64)["w"].flatten()
    normal = torch.randn(O, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).flatten()
    assert float(draw @ (damped @ draw)) == pytest.approx(float(normal @ normal), rel=max(tolerance, 1e-7))
    assert F.trace() == pytest.approx(float(matrix.trace()), rel=1e-6, abs=1e-300)


def test_a_draw_is_a_root_of_the_inverse_times_normal_numbers():
    """R R^T of the map from normal numbers to draws, column by column, for every kind of block: its covariance."""
    D, O = 4, 3
    full = kronecker("rank one", "rank one", D, O)
    U = torch.linalg.qr(torch.randn(D, 2).double()).Q.unsqueeze(0)
    V = torch.linalg.qr(torch.randn(O, O).double()).Q.unsqueeze(0)
    span = EigenBlock(full, U, V, Accumulator(torch.rand(1, O, 2).double(), 1.0))
    W = torch.linalg.qr(torch.randn(D, D).double()).Q.unsqueeze(0)
    whole = EigenBlock(full, W, V, Accumulator(torch.rand(1, O, D).double(), 1.0))
    exact = ExactBlock(Flat("w"), Accumulator(rank_one(O * D), 1.0), Rounding.of(torch.float32))
    for block in (full, span, whole, exact):
        shape = (1, 1, O * D) if block is exact else (1, O, D)
        units = torch.eye(O * D).double().view(-1, *shape)
        root, single = (
            torch.stack([column.flatten() for column in block.drawn(normals, lambda values: (values + 0.1).rsqrt())])
            for normals in (units, units.float())
        )
        inverse = torch.stack([block.spectrally(unit, lambda values: 1 / (values + 0.1)).flatten() for unit in units])
        torch.testing.assert_close(root.mT @ root, inverse, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(single, root.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("A", "B", "D", "O"), CASES)
def test_the_inverses_of_damped_factors_are_inverses(A, B, D, O):
    block = kronecker(A, B, D, O)
    damping = 1e-3 * float(block.A.mean().amax() * block.B.mean().amax()) or 0.5
    K = ff.KFACFisher([block], {}, COUNTS, {"w": torch.Size((O, D))})
    ((of_A, of_B),) = K.inverse(damping, dtype=torch.float64).values()
    (damped,) = K.factored(damping).blocks
    for inverse, factor in ((of_A, damped.A.mean()[0]), (of_B, damped.B.mean()[0])):
        assert bool(inverse.isfinite().all())
        assert close(inverse @ factor, torch.eye(len(factor)).double(), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("D", [1, 2, 7])
@pytest.mark.parametrize("kind", FACTORS)
def test_eigenvectors_are_orthonormal_and_diagonalise(kind, D, dtype):
    factor = FACTORS[kind](D)
    U = eigen.eigenbasis(factor.unsqueeze(0), None, dtype)[0].double()
    unit = torch.finfo(dtype).eps * 32
    assert close(U.mT @ U, torch.eye(D).double(), unit)
    turned = U.mT @ factor @ U
    assert close(turned - turned.diagonal().diag() + factor.abs().max(), factor.abs().max().expand(D, D), unit)


@pytest.mark.parametrize("weakest", [1e-1, 1e-3, 0.99e-4, 1.01e-4, 1e-5])  # at 1e-4, a Gram of 1e-8, one more step sets in
@pytest.mark.parametrize(("m", "D"), [(1, 3), (7, 23), (61, 199)])
def test_the_basis_of_few_rows_is_orthonormal_and_that_of_the_singular_vectors(m, D, weakest):
    left, right = (torch.linalg.qr(torch.randn(n, m, dtype=torch.float64))[0] for n in (m, D))
    rows = (left * torch.logspace(0, math.log10(weakest), m, dtype=torch.float64) @ right.mT).float()
    U = eigen.eigenbasis((rows.mT @ rows).unsqueeze(0), rows, torch.float32)[0].double()
    assert close(U.mT @ U, torch.eye(m).double(), 2e-6)
    expected = torch.linalg.svd(rows.double(), full_matrices=False).Vh.flip(0).mT
    assert close((U.mT @ expected).diagonal().abs(), torch.ones(m).double(), 2e-6)


@pytest.mark.parametrize("seed", range(3))
def test_directions_just_above_what_is_dropped_are_orthonormal_to_float32(seed):
    torch.manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, 61, dtype=torch.float64))[0] for n in (61, 199))
    rows = (left * torch.logspace(0, math.log10(4e-6), 61, dtype=torch.float64) @ right.mT).float()  # 1e-11 is of the squares
    U = eigen.eigenbasis((rows.mT @ rows).unsqueeze(0), rows, torch.float32)[0].double()
    assert close(U.mT @ U, torch.eye(61).double(), 8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_groups_are_decomposed_together_as_one_by_one(dtype, monkeypatch):
    kinds = ["random", "zero", "tiny", "rank one", "huge", "repeated", "random"]
    factors, calls, eigh = torch.stack([FACTORS[kind](6) for kind in kinds]), [], torch.linalg.eigh

    def counting(matrices):
        calls.append(len(matrices))
        return eigh(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", counting)
    together = eigen.eigenbasis(factors, None, dtype)
    monkeypatch.setattr(eigen, "_CHUNK_BYTES", 3 * dtype.itemsize * 36)
    in_chunks = eigen.eigenbasis(factors, None, dtype)
    one_by_one = torch.cat([eigen.eigenbasis(one, None, dtype) for one in factors.split(1)])
    assert calls == [7, 3, 3, 1, *[1] * 7]
    assert torch.equal(together, one_by_one) and torch.equal(in_chunks, one_by_one)


@pytest.mark.parametrize("way", ["raises", "gives NaN"])
def test_only_those_that_fail_are_decomposed_again_in_float64(way, monkeypatch):
    factors, eigh = graded.sort_by_diagonal(torch.stack([random(5) for _ in range(4)]))[0], torch.linalg.eigh
    expected = eigen.eigenbasis(factors, None, torch.float32)
    bad = (factors[2] / factors[2].diagonal().max()).float()

    def stubborn(matrices):
        fails = (matrices.float() == bad).flatten(1).all(1) & (matrices.dtype == torch.float32)
        if way == "raises" and fails.any():
            raise torch.linalg.LinAlgError("did not converge")
        values, vectors = eigh(matrices)
        vectors[fails] = math.nan
        return type("Eigh", (), {"eigenvectors": vectors, "eigenvalues": values})

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    found = eigen.eigenbasis(factors, None, torch.float32)
    others = [0, 1, 3]
    assert torch.equal(found[others], expected[others])
    assert torch.equal(found[2], eigh(bad.double()).eigenvectors.float())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["input", "output"])
def test_a_factor_that_is_not_finite_is_named(which, value):
    block = kronecker("random", "random", 3, 5)
    (block.A if which == "input" else block.B).sum[0, 1, 1] = value
    K = ff.KFACFisher([block], {}, COUNTS, {"w": torch.Size((5, 3))})
    message = f"w: its {which} factor must be finite, got NaN or infinity; .*float64"
    for ask in (
        lambda: K.logdet(0.1),
        lambda: K.solve({"w": torch.ones(5, 3)}, 0.1),
        lambda: K.eigenvalues(),
        lambda: K.sample(1, damping=0.1),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
    with pytest.raises(ValueError, match=r"w: its (in|out)put factor must be finite"):
        K.inverse(0.1)
    exact = ExactBlock(Flat("w"), Accumulator(torch.full((2, 2), value), 1.0), Rounding.of(torch.float32))
    with pytest.raises(ValueError, match="w: its exact block must be finite"):
        exact.logdet(0.1)


@pytest.mark.parametrize("kind", ["kronecker", "exact"])
def test_what_is_known_of_a_block_is_void_once_its_sums_change(kind):
    def block():
        if kind == "kronecker":
            return kronecker("rank one", "rank one", 5, 4)
        return ExactBlock(Flat("w"), Accumulator(rank_one(5), 1.0), Rounding.of(torch.float32))

    def known(one):
        v = torch.ones(1, 4 if kind == "kronecker" else 1, 5).double()
        zeros = [one.zeros_of_A, one.zeros_of_B] if kind == "kronecker" else []
        inverse = one.spectrally(v, lambda values: 1 / (values + 0.1))
        return [*zeros, *one.spectrum()[0], inverse, torch.tensor(one.logdet(0.1)[0])]

    one, other = block(), block()
    both = one.pooled(other, {})
    known(one)
    for mine, more in zip(one.accumulators(), other.accumulators(), strict=True):
        both_sums = mine + more
        mine.parts, mine.weight = both_sums.parts, both_sums.weight  # in place, as the pooling of ranks does
    one.changed()
    for mine, expected in zip(known(one), known(both), strict=True):
        torch.testing.assert_close(mine, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_a_run_whose_squares_overflow_names_the_weight(structure):
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight.mul_(1e-20)  # outputs of ordinary size, so that gradients are
    batch = (1e20 * torch.ones(7, 3), torch.randint(2, (7,)))
    with pytest.raises(ValueError, match=r"0\.weight: its input factor must be finite"):
        ff.fisher(model, [batch], structure, progress=False).logdet(0.1)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_a_layer_that_no_gradient_reaches_is_zero(structure, sharing):
    """Its inputs are not even looked at, in any batch; in later ones it may come to life."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        model[0].bias -= 100
    dead, alive = ((x, torch.randint(2, (7,))) for x in (torch.randn(7, 3).double(), 1e3 * torch.randn(7, 3).double()))
    asked = (ff.KFAC(sharing=sharing),) if structure == "kfac" else (ff.EKFAC(),)
    (F,) = ff.fisher(model, [dead], asked, progress=False)
    D = ff.fisher(model, [dead], "diagonal", progress=False)
    assert D.diagonal()["0.weight"].abs().max() == 0 == F.diagonal()["0.weight"].abs().max()
    assert F.by_layer()["0"].trace == 0 and F.trace() == pytest.approx(D.trace())
    v = {name: torch.randn(shape).double() for name, shape in F.shapes.items()}
    assert torch.equal((F @ v)["0.weight"], torch.zeros(5, 3).double())
    assert close(F.solve(v, 0.1)["0.weight"], v["0.weight"] / 0.1, EXACT)
    assert math.isfinite(F.logdet(0.1)) and bool(F.sample(2, damping=0.1)["0.weight"].isfinite().all())
    if structure == "kfac":
        assert all(bool(one.isfinite().all()) for pair in F.inverse(0.1).values() for one in pair)
        (both,) = ff.fisher(model, [dead, alive], asked, fisher_type="empirical", progress=False)
        (first,), (second,) = (ff.fisher(model, [one], asked, fisher_type="empirical", progress=False) for one in (dead, alive))
        pooled = (first + second).diagonal()
        assert all(close(pooled[name], each, 1e-6) for name, each in both.diagonal().items())
