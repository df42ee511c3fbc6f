# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of ``categorical_score_``: ``out[r] = counted_r (softmax(logits[r]) - e_{y_r})``, y given or drawn.

A program has whole rows to itself: it reads them once for maximum and sum, once more for the result, which it writes over
``out``. Nothing of the width of a row is kept, so a vocabulary may be of any size. The contract is in
``fisherfast.ops.categorical_score``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import long, power_of_two, wide


def config(R: int, C: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows and columns of a tile and its warps, for [R, C] logits; a pure function."""
    # As many warps as there may be walk a long row of 16 bits: a multiprocessor has registers for one such program, and 132
    # rows of 128256 (34 MB) are still in an L2 of 60 MB for the second walk; of two programs each 264 rows would not be.
    long_row = dtype.itemsize == 2 and C >= 2**14
    BLOCK_C = power_of_two(C, 16, 512 if dtype == torch.float64 else 8192 if long_row else 4096)
    BLOCK_R = power_of_two(R, 1, max(1, 256 // BLOCK_C))
    of_a_thread = 4 if BLOCK_C < 1024 else 8 if long_row else 16
    num_warps = max(1, BLOCK_R * BLOCK_C // (32 * of_a_thread))
    # One program has as much of memory on its way as two had: three steps ahead.
    return {"BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C, "STAGES": 4 if long_row else 1, "num_warps": num_warps}


@triton.jit
def _exponentials(logits, start, column, inside, stride, top):
    """``exp(logits - top)``, zero outside."""
    at = logits + start[:, None] + column[None, :] * stride
    z = wide(tl.load(at, mask=inside, other=-float("inf"), eviction_policy="evict_first"))  # for the last time
    return tl.where(inside, tl.exp(z - top[:, None]), 0.0)


@triton.jit
def _categorical_score_kernel(
    out,
    logits,
    labels,
    uniform,
    counted,
    drawn,
    shape,
    strides,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``out[r, c] = e_c / total`` but at y, where it is ``- sum_{c != y} e_c / total``; ``e_c = exp(logits[r, c] - max)``.

    Tile:  BLOCK_R rows, walked BLOCK_C columns at a time, twice: first for maximum and total, then for label and result.
    FLOPs: two exponentials a logit. Bytes: logits twice (the second time from the cache where a row fits), out once.
    """
    R, C = shape
    r = long(tl.program_id(0)) * BLOCK_R + tl.arange(0, BLOCK_R)
    present = r < R
    keep = present
    if counted is not None:
        keep = tl.load(counted + r, mask=present, other=0) != 0
    start = r * strides[0]
    columns = tl.arange(0, BLOCK_C)

    top = tl.full([BLOCK_R], -float("inf"), tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32)
    total = tl.zeros([BLOCK_R], tl.float64)
    for first in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        column = long(first) + columns
        inside = keep[:, None] & (column < C)[None, :]
        z = wide(tl.load(logits + start[:, None] + column[None, :] * strides[1], mask=inside, other=-float("inf")))
        higher = tl.maximum(top, tl.max(z, 1))
        # A row of which all is -inf so far has nothing to rescale: -inf - -inf would be NaN.
        pivot = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - pivot).to(tl.float64) + tl.sum(tl.exp(z - pivot[:, None]), 1).to(tl.float64)
        top = higher

    top, total = tl.where(keep, top, 0.0), tl.where(keep, total, 1.0)

    bound = total
    y = tl.full([BLOCK_R], -1, tl.int64)
    if labels is not None:
        y = tl.load(labels + r, mask=keep, other=-1)
    else:
        bound = tl.load(uniform + r, mask=keep, other=0.0) * total
    carry = tl.zeros([BLOCK_R], tl.float64)
    last = tl.zeros([BLOCK_R], tl.int64)  # column of a probability above zero, and its exponential
    weight = tl.zeros([BLOCK_R], tl.float64)
    others = tl.zeros([BLOCK_R], tl.float64)
    chosen = tl.zeros([BLOCK_R], tl.float64)
    scale = 1.0 / total
    for first in range(0, C, BLOCK_C):
        column = long(first) + columns
        inside = keep[:, None] & (column < C)[None, :]
        e = _exponentials(logits, start, column, inside, strides[1], top)
        if labels is None:
            searched = keep & (y < 0)
            if tl.max(searched.to(tl.int32), 0) != 0:
                # Noted now, not looked up at the end: where out is logits, they will be gone.
                at = tl.max(tl.where(e > 0, column[None, :], -1), 1)
                value = tl.sum(tl.where(column[None, :] == at[:, None], e, 0.0), 1).to(tl.float64)
                last, weight = tl.where(at >= 0, at, last), tl.where(at >= 0, value, weight)
                sums = tl.sum(e, 1).to(tl.float64)
                here = searched & (carry + sums > bound)
                if tl.max(here.to(tl.int32), 0) != 0:
                    running = tl.cumsum(e, 1).to(tl.float64)
                    beyond = (e > 0) & (carry[:, None] + running > bound[:, None])
                    found = tl.min(tl.where(beyond, column[None, :], C), 1)
                    y = tl.where(here, tl.minimum(found, at), y)
                carry += sums
        mine = column[None, :] == y[:, None]
        others += tl.sum(tl.where(mine, 0.0, e), 1).to(tl.float64)
        chosen += tl.sum(tl.where(mine, e, 0.0), 1).to(tl.float64)
        p = (e * scale.to(e.dtype)[:, None]).to(out.dtype.element_ty)
        elsewhere = present[:, None] & (column < C)[None, :] & ~mine
        tl.store(out + r[:, None] * C + column[None, :], p, mask=elsewhere, eviction_policy="evict_first")
    if labels is None:
        missed = keep & (y < 0)
        if tl.max(missed.to(tl.int32), 0) != 0:  # the bound is the total, to rounding; or the row is NaN, and its label 0
            y = tl.where(missed, tl.where(total != total, 0, last), y)
            others = tl.where(missed, others - weight, others)
            chosen = tl.where(missed, weight, chosen)
            tl.debug_barrier()  # the entry of y has been written by another thread
    # Both from this walk, not the first walk's total: the two round differently, which shows beside 1.
    at_y = (-others / tl.where(keep, others + chosen, 1.0)).to(top.dtype).to(out.dtype.element_ty)
    tl.store(out + r * C + y, at_y, mask=keep)
    if drawn is not None:
        tl.store(drawn + r, tl.where(keep, y, -1), mask=present)


def categorical_score_(
    out: Tensor,
    logits: Tensor,
    *,
    labels: Tensor | None = None,
    uniform: Tensor | None = None,
    counted: Tensor | None = None,
    drawn: Tensor | None = None,
) -> None:
    """Launch one program for every few rows."""
    R, C = logits.shape
    if R == 0 or C == 0:
        if drawn is not None:
            drawn.fill_(-1)
        return
    with torch.cuda.device_of(out):
        if labels is not None:
            fits = (labels >= 0) & (labels < C)
            torch._assert_async((fits if counted is None else fits | ~counted).all(), f"labels must lie in [0, C = {C})")
        blocks = config(R, C, logits.dtype)
        grid = (triton.cdiv(R, blocks["BLOCK_R"]),)
        _categorical_score_kernel[grid](out, logits, labels, uniform, counted, drawn, (R, C), logits.stride(), **blocks)
