# SPDX-License-Identifier: Apache-2.0
"""``Underflow``: how many float16 gradients are too small to have all their digits."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfast.capture.tracked import Tracked


class Underflow:
    """Counts the float16 gradients that backward passes bring, and those of them that are subnormal."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[int | Tensor, int]] = {}  # of each parameter: the subnormal ones, and all

    def add(self, tracked: Tracked, g: Tensor) -> None:
        """Count the gradient of the output of a use, if it is float16."""
        if g.dtype == torch.float16:
            small = ((g != 0) & (g.abs() < torch.finfo(g.dtype).tiny)).sum()
            for source in tracked.sources:
                found, every = self._of.get(source.name, (0, 0))
                self._of[source.name] = found + small, every + g.numel()  # on the device: nothing waits for it

    def counts(self) -> dict[str, list[int]]:
        """``{parameter name: [float16 gradients that are subnormal, all of them]}``."""
        return {name: [int(small), every] for name, (small, every) in self._of.items()}
