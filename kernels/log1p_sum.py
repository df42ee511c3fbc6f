# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of ``log1p_sum``: ``acc += (sum_j log(1 + c f_j), sum_j g(c f_j))``, ``g(s) = log(1 + s) - s / (1 + s)``.

Each value is read once; every program hands over two sums, which are added in a fixed order. The contract is in
``fisherfast.ops.log1p_sum``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import PROGRAMS, fold_, long
from ._log1p import BLOCK, log1p_terms, store_sums


@triton.jit
def _log1p_sum_kernel(partial, f, size, share, c: tl.float64, BLOCK: tl.constexpr):
    """``partial[p]`` = the two sums over values ``p * share ... (p + 1) * share``.

    Tile:  BLOCK values at a time, ``share`` a multiple of it. FLOPs: some 30 a value and a division. Bytes: f once.
    """
    start = long(tl.program_id(0)) * share + tl.arange(0, BLOCK)
    logs = tl.zeros([BLOCK], tl.float64)
    costs = logs
    exponents = tl.zeros([BLOCK], tl.int64)
    for step in range(0, share, BLOCK):
        j = start + step
        s = tl.load(f + j, mask=j < size, other=0.0).to(tl.float64) * c
        log, cost, exponent = log1p_terms(s)
        logs += log
        costs += cost
        exponents += exponent
    store_sums(partial, tl.program_id(0), logs, costs, exponents, share // BLOCK)


def log1p_sum(acc: Tensor, f: Tensor, c: float = 1.0) -> None:
    """Launch the kernel over shares of the values, in the order of memory, then add the shares."""
    if f.numel() == 0:
        return
    with torch.cuda.device_of(acc):
        # A copy only where the values lie with gaps, however the axes are ordered.
        values = f.permute(sorted(range(f.dim()), key=f.stride, reverse=True)).contiguous().view(-1)
        share = triton.cdiv(len(values), PROGRAMS * BLOCK) * BLOCK
        partial = torch.empty(triton.cdiv(len(values), share), 2, device=acc.device, dtype=torch.float64)
        _log1p_sum_kernel[(len(partial),)](partial, values, len(values), share, c, BLOCK)
        fold_(acc, partial, 1.0, None)
