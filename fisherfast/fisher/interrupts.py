# SPDX-License-Identifier: Apache-2.0
"""Signals, whose handlers Python runs wherever it happens to be, also between adding to a sum and counting what was added."""

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
def put_off(tear: Callable[[], None]) -> Iterator[None]:
    """Have handlers of signals wait until the block is over. The second signal of a kind is told so, the third does not wait; ``tear``
    hears of it if that raises.

    In other threads, which get no signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: dict[int, list[FrameType | None]] = defaultdict(list)
    handlers: dict[int, _Handler] = {number: one for number in _NUMBERS if callable(one := signal.getsignal(number))}

    def note(number: int, frame: FrameType | None) -> None:
        came[number].append(frame)
        if len(came[number]) == 2:
            print(
                f"fisherfast: waits for the end of this batch; once more stops at once, and what was measured is lost ({signal.Signals(number).name})",
                file=sys.stderr,
            )
        if len(came[number]) < 3:
            return
        del came[number]  # its handler has its turn now
        try:
            handlers[number](number, frame)
        except BaseException:
            tear()
            raise

    def deliver(number: int) -> None:
        if number in came:
            handlers[number](number, came[number][0])

    with ExitStack() as afterwards:  # every handler is put back, then every signal delivered, whatever another one raises
        for number in handlers:
            afterwards.callback(deliver, number)
        for number, handler in handlers.items():
            afterwards.callback(signal.signal, number, handler)
            signal.signal(number, note)
        yield
