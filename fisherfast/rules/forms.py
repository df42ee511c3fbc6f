# SPDX-License-Identifier: Apache-2.0
"""Forms: the few ways in which a parameter enters a network, and for each the op that takes its rows.

* ``MatMul``       ``y = x W``: rows x ``[..., I]``, g ``[..., O]``                     -> ``linear_sq_``
* ``Convolution``  ``y = x * W``: images x ``[..., C, *S]``, g ``[..., O, *P]``         -> ``conv_sq_``
* ``Elementwise``  ``y = p * x`` or ``y = p + x`` under broadcasting: rows ``[..., D]`` -> ``scale_sq_``
* ``Lookup``       ``y = W[ids]``: ids ``[...]``, g ``[..., D]``                        -> ``embedding_sq_``
* ``Tied``         a table that is looked up and multiplied by: both, and a cross term

The leading axes ``[...]`` hold samples and positions in any layout; ``fisherfast.capture.layout`` finds out which is which.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfast._precision import wide
from fisherfast.ops import _conv as conv
from fisherfast.ops.conv_sq import conv_sq_
from fisherfast.ops.embedding_sq import embedding_sq_
from fisherfast.ops.linear_sq import linear_sq_
from fisherfast.ops.scale_sq import scale_sq_
from fisherfast.rules.rows import Rows, merged
from fisherfast.rules.windows import Window


class Form:
    """How one use of a parameter turns (saved inputs, gradient of the output) into rows, and which op takes the rows."""

    op: str
    transposed = False  # whether the parameter is stored with inputs first
    window: Window | None = None  # the part of the parameter that is used; None for all of it

    @property
    def inner(self) -> Form:
        """The form of the use of a part; itself where all of the parameter is used."""
        return self

    @property
    def features(self) -> int:
        """How many trailing axes of g's rows belong to one position: all others hold samples and positions."""
        return 1

    def rows(self, g: Tensor, inputs: tuple[Tensor, ...]) -> Rows:
        """Bring saved inputs and output gradient to ``x [..., I]`` (or None) and ``g [..., O]``, same leading axes."""
        raise NotImplementedError

    def oriented(self, rows: Rows) -> Rows:
        """Rows, samples first, as the parameter is stored: a transposed use exchanges x and g."""
        return rows

    def as_used(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """X and g of oriented rows as the call had them: ``oriented`` turned those of a transposed matrix round."""
        return rows.inputs, rows.g

    def joins(self, other: Form) -> bool:
        """Whether rows of the two forms, oriented, can be joined."""
        return self == other

    def joined(self, uses: list[Rows]) -> Rows:
        """Several uses of one parameter as one: a sum over uses is a sum over more positions."""
        if len(uses) == 1:
            return uses[0]
        if all(use.offsets is None for use in uses):
            xs = [use.x for use in uses if use.x is not None]
            return Rows(torch.cat(xs, dim=1) if xs else None, torch.cat([use.g for use in uses], dim=1))
        return merged([use.packed() for use in uses])

    def flops(self, rows: Rows, shape: tuple[int, ...]) -> int:
        """What the op takes for oriented rows of a parameter of this shape."""
        return 2 * rows.g.numel()

    def accumulate(self, acc: Tensor, rows: Rows, scale: float, **outputs: Tensor | None) -> None:
        """Add ``scale * sum_n w_n (sample gradient)^2`` of oriented rows into ``acc``; ``outputs`` as for the ops."""
        raise NotImplementedError

    def gradients(self, rows: Rows, shape: tuple[int, ...]) -> Tensor:
        """The sample gradients ``[N, *shape]`` of oriented rows, whole: for few samples, and as the reference of all else."""
        if rows.offsets is None:
            return self._gradients(rows, shape)
        each = [self._gradients(one, shape) for one in rows.one_by_one()]
        return torch.cat(each) if each else rows.g.new_zeros(0, *shape)

    def _gradients(self, rows: Rows, shape: tuple[int, ...]) -> Tensor:
        """Of rows ``[N, T, ...]``."""
        raise NotImplementedError


def like(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """``x`` in the dtype and, by broadcasting, the shape of a gradient."""
    x = x if x.dtype == dtype else x.to(dtype)
    return x if x.shape == shape else x.expand(shape)


@dataclass(frozen=True)
class MatMul(Form):
    """A weight that multiplies; ``transposed`` where it is stored ``[I, O]`` (Hugging Face's Conv1D).

    ``left``: it stands on the left, ``y = W x``, and features are the last axis but one.
    """

    transposed: bool = False
    left: bool = False
    op = "linear_sq_"

    def rows(self, g: Tensor, inputs: tuple[Tensor, ...]) -> Rows:
        """See ``Form``."""
        (x,) = inputs
        if self.left:
            x, g = x.mT, g.mT
        return Rows(like(x, g.dtype, (*g.shape[:-1], x.shape[-1])), g)

    def oriented(self, rows: Rows) -> Rows:
        """See ``Form``: the sample gradient of W^T is the transpose of that of W."""
        return Rows(rows.g, rows.inputs, rows.offsets) if self.transposed else rows

    def as_used(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """See ``Form``."""
        return (rows.g, rows.inputs) if self.transposed else (rows.inputs, rows.g)

    def joins(self, other: Form) -> bool:
        """See ``Form``."""
        return isinstance(other, MatMul)

    def flops(self, rows: Rows, shape: tuple[int, ...]) -> int:
        """See ``Form``."""
        return 2 * rows.g.numel() * rows.inputs.shape[-1]

    def accumulate(self, acc: Tensor, rows: Rows, scale: float, **outputs: Tensor | None) -> None:
        """See ``Form``."""
        linear_sq_(acc, rows.inputs, rows.g, scale, offsets=rows.offsets, **outputs)

    def _gradients(self, rows: Rows, shape: tuple[int, ...]) -> Tensor:
        return (rows.g.mT @ rows.inputs).view(-1, *shape)


@dataclass(frozen=True)
class Convolution(Form):
    """A kernel that is slid over an image, one entry of the geometry per axis; ``transposed``: its weight is ``[I, O, *K]``."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    op = "conv_sq_"

    @property
    def features(self) -> int:
        """See ``Form``: channels and the axes of an image."""
        return 1 + len(self.stride)

    def rows(self, g: Tensor, inputs: tuple[Tensor, ...]) -> Rows:
        """See ``Form``."""
        (x,) = inputs
        return Rows(x if x.dtype == g.dtype else x.to(g.dtype), g)

    def oriented(self, rows: Rows) -> Rows:
        """See ``Form``; samples of one image each lose their second axis."""
        if rows.offsets is None:
            rows = rows.each(lambda images: images[:, 0]) if rows.g.shape[1] == 1 else rows.packed()
        x, g = rows.inputs, rows.g
        return Rows(g, x, rows.offsets) if self.transposed else rows

    def joined(self, uses: list[Rows]) -> Rows:
        """See ``Form``: several images a sample, brought to one size by zeros, which add nothing to a gradient."""
        xs, gs = [use.x for use in uses if use.x is not None], [use.g for use in uses]
        several = len({g.shape[2:] for g in gs}) > 1
        xs, gs = _one_size(xs), _one_size(gs)
        packed = [
            Rows(x, g, torch.arange(len(g) + 1, device=g.device) if use.offsets is None else use.offsets)
            for x, g, use in zip(xs, gs, uses, strict=True)
        ]
        return merged(packed)._replace(uses=tuple(uses) if several else ())

    def flops(self, rows: Rows, shape: tuple[int, ...]) -> int:
        """See ``Form``."""
        return 2 * rows.g.numel() * math.prod(shape[1:])

    def accumulate(self, acc: Tensor, rows: Rows, scale: float, **outputs: Tensor | None) -> None:
        """See ``Form``."""
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        conv_sq_(acc, rows.inputs, rows.g, scale, offsets=rows.offsets, **outputs, **geometry)

    def framed(self, rows: Rows, kernel: tuple[int, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """The images, and the arguments by which torch's convolution has the positions of g: it pads both ends alike."""
        x, padding = rows.inputs, self.padding
        if conv.positions(x.shape[2:], kernel, (), self.stride, padding, self.dilation) != rows.g.shape[2:]:
            x = conv.framed(x, rows.g.shape[2:], kernel, self.stride, padding, self.dilation)
            padding = (0,) * len(kernel)
        return x, (self.stride, padding, self.dilation, False, (0,) * len(kernel), self.groups)

    def patches(self, rows: Rows, kernel: tuple[int, ...]) -> Tensor:
        """What the kernel sees of every image at every position, ``[images, positions, C * prod(kernel)]``: unfolded, for few rows."""
        axes = len(kernel)
        x = conv.framed(rows.inputs, rows.g.shape[2:], kernel, self.stride, self.padding, self.dilation)
        for axis, (K, stride, dilation) in enumerate(zip(kernel, self.stride, self.dilation, strict=True), 2):
            x = x.unfold(axis, (K - 1) * dilation + 1, stride)[..., ::dilation]
        order = (0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
        return x.permute(order).reshape(len(x), math.prod(rows.g.shape[2:]), -1)

    def patch_sums(self, rows: Rows, kernel: tuple[int, ...]) -> Tensor:
        """The sum of an image's patches ``[images, C * prod(kernel)]``: for each offset in the kernel that of the pixels it meets."""
        positions = rows.g.shape[2:]
        x = conv.framed(rows.inputs, positions, kernel, self.stride, self.padding, self.dilation)
        sums = []
        for offset in itertools.product(*map(range, kernel)):
            met = x
            for axis, (at, P, stride, dilation) in enumerate(zip(offset, positions, self.stride, self.dilation, strict=True), 2):
                met = met.narrow(axis, at * dilation, (P - 1) * stride + 1 if P else 0)
                met = met[(slice(None),) * axis + (slice(None, None, stride),)]
            sums.append(met.flatten(2).sum(2))
        return torch.stack(sums, 2).flatten(1)

    def gradients(self, rows: Rows, shape: tuple[int, ...]) -> Tensor:
        """See ``Form``."""
        found = rows.g.new_empty(rows.num_samples, *shape)
        for sample, gradient in zip(found, self.each_gradient(rows, shape), strict=True):
            sample.copy_(gradient)
        return found

    def each_gradient(self, rows: Rows, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """The sample gradients, one by one: torch has no others."""
        x, geometry = self.framed(rows, shape[2:])
        weight = x.new_empty(shape)
        bounds = range(len(x) + 1) if rows.offsets is None else rows.offsets.tolist()
        for a, b in pairwise(bounds):
            if a == b:
                yield torch.zeros_like(weight)  # no image
            else:
                mask = (False, True, False)
                with conv.exactly():
                    gradient = torch.ops.aten.convolution_backward(rows.g[a:b], x[a:b], weight, None, *geometry, mask)[1]
                yield gradient


def _one_size(images: list[Tensor]) -> list[Tensor]:
    largest = [max(sizes) for sizes in zip(*(image.shape[2:] for image in images), strict=True)]
    return [
        F.pad(image, [n for now, size in zip(reversed(image.shape[2:]), reversed(largest), strict=True) for n in (0, size - now)])
        for image in images
    ]


@dataclass(frozen=True)
class Elementwise(Form):
    """A parameter that multiplies or is added under broadcasting; ``prepare`` recomputes x from what was saved.

    ``negative``: it is subtracted.
    """

    shape: tuple[int, ...]
    prepare: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)
    negative: bool = False
    op = "scale_sq_"

    def rows(self, g: Tensor, inputs: tuple[Tensor, ...]) -> Rows:
        """See ``Form``."""
        x = None
        if inputs:
            (x,) = inputs if self.prepare is None else (self.prepare(inputs[0]),)
            x = self._flat(like(x, g.dtype, g.shape))
        return Rows(x, self._flat(-g if self.negative else g))

    def _flat(self, tensor: Tensor) -> Tensor:
        if len(self.shape) == 1 and self.shape[0] == tensor.shape[-1]:
            return tensor  # the common case: one feature axis, last
        aligned = (1,) * (tensor.dim() - len(self.shape)) + self.shape
        kept = [axis for axis, size in enumerate(aligned) if size != 1]
        lead = [axis for axis in range(tensor.dim()) if axis not in kept]
        return tensor.permute([*lead, *kept]).reshape([tensor.shape[axis] for axis in lead] + [math.prod(self.shape)])

    def joins(self, other: Form) -> bool:
        """See ``Form``."""
        return isinstance(other, Elementwise)

    def joined(self, uses: list[Rows]) -> Rows:
        """See ``Form``."""
        products = [wide(use.g) if use.x is None else wide(use.g) * wide(use.x) for use in uses]
        return super().joined([Rows(None, product, use.offsets) for product, use in zip(products, uses, strict=True)])

    def accumulate(self, acc: Tensor, rows: Rows, scale: float, **outputs: Tensor | None) -> None:
        """See ``Form``."""
        total = outputs.get("total")
        if total is not None:
            outputs["total"] = total.view(-1)
        scale_sq_(acc.view(-1), rows.x, rows.g, scale, offsets=rows.offsets, **outputs)

    def _gradients(self, rows: Rows, shape: tuple[int, ...]) -> Tensor:
        return (rows.g if rows.x is None else rows.g * rows.x).sum(1).view(-1, *shape)


@dataclass(frozen=True)
class Lookup(Form):
    """An embedding table; the row ``padding_idx`` has no gradient."""

    padding_idx: int = -1
    op = "embedding_sq_"

    def rows(self, g: Tensor, inputs: tuple[Tensor, ...]) -> Rows:
        """See ``Form``."""
        (ids,) = inputs
        return Rows(ids.long().expand(g.shape[:-1]).unsqueeze(-1), g)

    def accumulate(self, acc: Tensor, rows: Rows, scale: float, **outputs: Tensor | None) -> None:
        """See ``Form``."""
        ids = rows.inputs.squeeze(-1)
        embedding_sq_(acc, ids, rows.g, scale, offsets=rows.offsets, padding_idx=self.padding_idx, **outputs)

    def _gradients(self, rows: Rows, shape: tuple[int, ...]) -> Tensor:
        ids, found = rows.inputs.squeeze(-1), rows.g.new_zeros(len(rows.g), *shape)
        sample = torch.arange(len(found), device=ids.device).unsqueeze(1).expand_as(ids)
        return found.index_put_((sample, ids), rows.g * (ids != self.padding_idx).unsqueeze(-1), accumulate=True)


@dataclass(frozen=True)
class Tied(Form):
    """A table ``[V, D]`` that is both looked up and multiplied by: an embedding tied to the head.

    A sample gradient is the head's part H plus, in the rows that occur, the embedding's E: ``(H + E)^2 = H^2`` everywhere,
    ``+ 2 H E + E^2`` in those rows, whose H is a gather. Nothing of size ``[N, V, D]`` is formed. Where E = -H but for a part of
    1e-3 or less, the sum keeps few digits of it; it is never below 0.
    """

    padding_idx: int = -1
    op = "linear_sq_ + embedding_sq_"

    def flops(self, rows: Rows, shape: tuple[int, ...]) -> int:
        """See ``Form``."""
        assert rows.lookup is not None
        return 2 * rows.g.numel() * rows.inputs.shape[-1] + 2 * rows.lookup.g.numel()

    def accumulate(self, acc: Tensor, rows: Rows, scale: float, **outputs: Tensor | None) -> None:
        """See ``Form``."""
        lookup, flag = rows.lookup, outputs.get("flag")
        assert lookup is not None
        if flag is not None:  # the second op's inputs too, before the first adds anything
            flag |= ~torch.isfinite(lookup.g).all()
        linear_sq_(acc, rows.inputs, rows.g, scale, offsets=rows.offsets, **outputs)
        for n, head, table in _few_samples(rows._replace(lookup=None), lookup):
            self._add_touched(acc, n, head, table, scale, **outputs)

    def gradients(self, rows: Rows, shape: tuple[int, ...]) -> Tensor:
        """See ``Form``."""
        assert rows.lookup is not None
        head = MatMul().gradients(rows._replace(lookup=None), shape)
        return head.add_(Lookup(self.padding_idx).gradients(rows.lookup, shape))

    def _add_touched(
        self, acc: Tensor, n: slice, head: Rows, table: Rows, scale: float, *, weight=None, total=None, sqnorm=None, flag=None
    ) -> None:
        ids = table.inputs.squeeze(-1)  # [n, U]
        dtype = acc.dtype if acc.dtype == torch.float64 else torch.float32
        same = (ids.unsqueeze(2) == ids.unsqueeze(1)).to(dtype)  # [n, U, U]
        first = ~same.tril(-1).any(-1) & (ids != self.padding_idx)
        E = torch.bmm(same, table.g.to(dtype))
        touched = head.g.gather(2, ids.unsqueeze(1).expand(-1, head.g.shape[1], -1)).to(dtype)  # [n, T, U]
        H = torch.bmm(touched.mT, head.inputs.to(dtype))
        add = (E * (2 * H + E)) * first.unsqueeze(-1)
        if flag is not None:
            add, E = (torch.where(flag == 0, t, 0.0) for t in (add, E))
        if sqnorm is not None:
            sqnorm[n] = (sqnorm[n] + add.sum((1, 2))).clamp_min(0)
        w = 1.0 if weight is None else weight[n].view(-1, 1, 1).to(dtype)
        # Unlike index_add_, index_put_ adds in a fixed order on a GPU too.
        acc.index_put_((ids,), (scale * w * add).to(acc.dtype), accumulate=True)
        acc.index_put_((ids,), acc[ids].clamp_min(0))  # where both cancel, rounding may leave less than nothing
        if total is not None:
            total.index_put_((ids,), (w * E * first.unsqueeze(-1)).to(total.dtype), accumulate=True)


def _few_samples(head: Rows, table: Rows) -> Iterator[tuple[slice, Rows, Rows]]:
    """Both uses' rows for a few samples at a time, ``[n, T, ...]``: a bounded workspace."""
    if head.offsets is None and table.offsets is None:
        T, U = head.g.shape[1], table.g.shape[1]
        step = max(1, 2**22 // max(1, U * (T + U + table.g.shape[2])))
        for start in range(0, len(head.g), step):
            few = slice(start, start + step)
            yield few, head.each(itemgetter(few)), table.each(itemgetter(few))
        return
    for n, (one, other) in enumerate(zip(head.packed().one_by_one(), table.packed().one_by_one(), strict=True)):
        yield slice(n, n + 1), one, other


@dataclass(frozen=True)
class Part(Form):
    """A use of a part of the parameter: the form of that use, and where the part lies."""

    form: Form
    window: Window

    @property
    def inner(self) -> Form:
        """See ``Form``."""
        return self.form

    @property
    def op(self) -> str:  # type: ignore[override]
        """See ``Form``."""
        return self.form.op

    @property
    def features(self) -> int:
        """See ``Form``."""
        return self.form.features

    def rows(self, g: Tensor, inputs: tuple[Tensor, ...]) -> Rows:
        """See ``Form``."""
        return self.form.rows(g, inputs)

    def oriented(self, rows: Rows) -> Rows:
        """See ``Form``."""
        return self.form.oriented(rows)

    def joins(self, other: Form) -> bool:
        """See ``Form``."""
        return isinstance(other, Part) and self.window == other.window and self.form.joins(other.form)

    def joined(self, uses: list[Rows]) -> Rows:
        """See ``Form``."""
        return self.form.joined(uses)

    def flops(self, rows: Rows, shape: tuple[int, ...]) -> int:
        """See ``Form``."""
        return self.form.flops(rows, self.window.shape)

    def accumulate(self, acc: Tensor, rows: Rows, scale: float, **outputs: Tensor | None) -> None:
        """See ``Form``: where the part does not lie in one piece, by way of a tensor that does."""
        total = outputs.pop("total", None)
        targets = [None if whole is None else self.window.of_tensor(whole) for whole in (acc, total)]
        pieces = [
            t if t is None or t.is_contiguous() else torch.zeros_like(t, memory_format=torch.contiguous_format) for t in targets
        ]
        assert pieces[0] is not None
        self.form.accumulate(pieces[0], rows, scale, total=pieces[1], **outputs)
        for target, piece in zip(targets, pieces, strict=True):
            if target is not None and piece is not None and piece is not target:
                target += piece

    def gradients(self, rows: Rows, shape: tuple[int, ...]) -> Tensor:
        """See ``Form``: zero outside the part."""
        found = rows.g.new_zeros(rows.num_samples, *shape)
        self.window.of_each(found).copy_(self.form.gradients(rows, self.window.shape))
        return found


def part(form: Form, window: Window, whole: Tensor) -> Form:
    """The form of a use of the part ``window`` of the parameter ``whole``, in the simplest terms."""
    if isinstance(form, MatMul) and len(window.shape) == 2 and window.strides == (1, window.shape[0]):
        form, window = (
            replace(form, transposed=not form.transposed),
            Window(window.shape[::-1], window.strides[::-1], window.start),
        )
    if isinstance(form, Elementwise) and window.start == 0 and math.prod(window.shape) == whole.numel():
        if Window.of(whole, whole).strides == whole.contiguous().stride() and window.dense:
            return form  # a reshaped parameter: the op sees it flat
    same = window == Window.of(whole, whole)
    return form if same else Part(form, window)


def combines(forms: list[Form]) -> bool:
    """Whether the uses of one parameter, or part, in these forms can be joined."""
    lookups = [form for form in forms if isinstance(form, Lookup)]
    others = [form for form in forms if not isinstance(form, Lookup)]
    if lookups and others:
        return all(isinstance(form, MatMul) for form in others) and len(set(lookups)) == 1
    return all(forms[0].joins(form) for form in forms)


def joined(uses: list[tuple[Form, Rows]]) -> tuple[Form, Rows]:
    """All uses of one parameter, or part, as one; rows are oriented."""
    (form, rows), *more = uses
    if not more:
        return form, rows
    lookups = [rows for form, rows in uses if isinstance(form, Lookup)]
    if 0 < len(lookups) < len(uses):
        lookup = next(form for form, _ in uses if isinstance(form, Lookup))
        head = MatMul().joined([rows for form, rows in uses if not isinstance(form, Lookup)])
        return Tied(lookup.padding_idx), head._replace(lookup=lookup.joined(lookups))
    return form, form.joined([rows for _, rows in uses])
