# SPDX-License-Identifier: Apache-2.0
"""Which part of a parameter is used: entries of its first axis, or any window of its memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


class Entries(tuple[int, ...]):
    """Entries of a tensor's first axis: ``(k,)`` is one of them, ``(first, last)`` are those before last, ``()`` all."""

    def of(self, tensor: Tensor) -> Tensor:
        """Those of a tensor: a view."""
        return tensor[self[0]] if len(self) == 1 else tensor[slice(*self)] if self else tensor

    def span(self, extent: int) -> tuple[int, int]:
        """The first, and one past the last, of an axis this long."""
        return (self[0], self[-1] + (len(self) == 1)) if self else (0, extent)

    def named(self, parameter: str) -> str:
        """What they are called: ``w[3]``, ``w[0:7]``, ``w``."""
        return f"{parameter}[{':'.join(map(str, self))}]" if self else parameter


ALL = Entries()


@dataclass(frozen=True)
class Window:
    """A part of a parameter, as it lies in the parameter's memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int

    @classmethod
    def of(cls, part: Tensor, whole: Tensor) -> Window:
        """Where ``part``, a view, lies in ``whole``."""
        return cls(tuple(part.shape), part.stride(), int(part.storage_offset() - whole.storage_offset()))

    def of_tensor(self, whole: Tensor) -> Tensor:
        """The same part of a tensor that is laid out like the parameter."""
        return whole.as_strided(self.shape, self.strides, whole.storage_offset() + self.start)

    @property
    def dense(self) -> bool:
        """Whether its elements follow one another, in order."""
        size = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and stride != size:
                return False
            size *= extent
        return True

    def entries(self, shape: tuple[int, ...]) -> Entries | None:
        """The entries of the first axis of a parameter of this shape that it consists of; None if it is no whole number of them.

        The other axes may be flattened.
        """
        each, size = math.prod(shape[1:]), math.prod(self.shape)
        if not (shape and self.shape and size and self.dense) or self.start % each or size % each:
            return None
        first, count = self.start // each, size // each
        if count == 1 and len(self.shape) < len(shape) and self.shape[0] == shape[1]:
            return Entries((first,))
        if self.shape[0] != count:
            return None
        return ALL if count == shape[0] else Entries((first, first + count))

    def end(self) -> int:
        """One past the last element."""
        return self.start + 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    def of_each(self, whole: Tensor) -> Tensor:
        """The same part of every tensor in a stack ``[N, *parameter]``."""
        return whole.as_strided((len(whole), *self.shape), (whole.stride(0), *self.strides), self.start)

    def disjoint(self, other: Window) -> bool:
        """Whether the two certainly have no element in common: one ends before the other begins."""
        return self.end() <= other.start or other.end() <= self.start
