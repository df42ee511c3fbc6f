# SPDX-License-Identifier: Apache-2.0
"""A sum over samples and how many samples it holds, kept apart: what makes pooling exact.

The mean of two runs is the sum of their sums over the sum of their weights; means alone cannot be pooled. Nothing here
knows what was summed.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor


class Accumulator:
    """A float64 ``sum`` of any shape and its ``weight``, the number of samples in it; ``mean() = sum / weight``.

    Shapes:   sum any shape, kept contiguous; weight a number.
    Scale:    sum is a sum, never a mean, so pooling adds both.
    Errors:   TypeError if sum is not a floating tensor; ValueError for a weight that is negative or not finite, for sums
              of different shapes, and for the mean of nothing.
    Numerics: float64, so that millions of float32 partial sums lose nothing; exact for integers below 2**53.
    Source:   the (value, weight) accumulator common to K-FAC implementations; here one float64 pair, without decay.
    """

    def __init__(self, sum: Tensor, weight: float) -> None:
        if not (isinstance(sum, Tensor) and sum.is_floating_point()):
            raise TypeError(f"Accumulator: sum must be a floating tensor, got {getattr(sum, 'dtype', type(sum).__name__)}")
        # A float64 sum is kept, not copied: it is as large as the parameter, twice over.
        self.sum = sum.detach().to(torch.float64).contiguous()
        self.weight = _checked_weight(weight)

    @classmethod
    def zeros(cls, shape: tuple[int, ...] | torch.Size, device: torch.device | str | None = None) -> Accumulator:
        """An empty accumulator."""
        return cls(torch.zeros(shape, dtype=torch.float64, device=device), 0.0)

    def fold(self, partial: Tensor, weight: float) -> Accumulator:
        """Add, in place, a partial sum of ``weight`` samples in any floating dtype; returns self."""
        if partial.shape != self.sum.shape:
            raise ValueError(f"Accumulator: sums must have one shape, got {tuple(self.sum.shape)} and {tuple(partial.shape)}")
        weight = _checked_weight(weight)
        self.sum += partial.detach().to(self.sum.device)
        self.weight += weight
        return self

    def add(self, other: Accumulator) -> Accumulator:
        """Pool ``other`` into this one, in place; returns self."""
        return self.fold(other.sum, other.weight)

    def __add__(self, other: Accumulator) -> Accumulator:
        if not isinstance(other, Accumulator):
            return NotImplemented
        return Accumulator(self.sum.clone(), self.weight).add(other)

    def mean(self, dtype: torch.dtype | None = None) -> Tensor:
        """``sum / weight``, divided in float64 and then cast to ``dtype`` (float64 if not given)."""
        if self.weight == 0:
            raise ValueError("Accumulator: the mean needs a weight > 0, got 0; nothing has been added yet")
        return (self.sum / self.weight).to(dtype or torch.float64)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Accumulator:
        """Pool the accumulators of all ranks of ``group``, in place on every rank; returns self."""
        weight = torch.tensor(self.weight, dtype=torch.float64, device=self.sum.device)
        dist.all_reduce(self.sum, group=group)
        dist.all_reduce(weight, group=group)
        self.weight = float(weight)
        return self

    def __repr__(self) -> str:
        return f"Accumulator(shape={tuple(self.sum.shape)}, weight={self.weight:g}, device={str(self.sum.device)!r})"


def _checked_weight(weight: float) -> float:
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"Accumulator: weight must be a finite number >= 0, got {weight}")
    return float(weight)
