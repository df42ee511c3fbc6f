# SPDX-License-Identifier: Apache-2.0
"""Whatever does not fit a Fisher is refused, and the message names the entry, the rule and what was given."""

import math

import pytest
import torch
from diagonals import SHAPES, example, of_sums

from fisherfast.accumulator import Accumulator
from fisherfast.fisher import DiagonalFisher


def flat(v):
    return torch.cat([part.flatten() for part in v.values()])


def vector():
    return {name: torch.ones(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    ("diagonal", "samples", "kwargs", "error", "reason"),
    [
        ({"a.w": torch.tensor([1.0, -1.0])}, 1, {}, ValueError, r"'a\.w' must be >= 0, got 1 negative"),
        ({"a.w": torch.tensor([math.nan, 1.0, math.inf])}, 1, {}, ValueError, r"'a\.w' must be finite, got 2 entries"),
        ({"a.w": torch.tensor([1])}, 1, {}, TypeError, r"'a\.w' must be a floating tensor, got torch\.int64"),
        ({"a.w": [1.0]}, 1, {}, TypeError, r"'a\.w' must be a floating tensor, got list"),
        ({}, 1, {}, ValueError, "at least one parameter"),
        ({"w": torch.ones(1)}, 0, {}, ValueError, "num_samples must be >= 1, got 0"),
        ({"w": torch.ones(1)}, 1.5, {}, ValueError, "num_samples must be an integer, got 1.5"),
        ({"w": torch.ones(1)}, 1, {"num_positions": -1}, ValueError, "num_positions must be >= 0, got -1"),
        ({"w": torch.ones(1)}, 1, {"aliases": {"tied": "v"}}, ValueError, r"aliases must map .* got 'tied': 'v'"),
        ({"w": torch.ones(1), "v": torch.ones(1)}, 1, {"aliases": {"w": "v"}}, ValueError, r"aliases must map .* got 'w': 'v'"),
    ],
)
def test_rejects_entries(diagonal, samples, kwargs, error, reason):
    with pytest.raises(error, match=reason):
        DiagonalFisher(diagonal, samples, **kwargs)


def test_rejects_one_sum_under_two_names():
    total = Accumulator(torch.ones(3), 1)
    with pytest.raises(ValueError, match="got one tensor for 'a' and 'b'; pass it once, with the other name in aliases"):
        of_sums({"a": total, "b": total}, num_samples=1)
    empty = Accumulator.zeros((0,))
    assert of_sums({"a": empty, "b": empty, "c": total}, num_samples=1).num_parameters == 3


@pytest.mark.parametrize("method", ["F @ v", "solve"])
@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (lambda v: v | {"tail.weight": torch.ones(1)}, ValueError, r"names of F only, got \['tail\.weight'\]"),
        (
            lambda v: {"scale": v["scale"]},
            ValueError,
            r"must have every name of F, got none for \['body\.0\.bias', 'body\.0\.weight', 'head\.weight'\]; pass zeros there",
        ),
        (lambda v: v | {"head.weight": torch.ones(5, 2)}, ValueError, r"v\['head\.weight'\] must be \(2, 5\), got \(5, 2\)"),
        (
            lambda v: v | {"scale": torch.ones(7, dtype=torch.int32)},
            TypeError,
            r"v\['scale'\] must be floating, got torch\.int32",
        ),
        (lambda v: flat(v)[1:], ValueError, r"one axis of all 37 parameters, got \(36,\)"),
        (lambda v: flat(v)[None], ValueError, r"one axis of all 37 parameters, got \(1, 37\)"),
        (lambda v: flat(v).long(), TypeError, r"v must be floating, got torch\.int64"),
        (lambda v: list(flat(v)), TypeError, r"v must be a tensor or \{name: tensor\}, got list"),
    ],
)
def test_rejects_vectors(method, change, error, reason):
    F = example()
    with pytest.raises(error, match=f"{method}: .*{reason}"):
        F @ change(vector()) if method == "F @ v" else F.solve(change(vector()))


@pytest.mark.parametrize("method", ["logdet", "solve", "sample"])
@pytest.mark.parametrize(
    ("damping", "reason"),
    [
        (-1.0, r"damping must be a finite number >= 0, got -1\.0"),
        (math.nan, "damping must be a finite number >= 0, got nan"),
        ([1, 2], r"damping must be a finite number >= 0, got \[1, 2\]"),
        (torch.ones(2), r"damping must be a finite number >= 0, got tensor"),
        (math.inf, "damping must be a finite number >= 0, got inf"),
        (torch.ones((), requires_grad=True), "damping must be a number, got a tensor that asks for a gradient"),
        ({"body.0": 1.0, "head": 1.0}, r"cover every parameter, got none for \['scale'\]"),
        ({"body": 1.0, "": 1.0, "head": 1.0}, r"must name layers or parameters of F, got \['body'\]"),
        ({"body.0": 1.0, "head": 1.0, "": -2.0}, r"damping\[''\] must be a finite number >= 0, got -2\.0"),
    ],
    ids=str,
)
def test_rejects_dampings(method, damping, reason):
    F = example()
    with pytest.raises(ValueError, match=f"{method}: .*{reason}"):
        {"logdet": F.logdet, "solve": lambda d: F.solve(vector(), d), "sample": lambda d: F.sample(1, damping=d)}[method](damping)


def test_long_lists_of_names_are_cut():
    F = DiagonalFisher({f"w{i:02}": torch.ones(1) for i in range(9)}, 1)
    with pytest.raises(ValueError, match=r"\['w00', 'w01', 'w02', 'w03', 'w04'\] and 4 more"):
        F @ {}
