# SPDX-License-Identifier: Apache-2.0
"""The precision of everything that is squared or summed: that of the model, but never below float32."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for float16 and bfloat16; every other dtype is returned as it is."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def wide(tensor: Tensor) -> Tensor:
    """The tensor in its ``wide_dtype``; not copied if it is that already."""
    return tensor.to(wide_dtype(tensor.dtype))


def dtype_name(dtype: torch.dtype) -> str:
    """Such as ``"float32"``: what files hold."""
    return str(dtype).removeprefix("torch.")


def noise_of_rows(dtype: torch.dtype) -> float:
    """What the rounding of rows to ``dtype`` makes of an eigenvalue of their moments that is zero, relative to the largest.

    Of errors that are even over the last place it is a fiftieth of eps^2 at most: entries of a row have errors of their own. A
    quarter leaves room for rows that were rounded several times on their way.
    """
    return torch.finfo(dtype).eps ** 2 / 4
