# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of ``gram_``: ``acc[i,j] += scale * sum_m w_m x[m,i] x[m,j]`` for ``j >= i``.

A GEMM of x with itself, of which only the tiles on and above the diagonal are computed: programs are numbered along the
columns of the triangle. Where those are few, rows are split into shares that add to a workspace, folded in a fixed
order. The column of ones that a bias needs is a sum over the rows of x: programs on the diagonal take it along. With
weights, one operand is multiplied by them in float32, and so both are float32. The contract is in ``fisherfast.ops.gram``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import add_to, architecture, long, power_of_two, raise_flag_, wide
from ._products import PRODUCT_PROGRAMS, dot, fold_size, precision


def why_not(acc: Tensor, x: Tensor, scale: float = 1.0, **_: Any) -> str | None:
    """Why this call cannot run under Triton, or None."""
    if x.shape[:-1].numel() >= 2**31:
        return f"the Triton kernel counts rows in 32 bits, got {x.shape[:-1].numel()}; split the batch"
    return None


def config(I: int, M: int, dtype: torch.dtype, arch: int) -> tuple[dict[str, int], tuple[int, int]]:
    """Tile sizes for ``[I, I]`` and a GEMM over M rows; programs for the tiles, times shares of the rows. A pure function."""
    BLOCK = power_of_two(I, 16, 128 if dtype.itemsize == 2 else 64)
    BLOCK_M = power_of_two(M, 16, 64 if dtype.itemsize == 2 else 32)
    # Half as wide as high where a square leaves no registers for addresses: without warpgroup instructions operands pass through
    # them.
    ACROSS = 2 if BLOCK >= (128 if arch // 10 in (9, 10) else 64) else 1
    side = triton.cdiv(max(I, 1), BLOCK)
    programs = ACROSS * side * (side + 1) // 2
    shares = max(1, min(PRODUCT_PROGRAMS // programs, triton.cdiv(M, 4 * BLOCK_M)))
    num_warps = 8 if BLOCK * BLOCK // ACROSS >= 64 * 64 else 4
    return {"BLOCK": BLOCK, "ACROSS": ACROSS, "BLOCK_M": BLOCK_M, "num_warps": num_warps, "num_stages": 3}, (programs, shares)


@triton.jit
def _load_rows(x, column, m, T, strides, inside):
    """``x[m, column]``; the rows of sample n are ``n T`` to ``(n + 1) T``."""
    return tl.load(x + long(m // T) * strides[0] + long(m % T) * strides[1] + column * strides[2], mask=inside, other=0.0)


@triton.jit
def _products(
    x, weight, T, I, strides, i, j, begin, end, SUMS: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """``sum_m w_m x[m,i] x[m,j]``, and with SUMS ``sum_m w_m x[m,i]`` and ``sum_m w_m``, over rows ``begin`` to ``end``."""
    dtype = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    products = tl.zeros([i.shape[0], j.shape[0]], dtype)
    sums = tl.zeros([i.shape[0]], dtype)
    count = tl.zeros([BLOCK_M], dtype)
    for start in range(begin, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = m < end
        left = _load_rows(x, i[:, None], m[None, :], T, strides, (i < I)[:, None] & inside[None, :])  # [BLOCK, BLOCK_M]
        right = _load_rows(x, j[None, :], m[:, None], T, strides, (j < I)[None, :] & inside[:, None])
        w = inside.to(dtype)
        if weight is not None:
            w = tl.load(weight + m, mask=inside, other=0.0).to(dtype)
            left = wide(left) * w[None, :]
            right = wide(right)
            if dtype == tl.float32:  # is multiplied in parts, and that of a number near the largest is infinite
                right = tl.where((w != 0)[:, None], right, 0.0)
        products = dot(left, right, products, PRECISION)
        if SUMS:
            sums += tl.sum(wide(left), 1)
            count += w
    return products, sums, tl.sum(count)


@triton.jit(do_not_specialize=["begin", "share"])
def _gram_kernel(
    acc,
    x,
    weight,
    flag,
    shape,
    strides,
    begin,
    share,
    scale: tl.float64,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACROSS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Share s adds to ``acc[s]`` [D, D] the products of rows ``begin + s share`` to ``begin + (s + 1) share``, upper triangle.

    Tile:  [BLOCK, BLOCK / ACROSS] of [I, I] a program, BLOCK_M rows a step.
    FLOPs: M I^2, and a tile's for every BLOCK columns. Bytes: x read I / BLOCK times, mostly from L2; acc read and
           written once a launch.
    """
    if flag is not None:
        if tl.load(flag) != 0:
            return
    M, T, I, D = shape
    tile, part = tl.program_id(0) // ACROSS, tl.program_id(0) % ACROSS
    # Tile number b (b + 1) / 2 + a lies in row a and column b: the root gives b up to its rounding.
    b = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    b = tl.where(b * (b + 1) // 2 > tile, b - 1, b)
    b = tl.where((b + 1) * (b + 2) // 2 <= tile, b + 1, b)
    a = tile - b * (b + 1) // 2
    row, column = long(a) * BLOCK, long(b) * BLOCK + part * (BLOCK // ACROSS)
    down, across = tl.arange(0, BLOCK), tl.arange(0, BLOCK // ACROSS)
    i, j = row + down, column + across
    first = begin + tl.program_id(1) * share
    end = tl.minimum(first + share, M)
    out = acc + long(tl.program_id(1)) * D * D
    if BIAS and a == b and part == 0:
        products, sums, count = _products(x, weight, T, I, strides, i, j, first, end, True, BLOCK_M, PRECISION)
        add_to(out, i * D + I, sums, scale, i < I)
        if a == 0:
            last = out + long(D) * D - 1
            tl.store(last, tl.load(last) + count.to(out.dtype.element_ty) * scale)
    else:
        products, sums, count = _products(x, weight, T, I, strides, i, j, first, end, False, BLOCK_M, PRECISION)
    # Within a tile 32 bits are enough for an index; 64 for each element would not fit in the registers.
    inside = (down[:, None] <= across[None, :] + (column - row).to(tl.int32)) & (across < (I - column).to(tl.int32))[None, :]
    add_to(out + row * D + column, down[:, None] * D + across[None, :], products, scale, inside)


@triton.jit
def _fold_upper_kernel(acc, partial, flag, S, D, scale: tl.float64, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """``acc[i,j] += scale * sum_s partial[s,i,j]`` for ``j >= i``. One program: [BLOCK_I, BLOCK_J], all shares."""
    if flag is not None:
        if tl.load(flag) != 0:
            return
    if tl.program_id(0) * BLOCK_I >= (tl.program_id(1) + 1) * BLOCK_J:  # all of it is below the diagonal
        return
    i = (long(tl.program_id(0)) * BLOCK_I + tl.arange(0, BLOCK_I))[:, None]
    j = (long(tl.program_id(1)) * BLOCK_J + tl.arange(0, BLOCK_J))[None, :]
    inside = (j >= i) & (j < D)
    values = tl.zeros([BLOCK_I, BLOCK_J], tl.float64)
    for s in range(S):
        values += tl.load(partial + (long(s) * D + i) * D + j, mask=inside, other=0.0)
    add_to(acc, i * D + j, values, scale, inside)


def gram_(
    acc: Tensor,
    x: Tensor,
    scale: float = 1.0,
    *,
    weight: Tensor | None = None,
    bias: bool = False,
    flag: Tensor | None = None,
) -> None:
    """Launch over the upper tiles and shares of the rows; fold the shares, if there are several."""
    D = acc.shape[0]
    with torch.cuda.device_of(acc):
        raise_flag_(flag, x, weight)
        x = _samples(x)
        N, T, I = x.shape
        M = N * T
        if M == 0 or D == 0:
            return
        dtype = x.dtype if weight is None else torch.promote_types(x.dtype, torch.float32)
        blocks, grid = config(I, M, dtype, architecture(acc.device))
        shares = grid[1]
        steps = triton.cdiv(M, blocks["BLOCK_M"])
        share = min(fold_size(steps), triton.cdiv(steps, shares)) * blocks["BLOCK_M"]
        out, factor = acc, scale
        if shares > 1:
            out, factor = acc.new_zeros(shares, D, D, dtype=torch.promote_types(dtype, torch.float32)), 1.0
        options = {"BIAS": bias, "PRECISION": precision(dtype), **blocks}
        for begin in range(0, M, share * shares):
            _gram_kernel[grid](out, x, weight, flag, (M, T, I, D), x.stride(), begin, share, factor, **options)
        if shares > 1:
            BLOCK_I, BLOCK_J = power_of_two(D, 1, 8), power_of_two(D, 1, 64)
            cells = (triton.cdiv(D, BLOCK_I), triton.cdiv(D, BLOCK_J))
            _fold_upper_kernel[cells](acc, out, flag, shares, D, scale, BLOCK_I, BLOCK_J)


def _samples(x: Tensor) -> Tensor:
    """``[N, T, I]`` with T = 1 where the step from row to row is the same everywhere: no division in the kernel."""
    if x.dim() == 2:
        return x.unsqueeze(1)
    N, T, I = x.shape
    even = N <= 1 or T == 1 or x.stride(0) == T * x.stride(1)
    return x.as_strided((N * T, 1, I), (x.stride(0) if T == 1 else x.stride(1), 0, x.stride(2))) if even else x
