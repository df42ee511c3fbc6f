# SPDX-License-Identifier: Apache-2.0
"""Collectors: what stands behind a Fisher structure and takes the rows of each batch. The protocol alone; each structure has its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fisherfast.capture.calls import Call
from fisherfast.capture.tracked import Tracked
from fisherfast.rules import Form, Rows, Window


@dataclass(frozen=True)
class Samples:
    """What there is to know of a batch before its backward passes.

    ``weight`` ``[N]`` float32 or None; ``exists``, each ``[N, L]``: which positions of a sequence there are, of the inputs and of the
    output, where that is said; ``mask`` ``[N, L]`` bool: the one of the inputs alone; ``sparse``: many positions have no gradient.
    """

    N: int
    passes: int = 1
    weight: Tensor | None = None
    exists: tuple[Tensor, ...] = ()
    mask: Tensor | None = None
    sparse: bool = False

    @cached_property
    def padding(self) -> bool:
        """Whether some positions do not exist."""
        return not all(bool(positions.all()) for positions in self.exists)

    @cached_property
    def alike(self) -> bool:
        """Whether all samples have one weight."""
        return self.weight is None or bool((self.weight == self.weight[0]).all())

    def total_weight(self) -> Tensor | float:
        """Of all samples; where there are weights on their device, so that nothing waits for it."""
        return float(self.N) if self.weight is None else self.weight.sum(dtype=torch.float64)

    def weight_of(self, first: int, n: int) -> Tensor | None:
        """Of samples ``first, ..., first + n - 1``."""
        return None if self.weight is None else self.weight[first : first + n]


@dataclass(frozen=True)
class Cost:
    """What taking the rows of one pass costs: FLOPs (exact for products of matrices, rough for the rest) and bytes beside the sums.

    ``once``: FLOPs of a batch's first pass alone, of what all its passes share. ``kept``: bytes that stay until the end of the run, and
    grow with every batch. ``scratch``: bytes that are needed meanwhile.
    """

    flops: int = 0
    once: int = 0
    kept: int = 0
    scratch: int = 0

    def __add__(self, other: Cost) -> Cost:
        """The cost of both, one after the other."""
        once, kept = self.once + other.once, self.kept + other.kept
        return Cost(self.flops + other.flops, once, kept, max(self.scratch, other.scratch))

    def of_batch(self, passes: int) -> Cost:
        """The cost of a batch's passes, one after the other."""
        return Cost(passes * self.flops + self.once, kept=passes * self.kept, scratch=self.scratch)


@dataclass(frozen=True)
class Held:
    """What a collector keeps for the parameters ``names``, or parts of them, that share their sums.

    ``holds``: what that is, in words. ``way``: the op that adds to the sums, if it is not the one for squares. ``smaller``: the advice
    how to hold less, if there is any for these sums. All sizes are in bytes:

    * ``bytes``    the sums at the end of a run, of whose memory the result is made;
    * ``peaks``    for each pass over the data, what is allocated at its end;
    * ``scratch``  for each pass, what it needs beside that for a moment, one block at a time;
    * ``result``   the sums that are part of the result.
    """

    names: tuple[str, ...]
    holds: str
    bytes: int
    peaks: tuple[int, ...]
    way: str | None = None
    smaller: str | None = None
    scratch: tuple[int, ...] = (0,)
    result: int = 0

    def written(self) -> Held:
        """The same with a file of the result, for which long sums are made float64, on memory of their own."""
        return replace(self, peaks=tuple(size + self.result for size in self.peaks))


class Receiver(Protocol):
    """What backward passes hand rows to. Calls are made aside (``Capture.aside``); a batch's passes are told apart by ``number``, from 0."""

    @property
    def separate(self) -> bool:
        """Whether it needs every pass's own rows; if not, passes may be added up where only their squares count."""

    @property
    def averages(self) -> bool:
        """Whether it averages a sample's rows, so that it matters whose a row without a gradient is."""

    def expect(self, tracked: Tracked, windows: set[Window | None]) -> None:
        """Before the passes of a batch: the parts in which a parameter's rows will come; none if it is not used, and adds nothing."""

    def add(self, tracked: Tracked, form: Form, rows: Rows, scale: float, number: int) -> None:
        """Take one parameter's rows of one backward pass, samples first: ``scale * (sample gradient)^2`` counts."""

    def add_gradients(self, tracked: Tracked, gradients: Tensor, first: int, scale: float, number: int) -> None:
        """Take whole sample gradients ``[n, *parameter]`` of samples ``first, ..., first + n - 1``, from the fallback."""

    def touch(self, tracked: Tracked, window: Window | None) -> None:
        """Note that the gradient of this part of a parameter is zero in a pass."""


class Collector(Receiver, Protocol):
    """What a Fisher structure does with the rows of a batch. One batch is ``begin``, any calls of a ``Receiver``, ``settle``."""

    @property
    def by_use(self) -> bool:
        """Whether what a parameter gets depends on how the model uses it."""

    def explore(self, calls: list[Call]) -> None:
        """Look at how the model uses its parameters: once or more, before the batches that count."""

    def forget(self, name: str) -> None:
        """Drop a parameter that the run does not cover."""

    def begin(self, samples: Samples) -> None:
        """Start a batch."""

    def settle(self, complete: bool) -> list[str]:
        """End the batch: weights for what was added. Returns the parameters that met non-finite rows (not added)."""

    def holds(self, passes: int) -> list[Held]:
        """What batches of so many backward passes take, once the model is explored."""

    def cost(self, tracked: Tracked, form: Form, rows: Rows) -> Cost:
        """What ``add`` of these rows takes, told by their shapes alone."""
