# SPDX-License-Identifier: Apache-2.0
"""Tensors that stand for a parameter in a forward pass: views of one, casts, copies and multiples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherfast._nested import tensors
from fisherfast.capture.tracked import Derived, Tracked
from fisherfast.rules import Window


@dataclass(frozen=True)
class Alias:
    """One tensor seen in the forward pass that stands for a parameter: the parameter itself, a view of it (``window``), or a cast, copy,
    constant shift or constant multiple of such a view (``made``, the functions applied in order).

    What ``made`` makes of the part has ``factor`` times the identity as its derivative, so a gradient of the one, times that, is a
    gradient of the other, as long as nobody changes it in place: ``version`` is that of the tensor when it was made.
    """

    tensor: Tensor
    tracked: Tracked
    window: Window | None = None
    made: tuple[Callable[[Tensor], Tensor], ...] = ()
    version: int = 0
    factor: float = 1.0

    @property
    def copied(self) -> bool:
        """Whether it has memory of its own: it is no parameter, nor a part of one."""
        return bool(self.made) or isinstance(self.tracked, Derived)

    @property
    def changed(self) -> bool:
        """Whether it is no longer what it was when it was made."""
        return self.copied and self.tensor._version != self.version

    def stand_in(self, leaf: bool) -> Tensor:
        """The tensor that takes its place in a use that is caught: one that autograd differentiates, or one it does not."""
        tensor = self._part_of(self.tracked.leaf if leaf else self.tracked.detached)
        for make in self.made:
            tensor = make(tensor)
        return tensor

    def outside(self) -> Tensor:
        """The tensor that takes its place elsewhere; a copy is itself, for it may be changed."""
        return self.tensor if self.made else self._part_of(self.tracked.outer)

    def part(self) -> Tensor:
        """The part of the parameter, which autograd does not differentiate."""
        return self._part_of(self.tracked.detached)

    def _part_of(self, whole: Tensor) -> Tensor:
        return whole if self.window is None else self.window.of_tensor(whole)


class Aliases:
    """The aliases of one forward pass. They are known by their ids, so each is held: Python would give its id to another tensor."""

    def __init__(self, parameters: Iterable[Tracked]) -> None:
        self._by_id = {id(one.parameter): Alias(one.parameter, one) for one in parameters}

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._by_id

    def of(self, tensor: Tensor) -> Alias:
        """The alias that a tensor is."""
        return self._by_id[id(tensor)]

    def add(self, alias: Alias) -> None:
        """Follow one more."""
        self._by_id[id(alias.tensor)] = alias

    def forget(self, tensor: Tensor) -> None:
        """Follow a tensor no longer."""
        self._by_id.pop(id(tensor), None)

    def among(self, tensors: Iterable[Tensor]) -> list[Alias]:
        """Those that are among these tensors, but for the ones that are left to autograd."""
        found = (self._by_id.get(id(tensor)) for tensor in tensors)
        return [alias for alias in found if alias is not None and not self.left(alias)]

    def left(self, alias: Alias) -> bool:
        """Whether a copy of a parameter was changed in place, and so is left to autograd."""
        if alias.changed:
            self._leave(alias, "a copy of it that is changed in place")
        return alias.changed

    def give_up_copies_of(self, tensor: Tensor) -> None:
        """Leave every followed copy that shares memory with ``tensor`` to autograd, because its ``.data`` is being read: a write through
        ``.data`` does not increment the version counter by which changed copies are noticed.
        """
        if tensor.layout is not torch.strided or torch._C._are_functorch_transforms_active():
            return
        memory = tensor.untyped_storage()._cdata
        for other in list(self._by_id.values()):
            if other.copied and other.tensor.layout is torch.strided and other.tensor.untyped_storage()._cdata == memory:
                self._leave(other, "a copy of it that is changed through .data")

    def _leave(self, alias: Alias, reason: str) -> None:
        self.forget(alias.tensor)
        alias.tracked.give_up(reason)


def is_part(out: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor is memory of the parameter, each number at most once."""
    return (
        out.layout is torch.strided  # a sparse one has no memory of its own
        and not torch._C._are_functorch_transforms_active()  # nor does what a transform wraps
        and parameter.is_contiguous()
        and out.dtype == parameter.dtype
        and out.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        and _does_not_overlap(out)
    )


def _does_not_overlap(tensor: Tensor) -> bool:
    """Whether no two of its entries are one number, as they are in what ``expand`` and, of overlapping windows, ``unfold`` return."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += (size - 1) * stride
    return True


_COPIES = {
    *(getattr(Tensor, name) for name in ("to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone")),
    torch.clone,
}
_RESHAPES = {torch.reshape, Tensor.reshape, torch.flatten, Tensor.flatten, Tensor.view}
_SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_NEGATIONS = {torch.neg, Tensor.neg, torch.negative, Tensor.negative, Tensor.__neg__}
_PRODUCTS = {torch.mul, Tensor.mul, torch.multiply, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__}
_QUOTIENTS = {torch.div, Tensor.div, torch.divide, Tensor.divide, torch.true_divide, Tensor.true_divide, Tensor.__truediv__}


def derivative(func: Any, args: Any, kwargs: Any, out: Any) -> float | None:
    """The derivative of a function of one parameter that changes its dtype, its place in memory, or its values by a constant summand or
    factor, only; None of any other function.
    """
    if not isinstance(out, Tensor):
        return None
    if func in _COPIES:
        return 1.0
    if kwargs:
        return None
    if func in _SUMS:
        return 1.0 if all(isinstance(a, (int, float)) for a in args[1:]) else None
    if func in _NEGATIONS:
        return -1.0
    if func not in _PRODUCTS and func not in _QUOTIENTS:
        return None
    parameter, constant = args if func in _QUOTIENTS or _is_constant(args[1]) else reversed(args)
    if not _is_constant(constant) or out.shape != parameter.shape:
        return None
    factor = float(constant)
    if not math.isfinite(factor) or (factor == 0 and func in _QUOTIENTS):
        return None
    return 1 / factor if func in _QUOTIENTS else factor


def _is_constant(value: Any) -> bool:
    """Whether it is one real number that nothing is asked to differentiate."""
    if isinstance(value, Tensor):
        plain = value.layout is torch.strided and not torch._C._are_functorch_transforms_active()
        return plain and value.numel() == 1 and not value.requires_grad and not value.is_complex()
    return isinstance(value, (int, float))


def reshaped(func: Any, alias: Alias, out: Any) -> Window | None:
    """Which part of the parameter a copy is, where a function of the alias only gives it another shape; None if it does more."""
    whole = alias.tracked.parameter
    if func not in _RESHAPES or not isinstance(out, Tensor) or out.dtype != alias.tensor.dtype or not whole.is_contiguous():
        return None
    return (alias.window or Window.of(whole, whole)).reshaped(tuple(out.shape))


def views_of_copy(alias: Alias, outputs: list[Tensor], make: Callable[[Tensor], Any]) -> list[Window]:
    """Which parts of the parameter the views are that ``make`` has made of a copy of it: those that it makes of what was copied, for what
    copies can as well come last. None where they are no views, or lie in memory in another order.
    """
    if not alias.made or alias.changed or any(out is alias.tensor for out in outputs):
        return []  # what writes into the copy would write into the parameter
    part = alias.part()
    if _lies(part) != _lies(alias.tensor):
        return []
    memory = alias.tensor.untyped_storage().data_ptr()
    if any(out.layout is not torch.strided or out.untyped_storage().data_ptr() != memory for out in outputs):
        return []
    parts, whole = tensors(make(part)), alias.tracked.parameter
    if not all(is_part(one, whole) for one in parts) or [*map(_lies, parts)] != [*map(_lies, outputs)]:
        return []
    return [Window.of(one, whole) for one in parts]


def _lies(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    return tensor.shape, tensor.stride()
