# SPDX-License-Identifier: Apache-2.0
"""``F.coverage``: how each parameter was measured, and what share of the numbers and of the time each way took."""

import copy

import networks
import pytest
import torch
from asked import measure
from torch import nn

import fisherfast as ff
from fisherfast.fisher.coverage import OPS, Stopwatch


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
