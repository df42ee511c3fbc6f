# SPDX-License-Identifier: Apache-2.0
"""The complexity of a task: the paper's vectors, the evidence of Bayesian linear regression, the Gibbs minimum, K/2 per log N."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fisherfast as ff
from fisherfast.fisher import DiagonalFisher

# science.md 1.11: H = diag(2, .3, .004, 0), w = (1, -.5, .25, 0), lambda = 1, beta = .01.
H = torch.tensor([2, 0.3, 0.004, 0], dtype=torch.float64)
W = torch.tensor([1, -0.5, 0.25, 0], dtype=torch.float64)
LOG_2PI = math.log(2 * math.pi)


def vectors(**options):
    return ff.task_complexity(
        DiagonalFisher({"w": H}, num_samples=7), {"w": W}, **({"prior_scale": 1.0, "beta": 0.01, "loss": 0.2} | options)
    )


def regression(N=20, k=4, scale=0.7):
    """Linear regression with unit noise at its most probable weights, its exact Fisher, and -(1/N) log evidence."""
    X = torch.randn(N, k, dtype=torch.float64)
    y = X @ torch.randn(k, 1, dtype=torch.float64) + torch.randn(N, 1, dtype=torch.float64)
    net = nn.Linear(k, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.linalg.solve(X.mT @ X + torch.eye(k, dtype=torch.float64) / scale**2, X.mT @ y).mT)
    F = ff.fisher(net, [(X, None)], structure="gram", fisher_type="exact", likelihood="gaussian", progress=False)
    marginal = torch.distributions.MultivariateNormal(
        torch.zeros(N, dtype=torch.float64), torch.eye(N, dtype=torch.float64) + scale**2 * X @ X.mT
    )
    return X, y, net, F, scale, -float(marginal.log_prob(y[:, 0])) / N


@pytest.mark.parametrize(
    ("variant", "rise", "nats"), [("exact", "0.0519313217", "4.0688916262"), ("paper", "0.0539617167", "4.7897823601")]
)
def test_reproduces_the_vectors(variant, rise, nats):
    found = vectors(variant=variant)
    assert f"{found.complexity - 0.2:.10f}" == rise
    assert f"{found.nats:.10f}" == nats
    assert found.loss == 0.2 and found.stderr == 0 and found.beta == 0.01
    sigma = ff.optimal_posterior(DiagonalFisher({"w": H}, num_samples=7), {"w": W}, prior_scale=1.0, beta=0.01, variant=variant)
    assert found.expected_loss == pytest.approx(0.2 + 0.5 * float((H * sigma.variance()["w"]).sum()), rel=1e-14)


def test_is_the_printed_closed_form():
    scale, beta = 0.7, 0.03
    closed = 0.2 + beta * W.square().sum() / (2 * scale**2) + beta / 2 * torch.log1p(scale**2 * H / beta).sum()
    assert vectors(prior_scale=scale, beta=beta).complexity == pytest.approx(float(closed), rel=1e-14)


@given(
    st.lists(st.floats(-9, 3), min_size=1, max_size=6),
    st.floats(-8, 2),
    st.sampled_from(["fit", 0.01, 1.0, 30.0]),
    st.sampled_from(["exact", "paper"]),
)
@settings(max_examples=60, deadline=None)
def test_analytic_is_the_sum_of_its_terms(exponents, log_beta, prior_scale, variant):
    f, w, beta = 10 ** torch.tensor(exponents, dtype=torch.float64), torch.ones(len(exponents), dtype=torch.float64), 10**log_beta
    found = ff.task_complexity(
        DiagonalFisher({"w": f}, num_samples=7), {"w": w}, prior_scale=prior_scale, beta=beta, loss=0.0, variant=variant
    )
    scale = found.source.prior_scales["w"]
    t = beta if variant == "exact" else beta / 2
    sigma = t / (f + t / scale**2)
    kl = 0.5 * ((sigma + w**2) / scale**2 - 1 - torch.log(sigma / scale**2)).sum()
    assert found.complexity == pytest.approx(float(0.5 * (f * sigma).sum() + beta * kl), rel=1e-7, abs=1e-12)


def test_at_one_over_n_it_is_the_evidence():
    # Bayesian linear regression: the optimal Q is the exact posterior, and C = -(1/N) log p(y | X).
    X, y, net, F, scale, evidence = regression()
    found = ff.task_complexity(F, net, prior_scale=scale, beta=1 / len(X), data=[(X, y)], likelihood="gaussian")
    assert found.complexity == pytest.approx(evidence, rel=1e-10)
    assert found.loss == pytest.approx(float(((net(X) - y) ** 2).mean().detach() / 2 + LOG_2PI / 2), rel=1e-12)
    measured = ff.task_complexity(
        F, net, prior_scale=scale, beta=1 / len(X), data=[(X, y)], likelihood="gaussian", method="monte-carlo", draws=300
    )
    assert abs(measured.complexity - evidence) < 4.5 * measured.stderr < 0.05
    assert (measured.loss, measured.nats) == (found.loss, found.nats)


def test_gaussian_reaches_the_gibbs_minimum_of_a_quadratic_loss():
    # min over every Q of C is -beta log E_P exp(-L / beta); by quadrature over two weights.
    h, beta, scale = torch.tensor([1.5, 0.1], dtype=torch.float64), 0.2, 0.9
    v = torch.tensor([0.8, -0.4], dtype=torch.float64)  # where the loss is least; Q's mean is the prior-weighted optimum
    w = v * h / (h + beta / scale**2)
    axis = torch.linspace(-9, 9, 2001, dtype=torch.float64)

    def log_integral(h, v):
        log_p = -(axis**2) / (2 * scale**2) - 0.5 * LOG_2PI - math.log(scale) - 0.5 * h * (axis - v) ** 2 / beta
        return torch.logsumexp(log_p, 0) + torch.log(axis[1] - axis[0])

    gibbs = -beta * sum(float(log_integral(*pair)) for pair in zip(h, v, strict=True))
    loss = float((0.5 * h * (w - v) ** 2).sum())
    F = DiagonalFisher({"w": h}, num_samples=1)
    found = ff.task_complexity(F, {"w": w}, prior_scale=scale, beta=beta, loss=loss)
    assert found.complexity == pytest.approx(gibbs, rel=1e-10)
    printed = ff.task_complexity(F, {"w": w}, prior_scale=scale, beta=beta, loss=loss, variant="paper")
    assert printed.complexity > gibbs + 1e-3


def test_no_gaussian_goes_below_the_gibbs_minimum():
    # Logistic regression with two weights: the loss is not quadratic, so the Gaussian pays more, but little.
    X = torch.randn(40, 2, dtype=torch.float64)
    y = (X[:, :1] + torch.randn(40, 1, dtype=torch.float64) > 0).double()
    net, beta, scale = nn.Linear(2, 1, bias=False).double(), 0.05, 1.0
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=100)

    def regularised():
        optimizer.zero_grad()
        rise = beta * net.weight.square().sum() / (2 * scale**2)
        loss = nn.functional.binary_cross_entropy_with_logits(net(X), y) + rise
        loss.backward()
        return loss

    optimizer.step(regularised)
    axis = torch.linspace(-6, 6, 241, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    losses = nn.functional.softplus(-(2 * y.mT - 1) * (grid @ X.mT)).mean(1)
    log_prior = -grid.square().sum(1) / (2 * scale**2) - LOG_2PI - 2 * math.log(scale)
    gibbs = -beta * float(torch.logsumexp(log_prior - losses / beta, 0) + 2 * torch.log(axis[1] - axis[0]))
    F = ff.fisher(net, [(X, None)], structure="gram", fisher_type="exact", likelihood="bernoulli", progress=False)
    found = ff.task_complexity(
        F, net, prior_scale=scale, beta=beta, data=[(X, y)], likelihood="bernoulli", method="monte-carlo", draws=400
    )
    assert gibbs - 4 * found.stderr < found.complexity < gibbs + 0.01
    assert found.stderr < 0.005


def test_regular_model_holds_half_a_nat_a_weight_per_log_sample():
    w = torch.ones(5, dtype=torch.float64)

    def growth(diagonal, N):
        F = DiagonalFisher({"w": torch.tensor(diagonal, dtype=torch.float64)}, num_samples=N)
        low, high = (ff.task_complexity(F, {"w": w}, prior_scale=1.0, beta=1 / n, loss=0.0).nats for n in (N, math.e * N))
        return high - low

    assert growth([3, 1, 0.5, 0.2, 0.1], 10**9) == pytest.approx(5 / 2, rel=1e-6)
    assert growth([3, 1, 0, 0, 0], 10**9) == pytest.approx(2 / 2, rel=1e-6)  # singular: only the directions that the data decide
    assert growth([3, 1, 0.5, 0.2, 0.1], 1) < 5 / 2


def test_measured_complexity_is_that_of_its_posterior():
    X, y, net, F, scale, _ = regression()
    posterior = ff.optimal_posterior(F, net, prior_scale=scale, beta=0.1)
    one = ff.measured_complexity(posterior, net, [(X, y)], "gaussian", draws=7, seed=2)
    other = ff.task_complexity(
        F, net, prior_scale=scale, beta=0.1, data=[(X, y)], likelihood="gaussian", method="monte-carlo", draws=7, seed=2
    )
    assert (one.expected_loss, one.stderr, one.nats) == (other.expected_loss, other.stderr, other.nats)
    assert one.loss == pytest.approx(other.loss, rel=1e-14)
    assert one.complexity == one.expected_loss + 0.1 * posterior.kl


def test_loss_given_is_not_measured():
    X, y, net, F, scale, _ = regression()
    options = {"prior_scale": scale, "beta": 0.1, "likelihood": "gaussian", "loss": 5.0, "data": [(X, y)]}
    assert ff.task_complexity(F, net, **options).loss == 5.0
    measured = ff.task_complexity(F, net, **options, method="monte-carlo")
    assert measured.loss == 5.0 and measured.expected_loss < 5.0


class Pair(nn.Module):
    """A layer's output beside another."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return {"wanted": self.layer(x), "other": None}


def test_takes_the_output_that_is_picked():
    model, data = Pair().double(), [(torch.randn(5, 3).double(), torch.randint(0, 2, (5,)))]
    how = {"num_samples": 5, "provenance": ff.Provenance(likelihood="categorical")}
    F, G = (DiagonalFisher({n: torch.ones_like(p) for n, p in m.named_parameters()}, **how) for m in (model, model.layer))
    options = {"prior_scale": 1.0, "beta": 0.1, "data": data, "method": "monte-carlo"}
    one = ff.task_complexity(F, model, output="wanted", **options)
    other = ff.task_complexity(G, model.layer, **options)
    assert (one.loss, one.expected_loss) == (other.loss, other.expected_loss)
    posterior = ff.optimal_posterior(F, model, prior_scale=1.0, beta=0.1)
    assert ff.measured_complexity(posterior, model, data, output="wanted").expected_loss == one.expected_loss


def complexity_of_posterior(F, model, *, data, likelihood=None, **options):
    return ff.measured_complexity(ff.optimal_posterior(F, model, **options), model, data, likelihood)


@pytest.mark.parametrize(
    "measure",
    [ff.task_complexity, lambda F, m, *, beta, **o: ff.rate_distortion(F, m, [beta], **o).points[0], complexity_of_posterior],
)
def test_the_loss_is_of_the_fishers_own_likelihood(measure):
    X, y, net, F, scale, _ = regression()
    options = {"prior_scale": scale, "beta": 0.1, "data": [(X, y)]}
    assert measure(F, net, **options).loss == pytest.approx(ff.mean_loss(net, [(X, y)], "gaussian"), rel=1e-14)
    with pytest.warns(ff.FisherWarning, match="should be that of the nats, gaussian, got bernoulli") as said:
        measure(F, net, likelihood="bernoulli", **(options | {"data": [(X, y.sigmoid())]}))
    assert [warning.filename for warning in said] == [__file__]
    unknown = DiagonalFisher({"weight": torch.ones_like(net.weight)}, num_samples=20)
    with pytest.raises(
        ValueError, match="likelihood must be given beside nats of an unknown likelihood, got None; pass likelihood="
    ):
        measure(unknown, net, **options)
    assert measure(unknown, net, likelihood="gaussian", **options).loss == measure(F, net, **options).loss


def test_a_likelihood_whose_loss_has_settings_is_the_fishers_own():
    X, y, net = torch.randn(6, 4).double(), torch.randint(0, 3, (6,)), nn.Linear(4, 3).double()
    smooth = ff.Categorical(label_smoothing=0.1)
    F = ff.fisher(net, [(X, y)], fisher_type="empirical", likelihood=smooth, progress=False)
    found = ff.task_complexity(F, net, prior_scale=1.0, beta=0.1, data=[(X, y)], likelihood=smooth)
    assert found.loss == ff.mean_loss(net, [(X, y)], smooth)
    with pytest.raises(ValueError, match=r"must be given beside nats of categorical\(label_smoothing=0.1\), got None"):
        ff.task_complexity(F, net, prior_scale=1.0, beta=0.1, data=[(X, y)])


def test_labels_that_do_not_count_are_part_of_the_likelihood():
    X, y, net = torch.randn(6, 4).double(), torch.tensor([0, 0, 0, 1, 2, 1]), nn.Linear(4, 3).double()
    some = ff.Categorical(ignore_index=0)
    F = ff.fisher(net, [(X, y)], fisher_type="empirical", likelihood=some, progress=False)
    options = {"prior_scale": 1.0, "beta": 0.1, "data": [(X, y)]}
    assert F.provenance.likelihood == "categorical(ignore_index=0)"
    assert ff.task_complexity(F, net, likelihood=some, **options).loss == ff.mean_loss(net, [(X, y)], some)
    with pytest.raises(ValueError, match="likelihood must be given beside nats of categorical"):
        ff.task_complexity(F, net, **options)


def test_states_its_conditions():
    text = str(vectors())
    for part in ("complexity 0.251931", "4.1 nats", "beta = 0.01", "k = 4", "N = 7", "exact formulas", "by formula"):
        assert part in text
    X, y, net, F, scale, _ = regression()
    text = str(ff.measured_complexity(ff.optimal_posterior(F, net, prior_scale=scale, beta=0.1), net, [(X, y)], "gaussian"))
    for part in ("+-", "k = 4", "N = 20", "gram", "measured by 8 draws (seed 0)", "gaussian likelihood"):
        assert part in text


def test_refuses():
    X, y, net, F, scale, _ = regression()
    with pytest.raises(ValueError, match="method must be one of"):
        vectors(method="exact")
    with pytest.raises(ValueError, match="loss must be a finite number, got nan"):
        vectors(loss=math.nan)
    with pytest.raises(ValueError, match=r"loss must be given .*, got no data and a dict"):
        vectors(loss=None)
    with pytest.raises(ValueError, match=r"method='monte-carlo' must have data and a network as model, got no data and a Linear"):
        ff.task_complexity(F, net, prior_scale=scale, beta=0.1, method="monte-carlo", loss=0.1)
    with pytest.raises(ValueError, match="data must be readable several times"):
        ff.task_complexity(F, net, prior_scale=scale, beta=0.1, method="monte-carlo", data=iter([(X, y)]), likelihood="gaussian")
    posterior = ff.optimal_posterior(F, net, prior_scale=scale, beta=0.1)
    with pytest.raises(ValueError, match="measured_complexity: data must be readable several times, got generator"):
        ff.measured_complexity(posterior, net, (batch for batch in [(X, y)]), "gaussian")
    with pytest.raises(ValueError, match="beta must be a finite number > 0"):
        vectors(beta=0.0)


def test_missing_parameters_are_warned_of_at_the_caller():
    F = DiagonalFisher({"w": H}, num_samples=7, coverage={"b": "missing: no rule"})
    with pytest.warns(ff.FisherWarning, match="exclude parameters that the Fisher lacks") as caught:
        ff.task_complexity(F, {"w": W, "b": torch.zeros(2)}, prior_scale=1.0, beta=0.01, loss=0.0)
    assert caught[0].filename == __file__


def test_measured_complexity_is_around_the_mean_of_the_posterior():
    net, data = nn.Linear(3, 2), [(torch.randn(8, 3), torch.randint(0, 2, (8,)))]
    q = ff.optimal_posterior(ff.fisher(net, data, progress=False), net, prior_scale=1.0, beta=0.1)
    before = ff.mean_loss(net, data)
    with torch.no_grad():
        net.weight.mul_(3)
    assert ff.measured_complexity(q, net, data, draws=2).loss == pytest.approx(before)
    assert ff.mean_loss(net, data) != pytest.approx(before)
