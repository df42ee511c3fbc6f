# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of ``gram_``: ``acc[i,j] += scale * sum_m w_m x[m,i] x[m,j]`` for ``j >= i``.

A GEMM of x with itself, of which only the tiles on and above the diagonal are computed: programs are numbered along the
columns of the triangle. Where those are few, rows are split into shares that add to a workspace, folded in a fixed
order. The column of ones that a bias needs is a sum over the rows of x: programs on the diagonal take it along. With
weights, one operand is multiplied by them in float32, and so both are float32. The contract is in ``fisherfast.ops.gram``.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._autotune import Choice, best
from ._common import add_to, architecture, has_warpgroups, is_raised, long, power_of_two, raise_flag_, wide, zero_sums
from ._products import PRODUCT_PROGRAMS, all_chains, dot, end_chain, fold_size, precision, product_seconds


def why_not(acc: Tensor, x: Tensor, scale: float = 1.0, **_: Any) -> str | None:
    """Why this call cannot run under Triton, or None."""
    if x.shape[:-1].numel() >= 2**30:  # where the last share would end may be twice as far
        return (
            f"the Triton kernel counts rows in 32 bits: they must be fewer than 2^30, got {x.shape[:-1].numel()}; split the batch"
        )
    return None


class Inputs(NamedTuple):
    """One call: x is ``[N, T, I]``, as ``_samples`` gives it; products are computed in ``dtype``."""

    x: Tensor
    scale: float
    weight: Tensor | None
    bias: bool
    flag: Tensor | None
    dtype: torch.dtype


WORKSPACE = 2**26  # bytes


@functools.lru_cache(maxsize=4096)
def candidates(I: int, M: int, even: bool, dtype: torch.dtype, arch: int) -> list[Choice]:
    """Tile sizes for ``[I, I]`` and a GEMM over M rows, and in how many shares to split the rows, the likeliest best first.

    Rows are ``even`` where the step from one to the next is the same everywhere. A pure function. (Tiles below 64, where I
    is larger, do not pay: twice the bytes, and float64's spill.)
    """
    largest = power_of_two(I, 16, 128 if dtype.itemsize == 2 else 64)
    return [_candidate(BLOCK, I, M, even, dtype, arch) for BLOCK in (largest, largest // 2) if BLOCK in (largest, 64)]


def _candidate(BLOCK: int, I: int, M: int, even: bool, dtype: torch.dtype, arch: int) -> Choice:
    # Uneven rows have an address for each element, in registers.
    BLOCK_M = power_of_two(M, 16, (64 if dtype.itemsize == 2 else 32) // (1 if even else 2))
    # Half as wide as high where the operands pass through registers.
    ACROSS = 1 if has_warpgroups(arch) else 2 if BLOCK >= 64 else 1
    num_warps = 8 if BLOCK * BLOCK // ACROSS >= 64 * 64 else 4
    blocks = {"BLOCK": BLOCK, "ACROSS": ACROSS, "BLOCK_M": BLOCK_M, "num_warps": num_warps, "num_stages": 3}
    if dtype == torch.float32 and num_warps == 8 and arch // 10 == 9:
        blocks["maxnreg"] = 128  # else a few more with weights, and a multiprocessor holds one program instead of two
    tiles = programs(I, blocks)

    def seconds(shares: int) -> float:
        workspace = shares * I * I // 2 * max(dtype.itemsize, 4) if shares > 1 else 0
        return product_seconds(tiles * shares, triton.cdiv(M, shares), BLOCK, BLOCK // ACROSS, dtype, workspace)

    most = min(PRODUCT_PROGRAMS, triton.cdiv(M, 4 * BLOCK_M), max(1, WORKSPACE // (4 * max(I, 1) ** 2)))
    return blocks, min(range(1, most + 1), key=seconds)


def programs(I: int, blocks: dict[str, int]) -> int:
    """Programs for the tiles on and above the diagonal of ``[I, I]``."""
    side = triton.cdiv(max(I, 1), blocks["BLOCK"])
    return blocks["ACROSS"] * side * (side + 1) // 2


@triton.jit
def _load_rows(x, column, m, T, strides, inside):
    """``x[m, column]``; the rows of sample n are ``n T`` to ``(n + 1) T``."""
    return tl.load(x + long(m // T) * strides[0] + long(m % T) * strides[1] + column * strides[2], mask=inside, other=0.0)


@triton.jit
def _products(
    x, weight, T, I, strides, i, j, begin, end, chain, SUMS: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """``sum_m w_m x[m,i] x[m,j]``, and with SUMS ``sum_m w_m x[m,i]`` and ``sum_m w_m``, over rows ``begin`` to ``end``."""
    zero = zero_sums([i.shape[0], j.shape[0]], x)
    dtype = zero.dtype
    products = zero
    total = zero
    steps = 0
    sums = tl.zeros([i.shape[0]], dtype)
    count = tl.zeros([BLOCK_M], dtype)
    all_sums = sums
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
        steps += 1
        total, products = end_chain(total, products, steps, chain)
        if SUMS:
            if weight is None and x.dtype.element_ty.primitive_bitwidth == 16:
                # Read once more, in another shape. Of rows that a warpgroup's product reads from shared memory and a sum from
                # registers Triton keeps a buffer too few, and overwrites one while the product before still reads it.
                again = _load_rows(x, i[None, :], m[:, None], T, strides, (i < I)[None, :] & inside[:, None])
                sums += tl.sum(wide(again), 0)
            else:
                sums += tl.sum(wide(left), 1)
            count += w
            all_sums, sums = end_chain(all_sums, sums, steps, chain)
    return all_chains(total, products), all_chains(all_sums, sums), tl.sum(count)


@triton.jit(do_not_specialize=["share", "chain"])
def _gram_kernel(
    acc,
    x,
    weight,
    flag,
    shape,
    strides,
    share,
    chain,
    scale: tl.float64,
    BIAS: tl.constexpr,
    KNOWN: tl.constexpr,
    BLOCK: tl.constexpr,
    ACROSS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Share s adds to ``acc[s]`` [D, D] the products of rows ``s share`` to ``(s + 1) share``, upper triangle.

    ``chain`` steps are added up in registers, then added to the chains before, in registers, too. Where the contents
    of acc are not KNOWN they count as 0.

    Tile:  [BLOCK, BLOCK / ACROSS] of [I, I] a program, BLOCK_M rows a step; with both sums 128 x 128 in 8 warps is 2 x 64 of
           a thread's 255 registers.
    FLOPs: M I^2, and a tile's for every BLOCK columns. Bytes: x read I / BLOCK times, mostly from L2; acc read and
           written once.
    """
    if is_raised(flag):
        return
    M, T, I, D = shape
    tile, part = tl.program_id(0) // ACROSS, tl.program_id(0) % ACROSS
    # Tile number b (b + 1) / 2 + a lies in row a and column b: the root gives b up to its rounding.
    b = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    b = tl.where(b * (b + 1) // 2 > tile, b - 1, b)
    b = tl.where((b + 1) * (b + 2) // 2 <= tile, b + 1, b)
    a = tile - b * (b + 1) // 2
    row, column = long(a) * BLOCK, long(b) * BLOCK + part * (BLOCK // ACROSS)
    i, j = row + tl.arange(0, BLOCK), column + tl.arange(0, BLOCK // ACROSS)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, M)
    out = acc + long(tl.program_id(1)) * D * D
    if BIAS and a == b and part == 0:
        products, sums, count = _products(x, weight, T, I, strides, i, j, begin, end, chain, True, BLOCK_M, PRECISION)
        add_to(out, i * D + I, sums, scale, i < I, KNOWN)
        if a == 0:
            add_to(out, long(D) * D - 1, count, scale, True, KNOWN)
    else:
        products, sums, count = _products(x, weight, T, I, strides, i, j, begin, end, chain, False, BLOCK_M, PRECISION)
    if BLOCK // ACROSS > 64:  # in quarters: beside all of its products what is there before does not fit in the registers
        QUARTER: tl.constexpr = BLOCK // ACROSS // 4
        left, right = _halves(products)
        for half in tl.static_range(2):
            first, second = _halves(left if half == 0 else right)
            _add_upper(out, first, row, column + 2 * half * QUARTER, I, D, scale, KNOWN)
            _add_upper(out, second, row, column + (2 * half + 1) * QUARTER, I, D, scale, KNOWN)
    else:
        _add_upper(out, products, row, column, I, D, scale, KNOWN)


@triton.jit
def _halves(tile):
    """Columns of a tile: the first half and the second."""
    rows: tl.constexpr = tile.shape[0]
    half: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, half)), (0, 2, 1)))


@triton.jit
def _add_upper(out, products, row, column, I, D, scale, known):
    """``out[row + a, column + b] += scale * products[a, b]`` on and above the diagonal, as ``add_to``."""
    down, across = tl.arange(0, products.shape[0])[:, None], tl.arange(0, products.shape[1])[None, :]
    # Within a tile 32 bits are enough for an index; 64 for each element would not fit in the registers.
    inside = (down <= across + (column - row).to(tl.int32)) & (across < (I - column).to(tl.int32))
    add_to(out + row * D + column, down * D + across, products, scale, inside, known)


@triton.jit
def _fold_upper_kernel(
    acc, partial, flag, S, D, scale: tl.float64, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_S: tl.constexpr
):
    """``acc[i,j] += scale * sum_s partial[s,i,j]`` for ``j >= i``. One program: [BLOCK_I, BLOCK_J], all shares, BLOCK_S a step."""
    if is_raised(flag):
        return
    if tl.program_id(0) * BLOCK_I >= (tl.program_id(1) + 1) * BLOCK_J:  # all of it is below the diagonal
        return
    cell = tl.arange(0, BLOCK_I * BLOCK_J)
    i = long(tl.program_id(0)) * BLOCK_I + cell // BLOCK_J
    j = long(tl.program_id(1)) * BLOCK_J + cell % BLOCK_J
    inside = (j >= i) & (j < D)
    values = tl.zeros([BLOCK_S, BLOCK_I * BLOCK_J], tl.float64)
    for start in range(0, S, BLOCK_S):
        s = long(start) + tl.arange(0, BLOCK_S)
        index = (s * D * D)[:, None] + (i * D + j)[None, :]
        values += tl.load(partial + index, mask=(s < S)[:, None] & inside[None, :], other=0.0)
    add_to(acc, i * D + j, tl.sum(values, 0), scale, inside)


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
        inputs = Inputs(x, scale, weight, bias, flag, dtype)

        def trial(choice: Choice) -> None:
            _launch(torch.zeros_like(acc), inputs, choice)

        choices = candidates(I, M, T == 1, dtype, architecture(acc.device))
        choice = best("gram_", (M, T, I, D, dtype, weight is not None, precision(dtype)), choices, trial, acc.device)
        _launch(acc, inputs, choice)


def _launch(acc: Tensor, inputs: Inputs, choice: Choice) -> None:
    x, scale, weight, bias, flag, dtype = inputs
    blocks, shares = choice
    (N, T, I), D = x.shape, acc.shape[0]
    M = N * T
    steps = triton.cdiv(M, blocks["BLOCK_M"])
    share = triton.cdiv(steps, shares)
    out, factor = acc, scale
    if shares > 1:
        out, factor = acc.new_empty(shares, D, D, dtype=torch.promote_types(dtype, torch.float32)), 1.0
    options = {"BIAS": bias, "KNOWN": shares == 1, "PRECISION": precision(dtype), **blocks}
    rows = share * blocks["BLOCK_M"]
    _gram_kernel[(programs(I, blocks), shares)](
        out, x, weight, flag, (M, T, I, D), x.stride(), rows, fold_size(share), factor, **options
    )
    if shares > 1:
        BLOCK_I, BLOCK_J = power_of_two(D // 64, 1, 8), power_of_two(D, 1, 64)
        BLOCK_S = power_of_two(shares, 1, min(16, 2048 // (BLOCK_I * BLOCK_J)))  # each step is waited for
        cells = (triton.cdiv(D, BLOCK_I), triton.cdiv(D, BLOCK_J))
        _fold_upper_kernel[cells](acc, out, flag, shares, D, scale, BLOCK_I, BLOCK_J, BLOCK_S)


def _samples(x: Tensor) -> Tensor:
    """``[N, T, I]`` with T = 1 where the step from row to row is the same everywhere: no division in the kernel."""
    if x.dim() == 2:
        return x.unsqueeze(1)
    N, T, I = x.shape
    even = N <= 1 or T == 1 or x.stride(0) == T * x.stride(1)
    return x.as_strided((N * T, 1, I), (x.stride(0) if T == 1 else x.stride(1), 0, x.stride(2))) if even else x
