# SPDX-License-Identifier: Apache-2.0
"""Closed-form scores are autograd's, columns multiply out to the output Hessian, labels follow the model and their keys only,
padding and batches change nothing, weights count samples."""

import math
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import BesideMask
from torch import nn

import fisherfast as ff
from fisherfast import _random
from fisherfast.data.batches import Batch
from fisherfast.likelihood import Draws, resolve, stored_name

N, L, C, K = 7, 5, 11, 3


def predictions(likelihood, output, targets=None, mask=None, first=0):
    return likelihood.predictions(output, targets, mask, torch.arange(first, first + len(output)))


def poisson_log_prob(z, y):
    return (y * z - z.exp() - torch.lgamma(y + 1)).sum(-1)


def poisson_sample(z, draws):
    """Inverse CDF."""
    rate = z.double().exp()
    u, term = draws.uniform(*z.shape[1:]), (-rate).exp()
    cdf, y = term.clone(), torch.zeros_like(rate)
    for k in range(1, 200):
        y += u >= cdf
        term = term * rate / k
        cdf += term
    return y


def poisson_columns(z):
    for k in range(z.shape[1]):
        yield F.one_hot(torch.tensor(k), z.shape[1]) * (z / 2).exp()


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
    "bernoulli-positions": (
        ff.Bernoulli(),
        (N, L, K),
        lambda: torch.randint(0, 2, (N, L, K)).double(),
        F.binary_cross_entropy_with_logits,
    ),
    "gaussian": (ff.Gaussian(), (N, K), lambda: torch.randn(N, K).double(), lambda z, y, reduction: (z - y).square().sum() / 2),
    "gaussian-sigma": (
        ff.Gaussian(0.3),
        (N,),
        lambda: torch.randn(N).double(),
        lambda z, y, reduction: (z - y).square().sum() / 0.18,
    ),
    "gaussian-sigma-per-output": (
        ff.Gaussian(torch.tensor([0.3, 1.0, 2.0])),
        (N, L, K),
        lambda: torch.randn(N, L, K).double(),
        lambda z, y, reduction: ((z - y) / torch.tensor([0.3, 1.0, 2.0])).square().sum() / 2,
    ),
    "poisson": (
        ff.LogLikelihood(poisson_log_prob, poisson_sample, poisson_columns, name="poisson"),
        (N, K),
        lambda: torch.randint(0, 5, (N, K)).double(),
        lambda z, y, reduction: F.poisson_nll_loss(z, y, reduction=reduction),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_empirical_score_is_the_gradient_of_the_loss(name):
    likelihood, shape, labels, loss = CASES[name]
    output, y = torch.randn(shape, dtype=torch.float64, requires_grad=True), labels()
    (expected,) = torch.autograd.grad(loss(output, y, reduction="sum"), output)
    p = predictions(likelihood, output, y)
    (score,) = torch.autograd.grad(p.values, output, likelihood.empirical(p.detached()))
    torch.testing.assert_close(score, expected, rtol=1e-12, atol=1e-14)


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


def test_a_drawn_label_of_a_saturated_output_has_its_small_score():
    score = ff.Bernoulli().sampled(
        predictions(ff.Bernoulli(), torch.tensor([[60.0, -60.0]], dtype=torch.float64)), seed=0, draw=0
    )
    expected = torch.tensor([[-1.0, 1.0]], dtype=torch.float64) * math.exp(-60)
    torch.testing.assert_close(score, expected, rtol=1e-12, atol=0)


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
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-12, atol=1e-14)
    assert not torch.equal(whole, likelihood.sampled(predictions(likelihood, output, first=5), seed=2, draw=2))
    assert not torch.equal(whole, likelihood.sampled(predictions(likelihood, output, first=6), seed=1, draw=2))
    assert not torch.equal(whole, likelihood.sampled(predictions(likelihood, output, first=5), seed=1, draw=3))


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
        (
            "categorical",
            (N, C),
            torch.zeros(N, 2, dtype=torch.int64),
            r"targets must be \[N\] for an output \[N, 11\], got \[N, 2\]; a class axis",
        ),
        ("categorical", (N, C), torch.zeros(N), "must be class indices"),
        ("bernoulli", (N, K), torch.full((N, K), 1.5), r"targets must lie in \[0, 1\]"),
        (
            "gaussian",
            (N, K),
            torch.zeros(N, 2),
            r"targets must be \[N, 3\] for an output \[N, 3\], got \[N, 2\]; pass one target for each number",
        ),
        ("gaussian", (N, K), torch.full((N, K), float("nan")), "targets must be finite"),
        ("gaussian", (N, K), torch.ones(N, K) + 5j, r"gaussian: targets must be real, got torch\.complex64; pass \.real"),
        ("bernoulli", (N, K), torch.ones(N, K) + 5j, "bernoulli: targets must be real, got"),
        ("categorical", (N, C), torch.ones(N) + 2j, "categorical: targets must be real, got"),
        ("causal_lm", (N, 2, C), torch.ones(N, 2) + 2j, "causal_lm: targets must be real, got"),
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


# ---- what a loss adds to the likelihood


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_class_weights_and_label_smoothing_are_those_of_cross_entropy(smoothing, weighted, dtype):
    weight = torch.rand(C).index_fill(0, torch.tensor([2]), 0.0) if weighted else None
    z, y = torch.randn(N, L, C).to(dtype).double().requires_grad_(), torch.randint(0, C, (N, L))
    y[0], y[1, 2:] = -100, -100
    loss = F.cross_entropy(
        z.flatten(0, 1), y.flatten(), None if weight is None else weight.double(), reduction="sum", label_smoothing=smoothing
    )
    (expected,) = torch.autograd.grad(loss, z)
    likelihood = ff.Categorical(class_weight=weight, label_smoothing=smoothing)
    score = likelihood.empirical(predictions(likelihood, z.detach().to(dtype), y))
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(score.double(), expected, rtol=tolerance, atol=tolerance)


def test_pos_weight_is_that_of_binary_cross_entropy():
    weight, z, y = torch.rand(K).double(), torch.randn(N, K, dtype=torch.float64, requires_grad=True), torch.rand(N, K).double()
    (expected,) = torch.autograd.grad(F.binary_cross_entropy_with_logits(z, y, pos_weight=weight, reduction="sum"), z)
    likelihood = ff.Bernoulli(pos_weight=weight)
    torch.testing.assert_close(likelihood.empirical(predictions(likelihood, z, y)), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weighted", [False, True])
def test_losses_of_yes_or_no_are_the_binary_cross_entropy(weighted):
    weight = torch.rand(K).double() if weighted else None
    z, y = torch.randn(N, K, dtype=torch.float64, requires_grad=True), torch.rand(N, K).double().round(decimals=1)
    likelihood = ff.Bernoulli(pos_weight=weight)
    found = likelihood.losses(predictions(likelihood, z, y))
    expected = F.binary_cross_entropy_with_logits(z, y, pos_weight=weight, reduction="none").sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), z)[0] for each in (found, expected)), rtol=1e-12, atol=1e-14)


def test_a_label_that_is_certain_costs_nothing():
    """z = -inf is p = 0, and of the label 0 the loss is -log 1."""
    z = torch.tensor([[-math.inf, math.inf, 0.0]], requires_grad=True)
    losses = ff.Bernoulli().losses(predictions(ff.Bernoulli(), z, torch.tensor([[0.0, 1.0, 1.0]])))
    assert losses.item() == pytest.approx(math.log(2), rel=1e-6)
    assert torch.autograd.grad(losses.sum(), z)[0].tolist() == [[0.0, 0.0, -0.5]]
    wrong = ff.Bernoulli().losses(predictions(ff.Bernoulli(), z.detach(), torch.tensor([[1.0, 0.0, 0.0]])))
    assert wrong.item() == math.inf


def classifier():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C))


def diagonal(*args, **kwargs):
    return ff.fisher(*args, progress=False, **kwargs).diagonal(dtype=torch.float64)


def assert_same(a, b, rtol=1e-5):
    for name in a | b:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=rtol * float(b[name].abs().max()))


@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
def test_settings_of_the_loss_do_not_change_the_fisher_and_it_says_so(fisher_type):
    model, batch = classifier(), (torch.randn(N, 4), torch.randint(0, C, (N,)))
    likelihood = ff.Categorical(class_weight=torch.rand(C), label_smoothing=0.1)
    plain = ff.fisher(model, [batch], fisher_type=fisher_type, progress=False)
    with pytest.warns(ff.FisherWarning, match=f"class_weight=.*, label_smoothing=0.1 change the loss.*{fisher_type!r}"):
        F_ = ff.fisher(model, [batch], fisher_type=fisher_type, likelihood=likelihood, progress=False)
    assert_same(F_.diagonal(), plain.diagonal(), 0.0)
    assert (F_ + plain).num_samples == 2 * N


def test_settings_of_the_loss_name_an_empirical_fisher():
    one, two = (ff.Categorical(class_weight=w) for w in (torch.ones(C), torch.arange(C) + 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = {
            stored_name(likelihood, "empirical") for likelihood in (ff.Categorical(), one, two, ff.CausalLM(label_smoothing=0.1))
        }
    assert len(names) == 4 and "causal_lm(label_smoothing=0.1)" in names
    assert stored_name(ff.Categorical(class_weight=torch.ones(C)), "empirical") in names  # of the numbers, not of the object


# ---- padding


class PerToken(nn.Module):
    """A language model without attention: what a token predicts depends on that token alone."""

    def __init__(self, outputs):
        super().__init__()
        self.table, self.head = nn.Embedding(13, 6), nn.Linear(6, outputs)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.table(input_ids).tanh())


LENGTHS = (5, 1, 4, 2)


def sequences(target):
    """Per sample: ids [1, T] and targets [1, T] or [1, T, K]."""
    ids = [torch.randint(1, 13, (1, T)) for T in LENGTHS]
    return [(i, target(i.shape[1])) for i in ids]


def padded(items, fill, side):
    """One dict batch, padded on one side or on both."""
    longest = max(LENGTHS) + 1

    def pad(tensor, value):
        missing = longest - tensor.shape[1]
        left = {"right": 0, "left": missing, "both": missing // 2}[side]
        frame = tensor.new_full((1, longest, *tensor.shape[2:]), value)
        frame[:, left : left + tensor.shape[1]] = tensor
        return frame

    ids, mask = torch.cat([pad(i, 0) for i, _ in items]), torch.cat([pad(torch.ones_like(i), 0) for i, _ in items])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.cat([pad(y, fill) for _, y in items])}


PADDED = {
    "categorical": (ff.Categorical(), 4, lambda T: torch.randint(0, 4, (1, T)), -100),
    "causal-lm": (ff.CausalLM(), 13, lambda T: torch.randint(0, 13, (1, T)), -100),
    "bernoulli": (ff.Bernoulli(), K, lambda T: torch.randint(0, 2, (1, T, K)).float(), -100.0),
    "gaussian": (ff.Gaussian(torch.tensor([0.5, 1.0, 2.0])), K, lambda T: torch.randn(1, T, K), float("nan")),
    "user": (
        ff.LogLikelihood(
            lambda z, y: -((z - y) ** 2).sum(-1) / 2, lambda z, draws: z + draws.normal(*z.shape[1:]), name="normal"
        ),
        K,
        lambda T: torch.randn(1, T, K),
        7.0,
    ),
}
PADDED_TYPES = [(name, kind) for name in PADDED for kind in ("mc", "exact", "empirical")]
PADDED_TYPES.remove(("user", "exact"))  # it was given no columns


@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize(("name", "fisher_type"), PADDED_TYPES)
def test_padding_changes_nothing(name, fisher_type, side):
    """One padded batch, against one batch per sample without padding; with and without labels where they are not needed."""
    likelihood, outputs, target, fill = PADDED[name]
    model, items = PerToken(outputs), sequences(target)
    options = {"fisher_type": fisher_type, "likelihood": likelihood}
    alone = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y} for i, y in items]
    expected = ff.fisher(model, alone, progress=False, **options)
    batch = padded(items, fill, side)
    for labels in (True, False) if fisher_type != "empirical" else (True,):
        given = batch if labels else {k: v for k, v in batch.items() if k != "labels"}
        F_ = ff.fisher(model, [given], progress=False, **options)
        assert_same(F_.diagonal(), expected.diagonal())
        assert F_.num_positions == expected.num_positions


@pytest.mark.parametrize(("name", "columns"), [("categorical", 3), ("causal-lm", 12), ("bernoulli", K), ("gaussian", K)])
def test_padding_costs_no_pass(name, columns):
    """As many passes as the longest sample has labels, wherever they are."""
    likelihood, outputs, target, fill = PADDED[name]
    batch = padded(sequences(target), fill, "both")
    output = torch.randn(*batch["input_ids"].shape, outputs)
    p = predictions(likelihood, output, batch["labels"], batch["attention_mask"])
    labels = max(LENGTHS) - (name == "causal-lm")
    assert likelihood.num_columns(p) == labels * columns == len(list(likelihood.columns(p)))


def test_labels_of_one_sample_are_never_seeded_together():
    batch = padded(sequences(PADDED["categorical"][2]), -100, "both")
    output = torch.randn(*batch["input_ids"].shape, 4)
    p = predictions(ff.Categorical(), output, batch["labels"])
    for column in ff.Categorical().columns(p):
        assert (column.any(-1).sum(1) <= 1).all() and not column[~p.counted].any()


def test_ignored_outputs_of_a_multi_label_problem():
    z, y = torch.randn(N, K), torch.randint(0, 2, (N, K)).float()
    y[0], y[1, 1] = -100.0, -100.0
    p = predictions(ff.Bernoulli(), z, y)
    assert p.num_positions == N * K - K - 1
    for score in (ff.Bernoulli().empirical(p), ff.Bernoulli().sampled(p, 0, 0)):
        assert torch.equal(score != 0, y != -100.0)


def test_bernoulli_keeps_relative_precision_where_it_is_certain():
    z = torch.tensor([[25.0, -25.0]])
    score = ff.Bernoulli().empirical(predictions(ff.Bernoulli(), z, torch.tensor([[1.0, 0.0]])))
    torch.testing.assert_close(
        score.double(), torch.tensor([[-1.0, 1.0]]).double() * (-z[0, :1]).double().sigmoid(), rtol=1e-6, atol=0.0
    )


# ---- sample weights


def test_a_weight_of_two_is_the_sample_twice():
    model, x, y = classifier(), torch.randn(N, 4), torch.randint(0, C, (N,))
    w = torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0, 1.0, 0.0])
    times = w.long()
    twice = diagonal(model, [(x.repeat_interleave(times, 0), y.repeat_interleave(times))], fisher_type="empirical")
    assert_same(diagonal(model, [(x[:3], y[:3], w[:3]), (x[3:], y[3:], w[3:])], fisher_type="empirical"), twice)
    model = Keywords(model)
    items = [{"x": x, "labels": y, "sample_weight": w.tolist()}]
    assert_same({f"inner.{k}": v for k, v in twice.items()}, diagonal(model, items, fisher_type="empirical"))


class Keywords(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
def test_weights_weigh_the_mean(fisher_type):
    """``sum_n w_n F_n / sum_n w_n`` of the Fishers of the single samples."""
    model, x, w = classifier(), torch.randn(N, 4), torch.rand(N)
    options = {"fisher_type": fisher_type, "seed": 3}
    single = [diagonal(model, [(x[n : n + 1], None)], sample_offset=n, **options) for n in range(N)]
    mean = {name: sum(w[n] * single[n][name] for n in range(N)) / w.sum() for name in single[0]}
    assert_same(diagonal(model, [(x, None, w)], **options), mean)


def test_batches_carry_and_cut_weights():
    x = torch.randn(N, 4)
    batch = Batch.of((x, None, torch.arange(float(N))), torch.device("cpu"))
    assert batch.weight.dtype == torch.float32 and batch.cut(2, 4).weight.tolist() == [2.0, 3.0]
    assert Batch.of((x, None), torch.device("cpu")).weight is None
    assert "sample_weight" not in Batch.of({"x": x, "sample_weight": torch.ones(N)}, torch.device("cpu")).inputs


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(N - 1), r"sample weights must be \[N\] = \(7,\), one number per sample, got \(6,\)"),
        (torch.full((N,), 1e-40), "sample weights must be 0 or at least 1.18e-38, where float32 has its digits, got 1e-40"),
        (torch.ones(N, 1), r"got \(7, 1\)"),
        (torch.full((N,), -1.0), "must be finite and not negative, got -1.0"),
        (torch.full((N,), float("nan")), "must be finite and not negative"),
    ],
)
def test_rejects_weights(weight, message):
    with pytest.raises(ValueError, match=f"data: .*{message}"):
        Batch.of((torch.randn(N, 4), None, weight), torch.device("cpu"))


def test_rejects_complex_weights():
    with pytest.raises(ValueError, match=r"data: sample weights must be real, got torch\.complex64"):
        Batch.of({"x": torch.randn(N, 4), "sample_weight": torch.ones(N) + 1j}, torch.device("cpu"))


def test_rejects_items_that_are_no_batch():
    with pytest.raises(TypeError, match=r"must be \(inputs, targets\), \(inputs, targets, weights\) or a dict, got tuple of 4"):
        Batch.of((1, 2, 3, 4), torch.device("cpu"))


# ---- the user's own


def test_draws_depend_on_their_keys_only():
    """Not on the batch, nor on padding; and one call's numbers are not another's."""
    p = predictions(PADDED["user"][0], torch.randn(N, L, K), None, torch.ones(N, L))
    whole = Draws(p, 5, 1)
    first, second, alone = whole.uniform(L, 2), whole.uniform(L, 2), whole.uniform()
    assert first.shape == (N, L, 2) and alone.shape == (N,)
    assert torch.cat([first.flatten(), second.flatten(), alone]).unique().numel() == 2 * first.numel() + N
    assert torch.equal(Draws(p.one(3), 5, 1).uniform(L, 2), first[3:4])
    mask = F.pad(torch.ones(N, L), (2, 1))
    longer = predictions(PADDED["user"][0], torch.randn(N, L + 3, K), None, mask)
    assert torch.equal(Draws(longer, 5, 1).uniform(L + 3, 2)[:, 2:-1], first)


def test_a_likelihood_of_the_user_is_the_built_in_one_of_that_form():
    model, x, y = nn.Linear(4, K), torch.randn(N, 4), torch.randn(N, K)
    normal = ff.LogLikelihood(lambda z, y: -((z - y) ** 2).sum(1) / (2 * 0.3**2), name="normal", columns_of=unit_columns)
    for fisher_type in ("empirical", "exact"):
        options = {"fisher_type": fisher_type}
        mine, built_in = (diagonal(model, [(x, y)], likelihood=p, **options) for p in (normal, ff.Gaussian(0.3)))
        assert_same(mine, built_in)


def unit_columns(z):
    for k in range(K):
        yield F.one_hot(torch.tensor(k), K).to(z).expand_as(z) / 0.3


@pytest.mark.parametrize(
    ("likelihood", "call", "message"),
    [
        (
            ff.LogLikelihood(lambda z, y: z.sum(), name="u"),
            "empirical",
            r"u: log_prob must return .*\[N\] = \(7,\).*got shape \(\)",
        ),
        (ff.LogLikelihood(lambda z, y: y.sum(1), name="u"), "empirical", r"got shape \(7,\) without a graph"),
        (ff.LogLikelihood(lambda z, y: z.sum(1), name="u"), "sampled", r"u: fisher_type='mc' needs LogLikelihood\(sample=...\)"),
        (ff.LogLikelihood(lambda z, y: z.sum(1), name="u"), "num_columns", r"columns_of=.*use fisher_type='mc'"),
        (
            ff.LogLikelihood(lambda z, y: z.sum(1), name="u", columns_of=lambda z: [z[0]]),
            "num_columns",
            r"columns_of must yield columns like the output \(7, 3\), got \(3,\)",
        ),
    ],
)
def test_rejects_what_a_user_gives(likelihood, call, message):
    p = predictions(likelihood, torch.randn(N, K), torch.randn(N, K))
    arguments = (0, 0) if call == "sampled" else ()
    with pytest.raises(ValueError, match=message):
        getattr(likelihood, call)(p, *arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ff.Categorical(class_weight=-torch.ones(3)), r"class_weight must be \[C\], finite and not negative"),
        (lambda: ff.CausalLM(label_smoothing=1.5), r"causal_lm: label_smoothing must lie in \[0, 1\], got 1.5"),
        (lambda: ff.Gaussian(torch.tensor([1.0, 0.0])), "sigma must be positive"),
        (lambda: ff.Gaussian(torch.tensor([1j])), "sigma must be positive"),
        (lambda: ff.Categorical(class_weight=torch.ones(3) + 1j), r"class_weight must be \[C\], finite and not negative"),
        (lambda: predictions(ff.Gaussian(), torch.randn(N, 4) + 1j), "gaussian: output must be real, got torch.complex64"),
        (
            lambda: predictions(ff.Categorical(class_weight=torch.ones(3)), torch.randn(N, C)),
            r"class_weight must be \[C\] = \(11,\)",
        ),
        (lambda: predictions(ff.Gaussian(torch.ones(2)), torch.randn(N, 4)), r"sigma must be as long as .* \[4\], got \(2,\)"),
        (lambda: predictions(ff.Bernoulli(pos_weight=torch.ones(2)), torch.randn(N, K)), "pos_weight must be as long as"),
    ],
)
def test_rejects_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_example_of_the_documentation():
    """docs/likelihoods.md: its code runs, and its Fisher is that of the model."""
    text = (Path(__file__).parents[1] / "docs/likelihoods.md").read_text()
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, scope)
    model, counts, x, y = scope["model"], scope["poisson"], scope["x"], scope["y"]
    gradients = []
    for n in range(len(x)):
        loss = F.poisson_nll_loss(model(x[n]), y[n], reduction="sum")
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    expected = torch.stack(gradients).square().mean(0)
    empirical = ff.fisher(model, [(x, y)], fisher_type="empirical", likelihood=counts, progress=False).diagonal()
    torch.testing.assert_close(torch.cat([d.flatten() for d in empirical.values()]), expected, rtol=1e-4, atol=1e-6)
    exact, mc = scope["exact"].trace(), scope["F"].trace()
    assert abs(mc - exact) <= 5 * scope["F"].stderr("trace")


def test_an_output_like_its_attention_mask_is_ambiguous():
    model, x = nn.Sequential(nn.Linear(2, 1), nn.Flatten(1)), torch.randn(2, 5, 2)

    mask = torch.tensor([[1, 1, 0, 0, 0], [1] * 5])
    with pytest.raises(ValueError, match=r"output \(2, 5\) is ambiguous beside an attention mask"):
        ff.fisher(BesideMask(model), [{"x": x, "attention_mask": mask}], likelihood="gaussian", progress=False)
    ff.fisher(BesideMask(model), [{"x": x, "attention_mask": torch.ones_like(mask)}], likelihood="gaussian", progress=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_sigma_is_not_rounded_to_the_default_dtype(dtype):
    z, y = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        loss = float(ff.Gaussian(0.3).losses(predictions(ff.Gaussian(0.3), z, y)))
    finally:
        torch.set_default_dtype(before)
    assert loss == pytest.approx(0.5 / 0.09 + torch.tensor(0.3).double().log().item() + 0.9189385332046727, rel=1e-7)


@pytest.mark.parametrize("wrong", [[0.5, 1.0], "1", None, torch.ones(0), torch.ones(1, 1), 0.0, float("nan")], ids=str)
def test_sigma_is_a_number_or_a_tensor(wrong):
    with pytest.raises(ValueError, match="sigma must be positive and finite"):
        ff.Gaussian(wrong)


@pytest.mark.parametrize("wrong", [ff.Categorical, None, "softmax"], ids=str)
def test_what_is_no_likelihood(wrong):
    with pytest.raises(ValueError, match="likelihood: must be one of"):
        ff.fisher(nn.Linear(3, 2), [(torch.randn(4, 3), None)], likelihood=wrong, progress=False)


@pytest.mark.parametrize("length", [2, 3])
def test_a_mask_without_zeros_says_nothing_whatever_its_length(length):
    """Two outputs of a sample, beside inputs of two positions or three."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, attention_mask):
            return self.layer(x.mean(1))

    own = ff.LogLikelihood(lambda z, y: -(z - y).square().sum(1, keepdim=True), name="own")
    batch = {"x": torch.randn(4, length, 3), "attention_mask": torch.ones(4, length), "labels": torch.randn(4, 2)}
    assert ff.fisher(Reads(), [batch], "diagonal", "empirical", own, progress=False).num_positions == 4


def test_columns_without_end_are_too_many():
    def endless(output):
        while True:
            yield torch.ones_like(output)

    own = ff.LogLikelihood(lambda o, y: -(o - y).square().sum(1), None, endless, name="endless")
    with pytest.raises(ValueError, match="at most max_passes = 10 backward passes, got 11 or more"):
        ff.fisher(nn.Linear(3, 2), [(torch.randn(2, 3), None)], "diagonal", "exact", own, progress=False, max_passes=10)
    none = ff.LogLikelihood(lambda o, y: -(o - y).square().sum(1), None, lambda output: None, name="none")
    with pytest.raises(TypeError, match="none: columns_of must give columns, got NoneType"):
        ff.fisher(nn.Linear(3, 2), [(torch.randn(2, 3), None)], "diagonal", "exact", none, progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("likelihood", "output", "target"),
    [
        (ff.Gaussian(), 1000.0, 1001.25),
        (ff.Gaussian(torch.tensor([300.0])), 100.0, 400.0),
        (ff.Bernoulli(), 6.0, 0.9985),
        (ff.Bernoulli(pos_weight=torch.tensor(1.001)), 6.0, 0.9985),
    ],
    ids=["gaussian", "sigma", "bernoulli", "pos_weight"],
)
def test_targets_of_16_bit_outputs_are_not_rounded(likelihood, output, target, dtype):
    """A residual is small beside what it is the difference of, and squares of sigma overflow."""
    z, y = torch.full((1, 1), output, dtype=dtype), torch.full((1, 1), target)
    score = likelihood.empirical(predictions(likelihood, z, y))
    leaf = z.double().requires_grad_()
    (true,) = torch.autograd.grad(likelihood.losses(predictions(likelihood, leaf, y.double())).sum(), leaf)
    assert score.dtype == dtype
    torch.testing.assert_close(score.double(), true, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_labels_may_be_a_column_of_others():
    model, x, columns = nn.Linear(5, 3), torch.randn(6, 5), torch.randint(3, (6, 4))
    found, true = (
        ff.fisher(model, [(x, y)], fisher_type="empirical", progress=False).trace()
        for y in (columns[:, 1], columns[:, 1].clone())
    )
    assert found == true
