# SPDX-License-Identifier: Apache-2.0
"""What a backward pass adds to an exact block: outer products of whole sample gradients, which are small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherfast._precision import wide, wide_name
from fisherfast.capture.collector import Cost, Held, Samples
from fisherfast.capture.tracked import Tracked
from fisherfast.fisher.blocks.block_sums import BatchSum, GradientSums, mirrored
from fisherfast.fisher.blocks.exact import ExactBlock, Flat
from fisherfast.ops.gram import gram_
from fisherfast.rules import Form, Rows


class ExactSums(GradientSums):
    """The sums of one exact block; see ``BlockSums``."""

    def __init__(self, tracked: Tracked) -> None:
        self.place, self._shape = Flat(tracked.name, precision=wide_name(tracked.parameter.dtype)), tuple(tracked.parameter.shape)
        D = tracked.parameter.numel()
        self.moments = BatchSum((D, D), tracked.parameter)
        self.sums = (self.moments,)
        self._last: tuple[int, Tensor] | None = None  # the pass whose rows came last, and its gradients

    def holds(self, staged: bool) -> Held:
        """See ``BlockSums``."""
        running = self.moments.running
        held = running.held(staged)
        return Held(self.place.names, f"exact {list(running.shape)}", held, (held,), "gram_", result=running.nbytes)

    def saw(self, g: torch.dtype) -> None:
        """See ``BlockSums``."""
        self.place = self.place.seeing(g)

    def cost(self, form: Form, rows: Rows) -> Cost:
        """See ``BlockSums``; of a symmetric product one half is computed."""
        return Cost(form.flops(rows, self._shape) + rows.num_samples * self.moments.running.shape[0] ** 2)

    def add(self, form: Form, rows: Rows, scale: float, number: int, samples: Samples, staged: bool) -> None:
        """Take the rows of one pass. A parameter that is used in parts comes part by part: the sum of its parts is squared."""
        gradients = form.gradients(rows.mapped(wide), self._shape).reshape(rows.num_samples, -1)
        acc, options = self.moments.target(staged), {"weight": samples.weight, "flag": self.moments.flag}
        if self._last is not None and self._last[0] == number:
            before = self._last[1]
            gram_(acc, before, -scale, **options)
            gradients = gradients + before
        gram_(acc, gradients, scale, **options)
        self._last = number, gradients

    def end(self) -> None:
        """See ``BlockSums``."""
        self._last = None

    def add_gradients(self, gradients: Tensor, first: int, scale: float, samples: Samples, staged: bool) -> None:
        """Take whole sample gradients."""
        weight = samples.weight_of(first, len(gradients))
        rows = wide(gradients).reshape(len(gradients), -1)
        gram_(self.moments.target(staged), rows, scale, weight=weight, flag=self.moments.flag)

    @property
    def main(self) -> BatchSum:
        """See ``BlockSums``."""
        return self.moments

    def block(self, made: Mapping[str, Any]) -> ExactBlock:
        """What was added, on memory of its own."""
        return ExactBlock(self.place, mirrored(self.moments.running.snapshot()))

    def restore(self, block: ExactBlock) -> None:
        """See ``BlockSums``."""
        self.moments.running.restore(block.moments)
