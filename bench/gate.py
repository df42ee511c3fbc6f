# SPDX-License-Identifier: Apache-2.0
"""The gate that a result passes before its time counts, the same in tests, benchmarks and GPU checks; and why there is no result."""

from __future__ import annotations

import torch
from torch import Tensor


def error(result: Tensor, oracle: Tensor) -> float:
    """``max|result - oracle| / max|oracle|``, in float64."""
    return float((result.double() - oracle).abs().max() / oracle.abs().max())


def passes(measured: float, plain: float) -> bool:
    """The numerical gate of the whole project: at most twice the error of plain torch in float32."""
    return measured <= 2 * plain + 1e-7


def right(measured: float, plain: float) -> bool:
    """Whether a peer computed the quantity asked for: float32 sums in another order are not another quantity."""
    return measured <= max(2 * plain, 1e-5)


def reason(raised: Exception) -> str:
    """Why there is no number, in one line."""
    text = (str(raised).splitlines() or [""])[0][:200]
    if isinstance(raised, (torch.OutOfMemoryError, MemoryError)):
        return f"out of memory: {text}"
    return f"raises {type(raised).__name__}: {text}"
