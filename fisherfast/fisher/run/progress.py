# SPDX-License-Identifier: Apache-2.0
"""A progress bar over batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def _length(data: Iterable[Any]) -> int | None:
    """Batches, where that is known: a DataLoader has a length that fails for a data set that has none."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:
        return None


def shown(data: Iterable[Any], progress: bool, what: str) -> Iterator[Any]:
    """The batches, with a progress bar on a terminal."""
    if not progress:
        yield from data
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    total = _length(data)
    console = Console(stderr=True)  # what the caller prints stays as it is
    with Progress(*columns, transient=True, console=console, disable=not (console.is_terminal or console.is_jupyter)) as bar:
        task = bar.add_task(what, total=total)
        for item in data:
            yield item
            bar.advance(task)
