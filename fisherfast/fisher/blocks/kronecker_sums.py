# SPDX-License-Identifier: Apache-2.0
"""What a backward pass adds to the factors of a Kronecker block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisherfast.accumulator import Accumulator
from fisherfast.capture.collector import Cost, Held, Samples
from fisherfast.fisher.blocks.block_sums import BatchSum, WeightSums, add_rows, add_squares, mirrored
from fisherfast.fisher.blocks.existing_rows import ExistingRows
from fisherfast.fisher.blocks.few_rows import FewRows
from fisherfast.fisher.blocks.kronecker import KroneckerBlock, Place
from fisherfast.fisher.blocks.rank import Rounding
from fisherfast.fisher.run.memory import in_words
from fisherfast.ops.conv_gram import conv_gram_
from fisherfast.rules import Convolution, Form, Lookup, Rows

_COPIED = 2**25  # bytes of inputs without padding, at a time


class KroneckerSums(WeightSums):
    """The sums of one Kronecker block; see ``BlockSums``."""

    def __init__(
        self,
        place: Place,
        form: Form,
        weight: Tensor,
        max_factor_dim: int,
        keep_rows: bool,
        leader: KroneckerSums | None = None,
    ) -> None:
        self.place, self.rounding, self.form = place, Rounding.of(weight.dtype), form
        self._existing = ExistingRows(place.name)
        O, D = place.sizes(weight)
        self._kernel = weight.shape[2:]
        counts = isinstance(form, Lookup)  # of every row of a table: the factor of inputs that are one-hot is diagonal
        if D > max_factor_dim and not counts:
            raise ValueError(
                f"{place.name}: its input factor must be at most max_factor_dim = {max_factor_dim}, got {D} x {D} "
                f"({in_words(8 * D * D)}); pass max_factor_dim={D} if there is room for it, or freeze the weight "
                "(requires_grad_(False)) and measure its diagonal in a run of its own"
            )
        own = BatchSum((place.groups, D) if counts else (place.groups, D, D), weight)
        self.A: BatchSum = own if leader is None else leader.A
        self._inputs: Inputs = Inputs(place.name) if leader is None else leader._inputs
        self._inputs.members += 1
        self._vector = max_factor_dim < O
        self.B = BatchSum((place.groups, O) if self._vector else (place.groups, O, O), weight)
        if keep_rows and place.groups == 1:
            if leader is None:
                self.A.few_rows = None if counts else FewRows(D)
            self.B.few_rows = None if self._vector else FewRows(O)

    @property
    def _factors(self) -> tuple[BatchSum, BatchSum]:
        return self.A, self.B

    @property
    def sums(self) -> tuple[BatchSum, ...]:
        """See ``BlockSums``; a shared factor is its leader's."""
        return self._factors if self.place.input_of is None else (self.B,)

    def blank(self, made: Mapping[str, KroneckerBlock]) -> KroneckerBlock:
        """A block of these sizes on no memory."""
        A, B = self._blank_factors()
        return KroneckerBlock.following(self.place, lambda: A, B, self.rounding, made)

    def _blank_factors(self) -> tuple[Accumulator, Accumulator]:
        A, B = (Accumulator.zeros(one.running.shape, "meta") for one in self._factors)
        return A, B

    def holds(self, staged: bool) -> Held:
        """See ``BlockSums``."""
        of_sums = sum(one.running.held(staged) for one in self.sums)
        of_result = sum(one.running.nbytes for one in self.sums)
        of_rows = sum(one.few_rows.most(one.running.dtype) for one in self.sums if one.few_rows is not None)
        D, O = (one.running.shape[1] for one in self._factors)
        smaller = f"pass max_factor_dim={O - 1}, which keeps B as its diagonal" if D < O and not self._vector else None
        what = KroneckerBlock(self.place, *self._blank_factors(), self.rounding).describe()
        peak = of_sums + 2 * of_rows  # kept as long as they are few; in the end joined in one tensor
        return Held(self.place.labels, what, of_sums, (peak,), self.place.op, smaller, result=of_result)

    def cost(self, form: Form, rows: Rows) -> Cost:
        """See ``BlockSums``; of a symmetric product one half is computed, and inputs, which all passes share, count once."""
        G = self.place.groups
        M = self._num_rows(form, rows)
        widths = [1 if len(one.running.shape) == 2 else one.running.shape[1] for one in self._factors]
        of_inputs, of_gradients = (G * M * one.running.shape[1] * width for one, width in zip(self._factors, widths, strict=True))
        of_inputs = M if isinstance(form, Lookup) else of_inputs
        return Cost(of_gradients, once=of_inputs if self.place.input_of is None else 0)

    def _num_rows(self, form: Form, rows: Rows) -> int:
        if not isinstance(form, Convolution):
            return math.prod(rows.g.shape[:-1])
        return sum(len(use.g) * math.prod(use.g.shape[2:]) for use in rows.uses or (rows,))

    def block(self, made: Mapping[str, Any]) -> KroneckerBlock:
        """What was added, on memory of its own."""
        block = KroneckerBlock.following(self.place, lambda: _factor(self.A), _factor(self.B), self.rounding, made)
        few_a = _few(self.A) if block.leader is None else block.leader.few_rows[0]
        block.few_rows = (few_a, _few(self.B))
        return block

    def restore(self, block: KroneckerBlock) -> None:
        """See ``BlockSums``; of the rows before none are known."""
        self.A.few_rows = self.B.few_rows = None
        if block.leader is None:
            self.A.running.restore(block.A)
        self.B.running.restore(block.B)

    def leave(self) -> None:
        """See ``WeightSums``."""
        self._inputs.members -= 1
        self._inputs = Inputs(self.place.name)
        self._inputs.members = 1
        self.place, self.A = replace(self.place, input_of=None), self.A.copy()

    def end(self) -> None:
        """See ``BlockSums``."""
        self._inputs.end()

    @property
    def main(self) -> BatchSum:
        """See ``BlockSums``."""
        return self.B

    def add(self, form: Form, rows: Rows, scale: float, number: int, samples: Samples, staged: bool) -> None:
        """Take the rows of one pass; the inputs are those of all passes, and count once."""
        A = self.A.target(staged) if number == 0 and self._inputs.new(self.place.name, form.as_used(rows)[0]) else None
        B = self.B.target(staged)
        if isinstance(form, Convolution):
            self._add_images(form, rows, scale, samples.weight, A, B)
        else:
            self._add_rows(rows, scale, samples, A, B)

    def _add_images(
        self, form: Convolution, rows: Rows, scale: float, weight: Tensor | None, A: Tensor | None, B: Tensor
    ) -> None:
        """Patches of one side at every pixel of the other: of the inputs, or of the gradients where it is transposed."""
        inputs, gradients, uses = self._add_patches, self._add_pixels, rows.uses or (rows,)
        if form.transposed:
            inputs, gradients = gradients, inputs
        if rows.uses:
            of_x, of_g = (self.B, self.A) if form.transposed else (self.A, self.B)
            of_x.foresee(rows.inputs)
            of_g.foresee(rows.g)
        each = [weight if weight is None or use.offsets is None else weight.repeat_interleave(use.offsets.diff()) for use in uses]
        positions = 0.0 if A is None else sum(_positions(use, mine) for use, mine in zip(uses, each, strict=True))
        for use, mine in zip(uses, each, strict=True):
            if A is not None:
                inputs(self.A, A, form, use, 1.0, mine)
                self.A.visited(positions)
            gradients(self.B, B, form, use, scale, mine)

    def _add_patches(
        self, one: BatchSum, target: Tensor, form: Convolution, rows: Rows, scale: float, weight: Tensor | None
    ) -> None:
        if target.dim() == 2:
            squares = form.patch_sums(rows._replace(x=rows.inputs.to(target.dtype).square()), self._kernel)
            add_rows(target.view(-1), squares, scale, weight, one.flag)
            return
        where = {"kernel": self._kernel, "positions": rows.g.shape[2:], "stride": form.stride, "padding": form.padding}
        more = {"dilation": form.dilation, "groups": form.groups, "bias": self.place.bias is not None}
        conv_gram_(target, rows.inputs, scale, weight=weight, flag=one.flag, **where, **more)
        if one.few_rows is not None and one.few_rows.room(len(rows.g) * math.prod(rows.g.shape[2:])):
            patches = form.patches(rows, self._kernel)
            one.few_rows.add(patches, _of_pixels(patches, weight), scale, bias=self.place.bias is not None)

    def _add_pixels(
        self, one: BatchSum, target: Tensor, form: Convolution, rows: Rows, scale: float, weight: Tensor | None
    ) -> None:
        pixels = rows.g.flatten(2).mT
        if target.dim() == 2:
            add_squares(target.view(-1), pixels, scale, _of_pixels(pixels, weight), one.flag)
            return
        conv_gram_(target, rows.g, scale, weight=weight, flag=one.flag, groups=form.groups)
        if one.few_rows is not None:
            one.few_rows.add(pixels, _of_pixels(pixels, weight), scale)

    def _add_rows(self, rows: Rows, scale: float, samples: Samples, A: Tensor | None, B: Tensor) -> None:
        x, g = self.form.as_used(rows)
        weight = _of_samples(rows, samples.weight)
        if A is not None:
            self._add_inputs(x, weight, self._existing.among(g, samples.exists), A)
        if isinstance(self.form, Lookup):
            weight = self._counted(x, weight)
        self.B.add_outer(B[0], g, scale, weight=weight)

    def _add_inputs(self, x: Tensor, weight: Tensor | None, mask: Tensor | None, A: Tensor) -> None:
        if mask is not None and (weight is not None or isinstance(self.form, Lookup)):
            weight, mask = mask.to(torch.float32) if weight is None else weight * mask, None
        counted = weight if mask is None else mask
        if isinstance(self.form, Lookup):
            counts = self._counted(x, weight).flatten().double()
            # By sorting, on a GPU: bincount would wait for the device, and add in any order.
            A[0] += counts.new_zeros(A.shape[1]).index_put_((x.flatten(),), counts, accumulate=True).to(A.dtype)
        else:
            for rows in (x,) if mask is None else _present(x, mask):
                self.A.add_outer(A[0], rows, weight=weight, bias=self.place.bias is not None)
        self.A.visited(math.prod(x.shape[:-1]) if counted is None else counted.sum(dtype=torch.float64))

    def _counted(self, ids: Tensor, weight: Tensor | None) -> Tensor:
        """The weights of the rows of a table that are looked up; the padding row has no gradient."""
        assert isinstance(self.form, Lookup)
        counted = (ids.squeeze(-1) != self.form.padding_idx).to(torch.float32, memory_format=torch.contiguous_format)
        return counted if weight is None else weight * counted


def _positions(images: Rows, weight: Tensor | None) -> Tensor | float:
    """How many there are of all images, by their weights."""
    return math.prod(images.g.shape[2:]) * (len(images.g) if weight is None else weight.sum(dtype=torch.float64))


class Inputs:
    """Whose inputs a factor A is of: one weight's, or those of several that multiply the same ones, which are added once."""

    def __init__(self, leader: str) -> None:
        self._leader, self.members = leader, 0
        self._first: Tensor | None = None  # in this batch, held as long as others are to be compared with it
        self._come = 0

    def new(self, weight: str, x: Tensor) -> bool:
        """Whether these inputs are to be added: they are the first in their batch. Errors: ValueError if they are others."""
        self._come += 1
        first, last = self._first, self._come == self.members
        self._first = None if last else x if first is None else first
        if last:
            self._come = 0
        if first is None:
            return True
        same = (x.data_ptr(), x.shape, x.stride()) == (first.data_ptr(), first.shape, first.stride())
        if not same and not _equal_rows(x, first):
            raise ValueError(f"{weight}: must have the inputs of {self._leader!r} as in the first batch, got others")
        return False

    def end(self) -> None:
        """The batch is over, whoever came."""
        self._first, self._come = None, 0


def _equal_rows(x: Tensor, y: Tensor) -> bool:
    """Whether two sets of rows have the same in every column: those without a gradient come in another order."""
    if x.shape == y.shape and torch.equal(x, y):
        return True
    x, y = (t.flatten(0, -2) for t in (x, y))
    return x.shape == y.shape and torch.equal(x.sort(0).values, y.sort(0).values)


def _factor(one: BatchSum) -> Accumulator:
    factor = one.running.snapshot()
    return factor if len(factor.shape) == 2 else mirrored(factor)


def _few(one: BatchSum) -> Tensor | None:
    return None if one.few_rows is None else one.few_rows.rows()


def _of_samples(rows: Rows, weight: Tensor | None) -> Tensor | None:
    """The weight of every row, that of its sample; None if all are 1."""
    if weight is None or rows.offsets is None:
        return None if weight is None else weight.unsqueeze(1).expand(rows.g.shape[:2]).contiguous()
    return weight.repeat_interleave(rows.offsets.diff())


def _of_pixels(rows: Tensor, weight: Tensor | None) -> Tensor | None:
    """The weight of every row ``[images, pixels]``, that of its image."""
    return None if weight is None else weight.unsqueeze(1).expand(rows.shape[:2])


def _present(x: Tensor, mask: Tensor) -> Iterator[Tensor]:
    """The rows of ``x`` ``[N, T, I]`` that there are, without the others: padding takes no time, and 16-bit rows need no weights,
    with which they are multiplied as float32. A few samples at a time, since a copy of all may be large.
    """
    few = max(1, _COPIED // max(x[:1].nbytes, 1))
    for part, there in zip(x.split(few), mask.split(few), strict=True):
        yield part.flatten(0, 1).index_select(0, there.flatten().nonzero().squeeze(1))
