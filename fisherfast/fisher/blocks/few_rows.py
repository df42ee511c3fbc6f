# SPDX-License-Identifier: Apache-2.0
"""The rows whose Gram matrix a factor is, kept while they are few: they give its eigenvectors at a fraction of the cost."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fisherfast._precision import wide

_SHARE = 3  # rows are kept up to a third of the columns: above it the factor's own eigendecomposition is as fast


class FewRows:
    """Rows ``[m, D]``, m <= D / 3, times the root of their weight; forgotten for good as soon as there are more.

    A batch that does not count adds none, as everywhere; see ``BatchSum``.
    """

    def __init__(self, columns: int) -> None:
        self._columns, self._left = columns, columns // _SHARE
        self._rows: list[Tensor] | None = []
        self._batch: list[Tensor] = []

    def most(self, dtype: torch.dtype) -> int:
        """The bytes of the most rows that are few."""
        return self._columns // _SHARE * self._columns * dtype.itemsize

    def room(self, count: int) -> bool:
        """Whether so many rows more would be few; if not, none is kept from now on."""
        if self._rows is not None and count > self._left:
            self._rows = None
            self._batch.clear()
        return self._rows is not None

    def add(self, x: Tensor, weight: Tensor | None, scale: float = 1.0, bias: bool = False) -> None:
        """Rows x ``[..., D]`` of weights ``[...]``; ``bias``: a last column of ones joins them."""
        count = math.prod(x.shape[:-1])
        if not self.room(count):
            return
        self._left -= count
        rows = wide(x.flatten(0, -2))
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1) if bias else rows
        root = scale if weight is None else scale * weight.flatten().unsqueeze(1).to(rows.dtype)
        self._batch.append(rows * root**0.5)

    def settle(self, counts: bool) -> None:
        """End the batch."""
        if self._rows is not None:
            if counts:
                self._rows += self._batch
            else:
                self._left += sum(map(len, self._batch))
        self._batch.clear()

    def rows(self) -> Tensor | None:
        """All of them, or None if they were not few."""
        return torch.cat(self._rows) if self._rows and any(map(len, self._rows)) else None
