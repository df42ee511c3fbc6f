# SPDX-License-Identifier: Apache-2.0
"""Each op on each case: our kernel beside plain torch, gated by a float64 oracle before anything is timed."""

from functools import partial

import gate
import measure
import pytest
import routes
import torch

KERNEL = "cpu"
SECONDS = 5.0  # per case


def errors(problem: routes.Problem) -> dict[str, float]:
    """Every route's error against float64."""
    oracle = problem.oracle()
    found = {}
    for route, run in problem.routes.items():
        run(acc := torch.zeros(problem.acc))
        found[route] = gate.error(problem.compared(acc), oracle)
    return found


@pytest.mark.parametrize(("op", "case"), [(op, case) for op, cases in routes.CASES.items() for case in cases])
def test_op(op, case, benchmark, fma_peak):
    torch.manual_seed(0)
    problem = routes.PROBLEMS[op](*routes.CASES[op][case])
    found = errors(problem)
    # Plain torch that adds sample by sample in float32 is less exact than the einsum that sums at the end; it is not wrong.
    loosest = max(error for route, error in found.items() if route not in routes.OURS)
    for route, error in found.items():
        limit = found[problem.plain] if route == KERNEL else loosest
        assert gate.passes(error, limit), f"{route} is wrong: error {error:.2g}, plain torch {limit:.2g}"
    benchmark.extra_info |= {"op": op, "case": case, "shape": problem.shape, "flops": problem.flops, "bytes": problem.bytes}
    benchmark.extra_info |= {"fma_peak_gflops": fma_peak, "errors": found, "plain": problem.plain}
    runs = {route: partial(run, torch.zeros(problem.acc)) for route, run in (problem.routes | dict([problem.yardstick])).items()}
    target = runs.pop(KERNEL)
    measure.interleaved(benchmark, target, runs, SECONDS)
