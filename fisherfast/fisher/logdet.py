# SPDX-License-Identifier: Apache-2.0
"""What is computed of the eigenvalues of ``F + damping I``: its log-determinant, and what is said where it is singular."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fisherfast._warning import warn
from fisherfast.ops.log1p_sum import log1p_sum


def of_values(values: Tensor, others: int, damping: float) -> tuple[float, int]:
    """``sum log(eigenvalue + damping)``, how many are ``log 0`` and left out: of float64 ``values``, and ``others`` that are zero."""
    if damping:
        sums = torch.zeros(2, dtype=torch.float64, device=values.device)
        log1p_sum(sums, values, 1 / damping)
        return float(sums[0]) + (values.numel() + others) * math.log(damping), 0
    positive = values[values > 0]
    return float(positive.log().sum()), values.numel() + others - positive.numel()


def regular(method: str, name: str, damped: Tensor, what: str = "eigenvalues") -> Tensor:
    """The eigenvalues of ``F + damping I`` for the parameter ``name``. Errors: ValueError if one is zero."""
    if zeros := int((damped == 0).sum()):
        raise ValueError(f"{method}: F + damping I must be regular, got {zeros} zero {what} in {name!r}; pass damping > 0")
    return damped


def singular(zeros: int, of: int, what: str = "eigenvalues") -> float:
    """-inf, said to the caller of a Fisher's ``logdet``."""
    warn(f"logdet: {zeros} of {of} {what} of F + damping I are zero: -inf; pass damping > 0")
    return -math.inf
