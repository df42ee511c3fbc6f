# SPDX-License-Identifier: Apache-2.0
"""Every way while N, T, width or classes grow: gated at each point, then the least time of a few, all ways in turn."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import exact  # noqa: F401  registers its ways
import models
import pytest
import torch
import ways
from torch import nn

ROUNDS = 7
ENOUGH = 1.0  # seconds spent on a way at a point; three runs at least
LONGEST = 1.0  # seconds of a run: a slower way is left out from the next point on
SKIPPED = "fisherfast: ff.collect, one batch"  # start to result is ff.fisher's line


@dataclass(frozen=True)
class Sweep:
    """One extent that grows, and what it grows in; ``build`` makes the problem of one point."""

    axis: str
    title: str
    quantity: str
    points: tuple[int, ...]
    build: Callable[[int], ways.Problem]


def _mlp(N: int, I: int, width: int, C: int = 10) -> ways.Problem:
    torch.manual_seed(0)
    model, x, y = models.mlp(I, width, C), torch.randn(N, I), torch.randint(C, (N,))
    models.clear_of_zero(model, x)
    return model, x, y


def _block(T: int) -> ways.Problem:
    torch.manual_seed(0)
    model = nn.Sequential(models.Block(), nn.Linear(models.WIDTH, 10))
    return model, torch.randn(8, T, models.WIDTH), torch.randint(10, (8, T))


SWEEPS = {
    s.axis: s
    for s in (
        Sweep("samples N", "diagonal, MLP 784-512-512-10", "diagonal", (8, 32, 128, 512, 1024), lambda N: _mlp(N, 784, 512)),
        Sweep("positions T", "diagonal, transformer block, d = 512, N = 8", "diagonal", (16, 64, 256, 512), _block),
        Sweep("width", "diagonal, MLP 256-width-width-10, N = 64", "diagonal", (128, 256, 512, 1024, 2048), lambda w: _mlp(64, 256, w)),
        Sweep("classes C", "exact, MLP 784-512-512-C, N = 32", "exact", (2, 4, 8, 16, 32, 64), lambda C: _mlp(32, 784, 512, C)),
    )
}  # fmt: skip

POINTS = [(axis, point) for axis, sweep in SWEEPS.items() for point in sweep.points]
_left_out: dict[str, dict[str, str]] = {}


def _prepared(sweep: Sweep, point: int, left_out: dict[str, str]) -> dict[str, ways.Run]:
    """The ways whose result is right at this point; why the others are not there goes to ``left_out``, for good."""
    oracles = functools.cache(lambda quantity: ways.oracle(quantity, *sweep.build(point)))
    runs = {}
    for name, way in ways.of(sweep.quantity).items():
        if name in left_out or name.startswith(SKIPPED):
            continue
        run, reason = ways.attempt(way, sweep.build(point), oracles)
        if run is None:
            left_out[name] = f"at {point} {reason}"
        else:
            runs[name] = run
    return runs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("axis", "point"), POINTS)
def test_point(axis, point, benchmark):
    sweep, left_out = SWEEPS[axis], _left_out.setdefault(axis, {})
    plain = ways.plain(*sweep.build(point))
    runs = {"plain": plain} | _prepared(sweep, point, left_out)
    batches = {name: way.batches for name, way in ways.of(sweep.quantity).items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            if len(times[name]) < 3 or sum(times[name]) < ENOUGH:
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    for name, seconds in times.items():
        if min(seconds) > LONGEST and point != sweep.points[-1] and not name.startswith("fisherfast"):
            left_out[name] = f"beyond {point} takes more than {LONGEST:g} s a run"
    least = {name: min(seconds) / batches.get(name, 1) for name, seconds in times.items()}
    benchmark.extra_info |= {"sweep": axis, "title": sweep.title, "point": point, "seconds": least, "left_out": dict(left_out)}
    benchmark.pedantic(plain, rounds=1)
