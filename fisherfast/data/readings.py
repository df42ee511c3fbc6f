# SPDX-License-Identifier: Apache-2.0
"""Data that are read several times: they must not be used up by one reading, and where two passes belong together, be the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fisherfast.data.batches import Batch


def check_rereadable(caller: str, data: Any, otherwise: str = "") -> None:
    """Raise ValueError for an iterator, which one reading uses up; ``otherwise``: another way out."""
    if isinstance(data, Iterator):
        raise ValueError(
            f"{caller}: data must be readable several times, got {type(data).__name__}, which the first reading uses up; pass a "
            f"list of batches or a DataLoader{otherwise and ', ' + otherwise}"
        )


class SameReadings:
    """What several readings of one data set must have in common: the same batches, bit by bit, in the same order. Data that were the same
    twice do not shuffle: from the third reading on their batches are only counted.

    ``where`` they are to be the same, as the errors say it (``"in both passes"``); ``otherwise``: another way out than such data.
    """

    def __init__(self, data: Any, caller: str, where: str, otherwise: str = "") -> None:
        check_rereadable(caller, data, otherwise)
        self._caller, self._where, self._otherwise = caller, where, otherwise and f", {otherwise}"
        self._known: list[int] | None = None  # of the first reading that was complete
        self._trusted = False  # whether a second reading was the same

    def read(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches. Errors: ValueError for the first one that is not as in the first reading, or that is missing."""
        found = list[int]()
        for number, batch in enumerate(batches):
            found.append(0 if self._trusted else batch.fingerprint())
            if self._known is not None and not self._trusted and self._known[number : number + 1] != found[-1:]:
                raise ValueError(
                    f"{self._caller}: data must be the same {self._where}, got another batch {number} than in the first; turn off "
                    f"shuffling and random augmentation{self._otherwise}"
                )
            yield batch
        if self._known is not None and len(found) != len(self._known):
            raise ValueError(
                f"{self._caller}: data must be the same {self._where}, got {len(self._known)} batches and then {len(found)}"
            )
        self._trusted = self._known is not None
        self._known = self._known or found
