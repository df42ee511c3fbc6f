# SPDX-License-Identifier: Apache-2.0
"""What callers hand to several estimators: a Fisher, the price of a nat, one number or many."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fisherfast import _checks


def beta(caller: str, value: object) -> float:
    """The price of a nat that ``value`` is, or ValueError."""
    return _checks.positive(caller, "beta", value, "1 / (number of training samples) is the Bayesian choice")


def check_fisher(caller: str, F: object) -> None:
    """Raise TypeError unless F has all that the ``Fisher`` protocol does: an operator has products only."""
    if not hasattr(F, "spectra"):
        raise TypeError(
            f"{caller}: F must be a Fisher that was measured, got {type(F).__name__}; pass ff.fisher(model, data, structure=...)"
        )


def as_list(values: Any) -> list[Any]:
    """A number, also a tensor or array without axes, as the only one of a list; else the list of them."""
    return [values] if not isinstance(values, Iterable) or getattr(values, "shape", None) == () else list(values)
