# SPDX-License-Identifier: Apache-2.0
"""A sum over samples and how many samples it holds, kept apart: what makes pooling exact.

The mean of two runs is the sum of their sums over the sum of their weights; means alone cannot be pooled. Nothing here
knows what was summed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from fisherfast import _checks
from fisherfast._precision import wide_dtype

_CHUNK = 2**20  # numbers at a time: bounds temporaries


class Accumulator:
    """A ``sum`` of any shape and its ``weight``, the number of samples in it; ``mean() = sum / weight``.

    The sum is one float64 tensor, or still in the float32 parts in which a run has added it up (``of_parts``): half the memory,
    the same numbers.

    Shapes:   sum any shape, kept contiguous; weight a number.
    Scale:    sum is a sum, never a mean, so pooling adds both.
    Errors:   TypeError if sum is not a floating tensor; ValueError for a weight that is negative or not finite, for sums
              of different shapes, and for the mean of nothing.
    Numerics: float64, so that millions of float32 partial sums lose nothing; exact for integers below 2**53.
    Source:   the (value, weight) accumulator common to K-FAC implementations; here exact, without decay.
    """

    def __init__(self, sum: Tensor, weight: float) -> None:
        if not (isinstance(sum, Tensor) and sum.is_floating_point()):
            raise TypeError(f"Accumulator: sum must be a floating tensor, got {getattr(sum, 'dtype', type(sum).__name__)}")
        # A float64 sum is kept, not copied: it is as large as the parameter, twice over.
        self.parts: tuple[Tensor, ...] = (sum.detach().to(torch.float64).contiguous(),)
        self.weight = _checks.non_negative("Accumulator", "weight", weight)

    @classmethod
    def of_parts(cls, parts: tuple[Tensor, ...], weight: float) -> Accumulator:
        """The sum of a float32 tensor and, if there are two, what rounding left out of it. Kept, not copied, and never written."""
        accumulator = cls.__new__(cls)
        accumulator.parts, accumulator.weight = parts, weight
        return accumulator

    @classmethod
    def zeros(cls, shape: tuple[int, ...] | torch.Size, device: torch.device | str | None = None) -> Accumulator:
        """An empty accumulator."""
        return cls(torch.zeros(shape, dtype=torch.float64, device=device), 0.0)

    @property
    def shape(self) -> torch.Size:
        """Of the sum."""
        return self.parts[0].shape

    @property
    def device(self) -> torch.device:
        """Of the sum."""
        return self.parts[0].device

    @property
    def nbytes(self) -> int:
        """Of what is held."""
        return sum(part.nbytes for part in self.parts)

    @property
    def sum(self) -> Tensor:
        """In float64: the tensor itself if it is that, else a new one."""
        total = self.parts[0].double()
        for part in self.parts[1:]:
            total += part
        return total

    def nearest(self, dtype: torch.dtype) -> Tensor:
        """The sum rounded to ``dtype``, to be read only: where that is how it is held, nothing is copied."""
        return self.parts[0] if dtype == self.parts[0].dtype else self.sum.to(dtype)  # the first part is the rounded sum of both

    def stored(self) -> Tensor:
        """The sum in the narrowest dtype that has all its digits, to be read only."""
        return self.parts[0] if len(self.parts) == 1 else self.sum

    def _chunks(self) -> Iterator[Tensor]:
        """The sum in float64, flat, some of it at a time, to be read only."""
        for pieces in zip(*(part.view(-1).split(_CHUNK) for part in self.parts), strict=True):
            yield Accumulator.of_parts(pieces, 0.0).sum

    def __add__(self, other: Accumulator) -> Accumulator:
        if not isinstance(other, Accumulator):
            return NotImplemented
        if other.shape != self.shape:
            raise ValueError(f"Accumulator: sums must have one shape, got {tuple(self.shape)} and {tuple(other.shape)}")
        return Accumulator(self.sum + other.sum.to(self.device), self.weight + other.weight)

    def mean(self, dtype: torch.dtype | None = None) -> Tensor:
        """``sum / weight``, divided in float64 and then cast to ``dtype`` (float64 if not given)."""
        divisor = self.divisor()
        mean = torch.empty(self.shape, dtype=dtype or torch.float64, device=self.device)
        for out, some in zip(mean.view(-1).split(_CHUNK), self._chunks(), strict=True):
            out.copy_(some / divisor)
        return mean

    def mean_sum(self) -> float:
        """The sum of the entries of ``mean()``, without that tensor."""
        return math.fsum(float(some.sum()) for some in self._chunks()) / self.divisor()

    def divisor(self) -> float:
        """``weight``, which must not be zero."""
        if self.weight == 0:
            raise ValueError("Accumulator: weight must be > 0 for a mean, got 0; nothing has been added yet")
        return self.weight

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Accumulator:
        """Pool the accumulators of all ranks of ``group``, in place on every rank; returns self."""
        weight = torch.tensor(self.weight, dtype=torch.float64, device=self.device)
        self.parts = (self.sum,)
        dist.all_reduce(self.parts[0], group=group)
        dist.all_reduce(weight, group=group)
        self.weight = float(weight)
        return self

    def __repr__(self) -> str:
        return f"Accumulator(shape={tuple(self.shape)}, weight={self.weight:g}, device={str(self.device)!r})"


class RunningSum:
    """A sum in the making, as two float32 tensors: kernels add to ``low``, and every so often ``low`` is folded into ``high``.

    The fold is exact: ``high`` becomes the rounded sum of both and ``low`` keeps the rounding error, so together they have
    about 48 bits. ``high`` exists only from the first fold on: a short run takes 4 bytes a number, a long one 8. Sums of
    float64 models are one float64 tensor and need no folds. Nothing is allocated before the first addition: what a run will
    hold (``nbytes``) is known before it holds it.

    The first snapshot takes the tensors themselves, and later additions go to new ones. A second snapshot of the same sum is a
    copy, so that results never share memory.

    Shapes:   any; contiguous.
    Scale:    a sum; ``weight`` is the number of samples in it.
    Errors:   none of its own.
    Numerics: float32 additions only between folds, at most ``FOLD_EVERY`` of them; error-free folds (TwoSum).
    Source:   Knuth, The Art of Computer Programming, vol. 2, 4.2.2, theorem B.
    """

    FOLD_EVERY = 64

    def __init__(self, like: Tensor) -> None:
        self.shape, self.device = like.shape, like.device
        self.dtype = wide_dtype(like.dtype)
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.high: Tensor | None = None
        self._low: Tensor | None = None  # as far as it is allocated
        self.weight = 0.0
        self._additions = 0
        self._given = False  # whether a snapshot has ``high``
        self._given_low: Tensor | None = None  # what it has of ``low``

    @property
    def low(self) -> Tensor:
        """The tensor that kernels add to, allocated when it is first asked for."""
        if self._low is None:
            self._low = self._allocated()
        return self._low

    def _allocated(self) -> Tensor:
        given, self._given_low = self._given_low, None
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device) if given is None else given.clone()

    @property
    def nbytes(self) -> int:
        """Of both tensors."""
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
            self.high, self._low = self.low, None
        elif self._low is not None:
            if self._given:
                self.high, self._given = self.high.clone(), False
            for a, b in zip(self.high.view(-1).split(_CHUNK), self.low.view(-1).split(_CHUNK), strict=True):
                total = a + b
                part = total - a
                error = (a - (total - part)) + (b - part)
                a.copy_(total)
                b.copy_(error)

    def snapshot(self) -> Accumulator:
        """The sum so far. Of float32 sums nothing is copied, unless the run goes on or is asked again."""
        self.fold()
        if self.high is None:
            return Accumulator(self.low.clone(), self.weight)  # float64
        again, self._given = self._given, True
        if self._low is not None:
            self._given_low, self._low = self._low, None
        parts = (self.high,) if self._given_low is None else (self.high, self._given_low)
        return Accumulator.of_parts(tuple(part.clone() for part in parts) if again else parts, self.weight)

    def restore(self, before: Accumulator) -> None:
        """Start from a snapshot."""
        self.clear()
        self.weight = before.weight
        if self.dtype == torch.float64:
            self._low = before.sum.clone()
        elif before.parts[0].dtype == torch.float32:
            self.high, *rest = before.parts
            self._given, self._given_low = True, rest[0] if rest else None
        else:
            self.high = before.sum.float()
            self._low = (before.sum - self.high.double()).float()
