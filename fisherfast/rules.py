# SPDX-License-Identifier: Apache-2.0
"""Rules: how a parameter's use by a function gives x and g.

The one idea: whatever module wrote the call, a parameter enters a network in one of three *forms*. A rule says, for one
torch function, which of its arguments are parameters and in which form; everything after that is blind to the layer.

* ``MatMul``       ``y = x W``: rows x ``[..., I]``, g ``[..., O]``                     -> ``linear_sq_``
* ``Elementwise``  ``y = p * x`` or ``y = p + x`` under broadcasting: rows ``[..., D]`` -> ``scale_sq_``
* ``Lookup``       ``y = W[ids]``: ids ``[...]``, g ``[..., D]``                        -> ``embedding_sq_``

The leading axes ``[...]`` hold samples and positions in any layout; ``fisherfast.layout`` finds out which is which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfast.ops.embedding_sq import embedding_sq_
from fisherfast.ops.linear_sq import linear_sq_
from fisherfast.ops.scale_sq import scale_sq_


class Rows(NamedTuple):
    """One parameter's rows in one backward pass: x ``[N, T, ...]`` or None, g ``[N, T, ...]``; with offsets ``[M, ...]``."""

    x: Tensor | None
    g: Tensor
    offsets: Tensor | None = None


class Form:
    """How one use of a parameter turns (saved inputs, gradient of the output) into rows, and which op takes the rows."""

    op: str

    def rows(self, g: Tensor, inputs: tuple[Tensor, ...]) -> Rows:
        """Bring saved inputs and output gradient to ``x [..., I]`` (or None) and ``g [..., O]``, same leading axes."""
        raise NotImplementedError

    def accumulate(self, acc: Tensor, rows: Rows, scale: float, **outputs: Tensor | None) -> None:
        """Add ``scale * sum_n w_n (sample gradient)^2`` of rows, samples first, into ``acc``; ``outputs`` as for the ops."""
        raise NotImplementedError

    def joined(self, uses: list[Rows]) -> Rows:
        """Several uses of one parameter as one: a sum over uses is a sum over more positions."""
        xs = [use.x for use in uses if use.x is not None]
        return Rows(torch.cat(xs, dim=1) if xs else None, torch.cat([use.g for use in uses], dim=1))


@dataclass(frozen=True)
class MatMul(Form):
    """A weight that multiplies; ``transposed`` where it is stored ``[I, O]`` (Hugging Face's Conv1D)."""

    transposed: bool = False
    op = "linear_sq_"

    def rows(self, g: Tensor, inputs: tuple[Tensor, ...]) -> Rows:
        """See ``Form``."""
        (x,) = inputs
        return Rows(_like(x, g.dtype, (*g.shape[:-1], x.shape[-1])), g)

    def accumulate(self, acc: Tensor, rows: Rows, scale: float, **outputs: Tensor | None) -> None:
        """See ``Form``."""
        x, g, offsets = rows
        assert x is not None
        # The sample gradient of W^T is the transpose of that of W: swap the roles of x and g.
        x, g = (g, x) if self.transposed else (x, g)
        linear_sq_(acc, x, g, scale, offsets=offsets, **outputs)


@dataclass(frozen=True)
class Elementwise(Form):
    """A parameter that multiplies or is added under broadcasting; ``prepare`` recomputes x from what was saved."""

    shape: tuple[int, ...]
    prepare: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)
    op = "scale_sq_"

    def rows(self, g: Tensor, inputs: tuple[Tensor, ...]) -> Rows:
        """See ``Form``."""
        x = None
        if inputs:
            (x,) = inputs if self.prepare is None else (self.prepare(inputs[0]),)
            x = self._flat(_like(x, g.dtype, g.shape))
        return Rows(x, self._flat(g))

    def _flat(self, tensor: Tensor) -> Tensor:
        if len(self.shape) == 1 and self.shape[0] == tensor.shape[-1]:
            return tensor  # the common case: one feature axis, last
        aligned = (1,) * (tensor.dim() - len(self.shape)) + self.shape
        kept = [axis for axis, size in enumerate(aligned) if size != 1]
        lead = [axis for axis in range(tensor.dim()) if axis not in kept]
        return tensor.permute(*lead, *kept).reshape([tensor.shape[axis] for axis in lead] + [math.prod(self.shape)])

    def accumulate(self, acc: Tensor, rows: Rows, scale: float, **outputs: Tensor | None) -> None:
        """See ``Form``."""
        total = outputs.get("total")
        if total is not None:
            outputs["total"] = total.view(-1)
        scale_sq_(acc.view(-1), rows.x, rows.g, scale, offsets=rows.offsets, **outputs)

    def joined(self, uses: list[Rows]) -> Rows:
        """See ``Form``."""
        return Rows(None, torch.cat([use.g if use.x is None else use.g * use.x for use in uses], dim=1))


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
        assert rows.x is not None
        ids = rows.x.squeeze(-1)
        embedding_sq_(acc, ids, rows.g, scale, offsets=rows.offsets, padding_idx=self.padding_idx, **outputs)


def _like(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    x = x if x.dtype == dtype else x.to(dtype)
    return x if x.shape == shape else x.expand(shape)


@dataclass(frozen=True)
class Use:
    """One parameter in one call: its form, and the call's inputs that the form needs in the backward pass."""

    parameter: Tensor
    form: Form
    inputs: tuple[Tensor, ...] = ()


Rule = Callable[..., Iterator[Use]]
RULES: dict[Any, Rule] = {}


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register how ``functions`` use their parameters; also the extension point for third-party functions.

    The decorated generator is called with the function's own arguments and yields a ``Use`` for each argument that may
    be a parameter; those that are not tracked are ignored. Yield nothing for arguments the rule does not cover (an
    unusual option, say): the parameter then goes to the loop over samples, which is always right.

    Example::

        @ff.rule(my_library.scaled_linear)
        def _(x, weight):
            yield ff.rules.Use(weight, ff.rules.MatMul(), (x,))
    """

    def register(function: Rule) -> Rule:
        RULES.update((f, function) for f in functions)
        return function

    return register


@rule(F.linear)
def _linear(input, weight, bias=None):
    yield Use(weight, MatMul(), (input,))
    if bias is not None:
        yield Use(bias, Elementwise(tuple(bias.shape)))


@rule(torch.addmm, Tensor.addmm)
def _addmm(input, mat1, mat2, *, beta=1, alpha=1):
    if beta == 1 and alpha == 1:
        yield Use(mat2, MatMul(transposed=True), (mat1,))
        yield Use(input, Elementwise(tuple(input.shape)))


@rule(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
def _matmul(input, other):
    if other.dim() == 2:
        yield Use(other, MatMul(transposed=True), (input,))


@rule(F.embedding)
def _embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    if max_norm is None and not scale_grad_by_freq:
        padding_idx = -1 if padding_idx is None else padding_idx % weight.shape[0]
        yield Use(weight, Lookup(padding_idx), (input,))


def _normalised(norm: Callable[..., Tensor], shape: tuple[int, ...], eps: float | None) -> Callable[[Tensor], Tensor]:
    # Recomputed from the saved input rather than read off the output: (out - bias) / weight breaks where weight is 0.
    def prepare(x: Tensor) -> Tensor:
        x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        return norm(x, shape, eps=eps)

    return prepare


@rule(F.layer_norm)
def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    shape = tuple(normalized_shape)
    if weight is not None:
        yield Use(weight, Elementwise(shape, _normalised(F.layer_norm, shape, eps)), (input,))
    if bias is not None:
        yield Use(bias, Elementwise(shape))


@rule(F.rms_norm)
def _rms_norm(input, normalized_shape, weight=None, eps=None):
    shape = tuple(normalized_shape)
    if weight is not None:
        yield Use(weight, Elementwise(shape, _normalised(F.rms_norm, shape, eps)), (input,))


@rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def _mul(input, other):
    if isinstance(input, Tensor) and isinstance(other, Tensor):
        yield Use(input, Elementwise(tuple(input.shape)), (other,))
        yield Use(other, Elementwise(tuple(other.shape)), (input,))


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _add(input, other, *, alpha=1):
    if isinstance(input, Tensor) and isinstance(other, Tensor) and alpha == 1:
        yield Use(input, Elementwise(tuple(input.shape)))
        yield Use(other, Elementwise(tuple(other.shape)))


@rule(Tensor.expand)
def _expand(input, *sizes):
    yield Use(input, Elementwise(tuple(input.shape)))
