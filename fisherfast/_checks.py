# SPDX-License-Identifier: Apache-2.0
"""Checks of what callers pass; each error reads ``caller: name must be RULE, got VALUE; advice``."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fisherfast._names import listed

_COMPARED = {">": operator.gt, ">=": operator.ge, "<": operator.lt}


def integer(caller: str, name: str, value: Any, least: int | None = None, advice: str = "") -> int:
    """``value`` as an int (of Python, NumPy or a tensor without axes). Errors: ValueError if it is none, or below ``least``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{caller}: {name} must be an integer, got {value!r}{_then(advice)}") from None
    if least is not None and number < least:
        raise ValueError(f"{caller}: {name} must be >= {least}, got {value}{_then(advice)}")
    return number


def number(caller: str, name: str, value: object, advice: str = "", compared: str = "") -> float:
    """The finite number that ``value`` is, ``compared`` to zero in the way said, or ValueError."""
    finite = _finite(value)
    if finite is None or (compared and not _COMPARED[compared](finite, 0)):
        rule = f"a finite number {compared} 0" if compared else "a finite number"
        raise ValueError(f"{caller}: {name} must be {rule}, got {value!r}{_then(advice)}")
    return finite


def positive(caller: str, name: str, value: object, advice: str = "") -> float:
    """The finite number above zero that ``value`` is, or ValueError."""
    return number(caller, name, value, advice, ">")


def non_negative(caller: str, name: str, value: object, advice: str = "") -> float:
    """The finite number of zero or more that ``value`` is, or ValueError."""
    return number(caller, name, value, advice, ">=")


def negative(caller: str, name: str, value: object, advice: str = "") -> float:
    """The finite number below zero that ``value`` is, or ValueError."""
    return number(caller, name, value, advice, "<")


def real(caller: str, what: str, values: Any) -> None:
    """Raise ValueError for complex numbers, in a tensor or in what becomes one: torch would drop their imaginary part."""
    tensor = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    if tensor.is_complex():
        raise ValueError(f"{caller}: {what} must be real, got {tensor.dtype}; pass .real, if that is what is meant")


def float64(caller: str, what: str, values: Any) -> Tensor:
    """``values`` as a tensor in float64, or ValueError."""
    real(caller, what, values)
    return torch.as_tensor(values, dtype=torch.float64)


def one_of(caller: str, name: str, value: str, choices: Collection[str]) -> str:
    """``value``, which must be one of ``choices``, or ValueError."""
    if value not in choices:
        raise ValueError(f"{caller}: {name} must be one of {list(choices)}, got {value!r}")
    return value


def named(caller: str, what: str, tensors: Mapping[str, Tensor], names: Iterable[str], of: str) -> None:
    """Raise ValueError unless ``tensors``, called ``what``, has all ``names``, the parameters of ``of``."""
    if lacking := [name for name in names if name not in tensors]:
        raise ValueError(f"{caller}: {what} must hold every parameter of {of}, got none for {listed(lacking)}; add them")


def shaped(caller: str, what: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], of: str) -> None:
    """Raise ValueError unless each tensor has the shape of the same name in ``shapes``, those of ``of``."""
    for name, shape in shapes.items():
        if (got := tensors[name].shape) != shape:
            raise ValueError(f"{caller}: {what}[{name!r}] must be {tuple(shape)} as in {of}, got {tuple(got)}")


def _finite(value: object) -> float | None:
    """The value as a finite float, also if it is a tensor without axes; None if it is none."""
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if not isinstance(value, Real):
        return None
    try:
        finite = float(value)
    except OverflowError:  # of an integer
        return None
    return finite if math.isfinite(finite) else None


def _then(advice: str) -> str:
    return f"; {advice}" if advice else ""
