# SPDX-License-Identifier: Apache-2.0
"""What is singular is found to be, in float32 as in float64: a classifier's Fisher always is, since its scores sum to zero over classes."""

import copy
import itertools
import math

import pytest
import torch
from networks import Wrapped
from torch import nn

import fisherfast as ff
from fisherfast.accumulator import Accumulator
from fisherfast.fisher.blocks import kronecker, rank
from fisherfast.fisher.blocks.exact import ExactBlock, Flat
from fisherfast.fisher.blocks.rank import Rounding

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
STRUCTURES = pytest.mark.parametrize("structure", ["kfac", "ekfac", "gram"])


def measured(structure, dtype, widths=(12, 7), N=64, size=64, fisher_type="mc", **options):
    layers = [module for pair in itertools.pairwise(widths) for module in (nn.Linear(*pair), nn.ReLU())][:-1]
    model, x = nn.Sequential(*layers).to(dtype), torch.randn(N, widths[0], dtype=torch.float64).to(dtype)
    return ff.fisher(model, [(part, None) for part in x.split(size)], structure, fisher_type, progress=False, **options)


@DTYPES
@STRUCTURES
@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
@pytest.mark.parametrize("widths, size", [((12, 7), 64), ((12, 7), 16), ((30, 20, 10), 64), ((5, 3), 64)], ids=str)
def test_a_classifier_is_singular(structure, dtype, widths, size, fisher_type):
    F = measured(structure, dtype, widths, size=size, fisher_type=fisher_type)
    with pytest.warns(ff.FisherWarning, match="are zero: -inf"):
        assert F.logdet() == -math.inf
    for refused in (lambda: F.solve(F.diagonal()), lambda: F.sample(1)):
        with pytest.raises(ValueError, match="damp"):
            refused()


@DTYPES
@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("D", [40, 150, 400])
def test_eigenvalues_that_differ_from_zero_are_as_many_as_the_factors_ranks_allow(structure, dtype, D):
    N, C = 32, 6
    F = measured(structure, dtype, (D, C), N=N, size=16)
    assert int((F.eigenvalues() > 0).sum()) == min(N, D + 1) * (C - 1)


def test_the_zeros_of_every_group_are_counted():
    model = nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.Flatten()).double()
    F = ff.fisher(model, [(torch.randn(3, 4, 2).double(), None)], "kfac", "exact", "gaussian", progress=False)
    zeros = int((F.eigenvalues() == 0).sum())
    assert zeros == 2 * (5 - 3) * 3
    with pytest.warns(ff.FisherWarning, match=f"{zeros} of {F.num_parameters} eigenvalues"):
        assert F.logdet() == -math.inf


def test_the_zeros_of_diagonals_are_counted():
    """The block has a damping of its own, so that the one zero is of the vector, of which an entry is not used."""
    model = Wrapped(lambda m, x: m.a(x) + m.c[:2], a=nn.Linear(4, 2), c=nn.Parameter(torch.randn(3))).double()
    (F,) = ff.fisher(model, [(torch.randn(7, 4).double(), None)], (ff.KFAC(max_exact_dim=0),), "exact", progress=False)
    assert list(F.diagonals) == ["c"]
    with pytest.warns(ff.FisherWarning, match="1 of 13 eigenvalues of F . damping I are zero: -inf"):
        assert F.logdet({"a": 0.1, "c": 0.0}) == -math.inf


@DTYPES
def test_a_singular_factor_has_no_inverse(dtype):
    for seed in range(8):  # Cholesky alone finds half of them
        torch.manual_seed(seed)
        F = measured("kfac", dtype)
        with pytest.raises(ValueError, match=r"factors must be regular, got a singular one of '0\.weight'"):
            F.inverse(0.0)
        F.inverse(0.1)


SMALL = {
    "columns": torch.logspace(0, -5, 9),
    "one column": torch.tensor([1.0] * 8 + [1e-5]),
    "all but the one of the bias": torch.full((9,), 1e5),
}


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", SMALL)
def test_small_inputs_are_no_rounding(structure, name):
    model, x = nn.Linear(9, 1), torch.randn(200, 9) * SMALL[name]
    model.weight.data /= SMALL[name].max()
    wide = nn.Linear(9, 1).double()
    wide.load_state_dict(model.state_dict())
    narrow, exact = (
        ff.fisher(m, [(x.to(m.weight.dtype), None)], structure, likelihood="bernoulli", progress=False) for m in (model, wide)
    )
    assert narrow.logdet() == pytest.approx(exact.logdet(), abs=1e-2)  # an eigenvalue that counted as zero would make it -inf
    assert exact.eigenvalues().min() < 1e-9 * exact.eigenvalues().max()


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("scales", [(1, 1, 1, 1, 1e9), (1e-2, 1, 1e8, 1, 0.1), (1e-9,) * 5], ids=str)
def test_small_eigenvalues_do_not_depend_on_the_order_of_the_inputs(structure, scales):
    """LAPACK's rounding covers them where small rows come first; the bias's, of ones, is the last."""
    torch.manual_seed(0)
    size = torch.tensor(scales, dtype=torch.float64)
    model, x = nn.Linear(5, 1).double(), torch.randn(300, 5).double() * size
    model.weight.data /= size.max()
    falling = nn.Linear(5, 1, bias=False).double()  # the same with the largest first, and the ones as an input
    inputs = torch.cat([x, torch.ones(300, 1)], 1)
    order = inputs.square().sum(0).argsort(descending=True)
    falling.weight.data = torch.cat([model.weight.data, model.bias.data[:, None]], 1)[:, order]
    found, expected = (
        ff.fisher(m, [(rows, None)], structure, "exact", "bernoulli", progress=False).eigenvalues()
        for m, rows in ((model, x), (falling, inputs[:, order]))
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_basis_in_float32_has_the_small_columns_of_one_in_float64():
    torch.manual_seed(3)
    size = torch.tensor([1e-2, 1, 1e5, 1, 0.1]).double()
    model, x = nn.Linear(5, 4).double(), torch.randn(300, 5).double() * size
    model.weight.data /= size
    narrow = nn.Linear(5, 4)
    narrow.load_state_dict(model.state_dict())
    bits = [
        ff.information_in_weights(
            ff.fisher(m, [(rows, None)], "ekfac", "exact", progress=False), m, prior_scale=10.0, beta=1 / 300
        ).kl
        for m, rows in ((model, x), (narrow, x.float()))
    ]
    assert bits[1] == pytest.approx(bits[0], rel=1e-4)


def test_rows_that_are_looked_up_are_not_projected():
    """A token whose gradient is small beside the others' is in no sum with them."""
    model = nn.Sequential(nn.Embedding(3, 1), nn.Flatten(0))
    model[0].weight.data[2] = 40.0  # a Bernoulli variance of 4e-18, and float32 has it
    E, G = ff.fisher(model, [(torch.tensor([[0], [1], [2]] * 5), None)], ("ekfac", "gram"), "exact", "bernoulli", progress=False)
    assert E.eigenvalues().min() == pytest.approx(float(G.diagonal()["0.weight"].min()), rel=1e-5) and E.eigenvalues().min() > 0


@pytest.mark.parametrize("N", [8, 32, 64])
@DTYPES
def test_exact_blocks_have_the_rank_of_their_rows(dtype, N):
    model = nn.Sequential(nn.Linear(5, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 3)).to(dtype)
    F = ff.fisher(model, [(torch.randn(N, 5).to(dtype), None)], "kfac", progress=False)
    for spectrum in F.spectra():
        if spectrum.parameters in (("1.weight",), ("1.bias",)):
            assert int((spectrum.eigenvalues() > 0).sum()) == min(N, 24)


@pytest.mark.parametrize("first", [torch.float32, torch.float64], ids=str)
def test_a_sum_is_as_precise_as_the_less_precise(first):
    torch.manual_seed(3)
    second = torch.float64 if first == torch.float32 else torch.float32
    one, other = measured("kfac", first), measured("kfac", second)
    with pytest.warns(ff.FisherWarning, match="are zero: -inf"):
        assert (one + other).logdet() == -math.inf


@pytest.mark.parametrize("first", [0, 1])
def test_a_sum_of_exact_blocks_is_as_precise_as_the_less_precise(first):
    roundings = [Rounding.of(dtype) for dtype in (torch.float32, torch.float64)]
    blocks = [ExactBlock(Flat("w"), Accumulator(torch.eye(3), 1.0), rounding) for rounding in roundings]
    assert blocks[first].pooled(blocks[1 - first], {}).rounding == roundings[0]


def test_damping_in_the_factors_is_no_rounding():
    K = measured("kfac", torch.float32, N=640, size=640)
    damped, (A, B) = K.factored(1e-8), K.inverse(1e-8, dtype=torch.float64)["0" if "0" in K.factors() else ""]
    O, D = len(B), len(A)
    assert damped.logdet() == pytest.approx(-float(D * B.slogdet()[1] + O * A.slogdet()[1]), rel=1e-6)


def test_a_shift_below_the_rounding_of_float32_is_no_rounding():
    model, x, s = nn.Linear(2, 1, bias=False), torch.randn(50, 1).expand(50, 2), 1e-8
    K = ff.fisher(model, [(x, None)], "kfac", "exact", "gaussian", progress=False)
    m = float(x[:, 0].double().square().mean())
    pi = m**0.5  # the factors' traces over their sizes are m and 1
    expected = math.log(2 * m + pi * s) + math.log(pi * s) + 2 * math.log(1 + s / pi)
    assert K.factored(s**2).logdet() == pytest.approx(expected, rel=1e-5)


def test_a_file_has_the_precision(tmp_path):
    """In float64 an eigenvalue is no rounding that would be in float32."""
    layer = nn.Linear(6, 1).double()
    x = torch.randn(50, 6).double()
    x[:, 1] = x[:, 0] + 1e-5 * x[:, 1]
    F = ff.fisher(layer, [(x, None)], "kfac", "exact", "bernoulli", progress=False)
    F.save(tmp_path / "f.safetensors")
    again = ff.load(tmp_path / "f.safetensors")
    assert math.isfinite(F.logdet()) and again.logdet() == F.logdet()


def rounded(layers, way, structure, x, likelihood="categorical"):
    """Measured where gradients come in 16 bits: of a model in them, or under autocast."""
    autocast = way == "autocast"
    model = copy.deepcopy(layers) if autocast else copy.deepcopy(layers).to(way)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return ff.fisher(model, [(x if autocast else x.to(way), None)], structure, "exact", likelihood, progress=False)


WAYS = pytest.mark.parametrize("way", [torch.bfloat16, torch.float16, "autocast"], ids=str)


@WAYS
@pytest.mark.parametrize(
    "structure, widths",
    [("kfac", (3, 4)), ("ekfac", (3, 4)), ("gram", (3, 4)), ("kfac", (20, 64, 10)), ("ekfac", (20, 64, 10))],
    ids=str,
)
def test_scores_that_were_rounded_to_16_bits_sum_to_zero_all_the_same(structure, widths, way):
    """The scores of C classes leave a zero for each input and the bias: what their rounding makes of these is no information."""
    torch.manual_seed(0)
    layers = [module for pair in itertools.pairwise(widths) for module in (nn.Linear(*pair), nn.ReLU())][:-1]
    F = rounded(nn.Sequential(*layers), way, structure, torch.randn(400, widths[0]))
    assert int((F.eigenvalues() == 0).sum()) == widths[-2] + 1
    with pytest.warns(ff.FisherWarning, match="are zero: -inf"):
        assert F.logdet() == -math.inf


@WAYS
@STRUCTURES
def test_eigenvalues_that_are_small_and_not_zero_survive_16_bits(structure, way):
    """Those of a regression are the inputs', a thousandfold apart, times the squares of what the second layer multiplies by."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 3, bias=False))
    layers[1].requires_grad_(False)
    layers[1].weight.copy_(torch.diag(torch.tensor([1.0, 0.5, 0.25])))
    x = torch.randn(64, 4) * torch.tensor([1.0, 0.5, 0.25, 0.125])
    F, exact = rounded(layers, way, structure, x, "gaussian"), rounded(layers, torch.float64, structure, x, "gaussian")
    torch.testing.assert_close(F.eigenvalues(), exact.eigenvalues(), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "gram"])
def test_a_file_and_a_sum_know_how_coarse_the_gradients_came(structure, tmp_path):
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 4), torch.randn(400, 3)
    F = rounded(layer, "autocast", structure, x)
    F.save(tmp_path / "f.safetensors")
    again = ff.load(tmp_path / "f.safetensors")
    basis = {} if structure != "ekfac" else {"basis": again}
    assert int((again.eigenvalues() == 0).sum()) == 4
    if not basis:
        finer = ff.fisher(layer, [(x, None)], structure, "exact", progress=False)
        assert [int((both.eigenvalues() == 0).sum()) for both in (finer + F, F + finer)] == [4, 4]


def test_files_say_how_a_block_was_rounded_by_the_names_of_dtypes():
    F = rounded(nn.Linear(3, 4), "autocast", "kfac", torch.randn(400, 3))
    tensors, fields = F.state()
    assert fields["blocks"] == [["kronecker", F.blocks[0].place.state(), ["float32", "bfloat16"], 400.0, 400.0]]
    assert type(F).from_state(tensors, fields).blocks[0].rounding == F.blocks[0].rounding


def test_gradients_in_16_bits_are_judged_as_such_in_a_basis_that_is_of_finer_ones():
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 4), torch.randn(400, 3)
    basis = ff.fisher(layer, [(x, None)], "kfac", "exact", progress=False)
    F = rounded(layer, "autocast", ff.EKFAC(basis=basis), x)
    assert int((F.eigenvalues() == 0).sum()) == 4
    assert basis.blocks[0].rounding.rows_of_g == torch.finfo(torch.float32).eps


def test_eigenvectors_of_small_eigenvalues_are_mixed_no_further_than_their_rounding():
    """In float64 as well: of many classes, where a network is sure, most have next to nothing."""
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 300, bias=False).double(), 30 * torch.randn(1200, 5).double()
    found = [ff.fisher(layer, [(x, None)], s, "mc", progress=False) for s in ("kfac", "ekfac")]
    assert [int((F.eigenvalues() == 0).sum()) for F in found] == [5, 5]


@STRUCTURES
def test_a_file_and_a_sum_know_the_precision_of_what_they_are_of(structure, tmp_path):
    F = measured(structure, torch.float32)
    F.save(tmp_path / "f.safetensors")
    for same in (ff.load(tmp_path / "f.safetensors"), F + F):
        with pytest.warns(ff.FisherWarning, match="are zero: -inf"):
            assert same.logdet() == -math.inf


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("seed", range(12))
def test_ranks_are_those_of_the_factors_whatever_the_scale_of_the_inputs(structure, seed):
    torch.manual_seed(seed)
    D, M, K = int(torch.randint(8, 30, ())), int(torch.randint(4, 30, ())), int(torch.randint(2, 6, ()))
    layer, x = nn.Linear(D, K), torch.randn(M, D) * torch.logspace(0, -3, D)
    F = ff.fisher(layer, [(x, None)], structure, "exact", progress=False)
    assert int((F.eigenvalues() > 0).sum()) == min(M, D + 1) * (K - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [5, 12, 40])
@pytest.mark.parametrize("missing", [0, 3])
@pytest.mark.parametrize("grades", [0, 4])
def test_zeros_are_those_of_the_eigenvalues(dtype, rows, missing, grades):
    """Of few rows, columns of zeros, columns of very different sizes; the sums are products of float32 or of float64."""
    x = torch.randn(2, rows, 12, dtype=torch.float64) * torch.logspace(0, -grades, 12, dtype=torch.float64)
    x[:, :, :missing] = 0
    gram, eps = (x.to(dtype).mT @ x.to(dtype)).double(), torch.finfo(dtype).eps
    found = rank.zeros(gram, eps)
    assert torch.equal(found, kronecker._eigenvalues(gram, eps) == 0)
    assert found.sum(1).tolist() == [12 - min(rows, 12 - missing)] * 2


@pytest.mark.parametrize("rows", [9, 40])
@pytest.mark.parametrize("shift", [0.0, 3.0], ids=["of-any-sign", "positive"])
def test_zeros_take_no_eigenvalues(rows, shift, monkeypatch):
    """By inertia, whether columns of zeros are all that is missing or there are fewer rows than columns; also in several groups."""
    x = torch.randn(2, rows, 12, dtype=torch.float64) + shift
    x[0, :, 3] = 0
    gram, eps = x.mT @ x, torch.finfo(torch.float32).eps
    expected = kronecker._eigenvalues(gram, eps) == 0
    monkeypatch.setattr(kronecker._graded, "eigvalsh", None)
    assert torch.equal(rank.zeros(gram, eps), expected)
    assert expected.sum(1).tolist() == [12 - min(rows, 11), 12 - min(rows, 12)]


@pytest.mark.parametrize("D", [1, 2, 7, 23])
def test_negative_eigenvalues_are_counted(D):
    """Indefinite matrices, whose L D L^T has blocks of two."""
    matrices = torch.randn(3, D, D, dtype=torch.float64)
    matrices = matrices + matrices.mT
    matrices.diagonal(dim1=1, dim2=2)[0] = 0
    assert torch.equal(rank._negative(matrices), (torch.linalg.eigvalsh(matrices) < 0).sum(1))
