# SPDX-License-Identifier: Apache-2.0
"""Defers the handlers of signals, so that none runs between adding to a sum and counting what was added."""

from __future__ import annotations

import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

_Handler = Callable[[int, FrameType | None], object]
# Ctrl-C, a scheduler's, a timeout, and the rest of those that programs handle; Windows has two of them.
_NAMES = "SIGINT SIGTERM SIGALRM SIGHUP SIGUSR1 SIGUSR2".split()
_NUMBERS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


@contextmanager
def deferred(on_interrupt: Callable[[], None]) -> Iterator[None]:
    """Defer the handlers of signals to the end of the block. The second signal of a kind prints a notice; from the third on handlers run
    at once, and ``on_interrupt`` is called if one raises. A handler that is set in the block stays.

    In other threads, which get no signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: dict[int, list[FrameType | None]] = defaultdict(list)
    handlers: dict[int, _Handler] = {number: handler for number in _NUMBERS if callable(handler := signal.getsignal(number))}

    def note(number: int, frame: FrameType | None) -> None:
        came[number].append(frame)
        if len(came[number]) == 2:
            print(  # noqa: T201  not a warning, which may be an error and would raise here, in the middle of the batch
                f"fisherfast: {signal.Signals(number).name} waits for the end of this batch; once more does not, and what was measured is lost",
                file=sys.stderr,
            )
        if len(came[number]) < 3:
            return
        try:
            handlers[number](number, frame)
        except BaseException:
            on_interrupt()
            raise

    def deliver(number: int) -> None:
        if 0 < len(came[number]) < 3:
            handlers[number](number, came[number][0])

    def put_back(number: int) -> None:
        if signal.getsignal(number) is note:
            signal.signal(number, handlers[number])

    with ExitStack() as afterwards:  # every handler is put back, then every signal delivered, whatever another one raises
        for number in handlers:
            afterwards.callback(deliver, number)
        for number in handlers:
            afterwards.callback(put_back, number)
            signal.signal(number, note)
        yield
