# SPDX-License-Identifier: Apache-2.0
"""Forms: the few ways in which a parameter enters a network, and for each the op that takes its rows.

* ``MatMul``       ``y = x W``: rows x ``[..., I]``, g ``[..., O]``                     -> ``linear_sq_``
* ``Convolution``  ``y = x * W``: images x ``[..., C, *S]``, g ``[..., O, *P]``         -> ``conv_sq_``, in ``convolution``
* ``Elementwise``  ``y = p * x`` or ``y = p + x`` under broadcasting: rows ``[..., D]`` -> ``scale_sq_``
* ``Lookup``       ``y = W[ids]``: ids ``[...]``, g ``[..., D]``                        -> ``embedding_sq_``
* ``Part``         a use of a part of the parameter, in one of these forms

A table that is looked up and multiplied by is in a form of its own, ``joining.Tied``: both, and a cross term.
The leading axes ``[...]`` hold samples and positions in any layout; ``fisherfast.capture.layout`` finds out which is which.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fisherfast._precision import wide
from fisherfast.ops.embedding_sq import embedding_sq_
from fisherfast.ops.linear_sq import linear_sq_
from fisherfast.ops.scale_sq import scale_sq_
from fisherfast.rules.rows import Images, Rows, merged
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

    def images(self, rows: Rows, shape: tuple[int, ...]) -> Images | None:
        """Oriented rows as those of a convolution, of which a product of matrices is one, or None where they are not."""
        return None

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

    def images(self, rows: Rows, shape: tuple[int, ...]) -> Images | None:
        """See ``Form``: features are the channels of images with one axis."""
        return Images(rows.inputs.mT, rows.g.mT) if rows.offsets is None else None

    def accumulate(self, acc: Tensor, rows: Rows, scale: float, **outputs: Tensor | None) -> None:
        """See ``Form``."""
        linear_sq_(acc, rows.inputs, rows.g, scale, offsets=rows.offsets, **outputs)

    def _gradients(self, rows: Rows, shape: tuple[int, ...]) -> Tensor:
        return (rows.g.mT @ rows.inputs).view(-1, *shape)


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
        first = tensor.dim() - len(self.shape)  # where they meet
        kept = [axis for axis, size in enumerate(self.shape, first) if size != 1]
        if len(kept) == 1:
            last = kept[0] == tensor.dim() - 1
            return tensor if last else tensor.movedim(kept[0], -1)  # the common cases: features, and channels
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
        return self.form.flops(rows, self.window.used_shape)

    def images(self, rows: Rows, shape: tuple[int, ...]) -> Images | None:
        """See ``Form``."""
        return self.form.images(rows, self.window.used_shape)

    def accumulate(self, acc: Tensor, rows: Rows, scale: float, **outputs: Tensor | None) -> None:
        """See ``Form``: where the part does not lie in one piece, by way of a tensor that does."""
        total = outputs.pop("total", None)
        targets = [None if whole is None else self.window.of_tensor(whole) for whole in (acc, total)]
        shape = self.window.used_shape
        pieces = [t if t is None or self.window.dense else t.new_zeros(shape) for t in targets]
        assert pieces[0] is not None
        self.form.accumulate(pieces[0], rows, scale, total=pieces[1], **outputs)
        for target, piece in zip(targets, pieces, strict=True):
            if target is not None and piece is not None and piece is not target:
                target += piece.view(target.shape)

    def gradients(self, rows: Rows, shape: tuple[int, ...]) -> Tensor:
        """See ``Form``: zero outside the part."""
        found = rows.g.new_zeros(rows.num_samples, *shape)
        part = self.window.of_each(found)
        part.copy_(self.form.gradients(rows, self.window.used_shape).view(part.shape))
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
