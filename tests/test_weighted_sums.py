# SPDX-License-Identifier: Apache-2.0
"""The engine's sums: a weight is that many samples, a batch counts whole or not at all, and norms need no gradient."""

import networks
import oracle
import pytest
import torch
from asked import WITH_MOMENTS, measure
from oracle import close
from torch import nn

import fisherfast as ff
from fisherfast.capture.capture import Capture
from fisherfast.capture.collector import Samples
from fisherfast.fisher.engine import Engine
from fisherfast.fisher.spread import Spread
from fisherfast.rules import MatMul, Rows

EXACT = 1e-11


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


class Fails(MatMul):
    """Adds, and then fails."""

    def accumulate(self, acc, rows, scale, **outputs):
        super().accumulate(acc, rows, scale, **outputs)
        raise MemoryError


def test_what_a_staged_batch_added_before_it_failed_is_not_in_the_next_one():
    x, g = torch.randn(5, 3, 4).double(), torch.randn(5, 3, 7).double()
    engine, once = (weighted_engine(WITH_MOMENTS, None, x, g, passes=2) for _ in range(2))
    (tracked,) = Capture(nn.Linear(4, 7, bias=False).double()).tracked.values()
    engine.begin(Samples(5, 2))
    with pytest.raises(MemoryError):
        engine.add(tracked, Fails(), Rows(x, g), 0.5, 0)
    engine.settle(complete=False)
    engine.begin(Samples(5, 2))
    for number in range(2):
        engine.add(tracked, MatMul(), Rows(x, g), 0.5, number)
    assert engine.settle(complete=True) == []
    for mine, other in ((engine.squares, once.squares), (engine.totals, once.totals)):
        assert mine["weight"].weight == 10
        assert close(mine["weight"].snapshot().mean(), other["weight"].snapshot().mean(), EXACT)


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 0.5, 2.0, 1.5])], ids=["", "weighted"])
def test_a_copy_of_a_spread_goes_on_by_itself(weight):
    spread, t = Spread.zeros(("a", "b"), torch.device("cpu")), torch.rand(2, 4).double()
    before = spread.add(t, weight).stderr()
    assert spread.copy().add(2 * t, weight).stderr() != before
    assert spread.stderr() == before
