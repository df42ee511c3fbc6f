# SPDX-License-Identifier: Apache-2.0
"""A sum over samples and how many samples it holds, kept apart: what makes pooling exact.

The mean of two runs is the sum of their sums over the sum of their weights; means alone cannot be pooled. Nothing here
knows what was summed.
"""

from __future__ import annotations

import functools
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
        return (self.sum / self.divisor()).to(dtype or torch.float64)

    def mean_sum(self) -> float:
        """The sum of the entries of ``mean()``, without that tensor."""
        return float(self.sum.sum()) / self.divisor()

    def divisor(self) -> float:
        """``weight``, which must not be zero."""
        if self.weight == 0:
            raise ValueError("Accumulator: the mean needs a weight > 0, got 0; nothing has been added yet")
        return self.weight

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


class RunningSum:
    """A sum in the making, as two float32 tensors: kernels add to ``low``, and every so often ``low`` is folded into ``high``.

    The fold is exact: ``high`` becomes the rounded sum of both and ``low`` keeps the rounding error, so together they have
    about 48 bits. ``high`` exists only from the first fold on: a short run takes 4 bytes a number, a long one 8. Sums of
    float64 models are one float64 tensor and need no folds. Nothing is allocated before the first addition: what a run will
    hold (``nbytes``) is known before it holds it.

    Shapes:   any; contiguous.
    Scale:    a sum; ``weight`` is the number of samples in it.
    Errors:   none of its own.
    Numerics: float32 additions only between folds, at most ``FOLD_EVERY`` of them; error-free folds (TwoSum).
    Source:   Knuth, The Art of Computer Programming, vol. 2, 4.2.2, theorem B.
    """

    FOLD_EVERY = 64
    _CHUNK = 2**20  # numbers per step of a fold: bounds its temporaries

    def __init__(self, like: Tensor) -> None:
        self.shape, self.device = like.shape, like.device
        self.dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.high: Tensor | None = None
        self.weight = 0.0
        self._additions = 0

    @functools.cached_property
    def low(self) -> Tensor:
        """What is added to."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    @property
    def nbytes(self) -> int:
        """Of both tensors, or of the snapshot: two float32 are as long as one float64."""
        return 8 * math.prod(self.shape)

    def held(self, staged: bool) -> int:
        """Bytes of the sum and, where a batch is added up in a tensor of its own before it counts, of that."""
        return self.nbytes + staged * self.dtype.itemsize * math.prod(self.shape)

    def counted(self, weight: float) -> None:
        """Note that something of ``weight`` samples was added to ``low``."""
        self.weight += weight
        self._additions += 1
        if self._additions >= self.FOLD_EVERY:
            self.fold()

    def fold(self) -> None:
        """Move what ``low`` can spare to ``high``."""
        self._additions = 0
        if self.dtype == torch.float64:
            return
        if self.high is None:
            self.high = self.low
            del self.low  # zeros, once something is added again
            return
        for a, b in zip(self.high.view(-1).split(self._CHUNK), self.low.view(-1).split(self._CHUNK), strict=True):
            total = a + b
            part = total - a
            error = (a - (total - part)) + (b - part)
            a.copy_(total)
            b.copy_(error)

    def clear(self) -> None:
        """Forget everything."""
        self.high, self.weight, self._additions = None, 0.0, 0
        self.__dict__.pop("low", None)

    def snapshot(self) -> Accumulator:
        """The sum so far, in float64, on its own memory."""
        self.fold()
        if self.high is None:
            return Accumulator(self.low.clone(), self.weight)  # float64
        total = self.high.double()
        return Accumulator(total.add_(self.low) if "low" in self.__dict__ else total, self.weight)

    def restore(self, before: Accumulator) -> None:
        """Start from a snapshot."""
        self.weight = before.weight
        if self.dtype == torch.float64:
            self.low.copy_(before.sum)
        else:
            self.high = before.sum.float()
            self.low.copy_(before.sum - self.high.double())
