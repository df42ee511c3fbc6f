# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of ``scale_sq_``: ``acc[d] += scale * sum_n w_n (sum_t g[n,t,d] x[n,t,d])^2``; without x, x = 1.

Bound by memory: every value is read once. A program walks the samples of its share with a tile of samples, positions and
columns, so that many short samples and few long ones both fill it. The contract is in ``fisherfast.ops.scale_sq``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    PROGRAMS,
    check_offsets,
    fold_,
    is_raised,
    long,
    power_of_two,
    raise_flag_,
    rows_and_strides,
    sample_rows,
    wide,
    zero_sums,
)


def config(N: int, T: int, D: int, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Tile sizes for N samples of T rows of D columns, and in how many shares to split the samples; a pure function."""
    largest = power_of_two(D, 16, 64 if dtype == torch.float64 else 128)
    rows = 32 if dtype.itemsize == 2 else 16  # of which several steps are on their way at a time
    BLOCK_T = power_of_two(T, 1, rows)
    BLOCK_N = power_of_two(N, 1, rows // BLOCK_T)
    steps = triton.cdiv(N, BLOCK_N)
    # Narrow tiles where there are few samples to share: lines of 128 bytes are still whole.
    narrow = next((size for size in (128, 64) if triton.cdiv(D, size) * steps >= PROGRAMS // 2), 64)
    BLOCK_D = min(largest, narrow)
    wanted = triton.cdiv(PROGRAMS, triton.cdiv(D, BLOCK_D))
    # At most 32 steps a share: bounds the rounding of a long float32 sum.
    shares = min(steps, max(wanted, triton.cdiv(steps, 32)))
    return {"BLOCK_N": BLOCK_N, "BLOCK_T": BLOCK_T, "BLOCK_D": BLOCK_D}, shares


@triton.jit
def _sample_gradients(x, g, offsets, n, N, T, d, D, x_strides, g_strides, BLOCK_T: tl.constexpr):
    """``sum_t g x`` [BLOCK_N, BLOCK_D] of samples n and columns d, both 64-bit; and 0, NaN where an input is not finite."""
    first, rows = sample_rows(offsets, tl.minimum(n, N - 1), T)
    rows = tl.where(n < N, rows, 0)
    products = zero_sums([n.shape[0], BLOCK_T, d.shape[0]], g)
    check = products
    for start in tl.range(0, tl.max(rows, 0), BLOCK_T, num_stages=4):
        t = long(start) + tl.arange(0, BLOCK_T)
        inside = (t[None, :] < rows[:, None])[:, :, None] & (d < D)[None, None, :]
        row = first[:, None] + t[None, :]
        g_at = (n[:, None] * g_strides[0] + row * g_strides[1])[:, :, None] + (d * g_strides[2])[None, None, :]
        values = wide(tl.load(g + g_at, mask=inside, other=0.0))
        check += values * 0.0
        if x is not None:
            x_at = (n[:, None] * x_strides[0] + row * x_strides[1])[:, :, None] + (d * x_strides[2])[None, None, :]
            factors = wide(tl.load(x + x_at, mask=inside, other=0.0))
            check += factors * 0.0
            values *= factors
        products += values
    return tl.sum(products, 1), tl.sum(check, 1)


@triton.jit
def _scale_sq_kernel(
    squares_out,
    sums_out,
    norms_out,
    x,
    g,
    weight,
    offsets,
    flag,
    shape,
    x_strides,
    g_strides,
    share,
    columns,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``squares_out[s, d] = sum_n w_n c^2``, ``sums_out[s, d] = sum_n w_n c``, ``norms_out[block of d, n] = sum_d c^2``.

    Tile:  program ``s * columns + b`` has block b of the columns and samples ``s * share ... (s + 1) * share``; c = sum_t g x.
    FLOPs: 2 N T D. Bytes: g and x once, which also finds values that are not finite; workspaces 4 S D and 4 N D / BLOCK_D.
    """
    if is_raised(flag):
        return
    N, T, D = shape
    block, part = tl.program_id(0) % columns, tl.program_id(0) // columns
    d = long(block) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = part * share
    squares = tl.zeros([BLOCK_N, BLOCK_D], squares_out.dtype.element_ty)
    sums = squares
    for step in range(begin, tl.minimum(begin + share, N), BLOCK_N):
        n = long(step) + tl.arange(0, BLOCK_N)
        c, check = _sample_gradients(x, g, offsets, n, N, T, d, D, x_strides, g_strides, BLOCK_T)
        if norms_out is not None:
            tl.store(norms_out + long(block) * N + n, tl.sum(c * c, 1), mask=n < N)
        weighted = c
        if weight is not None:
            w = tl.load(weight + n, mask=n < N, other=0.0)[:, None]
            check += w * 0.0
            weighted = c * w
        if flag is not None:
            # Every program that stores writes the same 1. The sums stay in the workspace: the fold reads the flag.
            tl.store(flag, 1, mask=tl.sum(tl.sum(check, 1), 0) != 0.0)
        squares += weighted * c
        if sums_out is not None:
            sums += weighted
    at = long(part) * D + d
    tl.store(squares_out + at, tl.sum(squares, 0), mask=d < D)
    if sums_out is not None:
        tl.store(sums_out + at, tl.sum(sums, 0), mask=d < D)


def scale_sq_(
    acc: Tensor,
    x: Tensor | None,
    g: Tensor,
    scale: float = 1.0,
    *,
    weight: Tensor | None = None,
    offsets: Tensor | None = None,
    total: Tensor | None = None,
    sqnorm: Tensor | None = None,
    flag: Tensor | None = None,
) -> None:
    """Launch the kernel over columns and shares of the samples, then add the shares."""
    D = acc.shape[0]
    N, T = g.shape[:2] if offsets is None else (len(offsets) - 1, triton.cdiv(len(g), max(len(offsets) - 1, 1)))
    with torch.cuda.device_of(acc):
        check_offsets(offsets, len(g))
        if 0 in (N, T, D):
            raise_flag_(flag, weight)
            return
        blocks, shares = config(N, T, D, g.dtype)
        share = triton.cdiv(N, shares * blocks["BLOCK_N"]) * blocks["BLOCK_N"]
        shares, columns = triton.cdiv(N, share), triton.cdiv(D, blocks["BLOCK_D"])

        def workspace(rows: int, size: int) -> Tensor:
            return torch.empty(rows, size, device=acc.device, dtype=torch.promote_types(g.dtype, torch.float32))

        squares = workspace(shares, D)
        sums = None if total is None else workspace(shares, D)
        norms = None if sqnorm is None else workspace(columns, N)
        x_strides = (0, 0, 0) if x is None else rows_and_strides(x, offsets)
        sizes = ((N, T, D), x_strides, rows_and_strides(g, offsets), share, columns)
        _scale_sq_kernel[(columns * shares,)](squares, sums, norms, x, g, weight, offsets, flag, *sizes, **blocks)
        fold_(acc, squares, scale, flag)
        fold_(total, sums, 1.0, flag)
        fold_(sqnorm, norms, 1.0, flag)
