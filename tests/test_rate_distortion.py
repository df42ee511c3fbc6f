# SPDX-License-Identifier: Apache-2.0
"""The rate-distortion curve: its slopes, convexity and order, one spectrum for all betas, measured points, its picture."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fisherfast as ff
from fisherfast.fisher import DiagonalFisher

PRIORS = st.sampled_from(["fit", 0.05, 1.0, 20.0])
SPECTRA = st.lists(st.floats(-6, 3), min_size=1, max_size=6)


def curve(exponents, betas, prior_scale=1.0, variant="exact", loss=0.3):
    f = 10 ** torch.tensor(exponents, dtype=torch.float64)
    F = DiagonalFisher({"w": f}, num_samples=7)
    return ff.rate_distortion(
        F, {"w": torch.ones(len(f), dtype=torch.float64)}, betas, prior_scale=prior_scale, variant=variant, loss=loss
    )


def grid(low=-6, high=2, points=41):
    return torch.logspace(low, high, points, dtype=torch.float64).tolist()


def trained():
    """A small classifier, its data and its Fisher."""
    x, y = torch.randn(40, 3), torch.randint(0, 3, (40,))
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.zero_grad()
    return net, [(x, y)], ff.fisher(net, [(x, None)], structure="kfac", fisher_type="exact", progress=False)


@given(SPECTRA, PRIORS, st.floats(-5, 1))
@settings(max_examples=60, deadline=None)
def test_information_is_the_slope_of_the_complexity(exponents, prior_scale, log_beta):
    # Envelope identity, dC / dbeta = KL, by central differences.
    beta = 10**log_beta
    low, middle, high = curve(exponents, [beta * (1 - 1e-4), beta, beta * (1 + 1e-4)], prior_scale, loss=0.0).points
    slope = (high.complexity - low.complexity) / (high.beta - low.beta)
    assert slope == pytest.approx(middle.nats, rel=1e-6)


@given(SPECTRA, PRIORS, st.sampled_from(["exact", "paper"]))
@settings(max_examples=60, deadline=None)
def test_falls_is_convex_and_has_the_slope_beta(exponents, prior_scale, variant):
    found = curve(exponents, grid(), prior_scale, variant, loss=0.0)
    R, D, price = found.nats, found.expected_losses, [beta / (1 if variant == "exact" else 2) for beta in found.betas]
    for n in range(len(R) - 1):
        nats, loss = R[n] - R[n + 1], D[n + 1] - D[n]
        assert nats >= 0 and loss >= 0  # as beta rises
        # A chord of a convex curve is no steeper than its ends: their slopes are the two betas. Up to rounding.
        rounding = 1e-11 * (price[n + 1] * (1 + R[n]) + D[n + 1])
        assert price[n] * nats - rounding <= loss <= price[n + 1] * nats + rounding


@given(SPECTRA, PRIORS)
@settings(max_examples=30, deadline=None)
def test_complexity_is_concave_in_beta(exponents, prior_scale):
    betas = torch.linspace(0.01, 2, 15, dtype=torch.float64).tolist()
    C = torch.tensor(curve(exponents, betas, prior_scale, loss=0.0).complexities, dtype=torch.float64)
    assert (C.diff().diff() <= 1e-12 * C.max()).all()


def test_slope_is_minus_beta():
    found = curve([1, 0, -2], [0.1 * (1 - 1e-5), 0.1, 0.1 * (1 + 1e-5)])
    (r0, _, r1), (d0, _, d1) = found.nats, found.expected_losses
    assert (d1 - d0) / (r1 - r0) == pytest.approx(-0.1, rel=1e-6)


def test_rises_are_above_the_loss_at_the_mean():
    assert curve([0], [0.5], loss=7.0).rises == pytest.approx([0.5 * 0.5 / (1 + 0.5)], rel=1e-12)


def test_points_are_those_of_task_complexity_whatever_the_order():
    net, data, F = trained()
    betas = [0.1, 1e-4, 1e-2]
    for prior_scale in (0.3, "fit", {"0": 0.2, "2": 0.5}):
        found = ff.rate_distortion(F, net, betas, prior_scale=prior_scale, data=data)
        assert found.betas == (1e-4, 1e-2, 0.1)
        for point in found.points:
            alone = ff.task_complexity(F, net, prior_scale=prior_scale, beta=point.beta, data=data)
            assert (point.complexity, point.nats, point.loss) == (alone.complexity, alone.nats, alone.loss)


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac", "gram"])
def test_spectra_are_computed_once_for_all_betas(structure, monkeypatch):
    net, data, _ = trained()
    F = ff.fisher(net, [(data[0][0], None)], structure=structure, progress=False)
    calls = []
    original = type(F).spectra
    monkeypatch.setattr(type(F), "spectra", lambda self: calls.append(1) or original(self))
    found = ff.rate_distortion(F, net, grid(points=9), prior_scale=0.5, loss=0.0)
    assert len(calls) == 1 and len(found.points) == 9


def test_measured_points_are_the_formula_where_the_fisher_is_the_hessian():
    # Linear logits, little noise: the loss is quadratic to first order in beta, with the Hessian F at any weights.
    x, y, net = torch.randn(30, 3, dtype=torch.float64), torch.randint(0, 3, (30,)), nn.Linear(3, 3).double()
    F = ff.fisher(net, [(x, None)], structure="gram", fisher_type="exact", progress=False)
    options = {"prior_scale": 0.5, "data": [(x, y)]}
    formula = ff.rate_distortion(F, net, [1e-5, 1e-4], **options)
    measured = ff.rate_distortion(F, net, [1e-5, 1e-4], **options, method="monte-carlo", draws=100)
    for one, other in zip(formula.points, measured.points, strict=True):
        assert (one.nats, one.loss) == (other.nats, other.loss)
        rise = one.expected_loss - one.loss
        assert abs(other.expected_loss - one.expected_loss) < 4.5 * other.stderr < 0.4 * rise
    alone = ff.task_complexity(F, net, **options, beta=1e-5, method="monte-carlo", draws=100)
    assert measured.points[0].expected_loss == alone.expected_loss  # the same draws at every beta


def test_measured_complexities_make_a_curve():
    net, data, F = trained()
    points = tuple(ff.measured_complexity(ff.optimal_posterior(F, net, prior_scale=0.5, beta=b), net, data) for b in (1e-2, 1e-3))
    found = ff.RateDistortion(points)
    assert found.betas == (1e-3, 1e-2) and found.nats[0] > found.nats[1]


def test_plot_writes_a_picture(tmp_path):
    found = curve([1, 0, -2], grid(points=9))
    figure = found.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figure.axes
    assert axes.get_xlabel() == "KL(Q || P), nats" and axes.get_ylabel() == "expected loss, nats per sample"


def test_states_its_conditions():
    text = str(curve([1, 0], [0.1, 0.01]))
    for part in ("beta 0.01:", "2 points up to beta = 0.1", "k = 2", "N = 7", "prior scale 1", "diagonal", "by formula"):
        assert part in text


def test_refuses():
    with pytest.raises(ValueError, match="betas must hold at least one price of a nat, got none"):
        curve([1], [])
    with pytest.raises(ValueError, match="beta must be a finite number > 0, got nan"):
        curve([1], [0.1, math.nan])
    with pytest.raises(ValueError, match="points must hold at least one complexity, got none"):
        ff.RateDistortion(())
    with pytest.raises(ValueError, match=r"rate_distortion: loss must be given .*, got no data and a dict"):
        curve([1], [0.1], loss=None)
    net, data, F = trained()
    with pytest.raises(ValueError, match="rate_distortion: data must be readable several times"):
        ff.rate_distortion(F, net, [0.1], prior_scale=1.0, method="monte-carlo", data=iter(data))
