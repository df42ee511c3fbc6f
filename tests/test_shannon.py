# SPDX-License-Identifier: Apache-2.0
"""Shannon's information in the weights: the identity, closed-form channels, the seed, path stability's formula, refusals."""

import math

import numpy
import pytest
import torch
from hypothesis import given, strategies
from networks import STRUCTURES
from torch import nn

import fisherfast as ff
from fisherfast.fisher import DiagonalFisher
from fisherfast.information import _mixture, shannon_stability


def near(estimate, expected, errors=5):
    """Whether an estimate is within so many of its standard errors, and these are small enough to say something."""
    return abs(estimate.value - expected) <= errors * estimate.stderr and estimate.stderr < 0.05


def table(datasets, states, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(datasets, states, generator=generator, dtype=torch.float64) ** 3
    return rows / rows.sum(1, keepdim=True), torch.rand(datasets, generator=generator, dtype=torch.float64) + 0.1


@given(datasets=strategies.integers(1, 6), states=strategies.integers(1, 7), seed=strategies.integers(0, 2**32))
def test_the_identity_for_tables(datasets, states, seed):
    q, pi = table(datasets, states, seed)
    p = table(1, states, seed + 1)[0][0]
    got = ff.shannon_information(q, weights=pi, reference=p)
    joint = pi[:, None] / pi.sum() * q
    mutual = float((joint * (joint / joint.sum(0) / joint.sum(1, keepdim=True)).log()).sum())
    expected = float((joint * (q / p).log()).sum())
    assert got.information.value == pytest.approx(mutual, rel=1e-9, abs=1e-13)
    assert got.expected_divergence.value == pytest.approx(expected, rel=1e-9, abs=1e-13)
    marginal = joint.sum(0)
    assert got.marginal_divergence.value == pytest.approx(float((marginal * (marginal / p).log()).sum()), rel=1e-9, abs=1e-13)
    # No other prior costs less than the marginal, and no more can be known of D than there is.
    assert got.expected_divergence.value >= got.information.value - 1e-13
    assert -1e-13 <= got.information.value <= got.ceiling + 1e-13
    assert {e.stderr for e in (got.information, got.marginal_divergence, got.expected_divergence)} == {0.0}


def test_reproduces_the_toy_of_five_data_sets():
    # science.md 1.11; the annotation's own seed.
    rng = numpy.random.default_rng(0)
    pi, q, p = rng.dirichlet([1.0] * 5), rng.dirichlet([0.7] * 6, size=5), rng.dirichlet([1.0] * 6)
    got = ff.shannon_information(torch.tensor(q), weights=torch.tensor(pi), reference=torch.tensor(p))
    assert f"{got.expected_divergence.value:.6f}" == "1.082796"
    assert f"{got.information.value:.4f}" == "0.2994"


def test_limits_of_tables():
    assert ff.shannon_information(torch.eye(5)).information.value == pytest.approx(math.log(5), rel=1e-14)
    same = ff.shannon_information(torch.full((5, 4), 0.25))
    assert same.information.value == pytest.approx(0, abs=1e-15)
    assert same.expected_divergence == same.information and same.marginal_divergence.value == 0
    assert ff.shannon_information(torch.eye(2), weights=[3, 1]).ceiling == pytest.approx(0.5623351446188083, rel=1e-14)


def test_rounding_of_the_rows_sums_changes_nothing():
    q = table(3, 5, seed=0)[0]
    off = q * torch.tensor([[1 + 9e-7], [1 - 9e-7], [1.0]], dtype=torch.float64)
    found, expected = (ff.shannon_information(rows).information.value for rows in (off, q))
    assert found == pytest.approx(expected, rel=1e-12)


def channel(scale, variance, points=161):
    """Data sets D ~ N(0, scale^2) on a grid, one run each, w | D ~ N(D, variance)."""
    D = torch.linspace(-6 * scale, 6 * scale, points, dtype=torch.float64)
    return [[(d, variance)] for d in D], torch.exp(-0.5 * (D / scale) ** 2)


@pytest.mark.parametrize(("scale", "variance"), [(1.0, 1.0), (1.0, 0.1), (3.0, 1.0)])
def test_gaussian_channel(scale, variance):
    runs, pi = channel(scale, variance)
    got = ff.shannon_information(runs, weights=pi, reference=(0.3, 2.0), samples=200)
    assert near(got.information, 0.5 * math.log1p(scale**2 / variance))
    assert got.information_with_seed.value == pytest.approx(got.information.value, rel=1e-12)
    total = scale**2 + variance
    assert near(got.marginal_divergence, 0.5 * ((total + 0.09) / 2 - 1 - math.log(total / 2)))
    assert near(got.expected_divergence, 0.5 * ((total + 0.09) / 2 - 1 - math.log(variance / 2)))
    summed = got.information.value + got.marginal_divergence.value
    assert got.expected_divergence.value == pytest.approx(summed, rel=1e-12)


def test_axes_add_up():
    first, pi = channel(1.0, 0.5, points=41)
    second, _ = channel(2.0, 1.0, points=41)
    runs = [[(torch.stack([a[0][0], b[0][0]]), torch.tensor([0.5, 1.0]))] for a in first for b in second]
    weights = torch.outer(pi, pi).flatten()
    got = ff.shannon_information(runs, weights=weights, samples=4)
    assert near(got.information, 0.5 * math.log(3) + 0.5 * math.log(5))


def test_mixtures_agree_with_integration():
    generator = torch.Generator().manual_seed(3)
    means, variances = torch.rand(3, 4, 2, generator=generator, dtype=torch.float64).unbind(-1)
    means, variances, pi = 4 * means, 0.02 + 0.3 * variances, torch.tensor([0.5, 0.3, 0.2])
    got = ff.shannon_information(
        [list(zip(m.tolist(), v.tolist(), strict=True)) for m, v in zip(means, variances, strict=True)], weights=pi, samples=4000
    )
    x = torch.linspace(-6, 10, 32001, dtype=torch.float64)
    each = torch.distributions.Normal(means[..., None], variances[..., None].sqrt()).log_prob(x).exp()
    per_dataset = each.mean(1)
    marginal = (pi[:, None].double() * per_dataset).sum(0)

    def integral(q, weight):
        return float((weight[..., None] * torch.special.xlogy(q, q / marginal)).sum() * (x[1] - x[0]))

    assert near(got.information, integral(per_dataset, pi.double()))
    assert near(got.information_with_seed, integral(each, (pi.double() / 4)[:, None].expand(3, 4)))
    assert got.information_with_seed.value > got.information.value + 0.1


def test_the_seed_counts_where_runs_fall_into_separate_basins():
    # A basin chosen by the seed alone says nothing of D: log 4 more nats for one Gaussian per run, none for the mixture.
    runs, pi = channel(1.0, 0.5, points=61)
    basins = [[(mean + 1000 * b, variance) for b in range(4)] for ((mean, variance),) in runs]
    got = ff.shannon_information(basins, weights=pi)
    assert near(got.information, 0.5 * math.log(3))
    assert got.information_with_seed.value == pytest.approx(got.information.value + math.log(4), rel=1e-9)


def test_runs_that_say_nothing_and_everything():
    nothing = ff.shannon_information([[(0.0, 1.0), (5.0, 1.0)]] * 3)
    assert nothing.information.value == pytest.approx(0, abs=1e-12)
    everything = ff.shannon_information([[(1000.0 * i, 1.0)] for i in range(3)])
    assert everything.information.value == pytest.approx(everything.ceiling) == pytest.approx(math.log(3))


def test_data_sets_with_different_numbers_of_runs():
    uneven = [[(0.0, 1.0)], [(3.0, 1.0), (9.0, 1.0), (9.0, 1.0), (3.0, 1.0)]]
    even = [[(0.0, 1.0)] * 2, [(3.0, 1.0), (9.0, 1.0)]]
    one, other = (ff.shannon_information(runs, samples=20_000).information for runs in (uneven, even))
    assert near(one, other.value, errors=7)


def test_the_ceiling_of_runs_is_the_entropy_of_their_weights():
    got = ff.shannon_information([[(0.0, 1.0)], [(1.0, 1.0)]], weights=[1, 3])
    assert got.ceiling == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), rel=1e-14)


def test_chunks_and_seeds(monkeypatch):
    runs = [[(0.0, 1.0), (1.0, 2.0)], [(2.0, 0.5)]]
    whole = ff.shannon_information(runs, seed=5)
    assert ff.shannon_information(runs, seed=6) != whole
    monkeypatch.setattr(_mixture, "_CHUNK", 100)
    assert ff.shannon_information(runs, seed=5).information.value == pytest.approx(whole.information.value, rel=1e-12)


def test_standard_errors_are_right():
    values = torch.tensor(
        [ff.shannon_information([[(0.0, 1.0), (2.0, 2.0)], [(2.0, 0.5)]], seed=s).information for s in range(300)]
    )
    assert values[:, 0].std().item() == pytest.approx(values[:, 1].mean().item(), rel=0.15)


def test_states_its_conditions():
    assert "3 data sets (ceiling 1.099), exact" in str(ff.shannon_information(torch.eye(3)))
    text = str(ff.shannon_information([[(0.0, 1.0)], [(1.0, 1.0)]], samples=50))
    for part in ("+-", "with the seed", "2 data sets", "2 runs, 50 draws"):
        assert part in text


GAUSSIANS = [[(0.0, 1.0)], [(1.0, 1.0)]]


@pytest.mark.parametrize(
    ("posteriors", "options", "message"),
    [
        (torch.ones(3), {}, r"a table must be \[datasets, states\], got \(3,\)"),
        (torch.ones(0, 3), {}, r"a table must be \[datasets, states\]"),
        (torch.ones(2, 3), {}, "posteriors must sum to 1 in every row, got a sum that is off by 2"),
        (torch.tensor([[2.0, -1.0]]), {}, "posteriors must be probabilities"),
        (torch.tensor([[math.nan, 1.0]]), {}, "posteriors must be probabilities"),
        (torch.eye(2), {"reference": torch.ones(3) / 3}, "reference must be a row of 2 probabilities"),
        (torch.eye(2), {"reference": (0.0, 1.0)}, "reference must be a row of 2 probabilities"),
        (torch.eye(2), {"reference": torch.tensor([1.0, 0.0])}, "reference must give every state of .* some probability"),
        (torch.eye(2), {"weights": [1.0]}, "weights must be 2 finite numbers > 0"),
        (torch.eye(2), {"weights": [1.0, 0.0]}, "weights must be 2 finite numbers > 0"),
        ([], {}, "every data set must have at least one run"),
        ([[(0.0, 1.0)], []], {}, r"every data set must have at least one run, got \[1, 0\] runs"),
        ([[(0.0, 0.0)]], {}, "variances must be finite and > 0"),
        ([[(math.nan, 1.0)]], {}, "means must be finite"),
        ([[(torch.zeros(2), 1.0)]], {}, r"means and variances must have one shape, .* got \[\(1,\), \(2,\)\]"),
        (GAUSSIANS, {"samples": 1}, "samples must be >= 2, got 1"),
        (GAUSSIANS, {"reference": torch.ones(2)}, r"reference must be \(mean, variance\) of a Gaussian"),
        (GAUSSIANS, {"reference": (0.0, -1.0)}, "variances must be finite and > 0"),
        (GAUSSIANS, {"weights": [1.0, math.nan]}, "weights must be 2 finite numbers > 0"),
        (GAUSSIANS, {"weights": torch.tensor([1.0, 1j])}, "weights must be real, got torch.complex64"),
        (GAUSSIANS, {"reference": (torch.zeros(3), 1.0)}, "reference must be of d = 1 weights, as the runs, .* got 3"),
        ([[(torch.zeros(2), torch.ones(2))]], {"reference": (0.0, torch.ones(3))}, "reference must be of d = 2 weights"),
        (GAUSSIANS, {"reference": (1j, 1.0)}, "reference must be real, got torch.complex64"),
        ([[(torch.tensor(1j), 1.0)]], {}, "means and variances must be real, got torch.complex64"),
        (torch.eye(2) + 0j, {}, "posteriors must be real, got torch.complex64"),
        (torch.eye(2), {"reference": torch.tensor([0.5, 0.5 + 0j])}, "reference must be real, got torch.complex64"),
    ],
)
def test_refuses(posteriors, options, message):
    with pytest.raises(ValueError, match="shannon_information: " + message):
        ff.shannon_information(posteriors, **options)


def linear(N=12, features=5):
    """A regression ``mean (y - x w)^2``, its minimiser's sensitivity to the labels [N, k], and the Fisher: half the Hessian."""
    x = torch.randn(N, features, dtype=torch.float64)
    return x, torch.linalg.pinv(x).T


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "gram"])
def test_stability_of_least_squares_is_the_hat_matrix(structure):
    # With loss (y - x w)^2 the Hessian is 2 X^T X / N: (1 / beta) J^T H J = 2 / (N beta) hat.
    x, J = linear()
    model = nn.Linear(5, 1, bias=False).double()
    half = ff.fisher(model, [(x, torch.zeros(12, 1).double())], structure, "exact", "gaussian", progress=False)
    hat = x @ torch.linalg.solve(x.T @ x, x.T)
    assert torch.allclose(2 * shannon_stability._stability(half, J), 2 / 12 * hat, rtol=1e-9, atol=1e-12)
    # By name, the same; and a data set of 3 numbers that the labels are combinations of.
    A = torch.randn(3, 12, dtype=torch.float64)
    got = ff.shannon_from_stability(half, {"weight": (A @ J)[:, None]}, beta=0.01, entropy=0.0)
    assert torch.allclose(got.stability, A @ hat @ A.T / 12, rtol=1e-9)


@pytest.mark.parametrize("d", [1, 3, 5])
def test_exact_is_the_information_of_a_linear_gaussian_channel_for_small_beta(d):
    # D ~ N(0, s^2 I_d), w = J D + N(0, beta F^-1): I = 1/2 log |I + s^2 J^T F J / beta|.
    f, J, s = torch.rand(5, dtype=torch.float64) + 0.1, torch.randn(d, 5, dtype=torch.float64), 0.7
    F, entropy = DiagonalFisher({"w": f}, num_samples=9), d / 2 * math.log(2 * math.pi * math.e * s**2)
    S = J @ torch.diag(f) @ J.T
    gaps = []
    for beta in (1e-5, 1e-6):
        exact = 0.5 * torch.logdet(torch.eye(d, dtype=torch.float64) + s**2 * S / beta).item()
        got = ff.shannon_from_stability(F, J, beta=beta, entropy=entropy)
        gaps.append(exact - got.nats)
        printed = ff.shannon_from_stability(F, J, beta=beta, entropy=entropy, variant="paper").nats
        # As printed: beta (2 pi e)^k instead of (2 pi e beta)^d.
        assert printed - got.nats == pytest.approx(((d - 1) * math.log(beta) + (d - 5) * math.log(2 * math.pi * math.e)) / 2)
    assert 0 < gaps[1] < 1e-2
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_is_invariant_to_the_units_of_the_data(structure):
    # D in other units moves H(D) and the sensitivity by the same log-determinant.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    F = ff.fisher(model, [(torch.randn(7, 3).double(), torch.randint(0, 2, (7,)))], structure, "exact", progress=False)
    J, A = torch.randn(2, 26, dtype=torch.float64), torch.tensor([[3.0, 1.0], [0.5, 2.0]], dtype=torch.float64)
    one = ff.shannon_from_stability(F, J, beta=1e-3, entropy=0.4)
    other = ff.shannon_from_stability(F, A @ J, beta=1e-3, entropy=0.4 - torch.logdet(A).item())
    assert one.nats == pytest.approx(other.nats, rel=1e-9)
    assert "d = 2" in str(one) and "exact formula" in str(one) and structure in str(one)
    # Also where one number is in a unit by which its sensitivity is lost beside another one's.
    far = ff.shannon_from_stability(
        F, J * torch.tensor([[1.0], [1e-9]], dtype=torch.float64), beta=1e-3, entropy=0.4 + 9 * math.log(10)
    )
    assert one.nats == pytest.approx(far.nats, rel=1e-9)


def test_stability_refuses():
    F = DiagonalFisher({"w": torch.tensor([1.0, 1.0, 0.0])}, num_samples=9)
    J = torch.eye(3, dtype=torch.float64)
    options = {"beta": 0.1, "entropy": 0.0}
    refused = {
        r"at most k = 3 numbers, the number of weights, got d = 4": (torch.ones(4, 3), options),
        r"J\^T F J must be regular, got eigenvalues from 0 to 1": (J, options),
        r"beta must be a finite number > 0, got 0": (J, options | {"beta": 0}),
        r"entropy must be a finite number, got inf": (J, options | {"entropy": math.inf}),
        r"variant must be one of": (J, options | {"variant": "printed"}),
        r"sensitivity must be finite and \[d, k\]": (J / 0, options),
        r"sensitivity must have the names of F, \['w'\], got \['v'\]": ({"v": J}, options),
        r"sensitivity must be real, got torch.complex128": (J + 0j, options),
        r"sensitivity\['w'\] must be real, got torch.complex128": ({"w": J + 0j}, options),
    }
    for message, (sensitivity, given_options) in refused.items():
        with pytest.raises(ValueError, match="shannon_from_stability: .*" + message):
            ff.shannon_from_stability(F, sensitivity, **given_options)
    nearly = DiagonalFisher({"w": torch.tensor([1.0, 1.0, 1e-16])}, num_samples=9)  # of the largest: rounding, of any structure
    with pytest.raises(ValueError, match=r"J\^T F J must be regular"):
        ff.shannon_from_stability(nearly, J, **options)
    with pytest.raises(ValueError, match="a flat v must have one axis of all 3 parameters"):
        ff.shannon_from_stability(F, torch.ones(2, 2), **options)
    two = DiagonalFisher({"w": torch.ones(2), "v": torch.ones(1)}, num_samples=9)
    with pytest.raises(ValueError, match=r"one number of rows for all parameters, got \[1, 2\]"):
        ff.shannon_from_stability(two, {"w": torch.ones(1, 2), "v": torch.ones(2, 1)}, **options)


def test_numbers_are_those_of_python():
    """1 + 1e-8 is another mean than 1, and 1e-300 a variance: neither is in float32."""
    apart = ff.shannon_information([[(1.0, 1e-20)], [(1.0 + 1e-8, 1e-20)]])
    assert apart.information.value == pytest.approx(math.log(2), rel=1e-6)
    assert ff.shannon_information([[(0.0, 1e-300)], [(0.0, 1e-300)]]).information.value == pytest.approx(0.0, abs=1e-9)


def test_numbers_of_other_kinds():
    assert ff.shannon_from_stability(DiagonalFisher({"w": torch.ones(2)}, 5), [[1.0, 2.0]], beta=0.1, entropy=0.0).nats == (
        ff.shannon_from_stability(DiagonalFisher({"w": torch.ones(2)}, 5), torch.tensor([[1.0, 2.0]]), beta=0.1, entropy=0.0).nats
    )


def test_one_data_set_has_no_entropy():
    found = ff.shannon_information([[(0.0, 1.0)]])
    assert "1 data sets (ceiling 0)," in str(found) and math.copysign(1, found.ceiling) == 1


def test_a_reference_as_long_as_the_weights_or_one_number():
    runs = [[(torch.zeros(2, 3), torch.ones(2, 3))], [(torch.ones(2, 3), torch.ones(2, 3))]]
    one = ff.shannon_information(runs, reference=(0.5, 2.0))
    assert one == ff.shannon_information(runs, reference=(torch.full((2, 3), 0.5), torch.tensor([2.0])))


def test_runs_that_are_no_pairs_are_refused():
    with pytest.raises(
        ValueError, match=r"a list of runs, each \(mean, variance\), numbers or tensors \[d\], got a run that is a Tensor"
    ):
        ff.shannon_information([(torch.zeros(2), torch.ones(2))])


def test_runs_that_are_narrower_than_the_rounding_of_their_means_are_refused():
    """Draws would be the mean itself, whose density says nothing of the divergence."""
    with pytest.raises(
        ValueError, match="standard deviations must be above the rounding of their means, got smaller ones; subtract"
    ):
        ff.shannon_information([[(1.0, 1e-36)], [(2.0, 1e-36)]])
