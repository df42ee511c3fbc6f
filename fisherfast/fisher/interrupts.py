# SPDX-License-Identifier: Apache-2.0
"""Signals, whose handlers Python runs wherever it happens to be, also between adding to a sum and counting what was added."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

_Handler = Callable[[int, FrameType | None], object]
_NAMES = (
    "SIGINT",
    "SIGTERM",
    "SIGALRM",
    "SIGHUP",
    "SIGUSR1",
    "SIGUSR2",
)  # Ctrl-C, a scheduler's, a timeout; Windows has two of them
_NUMBERS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


@contextmanager
def put_off(tear: Callable[[], None]) -> Iterator[None]:
    """Have handlers of signals wait until the block is over. A second signal of a kind does not wait; ``tear`` hears of it if that raises.

    In other threads, which get no signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: dict[int, tuple[_Handler, FrameType | None]] = {}

    def waiting(before: _Handler) -> _Handler:
        def note(number: int, frame: FrameType | None) -> None:
            if number not in came:
                came[number] = before, frame
                return
            del came[number]  # its handler has its turn now
            try:
                before(number, frame)
            except BaseException:
                tear()
                raise

        return note

    handlers = {number: before for number in _NUMBERS if callable(before := signal.getsignal(number))}
    with ExitStack() as afterwards:  # every handler runs, whatever another one raises
        try:
            for number, before in handlers.items():
                signal.signal(number, waiting(before))
            yield
        finally:
            for number, before in handlers.items():
                signal.signal(number, before)
            for number, (before, frame) in came.items():
                afterwards.callback(before, number, frame)
