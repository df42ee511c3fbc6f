# SPDX-License-Identifier: Apache-2.0
"""Rows: what a backward pass brings of one parameter, the samples' inputs x and output gradients g, side by side or packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """One parameter's rows in one backward pass: x ``[N, T, ...]`` or None, g ``[N, T, ...]``; with offsets ``[M, ...]``.

    ``lookup``: for a tied table, the rows of its use as an embedding. ``uses``: for images of several sizes, the rows of each use by
    itself; x and g hold the images brought to one size, with zeros around them.
    """

    x: Tensor | None
    g: Tensor
    offsets: Tensor | None = None
    lookup: Rows | None = None
    uses: tuple[Rows, ...] = ()

    @property
    def inputs(self) -> Tensor:
        """x, of a form that has it."""
        assert self.x is not None
        return self.x

    def each(self, change: Callable[[Tensor], Tensor], offsets: Tensor | None = None) -> Rows:
        """Both tensors changed in the same way."""
        return Rows(None if self.x is None else change(self.x), change(self.g), offsets)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """All tensors changed in the same way, in the order that they have."""
        lookup = None if self.lookup is None else self.lookup.mapped(change)
        return self.each(change, self.offsets)._replace(lookup=lookup, uses=tuple(use.mapped(change) for use in self.uses))

    def packed(self) -> Rows:
        """The same rows with offsets."""
        if self.offsets is not None:
            return self
        N, T = self.g.shape[:2]
        offsets = torch.arange(0, N * T + 1, T, device=self.g.device) if T else _nothing(N, self.g)
        return self.each(lambda rows: rows.flatten(0, 1), offsets)

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.g) if self.offsets is None else len(self.offsets) - 1

    def samples(self, first: int, last: int) -> Rows:
        """The rows of samples ``first, ..., last - 1``."""
        lookup = None if self.lookup is None else self.lookup.samples(first, last)
        if self.offsets is None:
            return self.each(itemgetter(slice(first, last)))._replace(lookup=lookup)
        start, end = self.offsets[[first, last]].tolist()
        few = self.each(itemgetter(slice(start, end)), self.offsets[first : last + 1] - start)
        return few._replace(lookup=lookup)

    def one_by_one(self) -> Iterator[Rows]:
        """Packed rows of each sample as ``[1, T, ...]``."""
        assert self.offsets is not None
        for start, end in pairwise(self.offsets.tolist()):
            yield self.each(itemgetter((None, slice(start, end))))

    def without_zeros(self) -> Rows:
        """Leave out the positions whose gradient is zero (padding), if they are many: they add nothing and would be multiplied."""
        alive = (self.g != 0).any(-1)
        if self.offsets is not None or int(alive.sum()) > 0.8 * alive.numel():
            return self
        counts = torch.cat([_nothing(0, self.g), alive.sum(1).cumsum(0)])
        return self.each(lambda rows: rows[alive], counts)


class Images(NamedTuple):
    """Rows of a convolution without groups: x ``[N, C, *S]``, g ``[N, O, *P]``, and how positions meet pixels; empty for one pixel each."""

    x: Tensor
    g: Tensor
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()


def _nothing(N: int, like: Tensor) -> Tensor:
    return torch.zeros(N + 1, dtype=torch.int64, device=like.device)


def merged(uses: list[Rows]) -> Rows:
    """Packed rows of several uses, sample by sample."""
    offsets = [use.offsets for use in uses if use.offsets is not None]
    numbers = [torch.repeat_interleave(o.diff()) for o in offsets]
    order = torch.cat(numbers).argsort(stable=True)
    xs = [use.x for use in uses if use.x is not None]
    return Rows(torch.cat(xs)[order] if xs else None, torch.cat([use.g for use in uses])[order], sum(offsets[1:], offsets[0]))
