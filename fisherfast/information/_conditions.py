# SPDX-License-Identifier: Apache-2.0
"""What the conditions of an estimate say: how much was measured for its Fisher, and how; between which numbers others lie."""

from __future__ import annotations

from collections.abc import Collection

from fisherfast._names import listed
from fisherfast.fisher import Fisher


def measured(F: Fisher) -> str:
    """``k = 1,000 weights, N = 64 samples, Fisher mc, kfac``."""
    how = F.provenance.fisher_type or "of unknown type"
    return f"k = {F.num_parameters:,} weights, N = {F.num_samples:,} samples, Fisher {how}, {F.structure}"


def measured_and_missing(F: Fisher) -> str:
    """The same, and the parameters that were not measured."""
    missing = F.coverage.missing
    return measured(F) + (f", without {listed(missing)}, which it lacks" if missing else "")


def span(values: Collection[float], form: str = ".3g") -> str:
    """``0.1 to 0.3``, or ``0.1`` where all are that; each in the ``form`` of a format string."""
    low, high = min(values), max(values)
    return f"{low:{form}}" if low == high else f"{low:{form}} to {high:{form}}"
