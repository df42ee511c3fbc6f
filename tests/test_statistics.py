# SPDX-License-Identifier: Apache-2.0
"""One pass, many answers: norms, moments and standard errors, each against autograd's sample gradients."""

import math

import networks
import oracle
import pytest
import torch
import torch.nn.functional as F
from asked import EVERYTHING, WITH_MOMENTS, measure
from oracle import close
from torch import nn

import fisherfast as ff
from fisherfast.fisher.run import fallback

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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fisher_type", ["empirical", "exact"])
@pytest.mark.parametrize("sizes", [[6], [4, 2]], ids=str)
def test_norms_and_standard_errors_match_autograd(name, fisher_type, sizes):
    model, x, y = networks.doubles(name, 6)
    losses = oracle.cross_entropy if fisher_type == "empirical" else oracle.every_label
    layers = oracle.layer_norms(oracle.sample_gradients(model, x, y, losses))
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
    expected = sum(oracle.layer_norms(oracle.sample_gradients(model, x, y)).values())
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
    expected = sum(oracle.layer_norms(oracle.sample_gradients(model, x, y)).values())
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
    gradients = [pairs[0][1] for pairs in oracle.sample_gradients(model, x, y)]
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
    with pytest.raises(ValueError, match=r"what must be one of .*, got 'logdet'"):
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


def test_not_finite_is_seen_by_norms_alone():
    model, x, y = networks.doubles("mlp-inplace-relu", 6)
    with ff.collect(model, ff.PerSampleNorm()) as stats:
        stats.backward(F.cross_entropy(model(x), y, reduction="none"))
        with pytest.raises(ff.NonFiniteError, match=r"first at '2\.(weight|bias)'") as caught:
            stats.backward(networks.NaNGradient.apply(F.cross_entropy(model(x), y, reduction="none")))
    assert caught.value.fisher.num_samples == 6 and torch.isfinite(caught.value.fisher.squared_norms).all()
