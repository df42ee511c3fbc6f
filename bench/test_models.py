# SPDX-License-Identifier: Apache-2.0
"""The empirical diagonal of whole models, every way, as a ratio to one plain forward and backward of the same batch."""

import functools

import measure
import memory
import models
import pytest
import ways
from torch import Tensor

SECONDS = 8.0  # per way


@functools.cache
def oracle(case: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The squares by autograd in float64, and the error of the same loop in float32, by parameter."""
    model, x, y = models.CASES[case].build()
    plain = ways.loop(model, x, y)()
    wide = ways.loop(model.double(), x.double() if x.is_floating_point() else x, y)()
    return wide, {k: measure.error(plain[k], wide[k]) for k in wide}


@functools.cache
def plain_peak(case: str) -> int:
    """Peak memory of the plain step."""
    return memory.peak_bytes(case, "plain")


def wrong(result: dict[str, Tensor], way: ways.Way, case: str) -> str | None:
    """What is wrong with a result, or None."""
    wide, plain_errors = oracle(case)
    missing = [k for k in wide if k not in result]
    if missing:
        return f"no result for {len(missing)} of {len(wide)} parameters ({missing[0]}, ...)"
    scale = models.CASES[case].N if way.mean else 1
    errors = {k: measure.error(result[k].detach().double() * scale, wide[k]) for k in wide}
    failed = {k: e for k, e in errors.items() if not measure.passes(e, plain_errors[k])}
    if failed:
        worst = max(failed, key=failed.get)
        return f"another quantity: {len(failed)} of {len(wide)} parameters differ, {worst} by {failed[worst]:.2g} of its maximum"
    return None


def attempt(way: ways.Way, case: str) -> tuple[ways.Run, str | None]:
    """Prepare and run once; the reason why the result cannot be used, or None."""
    model, x, y = models.CASES[case].build()
    run = way.prepare(model, x, y)
    result = run()
    return run, wrong(result() if callable(result) else result, way, case)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ways.WAYS.values(), ids=ways.WAYS.keys())
@pytest.mark.parametrize("case", models.CASES)
def test_diagonal(case, way, benchmark, cannot):
    try:
        run, problem = attempt(way, case)
    except Exception as error:  # whatever a peer raises is the finding
        if way.ours:
            raise
        run, problem = None, f"raises {type(error).__name__}: {str(error).splitlines()[0]}"
    if problem is not None:
        assert not way.ours, problem
        cannot.append({"case": case, "way": way.name, "package": way.package, "reason": problem, "why": way.why.get(case)})
        return
    benchmark.extra_info |= {"case": case, "way": way.name, "package": way.package, "summary": models.CASES[case].summary}
    benchmark.extra_info |= {"peak_bytes": memory.peak_bytes(case, way.name), "plain_peak_bytes": plain_peak(case)}
    measure.interleaved(benchmark, run, {"plain": ways.plain(*models.CASES[case].build())}, SECONDS)
