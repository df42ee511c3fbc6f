# SPDX-License-Identifier: Apache-2.0
"""Data that are read several times: they must not be used up by one reading, and where two passes belong together, be the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fisherfast.batches import Batch

_OTHERWISE = "or measure KFAC and then ff.collect(model, ff.EKFAC(basis=kfac))"  # what a second pass is for can be had without


def check_rereadable(caller: str, data: Any, otherwise: str = "") -> None:
    """Raise ValueError for an iterator, which one reading uses up; ``otherwise``: another way out."""
    if isinstance(data, Iterator):
        raise ValueError(
            f"{caller}: data must be readable several times, got {type(data).__name__}, which the first reading uses up; pass a "
            f"list of batches or a DataLoader{otherwise and ', ' + otherwise}"
        )


class ReadTwice:
    """What two passes over one data set must have in common: the same batches, bit by bit, in the same order."""

    def __init__(self, data: Any, caller: str) -> None:
        check_rereadable(caller, data, _OTHERWISE)
        self._caller, self._first = caller, list[int]()

    def first(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of the first pass."""
        for batch in batches:
            self._first.append(batch.fingerprint())
            yield batch

    def again(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Those of the second. Errors: ValueError for the first one that is not as in the first pass, or that is missing."""
        number = -1
        for number, batch in enumerate(batches):
            if number >= len(self._first) or self._first[number] != batch.fingerprint():
                raise ValueError(
                    f"{self._caller}: data must be the same in both passes, got another batch {number} in the second; turn off "
                    f"shuffling and random augmentation, {_OTHERWISE}"
                )
            yield batch
        if number + 1 != len(self._first):
            raise ValueError(
                f"{self._caller}: data must be the same in both passes, got {len(self._first)} batches and then {number + 1}"
            )
