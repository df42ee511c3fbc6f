# SPDX-License-Identifier: Apache-2.0
"""The trained posterior: the closed form of linear models, the moments of noise at outputs, what is left alone and refused."""

import dataclasses
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfast as ff
from fisherfast.information._diagonal_gaussian import DiagonalGaussian
from fisherfast.information._local_noise import LocalNoise

N, BETA, SCALE = 256, 0.05, 0.8
FAST = {"beta": BETA, "likelihood": "gaussian", "epochs": 300}


class Scaled(nn.Module):
    """Raw parameters: a weight of every input, and a linear layer whose weight is used without its module."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
        self.inner = nn.Linear(3, 2)

    def forward(self, x):
        return torch.cat([x * self.scale, F.linear(x, self.inner.weight, self.inner.bias)], 1)


def inputs():
    return torch.randn(N, 3) * torch.tensor([0.2, 1.0, 3.0])


def regression(net):
    """Inputs of unequal size and targets around what the network says of them."""
    x = inputs()
    with torch.no_grad():
        return [(x, net(x) + torch.randn(N, *net(x).shape[1:]))]


def diagonal_fisher(net, data):
    return ff.fisher(net, [(x, None) for x, *_ in data], fisher_type="exact", likelihood="gaussian", progress=False)


def error(found, expected):
    """The relative difference, as a root of the mean square over all weights."""
    ratios = torch.cat([(found[name].double() / expected[name].double()).log().flatten() for name in expected])
    return float(ratios.square().mean().sqrt())


@pytest.mark.parametrize(
    # Noise on weights is one draw a step, about 300 in all: sqrt(2 / 300) and more, where noise at outputs is one a sample.
    ("build", "noise", "bound"),
    [(lambda: nn.Linear(3, 2), "local", 0.06), (lambda: nn.Linear(3, 2), "weight", 0.25), (Scaled, "local", 0.25)],
)
def test_linear_gaussian_model_matches_the_closed_form(build, noise, bound):
    # Sigma = beta / (h + beta / lambda^2): F is the Hessian, and a diagonal Q knows its diagonal only.
    net = build()
    data = regression(net)
    found = ff.variational_posterior(net, data, prior_scale=SCALE, noise=noise, **FAST)
    optimal = ff.optimal_posterior(diagonal_fisher(net, data), net, prior_scale=SCALE, beta=BETA)
    assert error(found.variance(), optimal.variance()) < bound
    assert found.kl == pytest.approx(optimal.kl, rel=0.01 if noise == "local" else 0.05)
    assert all(torch.equal(found.mean[name], p) for name, p in net.named_parameters())


@pytest.mark.parametrize("prior_scale", [10.0, 2.0])
def test_curvature_is_the_diagonal_of_the_hessian(prior_scale):
    net = nn.Linear(3, 2)
    data = regression(net)
    found = ff.variational_posterior(net, data, prior_scale=prior_scale, **FAST)
    assert error(found.curvature(), diagonal_fisher(net, data).diagonal()) < 0.06


def test_fitted_prior_is_that_of_the_optimal_posterior():
    net = nn.Linear(3, 2)
    data = regression(net)
    found = ff.variational_posterior(net, data, prior_scale="fit", **FAST)
    optimal = ff.optimal_posterior(diagonal_fisher(net, data), net, prior_scale="fit", beta=BETA)
    assert found.prior_scales == pytest.approx(optimal.information.prior_scales, rel=0.02)
    assert found.kl == pytest.approx(optimal.kl, rel=0.02)
    squares = sum(float(p.detach().double().square().sum()) for p in net.parameters())
    variance = sum(float(v.sum()) for v in found.variance().values())
    assert found.prior_scales["weight"] ** 2 == pytest.approx((squares + variance) / 8, rel=1e-6)


@pytest.mark.parametrize("train_mean", [False, True])
def test_kl_is_the_divergence_of_its_gaussians(train_mean):
    net, center = nn.Linear(3, 2), nn.Linear(3, 2)
    options = {"beta": BETA, "prior_scale": {"weight": 0.3, "bias": 2.0}, "likelihood": "gaussian", "epochs": 2}
    found = ff.variational_posterior(net, regression(net), center=center, train_mean=train_mean, **options)
    kl = 0.0
    for (name, mean), c in zip(found.mean.items(), center.parameters(), strict=True):
        q = torch.distributions.Normal(mean.double(), found.std[name].double())
        p = torch.distributions.Normal(c.detach().double(), {"weight": 0.3, "bias": 2.0}[name])
        kl += float(torch.distributions.kl_divergence(q, p).sum())
    assert found.kl == pytest.approx(kl, rel=1e-6)


def test_trained_mean_is_the_ridge_solution():
    net, teacher = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
    data = regression(teacher)
    (x, y), *_ = data
    found = ff.variational_posterior(net, data, prior_scale=SCALE, train_mean=True, mean_lr=0.02, **FAST)
    ridge = torch.linalg.solve(x.mT @ x / N + BETA / SCALE**2 * torch.eye(3), x.mT @ y / N).mT
    assert (found.mean["weight"] - ridge).norm() < 0.05 * (ridge - net.weight).norm()
    assert not found.mean["weight"].requires_grad


def classifier():
    """A small network after some training, and its data."""
    x, y = torch.randn(60, 3), torch.randint(0, 3, (60,))
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.zero_grad()
    return net, [(x[:40], y[:40]), (x[40:], y[40:])]


def test_its_complexity_is_less_than_that_of_other_noise():
    net, data = classifier()
    options = {"beta": 0.01, "prior_scale": 1.0}
    best = ff.variational_posterior(net, data, epochs=150, **options)
    complexity = {}
    for factor in (0.25, 1.0, 4.0):
        q = DiagonalGaussian("", net, 1.0, None, False)
        with torch.no_grad():
            for name, log_std in q.log_stds.items():
                log_std.copy_((best.std[name] * factor).log())
            stds = q.stds()
            other = dataclasses.replace(best, std=stds, nats=float(q.kl(stds, q.scales(stds))))
        complexity[factor] = ff.measured_complexity(other, net, data, draws=30)
    assert complexity[1.0].nats == pytest.approx(best.kl, rel=1e-6)
    for factor in (0.25, 4.0):
        error = complexity[1.0].stderr + complexity[factor].stderr
        assert complexity[1.0].complexity < complexity[factor].complexity - 4 * error
    # The last epochs' own estimate, by other draws, is of the same quantity.
    assert sum(best.history[-50:]) / 50 == pytest.approx(complexity[1.0].complexity, rel=0.05)
    # And no worse than the Fisher's, which knows the loss to second order only.
    fisher = ff.fisher(net, data, fisher_type="exact", progress=False)
    laplace = ff.measured_complexity(ff.optimal_posterior(fisher, net, **options), net, data, draws=30)
    assert complexity[1.0].complexity < laplace.complexity + 3 * (laplace.stderr + complexity[1.0].stderr)


def test_works_where_posteriors_do():
    net, data = classifier()
    found = [ff.variational_posterior(net, data, beta=beta, prior_scale="fit", epochs=30) for beta in (1e-3, 1e-1)]
    curve = ff.RateDistortion(tuple(ff.measured_complexity(q, net, data) for q in found))
    assert curve.nats[0] > curve.nats[1]
    draws = found[0].sample(4, seed=1)
    assert draws["0.weight"].shape == (4, 6, 3)
    assert torch.equal(draws["0.weight"], found[0].sample(4, generator=torch.Generator().manual_seed(1))["0.weight"])
    assert ff.expected_loss(found[0], net, data, loss=ff.zero_one).value <= 1
    for part in ("beta = 0.001", "fitted by layer", "categorical", "local noise", "30 epochs", "k = 45", "N = 60"):
        assert part in found[0].conditions()


CONVOLUTIONS = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear-positions": (lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, dilation=2), (1, 4, 4, 4)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_noise_at_the_output_has_the_moments_of_weight_noise(case):
    build, shape = CONVOLUTIONS[case]
    layer, n = build(), 4000
    x = torch.randn(1, *shape)
    stds = {name: torch.rand_like(p) for name, p in layer.named_parameters()}
    local = LocalNoise(layer, set(stds), lambda: layer(x))
    assert local.names == set(stds)
    with torch.no_grad(), local.over(stds):
        outputs = layer(x.expand(n, *shape))
    mean = layer(x)
    # The exact variance, by the squares of each weight's derivative.
    jacobians = torch.func.jacrev(lambda w: torch.func.functional_call(layer, w, (x,)))(dict(layer.named_parameters()))
    variance = sum((J.flatten(mean.dim()) * stds[name].flatten()).square().sum(-1) for name, J in jacobians.items()).detach()
    assert (((outputs.mean(0) - mean[0]) / (variance[0] / n).sqrt()).abs() < 5).all()
    assert ((outputs.var(0) / variance[0] - 1).abs() < 5 * math.sqrt(2 / n)).all()
    assert not layer._forward_hooks


def test_positions_share_their_noise_with_weight_noise_only():
    # z = sum over positions of a convolution: its curvature is (sum_t x_t)^2 for common noise, sum_t x_t^2 for noise at the output.
    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 1, bias=False)

        def forward(self, x):
            return self.conv(x).sum(2)

    net, x = Summed(), torch.randn(N, 1, 6) + 1
    data = [(x, net(x).detach())]
    common, each = x.sum(2).square().mean(), x.square().sum(2).mean()
    assert common > 2 * each
    for noise, h in (("weight", common), ("local", each)):
        found = ff.variational_posterior(net, data, prior_scale=SCALE, noise=noise, **FAST)
        assert float(found.variance()["conv.weight"]) == pytest.approx(float(BETA / (h + BETA / SCALE**2)), rel=0.25)
    assert diagonal_fisher(net, data).trace() == pytest.approx(float(common), rel=1e-5)


def test_layers_used_twice_or_tied_have_weight_noise():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.once, self.twice, self.outside = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
            self.tied, self.frozen = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)
            self.tied_too = nn.Linear(3, 3, bias=False)
            self.tied_too.weight = self.tied.weight
            self.norm = nn.LayerNorm(3)

        def forward(self, x):
            x = self.twice(self.twice(self.norm(self.once(x))))
            return self.tied_too(self.tied(self.frozen(F.linear(x, self.outside.weight, self.outside.bias))))

    net = Odd()
    names = {name for name, p in net.named_parameters() if p.requires_grad}
    assert LocalNoise(net, names, lambda: net(inputs())).names == {"once.weight", "once.bias"}
    found = ff.variational_posterior(net, regression(net), beta=BETA, prior_scale=1.0, likelihood="gaussian", epochs=2)
    assert found.mean.keys() == found.std.keys() == names


def test_layer_called_again_later_is_refused():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            x = self.layer(input=x)
            return self.layer(x) if len(x) > 2 else x

    net, x = Growing(), torch.randn(4, 3)
    options = {"beta": BETA, "prior_scale": 1.0, "likelihood": "gaussian", "epochs": 1}
    ff.variational_posterior(net, [(x[:2], x[:2])], **options)
    with pytest.raises(ValueError, match=r"the layer of 'layer.weight' must be called once, as in the first batch, got twice"):
        ff.variational_posterior(net, [(x[:2], x[:2]), (x, x)], **options)
    assert not net.layer._forward_hooks


def test_inputs_of_zeros_have_a_gradient():
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].bias.fill_(-1e4)
    data = [(torch.zeros(4, 3), torch.zeros(4, 1))]
    found = ff.variational_posterior(net, data, beta=BETA, prior_scale={"0": 1e-3, "2": 1.0}, likelihood="gaussian", epochs=3)
    assert all(bool(std.isfinite().all()) for std in found.std.values())


def test_weights_of_zero_have_noise_under_a_given_prior():
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.bias.zero_()
    found = ff.variational_posterior(net, regression(net), prior_scale=SCALE, **FAST)
    assert error({"bias": found.variance()["bias"]}, {"bias": torch.full((2,), BETA / (1 + BETA / SCALE**2))}) < 0.06


def test_autocast_does_not_lose_small_variances():
    net, data = classifier()
    with torch.autocast("cpu", torch.float16):
        found = ff.variational_posterior(net, data, beta=1e-3, prior_scale={"0": 1e-3, "2": 1e-3}, epochs=2)
    assert all(bool(std.isfinite().all()) and std.dtype == torch.float32 for std in found.std.values())


def test_fitted_layer_at_its_center_has_no_noise():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with torch.no_grad():
        for p in net[0].parameters():
            p.zero_()
    found = ff.variational_posterior(net, regression(net), beta=BETA, prior_scale="fit", likelihood="gaussian", epochs=2)
    assert found.prior_scales["0.weight"] == 0 and found.prior_scales["1.weight"] > 0
    assert not found.std["0.weight"].any() and not found.curvature()["0.weight"].any() and found.std["1.weight"].all()
    assert not found.sample(2)["0.weight"].any() and math.isfinite(found.kl)


def test_weights_of_samples_count_them():
    net = nn.Linear(3, 1, bias=False)
    x = inputs()
    weight = (x[:, 0] > 0).float()
    y = net(x).detach()
    weighted = ff.variational_posterior(net, [(x, y, weight)], prior_scale=SCALE, **FAST)
    kept = x[weight > 0]
    optimal = BETA / (kept.square().mean(0) + BETA / SCALE**2)
    assert error({"weight": weighted.variance()["weight"][0]}, {"weight": optimal}) < 0.06


def test_same_seed_same_result_and_nothing_else_is_touched():
    net = nn.Linear(3, 2)
    data = regression(net)
    before, state = {n: (p, p.detach().clone(), p._version) for n, p in net.named_parameters()}, torch.get_rng_state()
    options = {"beta": BETA, "prior_scale": 1.0, "likelihood": "gaussian", "epochs": 3}
    with torch.no_grad():  # whatever the caller's mode
        one, two = (ff.variational_posterior(net, data, **options, seed=4) for _ in range(2))
    other = ff.variational_posterior(net, data, **options, seed=5)
    assert torch.equal(one.std["weight"], two.std["weight"]) and not torch.equal(one.std["weight"], other.std["weight"])
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in net.named_parameters():
        same, value, version = before[name]
        assert p is same and torch.equal(p, value) and p._version == version and p.requires_grad and p.grad is None
    assert not net._forward_hooks


def test_model_is_left_as_it_is_on_errors():
    net = nn.Linear(3, 2)
    (x, y), *_ = regression(net)
    with pytest.raises(ff.NonFiniteError, match=r"losses must be finite, got inf in batch 1 of epoch 0"):
        ff.variational_posterior(net, [(x, y), (x * 1e30, y)], beta=BETA, prior_scale=1.0, likelihood="gaussian")
    assert not net._forward_hooks and net.weight.grad is None


def test_refuses():
    net = nn.Linear(3, 2)
    data = regression(net)

    def train(model=net, data=data, **options):
        return ff.variational_posterior(
            model, data, **({"beta": BETA, "prior_scale": 1.0, "likelihood": "gaussian", "epochs": 1} | options)
        )

    for options, message in (
        ({"beta": 0.0}, "variational_posterior: beta must be a finite number > 0, got 0.0"),
        ({"prior_scale": "auto"}, "prior_scale must be a number, a mapping or 'fit', got 'auto'"),
        ({"prior_scale": -1.0}, "variational_posterior: prior_scale must be a finite number > 0, got -1.0"),
        ({"prior_scale": math.inf}, "variational_posterior: prior_scale must be finite, got inf"),
        ({"prior_scale": {"0": 1.0}}, r"prior_scale must name layers or parameters of model, got \['0'\]"),
        ({"epochs": 0}, "epochs must be >= 1, got 0"),
        ({"lr": math.nan}, "lr must be a finite number > 0, got nan"),
        ({"mean_lr": 0.0}, "mean_lr must be a finite number > 0, got 0.0"),
        ({"noise": "flipout"}, r"noise must be one of \['local', 'weight'\], got 'flipout'"),
        ({"data": []}, "data must yield at least one batch, got none"),
        ({"data": [], "noise": "weight"}, "data must yield at least one batch in every epoch, got none in epoch 0"),
        ({"data": iter(data)}, "data must be readable several times, got list_iterator"),
        ({"data": [(data[0][0], None)]}, "data must have labels, got a batch without"),
        ({"center": {}}, r"center must hold every parameter of model, got none for \['bias', 'weight'\]"),
        ({"center": {name: p + 1j for name, p in net.named_parameters()}}, r"center\['\w+'\] must be real, got torch.complex"),
        ({"center": nn.Linear(2, 2)}, r"center\['weight'\] must be \(2, 3\) as in model, got \(2, 2\)"),
        ({"center": net, "prior_scale": "fit"}, "prior_scale must be a number where every layer is at its center, got 'fit'"),
        ({"model": nn.Linear(3, 2).requires_grad_(False)}, "model must have a parameter that asks for a gradient, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            train(**options)
    with torch.no_grad():
        net.bias[0] = math.nan
    with pytest.raises(ValueError, match=r"weights must be finite, got NaN or infinity in \['bias'\]"):
        train()


def test_a_batch_of_no_weight_teaches_nothing():
    model, x, y = nn.Linear(3, 2).double(), torch.randn(20, 3).double(), torch.randint(0, 2, (20,))
    options = {"beta": 0.1, "prior_scale": 1.0, "epochs": 3}
    q = ff.variational_posterior(model, [(x, y), (x, y, torch.zeros(20))], **options)
    assert all(bool(v.isfinite().all()) for v in q.std.values())


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder's weight, by a function of its own."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 2, bias=False)

    def forward(self, x):
        """[N, 3]."""
        return nn.functional.linear(self.encoder(x).tanh(), self.encoder.weight.T)


def test_a_weight_that_a_function_uses_too_has_one_noise():
    """Local noise would be the layer's alone, and a second use would see none."""
    model, x = Tied().double(), torch.randn(16, 3).double()
    options = {"beta": 0.01, "prior_scale": 1.0, "likelihood": "gaussian", "epochs": 3, "seed": 1}
    one, other = (ff.variational_posterior(model, [(x, x)], noise=noise, **options) for noise in ("local", "weight"))
    assert torch.equal(one.std["encoder.weight"], other.std["encoder.weight"])


@pytest.mark.parametrize(("size", "weights"), [(240, None), (128, (3.0, 1.0))])
def test_batches_count_by_the_weights_of_their_samples(size, weights):
    net, x = nn.Linear(3, 2), torch.randn(256, 3)
    x[size:] *= 4
    with torch.no_grad():
        y = net(x) + torch.randn(256, 2)
    weight = torch.tensor(weights or (1.0, 1.0)).repeat_interleave(torch.tensor([size, 256 - size]))
    parts = (x, y) if weights is None else (x, y, weight)
    data = [tuple(part[:size] for part in parts), tuple(part[size:] for part in parts)]
    q = ff.variational_posterior(net, data, beta=0.05, prior_scale=0.8, likelihood="gaussian", epochs=300)
    best = 0.05 / (weight @ x.square() / weight.sum() + 0.05 / 0.8**2)
    torch.testing.assert_close(q.variance()["weight"], best.double().expand(2, 3), rtol=0.2, atol=0)


def of_one_weight(curvature, N=512):
    """``(w x - x)^2 / 2`` at its minimum w = 1, batches of 8, the mean of x^2 the curvature h."""
    torch.manual_seed(0)
    x = torch.randn(N, 1)
    x = x / x.square().mean().sqrt() * math.sqrt(curvature)
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(1.0)
    return net, x


@pytest.mark.parametrize("beta, curvature", [(1 / 512, 100.0), (2e-5, 30.0), (1e-6, 1.0)])
def test_a_price_that_is_small_against_the_curvature_is_no_obstacle(beta, curvature):
    """The first gradients are ``h / beta`` times as large as those at the optimum ``beta / (h + beta)``, and soon forgotten."""
    net, x = of_one_weight(curvature)
    q = ff.variational_posterior(net, [(b, b) for b in x.split(8)], beta=beta, prior_scale=1.0, likelihood="gaussian")
    assert q.variance()["weight"].item() == pytest.approx(beta / (curvature + beta), rel=0.03)


def test_says_when_it_was_stopped_on_its_way():
    net, x = of_one_weight(1.0)
    options = {"beta": 1 / 512, "prior_scale": 1.0, "likelihood": "gaussian"}
    with pytest.warns(ff.FisherWarning, match="sigma has not converged: it still moves .* pass more epochs, or smaller"):
        ff.variational_posterior(net, [(x, x)], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q = ff.variational_posterior(net, [(x, x)], epochs=200, **options)
    assert q.variance()["weight"].item() == pytest.approx(1 / 513, rel=0.03)
