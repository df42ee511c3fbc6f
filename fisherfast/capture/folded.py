# SPDX-License-Identifier: Apache-2.0
"""Several passes over samples of one position each, added up before anything is squared."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fisherfast._precision import wide
from fisherfast.capture.calls import Call, CallUse
from fisherfast.rules import Rows


def one_position(rows: Rows) -> bool:
    """Whether every sample has one: rows whose passes may be added up before they are squared."""
    return rows.offsets is None and rows.g.dim() == 3 and rows.g.shape[1] == 1


class Folded:
    """A call whose samples have one position each, over several passes: ``sum_p (g_p x)^2 = (sum_p g_p^2) x^2``, so one op call does
    for each of its parameters.
    """

    def __init__(self, call: Call, saved: tuple[Tensor, ...]) -> None:
        self.uses, self._saved = call.uses, saved
        self._squares: Tensor | None = None

    def add(self, g: Tensor, scale: float) -> None:
        """Add one pass."""
        g = wide(g)
        if self._squares is None:
            self._squares = g.square().mul_(scale)
        else:
            self._squares.addcmul_(g, g, value=scale)

    def rows(self) -> Iterator[tuple[CallUse, Rows]]:
        """Of each use, rows whose squares are those sums."""
        assert self._squares is not None
        # Not sqrt(), which on a CPU is many times slower where there are zeros: after a ReLU they are half of all.
        g = self._squares.clamp_min(torch.finfo(self._squares.dtype).tiny).rsqrt_().mul_(self._squares)
        for use in self.uses:
            rows = use.rows(g, self._saved)
            floats = rows.x is not None and rows.x.is_floating_point()
            yield use, rows._replace(x=rows.inputs.to(g.dtype)) if floats else rows
