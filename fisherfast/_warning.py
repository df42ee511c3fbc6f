# SPDX-License-Identifier: Apache-2.0
"""The library's own warning, and whom it is addressed to; on the lowest floor, because every other one may warn."""

from __future__ import annotations

import sys
import warnings

_BETWEEN = {"contextlib", "functools", __package__, "torch"}  # packages whose frames may lie between a warning and who caused it


class FisherWarning(UserWarning):
    """A result is correct but easily misread, for example because it leaves parameters out; the message says what to know before using it."""


def warn(message: str) -> None:
    """Give a FisherWarning that points at the line of the user's by which the library was called, however deep it is found."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, FisherWarning, stacklevel=level)
