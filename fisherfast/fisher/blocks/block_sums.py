# SPDX-License-Identifier: Apache-2.0
"""The sums of one block: what each batch adds to them, and when it counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fisherfast.accumulator import Accumulator, RunningSum
from fisherfast.capture.collector import Cost, Held, Samples
from fisherfast.capture.tracked import Tracked
from fisherfast.fisher.blocks.few_rows import FewRows
from fisherfast.fisher.blocks.kronecker import Place
from fisherfast.ops.gram import gram_
from fisherfast.rules import Form, Rows

_BAND = 256  # rows that are mirrored at a time: what is copied stays in the caches


class BatchSum:
    """A running sum with its flag; a batch that may have to be dropped waits in a stage."""

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        self.running = RunningSum(like.detach().new_empty(()).expand(shape))
        self.flag = torch.zeros(1, dtype=torch.int32, device=like.device)
        self._stage: Tensor | None = None
        self._waits = False  # whether this batch goes to the stage
        self._weight: Tensor | float | None = None  # of what was added in this batch; None: nothing was
        self.few_rows: FewRows | None = None  # behind the sum, where they are wanted

    def target(self, staged: bool) -> Tensor:
        """Where a batch goes."""
        self._waits = staged
        if not staged:
            return self.running.low
        if self._stage is None:
            self._stage = torch.zeros_like(self.running.low)
        return self._stage

    def foresee(self, *rows: Tensor) -> None:
        """Set the flag if one is not finite: before they are added in several parts, of which the earlier ones would stay."""
        for some in rows:
            self.flag |= ~torch.isfinite(some).all()

    def add_outer(
        self, target: Tensor, rows: Tensor, scale: float = 1.0, *, weight: Tensor | None = None, bias: bool = False
    ) -> None:
        """``target += scale * sum_m w_m rows[m] rows[m]^T``, and the rows where they are kept; squares, where only the diagonal is."""
        if target.dim() == 1:
            add_squares(target, rows, scale, weight, self.flag)
            return
        gram_(target, rows, scale, weight=weight, bias=bias, flag=self.flag)
        if self.few_rows is not None:
            self.few_rows.add(rows, weight, scale, bias)

    def copy(self) -> BatchSum:
        """The same sum on memory of its own, between batches; of the rows behind it nothing is known."""
        copy = BatchSum(self.running.shape, self.flag.new_empty((), dtype=self.running.dtype))
        if self.running.weight:
            copy.running.restore(self.running.snapshot())
        return copy

    def visited(self, weight: Tensor | float) -> None:
        """Note the weight of what this batch has added: afterwards, so that what fails has none."""
        self._weight = weight

    def count(self, weight: float) -> None:
        """Count what was just added by itself, whatever becomes of its batch; while the flag is set, nothing was."""
        if not self.flag:
            self.running.counted(weight)

    def settle(self, whole: bool, alone: bool) -> None:
        """End the batch; ``whole``: it counts; ``alone``: this sum counts although the batch did not complete."""
        counts = whole or (alone and not self._waits)
        if self._weight is not None and counts:
            if self._waits and self._stage is not None:
                self.running.low.add_(self._stage)
            self.running.counted(float(self._weight))
        if self.few_rows is not None:
            self.few_rows.settle(counts)
        if self._stage is not None:
            self._stage.zero_()
        self.flag.zero_()
        self._weight, self._waits = None, False


class BlockSums(Protocol):
    """The sums of one block."""

    @property
    def place(self) -> Place:
        """Which numbers it is over."""

    @property
    def sums(self) -> tuple[BatchSum, ...]:
        """All of them."""

    def add(self, form: Form, rows: Rows, scale: float, number: int, samples: Samples, staged: bool) -> None:
        """Take the rows of pass ``number``."""

    def check(self, form: Form) -> None:
        """Raise ValueError if it is used in a form that it cannot take."""

    def saw(self, g: torch.dtype) -> None:
        """Rows of g come in this dtype."""

    @property
    def main(self) -> BatchSum:
        """The one in which every sample counts."""

    def end(self) -> None:
        """The batch is over."""

    def holds(self, staged: bool) -> Held:
        """What they take; ``staged``: with batches that are added up before they count."""

    def cost(self, form: Form, rows: Rows) -> Cost:
        """What ``add`` takes; of the scratch what it makes of the rows, where that is large."""

    def block(self, made: Mapping[str, Any]) -> Any:
        """What was added, on memory of its own; ``made`` are the blocks before it, by name."""

    def restore(self, block: Any) -> None:
        """Start from such a block."""


class BatchwiseSums:
    """Those that keep nothing of a batch once it is over."""

    def saw(self, g: torch.dtype) -> None:
        """See ``BlockSums``: nothing depends on it."""

    def end(self) -> None:
        """See ``BlockSums``: nothing is kept of a batch."""


class WeightSums(BatchwiseSums):
    """Those of a block that is made of a weight's inputs and output gradients: in every batch they must be of one form."""

    place: Place
    form: Form

    def check(self, form: Form) -> None:
        """Raise ValueError if it is used in another form than in the first batch."""
        if form != self.form:
            raise ValueError(f"{self.place.name}: must be used as in the first batch ({self.form}), got {form}")

    def saw(self, g: torch.dtype) -> None:
        """See ``BlockSums``."""
        self.place = self.place.seeing(g)

    def leave(self) -> None:
        """Have inputs of its own from the next batch on, if it shares those of another weight."""


class GradientSums(BatchwiseSums):
    """Those that are made of sample gradients: of any form, or from the fallback."""

    def check(self, form: Form) -> None:
        """See ``BlockSums``: any form will do."""

    def add_gradients(self, gradients: Tensor, first: int, scale: float, samples: Samples, staged: bool) -> None:
        """Take the gradients ``[n, *parameter]`` of samples ``first, ..., first + n - 1``."""
        raise NotImplementedError


class DiagonalSums(GradientSums):
    """The sums of a parameter that has no block."""

    def __init__(self, tracked: Tracked) -> None:
        self._name, self._shape = tracked.name, tuple(tracked.parameter.shape)
        self.squares = BatchSum(self._shape, tracked.parameter)
        self.sums = (self.squares,)

    def holds(self, staged: bool) -> Held:
        """See ``BlockSums``."""
        held, result = self.squares.running.held(staged), self.squares.running.nbytes
        return Held((self._name,), f"diagonal {list(self._shape)}", held, (held,), result=result)

    def cost(self, form: Form, rows: Rows) -> Cost:
        """See ``BlockSums``."""
        return Cost(form.flops(rows, self._shape))

    def add(self, form: Form, rows: Rows, scale: float, number: int, samples: Samples, staged: bool) -> None:
        """Take the rows of one pass."""
        form.accumulate(self.squares.target(staged), rows, scale, weight=samples.weight, flag=self.squares.flag)

    def add_gradients(self, gradients: Tensor, first: int, scale: float, samples: Samples, staged: bool) -> None:
        """Take whole sample gradients."""
        flat = gradients.reshape(len(gradients), -1)
        weight = samples.weight_of(first, len(flat))
        add_squares(self.squares.target(staged).view(-1), flat, scale, weight, self.squares.flag)

    @property
    def main(self) -> BatchSum:
        """See ``BlockSums``."""
        return self.squares


def mirrored(accumulator: Accumulator) -> Accumulator:
    """The ops add to the upper triangle of matrices ``[..., D, D]`` only; the lower one is copied from it, a band at a time.

    In place: a run that goes on with these sums reads no lower triangle.
    """
    for matrix in accumulator.parts:
        for start in range(0, matrix.shape[-1], _BAND):
            band, below = slice(start, start + _BAND), slice(start + _BAND, None)
            block = matrix[..., band, band]
            block.copy_(block.triu() + block.triu(1).mT)
            matrix[..., below, band] = matrix[..., band, below].mT
    return accumulator


def add_squares(acc: Tensor, g: Tensor, scale: float, weight: Tensor | None, flag: Tensor) -> None:
    """``acc[o] += scale * sum_{n,t} w_nt g[n,t,o]^2``, unless something is not finite."""
    add_rows(acc, g.to(acc.dtype).square(), scale, weight, flag)


def add_rows(acc: Tensor, rows: Tensor, scale: float, weight: Tensor | None, flag: Tensor) -> None:
    """``acc[o] += scale * sum_{n,t} w_nt rows[n,t,o]``, unless something is not finite."""
    rows = rows if weight is None else rows * weight.unsqueeze(-1)
    sums = rows.flatten(0, -2).sum(0)
    flag |= ~sums.isfinite().all()
    acc += torch.where(flag == 0, scale * sums, 0.0)
