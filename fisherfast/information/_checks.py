# SPDX-License-Identifier: Apache-2.0
"""Checks of numbers that several estimators share; each error names the function that was called."""

from __future__ import annotations

import math


def number(caller: str, name: str, value: object, advice: str) -> float:
    """Raise ValueError unless ``value`` is a finite number."""
    if not (isinstance(value, (int, float)) and math.isfinite(value)):
        raise ValueError(f"{caller}: {name} must be a finite number, got {value!r}; {advice}")
    return float(value)


def positive(caller: str, name: str, value: object, advice: str) -> float:
    """Raise ValueError unless ``value`` is a finite number above zero."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ValueError(f"{caller}: {name} must be a finite number > 0, got {value!r}; {advice}")
    return float(value)


def not_negative(caller: str, name: str, value: object, advice: str) -> float:
    """Raise ValueError unless ``value`` is a finite number of zero or more."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{caller}: {name} must be a finite number >= 0, got {value!r}; {advice}")
    return float(value)


def one_of(caller: str, name: str, value: str, choices: tuple[str, ...]) -> str:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{caller}: {name} must be one of {list(choices)}, got {value!r}")
    return value
