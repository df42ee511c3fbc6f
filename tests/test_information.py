# SPDX-License-Identifier: Apache-2.0
"""The information in the weights: the paper's test vectors, closed forms, theorems, and what it refuses."""

import math

import mpmath
import numpy as np
import pytest
import torch
from torch import nn

import fisherfast as ff
from fisherfast.fisher import DiagonalFisher, FisherWarning, Spectrum
from fisherfast.information import _prior, _series, information_in_weights
from fisherfast.ops import _log1p

# science.md 1.11, first three lines: H = diag(2, .3, .004, 0), w = (1, -.5, .25, 0), lambda = 1, beta = .01.
H = torch.tensor([2, 0.3, 0.004, 0], dtype=torch.float64)
W = torch.tensor([1, -0.5, 0.25, 0], dtype=torch.float64)


def fisher(**diagonal):
    return DiagonalFisher({name.replace("__", "."): tensor for name, tensor in diagonal.items()}, num_samples=7)


def vectors(variant="exact", **options):
    return information_in_weights(fisher(w=H), {"w": W}, **({"prior_scale": 1.0, "beta": 0.01} | options), variant=variant)


def digits(values, count):
    return " ".join(f"{value:.{count}f}" for value in values.tolist())


def spectrum(*factors, zeros=0):
    return Spectrum("", ("w",), factors, zeros)


def two_layers(seed=0):
    """A network with unequal layers, one bias at zero, and a Fisher over twelve orders of magnitude."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    diagonal = {name: 10 ** (12 * torch.rand_like(p) - 10) for name, p in net.named_parameters()}
    return net, DiagonalFisher(diagonal, num_samples=11)


def gaussian_kl(mean, variance, center, scale):
    """KL(N(mean, diag variance) || N(center, scale^2 I)), from the density."""
    return 0.5 * ((variance + (mean - center) ** 2) / scale**2 - 1 - torch.log(variance / scale**2)).sum().item()


def test_cost_matches_mpmath():
    s = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-30, 30, 2003, dtype=torch.float64)])
    near_threshold = _log1p.SMALL / (1 - _log1p.SMALL) * (1 + torch.linspace(-1e-3, 1e-3, 101, dtype=torch.float64))
    s = torch.cat([s, near_threshold])
    with mpmath.workdps(80):
        for value, got in zip(s.tolist(), _log1p.cost(s).tolist(), strict=True):
            exact = mpmath.log1p(mpmath.mpf(value)) - mpmath.mpf(value) / (1 + mpmath.mpf(value))
            assert abs(got - exact) <= 1e-13 * exact


def test_sum_over_chunks(monkeypatch):
    f = torch.rand(3001, dtype=torch.float64)
    whole = [_log1p.cost(3 * f).sum().item(), _log1p.share(3 * f).sum().item()]
    monkeypatch.setattr(_log1p, "CHUNK", 97)
    assert _series.sum_over(spectrum(f), 3.0, _log1p.cost, _log1p.share) == pytest.approx(whole, rel=1e-13)
    assert _series.squared_distance(f, None) == pytest.approx(f.square().sum().item(), rel=1e-13)
    assert _series.squared_distance(f, torch.ones_like(f)) == pytest.approx((f - 1).square().sum().item(), rel=1e-13)


def test_sum_over_kronecker_factors(monkeypatch):
    monkeypatch.setattr(_log1p, "CHUNK", 11)
    b, a = torch.rand(5, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    for factors, product in (((b, a), torch.outer(b, a)), ((b, a, b), torch.einsum("i,j,k->ijk", b, a, b))):
        got = _series.sum_over(spectrum(*factors, zeros=3), 2.0, _log1p.cost)
        assert got == pytest.approx([_log1p.cost(2 * product).sum().item()], rel=1e-13)


def test_exact_reproduces_the_vectors():
    info = vectors()
    assert f"{info.nats:.10f}" == f"{info.kl:.10f}" == "4.0688916262"
    assert f"{info.lagrangian_rise:.10f}" == "0.0519313217"
    assert digits(_log1p.cost(H / 0.01) / 2, 5) == "2.15414 1.23312 0.02538 0.00000"
    assert digits(info.posterior_variance()["w"], 8) == "0.00497512 0.03225806 0.71428571 1.00000000"


def test_paper_reproduces_the_vectors():
    info = vectors("paper")
    assert f"{info.nats:.10f}" == "2.7897823601"
    assert f"{info.kl:.10f}" == "4.7897823601"
    assert f"{info.lagrangian_rise:.10f}" == "0.0539617167"
    assert digits(info.posterior_variance()["w"], 8) == "0.00249377 0.01639344 0.55555556 1.00000000"


def test_paper_is_eq_8_as_printed():
    half = 0.01 / 2
    sigma = half / (H + half)
    printed = 0.5 * torch.log(H + half).sum() + 4 / 2 * math.log(1 / half) - 4 + 0.5 * (W.square().sum() + sigma.sum())
    assert vectors("paper").nats == pytest.approx(printed.item(), rel=1e-13)


@pytest.mark.parametrize("variant", ["exact", "paper"])
def test_kl_is_the_divergence_of_its_gaussians(variant):
    net, F = two_layers()
    scales = {"0": 0.3, "2": 0.05}
    info = information_in_weights(F, net, prior_scale=scales, beta=1e-3, variant=variant)
    variance, center = info.posterior_variance(), torch.zeros(1)
    kl = sum(gaussian_kl(p.detach().double(), variance[n], center, scales[n[0]]) for n, p in net.named_parameters())
    assert info.kl == pytest.approx(kl, rel=1e-12)
    rise = sum(0.5 * (variance[n] * f.double()).sum().item() for n, f in F.diagonal().items()) + 1e-3 * info.kl
    assert info.lagrangian_rise == pytest.approx(rise, rel=1e-12)


def test_exact_lagrangian_is_the_gibbs_free_energy():
    # For a quadratic loss around w the best Q of any family is Gaussian, and the minimum is known in closed form.
    beta, scale = 0.03, 0.7
    info = vectors(beta=beta, prior_scale=scale, loss=0.2)
    s = scale**2 * H / beta
    closed = beta * W.square().sum() / (2 * scale**2) + beta / 2 * torch.log1p(s).sum()
    assert info.lagrangian_rise == pytest.approx(closed.item(), rel=1e-13)
    assert info.complexity == 0.2 + info.lagrangian_rise


def test_information_is_the_slope_of_the_lagrangian():
    # Envelope identity: d/d beta of the optimal Lagrangian is the KL.
    beta, step = 0.01, 1e-6
    rise = [vectors(beta=beta + d).lagrangian_rise for d in (-step, step)]
    assert (rise[1] - rise[0]) / (2 * step) == pytest.approx(vectors().kl, rel=1e-7)


def test_paper_kl_is_exact_at_half_beta():
    net, F = two_layers()
    paper = information_in_weights(F, net, prior_scale=0.1, beta=1e-3, variant="paper")
    exact = information_in_weights(F, net, prior_scale=0.1, beta=5e-4)
    assert paper.kl == exact.kl
    assert paper.kl - paper.nats == pytest.approx(paper.num_parameters / 2, rel=1e-12)


def test_linear_gaussian_model_matches_closed_form():
    # y ~ N(X w, 1): F = X^T X / N is the Hessian of the mean loss, so at beta = 1/N Sigma is the Bayesian posterior's covariance.
    torch.manual_seed(0)
    X = torch.linalg.qr(torch.randn(23, 5, dtype=torch.float64))[0] * torch.tensor([1.0, 2, 3, 5, 7], dtype=torch.float64)
    w, N, scale = torch.randn(5, dtype=torch.float64), 23, 0.4
    info = information_in_weights(fisher(w=(X.T @ X).diagonal() / N), {"w": w}, prior_scale=scale, beta=1 / N)
    posterior = torch.distributions.MultivariateNormal(w, precision_matrix=X.T @ X + torch.eye(5, dtype=torch.float64) / scale**2)
    prior = torch.distributions.MultivariateNormal(torch.zeros_like(w), scale**2 * torch.eye(5, dtype=torch.float64))
    assert info.nats == pytest.approx(torch.distributions.kl_divergence(posterior, prior).item(), rel=1e-12)


def test_layers_add_up():
    net, F = two_layers()
    info = information_in_weights(F, net, prior_scale=0.1, beta=1e-3)
    layers = info.by_layer()
    assert list(layers) == ["0", "2"]
    assert [layer.num_parameters for layer in layers.values()] == [42, 24]
    assert sum(layer.nats for layer in layers.values()) == pytest.approx(info.nats, rel=1e-14)
    assert sum(layer.share for layer in layers.values()) == pytest.approx(1)
    assert info.bits == info.nats / math.log(2)
    total = info.total
    assert (total.num_parameters, total.nats, total.kl, total.trace) == (info.num_parameters, info.nats, info.kl, info.trace)
    assert (total.bits, total.bits_per_parameter) == (info.bits, info.bits / 66)
    assert info.loss_rise == info.temperature / 2 * total.effective_dimension
    assert total.squared_distance == pytest.approx(sum(p.square().sum().item() for p in net.parameters()), rel=1e-6)
    assert (total.share, total.prior_scale) == (pytest.approx(1), 0.1)
    assert info.trace == pytest.approx(float(F.trace()), rel=1e-6)
    for name, layer in layers.items():
        alone = DiagonalFisher({n: f for n, f in F.diagonal().items() if n.startswith(name)}, num_samples=11)
        weights = {n: p for n, p in net.named_parameters() if n.startswith(name)}
        assert information_in_weights(alone, weights, prior_scale=0.1, beta=1e-3).nats == pytest.approx(layer.nats, rel=1e-14)


def test_center_moves_the_prior():
    net, F = two_layers()
    start, _ = two_layers(seed=1)
    info = information_in_weights(F, net, prior_scale=0.1, beta=1e-3, center=start)
    moved = {n: p.detach().double() - dict(start.named_parameters())[n].detach().double() for n, p in net.named_parameters()}
    assert info.nats == information_in_weights(F, moved, prior_scale=0.1, beta=1e-3).nats
    assert info.nats == information_in_weights(F, net, prior_scale=0.1, beta=1e-3, center=start.state_dict()).nats


def test_prior_scale_by_name_prefers_the_parameter():
    net, F = two_layers()
    info = information_in_weights(F, net, prior_scale={"0": 0.1, "2": 0.2, "2.bias": 0.3}, beta=1e-3)
    assert info.prior_scales == {"0.weight": 0.1, "0.bias": 0.1, "2.weight": 0.2, "2.bias": 0.3}
    assert [layer.prior_scale for layer in info.by_layer().values()] == [0.1, None]
    assert info.total.prior_scale is None


def test_equal_prior_scales_by_layer_change_nothing():
    net, F = two_layers()
    one, many = (information_in_weights(F, net, prior_scale=p, beta=1e-3).nats for p in (0.1, {"0": 0.1, "2": 0.1}))
    assert one == many


@pytest.mark.parametrize("variant", ["exact", "paper"])
@pytest.mark.parametrize("beta", [1e-9, 1e-3, 10.0])
def test_fit_is_the_fixed_point(variant, beta):
    net, F = two_layers()
    info = information_in_weights(F, net, prior_scale="fit", beta=beta, variant=variant)
    variance = info.posterior_variance()
    for name, layer in info.by_layer().items():
        trace = sum(v.sum().item() for n, v in variance.items() if n.startswith(name))
        assert layer.prior_scale**2 == pytest.approx((layer.squared_distance + trace) / layer.num_parameters, rel=1e-10)


def test_fit_minimises_the_lagrangian():
    net, F = two_layers()
    best = information_in_weights(F, net, prior_scale="fit", beta=1e-3)
    for layer in ("0", "2"):
        for factor in (0.99, 1.01):
            scales = {name: found.prior_scale * (factor if name == layer else 1) for name, found in best.by_layer().items()}
            assert information_in_weights(F, net, prior_scale=scales, beta=1e-3).lagrangian_rise > best.lagrangian_rise


def test_fit_limits_carry_no_information():
    at_center = information_in_weights(fisher(w=H), {"w": W}, prior_scale="fit", beta=0.01, center={"w": W})
    assert (at_center.nats, at_center.prior_scales["w"]) == (0, 0)
    assert at_center.posterior_variance()["w"].tolist() == [0, 0, 0, 0]
    insensitive = information_in_weights(fisher(w=torch.zeros(4)), {"w": W}, prior_scale="fit", beta=0.01)
    assert (insensitive.nats, insensitive.prior_scales["w"]) == (0, math.inf)
    assert insensitive.posterior_variance()["w"].tolist() == [math.inf] * 4


def test_fit_agrees_with_the_plain_iteration():
    f, distance, temperature = H[:2], 1.25, 0.01
    square = 1.0
    for _ in range(500):
        square = (distance + (square / (1 + square * f / temperature)).sum().item()) / 2
    assert _prior.fitted("fit", [spectrum(f)], distance, temperature) ** 2 == pytest.approx(square, rel=1e-12)


def test_low_precision_weights_are_read_in_float64():
    f, w = torch.full((3,), 1e-6), torch.full((3,), 300.0, dtype=torch.float16)
    info = information_in_weights(fisher(w=f), {"w": w}, prior_scale=1.0, beta=1.0)
    assert info.by_layer()[""].squared_distance == 3 * 300.0**2
    assert info.nats - 3 * 300.0**2 / 2 >= 0


def test_scalar_and_empty_parameters():
    weights = {"a": torch.tensor(1.0), "b": torch.zeros(0, 3)}
    info = information_in_weights(fisher(a=torch.tensor(2.0), b=torch.zeros(0, 3)), weights, prior_scale=1.0, beta=0.01)
    assert info.num_parameters == 1
    assert info.nats == 0.5 * (1 + _log1p.cost(torch.tensor(200.0, dtype=torch.float64)).item())


def test_infinite_prior_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"prior_scale must be finite, got inf.*logdet"):
        vectors(prior_scale=math.inf)


@pytest.mark.parametrize("bad", [0, -1.0, math.nan])
def test_rejects_prior_scale(bad):
    with pytest.raises(ValueError, match="prior_scale must be a finite number > 0"):
        vectors(prior_scale=bad)
    with pytest.raises(ValueError, match=r"prior_scale\['w'\] must be a finite number > 0"):
        vectors(prior_scale={"w": bad})


@pytest.mark.parametrize("bad", [1e-200, 1e200])
def test_rejects_a_prior_scale_whose_square_is_no_number(bad):
    with pytest.raises(ValueError, match=r"prior_scale must be above 1e-150 and below 1e\+150, which have squares, got"):
        vectors(prior_scale=bad)


def test_rejects_a_price_so_low_that_its_ratio_to_the_prior_is_no_number():
    with pytest.raises(ValueError, match=r"prior_scale\^2 / beta must be finite, got beta = 1e-100 with 1e\+140"):
        vectors(prior_scale=1e140, beta=1e-100)


def test_an_eigenvalue_too_large_for_the_prior_is_named():
    """lambda^2 f / beta overflows, though lambda^2 / beta does not: nan would be no measure."""
    F = DiagonalFisher({"w": torch.tensor([1e20, 1.0, 0.0], dtype=torch.float64)}, 3)
    with pytest.raises(ValueError, match=r"prior_scale\^2 f / beta must be finite for every eigenvalue f, got others in \['w'\]"):
        information_in_weights(F, {"w": torch.zeros(3)}, prior_scale=1e140, beta=1e-9)
    with pytest.raises(ValueError, match=r"prior_scale\^2 / beta must be finite, got beta = 5e-324"):
        information_in_weights(F, {"w": torch.zeros(3)}, prior_scale=1e-10, beta=5e-324, variant="paper")


def test_tensors_without_axes_are_numbers():
    one = {"prior_scale": 0.1, "beta": 1e-3, "loss": 0.2}
    expected = vectors(**one)
    got = vectors(**{name: torch.tensor(value, dtype=torch.float64) for name, value in one.items()})
    assert got.nats == expected.nats and got.complexity == expected.complexity
    assert all(type(getattr(got, name)) is float for name in one)
    by_name = vectors(prior_scale={"w": torch.tensor(0.1, dtype=torch.float64)})
    assert by_name.prior_scale == {"w": 0.1} and type(by_name.prior_scale["w"]) is float
    with pytest.raises(ValueError, match="beta must be a finite number > 0, got tensor"):
        vectors(beta=torch.ones(1))


@pytest.mark.parametrize("bad", [0, -1e-3, math.inf, math.nan])
def test_rejects_beta(bad):
    with pytest.raises(ValueError, match="beta must be a finite number > 0"):
        vectors(beta=bad)


def test_rejects_choices():
    with pytest.raises(ValueError, match="variant must be one of"):
        vectors("printed")
    with pytest.raises(ValueError, match="prior_scale must be a number, a mapping or 'fit'"):
        vectors(prior_scale="auto")


def test_rejects_prior_scale_names():
    net, F = two_layers()
    with pytest.raises(ValueError, match=r"prior_scale must name layers or parameters of F, got \['1'\]"):
        information_in_weights(F, net, prior_scale={"0": 0.1, "1": 0.1, "2": 0.1}, beta=1e-3)
    with pytest.raises(ValueError, match=r"prior_scale must cover every parameter, got none for \['2.bias', '2.weight'\]"):
        information_in_weights(F, net, prior_scale={"0": 0.1}, beta=1e-3)


def test_rejects_several_prior_scales_in_a_block():
    net = nn.Linear(3, 2)
    F = ff.fisher(net, [(torch.randn(5, 3), None)], structure="kfac", fisher_type="exact", progress=False)
    with pytest.raises(ValueError, match="prior_scale must be one number for a block of F"):
        information_in_weights(F, net, prior_scale={"weight": 1.0, "bias": 2.0}, beta=0.1)


def test_rejects_names_and_shapes():
    net, F = two_layers()
    weights = dict(net.named_parameters())
    with pytest.raises(ValueError, match=r"model must hold every parameter of F, got none for \['0.bias'\]"):
        information_in_weights(F, {n: p for n, p in weights.items() if n != "0.bias"}, prior_scale=1.0, beta=1e-3)
    with pytest.raises(ValueError, match=r"model\['0.bias'\] must be \(7,\) as in F, got \(3,\)"):
        information_in_weights(F, weights | {"0.bias": torch.zeros(3)}, prior_scale=1.0, beta=1e-3)
    with pytest.raises(ValueError, match=r"center\['0.bias'\] must be \(7,\) as in model, got \(3,\)"):
        information_in_weights(F, net, prior_scale=1.0, beta=1e-3, center=weights | {"0.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"center must hold every parameter of F, got none for \['0.bias', '0.weight'"):
        information_in_weights(F, net, prior_scale=1.0, beta=1e-3, center={})
    with pytest.raises(TypeError, match=r"weights must be a network or \{name: tensor\}, got int; pass the module"):
        information_in_weights(F, net, prior_scale=1.0, beta=1e-3, center=0)
    with pytest.raises(ValueError, match=r"F must cover every parameter of model, lacks \['3.weight'\]"):
        information_in_weights(F, weights | {"3.weight": torch.zeros(3)}, prior_scale=1.0, beta=1e-3)
    with pytest.raises(ValueError, match=r"F must cover every parameter of model, lacks \['3.bias', '3.weight'\]"):
        information_in_weights(F, nn.Sequential(*net, nn.Linear(3, 2)), prior_scale=1.0, beta=1e-3)


def test_rejects_weights_that_are_not_finite():
    with pytest.raises(ValueError, match=r"weights must be finite, got NaN or infinity in \['w'\]"):
        information_in_weights(fisher(w=H), {"w": W / 0}, prior_scale=1.0, beta=1e-3)


def test_missing_parameters_are_listed_and_warned_of():
    net, F = two_layers()
    partial = {name: f for name, f in F.diagonal().items() if name != "2.bias"}
    F = DiagonalFisher(partial, num_samples=11, coverage={"2.bias": "missing: no rule"})
    with pytest.warns(FisherWarning, match=r"exclude parameters that the Fisher lacks: \['2.bias'\]") as caught:
        info = information_in_weights(F, net, prior_scale=0.1, beta=1e-3)
    assert caught[0].filename == __file__
    assert info.excluded == ("2.bias",)
    assert info.num_parameters == 63
    assert "2.bias" in str(info)


def test_tied_names_are_covered():
    F = DiagonalFisher({"w": H}, num_samples=7, aliases={"head.w": "w"})
    assert information_in_weights(F, {"w": W, "head.w": W}, prior_scale=1.0, beta=0.01).nats == vectors().nats


def test_interleaved_layers_are_gathered():
    net, F = two_layers()
    mixed = {name: F.diagonal(dtype=torch.float64)[name] for name in ("0.weight", "2.bias", "0.bias", "2.weight")}
    mixed = DiagonalFisher(mixed, num_samples=11)
    one, other = (information_in_weights(f, net, prior_scale="fit", beta=1e-3).by_layer() for f in (F, mixed))
    assert {name: layer.prior_scale for name, layer in one.items()} == pytest.approx({n: x.prior_scale for n, x in other.items()})


def test_frozen_parameters_need_no_fisher():
    net, F = two_layers()
    frozen = nn.Linear(3, 2).requires_grad_(False)
    assert information_in_weights(F, nn.Sequential(*net, frozen), prior_scale=1.0, beta=1e-3).num_parameters == 66


def test_states_its_conditions():
    text = str(vectors(beta=0.01))
    for part in ("4.1 nats", "5.9 bits", "beta = 0.01", "prior scale 1", "k = 4", "N = 7", "exact formulas", "diagonal"):
        assert part in text


def test_plot_writes_a_picture(tmp_path):
    net, F = two_layers()
    figure = information_in_weights(F, net, prior_scale=0.1, beta=1e-3).plot(tmp_path / "information.png")
    assert (tmp_path / "information.png").read_bytes().startswith(b"\x89PNG")
    nats, trace = figure.axes
    assert nats.get_xlabel().startswith("nats") and trace.get_xlabel().startswith("trace")
    assert [label.get_text() for label in nats.get_yticklabels()] == ["0", "2"]


def test_numbers_may_be_numpys():
    model = torch.nn.Linear(3, 2)
    F = ff.fisher(model, [(torch.randn(5, 3), None)], progress=False)
    found, plain = (
        ff.information_in_weights(F, model, prior_scale=a, beta=b) for a, b in ((np.float64(0.5), np.float64(0.25)), (0.5, 0.25))
    )
    assert found.nats == plain.nats
    assert ff.information_in_weights(F, model, prior_scale=1, beta=np.float32(0.25)).nats > 0


def test_a_fit_that_no_number_can_be_is_refused():
    F = DiagonalFisher({"w": torch.full((3,), 1e60, dtype=torch.float64)}, num_samples=3)
    with pytest.raises(
        ValueError, match="prior_scale must be a number for a beta this far from the Fisher's eigenvalues, got 'fit'"
    ):
        ff.information_in_weights(F, {"w": torch.full((3,), 1e-25, dtype=torch.float64)}, prior_scale="fit", beta=1e-300)


def test_an_operator_is_no_fisher_to_measure_by():
    """It has products only: each estimator says so, and what to pass."""
    net, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
    O = ff.FisherOperator(net, [(x, None)], "exact")
    options = {"beta": 0.1, "prior_scale": 1.0}
    for name, call in {
        "information_in_weights": lambda: ff.information_in_weights(O, net, **options),
        "effective_dimension": lambda: ff.effective_dimension(O, **options),
        "path_stability": lambda: ff.path_stability(O, net, net, beta=0.1),
        "shannon_from_stability": lambda: ff.shannon_from_stability(O, torch.eye(8)[:2], beta=0.1, entropy=0.0),
        "task_embedding": lambda: ff.task_embedding(O, net),
        "free_energy": lambda: ff.free_energy(O, 1.0, temperature=0.1, damping=0.1),
        "activation_noise": lambda: ff.activation_noise(net, x, O, **options),
        "input_fisher": lambda: ff.input_fisher(net, x, O, **options),
    }.items():
        with pytest.raises(
            TypeError, match=rf"{name}: F must be a Fisher that was measured, got FisherOperator; pass ff\.fisher"
        ):
            call()


X = torch.ones(1, 5)
MEASURES = {
    "information_in_weights": lambda net, F, **options: ff.information_in_weights(F, net, **options),
    "optimal_posterior": lambda net, F, **options: ff.optimal_posterior(F, net, **options),
    "task_complexity": lambda net, F, **options: ff.task_complexity(F, net, loss=0.1, **options),
    "rate_distortion": lambda net, F, beta, **options: ff.rate_distortion(F, net, [beta], loss=0.1, **options),
    "effective_dimension": lambda net, F, **options: ff.effective_dimension(F, **options),
    "free_energy": lambda net, F, beta, **options: ff.free_energy(F, 0.1, temperature=beta, **options),
    "variational_posterior": lambda net, F, **options: ff.variational_posterior(net, [(X, X[0, :1].long())], **options),
    "activation_noise": lambda net, F, **options: ff.activation_noise(net, X, F, **options),
    "input_fisher": lambda net, F, **options: ff.input_fisher(net, X, F, **options),
    "effective_information": lambda net, F, **options: ff.effective_information(net, X, F, method="monte-carlo", **options),
}


@pytest.mark.parametrize("wrong", [{"beta": -1.0}, {"prior_scale": 0.0}, {"prior_scale": {"nowhere": 1.0}}], ids=str)
@pytest.mark.parametrize("name", MEASURES)
def test_errors_name_the_function_that_was_called(name, wrong):
    with pytest.raises(ValueError, match=f"^{name}: "):
        MEASURES[name](*two_layers(), **({"beta": 0.1, "prior_scale": 1.0} | wrong))
