# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments that several estimators share; each error names the function that was called."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real

from torch import Tensor


def number(caller: str, name: str, value: object, advice: str) -> float:
    """Raise ValueError unless ``value`` is a finite number."""
    if not (isinstance(value, Real) and math.isfinite(value)):
        raise ValueError(f"{caller}: {name} must be a finite number, got {value!r}; {advice}")
    return float(value)


def positive(caller: str, name: str, value: object, advice: str) -> float:
    """Raise ValueError unless ``value`` is a finite number above zero."""
    if not (isinstance(value, Real) and math.isfinite(value) and float(value) > 0):
        raise ValueError(f"{caller}: {name} must be a finite number > 0, got {value!r}; {advice}")
    return float(value)


def not_negative(caller: str, name: str, value: object, advice: str) -> float:
    """Raise ValueError unless ``value`` is a finite number of zero or more."""
    if not (isinstance(value, Real) and math.isfinite(value) and float(value) >= 0):
        raise ValueError(f"{caller}: {name} must be a finite number >= 0, got {value!r}; {advice}")
    return float(value)


def one_of(caller: str, name: str, value: str, choices: tuple[str, ...]) -> str:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{caller}: {name} must be one of {list(choices)}, got {value!r}")
    return value


def named(caller: str, what: str, tensors: Mapping[str, Tensor], names: Iterable[str], of: str) -> None:
    """Raise ValueError unless ``tensors``, called ``what``, has all ``names``, the parameters of ``of``."""
    if lacking := [name for name in names if name not in tensors]:
        raise ValueError(f"{caller}: {what} must hold every parameter of {of}, lacks {lacking}")


def shaped(caller: str, what: str, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], of: str) -> None:
    """Raise ValueError unless each tensor has the shape of the same name in ``like``, the tensors of ``of``."""
    for name, tensor in like.items():
        if (got := tuple(tensors[name].shape)) != (shape := tuple(tensor.shape)):
            raise ValueError(f"{caller}: {what}[{name!r}] must be {shape} as in {of}, got {got}")
