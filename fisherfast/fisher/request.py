# SPDX-License-Identifier: Apache-2.0
"""What may be asked of a run: a request says what it needs, and makes its result of it."""

from __future__ import annotations

from typing import Any

from fisherfast.capture.capture import Capture
from fisherfast.capture.collector import Collector
from fisherfast.fisher.counts import Counts


class Request:
    """What a user asks a run for.

    It declares which of the engine's sums it needs (by default none) or brings its own collector, and turns what was collected into a
    result.
    """

    @property
    def squares(self) -> bool:
        """Whether it needs ``sum_n w_n s_n^2`` of each parameter."""
        return False

    @property
    def totals(self) -> bool:
        """Whether it needs ``sum_n w_n s_n`` of each parameter."""
        return False

    @property
    def spread(self) -> bool:
        """Whether it needs the sums behind the standard error of the trace."""
        return False

    @property
    def keeps(self) -> str | None:
        """Which per-sample norms it needs: ``"whole"``, ``"layers"`` or None."""
        return None

    @property
    def fills(self) -> str | None:
        """Whether the parameters' ``.grad`` is filled, with the sum over a batch or its mean: ``"sum"``, ``"mean"`` or None."""
        return None

    def check(self, fisher_type: str | None) -> None:
        """Raise ValueError if it has no meaning for this kind of labels."""

    def collector(self, capture: Capture, transactional: bool) -> Collector | None:
        """A collector of its own, which ``result`` and ``restore`` are then given; None: the engine's sums are enough."""
        return None

    def result(self, source: Any, counts: Counts) -> Any:
        """What has been added so far, on memory of its own."""
        raise NotImplementedError

    def restore(self, source: Any, before: Any) -> None:
        """Give the source back what ``result`` took from it."""
        raise NotImplementedError
