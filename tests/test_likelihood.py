# SPDX-License-Identifier: Apache-2.0
"""Closed-form scores are autograd's, columns multiply out to the output Hessian, labels follow the model and their keys only."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fisherfast as ff
from fisherfast import _random
from fisherfast.likelihood import resolve

N, L, C, K = 7, 5, 11, 3


def predictions(likelihood, output, targets=None, mask=None, first=0):
    return likelihood.predictions(output, targets, mask, torch.arange(first, first + len(output)))


CASES = {
    "categorical": (ff.Categorical(), (N, C), lambda: torch.randint(0, C, (N,)), F.cross_entropy),
    "categorical-positions": (
        ff.Categorical(),
        (N, L, C),
        lambda: torch.randint(0, C, (N, L)),
        lambda z, y, reduction: F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction=reduction),
    ),
    "categorical-axis-1": (ff.Categorical(axis=1), (N, C, L, 2), lambda: torch.randint(0, C, (N, L, 2)), F.cross_entropy),
    "causal-lm": (
        ff.CausalLM(),
        (N, L, C),
        lambda: torch.randint(0, C, (N, L)),
        lambda z, y, reduction: F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction=reduction),
    ),
    "bernoulli": (ff.Bernoulli(), (N, K), lambda: torch.randint(0, 2, (N, K)).double(), F.binary_cross_entropy_with_logits),
    "gaussian": (ff.Gaussian(), (N, K), lambda: torch.randn(N, K).double(), lambda z, y, reduction: (z - y).square().sum() / 2),
    "gaussian-sigma": (
        ff.Gaussian(0.3),
        (N,),
        lambda: torch.randn(N).double(),
        lambda z, y, reduction: (z - y).square().sum() / 0.18,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_empirical_score_is_the_gradient_of_the_loss(name):
    likelihood, shape, labels, loss = CASES[name]
    output, y = torch.randn(shape, dtype=torch.float64, requires_grad=True), labels()
    (expected,) = torch.autograd.grad(loss(output, y, reduction="sum"), output)
    p = predictions(likelihood, output, y)
    (score,) = torch.autograd.grad(p.values, output, likelihood.empirical(p.detached()))
    torch.testing.assert_close(score, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", CASES)
def test_columns_multiply_out_to_the_hessian(name):
    likelihood, shape, labels, loss = CASES[name]
    output, y = torch.randn(1, *shape[1:], dtype=torch.float64), labels()[:1]
    hessian = torch.autograd.functional.hessian(lambda z: loss(z, y, reduction="sum"), output).reshape(output.numel(), -1)
    leaf = output.requires_grad_()
    p = predictions(likelihood, leaf, None)
    columns = [torch.autograd.grad(p.values, leaf, c, retain_graph=True)[0].flatten() for c in likelihood.columns(p.detached())]
    assert len(columns) == likelihood.num_columns(p)
    torch.testing.assert_close(sum(torch.outer(c, c) for c in columns), hessian, rtol=1e-12, atol=1e-14)


def test_columns_survive_saturated_probabilities():
    z = torch.tensor([[0.0, 800.0, 0.0, -800.0]], dtype=torch.float64)
    p = predictions(ff.Categorical(), z)
    assert all(torch.isfinite(c).all() for c in ff.Categorical().columns(p))


@pytest.mark.parametrize("name", CASES)
def test_sampled_score_has_the_model_moments(name):
    """Mean 0 and covariance = Hessian along random directions, within five standard errors of the mean over draws."""
    likelihood, shape, _, _ = CASES[name]
    draws, output = 2000, torch.randn(1, *shape[1:], dtype=torch.float64)
    p = predictions(likelihood, output)
    scores = torch.stack([likelihood.sampled(p, seed=3, draw=d).flatten() for d in range(draws)])
    columns = torch.stack([c.flatten() for c in likelihood.columns(p)])
    directions = torch.randn(scores.shape[1], 8, dtype=torch.float64)
    along = scores @ directions
    assert (along.mean(0).abs() <= 5 * along.std(0) / draws**0.5).all()
    expected = (columns @ directions).square().sum(0)
    assert ((along.square().mean(0) - expected).abs() <= 5 * along.square().std(0) / draws**0.5).all()


@pytest.mark.parametrize("name", CASES)
def test_labels_depend_on_their_keys_only(name):
    likelihood, shape, _, _ = CASES[name]
    output = torch.randn(shape, dtype=torch.float64)
    whole = likelihood.sampled(predictions(likelihood, output, first=5), seed=1, draw=2)
    parts = [likelihood.sampled(predictions(likelihood, output[n : n + 1], first=5 + n), seed=1, draw=2) for n in range(N)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, likelihood.sampled(predictions(likelihood, output, first=5), seed=2, draw=2))
    assert not torch.equal(whole, likelihood.sampled(predictions(likelihood, output, first=6), seed=1, draw=2))
    assert not torch.equal(whole, likelihood.sampled(predictions(likelihood, output, first=5), seed=1, draw=3))


def test_padding_changes_nothing():
    logits = torch.randn(2, 4, C, dtype=torch.float64)
    padded = torch.cat([torch.randn(2, 3, C, dtype=torch.float64), logits], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    plain = ff.Categorical().sampled(predictions(ff.Categorical(), logits), 0, 0)
    other = ff.Categorical().sampled(predictions(ff.Categorical(), padded, mask=mask), 0, 0)
    assert torch.equal(other[:, 3:], plain) and not other[:, :3].any()


def test_ignored_labels_count_nothing():
    output = torch.randn(N, L, C, dtype=torch.float64)
    y = torch.randint(0, C, (N, L))
    y[0], y[1, 2:] = -100, -100
    p = predictions(ff.Categorical(), output, y)
    assert p.num_positions == int((y != -100).sum())
    for score in (ff.Categorical().empirical(p), ff.Categorical().sampled(p, 0, 0)):
        assert not score[0].any() and not score[1, 2:].any() and score[1, :2].all()


@pytest.mark.parametrize("labels", [True, False])
def test_causal_lm_counts_shifted_positions(labels):
    output, y, mask = torch.randn(2, 4, C), torch.randint(0, C, (2, 4)), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    y[1, 2:] = -100
    p = predictions(ff.CausalLM(), output, y if labels else None, mask)
    assert p.counted.tolist() == [[True, True, True, False], [True, False, False, False]]


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**62), draw=st.integers(0, 1000))
def test_uniform_is_uniform_and_uncorrelated(seed, draw):
    sample, position = torch.arange(64).unsqueeze(1), torch.arange(64).unsqueeze(0)
    u = _random.uniform(seed, *torch.broadcast_tensors(sample, position), draw)
    assert 0 < u.min() and u.max() < 1 and u.unique().numel() == u.numel()
    # Six standard errors for 4096 numbers: mean, neighbours along either axis, and the next draw.
    centred = (u - 0.5) * 12**0.5
    following = (_random.uniform(seed, *torch.broadcast_tensors(sample, position), draw + 1) - 0.5) * 12**0.5
    assert abs(centred.mean()) < 6 / 64
    for other in (centred.roll(1, 0), centred.roll(1, 1), following):
        assert abs((centred * other).mean()) < 6 / 64


def test_normal_is_normal():
    x = _random.normal(0, *torch.broadcast_tensors(torch.arange(300).unsqueeze(1), torch.arange(300)), 0).flatten()
    ordered = x.sort().values
    cdf = 0.5 * (1 + torch.erf(ordered / 2**0.5))
    distance = (cdf - (torch.arange(len(x)) + 0.5) / len(x)).abs().max()
    assert distance < 1.95 / len(x) ** 0.5  # Kolmogorov-Smirnov at one in a thousand


@pytest.mark.parametrize(
    ("likelihood", "output", "targets", "message"),
    [
        ("categorical", (N, C), torch.full((N,), C), r"labels must lie in \[0, C = 11\)"),
        ("categorical", (N, C), torch.full((N,), -1), r"labels must lie in"),
        ("categorical", (N,), None, "output must be"),
        ("categorical", (N, C, 4, 4), None, "ambiguous"),
        ("categorical", (N, C), torch.zeros(N, 2, dtype=torch.int64), "targets do not fit the output"),
        ("categorical", (N, C), torch.zeros(N), "must be class indices"),
        ("bernoulli", (N, K), torch.full((N, K), 1.5), r"targets must lie in \[0, 1\]"),
        ("gaussian", (N, K), torch.zeros(N, 2), "targets do not fit"),
        ("gaussian", (N, K), torch.full((N, K), float("nan")), "targets must be finite"),
    ],
)
def test_rejects(likelihood, output, targets, message):
    with pytest.raises(ValueError, match=message):
        predictions(resolve(likelihood), torch.randn(output), targets)


def test_rejects_names_and_sigma():
    with pytest.raises(ValueError, match="likelihood: must be one of"):
        resolve("poisson")
    with pytest.raises(ValueError, match="sigma must be positive"):
        ff.Gaussian(0.0)
