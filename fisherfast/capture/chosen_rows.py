# SPDX-License-Identifier: Apache-2.0
"""Rows chosen by data, as those of experts are: their place does not tell which sample they belong to."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from fisherfast._nested import tensors

_GATHERS = {
    *(Tensor.__getitem__, Tensor.index_select, Tensor.gather, Tensor.masked_select, Tensor.take_along_dim),
    *(torch.index_select, torch.gather, torch.masked_select, torch.take_along_dim, torch._pack_padded_sequence),
    *(torch.repeat_interleave, Tensor.repeat_interleave),
}

_STACKS = {torch.vstack, torch.row_stack}
_JOINS = {torch.cat, torch.concat, torch.concatenate} | _STACKS
# Where N is not known, so many joined parts are taken for samples; fewer may be a token or two put before the others.
_FEWEST = 4


def _both(*names: str) -> set[Any]:
    """Functions and methods of these names, in place too."""
    every = (name + end for name in names for end in ("", "_"))
    return {getattr(owner, name) for name in every for owner in (torch, Tensor) if hasattr(owner, name)}


# Sums into places put rows of the same sample together, back where samples are; slots are filled as the data has it.
_SCATTERS = _both("index_add", "scatter_add", "scatter", "masked_scatter", "scatter_reduce") | {torch._pad_packed_sequence}
_SLOTS = _both("index_copy", "index_put") | {Tensor.__setitem__}

_OPERATORS = ("add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "truediv", "rtruediv", "itruediv")
_ELEMENTWISE = _both("add", "sub", "subtract", "mul", "multiply", "div", "divide", "where") | {
    getattr(Tensor, f"__{name}__") for name in _OPERATORS
}


class ChosenRows:
    """The tensors of one forward pass that hold such rows; ``num_samples``: of the batch, where known."""

    def __init__(self, num_samples: int | None) -> None:
        self._num_samples = num_samples
        self._known: dict[int, weakref.ref[Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._known)

    def __contains__(self, leaf: Any) -> bool:
        known = self._known.get(id(leaf))
        return known is not None and known() is leaf

    def add(self, tensor: Tensor) -> None:
        """Note that the rows of a tensor were chosen by data."""
        self._known[id(tensor)] = weakref.ref(tensor)

    def follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note the outputs of a function that is given such rows, or chooses rows by data itself."""
        if func in _SCATTERS or not (self._known or func in _GATHERS or func in _SLOTS or func in _JOINS):
            return
        leaves = list(tensors((args, kwargs)))
        if func in _ELEMENTWISE and isinstance(out, Tensor) and self._placed(leaves, out):
            self._known.pop(id(out), None)  # written in place
            return
        if func in _JOINS:
            by_data = self._of_many_lengths(leaves, out, _axis(func, args, kwargs))
        elif func in _SLOTS:
            by_data = any(not leaf.is_floating_point() and leaf.dtype != torch.bool for leaf in leaves[1:])
            out = args[0] if out is None else out
        else:
            listed = func is Tensor.__getitem__ and any(isinstance(leaf, list) for leaf in _leading(args[1]))
            by_data = func in _GATHERS and (listed or any(not leaf.is_floating_point() for leaf in leaves))
        if by_data or (func not in _SLOTS and any(leaf in self for leaf in leaves)):
            for tensor in tensors(out):
                if tensor.is_floating_point():
                    self.add(tensor)

    def _placed(self, leaves: list[Tensor], out: Tensor) -> bool:
        """Whether numbers computed entry by entry lie where those of an operand lie whose rows nothing has chosen: a hidden state to
        which a table's rows were added, or scores.
        """
        return any(leaf.grad_fn is not None and leaf.shape == out.shape and leaf not in self for leaf in leaves)

    def _of_many_lengths(self, parts: list[Tensor], out: Tensor, axis: int) -> bool:
        """Whether as many tensors as there are samples, of several lengths, were put one after the other: sequences of their own
        lengths, and not tensors of all samples, which have these along their first axis.
        """
        N = self._num_samples
        enough = len(parts) >= _FEWEST if N is None else len(parts) == N > 1
        if not enough or out.dim() < 2 or any(part.dim() != out.dim() for part in parts):
            return False
        first = out.shape[0]
        # Of two axes the first may be one of features as well.
        if axis % out.dim() and out.dim() > 2 and (first > 1 if N is None else first == N):
            return False
        return any(len({part.shape[axis] for part in parts}) > 1 for axis in range(out.dim()))


def _axis(func: Any, args: Any, kwargs: Any) -> int:
    """Along which tensors are joined."""
    if func in _STACKS:
        return 0
    return int(kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0)))


def _leading(index: Any) -> list[Any]:
    """The entries of an index before its ellipsis: those behind it choose features, or one position of every sample."""
    entries = index if isinstance(index, tuple) else (index,)
    return list(itertools.takewhile(lambda entry: entry is not Ellipsis, entries))
