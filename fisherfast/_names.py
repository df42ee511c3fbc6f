# SPDX-License-Identifier: Apache-2.0
"""How messages list names, of which a large model has thousands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_SHOWN = 5
_SHOWN_IN_TEXT = 10


def listed(names: Iterable[str]) -> str:
    """The first few in alphabetical order, and how many more there are: ``['a', 'b'] and 3 more``."""
    names = sorted(names)
    return str(names[:_SHOWN]) + _and_more(len(names) - _SHOWN)


def joined(names: Sequence[str]) -> str:
    """The first of them in their own order, for text: ``a, b and 3 more``."""
    return ", ".join(names[:_SHOWN_IN_TEXT]) + _and_more(len(names) - _SHOWN_IN_TEXT)


def _and_more(number: int) -> str:
    return f" and {number:,} more" if number > 0 else ""
