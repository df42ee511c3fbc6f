# SPDX-License-Identifier: Apache-2.0
"""PAC-Bayes bounds: the test vectors, what they optimise, that they hold as often as they say, and what they refuse."""

import dataclasses
import math
import warnings

import mpmath
import numpy
import pytest
import torch
from hypothesis import given, strategies
from torch import nn

from fisherfast import FisherWarning, expected_loss, fisher, variational_posterior, zero_one
from fisherfast.fisher import DiagonalFisher
from fisherfast.fisher.lanczos import Estimate
from fisherfast.information import information_in_weights, optimal_posterior, pac_bayes, pac_bayes_bound

VECTOR = {"expected_loss": 0.02, "nats": 5000.0, "num_samples": 50000}  # science.md 1.11, delta = .05


def test_reproduces_the_vectors():
    assert f"{pac_bayes_bound(**VECTOR, beta=2).value:.10f}" == "0.2934931057"
    hindsight = pac_bayes_bound(**VECTOR, beta=2).hindsight_beta
    # science.md has 1.0915573694 and .2384422745; these are the digits at 25 places.
    assert f"{hindsight:.12f}" == "1.091557369349"
    assert f"{pac_bayes_bound(**VECTOR, beta=hindsight).value:.12f}" == "0.238442274415"


def test_agrees_with_the_logistic_regressions_of_the_paper():
    # KL and bound at n = 500, beta = 1, delta = .05 for prior scales 0.3, 1, 10, 1e4, 1e8: each implies an expected loss, and as
    # the prior hardly moves a posterior that it is wider than, the last four must be one, up to the printed digits.
    table = {30.44: 0.427, 19.46: 0.378, 36.72: 0.446, 105.73: 0.723, 197.83: 1.090}
    implied = [bound / 2 - pac_bayes_bound(0, kl, 500, beta=1).value / 2 for kl, bound in table.items()]
    assert max(implied[1:]) - min(implied[1:]) < 1e-3
    assert implied[0] > max(implied[1:])


@given(loss=strategies.floats(0, 1), nats=strategies.floats(0, 1e6), N=strategies.integers(1, 10**7))
def test_hindsight_beta_is_the_minimum_and_the_grid_comes_near(loss, nats, N):
    best = pac_bayes_bound(loss, nats, N, beta=2).hindsight_beta
    at = {factor: pac_bayes_bound(loss, nats, N, beta=max(best * factor, 0.51)).value for factor in (0.99, 1, 1.01)}
    assert at[1] <= min(at.values()) * (1 + 1e-12)
    grid = pac_bayes_bound(loss, nats, N)
    # The same delta / G without a grid.
    alone = pac_bayes_bound(loss, nats, N, beta=2, delta=0.05 / grid.num_betas)
    optimum = pac_bayes_bound(loss, nats, N, beta=alone.hindsight_beta, delta=0.05 / grid.num_betas).value
    assert optimum * (1 - 1e-12) <= grid.value <= 1.024 * optimum


def test_a_grid_is_a_union_bound():
    betas = [0.75, 1.0, 3.0]
    several = pac_bayes_bound(0.1, 20.0, 1000, beta=betas, delta=0.06)
    singly = {b: pac_bayes_bound(0.1, 20.0, 1000, beta=b, delta=0.02).value for b in betas}
    assert several.value == pytest.approx(min(singly.values()), rel=1e-14)
    assert (several.beta, several.num_betas) == (min(singly, key=singly.get), 3)
    assert pac_bayes_bound(0.1, 20.0, 1000, beta=[2.0]) == pac_bayes_bound(0.1, 20.0, 1000, beta=2.0)


def test_the_default_grid_depends_on_the_data_in_no_way():
    first, second = (pac_bayes_bound(loss, nats, 1000) for loss, nats in ((0.0, 5.0), (0.9, 900.0)))
    assert first.num_betas == second.num_betas


@pytest.mark.parametrize("N", [1, 10, 500, 50_000, 10**7])
def test_the_default_grid_reaches_the_largest_beta_that_can_be_best(N):
    worst = pac_bayes_bound(1.0, 0.0, N)
    assert 2 ** ((worst.num_betas - 1) / 2) >= worst.hindsight_beta


@pytest.mark.parametrize("q", [0.0, 1e-9, 1e-3, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("nats", [0.0, 3.0, 1e4])
def test_kl_solves_its_equation(q, nats):
    N = 5000
    with mpmath.workdps(60):
        c = (mpmath.mpf(nats) + mpmath.log(2 * mpmath.sqrt(N) / mpmath.mpf(0.05))) / N
        p, q_ = mpmath.mpf(pac_bayes_bound(q, nats, N, method="kl").value), mpmath.mpf(q)
        coins = (q_ * mpmath.log(q_ / p) if q else 0) + (1 - q_) * mpmath.log((1 - q_) / (1 - p)) if p < 1 else c
        assert abs(coins / c - 1) < 1e-10
    assert p > q


def test_kl_of_no_loss_is_closed_form():
    c = (7 + math.log(2 * math.sqrt(300) / 0.05)) / 300
    assert pac_bayes_bound(0.0, 7.0, 300, method="kl").value == pytest.approx(-math.expm1(-c), rel=1e-14)
    assert pac_bayes_bound(1.0, 7.0, 300, method="kl").value == 1


def test_the_largest_loss_is_a_vacuous_bound():
    bound = pac_bayes_bound(3.0, 7.0, 300, method="kl", max_loss=3.0)
    assert bound.value == 3.0 and bound.vacuous


def test_vacuous_is_relative_to_the_largest_loss():
    assert not pac_bayes_bound(2.0, 1.0, 10_000, max_loss=10.0).vacuous
    assert pac_bayes_bound(0.05, 1e6, 1000, max_loss=0.1, method="kl").vacuous


def test_kl_of_huge_divergences_is_at_most_one():
    for q in [*(i / 997 for i in range(998)), 1e-17, 1e-300, 1 - 1e-16]:
        assert q <= pac_bayes_bound(q, 1e5, 10, method="kl").value <= 1


def test_kl_is_below_what_pinsker_gives():
    for loss in (0.01, 0.1, 0.4):
        c = (50 + math.log(2 * math.sqrt(1000) / 0.05)) / 1000
        assert pac_bayes_bound(loss, 50.0, 1000, method="kl").value <= loss + math.sqrt(c / 2)


@pytest.mark.parametrize("method", ["mcallester", "kl"])
def test_a_scaled_loss_scales_the_bound(method):
    one, four = (pac_bayes_bound(0.1 * m, 20.0, 1000, method=method, max_loss=m) for m in (1.0, 4.0))
    assert four.value == pytest.approx(4 * one.value, rel=1e-14)
    assert four.beta == one.beta
    if method == "mcallester":
        assert four.lagrangian_beta == 4 * one.beta / 1000


def test_hindsight_is_of_the_scaled_loss():
    one, four = (pac_bayes_bound(0.1 * m, 20.0, 1000, max_loss=m) for m in (1.0, 4.0))
    assert four.hindsight_beta == pytest.approx(one.hindsight_beta, rel=1e-14)


def thresholds(draws, N, flip=0.2, points=20):
    """Training losses [draws, H] and test losses [H] of the classifiers [x >= h], x uniform on ``points``, labels flipped."""
    x = torch.randint(points, (draws, N))
    y = (x >= points // 2) ^ (torch.rand(draws, N) < flip)
    h = torch.arange(points + 1)
    train = torch.stack([((x >= t) != y).double().mean(1) for t in h], 1)
    wrong = (h - points // 2).abs().double() / points
    return train, wrong * (1 - flip) + (1 - wrong) * flip


def gibbs(train, test, beta):
    """Per draw: E_Q of both losses and KL(Q || uniform) of the Gibbs posterior at ``beta``."""
    log_q = (-train / beta).log_softmax(1)
    q = log_q.exp()
    return (q * train).sum(1).tolist(), (q * test).sum(1).tolist(), (q * (log_q + math.log(q.shape[1]))).sum(1).tolist()


@pytest.mark.parametrize("options", [{"method": "kl"}, {"beta": 1.0}, {}], ids=["kl", "one beta", "grid"])
@pytest.mark.parametrize("delta", [0.05, 0.5])
def test_holds_for_gibbs_posteriors_of_drawn_data(options, delta):
    fails = 0
    for train, test, kl in zip(*gibbs(*thresholds(400, 25), beta=1 / 25), strict=True):
        fails += test > pac_bayes_bound(train, kl, 25, delta=delta, **options).value
    assert fails <= delta * 400


def test_needs_its_nats():
    # Labels are coins, so all test losses are 1/2, and the best of 4000 guesses looks good: without the KL the bound would fail.
    train = torch.distributions.Binomial(30, torch.tensor(0.5)).sample((200, 4000)).double() / 30
    losses, _, nats = gibbs(train, torch.full((4000,), 0.5, dtype=torch.float64), beta=1e-3)
    with_kl, without = (
        sum(pac_bayes_bound(loss, use * kl, 30, method="kl").value < 0.5 for loss, kl in zip(losses, nats, strict=True)) / 200
        for use in (1, 0)
    )
    assert with_kl <= 0.05
    assert without > 0.5


def test_draws_of_weights_cost_confidence():
    exact, drawn = (pac_bayes_bound(0.1, 20.0, 1000, method="kl", draws=m) for m in (None, 100))
    assert drawn.value > exact.value
    assert (exact.confidence, drawn.confidence) == (0.95, pytest.approx(0.94))
    assert (exact.expected_loss, exact.loss_limit, drawn.expected_loss) == (0.1, 0.1, 0.1)
    assert f"E_Q loss = 0.1 (<= {drawn.loss_limit:.4g} by 100 draws from Q" in str(drawn)
    loss = drawn.loss_limit
    assert 0.1 * math.log(0.1 / loss) + 0.9 * math.log(0.9 / (1 - loss)) == pytest.approx(math.log(2 / 0.01) / 100, rel=1e-12)
    many = pac_bayes_bound(0.1, 20.0, 1000, method="kl", draws=10**12)
    assert many.value == pytest.approx(exact.value, rel=1e-4)


def test_takes_estimates_and_informations():
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    F = DiagonalFisher({n: torch.rand_like(p) for n, p in net.named_parameters()}, num_samples=100)
    for variant in ("exact", "paper"):
        info = information_in_weights(F, net, prior_scale=1.0, beta=0.01, variant=variant)
        bound = pac_bayes_bound(0.1, info, 100)
        assert bound == pac_bayes_bound(0.1, info.kl, 100)
        posterior = optimal_posterior(F, net, prior_scale=1.0, beta=0.01, variant=variant)
        assert bound == pac_bayes_bound(0.1, posterior, 100)
    estimate = pac_bayes_bound(Estimate(0.1, 0.02), info, 100)
    assert estimate.value == bound.value and "E_Q loss = 0.1 (+- 0.02, not part of delta)" in str(estimate)
    assert "not part of delta" not in str(pac_bayes_bound(Estimate(0.1, 0.02), info, 100, draws=8))
    fitted = information_in_weights(F, net, prior_scale="fit", beta=0.01)
    for nats in (fitted, optimal_posterior(F, net, prior_scale="fit", beta=0.01)):
        with pytest.raises(ValueError, match=r"prior must be fixed before the data are seen, got prior_scale='fit'"):
            pac_bayes_bound(0.1, nats, 100)


def test_says_what_it_depends_on():
    text = str(pac_bayes_bound(0.1, 5000.0, 1000, beta=2))
    for part in ("vacuous", "beta = 2", "delta = 0.05", "KL = 5,000 nats", "N = 1,000", "loss in [0, 1]", "mcallester"):
        assert part in text
    good = pac_bayes_bound(0.1, 5.0, 1000, method="kl", draws=50)
    assert not good.vacuous and "vacuous" not in str(good) and "50 draws" in str(good)


@pytest.mark.parametrize("bad", [None, math.inf, 0.0, -1.0, math.nan])
def test_refuses_an_unbounded_loss(bad):
    with pytest.raises(ValueError, match=r"max_loss must be a finite number > 0, got .*bounded loss"):
        pac_bayes_bound(0.1, 1.0, 100, max_loss=bad)


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_refuses_a_loss_out_of_range(bad):
    with pytest.raises(ValueError, match=r"expected_loss must be in \[0, 1\], got .*; clip"):
        pac_bayes_bound(bad, 1.0, 100)


@pytest.mark.parametrize("bad", [0.5, 0, -1.0, math.nan, math.inf, [], [1.0, 0.5], "2"])
def test_refuses_beta(bad):
    with pytest.raises(ValueError, match="beta must be > 1/2, or several such numbers"):
        pac_bayes_bound(0.1, 1.0, 100, beta=bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "catoni"}, "method must be one of"),
        ({"method": "kl", "beta": 2.0}, "beta must be None for method='kl'"),
        ({"delta": 0.0}, r"delta must be in \(0, 1\), got 0.0"),
        ({"delta": 1}, r"delta must be in \(0, 1\), got 1"),
        ({"draws": 0}, "draws must be >= 1, got 0"),
        ({"draws": 5, "sample_delta": 2.0}, r"sample_delta must be in \(0, 1\), got 2.0"),
        ({"draws": 5, "delta": 0.5, "sample_delta": 0.5}, r"delta \+ sample_delta must be < 1, got 0.5 \+ 0.5"),
        ({"num_samples": 0}, "num_samples must be >= 1, got 0"),
        ({"nats": -1.0}, "nats must be a finite number >= 0, got -1.0"),
        ({"nats": math.inf}, "nats must be a finite number >= 0, got inf"),
    ],
)
def test_refuses_other_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        pac_bayes_bound(**({"expected_loss": 0.1, "nats": 1.0, "num_samples": 100} | options))


def test_a_divergence_of_a_part_of_the_parameters_is_no_bound():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).requires_grad_(False))
    F = fisher(net, [(torch.randn(8, 3), torch.randint(2, (8,)))], progress=False)
    net[1].requires_grad_(True)
    whole = information_in_weights(F, dict(net[0].named_parameters(prefix="0")), prior_scale=1.0, beta=0.1)
    pac_bayes_bound(0.1, whole, 1000)
    part = dataclasses.replace(whole, excluded=("1.weight",))
    with pytest.raises(ValueError, match=r"nats must be of all parameters that were trained, got some that exclude .*1\.weight"):
        pac_bayes_bound(0.1, part, 1000)


def test_nats_without_frozen_parameters_are_pointed_out():
    net, data = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), [(torch.randn(8, 3), torch.randint(2, (8,)))]
    options = {"prior_scale": 1.0, "beta": 0.1}
    whole = information_in_weights(fisher(net, data, progress=False), net, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pac_bayes_bound(0.1, whole, 1000)
    net[0].requires_grad_(False)
    F = fisher(net, data, progress=False)
    part = information_in_weights(F, net, **options)
    assert whole.frozen == () and part.frozen == ("0.weight", "0.bias") and part.kl < whole.kl
    for nats in (part, optimal_posterior(F, net, **options), variational_posterior(net, data, epochs=1, **options)):
        with pytest.warns(
            FisherWarning, match=r"got some without \['0\.bias', '0\.weight'\], which are frozen; the bound holds if"
        ):
            pac_bayes_bound(0.1, nats, 1000)


def test_log_losses_have_no_limit():
    net, data = nn.Linear(3, 2), [(torch.randn(8, 3), torch.randint(2, (8,)))]
    q = optimal_posterior(fisher(net, data, progress=False), net, prior_scale=1.0, beta=0.1)
    with pytest.raises(ValueError, match="must have an upper limit, got that of -log p"):
        pac_bayes_bound(expected_loss(q, net, data, draws=2), q, 1000)
    assert pac_bayes_bound(expected_loss(q, net, data, draws=2, loss=zero_one), q, 1000).value <= 1


def test_betas_of_numpy():
    assert pac_bayes_bound(0.1, 5.0, 1000, beta=numpy.array([1.0, 2.0])) == pac_bayes_bound(0.1, 5.0, 1000, beta=[1.0, 2.0])


@pytest.mark.parametrize("q", [1e-9, 0.1, 0.5, 0.999, 1 - 2**-53])
@pytest.mark.parametrize("c", [1e-300, 1e-40, 1e-12, 1e-6, 0.01, 1.0, 36.0])
def test_the_largest_chance_is_rounded_up(q, c):
    """No chance above it is within c, also where the divergence itself is rounded: the exact one at the result is c at least."""
    p = pac_bayes._largest(q, c)
    with mpmath.workdps(400):
        q, p = mpmath.mpf(q), mpmath.mpf(p)
        assert p == 1 or q * mpmath.log(q / p) + (1 - q) * mpmath.log((1 - q) / (1 - p)) >= c * (1 - mpmath.mpf("1e-9"))
