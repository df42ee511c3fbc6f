# SPDX-License-Identifier: Apache-2.0
"""The effective information: Gaussian channels in closed form and by quadrature, bounds, invariances, and what is refused."""

import math

import pytest
import torch
from torch import nn

import fisherfast as ff

DOUBLE = torch.float64
PI_E = 2 * math.pi * math.e


def additive(slope=1.0, dim=1):
    """z = slope x + b with noise on b alone: a Gaussian channel of variance beta, for F = 1."""
    net = nn.Linear(dim, dim).double()
    with torch.no_grad():
        net.weight.copy_(slope * torch.eye(dim, dtype=DOUBLE))
    net.weight.requires_grad_(False)
    return net, ff.DiagonalFisher({"bias": torch.ones(dim, dtype=DOUBLE)}, 7)


def mlp(units=5):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, units)).double().eval()
    x = torch.randn(12, 3, dtype=DOUBLE)
    return net, x, ff.fisher(net, [(x, None)], "kfac", "exact", progress=False)


def quadrature(means, variances):
    """The mean over components of KL(component || mixture), in one dimension, by the trapezoidal rule."""
    means, variances = (torch.as_tensor(v, dtype=DOUBLE).view(-1, 1) for v in (means, variances))
    reach = 12 * variances.max().sqrt()
    z = torch.linspace(float(means.min() - reach), float(means.max() + reach), 20_001, dtype=DOUBLE)
    logs = -((z - means) ** 2) / (2 * variances) - torch.log(2 * math.pi * variances) / 2
    mixture = logs.logsumexp(0) - math.log(len(means))
    return float(torch.trapezoid(logs.exp() * (logs - mixture), z).mean())


def test_monte_carlo_is_the_gaussian_channel():
    # x ~ N(0, 1), by its quantiles: I(x; x + noise) = 1/2 log(1 + 1 / beta).
    N, beta = 200, 0.05
    net, F = additive()
    x = torch.distributions.Normal(0, 1).icdf((torch.arange(N, dtype=DOUBLE) + 0.5) / N).view(-1, 1)
    got = ff.effective_information(net, x, F, method="monte-carlo", beta=beta, draws=64)
    closed = math.log1p(1 / beta) / 2
    assert quadrature(x, torch.full_like(x, beta)) == pytest.approx(closed, rel=0.02)
    assert got.nats == pytest.approx(closed, abs=4 * got.stderr + 0.02 * closed)
    assert got.stderr < 0.01 and got.nats < got.bound == math.log(N)
    assert got.bits == got.nats / math.log(2)


def test_monte_carlo_matches_quadrature_of_unequal_components():
    # z = w x: the noise's variance grows with x^2.
    net, F = nn.Linear(1, 1, bias=False).double(), ff.DiagonalFisher({"weight": torch.ones(1, 1, dtype=DOUBLE)}, 7)
    nn.init.constant_(net.weight, 1.5)
    x = torch.tensor([[-1.0], [0.3], [0.5], [2.0]], dtype=DOUBLE)
    got = ff.effective_information(net, x, F, method="monte-carlo", beta=0.2, draws=20_000)
    expected = quadrature(1.5 * x, 0.2 * x**2)
    assert got.nats == pytest.approx(expected, abs=4 * got.stderr)
    assert got.stderr < 0.004
    assert got.nats == pytest.approx(float(got.each.mean()))


def test_monte_carlo_in_several_dimensions_adds_independent_channels():
    # A product of two data sets and two channels: the information is the sum of theirs.
    one = torch.tensor([-0.4, 0.1, 0.9], dtype=DOUBLE)
    net, F = additive(dim=2)
    got = ff.effective_information(net, torch.cartesian_prod(one, one), F, method="monte-carlo", beta=0.1, draws=4000)
    assert got.nats == pytest.approx(2 * quadrature(one, torch.full((3,), 0.1)), abs=4 * got.stderr)


def test_monte_carlo_standard_error_is_that_of_the_seed():
    net, x, F = mlp()
    runs = [
        ff.effective_information(net, x, F, method="monte-carlo", beta=0.05, prior_scale=0.5, draws=8, seed=seed)
        for seed in range(30)
    ]
    spread = torch.tensor([run.nats for run in runs]).std().item()
    assert spread == pytest.approx(sum(run.stderr for run in runs) / 30, rel=0.5)
    assert runs[0].nats != runs[1].nats
    again = ff.effective_information(net, x, F, method="monte-carlo", beta=0.05, prior_scale=0.5, draws=8, seed=0)
    assert again.nats == runs[0].nats


@pytest.mark.parametrize("beta", [1e-12, 1e-3, 1.0, 1e6])
def test_monte_carlo_is_at_most_log_n(beta):
    net, x, F = mlp()
    got = ff.effective_information(net, x, F, method="monte-carlo", beta=beta, prior_scale=1e3 * math.sqrt(beta))
    assert float(got.each.max()) <= math.log(12) + 1e-12
    if beta == 1e-12:
        assert got.nats == pytest.approx(math.log(12))


def test_equal_inputs_hold_nothing():
    net, F = additive()
    got = ff.effective_information(net, torch.ones(5, 1, dtype=DOUBLE), F, method="monte-carlo", beta=0.1)
    assert got.nats == pytest.approx(0, abs=1e-12)


def test_spectrum_is_equation_10():
    # z = A x + b, noise beta on b: F_{z|x} = A^T A / beta, and eq. 10 is the small-noise limit of the Gaussian channel.
    net, F = additive(dim=2)
    A = torch.tensor([[1.0, 0.5], [-0.3, 2.0]], dtype=DOUBLE)
    with torch.no_grad():
        net.weight.copy_(A)
    x, beta = torch.randn(3, 2, dtype=DOUBLE), 1e-6
    got = ff.effective_information(net, x, F, method="spectrum", beta=beta, entropy=math.log(PI_E))  # of N(0, I)
    channel = torch.logdet(torch.eye(2, dtype=DOUBLE) + A @ A.T / beta).item() / 2
    assert got.nats == pytest.approx(channel, rel=1e-6)
    assert got.stderr == pytest.approx(0, abs=1e-12) and got.entropy == math.log(PI_E) and got.bound is None
    assert got.log_pseudo_determinant == pytest.approx(torch.logdet(A.T @ A / beta).item(), rel=1e-12)
    assert got.trace == pytest.approx((A**2).sum().item() / beta)


def test_spectrum_below_the_dimension_of_x_is_relative():
    net, x, F = mlp(units=2)
    options = {"method": "spectrum", "prior_scale": 0.5}
    got = ff.effective_information(net, x, F, beta=0.05, **options)
    fisher = ff.input_fisher(net, x, F, beta=0.05, prior_scale=0.5)
    assert got.nats == pytest.approx((fisher.logdet().mean().item() - 2 * math.log(PI_E)) / 2)
    assert got.trace == fisher.mean_trace and got.log_pseudo_determinant == fisher.logdet().mean().item()
    assert got.stderr == pytest.approx(fisher.logdet().std().item() / 2 / math.sqrt(12))
    assert "nats less the entropy of the input: method spectrum, 12 inputs, rank 2, 2 units about x" in str(got)
    with pytest.raises(
        ValueError, match=r"z must tell all 3 numbers of the input apart for eq\. 10, got .* rank 2 from 2 units; leave"
    ):
        ff.effective_information(net, x, F, beta=0.05, entropy=1.0, **options)


def test_one_input_that_z_does_not_tell_is_enough_to_refuse():
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU()).double()
    net[0].weight.data.fill_(1.0)
    F = ff.DiagonalFisher({"0.weight": torch.ones(1, 1, dtype=DOUBLE)}, 7)
    x = torch.tensor([[1.0], [-1.0]], dtype=DOUBLE)
    with pytest.raises(ValueError, match=r"z must tell all 1 numbers of the input apart for eq\. 10, got a Fisher of rank 0"):
        ff.effective_information(net, x, F, method="spectrum", beta=0.1, prior_scale=1.0, entropy=1.0)


def test_determinants_of_several_scales_of_the_fisher():
    # F_{z|x}(c F) = c F_{z|x}, so eq. 10 gains r/2 log c.
    net, x, _ = mlp(units=2)
    diagonal = {name: torch.rand_like(p) + 0.1 for name, p in net.named_parameters()}
    one, four = (
        ff.effective_information(
            net, x, ff.DiagonalFisher({n: c * f for n, f in diagonal.items()}, 7), method="spectrum", beta=0.1
        )
        for c in (1, 4)
    )
    assert four.nats - one.nats == pytest.approx(math.log(4))


@pytest.mark.parametrize(
    "prior, scales, entropy",
    [
        ("uniform", {"a": 0.5, "b": 3.0}, math.log(1.5)),
        ("gaussian", {"a": 0.5, "b": 3.0}, math.log(PI_E) + math.log(1.5)),
    ],
)
def test_nuisance_is_equation_10_on_theta(prior, scales, entropy):
    net, x, F = mlp()
    along = {"a": torch.randn_like(x), "b": lambda x, amount: x * (1 + amount)}
    options = {"method": "nuisance", "along": along, "nuisance_prior": prior, "nuisance_scales": scales, "terms": "both"}
    got = ff.effective_information(net, x, F, beta=0.05, prior_scale=0.5, **options)
    fisher = ff.input_fisher(net, x, F, beta=0.05, prior_scale=0.5, along=along, terms="both")
    expected = entropy - (2 * math.log(PI_E) - torch.logdet(fisher.matrix())) / 2
    assert got.entropy == pytest.approx(entropy)
    torch.testing.assert_close(got.each, expected)
    assert "method nuisance, 12 inputs, entropy" in str(got) and "about a, b" in str(got)


def test_nuisance_with_gaussian_prior_is_the_gaussian_channel():
    net, F = additive(slope=3.0)
    x = torch.randn(4, 1, dtype=DOUBLE)
    options = {"along": {"shift": torch.ones_like(x)}, "nuisance_prior": "gaussian", "nuisance_scales": {"shift": 2.0}}
    got = ff.effective_information(net, x, F, method="nuisance", beta=1e-6, **options)
    assert got.nats == pytest.approx(math.log1p(2.0**2 * 3.0**2 / 1e-6) / 2, rel=1e-6)


def test_units_of_a_nuisance_cancel():
    # In millimetres or metres the same prior: the entropy gains what the Fisher loses.
    net, x, F = mlp()
    tangent = torch.randn_like(x)
    results = [
        ff.effective_information(
            net, x, F, method="nuisance", beta=0.05, prior_scale=0.5, along={"a": tangent / c}, nuisance_scales={"a": c * 0.2}
        ).nats
        for c in (1, 1000)
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-12)


def test_paper_variant_is_passed_on():
    net, x, F = mlp(units=2)
    got = ff.effective_information(net, x, F, method="spectrum", beta=0.05, variant="paper")
    assert got.trace == ff.input_fisher(net, x, F, beta=0.05, variant="paper").mean_trace


def test_one_input_has_no_standard_error():
    net, F = additive()
    assert math.isnan(ff.effective_information(net, torch.ones(1, 1, dtype=DOUBLE), F, method="spectrum", beta=0.1).stderr)


def test_one_dead_unit_is_refused_by_monte_carlo():
    net, x, F = mlp()
    net[1] = nn.ReLU()
    with torch.no_grad():
        net[0].bias.copy_(torch.tensor([9.0, -1e3, 9.0, 9.0]))
    options = {"method": "monte-carlo", "beta": 0.1, "prior_scale": 0.5}
    with pytest.raises(ValueError, match="every unit of z must be noisy for 'monte-carlo', got 4 units and noise of rank 3"):
        ff.effective_information(net, x, F, layer="1", **options)
    assert ff.effective_information(net, x, F, layer="0", **options).nats > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "exact"}, "method must be one of"),
        ({"method": "nuisance"}, "along and nuisance_scales must be given for 'nuisance'"),
        ({"method": "nuisance", "along": {"a": 1}}, "along and nuisance_scales must be given"),
        ({"method": "spectrum", "along": {"a": 1}, "nuisance_scales": {"a": 1.0}}, "along and nuisance_scales must be given"),
        ({"method": "spectrum", "nuisance_scales": {"a": 1.0}}, "along and nuisance_scales must be given"),
        ({"method": "spectrum", "entropy": math.inf}, "entropy must be a finite number of nats"),
        ({"method": "monte-carlo", "entropy": 1.0}, "entropy must be a finite number of nats, for 'spectrum' only"),
        ({"method": "monte-carlo", "terms": "both"}, "variant and terms must be left out for 'monte-carlo'"),
        ({"method": "monte-carlo", "variant": "paper"}, "variant and terms must be left out for 'monte-carlo'"),
        ({"method": "monte-carlo", "draws": 1}, "draws must be >= 2"),
        ({"method": "monte-carlo", "beta": -1.0}, "effective_information: beta must be a finite number > 0"),
    ],
)
def test_refuses(options, message):
    net, x, F = mlp()
    with pytest.raises(ValueError, match=message):
        ff.effective_information(net, x, F, **({"beta": 0.1, "prior_scale": 1.0} | options))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"nuisance_prior": "laplace"}, "nuisance_prior must be one of"),
        ({"nuisance_scales": {}}, "nuisance_scales must have a number for each of"),
        ({"nuisance_scales": {"b": 1.0}}, "nuisance_scales must have a number for each of"),
        ({"nuisance_scales": {"a": 0.0}}, r"nuisance_scales\['a'\] must be a finite number > 0"),
        ({"nuisance_scales": {"a": math.nan}}, r"nuisance_scales\['a'\] must be a finite number > 0"),
    ],
)
def test_refuses_nuisances(options, message):
    net, x, F = mlp()
    given = {"along": {"a": x}, "nuisance_scales": {"a": 1.0}} | options
    with pytest.raises(ValueError, match=message):
        ff.effective_information(net, x, F, method="nuisance", beta=0.1, prior_scale=1.0, **given)


def test_more_nuisances_than_units_are_refused():
    net, x, F = mlp(units=2)
    along = {name: torch.randn_like(x) for name in "abc"}
    with pytest.raises(ValueError, match=r"z must tell all 3 numbers of the input apart for eq\. 10, got .*; give fewer"):
        ff.effective_information(
            net, x, F, method="nuisance", beta=0.1, prior_scale=1.0, along=along, nuisance_scales=dict.fromkeys("abc", 1.0)
        )


def test_lost_directions_are_said():
    """Without its last live unit z tells nothing, and the number is larger than before."""
    net = nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU()).double()
    net[0].weight.data.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    F = ff.DiagonalFisher({"0.weight": 100 * torch.ones(2, 3, dtype=DOUBLE)}, 7)
    options = {"method": "spectrum", "beta": 1.0, "prior_scale": 1.0}
    seen = ff.effective_information(net, torch.tensor([[1.0, 1.0, 1.0]], dtype=DOUBLE), F, **options)
    assert ", rank 2, 2 units" in seen.conditions()
    with pytest.warns(ff.FisherWarning, match="should have rank 2 at every input, got 1 to 2"):
        mixed = ff.effective_information(net, torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 1.0]], dtype=DOUBLE), F, **options)
    assert ", rank 1 to 2," in mixed.conditions()
