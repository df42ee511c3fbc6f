# SPDX-License-Identifier: Apache-2.0
"""What a backward pass adds to the eigenvalues of an eigen block: squares of the sample gradients in the basis, ``V^T G_n U``.

Two orders, whichever takes fewer FLOPs: rotate the rows and square what they make (``g V``, ``x U``: long layers with few
positions), or make each sample's gradient and rotate that (images). Both go through the samples in chunks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisherfast.accumulator import Accumulator
from fisherfast.capture import Capture
from fisherfast.fisher.block_collector import BlockCollector
from fisherfast.fisher.block_sums import BatchSum, WeightSums, total_weight
from fisherfast.fisher.eigen import EigenBlock, eigenbasis, workspace
from fisherfast.fisher.kronecker import KroneckerBlock, Place
from fisherfast.fisher.memory import Held
from fisherfast.ops.conv_sq import conv_sq_
from fisherfast.ops.embedding_sq import embedding_sq_
from fisherfast.ops.linear_sq import linear_sq_
from fisherfast.ops.scale_sq import scale_sq_
from fisherfast.passes import Samples
from fisherfast.rules import Convolution, Form, Lookup, MatMul, Rows

_CHUNK_BYTES = 2**24


_Add = Callable[[Tensor, Rows, float, Tensor | None], None]


class EigenSums(WeightSums):
    """The sums of one eigen block; see ``BlockSums``. The subclasses know the forms.

    The eigenvectors are computed when they are first needed; their sizes are known before.
    """

    def __init__(self, form: Form, weight: Tensor, of: KroneckerBlock, leader: EigenSums | None) -> None:
        self.place, self.form, self.kronecker, self._leader = of.place, form, of, leader
        self._shape = tuple(weight.shape)
        self._dtype = torch.promote_types(weight.dtype, torch.float32)
        self._rotates = len(of.A.shape) == 3, len(of.B.shape) == 3  # what is diagonal has no basis
        O, D = of.B.shape[1], of.A.shape[1]
        of_A, of_B = of.few_rows
        self._full, self._size = (O, D), (O if of_B is None else len(of_B), D if of_A is None else len(of_A))
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

    def flops(self, form: Form, rows: Rows, number: int) -> int:
        """See ``BlockSums``: of the cheaper order; the eigenvectors, once in a run, are not counted."""
        N, T = self._extents(rows)
        return 2 * N * self.place.groups * min(self._products(T))

    def scratch(self, rows: Rows) -> int:
        """See ``BlockSums``: what the samples of a chunk are turned into, twice: before the last product and after it."""
        _, floats = self.route(rows)
        return 2 * min(rows.num_samples, _samples_at_a_time(floats)) * floats * self._dtype.itemsize

    def _extents(self, rows: Rows) -> tuple[int, int]:
        """Samples, and positions of each."""
        if rows.offsets is None:
            return len(rows.g), rows.g.shape[1]
        N = len(rows.offsets) - 1
        return N, math.ceil(len(rows.g) / max(1, N))

    def _stored(self, q: int, r: int) -> tuple[int, int]:
        """The shape in which the values are added up."""
        return q, r

    def route(self, rows: Rows) -> tuple[_Add, int]:
        """The cheaper order, and how many numbers it makes of a sample."""
        raise NotImplementedError

    def touch(self, samples: Samples) -> None:
        """See ``BlockSums``."""
        self.values.visited(total_weight(samples))

    def block(self, made: Mapping[str, Any]) -> EigenBlock:
        """See ``BlockSums``."""
        return EigenBlock(self.kronecker, self.U, self.V, self.values.running.snapshot())

    def restore(self, block: EigenBlock) -> None:
        """See ``BlockSums``."""
        self.values.running.restore(block.values)

    def add(self, form: Form, rows: Rows, scale: float, number: int, samples: Samples, staged: bool) -> None:
        """See ``BlockSums``."""
        acc = self.values.target(staged)
        if isinstance(form, MatMul):
            rows = form.oriented(rows)  # a transposed use, turned round before, is needed as it is used
        add, floats = self.route(rows)
        for few, weight in _chunks(rows, samples.weight, _samples_at_a_time(floats)):
            add(acc, few._replace(x=self._exact(few.x), g=self._exact(few.g)), scale, weight)

    def _exact(self, rows: Any) -> Any:
        """In the precision of the sums; ids as they are."""
        return rows.to(self.values.running.low.dtype) if rows.is_floating_point() else rows

    def _products(self, T: int) -> tuple[int, int]:
        """What the two orders multiply of a sample with T positions: tiles, rows; the squares of rotated rows are a product too."""
        (O, D), (q, r), (U, V) = self._full, self._size, self._rotates
        return T * O * D + U * O * D * r + V * O * q * r, T * (U * D * r + V * O * q + q * r)

    def _tiles_cost_less(self, T: int) -> bool:
        tiles, rotated = self._products(T)
        return tiles < rotated

    def _add_tiles(self, acc: Tensor, tiles: Tensor, scale: float, weight: Tensor | None) -> None:
        """Sample gradients ``[n, G, O, D]``: what is left once U is applied is ``linear_sq_`` with V's rows for every sample."""
        options = {"weight": weight, "flag": self.values.flag}
        assert self.U is not None  # without it no tile costs less than its rows
        n, G, O, D = tiles.shape
        rotated = (tiles.view(-1, D) @ self.U[0]).view(n, 1, O, -1) if G == 1 else tiles @ self.U
        for k, values in enumerate(acc):
            if self.V is None:
                scale_sq_(values.view(-1), None, rotated[:, k].reshape(n, 1, -1), scale, **options)
            else:
                linear_sq_(values, rotated[:, k], self.V[k].expand(n, -1, -1), scale, **options)


class _OfMatrix(EigenSums):
    def route(self, rows: Rows) -> tuple[_Add, int]:
        _, T = self._extents(rows)
        if rows.offsets is None and T > 1 and self._tiles_cost_less(T):
            return self._tiles, math.prod(self._full)
        return self._rotated, T * sum(self._size)

    def _rotated(self, acc: Tensor, rows: Rows, scale: float, weight: Tensor | None) -> None:
        x, g = rows.x, rows.g
        assert x is not None
        if self.U is not None:
            x = x @ self.U[0, :-1] + self.U[0, -1] if self.place.bias is not None else x @ self.U[0]
        g = g if self.V is None else g @ self.V[0]
        linear_sq_(acc[0], x, g, scale, weight=weight, offsets=rows.offsets, flag=self.values.flag)

    def _tiles(self, acc: Tensor, rows: Rows, scale: float, weight: Tensor | None) -> None:
        assert rows.x is not None
        tiles = rows.g.new_empty(len(rows.g), 1, *self._full)
        tiles[:, 0, :, : rows.x.shape[2]] = rows.g.mT @ rows.x
        if self.place.bias is not None:
            tiles[:, 0, :, -1] = rows.g.sum(1)
        self._add_tiles(acc, tiles, scale, weight)


class _OfTable(EigenSums):
    """Ids are one-hot inputs: only g is rotated, and the values are added to by rows of the table, ``[r, q]``."""

    def _stored(self, q: int, r: int) -> tuple[int, int]:
        return r, q

    def holds(self, staged: bool) -> Held:
        """See ``BlockSums``; the result is turned round, on memory of its own."""
        held = super().holds(staged)
        return replace(held, peaks=tuple(size + self.values.running.nbytes for size in held.peaks))

    def _products(self, T: int) -> tuple[int, int]:
        (O, _), (q, _), (_, V) = self._full, self._size, self._rotates
        return (T * (V * O * q + q),) * 2  # the only order there is

    def block(self, made: Mapping[str, Any]) -> EigenBlock:
        return EigenBlock(self.kronecker, self.U, self.V, _transposed(self.values.running.snapshot()))

    def restore(self, block: EigenBlock) -> None:
        self.values.running.restore(_transposed(block.values))

    def route(self, rows: Rows) -> tuple[_Add, int]:
        return self._rotated, math.prod(rows.g.shape[1:]) if rows.offsets is None else rows.g[0].numel()

    def _rotated(self, acc: Tensor, rows: Rows, scale: float, weight: Tensor | None) -> None:
        assert isinstance(self.form, Lookup) and rows.x is not None
        g = rows.g if self.V is None else rows.g @ self.V[0]
        options = {"weight": weight, "offsets": rows.offsets, "flag": self.values.flag}
        embedding_sq_(acc[0], rows.x.squeeze(-1), g, scale, padding_idx=self.form.padding_idx, **options)


def _transposed(values: Accumulator) -> Accumulator:
    return Accumulator.of_parts(tuple(part.mT.contiguous() for part in values.parts), values.weight)


class _OfImages(EigenSums):
    def _extents(self, rows: Rows) -> tuple[int, int]:
        N, images = (len(rows.g), 1) if rows.offsets is None else super()._extents(rows)
        return N, images * math.prod(rows.g.shape[2:])

    def route(self, rows: Rows) -> tuple[_Add, int]:
        (_, T), G = self._extents(rows), self.place.groups
        return (self._tiles, G * math.prod(self._full)) if self._tiles_cost_less(T) else (self._rotated, T * G * sum(self._size))

    def _rotated(self, acc: Tensor, rows: Rows, scale: float, weight: Tensor | None) -> None:
        """Once rotated, patches and pixels have the same positions; what is left is a convolution with a kernel of one pixel."""
        assert isinstance(self.form, Convolution)
        of_patches, of_pixels = (self.V, self.U) if self.form.transposed else (self.U, self.V)
        patches, pixels = self._patches(self.form, rows, of_patches), self._pixels(rows.g, of_pixels)
        x, g = (pixels, patches) if self.form.transposed else (patches, pixels)
        values = acc.view(-1, acc.shape[2], *[1] * (g.dim() - 2))
        conv_sq_(values, x, g, scale, weight=weight, offsets=rows.offsets, flag=self.values.flag, groups=self.place.groups)

    def _patches(self, form: Convolution, rows: Rows, basis: Tensor | None) -> Tensor:
        """Rotating patches is a convolution with the columns of their basis; without one they are unfolded."""
        kernel, bias = self._shape[2:], self.place.bias is not None
        if basis is None:
            return form.patches(rows, kernel).mT.unflatten(2, rows.g.shape[2:])
        x, geometry = form.framed(rows, kernel)
        filters = (basis[:, :-1] if bias else basis).mT.reshape(-1, *self._shape[1:])
        return torch.ops.aten.convolution(x, filters, basis[:, -1].flatten() if bias else None, *geometry)

    def _pixels(self, images: Tensor, basis: Tensor | None) -> Tensor:
        if basis is None:
            return images
        rotated = basis.mT @ images.unflatten(1, (self.place.groups, -1)).flatten(3)
        return rotated.view(len(images), -1, *images.shape[2:])

    def _tiles(self, acc: Tensor, rows: Rows, scale: float, weight: Tensor | None) -> None:
        self._add_tiles(acc, self._gradients(rows), scale, weight)

    def _gradients(self, rows: Rows) -> Tensor:
        """The weight's columns and, last, the bias's: its gradient is what a sample's images add up to."""
        gradients = self.form.gradients(rows, self._shape).flatten(2).unflatten(1, (self.place.groups, -1))
        gradients = gradients.mT if self.place.transposed else gradients
        tiles = rows.g.new_zeros(len(gradients), self.place.groups, *self._full)
        tiles[..., : gradients.shape[3]] = gradients
        if self.place.bias is not None:
            images = rows.g.flatten(2).sum(2)
            sums = images if rows.offsets is None else torch.segment_reduce(images, "sum", offsets=rows.offsets)
            tiles[..., -1] = sums.view(tiles.shape[:-1])
        return tiles


def _samples_at_a_time(floats: int) -> int:
    """Of each of which so many numbers are made."""
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

    def foreseen(self, first: BlockCollector, basis: dict[str, KroneckerBlock]) -> EigenCollector:
        """Before a basis is there: one of these sizes, for a model used as ``first`` knows; returns self."""
        self._calls, self._in_parts, self._basis = first._calls, first._in_parts, basis
        return self

    def new_block(self, place: Place, form: Form, weight: Tensor, made: Mapping[str, Any]) -> EigenSums:
        """See ``BlockCollector``."""
        of = self._basis.get(place.name)
        if of is None or replace(of.place, sharing=place.sharing, input_of=place.input_of) != place:
            raise ValueError(
                f"{place.name}: EKFAC's basis must be of this model, used in this way ({place}), got {of and of.place}"
            )
        kind = _OfImages if isinstance(form, Convolution) else _OfTable if isinstance(form, Lookup) else _OfMatrix
        return kind(form, weight, of, None if of.place.input_of is None else made[of.place.input_of])
