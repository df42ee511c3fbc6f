# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of ``kron_log1p_sum``: ``acc += (sum_ij log(1 + c a_i b_j), sum_ij g(c a_i b_j))``, g as in ``log1p_sum``.

The products stay in registers; every program hands over two sums, which are added in a fixed order. The contract is in
``fisherfast.ops.kron_log1p_sum``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import PROGRAMS, fold_, long
from ._log1p import BLOCK, log1p_terms, store_sums


@triton.jit
def _kron_log1p_sum_kernel(partial, a, b, shape, strides, share, c: tl.float64, BLOCK: tl.constexpr):
    """``partial[p, q]`` = the two sums over rows ``p * share ... (p + 1) * share`` of a and block q of b.

    Tile:  BLOCK columns, walked row by row. FLOPs: some 30 a product and a division. Bytes: a tile's a and b.
    """
    rows, columns = shape
    column = long(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(b + column * strides[1], mask=column < columns, other=0.0).to(tl.float64)
    logs = tl.zeros([BLOCK], tl.float64)
    costs = logs
    exponents = tl.zeros([BLOCK], tl.int64)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, rows)
    for row in range(begin, end):
        factor = tl.load(a + long(row) * strides[0]).to(tl.float64) * c
        log, cost, exponent = log1p_terms(factor * values)
        logs += log
        costs += cost
        exponents += exponent
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    store_sums(partial, program, logs, costs, exponents, end - begin)


def kron_log1p_sum(acc: Tensor, a: Tensor, b: Tensor, c: float = 1.0) -> None:
    """Launch the kernel over shares of the shorter factor and blocks of the longer one, then add the results."""
    if a.numel() == 0 or b.numel() == 0:
        return
    if len(a) > len(b):
        a, b = b, a
    with torch.cuda.device_of(acc):
        blocks = triton.cdiv(len(b), BLOCK)
        share = triton.cdiv(len(a) * blocks, PROGRAMS)
        grid = (blocks, triton.cdiv(len(a), share))  # the shares second: a grid's second axis has 65,535 programs at most
        partial = torch.empty(grid[0] * grid[1], 2, device=acc.device, dtype=torch.float64)
        _kron_log1p_sum_kernel[grid](partial, a, b, (len(a), len(b)), (a.stride(0), b.stride(0)), share, c, BLOCK)
        fold_(acc, partial, 1.0, None)
