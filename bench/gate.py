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


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` as plain torch has it: the yardstick. Of 16-bit matrices, or batches of them, in float32.

    On CUDA torch multiplies those on tensor cores, which truncate the float32 sum with every 16 rows: an error that grows with the rows
    and that no kernel on tensor cores avoids. A gate set by multiply-adds, which round to nearest, would reject all of them.
    """
    if a.dtype.itemsize > 2:
        return a @ b
    if not a.is_cuda or not a.numel():
        return a.float() @ b.float()
    return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)


def product_in(dtype: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    """``a b`` in float64, for the oracle, or in float32 as plain torch has it."""
    if dtype == torch.float32 and a.dtype.itemsize == 2:
        return product(a, b)
    return a.to(dtype) @ b.to(dtype)


def right(measured: float, plain: float) -> bool:
    """Whether a peer computed the quantity asked for: float32 sums in another order are not another quantity."""
    return measured <= max(2 * plain, 1e-5)


def reason(raised: Exception) -> str:
    """Why there is no number, in one line."""
    text = (str(raised).splitlines() or [""])[0][:200]
    if isinstance(raised, (torch.OutOfMemoryError, MemoryError)):
        return f"out of memory: {text}"
    return f"raises {type(raised).__name__}: {text}"
