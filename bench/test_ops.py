# SPDX-License-Identifier: Apache-2.0
"""Each op on each case: our backends beside plain torch, gated by a float64 oracle before anything is timed."""

import functools

import measure
import pytest
import routes
import torch

SECONDS = 2.0  # per route

CASES = [
    pytest.param(op, case, route, id=f"{op}-{case}-{route}")
    for op, cases in routes.CASES.items()
    for case in cases
    for route in routes.names(op, case)
]


@functools.lru_cache(maxsize=1)
def load(op: str, case: str) -> tuple[routes.Problem, dict[str, float]]:
    """The problem and every route's error against float64: one problem at a time, shared by the tests of a case."""
    torch.manual_seed(0)
    problem = routes.PROBLEMS[op](*routes.CASES[op][case])
    oracle = problem.oracle()
    errors = {}
    for route, run in problem.routes.items():
        run(acc := torch.zeros(problem.acc))
        errors[route] = measure.error(acc, oracle)
    return problem, errors


def gate(op: str, route: str, errors: dict[str, float]) -> float:
    """The error that sets a route's limit: for our kernels the best plain torch, for plain torch itself the worst.

    Plain torch that adds sample by sample in float32 is less exact than the einsum that sums at the end; it is not wrong.
    """
    if route in routes.KERNELS:
        return errors[routes.PLAIN[op]]
    return max(errors[routes.PLAIN[op]], errors[routes.BASELINE[op]])


@pytest.mark.parametrize(("op", "case", "route"), CASES)
def test_op(op, case, route, benchmark, fma_peak):
    problem, errors = load(op, case)
    benchmark.extra_info |= {"op": op, "case": case, "route": route, "shape": problem.shape, "fma_peak_gflops": fma_peak}
    benchmark.extra_info |= {"flops": problem.flops, "bytes": problem.bytes}
    if route in errors:
        limit = gate(op, route, errors)
        assert measure.passes(errors[route], limit), f"{route} is wrong: error {errors[route]:.2g}, plain torch {limit:.2g}"
        benchmark.extra_info |= {"error": errors[route], "plain_error": limit}
    acc = torch.zeros(problem.acc)
    run = functools.partial(problem.routes.get(route, problem.yardstick), acc)
    measure.paired(benchmark, run, functools.partial(problem.routes[routes.BASELINE[op]], torch.zeros_like(acc)), SECONDS)
