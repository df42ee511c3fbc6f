# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments that several estimators share; each error names the function that was called."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from fisherfast._names import listed

_COMPARED = {">": operator.gt, ">=": operator.ge, "<": operator.lt}


def _finite(value: object) -> float | None:
    """The value as a finite float, also if it is a tensor without axes; None if it is none."""
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # of an integer
        return None
    return number if math.isfinite(number) else None


def several(values: Any) -> list[Any]:
    """A number, also a tensor or array without axes, as the only one of a list; else the list of them."""
    return [values] if not isinstance(values, Iterable) or getattr(values, "shape", None) == () else list(values)


def number(caller: str, name: str, value: object, advice: str, compared: str = "") -> float:
    """The finite number that ``value`` is, ``compared`` to zero in the way said, or ValueError."""
    finite = _finite(value)
    if finite is None or (compared and not _COMPARED[compared](finite, 0)):
        rule = f"a finite number {compared} 0" if compared else "a finite number"
        raise ValueError(f"{caller}: {name} must be {rule}, got {value!r}; {advice}")
    return finite


def positive(caller: str, name: str, value: object, advice: str) -> float:
    """The finite number above zero that ``value`` is, or ValueError."""
    return number(caller, name, value, advice, ">")


def not_negative(caller: str, name: str, value: object, advice: str) -> float:
    """The finite number of zero or more that ``value`` is, or ValueError."""
    return number(caller, name, value, advice, ">=")


def negative(caller: str, name: str, value: object, advice: str) -> float:
    """The finite number below zero that ``value`` is, or ValueError."""
    return number(caller, name, value, advice, "<")


def beta(caller: str, value: object) -> float:
    """The price of a nat that ``value`` is, or ValueError."""
    return positive(caller, "beta", value, "1 / (number of training samples) is the Bayesian choice")


def fisher(caller: str, F: object) -> None:
    """Raise TypeError unless F has all that the ``Fisher`` protocol does: an operator has products only."""
    if not hasattr(F, "spectra"):
        raise TypeError(
            f"{caller}: F must be a Fisher that was measured, got {type(F).__name__}; pass ff.fisher(model, data, structure=...)"
        )


def one_of(caller: str, name: str, value: str, choices: tuple[str, ...]) -> str:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{caller}: {name} must be one of {list(choices)}, got {value!r}")
    return value


def named(caller: str, what: str, tensors: Mapping[str, Tensor], names: Iterable[str], of: str) -> None:
    """Raise ValueError unless ``tensors``, called ``what``, has all ``names``, the parameters of ``of``."""
    if lacking := [name for name in names if name not in tensors]:
        raise ValueError(f"{caller}: {what} must hold every parameter of {of}, got none for {listed(lacking)}; add them")


def shaped(caller: str, what: str, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], of: str) -> None:
    """Raise ValueError unless each tensor has the shape of the same name in ``like``, the tensors of ``of``."""
    for name, tensor in like.items():
        if (got := tuple(tensors[name].shape)) != (shape := tuple(tensor.shape)):
            raise ValueError(f"{caller}: {what}[{name!r}] must be {shape} as in {of}, got {got}")
