# SPDX-License-Identifier: Apache-2.0
"""Collectors: what each structure adds up while backward passes run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfast.accumulator import RunningSum
from fisherfast.capture import Capture, Tracked
from fisherfast.fisher.diagonal import DiagonalFisher
from fisherfast.fisher.protocol import Provenance
from fisherfast.rules import Form, Rows


@dataclass(frozen=True)
class Diagonal:
    """Ask ``ff.collect`` for the diagonal: ``ff.collect(model, ff.Diagonal())``."""

    def collector(self, capture: Capture, transactional: bool = False) -> DiagonalCollector:
        """The object that adds it up."""
        return DiagonalCollector(capture, transactional)


class DiagonalCollector:
    """Sums of squared sample gradients, straight into running sums.

    A batch of one backward pass goes into the sums directly; if the pass stops half-way, each parameter's weight says what
    it has. A batch of several passes (columns of the exact Fisher, draws) means nothing until they are complete: it goes
    into staging tensors that are folded in, or dropped, at the end. ``transactional`` stages every batch, for checkpoints.
    """

    def __init__(self, capture: Capture, transactional: bool) -> None:
        self._transactional = transactional
        self.sums = {name: RunningSum(t.parameter) for name, t in capture.tracked.items()}
        self._flags = {name: torch.zeros(1, dtype=torch.int32, device=capture.device) for name in self.sums}
        self._stage: dict[str, Tensor] = {}
        self._staged = False
        self._touched: dict[str, None] = {}

    def forget(self, name: str) -> None:
        """Drop a parameter that the run does not cover."""
        del self.sums[name]

    def restore(self, before: DiagonalFisher) -> None:
        """Go on from a checkpoint's sums."""
        for name, accumulator in before.accumulators().items():
            self.sums[name].restore(accumulator)

    def begin(self, passes: int, N: int, weight: Tensor | None) -> None:
        """See ``passes.Collector``."""
        self._staged = self._transactional or passes > 1

    def add(self, tracked: Tracked, form: Form, rows: Rows, scale: float) -> None:
        """See ``passes.Collector``."""
        form.accumulate(self._target(tracked.name), rows, scale, flag=self._flags[tracked.name])
        self._touched[tracked.name] = None

    def _target(self, name: str) -> Tensor:
        if not self._staged:
            return self.sums[name].low
        if name not in self._stage:
            self._stage[name] = torch.zeros_like(self.sums[name].low)
        return self._stage[name]

    def add_gradients(self, tracked: Tracked, gradients: Tensor, first: int, scale: float) -> None:
        """See ``passes.Collector``. Outside a staged batch every call is a transaction of its own."""
        name = tracked.name
        square = gradients.to(self.sums[name].low.dtype).square().sum(0).mul_(scale)
        if not torch.isfinite(square).all():
            self._flags[name].fill_(1)
            self._touched[name] = None
        elif self._staged:
            self._target(name).add_(square)
            self._touched[name] = None
        else:
            self.sums[name].low.add_(square)
            self.sums[name].counted(len(gradients))

    def touch(self, tracked: Tracked) -> None:
        """See ``passes.Collector``."""
        self._touched[tracked.name] = None

    def settle(self, N: int, complete: bool) -> list[str]:
        """See ``passes.Collector``. Parameters come in the order of the backward pass."""
        bad = [name for name in self._touched if self._flags[name].item()]
        keep = not self._staged or (complete and not bad)
        for name in self._touched:
            if keep and name not in bad:
                if name in self._stage:
                    self.sums[name].low.add_(self._stage[name])
                self.sums[name].counted(N)
            self._flags[name].zero_()
            if name in self._stage:
                self._stage[name].zero_()
        self._touched.clear()
        return bad

    def result(
        self,
        capture: Capture,
        num_samples: int,
        num_positions: int,
        batches: int,
        provenance: Provenance,
        coverage: dict[str, str],
    ) -> DiagonalFisher:
        """The Fisher as it stands, on memory of its own."""
        return DiagonalFisher.from_accumulators(
            {name: running.snapshot() for name, running in self.sums.items()},
            num_samples=num_samples,
            num_positions=num_positions,
            provenance=provenance,
            coverage=coverage,
            aliases={alias: name for alias, name in capture.aliases.items() if name in self.sums},
            batches=batches,
        )
