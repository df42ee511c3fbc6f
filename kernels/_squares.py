# SPDX-License-Identifier: Apache-2.0
"""A tile of the squares of sample gradients: the steps of a share's samples, and what a gradient adds once it is complete."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import long, sample_rows


def tiles_held(acc: Tensor, total: Tensor | None) -> int:
    """Tiles in registers: the sample's (or the squared operands), the squares, and what the other outputs add."""
    return 2 + (total is not None) + (acc.dtype == torch.float64)


@triton.jit
def steps_of(offsets, begin, end, T, BLOCK_T: tl.constexpr):
    """How many steps of BLOCK_T rows samples ``begin`` to ``end`` take; one without rows takes one, too."""
    if offsets is None:
        return (end - begin) * tl.cdiv(T, BLOCK_T)
    else:
        steps = tl.zeros([128], tl.int32)
        for start in range(begin, end, 128):
            n = start + tl.arange(0, 128)
            _, rows = sample_rows(offsets, tl.minimum(n, end - 1), T)
            steps += tl.where(n < end, tl.maximum(tl.cdiv(rows, BLOCK_T), 1), 0).to(tl.int32)
        return tl.sum(steps, 0)


@triton.jit
def add_sample(squares, sums, c, n, N, weight, total, norms):
    """``squares + w_n c^2``, ``sums + w_n c`` where there is a total, ``norms[tile, n] = sum c^2``; c is sample n's gradient."""
    if norms is not None:
        tl.store(norms + long(tl.program_id(0)) * N + n, tl.sum(c * c))
    w = 1.0
    if weight is not None:
        w = tl.load(weight + n)
    squares += c * c * w
    if total is not None:
        sums += c * w
    return squares, sums
