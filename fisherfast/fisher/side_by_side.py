# SPDX-License-Identifier: Apache-2.0
"""Two tasks at a time on a CPU: a decomposition gains little from a second thread, two decompositions gain all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def side_by_side(tasks: Sequence[Callable[[], Any]], device: torch.device) -> None:
    """Run them all, each with half of torch's threads; one after the other where there is one thread, or on a GPU.

    No more than two, so that two of them are in memory at most. torch's number of threads is the process's and is lowered meanwhile.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(tasks) < 2:
        for task in tasks:
            task()
        return

    @torch.no_grad()
    def alone(task: Callable[[], Any]) -> None:
        task()

    torch.set_num_threads(threads // 2)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(alone, tasks))
    finally:
        torch.set_num_threads(threads)
