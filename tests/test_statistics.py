# SPDX-License-Identifier: Apache-2.0
"""One pass, many answers: norms, moments, standard errors and shares of coverage, each against autograd's sample gradients."""

import copy
import math
import os
import subprocess
import sys
import textwrap
from functools import partial

import networks
import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import close
from torch import nn

import fisherfast as ff
from fisherfast.capture import fallback
from fisherfast.capture.capture import Capture
from fisherfast.capture.collector import Samples
from fisherfast.fisher import ghost, serialize
from fisherfast.fisher.coverage import OPS, Stopwatch
from fisherfast.fisher.engine import Engine
from fisherfast.fisher.protocol import layer_of
from fisherfast.fisher.spread import Spread
from fisherfast.rules import MatMul, Rows

EXACT = 1e-11
NAMES = [
    "mlp-inplace-relu",
    "layer-norm",
    "embedding",
    "conv1d-addmm",
    "weight-used-twice",
    *networks.CHAINED,
    *networks.FALLBACK,
]
NAMES += ["tied-embedding-and-head", "experts", "conv-groups-same", "attention", "lstm"]
EVERYTHING = (ff.Diagonal(), ff.PerSampleNorm(by_layer=True), ff.PerSampleNorm())
WITH_MOMENTS = (*EVERYTHING, ff.GradientMoments())


def measure(model, batches, structure="diagonal", **options):
    return ff.fisher(model, batches, structure, progress=False, **options)


def sample_gradients(model, x, y, losses=oracle.cross_entropy):
    """For each sample, ``(weight, {name: gradient})`` of each of its labels, by autograd."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    result = []
    for n in range(len(x)):
        pairs = []
        for weight, loss in losses(model, x[n : n + 1], y[n : n + 1]):
            grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
            pairs.append(
                (weight, {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(named.items(), grads, strict=True)})
            )
        result.append(pairs)
    return result


def layer_norms(gradients):
    """``{layer: [N]}``: the expectation over labels of the squared norm."""
    layers = {}
    for n, pairs in enumerate(gradients):
        for weight, gradient in pairs:
            for name, g in gradient.items():
                layers.setdefault(layer_of(name), torch.zeros(len(gradients), dtype=torch.float64))[n] += (
                    weight * g.square().sum()
                )
    return layers


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fisher_type", ["empirical", "exact"])
@pytest.mark.parametrize("sizes", [[6], [4, 2]], ids=str)
def test_norms_and_standard_errors_match_autograd(name, fisher_type, sizes):
    model, x, y = networks.doubles(name, 6)
    losses = oracle.cross_entropy if fisher_type == "empirical" else oracle.every_label
    layers = layer_norms(sample_gradients(model, x, y, losses))
    whole = torch.stack(list(layers.values())).sum(0)
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    fisher, by_layer, norms = measure(model, batches, EVERYTHING, fisher_type=fisher_type)
    assert close(norms.squared_norms, whole, EXACT) and close(by_layer.squared_norms, whole, EXACT)
    assert norms.squared_norms.dtype == torch.float64 and norms.num_samples == 6
    assert set(by_layer.by_layer()) == set(layers) == set(fisher.stderr("by_layer"))
    for layer, expected in layers.items():
        assert close(by_layer.by_layer()[layer], expected, EXACT * float(whole.max() / expected.max()))
        assert fisher.stderr("by_layer")[layer] == pytest.approx(
            float(expected.std() / 6**0.5), rel=1e-9, abs=1e-9 * float(whole.max())
        )
    assert fisher.stderr("trace") == pytest.approx(float(whole.std() / 6**0.5), rel=1e-9)
    assert fisher.trace() == pytest.approx(float(whole.mean()), rel=1e-12)
    assert oracle.error(fisher.diagonal(dtype=torch.float64), oracle.diagonal(model, [(x, y)], losses)) < EXACT


@pytest.mark.parametrize("name", NAMES)
def test_asked_alone_norms_need_nothing_shaped_like_a_parameter(name):
    model, x, y = networks.doubles(name, 6)
    with ff.collect(model, ff.PerSampleNorm(), fisher_type="empirical") as stats:
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="none").view(6, -1).sum(1)
        stats.backward(loss)
    engine = stats._run.engine
    assert not engine.squares and not engine.totals
    expected = sum(layer_norms(sample_gradients(model, x, y)).values())
    assert close(stats.result().squared_norms, expected, EXACT)


def test_norms_of_a_layer_that_the_probe_found_nothing_of():
    # The gates of the first samples are closed: nothing says where the expert's samples are until a later batch opens one.
    model = networks.Wrapped(
        lambda m, x: m.head(torch.tanh(x) + x[:, :1].clamp_min(0) * m.expert(torch.tanh(m.first(x)))),
        first=nn.Linear(5, 7), expert=nn.Linear(7, 5), head=nn.Linear(5, 4),
    ).double()  # fmt: skip
    x, y = torch.randn(12, 5).double(), torch.randint(4, (12,))
    x[:6, 0], x[6:, 0] = -1.0, torch.rand(6)
    data = list(zip(x.split(6), y.split(6), strict=True))
    expected = sum(layer_norms(sample_gradients(model, x, y)).values())
    assert close(measure(model, data, (ff.PerSampleNorm(),), fisher_type="empirical")[0].squared_norms, expected, EXACT)
    assert close(measure(model, data, EVERYTHING, fisher_type="empirical")[2].squared_norms, expected, EXACT)


@pytest.mark.parametrize("name", networks.FALLBACK)
def test_norms_of_a_fallback_in_chunks_are_those_of_its_samples(name, monkeypatch):
    model, x, y = networks.doubles(name, 6)
    data = [(x, y, torch.rand(6).double())]
    expected = measure(model, data, EVERYTHING, fisher_type="empirical")
    monkeypatch.setattr(fallback, "_MOST", 4)
    found = measure(model, data, EVERYTHING, fisher_type="empirical")
    assert found[0].trace() == pytest.approx(expected[0].trace(), rel=1e-9)
    assert all(close(mine.squared_norms, its.squared_norms, EXACT) for mine, its in zip(found[1:], expected[1:], strict=True))


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("name", [*NAMES[:4], "scale-of-a-weight", "conv-groups-same"])
def test_drawn_labels_agree_among_all_answers_and_splits(name, draws):
    model, x, y = networks.doubles(name, 6)
    options = {"fisher_type": "mc", "draws": draws, "seed": 2}
    fisher, by_layer, norms, moments = measure(model, [(x, y)], WITH_MOMENTS, **options)
    assert fisher.trace() == pytest.approx(float(norms.squared_norms.mean()), rel=1e-12)
    assert fisher.stderr("trace") == pytest.approx(float(norms.squared_norms.std() / 6**0.5), rel=1e-9)
    assert close(sum(by_layer.by_layer().values()), norms.squared_norms, EXACT)
    M, mean = 6 * draws, moments.mean(dtype=torch.float64)
    expected = {k: (f - mean[k].square()) * M / (M - 1) for k, f in fisher.diagonal(dtype=torch.float64).items()}
    assert oracle.error(moments.variance(dtype=torch.float64), expected) < EXACT
    for sizes in ([1] * 6, [4, 2]):
        split = measure(model, list(zip(x.split(sizes), y.split(sizes), strict=True)), WITH_MOMENTS, **options)
        assert close(split[2].squared_norms, norms.squared_norms, EXACT)
        assert split[0].stderr("trace") == pytest.approx(fisher.stderr("trace"), rel=1e-9)
        assert oracle.error(split[3].variance(dtype=torch.float64), expected) < EXACT
    alone = measure(model, [(x, y)], (ff.PerSampleNorm(),), **options)[0]
    assert close(alone.squared_norms, norms.squared_norms, EXACT) and not alone.squared_norms.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_moments_match_autograd(name):
    model, x, y = networks.doubles(name, 6)
    gradients = [pairs[0][1] for pairs in sample_gradients(model, x, y)]
    (moments,) = measure(model, [(x[:4], y[:4]), (x[4:], y[4:])], (ff.GradientMoments(),), fisher_type="empirical")
    stacked = {k: torch.stack([g[k] for g in gradients]) for k in gradients[0]}
    mean = {k: s.mean(0) for k, s in stacked.items()}
    assert oracle.error(moments.mean(dtype=torch.float64), mean) < EXACT
    assert oracle.error(moments.variance(dtype=torch.float64), {k: s.var(0) for k, s in stacked.items()}) < EXACT
    # McCandlish et al., appendix A.1, with batches of 1 and N samples
    small, big = sum(float(s.square().sum()) for s in stacked.values()) / 6, sum(float(m.square().sum()) for m in mean.values())
    signal, noise = (6 * big - small) / 5, (small - big) / (1 - 1 / 6)
    assert moments.noise() == pytest.approx(noise, rel=1e-10)
    assert moments.signal() == pytest.approx(signal, rel=1e-9, abs=1e-12 * big)
    assert moments.noise_scale() == (pytest.approx(noise / signal, rel=1e-9) if signal > 0 else math.inf)


def test_what_has_no_meaning_is_refused():
    model, x, y = networks.doubles("mlp-inplace-relu", 6)
    with pytest.raises(ValueError, match="GradientMoments: fisher_type must be 'empirical' or 'mc', got 'exact'"):
        measure(model, [(x, y)], (ff.GradientMoments(),), fisher_type="exact")
    with pytest.raises(ValueError, match="GradientMoments: fisher_type"):
        ff.collect(model, ff.GradientMoments(), fisher_type="exact")
    fisher, moments, norms = measure(model, [(x, y)], (ff.Diagonal(stderr=False), ff.GradientMoments(), ff.PerSampleNorm()))
    with pytest.raises(ValueError, match="expectation zero"):
        moments.noise_scale()
    with pytest.raises(ValueError, match="must have been recorded, got none"):
        fisher.stderr("trace")
    with pytest.raises(ValueError, match=r"ask for ff\.PerSampleNorm\(by_layer=True\)"):
        norms.by_layer()
    with pytest.raises(ValueError, match="must be of 'trace' or 'by_layer', got 'logdet'"):
        measure(model, [(x, y)]).stderr("logdet")
    with pytest.raises(ValueError, match="at least two samples"):
        measure(model, [(x[:1], y[:1])]).stderr("trace")
    with pytest.raises(ValueError, match="must have at least two sample gradients"):
        measure(model, [(x[:1], y[:1])], (ff.GradientMoments(),))[0].variance()
    with pytest.raises(ValueError, match="must have been recorded, got none"):
        ff.DiagonalFisher({"w": torch.ones(3)}, num_samples=2).stderr("trace")
    with pytest.raises(ValueError, match="structure must be one of"):
        measure(model, [(x, y)], ())


def test_standard_error_covers_the_truth():
    model, _, _ = networks.doubles("mlp-inplace-relu", 6)
    truth = measure(model, [(torch.randn(50_000, 3).double(), None)], fisher_type="exact").trace()
    drawn = [measure(model, [(torch.randn(200, 3).double(), None)], seed=seed) for seed in range(100)]
    deviations = torch.tensor([(F.trace() - truth) / F.stderr("trace") for F in drawn])
    assert 0.6 < float(deviations.square().mean()) < 1.6  # of expectation 1; four standard deviations of a chi^2 with 100


# -- weights, on the engine itself


def weighted_engine(structures, weight, x, g, chunks=None, passes=1):
    model = nn.Linear(x.shape[-1], g.shape[-1], bias=False).double()
    capture = Capture(model)
    (tracked,) = capture.tracked.values()
    engine = Engine(capture, structures)
    engine.begin(Samples(len(x), passes, weight))
    for number in range(passes):
        if chunks is None:
            engine.add(tracked, MatMul(), Rows(x, g), 1 / passes, number)
        else:
            first = 0
            for a, b in zip(x.split(chunks), g.split(chunks), strict=True):
                engine.add_gradients(tracked, b.mT @ a, first, 1 / passes, number)
                first += len(a)
    assert engine.settle(True) == []
    return engine


@pytest.mark.parametrize("chunks", [None, [5], [2, 3]], ids=str)
@pytest.mark.parametrize("passes", [1, 2])
def test_integer_weights_are_repeated_samples(chunks, passes):
    x, g = torch.randn(5, 3, 4).double(), torch.randn(5, 3, 7).double()
    times = torch.tensor([1, 3, 0, 2, 1])
    engine = weighted_engine(WITH_MOMENTS, times.float(), x, g, chunks, passes)
    again = weighted_engine(WITH_MOMENTS, None, x.repeat_interleave(times, 0), g.repeat_interleave(times, 0), None, passes)
    for mine, other in ((engine.squares, again.squares), (engine.totals, again.totals)):
        assert mine["weight"].weight == other["weight"].weight == 7
        assert close(mine["weight"].snapshot().mean(), other["weight"].snapshot().mean(), EXACT)
    t = (g.mT @ x).flatten(1).square().sum(1)
    assert close(engine.values.norms().sum(0), t, EXACT)  # unweighted
    assert engine.squared_weights["weight"] == float(times.square().sum()) / passes
    spread, w = engine.values.spread(), times.double()
    mean = (w * t).sum() / w.sum()
    assert spread.stderr()[None] == pytest.approx(
        float(((w * (t - mean)).square().sum() / (w.sum() ** 2 - w.square().sum())).sqrt()), rel=1e-9
    )


@pytest.mark.parametrize("name", ["mlp-inplace-relu", "embedding", "tied-embedding-and-head", "weight-norm", "experts"])
def test_weights_of_the_data_are_repeated_samples(name):
    model, x, y = networks.doubles(name, 6)
    times = torch.tensor([1, 3, 0, 2, 1, 2])
    data = [(x[:4], y[:4], times[:4].float()), (x[4:], y[4:], times[4:].float())]
    repeated = (x.repeat_interleave(times, 0), y.repeat_interleave(times, 0))
    fisher, _, norms, moments = measure(model, data, WITH_MOMENTS, fisher_type="empirical")
    again, _, _, expected = measure(model, [repeated], WITH_MOMENTS, fisher_type="empirical")
    assert oracle.error(fisher.diagonal(dtype=torch.float64), again.diagonal(dtype=torch.float64)) < EXACT
    assert oracle.error(moments.mean(dtype=torch.float64), expected.mean(dtype=torch.float64)) < EXACT
    assert close(
        norms.squared_norms, measure(model, [(x, y)], (ff.PerSampleNorm(),), fisher_type="empirical")[0].squared_norms, EXACT
    )
    assert fisher.num_samples == 6 and fisher.stderr("trace") > 0
    assert fisher.trace() == pytest.approx(float((times * norms.squared_norms).sum() / times.sum()), rel=1e-12)


def test_equal_weights_change_nothing():
    x, g = torch.randn(5, 3, 4).double(), torch.randn(5, 3, 7).double()
    one, two = (weighted_engine(WITH_MOMENTS, w, x, g) for w in (None, torch.full((5,), 2.0)))
    assert one.values.spread().stderr() == pytest.approx(two.values.spread().stderr(), rel=1e-12)
    assert close(one.totals["weight"].snapshot().mean(), two.totals["weight"].snapshot().mean(), EXACT)


def everything(engine):
    sums = [engine.squares["weight"].snapshot().sum, engine.totals["weight"].snapshot().sum]
    return [*sums, engine.values.norms(), engine.values.spread().sums]


def test_a_staged_batch_that_does_not_complete_adds_nothing():
    x, g = torch.randn(5, 3, 4).double(), torch.randn(5, 3, 7).double()
    engine = weighted_engine(WITH_MOMENTS, None, x, g, passes=2)
    before = everything(engine)
    capture = Capture(nn.Linear(4, 7, bias=False).double())
    (tracked,) = capture.tracked.values()
    for bad in (False, True):
        engine.begin(Samples(5, 2))
        engine.add(tracked, MatMul(), Rows(x, g * (float("nan") if bad else 1.0)), 0.5, 0)
        assert engine.settle(complete=bad) == (["weight"] if bad else [])
    assert all(torch.equal(a, b) for a, b in zip(before, everything(engine), strict=True))


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 0.5, 2.0, 1.5])], ids=["", "weighted"])
def test_a_copy_of_a_spread_goes_on_by_itself(weight):
    spread, t = Spread.zeros(("a", "b"), torch.device("cpu")), torch.rand(2, 4).double()
    before = spread.add(t, weight).stderr()
    assert spread.copy().add(2 * t, weight).stderr() != before
    assert spread.stderr() == before


# -- ghost norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_ghost_norms(dtype):
    rows = Rows(torch.randn(5, 1, 37).to(dtype), torch.randn(5, 1, 41).to(dtype))
    assert ghost.applies(MatMul(), rows)
    expected = (rows.g.double().mT @ rows.x.double()).square().sum((1, 2))
    result = ghost.squared_norms(rows)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert close(result.double(), expected, 1e-12 if dtype == torch.float64 else 1e-6)


def test_ghost_norms_of_one_position_only():
    assert not ghost.applies(MatMul(), Rows(torch.randn(2, 9, 4), torch.randn(2, 9, 4)))
    assert not ghost.applies(MatMul(), Rows(torch.randn(9, 4), torch.randn(9, 4), torch.tensor([0, 9])))


def test_not_finite_is_seen_by_norms_alone():
    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("nan")

    model, x, y = networks.doubles("mlp-inplace-relu", 6)
    with ff.collect(model, ff.PerSampleNorm()) as stats:
        stats.backward(F.cross_entropy(model(x), y, reduction="none"))
        with pytest.raises(ff.NonFiniteError, match=r"first at '2\.(weight|bias)'") as caught:
            stats.backward(Poisoned.apply(F.cross_entropy(model(x), y, reduction="none")))
    assert caught.value.fisher.num_samples == 6 and torch.isfinite(caught.value.fisher.squared_norms).all()


# -- collect


def test_results_come_in_the_order_asked():
    model, x, y = networks.doubles("layer-norm", 6)
    with ff.collect(model, ff.PerSampleNorm(), ff.GradientMoments(), ff.Diagonal()) as stats:
        for part in (slice(0, 2), slice(2, 6)):
            stats.backward(F.cross_entropy(model(x[part]).mT, y[part], reduction="none").sum(1))
    norms, moments, fisher = stats.results()
    assert isinstance(norms, ff.SampleNorms) and isinstance(moments, ff.SampleMoments) and isinstance(fisher, ff.DiagonalFisher)
    assert close(norms.squared_norms, sum(layer_norms(sample_gradients(model, x, y)).values()), EXACT)
    assert fisher.stderr("trace") == pytest.approx(float(norms.squared_norms.std() / 6**0.5), rel=1e-9)


UNEQUAL = partial(pytest.warns, ff.FisherWarning, match="collect: every batch must have as many backward passes as the others")


@pytest.mark.parametrize("draws", [(1, 1), (2, 2), (2, 1), (1, 3)])
def test_batches_of_unequal_draws_are_said(draws, recwarn):
    model, x, y = networks.doubles("mlp-inplace-relu", 6)
    with ff.collect(model, ff.Diagonal(), fisher_type="mc") as stats:
        for batch, number in zip((slice(0, 2), slice(2, 6)), draws, strict=True):
            logits = model(x[batch])
            for _ in range(number):
                stats.backward(F.cross_entropy(logits, y[batch], reduction="none"), retain_graph=True)
    assert stats.result().num_samples == 6
    assert len(recwarn) == (len(set(draws)) > 1)


def collected_tokens(batches, losses_of, by_name=False):
    """Over a small causal model on ``[5, 7]`` ids; ``losses_of``: what becomes of the losses ``[5, 6]``."""
    model, ids = nn.Sequential(nn.Embedding(11, 4), nn.Tanh(), nn.Linear(4, 11)), torch.randint(0, 11, (5, 7))
    with ff.collect(model, ff.Diagonal()) as stats:
        for _ in range(batches):
            logits = model(input=ids) if by_name else model(ids)
            losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
            stats.backward(losses_of(losses))
    return stats.result()


@pytest.mark.parametrize("by_name", [False, True])
def test_losses_of_positions_are_said_once(by_name):
    with pytest.warns(ff.FisherWarning, match=r"got 30 for inputs of 5; .* losses\.view\(5, -1\)\.sum\(1\)") as caught:
        found = collected_tokens(3, torch.flatten, by_name)
    assert len(caught) == 1 and found.num_samples == 90


def test_losses_of_samples_are_taken_as_they_are(recwarn):
    assert collected_tokens(2, lambda losses: losses.sum(1)).num_samples == 10
    model, x, y = nn.Linear(3, 4), torch.randn(6, 3), torch.randint(0, 4, (6,))

    def losses(first, last):
        return F.cross_entropy(model(x[first:last]), y[first:last], reduction="none")

    with ff.collect(model, ff.Diagonal()) as stats:
        stats.backward(torch.cat([losses(0, 2), losses(2, 4), losses(4, 6)]))  # several calls make one batch
    recurrent = nn.LSTM(3, 4)  # time first
    with ff.collect(recurrent, ff.Diagonal()) as stats:
        stats.backward(recurrent(torch.randn(2, 6, 3))[0].square().sum((0, 2)))
    assert not recwarn.list


def test_backwards_through_one_forward_are_draws_of_its_samples():
    model, x, y = networks.doubles("mlp-inplace-relu", 6)
    drawn = [torch.randint(0, 4, (6,)) for _ in range(3)]
    with ff.collect(model, ff.PerSampleNorm(), ff.Diagonal(), fisher_type="mc") as stats:
        stats.backward(F.cross_entropy(model(x[:2]), y[:2], reduction="none"))
        logits = model(x)
        for number, labels in enumerate(drawn):
            stats.backward(F.cross_entropy(logits, labels, reduction="none"), retain_graph=number < 2)
        with UNEQUAL():
            halfway = stats.results()[0]
        stats.backward(F.cross_entropy(model(x[3:]), y[3:], reduction="none"))
    first, last = (sum(layer_norms(sample_gradients(model, x[s], y[s])).values()) for s in (slice(0, 2), slice(3, 6)))
    middle = torch.stack([sum(layer_norms(sample_gradients(model, x, labels)).values()) for labels in drawn]).mean(0)
    with UNEQUAL():
        norms, fisher = stats.results()
    assert close(halfway.squared_norms, torch.cat([first, middle]), EXACT)
    expected = torch.cat([first, middle, last])
    assert close(norms.squared_norms, expected, EXACT) and fisher.num_samples == 11
    assert fisher.stderr("trace") == pytest.approx(float(expected.std() / 11**0.5), rel=1e-9)


def test_draws_of_interleaved_forwards_are_not_guessed():
    model, x, y = networks.doubles("mlp-inplace-relu", 6)
    with ff.collect(model, ff.PerSampleNorm(), ff.Diagonal(), fisher_type="mc") as stats:
        first, second = model(x), model(x)
        for logits in (first, second, first, first):
            stats.backward(F.cross_entropy(logits, y, reduction="none"), retain_graph=True)
    with UNEQUAL():
        norms, fisher = stats.results()
    with pytest.raises(ValueError, match="must follow each other"):
        len(norms.squared_norms)
    with pytest.raises(ValueError, match="must have been recorded, got none"):
        fisher.stderr("trace")
    assert fisher.trace() > 0


# -- faults


def test_a_fault_keeps_the_samples_of_whole_batches():
    class Faulty(nn.Module):
        def forward(self, x):
            if len(x) == 5:
                raise RuntimeError("lost")
            return x

    model = nn.Sequential(nn.Linear(3, 11), Faulty(), nn.Linear(11, 4)).double()
    x, y = networks.vectors(15)
    batches = [(x[:6].double(), y[:6]), (x[6:10].double(), y[6:10]), (x[10:].double(), y[10:])]
    with pytest.raises(RuntimeError, match="lost") as caught:
        measure(model, batches, WITH_MOMENTS, fisher_type="empirical")
    whole = measure(model, batches[:2], WITH_MOMENTS, fisher_type="empirical")
    fisher, _, norms, moments = caught.value.fisher
    assert torch.equal(norms.squared_norms, whole[2].squared_norms) and fisher.stderr("trace") == whole[0].stderr("trace")
    assert oracle.error(moments.variance(), whole[3].variance()) == 0


# -- pooling, files, checkpoints


def test_parts_pool_to_the_whole():
    model, x, y = networks.doubles("embedding", 6)
    whole = measure(model, [(x, y)], WITH_MOMENTS, fisher_type="empirical")
    a, b = (measure(model, [(x[s], y[s])], WITH_MOMENTS, fisher_type="empirical") for s in (slice(0, 2), slice(2, 6)))
    fisher, by_layer, norms, moments = (first + second for first, second in zip(a, b, strict=True))
    assert fisher.stderr("trace") == pytest.approx(whole[0].stderr("trace"), rel=1e-9)
    assert fisher.stderr("by_layer") == pytest.approx(whole[0].stderr("by_layer"), rel=1e-9)
    assert close(norms.squared_norms, whole[2].squared_norms, EXACT) and norms.num_samples == 6
    assert all(close(v, whole[1].by_layer()[k], EXACT) for k, v in by_layer.by_layer().items())
    assert oracle.error(moments.variance(dtype=torch.float64), whole[3].variance(dtype=torch.float64)) < EXACT
    assert moments.noise_scale() == pytest.approx(whole[3].noise_scale(), rel=1e-9)
    other = measure(model, [(x, y)], (ff.PerSampleNorm(), ff.GradientMoments()))
    for mine, theirs in zip((norms, moments), other, strict=True):
        with pytest.raises(ValueError, match="same fisher_type"):
            mine + theirs


def test_a_sum_with_a_fisher_that_recorded_no_spread_has_none():
    model, x, y = networks.doubles("mlp-inplace-relu", 6)
    a, b = (measure(model, [(x[s], y[s])], fisher_type="empirical") for s in (slice(0, 2), slice(2, 6)))
    bare = ff.DiagonalFisher.from_accumulators(a.accumulators(), num_samples=2, provenance=a.provenance, aliases=a.aliases)
    for pooled in (bare + b, b + bare):
        with pytest.raises(ValueError, match="must have been recorded, got none"):
            pooled.stderr("trace")


def test_files_give_everything_back(tmp_path):
    model, x, y = networks.doubles("scale-of-a-weight", 6)
    results = measure(model, [(x, y)], WITH_MOMENTS, fisher_type="empirical")
    for number, result in enumerate(results):
        result.save(tmp_path / str(number))
        again = ff.load(tmp_path / str(number))
        (tensors, fields), (others, other_fields) = result.state(), again.state()
        assert fields == other_fields and tensors.keys() == others.keys()
        assert all(torch.equal(tensors[k], others[k]) for k in tensors)
    assert ff.load(tmp_path / "0").stderr("by_layer") == results[0].stderr("by_layer")
    assert ff.load(tmp_path / "0").coverage.share_of_time() == results[0].coverage.share_of_time()
    serialize.save(serialize.Several(results), tmp_path / "all")
    assert [type(r) for r in ff.load(tmp_path / "all")] == [type(r) for r in results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("structure", ["diagonal", WITH_MOMENTS], ids=["diagonal", "everything"])
def test_checkpoint_resumes_to_the_same_numbers(structure, dtype, tmp_path):
    class Faulty(nn.Module):
        on = True

        def forward(self, x):
            if self.on and len(x) == 5:
                raise RuntimeError("power cut")
            return x

    model = nn.Sequential(nn.Linear(3, 11), Faulty(), nn.Linear(11, 4)).to(dtype)
    model.register_parameter("idle", nn.Parameter(torch.ones(3)))
    x, y = networks.vectors(17)
    batches = [(a.to(dtype), b) for a, b in zip(x.split([6, 4, 5, 2]), y.split([6, 4, 5, 2]), strict=True)]
    options = {"draws": 2, "allow_missing": True, "checkpoint": tmp_path / "run"}
    with pytest.raises(RuntimeError, match="power cut"):
        measure(model, batches, structure, **options)
    model[1].on = False
    with pytest.raises(ValueError, match="must be of the same measurement"):
        measure(model, batches, (ff.Diagonal(stderr=False),), **options)
    resumed = measure(model, batches, structure, **options)
    whole = measure(model, batches, structure, draws=2, allow_missing=True)
    if structure == "diagonal":
        resumed, whole = (resumed,), (whole,)
    assert resumed[0].num_samples == 17
    assert resumed[0].stderr("by_layer") == pytest.approx(
        whole[0].stderr("by_layer"), rel=1e-9 if dtype == torch.float64 else 1e-5
    )
    if structure != "diagonal":
        assert all(torch.equal(a.squared_norms, b.squared_norms) for a, b in zip(resumed[1:3], whole[1:3], strict=True))
        assert oracle.error(resumed[3].variance(), whole[3].variance()) < 1e-6


RANK = """
    import sys, torch, torch.distributed as dist, fisherfast as ff
    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, x, y = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)), torch.randn(7, 3), torch.randint(4, (7,))
    part = slice(0, 3) if rank == 0 else slice(3, 7)
    fisher, moments = ff.fisher(
        model, [(x[part], y[part])], (ff.Diagonal(), ff.GradientMoments()), fisher_type="empirical", progress=False)
    fisher.all_reduce().save(f"{folder}/fisher{rank}")
    moments.all_reduce().save(f"{folder}/moments{rank}")
    bare = ff.DiagonalFisher.from_accumulators(fisher.accumulators(), num_samples=7, spread=fisher.spread if rank else None)
    bare.all_reduce().save(f"{folder}/bare{rank}")
    if rank == 0:
        whole = ff.fisher(model, [(x, y)], (ff.Diagonal(), ff.GradientMoments()), fisher_type="empirical", progress=False)
        whole[0].save(f"{folder}/fisher"), whole[1].save(f"{folder}/moments")
    dist.destroy_process_group()
"""


def test_ranks_pool_to_the_whole(tmp_path):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(RANK)]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    fisher, moments = ff.load(tmp_path / "fisher"), ff.load(tmp_path / "moments")
    for rank in range(2):
        pooled, pooled_moments = ff.load(tmp_path / f"fisher{rank}"), ff.load(tmp_path / f"moments{rank}")
        assert pooled.stderr("trace") == pytest.approx(fisher.stderr("trace"), rel=1e-6)
        assert pooled.stderr("by_layer") == pytest.approx(fisher.stderr("by_layer"), rel=1e-6)
        assert pooled_moments.noise_scale() == pytest.approx(moments.noise_scale(), rel=1e-4)
        assert pooled_moments.num_samples == 7 and oracle.error(pooled_moments.variance(), moments.variance()) < 1e-5
        with pytest.raises(ValueError, match="must have been recorded, got none"):
            ff.load(tmp_path / f"bare{rank}").stderr("trace")


# -- coverage


def test_coverage_is_a_dictionary_with_shares():
    model, x, y = networks.doubles("tied-embedding-and-head", 6)
    model.register_parameter("idle", nn.Parameter(torch.ones(17).double()))
    fisher = measure(model, [(x, y)], allow_missing=True)
    coverage, sizes = fisher.coverage, {name: p.numel() for name, p in model.named_parameters()}
    assert isinstance(coverage, ff.Coverage) and coverage == dict(coverage) and set(coverage) == set(sizes)
    shares = coverage.share_of_parameters()
    assert sum(shares.values()) == pytest.approx(1) and shares["missing"] == pytest.approx(17 / sum(sizes.values()))
    assert shares["linear_sq_"] >= 121 / sum(sizes.values())
    assert sum(coverage.share_of_time().values()) == pytest.approx(1) and OPS in coverage.share_of_time()
    table = str(coverage)
    assert "linear_sq_" in table and "missing" in table and "idle: missing" in table and "%" in table
    assert copy.deepcopy(coverage).sizes == coverage.sizes


def test_coverage_of_pooled_runs():
    one = ff.Coverage({"a": "linear_sq_", "b": "loop: no rule for sin"}, {"a": 3, "b": 1}, {OPS: 1.0, "loop": 3.0})
    two = ff.Coverage({"a": "linear_sq_", "b": "vmap: no rule for sin"}, {"a": 3, "b": 1}, {OPS: 1.0, "vmap": 3.0})
    both = one + two
    assert both == {"a": "linear_sq_", "b": "loop: no rule for sin + vmap: no rule for sin"}
    assert both.share_of_parameters() == {"linear_sq_": 0.75, "loop + vmap": 0.25}
    assert both.share_of_time() == {"loop": 0.375, "vmap": 0.375, OPS: 0.25}
    assert one + {"a": "linear_sq_"} == one and ff.Coverage(one).seconds == one.seconds
    assert str(ff.Coverage()) and str(ff.Coverage({"a": "linear_sq_"}))
    with pytest.raises(ValueError, match="the size of every parameter must be recorded, got none for 'a'"):
        ff.Coverage({"a": "linear_sq_"}).share_of_parameters()


@pytest.mark.parametrize(
    ("how", "way"),
    [
        ("linear_sq_", "linear_sq_"),
        ("linear_sq_ + embedding_sq_", "linear_sq_ + embedding_sq_"),
        ("loop: one tensor used in different forms (linear_sq_ + embedding_sq_ and scale_sq_)", "loop"),
        ("loop: no rule for sin (vmap cannot, ValueError: a + b) + vmap: no rule for sin", "loop + vmap"),
        ("scale_sq_ + loop: why: because", "scale_sq_ + loop"),
        ("missing: the loss does not depend on it", "missing"),
    ],
)
def test_ways_leave_out_the_reasons(how, way):
    assert ff.Coverage({"w": how}).ways == {"w": way}


def test_stopwatch_charges_the_inner_way(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    watch = Stopwatch(torch.device("cpu"))
    with watch.timed(OPS):
        now[0] += 1
        with watch.timed("loop"):
            now[0] += 2
        now[0] += 4
        assert watch.seconds() == {OPS: 5.0, "loop": 2.0}
    now[0] += 8
    assert watch.seconds() == {OPS: 5.0, "loop": 2.0}


@pytest.mark.parametrize(
    "part", [lambda v: v[:2], lambda v: v[torch.tensor([0, 3])], lambda v: v.split(2)[0], lambda v: v[v > -1][:3]]
)
def test_a_part_of_a_forward_passes_losses_is_said_once(part):
    model, x, y = nn.Linear(3, 4), torch.randn(6, 3), torch.randint(4, (6,))
    with ff.collect(model, ff.KFAC(), fisher_type="empirical") as stats:
        with pytest.warns(
            ff.FisherWarning, match=r"should hold all samples of a forward pass, got a part of a vector, [23] of 6"
        ):
            stats.backward(part(F.cross_entropy(model(x), y, reduction="none")))
        stats.backward(part(F.cross_entropy(model(x), y, reduction="none")))  # warnings are errors


@pytest.mark.parametrize(
    "whole",
    [
        lambda v: v,
        lambda v: 2 * v,
        lambda v: v[torch.arange(6).flip(0)],
        lambda v: v.view(3, 2).sum(1),
        lambda v: v.view(3, 2)[:, 0],
    ],
)
def test_all_losses_of_a_forward_pass_are_no_part(whole):
    model, x, y = nn.Linear(3, 4), torch.randn(6, 3), torch.randint(4, (6,))
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        stats.backward(whole(F.cross_entropy(model(x), y, reduction="none")))
    assert stats.result().trace() > 0


def test_one_loss_and_lists_of_inputs_are_no_mistakes():
    model, x = nn.Linear(3, 4), torch.randn(6, 3)
    with ff.collect(model, ff.KFAC(), fisher_type="empirical") as stats:
        stats.backward(model(x[:1]).square()[0].sum(0, keepdim=True))
    listed = networks.Wrapped(lambda m, parts: m.layer(torch.stack(parts)), layer=nn.Linear(3, 4))
    with ff.collect(listed, ff.Diagonal(), fisher_type="empirical") as stats:
        stats.backward(listed(list(x)).square().sum(1))
    assert stats.result().num_samples == 6


def test_parts_of_one_forward_pass_are_said_from_the_second_on():
    model, x = nn.Linear(3, 4), torch.randn(6, 3)
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        first, second = model(x).square().sum(1).split(3)
        stats.backward(first, retain_graph=True)
        with pytest.warns(ff.FisherWarning, match="got a part of a vector, 3 of 6"):
            stats.backward(second)
