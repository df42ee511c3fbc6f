# SPDX-License-Identifier: Apache-2.0
"""What may be asked of a run: a request says what it needs, and makes its result of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fisherfast.capture.capture import Capture
from fisherfast.capture.collector import Collector
from fisherfast.fisher.counts import Counts
from fisherfast.fisher.sample_values import Norms

Result = TypeVar("Result")


@dataclass(frozen=True)
class Needs:
    """Which of the engine's sums a request is made of."""

    squares: bool = False  # ``sum_n w_n s_n^2`` of each parameter
    totals: bool = False  # ``sum_n w_n s_n`` of each parameter
    spread: bool = False  # the sums behind the standard error of the trace
    norms: Norms | None = None  # the norm of each sample's gradient


class Request(Generic[Result]):
    """What a user asks a run for.

    It declares which of the engine's sums it needs or brings its own collector, and turns what was collected into a result.
    """

    @property
    def needs(self) -> Needs:
        """Of the engine's sums: by default none."""
        return Needs()

    def check(self, fisher_type: str | None) -> None:
        """Raise ValueError if it has no meaning for this kind of labels."""

    def collector(self, capture: Capture, transactional: bool) -> Collector | None:
        """A collector of its own, which ``result`` and ``restore`` are then given; None: the engine's sums are enough."""
        return None

    def result(self, source: Any, counts: Counts) -> Result:
        """What has been added so far, on memory of its own."""
        raise NotImplementedError

    def restore(self, source: Any, before: Any) -> None:
        """Give the source back what ``result`` took from it."""
        raise NotImplementedError
