# SPDX-License-Identifier: Apache-2.0
"""What the conditions of an estimate say of its Fisher: how much was measured, and how."""

from __future__ import annotations

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
