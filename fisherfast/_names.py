# SPDX-License-Identifier: Apache-2.0
"""How messages list names, of which a large model has thousands."""

from __future__ import annotations

from collections.abc import Iterable

_SHOWN = 5


def listed(names: Iterable[str]) -> str:
    """The first few in alphabetical order, and how many more there are: ``['a', 'b'] and 3 more``."""
    names = sorted(names)
    more = len(names) - _SHOWN
    return str(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
