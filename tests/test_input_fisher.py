# SPDX-License-Identifier: Apache-2.0
"""The Fisher of an activation about its input, and the noise it comes from: closed forms, a dense oracle, scalings, refusals."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import STRUCTURES
from oracle import dense
from torch import nn

import fisherfast as ff
from fisherfast.information import _activation
from fisherfast.information._channel import Whitening

DOUBLE = torch.float64


def mlp():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    return net, torch.randn(7, 3, dtype=DOUBLE)


def cnn():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Softplus(), nn.Flatten(), nn.Linear(8, 3)).double().eval()
    return net, torch.randn(6, 1, 4, 4, dtype=DOUBLE)


def measured(net, x, structure="diagonal", likelihood="categorical"):
    return ff.fisher(net, [(x, None)], structure, "exact", likelihood, progress=False)


def linear(x, rows=None, structure="kfac"):
    """z = W x with the Gaussian likelihood: F = B (x) A, B = 1, A the second moments of rows."""
    torch.manual_seed(3)
    net = nn.Linear(x.shape[1], 2, bias=False).double()
    return net, measured(net, x if rows is None else rows, structure, "gaussian")


def plainly(net, F, layer, x):
    """Z, dz/dw and dz/dx of one input by torch.autograd.grad, row by row."""
    kept = {}
    hook = net.get_submodule(layer or "").register_forward_hook(lambda module, inputs, out: kept.update(z=out))
    x = x.clone().requires_grad_()
    net(x[None])
    hook.remove()
    weights = dict(net.named_parameters())
    J, G = [], []
    for unit in kept["z"].flatten():
        grads = torch.autograd.grad(unit, [*(weights[n] for n in F.names), x], retain_graph=True, materialize_grads=True)
        J.append(torch.cat([grad.flatten() for grad in grads[:-1]]))
        G.append(grads[-1].flatten())
    return kept["z"].detach().flatten(), torch.stack(J), torch.stack(G)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("network, layer, units", [(mlp, None, None), (mlp, "1", None), (cnn, None, None), (cnn, "0", [5, 0, 3])])
def test_dense_oracle(structure, network, layer, units):
    net, x = network()
    F, beta, scale = measured(net, x, structure), 0.05, 0.7
    options = {"layer": layer, "beta": beta, "units": units}
    got = ff.input_fisher(net, x[:2], F, prior_scale=scale, **options)
    printed = ff.input_fisher(net, x[:2], F, variant="paper", **options)
    noise = ff.activation_noise(net, x[:2], F, prior_scale=scale, **options)
    matrix = dense(F)
    sigma = beta * torch.linalg.inv(matrix + beta / scale**2 * torch.eye(len(matrix), dtype=DOUBLE))
    chosen = slice(None) if units is None else units
    for n in range(2):
        z, J, G = (part[chosen] for part in plainly(net, F, layer, x[n]))
        S = J @ sigma @ J.T
        torch.testing.assert_close(noise.mean[n], z)
        torch.testing.assert_close(noise.covariance[n], S, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(got.matrix()[n], G.T @ torch.linalg.solve(S, G), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(printed.matrix()[n], G.T @ J @ matrix @ J.T @ G / beta, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_covariance_term_is_the_slope_of_the_covariance(structure):
    # Against autograd through S(x) itself, with the Jacobian of the network written down by hand.
    net, x = mlp()
    F, beta, scale = measured(net, x, structure), 0.05, 0.7
    sigma = beta * torch.linalg.inv(dense(F) + beta / scale**2 * torch.eye(26, dtype=DOUBLE))
    W, b, V, _ = (p.detach() for p in net.parameters())

    def jacobian(x):
        h = torch.tanh(W @ x + b)
        back = V * (1 - h**2)  # [2, 4]
        eye = torch.eye(2, dtype=DOUBLE)
        to_V = torch.einsum("ij,k->ijk", eye, h)
        return torch.cat([torch.einsum("ij,k->ijk", back, x).flatten(1), back, to_V.flatten(1), eye], 1)

    def covariance(x):
        return jacobian(x) @ sigma @ jacobian(x).T

    both, mean = (ff.input_fisher(net, x[:2], F, beta=beta, prior_scale=scale, terms=terms) for terms in ("both", "mean"))
    torch.testing.assert_close(jacobian(x[0]), plainly(net, F, None, x[0])[1])
    for n in range(2):
        slopes = torch.autograd.functional.jacobian(covariance, x[n])
        inverse = torch.linalg.inv(covariance(x[n]))
        second = torch.einsum("ij,jka,kl,lib->ab", inverse, slopes, inverse, slopes) / 2
        torch.testing.assert_close(both.matrix()[n] - mean.matrix()[n], second, rtol=1e-7, atol=1e-9)


class Sequence(nn.Module):
    """A part over positions, then a linear layer on the mean over them."""

    def __init__(self, part, pick=lambda out: out):
        super().__init__()
        self.part, self.pick, self.head = part, pick, nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.pick(self.part(x)).mean(1))


@pytest.mark.parametrize(
    "net",
    [
        Sequence(nn.TransformerEncoderLayer(4, 2, 3, batch_first=True)),
        Sequence(nn.LSTM(4, 4, batch_first=True), lambda out: out[0]),
    ],
    ids=["attention", "lstm"],
)
def test_both_terms_of_attention_and_recurrence(net):
    # Against central differences of activation_noise.
    net, x, step = net.double().eval(), torch.randn(1, 3, 4, dtype=DOUBLE), 1e-5
    F = ff.DiagonalFisher({name: torch.rand_like(p) + 0.1 for name, p in net.named_parameters()}, 7)

    def noise(x):
        return ff.activation_noise(net, x, F, beta=0.1)

    moves = step * torch.eye(12, dtype=DOUBLE).view(12, 3, 4)
    ahead, behind, here = noise(x + moves), noise(x - moves), noise(x)
    G, slopes = ((a - b) / (2 * step) for a, b in ((ahead.mean, behind.mean), (ahead.covariance, behind.covariance)))
    inverse = here.covariance[0].inverse()
    expected = G @ inverse @ G.T + torch.einsum("ij,ajk,kl,bli->ab", inverse, slopes, inverse, slopes) / 2
    got = ff.input_fisher(net, x, F, beta=0.1, terms="both").matrix()[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_covariance_term_of_a_gaussian_with_unknown_scale():
    # z = w x: S = s x^2, so the term is 1/2 (S' / S)^2 = 2 / x^2, whatever w, F and beta.
    net, x = nn.Linear(1, 1, bias=False).double(), torch.tensor([[0.5], [3.0]], dtype=DOUBLE)
    F = ff.DiagonalFisher({"weight": torch.full((1, 1), 0.3, dtype=DOUBLE)}, 7)
    got = [ff.input_fisher(net, x, F, beta=0.1, terms=terms).trace() for terms in ("both", "mean")]
    torch.testing.assert_close(got[0] - got[1], 2 / x[:, 0] ** 2)


def test_doubling_the_input_of_a_linear_layer():
    rows, x = torch.randn(9, 3, dtype=DOUBLE), torch.randn(2, 3, dtype=DOUBLE)
    net, F = linear(rows)
    for variant, factor in (("exact", 1 / 4), ("paper", 4)):
        once, twice = (ff.input_fisher(net, c * x, F, beta=0.1, variant=variant).matrix() for c in (1, 2))
        torch.testing.assert_close(twice, factor * once, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rho, exact", [(0.0, 1.0), (0.9, 0.19), (0.99, 0.0199)])
def test_two_weights(rho, exact):
    # z = w1 x, F = [[1, rho], [rho, 1]], by a layer of two inputs of which the second is 0; w1 = x = beta = 1.
    net = nn.Linear(2, 1, bias=False).double()
    nn.init.ones_(net.weight)
    root = torch.linalg.cholesky(torch.tensor([[1, rho], [rho, 1]], dtype=DOUBLE))
    F = measured(net, math.sqrt(2) * root.T, "kfac", "gaussian")
    torch.testing.assert_close(dense(F), torch.tensor([[1, rho], [rho, 1]], dtype=DOUBLE))
    x = torch.tensor([[1.0, 0.0]], dtype=DOUBLE)
    got = {v: ff.input_fisher(net, x, F, beta=1.0, variant=v, along={"x1": x}) for v in ("exact", "paper")}
    assert got["exact"].mean_trace == pytest.approx(exact, rel=1e-9)
    assert got["paper"].mean_trace == pytest.approx(1, rel=1e-12)


def test_kfac_of_a_linear_layer():
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 4)).double()
    net[2].requires_grad_(False)
    rows, x, beta = torch.randn(20, 3, dtype=DOUBLE), torch.randn(1, 3, dtype=DOUBLE), 0.02
    F = measured(net, rows, "kfac")
    A, B = F.factors(dtype=DOUBLE)["0"]
    noise = ff.activation_noise(net, x, F, layer="0", beta=beta)
    torch.testing.assert_close(noise.covariance[0], beta * (x @ A.inverse() @ x.T) * B.inverse(), rtol=1e-9, atol=1e-12)
    exact, printed = (ff.input_fisher(net, x, F, layer="0", beta=beta, variant=v).matrix()[0] for v in ("exact", "paper"))
    W = net[0].weight.detach()
    torch.testing.assert_close(exact, W.T @ B @ W / (beta * (x @ A.inverse() @ x.T)), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(printed / exact, ((x @ A @ x.T) * (x @ A.inverse() @ x.T)).expand(3, 3), rtol=1e-8, atol=0.0)


def test_diagonal_is_a_sum_over_weights():
    net, x = mlp()
    F, beta = measured(net, x), 0.03
    noise = ff.activation_noise(net, x[:1], F, beta=beta)
    J = plainly(net, F, None, x[0])[1]
    f = torch.cat([part.flatten() for part in F.diagonal(dtype=DOUBLE).values()])
    torch.testing.assert_close(noise.covariance[0], beta * torch.einsum("ak,bk,k->ab", J, J, 1 / f), rtol=1e-10, atol=1e-12)


@settings(max_examples=10, deadline=None)
@given(st.floats(1e-6, 1e6))
def test_scales_with_the_fisher(c):
    net, x = mlp()
    diagonal = {name: torch.rand_like(p) + 0.1 for name, p in net.named_parameters()}
    F, scaled = (ff.DiagonalFisher({n: k * f for n, f in diagonal.items()}, 7) for k in (1, c))
    for variant in ("exact", "paper"):
        once, times = (ff.input_fisher(net, x[:1], f, beta=0.1, variant=variant).matrix() for f in (F, scaled))
        torch.testing.assert_close(times, c * once, rtol=1e-9, atol=0.0)
    # With a prior it is the ratio lambda^2 / beta that the Fisher's scale goes with: nothing but the noise's own scale is left.
    once = ff.input_fisher(net, x[:1], F, beta=0.1, prior_scale=0.5).matrix()
    times = ff.input_fisher(net, x[:1], scaled, beta=0.1, prior_scale=0.5 / math.sqrt(c)).matrix()
    torch.testing.assert_close(times, c * once, rtol=1e-9, atol=0.0)


def test_grows_with_the_fisher_and_vanishes_with_it():
    net, x = mlp()
    diagonal = {name: torch.rand_like(p) + 0.1 for name, p in net.named_parameters()}
    larger = {name: f + torch.rand_like(f) for name, f in diagonal.items()}
    small, large = (ff.input_fisher(net, x, ff.DiagonalFisher(d, 7), beta=0.1, prior_scale=1.0) for d in (diagonal, larger))
    assert torch.linalg.eigvalsh(large.matrix() - small.matrix()).min() > -1e-12
    none = ff.DiagonalFisher({name: torch.zeros_like(f) for name, f in diagonal.items()}, 7)
    wide = ff.input_fisher(net, x, none, beta=0.1, prior_scale=1e4)
    assert 0 < wide.mean_trace < 1e-6 * small.mean_trace


def test_small_prior_limit_is_the_prior_itself():
    # Weights fixed by the prior: Sigma = lambda^2 I.
    net, x = mlp()
    noise = ff.activation_noise(net, x[:1], measured(net, x, "kfac"), beta=0.1, prior_scale=1e-6)
    J = plainly(net, measured(net, x), None, x[0])[1]
    torch.testing.assert_close(noise.covariance[0], 1e-12 * J @ J.T, rtol=1e-6, atol=0.0)


def test_noise_is_that_of_sampled_weights():
    net, x = mlp()
    F, beta, scale = measured(net, x, "kfac"), 1e-6, 0.5
    noise = ff.activation_noise(net, x[:1], F, beta=beta, prior_scale=scale)
    generator = torch.Generator().manual_seed(0)
    draws = F.sample(4000, damping=beta / scale**2, generator=generator, dtype=DOUBLE)
    moved = {name: p.detach() + math.sqrt(beta) * draws[name] for name, p in net.named_parameters()}
    z = torch.func.vmap(lambda w: torch.func.functional_call(net, w, (x[:1],)))(moved)[:, 0]
    torch.testing.assert_close(z.T.cov(), noise.covariance[0], rtol=0.1, atol=0.05 * noise.covariance[0].diagonal().max().item())


def test_conditions_and_damping():
    net, x = mlp()
    F = measured(net, x, "gram")
    damped = ff.input_fisher(net, x, F, beta=0.1, damping=0.1 / 0.5**2, layer="1")
    prior = ff.input_fisher(net, x, F, beta=0.1, prior_scale=0.5, layer="1")
    torch.testing.assert_close(damped.factor, prior.factor, rtol=1e-12, atol=1e-12)
    assert "prior scale uninformative (damping 0.4), k = 26 weights, N = 7 samples, Fisher exact, gram" in str(damped)
    assert "4 units about x, exact formulas, terms mean, layer '1', beta = 0.1, prior scale 0.5 (damping 0.4)" in str(prior)
    printed = ff.input_fisher(net, x, F, beta=0.1, variant="paper").conditions()
    assert "paper formulas, terms mean, output, beta = 0.1, no prior, k = 26 weights" in printed
    assert str(ff.activation_noise(net, x, F, beta=0.1, prior_scale=0.5)).startswith("mean noise variance ")


def test_prior_by_layer_and_fitted():
    net, x = mlp()
    F = measured(net, x, "kfac")
    info = ff.information_in_weights(F, net, prior_scale="fit", beta=0.01)
    scales = {name: layer.prior_scale for name, layer in info.by_layer().items()}
    fit, given = (ff.input_fisher(net, x, F, beta=0.01, prior_scale=p) for p in ("fit", scales))
    torch.testing.assert_close(fit.factor, given.factor)
    assert "prior scale fitted by layer (damping" in fit.conditions() and "prior scale given by layer" in given.conditions()


def test_result_of_many_inputs_never_squares_them():
    net = nn.Sequential(nn.Linear(3000, 2), nn.Tanh()).double()
    x = torch.randn(2, 3000, dtype=DOUBLE)
    got = ff.input_fisher(net, x, ff.DiagonalFisher({n: torch.ones_like(p) for n, p in net.named_parameters()}, 7), beta=0.1)
    assert got.eigenvalues().shape == (2, 2)
    torch.testing.assert_close(got.eigenvalues().sum(1), got.trace())
    torch.testing.assert_close(got.logdet(), torch.linalg.slogdet(got.factor @ got.factor.mT)[1])
    assert got.rank().tolist() == [2, 2]
    with pytest.raises(ValueError, match="dim must be <= 1024, got 3000"):
        got.matrix()


def test_spectrum_is_of_the_matrix():
    net, x = mlp()
    F = measured(net, x, "ekfac")
    for options in ({}, {"terms": "both"}, {"layer": "1"}):
        got = ff.input_fisher(net, x, F, beta=0.1, prior_scale=0.5, **options)
        values = torch.linalg.eigvalsh(got.matrix()).flip(1)
        torch.testing.assert_close(got.eigenvalues(), values[:, : got.eigenvalues().shape[1]], rtol=1e-6, atol=1e-9)
        assert got.mean_trace == pytest.approx(values.sum(1).mean().item())
    assert got.eigenvalues().shape == (7, 3) and got.num_units == 4


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_rank_counts_what_is_not_rounding(dtype):
    # Of three units of a linear layer one is the sum of the others, and has noise of its own.
    net, x = nn.Linear(7, 3).to(dtype), torch.randn(4, 7, dtype=dtype)
    with torch.no_grad():
        net.weight[2] = net.weight[0] + net.weight[1]
    F = ff.DiagonalFisher({name: torch.ones_like(p) for name, p in net.named_parameters()}, 7)
    got = ff.input_fisher(net, x, F, beta=0.1)
    assert got.rank().tolist() == [2] * 4
    top = got.eigenvalues()[:, :2]
    torch.testing.assert_close(got.logdet(), top.log().sum(1))


def test_along_pulls_back():
    net, x = mlp()
    F = measured(net, x)
    plain = ff.input_fisher(net, x, F, beta=0.1, prior_scale=0.5, terms="both").matrix()
    along = {"a": torch.randn_like(x), "scale": lambda x, amount: x * torch.exp(amount)}
    got = ff.input_fisher(net, x, F, beta=0.1, prior_scale=0.5, terms="both", along=along)
    T = torch.stack([along["a"], x], 1)
    torch.testing.assert_close(got.matrix(), T @ plain @ T.mT)
    assert "about a, scale," in got.conditions()


def test_dead_units_count_as_nothing():
    net, x = mlp()
    net[1] = nn.ReLU()
    with torch.no_grad():
        net[0].bias[1] = -1e3
    F = measured(net, x, "kfac")
    options = {"beta": 0.1, "prior_scale": 0.5, "layer": "1", "terms": "both"}
    got, alive = ff.input_fisher(net, x, F, **options), ff.input_fisher(net, x, F, units=[0, 2, 3], **options)
    torch.testing.assert_close(got.matrix(), alive.matrix())
    assert (got.rank() < 4).all()


def test_tied_weights_outputs_and_float32():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

        def forward(self, x):
            return {"out": self.second(torch.tanh(self.first(x)))}

    torch.manual_seed(0)
    net, x = Tied().double(), torch.randn(4, 3, dtype=DOUBLE)
    F = ff.DiagonalFisher(
        {name: torch.rand_like(p) + 0.1 for name, p in net.named_parameters()}, 7, aliases={"second.weight": "first.weight"}
    )
    got = ff.input_fisher(net, x, F, beta=0.1, prior_scale=0.5, output="out")
    hidden = ff.input_fisher(net, x, F, beta=0.1, prior_scale=0.5, layer="second")
    assert torch.equal(got.factor, hidden.factor)
    J = torch.func.jacrev(lambda w: torch.func.functional_call(net, w, (x[:1],))["out"][0])(dict(net.named_parameters()))
    J = torch.cat([J[name].flatten(1) for name in F.names], 1)
    f = torch.cat([part.flatten() for part in F.diagonal(dtype=DOUBLE).values()])
    S = ff.activation_noise(net, x[:1], F, beta=0.1, prior_scale=0.5, output="out").covariance[0]
    torch.testing.assert_close(S, 0.1 * (J / (f + 0.4)) @ J.T)
    single = ff.input_fisher(net.float(), x.float(), F, beta=0.1, prior_scale=0.5, output="out")
    torch.testing.assert_close(single.matrix(), got.matrix(), rtol=1e-3, atol=1e-3)


def test_model_is_left_alone():
    net, x = mlp()
    before = {name: p.clone() for name, p in net.named_parameters()}
    ff.input_fisher(net, x, measured(net, x), layer="1", beta=0.1, prior_scale=0.5)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in net.named_parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_whitening_keeps_units_of_any_scale():
    torch.manual_seed(0)
    root = torch.randn(4, 4, dtype=DOUBLE)
    scales = torch.tensor([1e-150, 1.0, 1e30, 1e100], dtype=DOUBLE)
    S = root @ root.T
    white = Whitening.of(scales[:, None] * S * scales, DOUBLE)
    assert white.rank == 4
    assert white.logdet == pytest.approx(torch.logdet(S).item() + 2 * scales.log().sum().item(), rel=1e-12)
    half = white.matrix * scales
    torch.testing.assert_close(half @ S @ half.T, torch.eye(4, dtype=DOUBLE))


def test_infinite_information_is_refused():
    # More units than weights: some directions of z have no noise, and x moves z along them.
    net, x = nn.Sequential(nn.Conv1d(1, 1, 2, bias=False)).double(), torch.randn(3, 1, 9, dtype=DOUBLE)
    F = ff.DiagonalFisher({"0.weight": torch.ones(1, 1, 2, dtype=DOUBLE)}, 7)
    with pytest.raises(ValueError, match="got 8 units and noise of rank 2: the information is infinite; choose fewer"):
        ff.input_fisher(net, x, F, beta=0.1)
    assert ff.input_fisher(net, x, F, beta=0.1, units=[0, 5]).mean_trace > 0
    # A unit that moves with x and has no noise at all.
    half = ff.DiagonalFisher({"0.bias": torch.ones(2, dtype=DOUBLE)}, 7)
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double()
    with pytest.raises(ValueError, match="noise of rank 0"):
        ff.input_fisher(net, torch.randn(1, 2, dtype=DOUBLE), ff.DiagonalFisher({"1.bias": half.diagonal()["0.bias"]}, 7), beta=0.1, layer="0")  # fmt: skip


def test_infinite_information_in_the_covariance_is_refused():
    # z = ((w - 1) x, w) at w = 1, x = 0: the first unit has no noise and no slope, but its noise has one; z_0 / (z_1 - 1) is x.
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1, dtype=DOUBLE))

        def forward(self, x):
            return torch.cat([(self.w - 1) * x, self.w.expand_as(x)], 1)

    net, x, F = Pair(), torch.zeros(1, 1, dtype=DOUBLE), ff.DiagonalFisher({"w": torch.ones(1)}, 7)
    assert ff.input_fisher(net, x, F, beta=0.1).mean_trace == 0
    with pytest.raises(ValueError, match="noise of rank 1: the information is infinite"):
        ff.input_fisher(net, x, F, beta=0.1, terms="both")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"variant": "other"}, "variant must be one of"),
        ({"terms": "all"}, "terms must be one of"),
        ({"terms": "both", "variant": "paper"}, "terms must be one of"),
        ({"variant": "paper", "prior_scale": 1.0}, "prior_scale and damping must be None as printed"),
        ({"variant": "paper", "damping": 1.0}, "prior_scale and damping must be None as printed"),
        ({"beta": 0.0}, "beta must be a finite number > 0"),
        ({"beta": math.nan}, "beta must be a finite number > 0"),
        ({"damping": -1.0}, "damping must be a finite number >= 0"),
        ({"damping": math.inf}, "damping must be a finite number >= 0"),
        ({"damping": 1.0, "prior_scale": 1.0}, "damping must be None with a prior_scale"),
        ({"prior_scale": -1.0}, "prior_scale must be a finite number > 0"),
        ({"prior_scale": math.inf}, "prior_scale must be finite"),
        ({"layer": "nowhere"}, "layer must be None or the name of a submodule, got 'nowhere'; there are"),
        ({"units": []}, "units must be distinct indices"),
        ({"units": [0, 0]}, "units must be distinct indices"),
        ({"units": [-1]}, "units must be distinct indices"),
        ({"units": [0.5]}, "units must be distinct indices"),
        ({"units": [2]}, "units must be below dim z = 2, got 2"),
        ({"along": {}}, "along must be"),
        ({"along": {"a": torch.zeros(2)}}, r"along\['a'\] must be, or give, a tensor \(7, 3\) like x, got \(2,\)"),
        ({"along": {"a": 3}}, "got int"),
        ({"along": {"a": torch.full((7, 3), math.nan)}}, r"along\['a'\] must be finite"),
        ({"x": torch.zeros(7, 3, dtype=torch.long)}, "x must be a floating tensor"),
        ({"x": torch.zeros(0, 3)}, "x must be a floating tensor"),
        ({"x": [1.0]}, "x must be a floating tensor .* got list"),
        ({"x": torch.full((7, 3), math.inf, dtype=DOUBLE)}, "x must be finite, got 21"),
        (
            {"F": ff.DiagonalFisher({"other": torch.ones(1)}, 7)},
            r"model must hold every parameter of F, got none for \['other'\]",
        ),
    ],
)
def test_refuses(options, message):
    net, x = mlp()
    given = {"F": measured(net, x), "x": x, "beta": 0.1} | options
    with pytest.raises(ValueError, match=message):
        ff.input_fisher(net, given.pop("x"), given.pop("F"), **given)


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac", "gram"])
def test_singular_fisher_needs_a_prior(structure):
    net, x = mlp()
    x[:, 2] = 0  # an input that is never seen
    F = measured(net, x, structure)
    with pytest.raises(ValueError, match=r"F must be regular without a prior, got zero eigenvalues in .*; give prior_scale"):
        ff.activation_noise(net, x, F, beta=0.1)
    assert ff.activation_noise(net, x, F, beta=0.1, damping=1e-3).covariance.isfinite().all()


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
def test_what_is_zero_but_for_rounding_is_no_matter_of_units(structure):
    """Inputs 1e9 times as small have an eigenvalue 1e18 times as small, and weights 1e9 times as loose: the noise is the same."""
    small = torch.tensor([1.0, 1e-9], dtype=DOUBLE)
    x = torch.randn(20, 2, dtype=DOUBLE)
    noises = []
    for inputs in (x, x * small):
        net, F = linear(inputs, structure=structure)
        noises.append(ff.activation_noise(net, inputs, F, beta=0.1).covariance)
    torch.testing.assert_close(*noises)
    net, F = linear(x[:, :1] * torch.ones(2, dtype=DOUBLE), structure=structure)
    if structure != "diagonal":  # which does not see that the inputs are one
        with pytest.raises(ValueError, match=r"F must be regular without a prior, got zero eigenvalues in \['weight'\]"):
            ff.activation_noise(net, x, F, beta=0.1)


def test_a_gram_that_is_regular_needs_a_prior_all_the_same():
    net, F = linear(x := torch.randn(20, 2, dtype=DOUBLE), structure="gram")
    message = r"activation_noise: F must be solved without damping .* got structure 'gram' .*; give prior_scale, or damping > 0"
    with pytest.raises(ValueError, match=message):
        ff.activation_noise(net, x, F, beta=0.1)


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@HALVES
@pytest.mark.parametrize("dim, hidden, D", [(40, 2, 8), (300, 12, 40), (784, 3, 32), (784, 32, 10)])
def test_rank_and_determinant_in_16_bits(dtype, dim, hidden, D):
    """min(hidden, D) directions of the input pass the layers; what rounding adds to the others is none."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(dim, hidden), nn.Linear(hidden, D)), torch.randn(3, dim) / dim**0.5
    got, exact = (
        ff.input_fisher(one, x.to(to), ff.DiagonalFisher({n: torch.ones_like(p) for n, p in one.named_parameters()}, 7), beta=0.1)
        for one, to in ((copy.deepcopy(net).to(dtype), dtype), (copy.deepcopy(net).double(), DOUBLE))
    )
    assert got.rank().tolist() == exact.rank().tolist() == [min(hidden, D)] * 3
    torch.testing.assert_close(got.logdet(), exact.logdet(), rtol=0, atol=20 * torch.finfo(dtype).eps)


@HALVES
def test_in_16_bits_information_without_noise_is_as_infinite(dtype):
    """The first input is multiplied by a weight, the second is not; z is both of them, turned."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))
            self.register_buffer("turn", torch.tensor([[0.8, -0.6], [0.6, 0.8]]))

        def forward(self, x):
            return torch.stack([self.w * x[:, 0], x[:, 1]], 1) @ self.turn.T

    net, x = Turned().to(dtype), torch.randn(5, 2, dtype=dtype)
    with pytest.raises(ValueError, match="2 units and noise of rank 1: the information is infinite"):
        ff.input_fisher(net, x, ff.DiagonalFisher({"w": torch.ones(1)}, 7), beta=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, DOUBLE])
@pytest.mark.parametrize("variant", ["exact", "paper"])
def test_rank_is_no_matter_of_units(dtype, variant):
    """Of nuisances ``theta / s`` the Fisher is s^2 times as small, its determinant too, and its rank the same."""
    net, x = mlp()
    net, x = net.to(dtype), x[:4].to(dtype)
    F = ff.DiagonalFisher({name: torch.ones_like(p) for name, p in net.named_parameters()}, 7)
    a, b, s = torch.randn_like(x), torch.randn_like(x), 2.0**-30
    one, other = (ff.input_fisher(net, x, F, beta=0.1, variant=variant, along={"a": a, "b": b * scale}) for scale in (1.0, s))
    assert one.rank().tolist() == other.rank().tolist() == [2] * 4
    torch.testing.assert_close(
        other.logdet(), one.logdet() + 2 * math.log(s), rtol=1e-3 if dtype == torch.bfloat16 else 1e-6, atol=0.02
    )
    # Along what moves z by rounding only, z tells nothing, small as every entry of it may be.
    G = torch.stack([torch.func.jacrev(net)(one) for one in x]).double()
    unseen = torch.linalg.svd(G)[2][:, 2].to(dtype)
    assert ff.input_fisher(net, x, F, beta=0.1, variant=variant, along={"a": a, "b": unseen * s}).rank().tolist() == [1] * 4


def test_the_covariance_tells_more_numbers_than_there_are_units():
    """z = w x of two numbers, ``w ~ N(w, S)``: by the mean z tells w x, by its variance x^T S x."""
    net, x = nn.Linear(2, 1, bias=False).double(), torch.tensor([[0.3, 0.9]], dtype=DOUBLE)
    F = ff.DiagonalFisher({"weight": torch.tensor([[1.0, 4.0]])}, 7)
    got = ff.input_fisher(net, x, F, beta=0.5, terms="both")
    values = torch.linalg.eigvalsh(got.matrix()).flip(1)
    torch.testing.assert_close(got.eigenvalues(), values)
    assert got.rank().tolist() == [2]
    torch.testing.assert_close(got.logdet(), values.log().sum(1))
    assert ff.effective_information(net, x, F, method="spectrum", beta=0.5, terms="both", entropy=2.0).nats == pytest.approx(
        2 - math.log(2 * math.pi * math.e) + values.log().sum().item() / 2
    )


def test_fitted_prior_without_distance():
    net, x = mlp()
    with torch.no_grad():
        net[2].weight.zero_(), net[2].bias.zero_()
    with pytest.raises(ValueError, match=r"a fitted prior_scale must be > 0 and finite, got others for"):
        ff.activation_noise(net, x, measured(net, x), beta=0.1, prior_scale="fit")


def test_fitted_prior_without_curvature():
    net, x = mlp()
    F = ff.DiagonalFisher({name: torch.full_like(p, float(name[0] == "0")) for name, p in net.named_parameters()}, 7)
    with pytest.raises(ValueError, match=r"a fitted prior_scale must be > 0 and finite, got others for \['2.bias', '2.weight'\]"):
        ff.activation_noise(net, x, F, beta=0.1, prior_scale="fit")


def test_refuses_train_mode_layers_and_sizes(monkeypatch):
    net, x = mlp()
    F = measured(net, x)
    noisy = nn.Sequential(*net, nn.Dropout()).train()
    with pytest.raises(ValueError, match="dropout and batch statistics must be off"):
        ff.activation_noise(noisy, x, F, beta=0.1)

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.pair = nn.Linear(3, 2).double(), nn.Linear(3, 2).double(), nn.LSTM(2, 2).double()

        def forward(self, x):
            return self.pair(self.used(x))[0]

    odd = Unused()
    ones = ff.DiagonalFisher({name: torch.ones_like(p) for name, p in odd.named_parameters()}, 7)
    with pytest.raises(ValueError, match=r"layer 'unused' must return one tensor, once in a forward pass, got \[\]"):
        ff.activation_noise(odd, x, ones, layer="unused", beta=0.1)
    with pytest.raises(ValueError, match=r"layer 'pair' must return one tensor, .* got \['tuple'\]"):
        ff.activation_noise(odd, x, ones, layer="pair", beta=0.1)
    with torch.no_grad():
        net[2].bias[0] = math.nan
    with pytest.raises(ValueError, match="the activation must be finite"):
        ff.activation_noise(net, x, F, beta=0.1)
    monkeypatch.setattr(_activation, "MAX_NUMBERS", 2 * 26 - 1)
    with pytest.raises(ValueError, match="units times weights must be <= 51, got 2 x 26; choose fewer with units="):
        ff.activation_noise(net, x, F, beta=0.1)


def test_refuses_a_large_covariance_term(monkeypatch):
    net, F = nn.Linear(3, 2).double(), ff.DiagonalFisher({"bias": torch.ones(2)}, 7)
    monkeypatch.setattr(_activation, "MAX_NUMBERS", 11)
    ff.input_fisher(net, torch.randn(1, 3, dtype=DOUBLE), F, beta=0.1)
    with pytest.raises(ValueError, match=r"units\^2 times dim x must be <= 11 for both terms, got 2\^2 x 3; choose fewer"):
        ff.input_fisher(net, torch.randn(1, 3, dtype=DOUBLE), F, beta=0.1, terms="both")


def test_an_activation_is_what_its_layer_returned_whatever_is_done_to_it_in_place():
    first, last = nn.Linear(4, 3).double(), nn.Linear(3, 3).double()
    plain, in_place = nn.Sequential(first, nn.ReLU(), last), nn.Sequential(first, nn.ReLU(inplace=True), last)
    x, options = torch.randn(5, 4).double(), {"layer": "0", "beta": 0.1, "prior_scale": 1.0}
    F = measured(plain, x)
    one, other = (ff.input_fisher(net, x, F, **options).trace() for net in (plain, in_place))
    assert torch.equal(one, other) and bool((one > 0).all())
    one, other = (ff.activation_noise(net, x, F, **options) for net in (plain, in_place))
    assert torch.equal(one.mean, other.mean) and torch.equal(one.covariance, other.covariance) and bool((one.mean < 0).any())


class Shifted(nn.Module):
    """z = A x + C b."""

    def __init__(self, A, C):
        super().__init__()
        self.b = nn.Parameter(torch.zeros(len(C[0]), dtype=DOUBLE))
        self.A, self.C = torch.tensor(A, dtype=DOUBLE), torch.tensor(C, dtype=DOUBLE)

    def forward(self, x):
        return x @ self.A.T + self.b @ self.C.T


def test_little_information_is_not_rounding():
    """Eigenvalues 1 and 1e-20: squares of singular values that float64 tells from zero."""
    net = Shifted([[1.0, 0.0], [0.0, 1e-10]], [[1.0, 0.0], [0.0, 1.0]])
    found = ff.input_fisher(net, torch.ones(1, 2, dtype=DOUBLE), ff.DiagonalFisher({"b": torch.ones(2)}, num_samples=1), beta=1.0)
    assert found.rank().tolist() == [2]
    assert found.logdet().item() == pytest.approx(math.log(1e-20))


@pytest.mark.parametrize("scale", [1.0, 1e-7])
def test_a_little_motion_without_noise_is_infinite_information(scale):
    """One noise moves both units alike; their difference moves with x, by a hundredth, and has none."""
    net = Shifted([[scale, 0.0], [scale, 0.01 * scale]], [[1.0], [1.0]])
    F = ff.DiagonalFisher({"b": torch.ones(1)}, num_samples=1)
    with pytest.raises(ValueError, match="noise of rank 1: the information is infinite"):
        ff.input_fisher(net, torch.ones(1, 2, dtype=DOUBLE), F, beta=1.0)
