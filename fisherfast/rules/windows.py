# SPDX-License-Identifier: Apache-2.0
"""Which part of a parameter is used: entries of its first axis, or any window of its memory."""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import dataclass, replace

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
    """A part of a parameter, as it lies in the parameter's memory.

    ``copied_as``: the shape in which it is used where no view has it: of heads ``[H, D, K]``, their rows one after the other ``[H K, D]``.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    copied_as: tuple[int, ...] = ()

    @classmethod
    def of(cls, part: Tensor, whole: Tensor) -> Window:
        """Where ``part``, a view, lies in ``whole``."""
        return cls(tuple(part.shape), part.stride(), int(part.storage_offset() - whole.storage_offset()))

    @property
    def used_shape(self) -> tuple[int, ...]:
        """The shape in which it is used."""
        return self.copied_as or self.shape

    def reshaped(self, shape: tuple[int, ...]) -> Window:
        """The same numbers in the same order, in another shape."""
        if not self.dense:
            return replace(self, copied_as=shape)
        return Window(shape, tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))), self.start)

    def of_tensor(self, whole: Tensor) -> Tensor:
        """The same part of a tensor that is laid out like the parameter: a view."""
        return whole.as_strided(self.shape, self.strides, whole.storage_offset() + self.start)

    def used(self, whole: Tensor) -> Tensor:
        """The same as it is used: in ``used_shape``."""
        return self.of_tensor(whole).reshape(self.used_shape)

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

    def matrix(self, shape: tuple[int, ...]) -> tuple[Entries, tuple[int, ...]] | None:
        """Of a matrix that it is used as: the entries of the first axis of a parameter of this shape that it consists of, all or one,
        and the axes of these that make its rows. The others make its columns, in their order. None if it is no such matrix.
        """
        if (entries := self.entries(shape)) is not None:
            return entries, (0,)
        if len(self.used_shape) != 2 or not shape:
            return None
        one = Entries((self.start // max(math.prod(shape[1:]), 1),))
        for entries, part in ((ALL, shape), (one, shape[1:])):
            axes = self._axes(part) if self.start == sum(entries) * math.prod(part) else None
            if axes is not None:
                sizes = itertools.accumulate((part[axis] for axis in axes), initial=1, func=operator.mul)
                number = next((n for n, size in enumerate(sizes) if size == self.used_shape[0]), None)
                if number is not None and sorted(axes[number:]) == axes[number:]:
                    return entries, tuple(axes[:number])
        return None

    def _axes(self, shape: tuple[int, ...]) -> list[int] | None:
        """The order in which it has the axes of a tensor of this shape, but for those of size 1; None if it is not all of that."""
        found = []
        for extent, stride in zip(self.shape, self.strides, strict=True):
            mine: list[int] = []
            for axis in reversed(range(len(shape))):
                size = math.prod(shape[k] for k in mine)
                if size < extent and shape[axis] > 1 and math.prod(shape[axis + 1 :]) == stride * size:
                    mine.insert(0, axis)
            if math.prod(shape[k] for k in mine) != extent:
                return None
            found += mine
        return found if sorted(found) == [axis for axis, size in enumerate(shape) if size > 1] else None

    def end(self) -> int:
        """One past the last element."""
        return self.start + 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    def of_each(self, whole: Tensor) -> Tensor:
        """The same part of every tensor in a stack ``[N, *parameter]``."""
        return whole.as_strided((len(whole), *self.shape), (whole.stride(0), *self.strides), self.start)

    def disjoint(self, other: Window) -> bool:
        """Whether the two certainly have no element in common: one ends before the other begins."""
        return self.end() <= other.start or other.end() <= self.start
