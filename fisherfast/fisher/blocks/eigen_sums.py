# SPDX-License-Identifier: Apache-2.0
"""What a backward pass adds to the eigenvalues of an eigen block: squares of the sample gradients in the basis, ``V^T G_n U``.

A basis turns the rows of its side, or the sample gradients that the rows make: whichever order takes fewer FLOPs (``Order``). All
go through the samples in chunks.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisherfast._precision import wide_dtype
from fisherfast.accumulator import Accumulator
from fisherfast.capture.capture import Capture
from fisherfast.capture.collector import Cost, Held, Samples
from fisherfast.fisher.blocks.block_collector import BlockCollector
from fisherfast.fisher.blocks.block_sums import BatchSum, WeightSums
from fisherfast.fisher.blocks.eigen import EigenBlock, eigenbasis, workspace
from fisherfast.fisher.blocks.kronecker import KroneckerBlock, Place
from fisherfast.ops import _conv as conv
from fisherfast.ops.conv_sq import conv_sq_
from fisherfast.ops.embedding_sq import embedding_sq_
from fisherfast.ops.linear_sq import linear_sq_
from fisherfast.ops.scale_sq import scale_sq_
from fisherfast.rules import Convolution, Form, Lookup, MatMul, Rows

_CHUNK_BYTES = 2**24
_LINE, _WIDE = 16, 256  # float32 numbers of a cache line; of a row that may be a few numbers longer


class Order(enum.Enum):
    """What the two bases turn. Rows come before gradients as long as there are fewer positions than features on the other side."""

    ROWS = "both rows"  # linear layers of short sequences; what they make is squared
    HALF = "the rows of g, then the sample gradients"  # most images
    GRADIENTS = "the sample gradients"  # large images with few channels


class EigenSums(WeightSums):
    """The sums of one eigen block; see ``BlockSums``. The subclasses know the forms.

    The eigenvectors are computed when they are first needed; their sizes are known before.
    """

    def __init__(self, form: Form, weight: Tensor, of: KroneckerBlock, leader: EigenSums | None) -> None:
        self.place, self.rounding, self.form, self.kronecker, self._leader = of.place, of.rounding, form, of, leader
        self._shape = tuple(weight.shape)
        self._dtype = wide_dtype(weight.dtype)
        self._rotates = len(of.A.shape) == 3, len(of.B.shape) == 3  # what is diagonal has no basis
        O, D = of.B.shape[1], of.A.shape[1]
        of_A, of_B = of.few_rows
        self._full, self._size = (O, D), (O if of_B is None else len(of_B), D if of_A is None else len(of_A))
        sides = tuple(zip(self._full, self._size, self._rotates[::-1], strict=True))  # of V and g, of U and x
        self._sides = sides[::-1] if self._swapped else sides
        self.values = BatchSum((of.place.groups, *self._stored(*self._size)), weight)
        self.sums = (self.values,)

    @functools.cached_property
    def U(self) -> Tensor | None:
        """The eigenvectors of A."""
        if self._leader is not None:
            return self._leader.U
        of = self.kronecker
        return eigenbasis(of.finite(of.A.nearest(self._dtype), "input"), of.few_rows[0], self._dtype)

    @functools.cached_property
    def V(self) -> Tensor | None:
        """The eigenvectors of B."""
        of = self.kronecker
        return eigenbasis(of.finite(of.B.nearest(self._dtype), "output"), of.few_rows[1], self._dtype)

    def holds(self, staged: bool) -> Held:
        """See ``BlockSums``; the factors were there before."""
        (O, D), (q, r), values = self._full, self._size, self.values.running
        own = self._leader is None
        of_bases = self.place.groups * (own * self._rotates[0] * D * r + self._rotates[1] * O * q) * self._dtype.itemsize
        of, (rows_a, rows_b) = self.kronecker, self.kronecker.few_rows
        kept = (of.A, rows_a, of.B, rows_b) if own else (of.B, rows_b)
        of_factors = sum(one.nbytes for one in kept if one is not None)
        what = f"{q} x {r} eigenvalues, {self.kronecker.describe()}"
        made = values.held(staged) + of_bases
        largest = max(own * self._rotates[0] * D, self._rotates[1] * O, 1)
        scratch = workspace(self.place.groups, largest, self._dtype)
        return Held(self.place.labels, what, made + of_factors, (made,), self.form.op, scratch=(scratch,), result=values.nbytes)

    def cost(self, form: Form, rows: Rows) -> Cost:
        """See ``BlockSums``: of the cheapest order; the eigenvectors, once in a run, are not counted.

        The scratch is what the samples of a chunk are turned into, twice: before the last product and after it.
        """
        (N, T), order = self._extents(rows), self.order(rows)
        floats = self._made(rows, order)
        scratch = 2 * min(rows.num_samples, _samples_at_a_time(floats)) * floats * self._dtype.itemsize
        return Cost(2 * N * self.place.groups * self._products(T)[order], scratch=scratch)

    def _extents(self, rows: Rows) -> tuple[int, int]:
        """Samples, and positions of each."""
        if rows.offsets is None:
            return len(rows.g), rows.g.shape[1]
        N = len(rows.offsets) - 1
        return N, math.ceil(len(rows.g) / max(1, N))

    def _stored(self, q: int, r: int) -> tuple[int, int]:
        """The shape in which the values are added up."""
        return q, r

    @property
    def main(self) -> BatchSum:
        """See ``BlockSums``."""
        return self.values

    def block(self, made: Mapping[str, Any]) -> EigenBlock:
        """See ``BlockSums``."""
        return EigenBlock(self.kronecker.at(self.rounding), self.U, self.V, self.values.running.snapshot())

    def restore(self, block: EigenBlock) -> None:
        """See ``BlockSums``. Errors: ValueError unless the block's basis is of the same factors."""
        pairs = zip((block.kronecker.A, block.kronecker.B), (self.kronecker.A, self.kronecker.B), strict=True)
        if block.values.shape != (self.place.groups, *self._size) or not all(torch.equal(a.sum, b.sum) for a, b in pairs):
            raise ValueError(
                f"{self.place.name}: a checkpoint of EKFAC must go on in the basis it began with, got another; give the same "
                "ff.EKFAC(basis=...), or remove the file"
            )
        self.U, self.V = block.U, block.V  # to the last bit
        self._take(block.values)

    def _take(self, values: Accumulator) -> None:
        self.values.running.restore(values)

    def add(self, form: Form, rows: Rows, scale: float, number: int, samples: Samples, staged: bool) -> None:
        """See ``BlockSums``."""
        acc = self.values.target(staged)
        if isinstance(form, MatMul):
            rows = form.oriented(rows)  # a transposed use, turned round before, is needed as it is used
        order = self.order(rows)
        step = _samples_at_a_time(self._made(rows, order))
        if rows.num_samples > step or self.place.groups > 1:
            self.values.foresee(rows.inputs, rows.g)
        for few, weight in _chunks(rows, samples.weight, step):
            exact = few._replace(x=self._exact(few.x), g=self._exact(few.g))
            if order is Order.ROWS:
                self._add_rows(acc, exact, scale, weight)
            else:
                self._add_gradients(acc, exact, order, scale, weight)

    def _exact(self, rows: Any) -> Any:
        """In the precision of the sums; ids as they are."""
        return rows.to(self.values.running.low.dtype) if rows.is_floating_point() else rows

    def order(self, rows: Rows) -> Order:
        """The cheapest for these rows."""
        return _cheapest(self._products(self._extents(rows)[1]))

    def _products(self, T: int) -> dict[Order, int]:
        """What each order multiplies of a sample with T positions; the squares of rotated rows are a product too."""
        (O, D), (q, r), (U, V) = self._full, self._size, self._rotates
        (P, p, of_g), (C, c, of_x) = self._sides
        return {
            Order.ROWS: T * (V * O * q + U * D * r + q * r),
            Order.HALF: T * (of_g * P * p + p * C) + of_x * p * C * c,
            Order.GRADIENTS: T * O * D + U * O * D * r + V * O * q * r,
        }

    def _made(self, rows: Rows, order: Order) -> int:
        """How many numbers are made of a sample at a time."""
        (P, p, _), (C, c, _) = self._sides
        T = self._extents(rows)[1]
        return self.place.groups * {Order.ROWS: T * (p + c), Order.HALF: p * C, Order.GRADIENTS: P * C}[order]

    @property
    def _swapped(self) -> bool:
        """Whether rows of x meet V and rows of g meet U."""
        return False

    def _add_rows(self, acc: Tensor, rows: Rows, scale: float, weight: Tensor | None) -> None:
        """Squares of what the turned rows make."""
        raise NotImplementedError

    def _turned(self, g: Tensor) -> Tensor:
        """Rows of g in the basis of their side."""
        raise NotImplementedError

    def _gradients(self, rows: Rows) -> Tensor:
        """Sample gradients ``[n, G, O, D]``, the weight's columns and, last, the bias's."""
        raise NotImplementedError

    def _add_gradients(self, acc: Tensor, rows: Rows, order: Order, scale: float, weight: Tensor | None) -> None:
        """V, where it is still to come, turns in ``linear_sq_``: as rows of every sample."""
        options = {"weight": weight, "flag": self.values.flag}
        U, V = self.U, self.V
        if order is Order.HALF:
            rows, U, V = rows._replace(g=self._turned(rows.g)), None if self._swapped else U, V if self._swapped else None
        gradients = self._gradients(rows)
        n, G = gradients.shape[:2]
        if U is not None:
            gradients = _product(gradients, U[0]) if G == 1 else gradients @ U
        for k, values in enumerate(acc):
            if V is None:
                scale_sq_(values.view(-1), None, gradients[:, k].reshape(n, 1, -1), scale, **options)
            else:
                linear_sq_(values, gradients[:, k], V[k].expand(n, -1, -1), scale, **options)


class _OfMatrix(EigenSums):
    def order(self, rows: Rows) -> Order:
        return Order.ROWS if rows.offsets is not None else super().order(rows)  # sequences of many lengths stay as they are

    def _add_rows(self, acc: Tensor, rows: Rows, scale: float, weight: Tensor | None) -> None:
        x = rows.inputs
        if self.U is not None:
            U = self.U[0]
            x = _product(x, U) if self.place.bias is None else _product(x, U[:-1]).add_(U[-1])
        linear_sq_(acc[0], x, self._turned(rows.g), scale, weight=weight, offsets=rows.offsets, flag=self.values.flag)

    def _turned(self, g: Tensor) -> Tensor:
        return g if self.V is None else _product(g, self.V[0])

    def _gradients(self, rows: Rows) -> Tensor:
        gradients = rows.g.new_empty(len(rows.g), 1, rows.g.shape[2], self._sides[1][0])
        gradients[:, 0, :, : rows.inputs.shape[2]] = rows.g.mT @ rows.inputs
        if self.place.bias is not None:
            gradients[:, 0, :, -1] = rows.g.sum(1)
        return gradients


class _OfTable(EigenSums):
    """Ids are one-hot inputs: only g is rotated, and the values are added to by rows of the table, ``[r, q]``."""

    def _stored(self, q: int, r: int) -> tuple[int, int]:
        return r, q

    def holds(self, staged: bool) -> Held:
        """See ``BlockSums``; the result is turned round, on memory of its own."""
        held = super().holds(staged)
        return replace(held, peaks=tuple(size + self.values.running.nbytes for size in held.peaks))

    def _products(self, T: int) -> dict[Order, int]:
        (O, q, V), _ = self._sides
        return {Order.ROWS: T * (V * O * q + q)}  # the only order there is

    def _made(self, rows: Rows, order: Order) -> int:
        return rows.g[0].numel() * (1 if rows.offsets is None else self._extents(rows)[1])

    def block(self, made: Mapping[str, Any]) -> EigenBlock:
        return EigenBlock(self.kronecker.at(self.rounding), self.U, self.V, _transposed(self.values.running.snapshot()))

    def _take(self, values: Accumulator) -> None:
        self.values.running.restore(_transposed(values))

    def _add_rows(self, acc: Tensor, rows: Rows, scale: float, weight: Tensor | None) -> None:
        assert isinstance(self.form, Lookup)
        g = rows.g if self.V is None else _product(rows.g, self.V[0])
        options = {"weight": weight, "offsets": rows.offsets, "flag": self.values.flag}
        embedding_sq_(acc[0], rows.inputs.squeeze(-1), g, scale, padding_idx=self.form.padding_idx, **options)


def _transposed(values: Accumulator) -> Accumulator:
    return Accumulator.of_parts(tuple(part.mT.contiguous() for part in values.parts), values.weight)


class _OfImages(EigenSums):
    """Rows of x are the images that a kernel slides over, in patches; those of g are pixels, the inputs of a transposed convolution."""

    form: Convolution

    def _extents(self, rows: Rows) -> tuple[int, int]:
        N, images = (len(rows.g), 1) if rows.offsets is None else super()._extents(rows)
        return N, images * math.prod(rows.g.shape[2:])

    @property
    def _swapped(self) -> bool:
        return self.form.transposed

    def _add_rows(self, acc: Tensor, rows: Rows, scale: float, weight: Tensor | None) -> None:
        """Once rotated, patches and pixels have the same positions; what is left is a convolution with a kernel of one pixel."""
        patches, pixels = self._patches(rows), self._turned(rows.g)
        x, g = (pixels, patches) if self._swapped else (patches, pixels)
        values = acc.view(-1, acc.shape[2], *[1] * (g.dim() - 2))
        conv_sq_(values, x, g, scale, weight=weight, offsets=rows.offsets, flag=self.values.flag, groups=self.place.groups)

    def _patches(self, rows: Rows) -> Tensor:
        """Rotating patches is a convolution with the columns of their basis; without one they are unfolded."""
        form, basis = self.form, self.V if self._swapped else self.U
        kernel, bias = self._shape[2:], self.place.bias is not None
        if basis is None:
            return form.patches(rows, kernel).mT.unflatten(2, rows.g.shape[2:])
        x, padding = form.framed(rows, kernel)
        geometry = (form.stride, padding, form.dilation, False, (0,) * len(kernel), form.groups)
        filters = (basis[:, :-1] if bias else basis).mT.reshape(-1, *self._shape[1:])
        with conv.float32_convolutions():
            return torch.ops.aten.convolution(x, filters, basis[:, -1].flatten() if bias else None, *geometry)

    def _turned(self, g: Tensor) -> Tensor:
        basis = self.U if self._swapped else self.V
        if basis is None:
            return g
        rotated = basis.mT @ g.unflatten(1, (self.place.groups, -1)).flatten(3)
        return rotated.view(len(g), -1, *g.shape[2:])

    def _gradients(self, rows: Rows) -> Tensor:
        """The bias's is what a sample's images add up to."""
        shape, G = (rows.g.shape[1], *self._shape[1:]), self.place.groups
        sizes = shape[0] // G, self._sides[1][0]
        gradients = rows.g.new_empty(rows.num_samples, G, *(sizes[::-1] if self._swapped else sizes))
        of_weight = (gradients.mT if self._swapped else gradients)[..., : math.prod(shape[1:])]
        for sample, gradient in zip(of_weight, self.form.each_gradient(rows, shape), strict=True):
            sample.copy_(gradient.reshape(sample.shape))
        if self.place.bias is not None:
            images = rows.g.flatten(2).sum(2)
            sums = images if rows.offsets is None else torch.segment_reduce(images, "sum", offsets=rows.offsets)
            gradients[..., -1] = sums.view(gradients.shape[:-1])
        return gradients


def _product(rows: Tensor, basis: Tensor) -> Tensor:
    """``rows @ basis``, ``[..., r]``; wide rows begin at cache lines, where BLAS writes faster than elsewhere."""
    r = basis.shape[1]
    if r < _WIDE:
        return rows @ basis
    out = rows.new_empty(math.prod(rows.shape[:-1]), -(-r // _LINE) * _LINE)[:, :r]
    return torch.mm(rows.flatten(0, -2), basis, out=out).unflatten(0, rows.shape[:-1])


def _cheapest(products: dict[Order, int]) -> Order:
    return min(products, key=products.__getitem__)


def _samples_at_a_time(floats: int) -> int:
    """How many samples a chunk has, if ``floats`` numbers are made of each."""
    return max(1, _CHUNK_BYTES // (4 * max(1, floats)))


def _chunks(rows: Rows, weight: Tensor | None, step: int) -> Iterator[tuple[Rows, Tensor | None]]:
    """At most ``step`` samples at a time, and their weights."""
    for start in range(0, rows.num_samples, step):
        end = min(start + step, rows.num_samples)
        yield rows.samples(start, end), None if weight is None else weight[start:end]


class EigenCollector(BlockCollector):
    """The sums behind an EKFAC, in the bases of a KFAC's blocks."""

    def __init__(self, capture: Capture, basis: dict[str, KroneckerBlock], transactional: bool, max_exact_dim: int) -> None:
        super().__init__(capture, transactional, max_exact_dim)
        self._basis = basis

    def new_block(self, place: Place, form: Form, weight: Tensor, made: Mapping[str, Any]) -> EigenSums:
        """See ``BlockCollector``."""
        of = self._basis.get(place.name)
        if of is None or replace(of.place, sharing=place.sharing, input_of=place.input_of, op=place.op) != place:
            raise ValueError(
                f"{place.name}: EKFAC's basis must be of this model, used in this way ({place}), got {of and of.place}"
            )
        if (found := (of.B.shape[1], of.A.shape[1])) != (sizes := place.sizes(weight)):
            raise ValueError(
                f"{place.name}: EKFAC's basis must be of a matrix [O, D] = {sizes}, got one of {found}; measure this model's"
            )
        kind = _OfImages if isinstance(form, Convolution) else _OfTable if isinstance(form, Lookup) else _OfMatrix
        return kind(form, weight, of, None if of.place.input_of is None else made[of.place.input_of])
