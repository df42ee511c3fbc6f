# SPDX-License-Identifier: Apache-2.0
"""Compiled functions run as they are written while a capture is open: a mode does not see into code that is compiled already."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class Eager:
    """torch.compiler's stance "force_eager", held as long as any capture is open.

    The stance belongs to the process: the first of several captures, in whatever threads, takes it, and the last gives back the
    one that was there before.
    """

    def __init__(self) -> None:
        self._lock, self._captures = threading.Lock(), 0
        self._stance: AbstractContextManager[None] | None = None

    def acquire(self) -> None:
        """Hold the stance; each call needs one ``release``."""
        with self._lock:
            compiled = "torch._dynamo" in sys.modules  # importing it takes a second, and only then can anything be compiled
            if compiled and self._stance is None:
                _refuse_compiled()
                stance = torch.compiler.set_stance("force_eager")
                stance.__enter__()
                self._stance = stance
            self._captures += 1

    def release(self) -> None:
        """Undo one ``acquire``; the last one restores the stance that was there before."""
        with self._lock:
            self._captures -= 1
            if not self._captures and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


EAGER = Eager()


def _refuse_compiled() -> None:
    """Raise ValueError where the caller is being compiled: its frames would be, too, whatever the stance."""
    callback = torch._C._dynamo.eval_frame.get_eval_frame_callback()
    if callback is not None and callback is not False:
        raise ValueError(
            "collect: must be entered outside of what torch.compile compiles, got a call inside of it; compile the model, or decorate the "
            "function that measures with torch.compiler.disable"
        )


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs as it is written, with all that it calls, inside compiled functions too."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        return torch.compiler.disable(function)(*args, **kwargs)

    return run
