# SPDX-License-Identifier: Apache-2.0
"""Whole models: every way to each quantity, as a ratio to one plain forward and backward of the same batch."""

import functools

import ekfac  # noqa: F401  registers its ways, and those of kfac
import exact  # noqa: F401
import measure
import memory
import models
import norms  # noqa: F401
import page
import pytest
import ways

SECONDS = 3.0  # per way, but
LEAST = 6  # rounds
CASES = [
    (quantity, case, name)
    for quantity in page.QUANTITIES
    for case in models.CASES
    for name in ways.of(quantity)
    if quantity in models.CASES[case].quantities
]


@functools.cache
def oracle(case: str, quantity: str) -> tuple[ways.Result, dict[str, float]]:
    """See ``ways.oracle``."""
    return ways.oracle(quantity, *models.CASES[case].build())


@functools.cache
def plain_peak(case: str) -> int:
    """Peak memory of the plain step."""
    return memory.peak_bytes(case, "diagonal", "plain")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("quantity", "case", "name"), CASES)
def test_way(quantity, case, name, benchmark, cannot):
    way = ways.of(quantity)[name]
    facts = {"quantity": quantity, "case": case, "way": name, "package": way.package}
    limit = models.CASES[case].limits.get(quantity)
    facts |= {"limit": limit} if way.limited and limit is not None else {}
    run, reason = ways.attempt(way, models.CASES[case].build(), functools.partial(oracle, case))
    if run is None:
        cannot.append(facts | {"reason": reason, "why": way.why.get(case)})
        return
    benchmark.extra_info |= facts | {"summary": models.CASES[case].summary}
    benchmark.extra_info |= {"peak_bytes": memory.peak_bytes(case, quantity, name), "plain_peak_bytes": plain_peak(case)}
    plain = {"plain": ways.plain(*models.CASES[case].build())}
    measure.interleaved(benchmark, run, plain, SECONDS, LEAST, way.batches)
