# SPDX-License-Identifier: Apache-2.0
"""Contractions taken apart: ``einsum`` and its like, written as products with a matrix that a weight is, or a stack of such.

The axes of the other operand stay as they are, so that samples are seen along their own.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfast.rules.decompositions import decomposes

_MOST_MATRICES = 64  # of a stack: each takes a product of its own


def _is_weight(tensor: Tensor) -> bool:
    """Whether it is a parameter, or a view of one."""
    whole = tensor if tensor._base is None else tensor._base
    return whole.is_leaf and whole.requires_grad


@decomposes(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def _matmul(input, other):
    """With a vector, or a stack of matrices, that is a weight."""
    if other.dim() == 1 and input.dim() > 1:
        return torch.matmul(input, other.unsqueeze(-1)).squeeze(-1)
    if _is_weight(other) and other.dim() == 3 and input.dim() >= 3:
        return _stacked(input, other, torch.matmul)
    if _is_weight(input) and input.dim() == 3 and other.dim() >= 3:
        return _stacked(other, input, lambda x, w: torch.matmul(w, x))
    return NotImplemented


@decomposes(torch.mv, Tensor.mv)
def _mv(input, vec):
    return torch.matmul(input, vec)


def _stacked(x: Tensor, weight: Tensor, product):
    """``product`` of matrices ``[..., G, *, *]`` and those of a weight ``[G, *, *]``, or of either with one of the other."""
    G, of_x = len(weight), x.shape[-3]
    if not 0 < G <= _MOST_MATRICES or (1 not in (G, of_x) and G != of_x):
        return NotImplemented
    if G == 1:
        return product(x, weight.squeeze(0))
    return torch.stack([product(x.select(-3, g if of_x > 1 else 0), weight[g]) for g in range(G)], -3)


@decomposes(torch.inner, Tensor.inner)
def _inner(input, other):
    if other.dim() == 2 and input.dim() >= 1:
        return F.linear(input, other)
    return torch.matmul(input, other) if other.dim() == 1 and input.dim() >= 1 else NotImplemented


@decomposes(torch.tensordot)
def _tensordot(a, b, dims=2, out=None):
    if out is not None or isinstance(dims, Tensor):
        return NotImplemented
    if isinstance(dims, int):
        dims = (range(a.dim() - dims, a.dim()), range(dims))
    of_a, of_b = (
        [axis % t.dim() for axis in ([axes] if isinstance(axes, int) else axes)] for axes, t in zip(dims, (a, b), strict=True)
    )
    if not of_a:
        return NotImplemented
    names = string.ascii_letters[: a.dim() + b.dim()]
    first, second = names[: a.dim()], list(names[a.dim() :])
    for axis_a, axis_b in zip(of_a, of_b, strict=True):
        second[axis_b] = first[axis_a]
    summed = {first[axis] for axis in of_a}
    kept = "".join(name for name in (*first, *second) if name not in summed)
    return torch.einsum(f"{first},{''.join(second)}->{kept}", a, b)


@decomposes(torch.einsum)
def _einsum(equation, *operands):
    """From left to right, two operands at a time."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) < 2 or not (terms := _terms(equation, operands)):
        return NotImplemented
    *inputs, output = terms
    result, axes = operands[0], inputs[0]
    for number, (operand, its) in enumerate(zip(operands[1:], inputs[1:], strict=True), start=2):
        needed = set(output).union(*inputs[number:])
        kept = output if number == len(inputs) else "".join(dict.fromkeys(name for name in axes + its if name in needed))
        result, axes = _pair(result, axes, operand, its, kept), kept
        if result is NotImplemented:
            return NotImplemented
    return result


def _terms(equation: str, operands: Sequence[Tensor]) -> list[str]:
    """The names of the operands' axes and of the result's, each axis once and of one size; none where that cannot be said."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if len(inputs) != len(operands):
        return []
    extents = [t.dim() - len(its.replace("...", "")) for its, t in zip(inputs, operands, strict=True)]
    others = "".join(name for name in string.ascii_letters if name not in equation)[: max(extents)]
    if not arrow:
        names = left.replace(",", "").replace("...", "")
        output = "..." + "".join(sorted(name for name in set(names) if names.count(name) == 1))
    ellipses = [others[len(others) - extent :] for extent in (*extents, len(others))]  # their last axes meet
    terms = [term.replace("...", axes) for term, axes in zip((*inputs, output), ellipses, strict=True)]
    sizes: dict[str, int] = {}
    for its, operand in zip(terms, operands, strict=False):
        same = len(its) == operand.dim() and all(
            sizes.setdefault(name, size) == size for name, size in zip(its, operand.shape, strict=True)
        )
        if not same or len(set(its)) < len(its) or not operand.numel():
            return []
    return terms if len(set(terms[-1])) == len(terms[-1]) and set(terms[-1]) <= sizes.keys() else []


def _pair(a: Tensor, of_a: str, b: Tensor, of_b: str, output: str):
    """The contraction of two operands with these axes; the one that is a weight, or has fewer axes, becomes matrices."""
    if (_is_weight(a), -a.dim()) > (_is_weight(b), -b.dim()):
        a, of_a, b, of_b = b, of_b, a, of_a
    x, of_x = _summed(a, of_a, of_b + output)
    weight, of_weight = _summed(b, of_b, of_a + output)
    shared = [name for name in of_weight if name in of_x]
    each, summed = ([name for name in shared if (name in output) == kept] for kept in (True, False))
    rows = [name for name in of_x if name not in shared]
    columns = [name for name in of_weight if name not in shared]
    sizes = dict(zip(of_x + of_weight, x.shape + weight.shape, strict=True))
    of_rows, of_each, inner, outer = ([sizes[name] for name in names] for names in (rows, each, summed, columns))
    rounded = torch.is_autocast_enabled(x.device.type)  # einsum's products of matrices are, and no others
    if rounded and not summed:
        return NotImplemented
    x = _ordered(x, of_x, rows + each + summed)
    if each and not columns and not rounded:
        result = x * _ordered(weight, of_weight, each + summed)
        result = result.flatten(len(rows + each)).sum(-1) if summed else result
        return _ordered(result, "".join(rows + each), output).contiguous()
    x = x.reshape([*of_rows, *([math.prod(of_each)] if each else []), math.prod(inner)])
    if not each:
        if of_weight == "".join(columns + summed):
            result = F.linear(x, weight.reshape(math.prod(outer), math.prod(inner)))
        else:
            result = torch.matmul(x, _ordered(weight, of_weight, summed + columns).reshape(math.prod(inner), math.prod(outer)))
    else:
        stack = _ordered(weight, of_weight, each + summed + columns).reshape(
            math.prod(of_each), math.prod(inner), math.prod(outer)
        )
        result = _stacked(x.unsqueeze(-2), stack, torch.matmul)
        if result is NotImplemented:
            return NotImplemented
        result = result.squeeze(-2)
    return _ordered(result.reshape([*of_rows, *of_each, *outer]), "".join(rows + each + columns), output).contiguous()


def _summed(tensor: Tensor, axes: str, needed: str) -> tuple[Tensor, str]:
    """Summed over the axes that nothing else has."""
    gone = [axis for axis, name in enumerate(axes) if name not in needed]
    return (tensor.sum(gone), "".join(name for name in axes if name in needed)) if gone else (tensor, axes)


def _ordered(tensor: Tensor, axes: str, wanted: Sequence[str]) -> Tensor:
    order = [axes.index(name) for name in wanted]
    return tensor if order == sorted(order) else tensor.permute(order)
