# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model are running, and with what: read off the stack, because no hook is set on a model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from fisherfast._nested import tensors

_CALL = nn.Module._wrapped_call_impl.__code__  # what runs while a module is called


class Running(NamedTuple):
    """A module that is being called, and what with."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def running_modules(model: nn.Module) -> list[Running]:
    """The model's modules that are being called, the innermost first; none where it is not the model that runs."""
    return _own(model, _stack())


def runs(model: nn.Module) -> bool:
    """Whether a method of the model's, or of a module in it, is running, called as a module or by its name."""
    own = {id(module) for module in model.modules()}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if id(first) in own and (code.co_varnames[0] == "self" or _is_method(code, first)):
            return True
        frame = frame.f_back
    return False


def _is_method(code: CodeType, of: object) -> bool:
    return getattr(getattr(type(of), code.co_name, None), "__code__", None) is code


def _stack() -> Iterator[Running]:
    """All modules that are being called."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            yield Running(*(frame.f_locals[name] for name in ("self", "args", "kwargs")))
        frame = frame.f_back


def _own(model: nn.Module, running: Iterable[Running]) -> list[Running]:
    own = set(model.modules())
    return [one for one in running if one.module in own]


class InputShapes:
    """The shapes of what a model is called with, call by call, as far as ``note`` is called while it runs; none where lists are given."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._last = model, dict[str, Any]()
        self.shapes: list[list[torch.Size]] = []

    def note(self) -> None:
        """The outermost call that is under way, unless it is the last one still."""
        running = list(_stack())
        if any(one.kwargs is self._last for one in running):  # each call has a dictionary of its own, be it empty
            return
        for one in _own(self._model, running)[-1:]:
            self._last = one.kwargs
            # A list may be of samples, or of parts of them.
            several = any(isinstance(value, list | tuple) for value in (*one.args, *one.kwargs.values()))
            self.shapes.append([] if several else [t.shape for t in tensors(one.args, one.kwargs) if t.dim()])
