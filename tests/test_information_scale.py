# SPDX-License-Identifier: Apache-2.0
"""The information in the weights of large networks: no tensor beyond a chunk, the same numbers in every split and precision."""

import math

import pytest
import torch
from allocations import Allocations
from diagonals import of_sums
from hypothesis import given, settings
from hypothesis import strategies as st

import fisherfast as ff
from fisherfast.accumulator import Accumulator
from fisherfast.fisher import Spectrum, diagonal
from fisherfast.information import _prior, _series, information_in_weights
from fisherfast.ops import _log1p

SHAPES = {"embed.weight": (500, 64), "a.weight": (64, 64), "a.bias": (64,), "norm.weight": (64,)}
CHUNK = 1 << 10  # of the tests: 32 times smaller than the embedding


@pytest.fixture(params=["cpu", "reference"])
def backend(request, monkeypatch):
    """The kernel, and plain torch in chunks as small as those of the rest."""
    monkeypatch.setattr(_log1p, "CHUNK", CHUNK)
    if request.param not in ff.ops.OPS["log1p_sum"].usable("cpu"):
        pytest.fail(f"the {request.param} backend is not built")
    with ff.backend(request.param):
        yield request.param


def network(dtype=torch.float32, seed=0):
    """Weights, and a Fisher over ten orders of magnitude whose embedding has rows that were never seen."""
    generator = torch.Generator().manual_seed(seed)
    sums, weights = {}, {}
    for name, shape in SHAPES.items():
        weights[name] = (0.1 * torch.randn(shape, generator=generator)).to(dtype)
        f = 10 ** (10 * torch.rand(shape, generator=generator, dtype=torch.float64) - 9)
        if name == "embed.weight":
            f[torch.rand(shape[0], generator=generator) < 0.4] = 0
        sums[name] = Accumulator(7 * f, 7)
    return of_sums(sums, num_samples=7), weights


@pytest.mark.parametrize("options", [{"prior_scale": 0.1}, {"prior_scale": "fit"}], ids=["given", "fit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("centered", [False, True])
def test_no_tensor_is_larger_than_a_chunk(backend, options, dtype, centered):
    F, weights = network(dtype)
    center = network(dtype, seed=1)[1] if centered else None
    with Allocations() as allocations:
        information_in_weights(F, weights, beta=1e-3, center=center, **options)
    assert 0 < allocations.largest <= CHUNK


def test_totals_of_a_diagonal_copy_nothing(monkeypatch):
    monkeypatch.setattr(diagonal, "_CHUNK", CHUNK)
    F, _ = network()
    with Allocations() as allocations:
        totals = F.trace(), F.logdet(1e-3)
        F.by_layer()
    assert 0 < allocations.largest <= CHUNK
    f = F.eigenvalues()
    assert totals == pytest.approx((f.sum().item(), (f + 1e-3).log().sum().item()), rel=1e-13)


def test_the_allocations_of_a_copy_are_seen():
    F, _ = network()
    with Allocations() as allocations:
        F.diagonal()
    assert allocations.largest == 500 * 64


@pytest.mark.parametrize("options", [{"prior_scale": 0.1}, {"prior_scale": "fit"}], ids=["given", "fit"])
def test_every_split_into_chunks_gives_the_same(monkeypatch, options):
    F, weights = network()
    whole = information_in_weights(F, weights, beta=1e-3, center=network(seed=1)[1], **options)
    for chunk in (97, 1 << 20):
        monkeypatch.setattr(_log1p, "CHUNK", chunk)
        again = information_in_weights(F, weights, beta=1e-3, center=network(seed=1)[1], **options)
        assert again.nats == pytest.approx(whole.nats, rel=1e-13)
        assert again.prior_scales == pytest.approx(whole.prior_scales, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_low_precision_are_their_values(dtype):
    F, weights = network(dtype)
    wide = {name: w.double() for name, w in weights.items()}
    low, exact = (information_in_weights(F, w, prior_scale="fit", beta=1e-3) for w in (weights, wide))
    assert (low.nats, low.prior_scales) == (exact.nats, exact.prior_scales)


def test_weights_that_are_strided_or_frozen_in_other_precisions_are_their_values():
    F, weights = network(torch.float64)
    center = {name: w.bfloat16() for name, w in weights.items()}
    plain = information_in_weights(F, weights, prior_scale=0.1, beta=1e-3, center=center)
    strided = {name: w.mT.contiguous().mT if w.dim() == 2 else w for name, w in weights.items()}
    assert information_in_weights(F, strided, prior_scale=0.1, beta=1e-3, center=center).nats == plain.nats
    exact = sum((w - center[name].double()).square().sum().item() for name, w in weights.items())
    assert sum(x.squared_distance for x in plain.by_layer().values()) == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize("wrong", [torch.int64, torch.bool, torch.complex64])
def test_rejects_weights_that_are_no_real_numbers(wrong):
    F, weights = network()
    bad = weights | {"a.bias": torch.ones(64).to(wrong)}
    with pytest.raises(ValueError, match=rf"model\['a.bias'\] must be floating, got {wrong}"):
        information_in_weights(F, bad, prior_scale=0.1, beta=1e-3)
    with pytest.raises(ValueError, match=rf"center\['a.bias'\] must be floating, got {wrong}"):
        information_in_weights(F, weights, prior_scale=0.1, beta=1e-3, center=bad)


FACTORS = (
    lambda f: (f,),
    lambda f: (f, f[-1:]),
    lambda f: (f[-1:], f),
    lambda f: (f[:60], f[-40:]),
    lambda f: (f[:9], f[40:49], f[-10:]),
)


@pytest.mark.parametrize("divisor", [1.0, 7.0])
@pytest.mark.parametrize("factors", FACTORS, ids=["one", "and a number", "a number and", "Kronecker", "three"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e9])
def test_the_kernel_sums_what_the_terms_say(backend, factors, scale, divisor):
    f = torch.logspace(-20, 2, 3001, dtype=torch.float64)
    spectrum = Spectrum("", ("w",), factors(f), zeros=5, divisor=divisor)
    s = scale * spectrum.eigenvalues()
    plain = _log1p.cost(s).sum().item(), _log1p.share(s).sum().item()
    assert _series.sum_over(spectrum, scale, _log1p.cost, _log1p.share) == pytest.approx(plain, rel=1e-13)
    expected = _series.sum_over(spectrum, scale, _log1p.cost, _log1p.share)
    assert _series.costs_and_shares(spectrum, scale) == pytest.approx(expected, rel=1e-12)


def newton(f, distance, temperature):
    """The fitted lambda by Newton's method on all entries at once, until it stands still."""
    x = math.log(distance / len(f))
    for _ in range(200):
        s = math.exp(x) * f / temperature
        u = s / (1 + s)
        step = (x + math.log(u.sum()) - math.log(distance)) / (2 - u.square().sum() / u.sum()).item()
        x -= step
        if abs(step) < 1e-13:
            break
    return math.exp(x / 2)


@settings(max_examples=60, deadline=None)
@given(
    spread=st.floats(0, 12),
    middle=st.floats(-12, 6),
    zeros=st.sampled_from([0.0, 0.5, 0.99]),
    distance=st.floats(-12, 6),
    temperature=st.floats(-9, 3),
    seed=st.integers(0, 99),
)
def test_fit_from_a_sample_is_the_root(spread, middle, zeros, distance, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    f = 10 ** (middle + spread * (torch.rand(2000, generator=generator, dtype=torch.float64) - 0.5))
    f[1:][torch.rand(1999, generator=generator) < zeros] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_series, "_SAMPLE", 64)
        got = _prior.fitted("fit", [Spectrum("", ("w",), (f,))], 10**distance, 10**temperature)
    assert got == pytest.approx(newton(f, 10**distance, 10**temperature), rel=1e-11)


def test_fit_reads_all_of_a_large_block_a_few_times(monkeypatch):
    f = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul_(5).sub_(18).exp_()
    monkeypatch.setattr(_series, "_SAMPLE", 4000)
    reads = []
    original = _series.costs_and_shares
    monkeypatch.setattr(_series, "costs_and_shares", lambda s, c: reads.append(s.num_parameters) or original(s, c))
    got = _prior.fitted("fit", [Spectrum("", ("w",), (f,))], 100.0, 1e-3)
    assert got == pytest.approx(newton(f, 100.0, 1e-3), rel=1e-12)
    assert reads.count(400_000) <= 5


def test_fit_does_without_a_sample_that_is_all_zero(monkeypatch):
    f = torch.zeros(1000, dtype=torch.float64)
    f[1::2] = torch.logspace(-6, 0, 500, dtype=torch.float64)  # every second, where the sample is not
    monkeypatch.setattr(_series, "_SAMPLE", 500)
    assert not _series.thinned(Spectrum("", ("w",), (f,)))[0].factors[0].any()
    got = _prior.fitted("fit", [Spectrum("", ("w",), (f,))], 3.0, 1e-3)
    assert got == pytest.approx(newton(f, 3.0, 1e-3), rel=1e-12)


@pytest.mark.parametrize("factors", FACTORS)
def test_thinning_keeps_the_count(monkeypatch, factors):
    spectrum = Spectrum("", ("w",), factors(torch.rand(3001, dtype=torch.float64)))
    monkeypatch.setattr(_series, "_SAMPLE", 100)
    few, times = _series.thinned(spectrum)
    assert few.num_parameters * times == pytest.approx(spectrum.num_parameters)
    assert few.num_parameters < spectrum.num_parameters


def test_layers_add_up_at_any_size():
    # A network whose layer is split into two of half the rows holds the same nats at a common scale.
    F, weights = network()
    whole = information_in_weights(F, weights, prior_scale=0.1, beta=1e-3)
    halves, sums = {}, {}
    for name, w in weights.items():
        total = F.accumulators()[name].sum
        for i, rows in enumerate((slice(0, w.shape[0] // 2), slice(w.shape[0] // 2, None))):
            halves[f"{name}{i}"], sums[f"{name}{i}"] = w[rows], Accumulator(total[rows], 7)
    split = of_sums(sums, num_samples=7)
    assert information_in_weights(split, halves, prior_scale=0.1, beta=1e-3).nats == pytest.approx(whole.nats, rel=1e-13)
    assert split.trace() == pytest.approx(F.trace(), rel=1e-13)


def test_restricted_noise_costs_more():
    # The diagonal's Q is the best that is independent in the weights, EKFAC's along its eigenvectors, gram's the best of all.
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    data = [(torch.randn(40, 6), None)]
    rises = {}
    for structure in ("gram", "ekfac", "diagonal"):
        F = ff.fisher(model, data, structure, fisher_type="exact", progress=False)
        rises[structure] = information_in_weights(F, model, prior_scale=0.5, beta=1 / 40).lagrangian_rise
    assert rises["gram"] < rises["ekfac"] and rises["gram"] < rises["diagonal"]
