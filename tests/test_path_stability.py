# SPDX-License-Identifier: Apache-2.0
"""Path stability: the divergence of two posteriors, exactly what retraining a regression does, and what it refuses."""

import math

import pytest
import torch
from networks import STRUCTURES, double_vectors, measure, mlp
from oracle import dense
from torch import nn

import fisherfast as ff
from fisherfast.fisher import DiagonalFisher


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_is_the_divergence_of_the_posteriors(structure):
    one, other = mlp(), mlp()
    F, beta, damping = measure(one, [double_vectors(9)], structure, "exact"), 1e-2, 3e-3
    k = len(flat(one))
    precision = (dense(F) + damping * torch.eye(k, dtype=torch.float64)) / beta
    p, q = (torch.distributions.MultivariateNormal(flat(m), precision_matrix=(precision + precision.T) / 2) for m in (one, other))
    got = ff.path_stability(F, one, other, beta=beta, damping=damping)
    assert got.nats == pytest.approx(torch.distributions.kl_divergence(p, q).item(), rel=1e-8)
    assert sum(got.by_layer().values()) == pytest.approx(got.nats, rel=1e-12)
    d = flat(one) - flat(other)
    assert got.alignment == pytest.approx((d @ dense(F) @ d / (d @ d) / dense(F).trace() * k).item(), rel=1e-9)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_is_symmetric_and_quadratic(structure):
    one, other = mlp(), mlp()
    F = measure(one, [double_vectors(9)], structure, "exact")
    there, back = (ff.path_stability(F, *pair, beta=0.1).nats for pair in ((one, other), (other, one)))
    assert there == back > 0
    middle = {n: (a + dict(other.named_parameters())[n]).detach() / 2 for n, a in one.named_parameters()}
    half = ff.path_stability(F, one, middle, beta=0.1)
    assert half.nats == pytest.approx(there / 4, rel=1e-12)
    assert half.alignment == pytest.approx(ff.path_stability(F, one, other, beta=7.0).alignment, rel=1e-12)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "gram"])
def test_leaving_an_example_out_of_a_regression_is_cooks_distance(structure):
    # At beta = 1 / N: 1/2 d^T X^T X d, d = w - w_without_n = (X^T X)^-1 x_n e_n / (1 - h_n), so h_n e_n^2 / (2 (1 - h_n)^2).
    N = 15
    x, y = torch.randn(N, 3).double(), torch.randn(N, 1).double()
    whole = torch.linalg.lstsq(x, y).solution
    hat = x @ torch.linalg.solve(x.T @ x, x.T)
    model = nn.Linear(3, 1, bias=False).double()
    F = measure(model, [(x, y)], structure, "exact", likelihood="gaussian")
    for n in range(N):
        keep = torch.arange(N) != n
        without = torch.linalg.lstsq(x[keep], y[keep]).solution
        got = ff.path_stability(F, {"weight": whole.T}, {"weight": without.T}, beta=1 / N)
        h, e = hat[n, n], (y - x @ whole)[n, 0]
        assert got.nats == pytest.approx((h * e**2 / (2 * (1 - h) ** 2)).item(), rel=1e-8)


def test_alignment_tells_directions_apart():
    f = torch.tensor([100.0, 1.0, 0.0], dtype=torch.float64)
    F, origin = DiagonalFisher({"w": f}, num_samples=5), {"w": torch.zeros(3)}
    sharp, soft, none = (ff.path_stability(F, {"w": e}, origin, beta=1.0).alignment for e in torch.eye(3))
    assert (sharp, soft, none) == pytest.approx((300 / 101, 3 / 101, 0.0))
    assert math.isnan(ff.path_stability(F, origin, origin, beta=1.0).alignment)
    regular = DiagonalFisher({"w": f[:2]}, num_samples=5)
    drawn = regular.sample(20000, dtype=torch.float64)["w"]
    mean = sum(ff.path_stability(regular, {"w": d}, {"w": torch.zeros(2)}, beta=1.0).quadratic for d in drawn[:200]) / 200
    assert mean == pytest.approx(2, rel=0.3)  # k
    squares = drawn.square()
    assert ((squares @ f[:2]).mean() / (squares.sum(1).mean() * 101 / 2)).item() == pytest.approx(4 / (101 * 1.01), rel=0.05)


def test_excluded_parameters_are_not_compared():
    F = DiagonalFisher({"w": torch.ones(2)}, num_samples=5, coverage={"v": "missing: no rule"})
    got = ff.path_stability(F, {"w": torch.ones(2), "v": torch.ones(9)}, {"w": torch.zeros(2), "v": torch.zeros(9)}, beta=1.0)
    assert got.nats == 1.0
    assert "without ['v'], which it lacks" in str(got)


@pytest.mark.parametrize(("dtype", "values"), [(torch.float16, (300.0, -300.0)), (torch.float32, (1.0, 1e-9))])
def test_low_precision_weights_are_subtracted_in_float64(dtype, values):
    F = DiagonalFisher({"w": torch.ones(1, dtype=torch.float64)}, num_samples=5)
    one, other = (torch.full((1,), v, dtype=dtype) for v in values)
    expected = (one.double() - other.double()).item() ** 2 / 2
    assert ff.path_stability(F, {"w": one}, {"w": other}, beta=1.0).nats == pytest.approx(expected, rel=1e-12)


def test_sensitivities_that_are_dependent_but_for_rounding_are_refused():
    F = DiagonalFisher({"w": torch.rand(5, dtype=torch.float64) + 0.1}, num_samples=3)
    for _ in range(20):
        J = torch.randn(2, 5, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"shannon_from_stability: J\^T F J must be regular"):
            ff.shannon_from_stability(F, torch.cat([J, J.mean(0, keepdim=True) / 3]), beta=0.1, entropy=0.0)


def test_states_its_conditions():
    F = DiagonalFisher({"w": torch.ones(4)}, num_samples=7)
    text = str(ff.path_stability(F, {"w": torch.ones(4)}, {"w": torch.zeros(4)}, beta=0.5, damping=0.25))
    for part in ("5 nats", "alignment 1", "beta = 0.5", "damping 0.25", "k = 4", "N = 7", "diagonal"):
        assert part in text


def test_refuses():
    F = DiagonalFisher({"w": torch.ones(4), "v": torch.ones(2)}, num_samples=7)
    w = {"w": torch.ones(4), "v": torch.ones(2)}
    for bad in (0, -1.0, math.nan, None):
        with pytest.raises(ValueError, match="path_stability: beta must be a finite number > 0"):
            ff.path_stability(F, w, w, beta=bad)
    with pytest.raises(ValueError, match="path_stability: damping must be a finite number >= 0, got -1"):
        ff.path_stability(F, w, w, beta=1.0, damping=-1)
    with pytest.raises(ValueError, match=r"path_stability: second must hold every parameter of F, got none for \['v'\]"):
        ff.path_stability(F, w, {"w": w["w"]}, beta=1.0)
    with pytest.raises(ValueError, match=r"path_stability: second\['v'\] must be \(2,\) as in first, got \(3,\)"):
        ff.path_stability(F, w, w | {"v": torch.ones(3)}, beta=1.0)
    with pytest.raises(ValueError, match=r"path_stability: weights must be finite, got NaN or infinity in 'v'"):
        ff.path_stability(F, w, w | {"v": torch.full((2,), math.nan)}, beta=1.0)
    for pair, wrong in (((w, w | {"v": torch.ones(2) + 5j}), "second"), ((w | {"v": torch.ones(2) + 5j}, w), "first")):
        with pytest.raises(ValueError, match=rf"path_stability: {wrong}\['v'\] must be real, got torch.complex64"):
            ff.path_stability(F, *pair, beta=1.0)
    with pytest.raises(ValueError, match=r"v\['v'\] must be \(2,\), got \(3,\)"):
        ff.path_stability(F, w | {"v": torch.ones(3)}, w | {"v": torch.ones(3)}, beta=1.0)


def test_weights_of_another_kind_are_refused_by_the_name_of_the_call():
    F = DiagonalFisher({"w": torch.ones(3)}, num_samples=3)
    with pytest.raises(TypeError, match=r"path_stability: weights must be a network or \{name: tensor\}, got int"):
        ff.path_stability(F, 3, {"w": torch.ones(3)}, beta=1)
