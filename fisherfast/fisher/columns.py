# SPDX-License-Identifier: Apache-2.0
"""A few numbers for each sample, appended batch after batch to one tensor."""

from __future__ import annotations

import torch
from torch import Tensor


class Columns:
    """A float64 tensor ``[rows, N]`` to which columns are appended; its memory doubles when it is full.

    One small tensor for each batch would be scattered among the large ones that batches free, and keep the heap from shrinking.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._memory = torch.empty(rows, 0, dtype=torch.float64, device=device)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def tensor(self) -> Tensor:
        """All of them, a view."""
        return self._memory[:, : self._count]

    def add(self, columns: Tensor) -> None:
        """Add some, which are copied."""
        end = self._count + columns.shape[1]
        if end > self._memory.shape[1]:
            grown = self._memory.new_empty(len(self._memory), max(end, 2 * self._memory.shape[1]))
            grown[:, : self._count] = self.tensor
            self._memory = grown
        self._memory[:, self._count : end] = columns
        self._count = end

    def clear(self) -> None:
        """Forget them, not the memory."""
        self._count = 0
