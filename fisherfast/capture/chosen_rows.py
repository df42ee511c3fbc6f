# SPDX-License-Identifier: Apache-2.0
"""Rows chosen by data, as those of experts are: their place does not tell which sample they belong to."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from enum import IntEnum
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


class Chosen(IntEnum):
    """Whether data chose the rows of a tensor.

    Where it is possible, and nothing shows it, the rows are tagged in every batch like those that were; as to padding they are like
    rows that were not: those without a gradient are inputs.
    """

    NO = 0
    POSSIBLY = 1
    YES = 2


class ChosenRows:
    """The tensors of one forward pass that hold such rows; ``num_samples``: of the batch, where known."""

    def __init__(self, num_samples: int | None) -> None:
        self._num_samples = num_samples
        self._known: dict[int, tuple[weakref.ref[Tensor], Chosen]] = {}

    def of(self, leaves: Iterable[Any]) -> Chosen:
        """Of the tensors the one that data chose most surely."""
        return max(map(self._of, leaves), default=Chosen.NO) if self._known else Chosen.NO

    def _of(self, leaf: Any) -> Chosen:
        known, chosen = self._known.get(id(leaf), (None, Chosen.NO))
        return chosen if known is not None and known() is leaf else Chosen.NO

    def add(self, tensor: Tensor, chosen: Chosen) -> None:
        """Note it of a tensor."""
        self._known[id(tensor)] = weakref.ref(tensor), chosen

    def follow(self, func: Any, args: Any, kwargs: Any, leaves: list[Tensor], out: Any) -> None:
        """Note the outputs of a function that is given such rows, or chooses rows by data itself; ``leaves``: all tensors that it is given."""
        if func in _SCATTERS or not (self._known or func in _GATHERS or func in _SLOTS or func in _JOINS):
            return
        given = self.of(leaves)
        if func in _SLOTS:
            filled = any(not leaf.is_floating_point() and leaf.dtype != torch.bool for leaf in leaves[1:])
            given, here = Chosen.NO, Chosen.YES if filled else Chosen.NO
            out = args[0] if out is None else out
        elif func in _JOINS:
            here = self._of_many_lengths(leaves, out, _axis(func, args, kwargs))
        else:
            here = _picked(func, args, leaves) if func in _GATHERS else Chosen.NO
        if given and func in _ELEMENTWISE and isinstance(out, Tensor) and self._placed(leaves, out):
            given = Chosen.POSSIBLY
        if chosen := max(given, here):
            for tensor in tensors(out):
                self.add(tensor, chosen)

    def _placed(self, leaves: list[Tensor], out: Tensor) -> bool:
        """Whether numbers computed entry by entry may lie where those of an operand lie whose rows nothing has chosen: a hidden state
        to which a table's rows were added, or scores.
        """
        return any(leaf.grad_fn is not None and leaf.shape == out.shape and not self._of(leaf) for leaf in leaves)

    def _of_many_lengths(self, parts: list[Tensor], out: Tensor, axis: int) -> Chosen:
        """Whether as many tensors as there are samples, of several lengths, were put one after the other: sequences of their own
        lengths, or tensors of all samples, which have these along their first axis.
        """
        N = self._num_samples
        enough = len(parts) >= _FEWEST if N is None else len(parts) == N > 1
        if not enough or out.dim() < 2 or any(part.dim() != out.dim() for part in parts):
            return Chosen.NO
        if all(len({part.shape[axis] for part in parts}) == 1 for axis in range(out.dim())):
            return Chosen.NO
        of_all = axis % out.dim() > 0 and (out.shape[0] > 1 if N is None else out.shape[0] == N)
        return Chosen.POSSIBLY if of_all else Chosen.YES


def _axis(func: Any, args: Any, kwargs: Any) -> int:
    """Along which tensors are joined."""
    if func in _STACKS:
        return 0
    return int(kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0)))


def _picked(func: Any, args: Any, leaves: list[Tensor]) -> Chosen:
    """Whether rows are looked up by numbers; those in a list behind an ellipsis may choose features, or one position of every sample."""
    if any(not leaf.is_floating_point() for leaf in leaves[1:]):  # the first is what they are picked from
        return Chosen.YES
    index = args[1] if func is Tensor.__getitem__ else None
    entries = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(entry, list) for entry in entries):
        return Chosen.NO
    before = itertools.takewhile(lambda entry: entry is not Ellipsis, entries)
    return Chosen.YES if any(isinstance(entry, list) for entry in before) else Chosen.POSSIBLY
