# SPDX-License-Identifier: Apache-2.0
"""The precision in which things are computed: that of the model, but 16 bits become float32. No square is formed in fewer."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of float16 and bfloat16 float32; any other type is its own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def wide(tensor: Tensor) -> Tensor:
    """The tensor in that precision."""
    return tensor.to(wide_dtype(tensor.dtype))


def wide_name(dtype: torch.dtype) -> str:
    """What that precision is called, as ``"float32"``: for files."""
    return str(wide_dtype(dtype)).removeprefix("torch.")
