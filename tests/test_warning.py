# SPDX-License-Identifier: Apache-2.0
"""A FisherWarning points at the line of the user's by which the library was called."""

import warnings

import pytest
import torch
from torch import nn

import fisherfast as ff

MODEL, X, Y = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(0, 3, (6,))
SMOOTHED = ff.Categorical(label_smoothing=0.1)
FLAT = ff.DiagonalFisher({"w": torch.zeros(3)}, 3)
PARTIAL = ff.DiagonalFisher({"weight": torch.ones(3, 4)}, 3, coverage={"weight": "linear_sq_", "bias": "missing: left out"})
CALLS = {
    "fisher": lambda: ff.fisher(MODEL, [(X, Y)], likelihood=SMOOTHED, progress=False),
    "two passes": lambda: ff.fisher(MODEL, [(X, Y)], "ekfac", likelihood=SMOOTHED, progress=False),
    "plan": lambda: ff.plan(MODEL, (X, Y), likelihood=SMOOTHED),
    "operator": lambda: ff.FisherOperator(MODEL, [(X, Y)], likelihood=SMOOTHED),
    "no labels": lambda: ff.fisher(MODEL, [(X, torch.full((6,), -100))], fisher_type="empirical", progress=False),
    "logdet": lambda: FLAT.logdet(),
    "free energy": lambda: ff.free_energy(FLAT, 1.0, temperature=1.0, damping=0.0),
    "information": lambda: ff.information_in_weights(PARTIAL, {"weight": torch.ones(3, 4)}, prior_scale=1.0, beta=0.1),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_points_at_the_callers_line(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    places = {(one.filename, one.lineno) for one in caught if issubclass(one.category, ff.FisherWarning)}
    assert places == {(__file__, call.__code__.co_firstlineno)}
