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


def wide_name(dtype: torch.dtype) -> str:
    """The name of ``wide_dtype``, such as ``"float32"``: what files hold."""
    return str(wide_dtype(dtype)).removeprefix("torch.")
