# SPDX-License-Identifier: Apache-2.0
"""What was counted: samples, positions, batches, and the draws that samples have had."""

from __future__ import annotations

from collections import Counter

from fisherfast._warning import warn
from fisherfast.capture.calls import Call


class Tally:
    """The counts of a run. A batch whose samples were counted before is another draw of them."""

    def __init__(self) -> None:
        self.samples = self.positions = self.batches = 0
        self._fresh = True  # whether the samples of the batch at hand are new
        self._last: list[Call] = []  # the calls of the batch counted last
        self._batches_of: Counter[int] = Counter()  # how many batches have had so many draws

    def restore(self, samples: int, positions: int, batches: int) -> None:
        """Go on from these counts."""
        self.samples, self.positions, self.batches = samples, positions, batches

    def begin(self) -> None:
        """Start a batch, of new samples unless ``draw`` finds otherwise."""
        self._fresh = True

    def draw(self, calls: list[Call]) -> bool | None:
        """Note the calls behind a batch. Returns None for new samples, else whether they are those of the batch just before."""
        before = max((call.counted for call in calls), default=0)
        self._batches_of[before] -= 1
        self._batches_of[before + 1] += 1
        self._fresh = not before
        last = {id(call) for call in self._last}
        for call in calls:
            call.counted = before + 1
        self._last = calls
        return any(id(call) in last for call in calls) if before else None

    def complete(self, samples: int, positions: int) -> None:
        """The batch is in the sums."""
        self.samples += samples if self._fresh else 0
        self.positions += positions if self._fresh else 0
        self.batches += 1

    def warn_of_unequal_draws(self) -> None:
        """Say so if some batches have had more backward passes than others, so that their samples weigh more in the means."""
        draws = [number for number, batches in sorted(self._batches_of.items()) if number and batches]
        if len(draws) > 1:
            warn(
                f"collect: every batch must have as many backward passes as the others, got some of {draws[0]} and some of {draws[-1]}; each pass "
                "counts as its samples do, so the result is no longer a mean over samples, but one over draws",
            )

    def warn_of_no_labels(self) -> None:
        """At the end: say so if no position counted, so that all there is are zeros."""
        if not self.positions:
            warn(
                f"data: some of the {self.samples} samples must have a label that counts, got none: all are ignored or masked, and the "
                "Fisher is zero",
            )
