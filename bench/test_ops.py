# SPDX-License-Identifier: Apache-2.0
"""Each op on each case: our backends beside plain torch, gated by a float64 oracle before anything is timed."""

import functools

import measure
import pytest
import routes
import torch
from torch import Tensor

SECONDS = 2.0  # per route

CASES = [
    pytest.param(op, case, route, id=f"{op}-{case}-{route}")
    for op, cases in routes.CASES.items()
    for case in cases
    for route in routes.names(op, case)
]


@functools.lru_cache(maxsize=1)
def load(op: str, case: str) -> tuple[routes.Problem, Tensor, float]:
    """The problem, its oracle, and the error of plain torch in float32: one at a time, shared by the routes of a case."""
    torch.manual_seed(0)
    problem = routes.PROBLEMS[op](*routes.CASES[op][case])
    oracle = problem.oracle()
    plain = problem.routes[routes.PLAIN[op]](torch.zeros(problem.acc))
    return problem, oracle, measure.error(plain, oracle)


@pytest.mark.parametrize(("op", "case", "route"), CASES)
def test_op(op, case, route, benchmark, fma_peak):
    problem, oracle, plain_error = load(op, case)
    benchmark.extra_info |= {"op": op, "case": case, "route": route, "shape": problem.shape, "fma_peak_gflops": fma_peak}
    benchmark.extra_info |= {"flops": problem.flops, "bytes": problem.bytes}
    acc = torch.zeros(problem.acc)
    if route in problem.routes:
        problem.routes[route](acc)
        error = measure.error(acc, oracle)
        assert measure.passes(error, plain_error), f"{route} is wrong: error {error:.2g}, plain torch {plain_error:.2g}"
        benchmark.extra_info |= {"error": error, "plain_error": plain_error}
    run = functools.partial(problem.routes.get(route, problem.yardstick), acc)
    measure.paired(benchmark, run, functools.partial(problem.routes[routes.BASELINE[op]], torch.zeros_like(acc)), SECONDS)
