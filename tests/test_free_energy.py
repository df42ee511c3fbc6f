# SPDX-License-Identifier: Apache-2.0
"""The free energy and the escape time: closed forms, the mean first passage time by integration, and what they refuse."""

import math

import pytest
import torch
from networks import STRUCTURES, double_vectors, measure, mlp

import fisherfast as ff
from fisherfast.fisher import DiagonalFisher, FisherWarning


def flat(values, num_samples=7):
    return DiagonalFisher({"w": torch.tensor(values, dtype=torch.float64)}, num_samples=num_samples)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_both_forms_are_their_determinants(structure):
    model = mlp()
    F = measure(model, [double_vectors(9)], structure, "exact")
    f, T, scale = F.eigenvalues().double(), 0.3, 0.7
    damped = ff.free_energy(F, 0.5, temperature=T, damping=0.01)
    assert damped.value == pytest.approx(0.5 + T / 2 * (f + 0.01).log().sum().item(), rel=1e-10)
    prior = ff.free_energy(F, 0.5, temperature=T, prior_scale=scale)
    assert prior.value == pytest.approx(0.5 + T / 2 * (scale**2 / T * f).log1p().sum().item(), rel=1e-10)
    # They differ by a constant: |F + T / lambda^2| = (T / lambda^2)^k |I + lambda^2 F / T|.
    same = ff.free_energy(F, 0.5, temperature=T, damping=T / scale**2)
    assert same.value - prior.value == pytest.approx(T / 2 * len(f) * math.log(T / scale**2), rel=1e-9)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_with_a_prior_it_is_the_lagrangian(structure):
    model = mlp()
    F = measure(model, [double_vectors(9)], structure, "exact")
    beta, scale, loss = 1e-2, 0.4, 0.8
    info = ff.information_in_weights(F, model, beta=beta, prior_scale=scale, loss=loss)
    shift = beta * sum(p.detach().square().sum().item() for p in model.parameters()) / (2 * scale**2)
    got = ff.free_energy(F, loss, temperature=beta, prior_scale=scale)
    assert got.value + shift == pytest.approx(info.complexity, rel=1e-12)


def test_a_singular_fisher_is_minus_infinity_only_without_damping():
    F = flat([1.0, 0.0])
    with pytest.warns(FisherWarning, match="are zero: -inf"):
        assert ff.free_energy(F, 0.0, temperature=1.0, damping=0.0).value == -math.inf
    assert ff.free_energy(F, 0.0, temperature=1.0, prior_scale=1.0).value == pytest.approx(math.log(2) / 2, rel=1e-14)


def test_prior_scale_by_layer():
    F = DiagonalFisher({"a.w": torch.tensor([1.0, 3.0]), "b.w": torch.tensor([2.0])}, num_samples=3)
    got = ff.free_energy(F, 0.0, temperature=1.0, prior_scale={"a": 1.0, "b": 2.0})
    assert got.logdet == pytest.approx(math.log(2 * 4 * 9), rel=1e-14)


class Well:
    """``U' = x (x + a) (x - b)``: minima at -a and b, a saddle of curvature ``-a b`` between them, at 0."""

    def __init__(self, a, b):
        self.a, self.b = a, b

    def __call__(self, x):
        return x**4 / 4 + (self.a - self.b) * x**3 / 3 - self.a * self.b * x**2 / 2

    def curvature(self, x):
        return 3 * x**2 + 2 * (self.a - self.b) * x - self.a * self.b


def passage_time(U, T, start, end, points=40001):
    """The mean first passage time from start to end > start of ``dx = -U' dt + sqrt(2 T) dW``, by integration.

    ``(1 / T) int_start^end dy exp(U(y) / T) int_-inf^y dz exp(-U(z) / T)``.
    """
    x = torch.linspace(start - 3, end, points, dtype=torch.float64)
    step = (x[1] - x[0]).item()
    # One constant is taken out of both exponents; it cancels.
    shift = U(torch.tensor(float(start), dtype=torch.float64))
    inner = torch.cumulative_trapezoid(torch.exp(-(U(x) - shift) / T), dx=step)
    outer = torch.exp((U(x[1:]) - shift) / T) * inner
    return torch.trapezoid(outer[x[1:] >= start], dx=step).item() / T


def escape(U, start, T, extra=lambda x: 1.0):
    """The closed form from ``start`` over the saddle at 0, with further directions of determinant ``extra``."""
    at = {x: ff.FreeEnergy(float(U(x)), math.log(abs(U.curvature(x)) * extra(x)), T) for x in (start, 0.0)}
    return ff.escape_time(at[start], at[0.0], curvature=U.curvature(0.0))


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (1.2, 0.8), (0.9, 1.4)])
def test_escape_time_is_the_mean_first_passage_time_of_small_noise(a, b):
    U = Well(a, b)
    barrier = -float(U(-a))
    errors = [passage_time(U, T, -a, b) / escape(U, -a, T).time - 1 for T in (barrier / 20, barrier / 40)]
    assert abs(errors[1]) < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)  # the error is of first order in T
    assert abs(2 * errors[1] - errors[0]) < 4e-3  # and goes to zero with it


def test_determinants_of_the_other_directions_count():
    # Fast further directions of stiffness k(x) turn U into U + T / 2 log k: the free energy itself.
    U, k = Well(1.0, 1.0), lambda x: (2 + x) ** 2 if isinstance(x, float) else (2 + x).square()
    errors = []
    for T in (0.25 / 20, 0.25 / 40):

        def effective(x, T=T):
            return U(x) + T / 2 * torch.log(k(x))

        x = passage_time(effective, T, -1.0, 0.9, points=80001) / escape(U, -1.0, T, extra=lambda x: k(x)).time - 1
        errors.append(x)
    assert abs(2 * errors[1] - errors[0]) < 2e-2
    assert abs(errors[1]) < 0.1


def test_a_sharp_well_of_equal_depth_is_left_ten_times_sooner_at_every_temperature():
    for T in (0.1, 0.01, 0.001):
        saddle = ff.FreeEnergy(1.0, 0.0, T)
        sharp, wide = (ff.escape_time(ff.FreeEnergy(0.0, math.log(c), T), saddle, curvature=-1.0) for c in (100.0, 1.0))
        assert sharp.log_time - wide.log_time == pytest.approx(math.log(0.1), rel=1e-12)


def test_reproduces_the_table_of_a_sharp_and_a_wide_well():
    # science.md 1.7: curvatures 100 and 1, equal depth, T = .1, .2, .3: the times' ratio and the sharp well's share of the Gibbs
    # law, by integration; both drift around 1/10 and 1/11 with T, and the closed form is what they are at T = 0.
    def well(x):
        sharp, wide = 50 * (x + 1) ** 2, (x - 1.5) ** 2 / 2
        return sharp * wide / (sharp + wide)

    x = torch.linspace(-3, 4.5, 150001, dtype=torch.float64)
    between = (x > -1) & (x < 1.5)
    saddle = x[between][well(x[between]).argmax()].item()
    ratios, shares = [], []
    for T in (0.1, 0.2, 0.3):
        leaves_sharp = passage_time(well, T, -1.0, saddle + 0.3)
        leaves_wide = passage_time(lambda z: well(-z), T, -1.5, 0.3 - saddle)
        law = torch.exp(-well(x) / T)
        ratios.append(leaves_sharp / leaves_wide)
        shares.append((law[x < saddle].sum() / law.sum()).item())
    assert ratios == pytest.approx([0.1007, 0.0951, 0.0890], abs=1e-4)
    assert shares == pytest.approx([0.0930, 0.0955, 0.0985], abs=1e-4)


def test_escape_time_is_the_difference_of_free_energies():
    T = 0.2
    low, high = ff.FreeEnergy(0.1, 3.0, T), ff.FreeEnergy(0.7, 2.0, T)
    got = ff.escape_time(low, high, curvature=-0.5)
    assert got.time == pytest.approx(4 * math.pi * math.exp((high.value - low.value) / T), rel=1e-12)
    assert got.barrier == pytest.approx(0.6)
    assert ff.escape_time(ff.FreeEnergy(0.0, 0.0, 1e-4), ff.FreeEnergy(1.0, 0.0, 1e-4), curvature=-1.0).time == math.inf


def test_states_its_conditions():
    text = str(ff.free_energy(flat([1.0, 2.0]), 0.5, temperature=0.1, damping=0.01))
    for part in ("loss = 0.5", "T = 0.1", "damping 0.01", "k = 2", "N = 7", "diagonal"):
        assert part in text
    assert "prior scale 3" in str(ff.free_energy(flat([1.0]), 0.5, temperature=0.1, prior_scale=3.0))
    text = str(ff.escape_time(ff.FreeEnergy(0.0, 1.0, 0.1), ff.FreeEnergy(0.5, 2.0, 0.1), curvature=-1.0))
    for part in ("barrier 0.5", "T = 0.1", "curvature -1"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "must be given damping or prior_scale, got damping=None"),
        ({"damping": 0.1, "prior_scale": 1.0}, "must be given damping or prior_scale, got damping=0.1"),
        ({"damping": -0.1}, "damping must be a finite number >= 0, got -0.1"),
        ({"prior_scale": 0.0}, "prior_scale must be a finite number > 0, got 0.0"),
        ({"damping": 0.1, "temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"damping": 0.1, "loss": math.nan}, "loss must be a finite number, got nan"),
    ],
)
def test_free_energy_refuses(options, message):
    with pytest.raises(ValueError, match="free_energy: " + message):
        ff.free_energy(flat([1.0]), **({"loss": 0.0, "temperature": 1.0} | options))


@pytest.mark.parametrize(
    ("minimum", "saddle", "curvature", "message"),
    [
        ((0.0, 0.0, 0.1), (1.0, 0.0, 0.1), 1.0, "curvature must be a finite number < 0, got 1.0"),
        ((0.0, 0.0, 0.1), (1.0, 0.0, 0.1), math.nan, "curvature must be a finite number < 0, got nan"),
        ((0.0, 0.0, 0.1), (1.0, 0.0, 0.2), -1.0, "temperature must be that of the minimum at the saddle, got 0.1 and 0.2"),
        ((0.0, 0.0, 0.1, 0.1), (1.0, 0.0, 0.1), -1.0, "damping must be that of the minimum"),
        ((0.0, 0.0, 0.1), (1.0, 0.0, 0.1, 0.0, 1.0), -1.0, "prior_scale must be that of the minimum"),
        ((0.0, -math.inf, 0.1), (1.0, 0.0, 0.1), -1.0, "minimum.logdet must be a finite number, got -inf; a flat direction"),
        ((0.0, 0.0, -0.1), (1.0, 0.0, -0.1), -1.0, "minimum.temperature must be a finite number > 0"),
        ((1.0, 0.0, 0.1), (1.0, 0.0, 0.1), -1.0, "the saddle must be above the minimum, got losses 1 and 1"),
        ((0.0, 0.0, 0.1), (math.inf, 0.0, 0.1), -1.0, "saddle.loss must be a finite number"),
    ],
)
def test_escape_time_refuses(minimum, saddle, curvature, message):
    with pytest.raises(ValueError, match="escape_time: " + message):
        ff.escape_time(ff.FreeEnergy(*minimum), ff.FreeEnergy(*saddle), curvature=curvature)


def test_what_is_refused_of_the_temperature_is_called_so():
    F = DiagonalFisher({"w": torch.ones(3)}, num_samples=3)
    with pytest.raises(ValueError, match=r"free_energy: prior_scale\^2 / temperature must be finite, got temperature = 1e-300"):
        ff.free_energy(F, 1.0, temperature=1e-300, prior_scale=1e20)
