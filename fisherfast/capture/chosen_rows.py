# SPDX-License-Identifier: Apache-2.0
"""Rows chosen by data, as those of experts are: their place does not tell which sample they belong to."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from enum import IntEnum
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherfast._nested import tensors

_GATHERS = {
    *(Tensor.__getitem__, Tensor.index_select, Tensor.gather, Tensor.masked_select, Tensor.take_along_dim),
    *(torch.index_select, torch.gather, torch.masked_select, torch.take_along_dim, torch._pack_padded_sequence),
    *(torch.repeat_interleave, Tensor.repeat_interleave, torch.take, Tensor.take, F.embedding),
}

_STACKS = {torch.vstack, torch.row_stack}
_JOINS = {torch.cat, torch.concat, torch.concatenate} | _STACKS
# Where N is not known, so many joined parts are taken for samples; fewer may be a token or two put before the others.
_FEWEST = 4


def _both(*names: str) -> set[Any]:
    """Functions and methods of these names, in place too."""
    every = (name + end for name in names for end in ("", "_"))
    return {getattr(owner, name) for name in every for owner in (torch, Tensor) if hasattr(owner, name)}


# What puts rows back where samples are; sums into places do so with rows that were chosen, and send others to experts; slots are filled
# as the data has it.
_RETURNS = _both("masked_scatter") | {torch._pad_packed_sequence}
_SCATTERS = _both("index_add", "scatter_add", "scatter", "scatter_reduce")
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
    """The tensors of one forward pass that hold such rows; ``num_samples``: of the batch, where known; ``model``: whose tables hold none."""

    def __init__(self, num_samples: int | None, model: nn.Module) -> None:
        self._num_samples, self._model = num_samples, model
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
        if func in _RETURNS or not (self._known or func in _GATHERS or func in _SLOTS or func in _SCATTERS or func in _JOINS):
            return
        # Rows of hidden states, where there are any: what else is given is a mask, or the cosines of positions, however it was looked up.
        given = self.of([leaf for leaf in leaves if leaf.requires_grad] or leaves)
        if func in _SLOTS:
            filled = any(not leaf.is_floating_point() and leaf.dtype != torch.bool for leaf in leaves[1:])
            given, here = Chosen.NO, Chosen.YES if filled else Chosen.NO
            out = args[0] if out is None else out
        elif func in _SCATTERS:
            sent = leaves[-1].requires_grad and not self._of(leaves[-1])
            given, here = Chosen.NO, Chosen.POSSIBLY if sent else Chosen.NO
        elif func in _JOINS:
            here = self._of_many_lengths(leaves, out, _axis(func, args, kwargs))
        else:
            here = self._picked(func, args, kwargs, leaves) if func in _GATHERS else Chosen.NO
        if given and func in _ELEMENTWISE and isinstance(out, Tensor) and self._placed(leaves, out):
            given = Chosen.POSSIBLY
        if chosen := max(given, here):
            for tensor in tensors(out):
                self.add(tensor, chosen)

    def _picked(self, func: Any, args: Any, kwargs: Any, leaves: list[Tensor]) -> Chosen:
        """Whether rows are looked up by numbers, which may also choose features, or one row of each sample in order."""
        of_hidden = func is F.embedding and leaves[1].requires_grad  # no table, but what is looked up like one
        source, numbers = (leaves[1], leaves[:1]) if of_hidden else (leaves[0], leaves[1:])
        if not any(not leaf.is_floating_point() for leaf in numbers) and not _by_lists(func, args):
            return Chosen.NO
        if self._is_table(source):  # as of cosines or numbers of segments: what is looked up lies as the numbers do
            return self.of(numbers)
        if _one_of_each(func, source, args) and self._num_samples in (None, len(source)):
            return Chosen.NO
        return Chosen.POSSIBLY if not of_hidden and _picks_features(func, source, args, kwargs) else Chosen.YES

    def _is_table(self, tensor: Tensor) -> bool:
        """Whether it is the model's own: a buffer, or a parameter that is frozen."""
        if tensor.requires_grad or tensor.layout is not torch.strided or torch._C._are_functorch_transforms_active():
            return False
        memory = tensor.untyped_storage()._cdata
        frozen = (p for p in self._model.parameters() if not p.requires_grad)
        strided = (table for table in chain(self._model.buffers(), frozen) if table.layout is torch.strided)
        return any(table.untyped_storage()._cdata == memory for table in strided)

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


def _entries(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _by_lists(func: Any, args: Any) -> bool:
    """Whether numbers are in a list of Python's, or an array of NumPy's."""
    return func is Tensor.__getitem__ and any(isinstance(entry, list | np.ndarray) for entry in _entries(args[1]))


def _one_of_each(func: Any, source: Tensor, args: Any) -> bool:
    """Whether the first of several indices is 0, 1, ... up to the last entry of the first axis: ``hidden[arange(N), last]``. Of a mask also
    where that index is a column, ``mask[arange(N)[:, None], positions]``; of a hidden state such an index may pick padding.
    """
    first, *more = _entries(args[1]) if func is Tensor.__getitem__ else (None,)
    if not more or not isinstance(first, Tensor) or first.dtype != torch.int64 or first.shape[:1] != source.shape[:1]:
        return False
    if first.numel() != len(source) or (first.dim() > 1 and source.dtype != torch.bool):
        return False
    return torch.equal(first.flatten(), torch.arange(len(source), device=first.device))


def _picks_features(func: Any, source: Tensor, args: Any, kwargs: Any) -> bool:
    """Whether entries are picked along the last of several axes of real numbers."""
    if source.dim() < 2 or not source.is_floating_point():
        return False
    if func is not Tensor.__getitem__:
        dim = kwargs.get("dim", next((a for a in args[1:] if type(a) is int), None))
        return dim in (-1, source.dim() - 1)
    *others, last = _entries(args[1])
    if others and others[0] is Ellipsis:  # a list may also choose one position of every sample, as [..., [0], :] does
        return len(others) == 1 or not any(isinstance(entry, Tensor) for entry in (*others, last))
    return len(others) == source.dim() - 1 and all(isinstance(one, slice) for one in others) and not isinstance(last, slice)
