# SPDX-License-Identifier: Apache-2.0
"""The optimal posterior: its draws have the covariance that the formula says, for every structure; limits; what it refuses."""

import math

import pytest
import torch
from oracle import dense
from torch import nn

import fisherfast as ff
from fisherfast.fisher import DiagonalFisher

# science.md 1.11: H = diag(2, .3, .004, 0), w = (1, -.5, .25, 0), lambda = 1, beta = .01.
H = torch.tensor([2, 0.3, 0.004, 0], dtype=torch.float64)
W = torch.tensor([1, -0.5, 0.25, 0], dtype=torch.float64)


def vectors(**options):
    F = DiagonalFisher({"w": H}, num_samples=7)
    return ff.optimal_posterior(F, {"w": W}, **({"prior_scale": 1.0, "beta": 0.01} | options))


def measured(structure, dtype=torch.float64):
    """A small network, and its Fisher of some structure."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2, bias=False)).to(dtype)
    F = ff.fisher(net, [(torch.randn(9, 2, dtype=dtype), None)], structure=structure, fisher_type="exact", progress=False)
    return net, F


def flat(draws, names):
    return torch.cat([draws[name].flatten(1) for name in names], 1).double()


@pytest.mark.parametrize(
    ("variant", "sigma"),
    [("exact", [0.00497512, 0.03225806, 0.71428571, 1]), ("paper", [0.00249377, 0.01639344, 0.55555556, 1])],
)
def test_reproduces_the_vectors(variant, sigma):
    posterior = vectors(variant=variant)
    assert posterior.variance()["w"].tolist() == pytest.approx(sigma, abs=5e-9)
    draws = posterior.sample(4000, seed=1)["w"]
    assert draws.dtype == torch.float64
    standard = (draws - W) / torch.tensor(sigma, dtype=torch.float64).sqrt()
    assert standard.mean(0).abs().max() < 5 / math.sqrt(4000)
    assert (standard.var(0) - 1).abs().max() < 5 * math.sqrt(2 / 4000)
    info = ff.information_in_weights(posterior.information.fisher, {"w": W}, prior_scale=1.0, beta=0.01, variant=variant)
    assert (posterior.kl, posterior.beta) == (info.kl, 0.01)
    assert posterior.conditions() == info.conditions()


@pytest.mark.parametrize(
    ("structure", "variant"),
    [("diagonal", "exact"), ("kfac", "exact"), ("ekfac", "exact"), ("gram", "exact"), ("kfac", "paper")],
)
def test_draws_have_the_covariance_of_the_formula(structure, variant):
    net, F = measured(structure)
    beta, n = 0.02, 1500
    scales = {"0": 0.5, "2": 0.8} if structure != "gram" else 0.5
    posterior = ff.optimal_posterior(F, net, prior_scale=scales, beta=beta, variant=variant)
    t = beta if variant == "exact" else beta / 2
    squares = (
        torch.cat([torch.full_like(p.flatten(), posterior.information.prior_scales[n]) for n, p in net.named_parameters()]) ** 2
    )
    precision = dense(F) / t + torch.diag(1 / squares).detach()
    mean = torch.cat([p.detach().flatten() for p in net.parameters()])
    centered = flat(posterior.sample(n, seed=0), F.names) - mean
    whitened = centered @ torch.linalg.cholesky(precision)  # L^T x is standard normal for precision L L^T
    assert (whitened.mean(0) * math.sqrt(n)).abs().max() < 4.5
    deviations = (whitened.mT @ whitened / n - torch.eye(len(mean))) * math.sqrt(n / 2)
    assert deviations.abs().max() < 4.5
    conditional = torch.cat([v.flatten() for v in posterior.variance().values()])
    assert torch.allclose(conditional, 1 / precision.diagonal(), rtol=1e-5)


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac", "gram"])
def test_fitted_prior_is_sampled(structure):
    net, F = measured(structure, torch.float32)
    posterior = ff.optimal_posterior(F, net, prior_scale="fit", beta=1e-3)
    draws = posterior.sample(3, seed=0)
    for name, p in net.named_parameters():
        assert draws[name].shape == (3, *p.shape) and draws[name].dtype == torch.float32
        assert (draws[name] != p).all()


def test_draws_are_those_of_sample():
    posterior = vectors()
    together, one_by_one = posterior.sample(5, seed=3)["w"], list(posterior.draws(5, seed=3))
    assert torch.equal(together, torch.stack([draw["w"] for draw in one_by_one]))
    assert torch.equal(together, posterior.sample(5, generator=torch.Generator().manual_seed(3))["w"])
    assert not torch.equal(together, posterior.sample(5, seed=4)["w"])
    assert posterior.sample(0)["w"].shape == (0, 4)


def test_global_generator_is_used_only_without_a_seed():
    posterior = vectors()
    before = torch.get_rng_state()
    posterior.sample(2, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    posterior.sample(2)
    assert not torch.equal(torch.get_rng_state(), before)


def test_mean_is_a_copy():
    net, F = measured("diagonal")
    posterior = ff.optimal_posterior(F, net, prior_scale=1.0, beta=1e-3)
    before = net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight.zero_()
    assert torch.equal(posterior.mean["0.weight"], before)
    assert not any(mean.requires_grad for mean in posterior.mean.values())


def test_low_precision_weights_are_drawn_in_float32():
    F = DiagonalFisher({"w": torch.full((3,), 10.0)}, num_samples=7)
    posterior = ff.optimal_posterior(F, {"w": torch.full((3,), 300.0, dtype=torch.bfloat16)}, prior_scale=1.0, beta=1e-3)
    draws = posterior.sample(100, seed=0)["w"]
    assert draws.dtype == torch.float32
    assert 0 < (draws - 300).abs().max() < 0.1


def test_fitted_limits():
    F = DiagonalFisher({"a.w": H, "b.w": H}, num_samples=7)
    at_center = ff.optimal_posterior(F, {"a.w": torch.zeros(4), "b.w": W}, prior_scale="fit", beta=0.01)
    draws = at_center.sample(3, seed=0)
    assert draws["a.w"].tolist() == [[0.0] * 4] * 3  # lambda = 0: no noise, exactly
    assert (draws["b.w"] != W).all()
    assert at_center.variance()["a.w"].tolist() == [0.0] * 4
    flat = ff.optimal_posterior(DiagonalFisher({"w": torch.zeros(4)}, num_samples=7), {"w": W}, prior_scale="fit", beta=0.01)
    assert flat.variance()["w"].tolist() == [math.inf] * 4
    with pytest.raises(ValueError, match=r"Sigma must be bounded, but the Fisher of \['w'\] is zero"):
        flat.sample(1)


def test_refuses():
    with pytest.raises(ValueError, match="n must be >= 0, got -1"):
        vectors().sample(-1)
    with pytest.raises(ValueError, match=r"generator or seed must be None, got both \(seed 2\)"):
        vectors().sample(1, generator=torch.Generator(), seed=2)
    with pytest.raises(ValueError, match="beta must be a finite number > 0"):
        vectors(beta=math.nan)
    with pytest.raises(ValueError, match="prior_scale must be a number, a mapping or 'fit'"):
        vectors(prior_scale="auto")
    with pytest.raises(ValueError, match="variant must be one of"):
        vectors(variant="printed")


def test_missing_parameters_are_warned_of_at_the_caller():
    F = DiagonalFisher({"w": H}, num_samples=7, coverage={"b": "missing: no rule"})
    with pytest.warns(ff.FisherWarning, match=r"\['b'\]") as caught:
        posterior = ff.optimal_posterior(F, {"w": W, "b": torch.zeros(2)}, prior_scale=1.0, beta=0.01)
    assert caught[0].filename == __file__
    assert set(posterior.mean) == {"w"}


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
@pytest.mark.parametrize("beta", [1e-60, 1e-80, 1e-100])
def test_flat_directions_have_the_priors_noise_whatever_the_beta(structure, beta):
    """A draw of ``N(0, (F + beta)^-1)`` is ``1 / sqrt(beta)`` there, more than float32 holds, before it is scaled."""
    torch.manual_seed(0)
    net, x = nn.Linear(3, 1, bias=False), torch.randn(20, 3)
    x[:, 2] = 0
    F = ff.fisher(net, [(x, None)], structure, "exact", "gaussian", progress=False)
    q = ff.optimal_posterior(F, net, prior_scale=1.0, beta=beta)
    noise = q.sample(2000, seed=0)["weight"][:, 0] - q.mean["weight"]
    assert noise.std(0).tolist() == pytest.approx([0.0, 0.0, 1.0], abs=0.05)
