# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of ``conv_gram_``: ``acc[i,j] += scale * sum_n w_n sum_p u[n,p,i] u[n,p,j]`` for j >= i, u the patches of x.

An implicit GEMM over rows (n, p): a program owns a square tile on or above the diagonal of one group's Gram matrix and reads
its columns of u from x in place, zero outside. A column is (k, c) with c fastest, as in ``conv_sq``; the appended 1 is the
last one. Rows are split into shares, each with a workspace of tiles; ``_fold_upper_kernel`` adds them in acc's order (c, k),
where a pair of columns may have changed sides: the matrix is symmetric. The contract is in ``fisherfast.ops.conv_gram``.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._autotune import Choice, best
from ._common import architecture, has_warpgroups, is_raised, long, power_of_two, raise_flag_, wide, zero_sums
from ._conv import (
    Geometry,
    advance,
    as_rows,
    block,
    channels_last,
    digits,
    geometry_of,
    image_strides,
    kernel_offset,
    largest_index,
    look,
)
from ._products import PRODUCT_PROGRAMS, all_chains, dot, end_chain, fold_size, precision


def why_not(
    acc: Tensor, x: Tensor, scale: float = 1.0, *, kernel=(), positions=(), stride=(), padding=(), dilation=(), **_: Any
) -> str | None:
    """Why this call cannot run under Triton, or None."""
    geometry = geometry_of(x, kernel, positions, stride, padding, dilation)
    largest = max(largest_index(geometry), x.shape[0] * math.prod(geometry.positions))
    if largest >= 2**30:  # where the last share would end may be twice as far
        return f"positions are counted in 32 bits: 2^30 in an image, or in all of them, are too many, got {largest}"
    return None


class Inputs(NamedTuple):
    """One call; products are computed in ``dtype``."""

    x: Tensor
    scale: float
    weight: Tensor | None
    bias: bool
    flag: Tensor | None
    geometry: Geometry
    groups: int
    dtype: torch.dtype


@functools.lru_cache(maxsize=4096)
def candidates(groups: int, C: int, K: int, bias: bool, M: int, dtype: torch.dtype, arch: int) -> list[Choice]:
    """Tile sizes for each group's ``[K C + bias]^2`` and a GEMM over M rows, and in how many shares to split M.

    The likeliest best first: as large a tile as there are registers for, and the next smaller one. A pure function.
    """
    largest = 128 if dtype.itemsize == 2 and has_warpgroups(arch) else 64 if dtype.itemsize < 8 else 32
    first = _candidate(largest, groups, C, K, bias, M, dtype, arch)
    half = first[0]["BLOCK"] // 2
    return [first, _candidate(half, groups, C, K, bias, M, dtype, arch)] if half >= 32 else [first]


def _candidate(largest: int, groups: int, C: int, K: int, bias: bool, M: int, dtype: torch.dtype, arch: int) -> Choice:
    BLOCK = block(K * C + bias, largest)
    divisor = C & -C
    if K > 1 and divisor >= 32:
        BLOCK = min(BLOCK, divisor)
    one_offset = K == 1 or (C > 0 and C % BLOCK == 0)
    # Columns of several kernel offsets have an address each, in registers.
    halved = not one_offset and not (has_warpgroups(arch) and (dtype.itemsize == 2 or BLOCK <= 32))
    BLOCK_T = power_of_two(M, 16, 128 // dtype.itemsize // (2 if halved else 1))

    def programs() -> int:
        return groups * upper_tiles(triton.cdiv(K * C + bias, BLOCK))

    while BLOCK > 32 and programs() * triton.cdiv(M, BLOCK_T) < PRODUCT_PROGRAMS:
        BLOCK //= 2
    blocks = {
        "BLOCK": BLOCK,
        "BLOCK_T": BLOCK_T,
        "ONE_OFFSET": K == 1 or (C > 0 and C % BLOCK == 0),
        "num_warps": 8 if BLOCK * BLOCK * dtype.itemsize >= 2**14 or not one_offset else 4,
        "num_stages": 3,
    }
    return blocks, max(1, min(triton.cdiv(M, BLOCK_T), 4 * PRODUCT_PROGRAMS // programs()))


def upper_tiles(tiles: int) -> int:
    """Tiles on and above the diagonal of ``tiles`` x ``tiles``."""
    return tiles * (tiles + 1) // 2


@triton.jit
def _upper_tile(index, tiles):
    """Row and column of tile ``index`` of ``(tiles + 1) * cdiv(tiles, 2)``: rows r and tiles - 1 - r make up one line.

    The middle row of an odd number is its own partner, and its second half lies outside of the matrix.
    """
    line = index // (tiles + 1)
    place = index % (tiles + 1)
    first = place < tiles - line
    row = tl.where(first, line, tiles - 1 - line)
    column = tl.where(first, line + place, place - 1)
    return row, tl.where((tiles == 2 * line + 1) & (place >= tiles - line), tiles, column)


@triton.jit
def _tile_index(row, column, tiles):
    """Where the workspace holds the tile in this row and column, row <= column."""
    return row * tiles - row * (row - 1) // 2 + column - row


@triton.jit
def _columns(tile, group, shape, geometry, x_strides, BLOCK: tl.constexpr, ONE_OFFSET: tl.constexpr):
    """A tile's columns [1, BLOCK]: their index, where position 0 of image 0 reads them, and their kernel offsets."""
    _, _, _, C, _ = shape
    column = tile * BLOCK
    i = column + tl.arange(0, BLOCK)[None, :]
    k = column // C if ONE_OFFSET else i // C
    at0, at1, at2 = kernel_offset(k, geometry)
    start = long(at0) * x_strides[2] + long(at1) * x_strides[3] + long(at2) * x_strides[4]
    return i, (group * C + (i - k * C)) * x_strides[1] + start, at0, at1, at2


@triton.jit
def _patches(x, i, start, at0, at1, at2, n, p0, p1, p2, shape, geometry, x_strides, AXES: tl.constexpr, BIAS: tl.constexpr):
    """``u[(n, p), i]`` [BLOCK_T, BLOCK]; ``n`` and ``p`` are [BLOCK_T, 1]. Rows beyond the last image are zero."""
    N, _, _, _, I = shape
    offset, inside = look(p0, p1, p2, at0, at1, at2, geometry, x_strides, AXES)
    u = tl.load(x + (start + (long(n) * x_strides[0] + offset)), mask=inside & (i < I) & (n < N), other=0.0)
    if BIAS:
        u = tl.where((i == I) & (n < N), tl.full((), 1.0, tl.float32).to(u.dtype), u)
    return u


@triton.jit
def _advance_rows(n, p0, p1, p2, BLOCK_T: tl.constexpr, P, AXES: tl.constexpr):
    """The rows ``BLOCK_T`` on: the outermost coordinate carries to the image."""
    T = P[0] * P[1] * P[2]
    p0, p1, p2 = advance(p0, p1, p2, BLOCK_T % T, P, AXES)
    if AXES == 1:
        beyond = p2 >= P[2]
        p2 = tl.where(beyond, p2 - P[2], p2)
    elif AXES == 2:
        beyond = p1 >= P[1]
        p1 = tl.where(beyond, p1 - P[1], p1)
    else:
        beyond = p0 >= P[0]
        p0 = tl.where(beyond, p0 - P[0], p0)
    n += tl.where(beyond, BLOCK_T // T + 1, BLOCK_T // T)
    return n, p0, p1, p2


@triton.jit(do_not_specialize=["share", "steps", "chain"])
def _conv_gram_kernel(
    partial,
    x,
    weight,
    flag,
    shape,
    geometry,
    x_strides,
    share,
    steps,
    chain,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    AXES: tl.constexpr,
    ONE_OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``partial[s, tile] = sum_(n,p) w_n u[n,p,i] u[n,p,j]`` over the rows of share s: ``share`` steps of BLOCK_T of them.

    ``chain`` steps are added up in registers, then added to the chains before, in registers, too.

    Tile:  [BLOCK, BLOCK] of one group's Gram matrix and one share of the rows a program. With ONE_OFFSET all columns of a
           tile have the same kernel offset.
    FLOPs: N T G (K C)^2. Bytes: x read K (K C) / BLOCK times, mostly from L2; the workspace of 2 S G (K C)^2 written once.
    """
    if is_raised(flag):
        return
    N, T, G, _, I = shape
    tiles = tl.cdiv(I + BIAS, BLOCK)
    lines = (tiles + 1) * tl.cdiv(tiles, 2)
    group = long(tl.program_id(0) // lines)
    row, column = _upper_tile(tl.program_id(0) % lines, tiles)
    if column >= tiles:
        return
    i, i_start, i0, i1, i2 = _columns(row, group, shape, geometry, x_strides, BLOCK, ONE_OFFSET)
    j, j_start, j0, j1, j2 = _columns(column, group, shape, geometry, x_strides, BLOCK, ONE_OFFSET)
    begin = tl.program_id(1) * share
    m = begin * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    n = m // T
    p0, p1, p2 = digits(m % T, geometry[0])
    c = zero_sums([BLOCK, BLOCK], x)
    total = c
    for step in range(begin, tl.minimum(begin + share, steps)):
        left = _patches(x, i, i_start, i0, i1, i2, n, p0, p1, p2, shape, geometry, x_strides, AXES, BIAS)
        right = _patches(x, j, j_start, j0, j1, j2, n, p0, p1, p2, shape, geometry, x_strides, AXES, BIAS)
        if weight is not None:
            # A product with a weight has more bits than 16.
            w = tl.load(weight + n, mask=n < N, other=0.0)
            left = wide(left) * w
            right = wide(right)
            if c.dtype == tl.float32:  # is multiplied in parts, and that of a number near the largest is infinite
                right = tl.where(w != 0, right, 0.0)
        c = dot(tl.trans(left), right, c, PRECISION)
        total, c = end_chain(total, c, step + 1 - begin, chain)
        n, p0, p1, p2 = _advance_rows(n, p0, p1, p2, BLOCK_T, geometry[0], AXES)
    tile = (long(tl.program_id(1)) * G + group) * (tiles * (tiles + 1) // 2) + _tile_index(row, column, tiles)
    cells = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(partial + tile * (BLOCK * BLOCK) + cells, all_chains(total, c))


@triton.jit
def _fold_upper_kernel(
    acc, partial, flag, shape, scale: tl.float64, BLOCK: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):
    """``acc[g,i,j] += scale * sum_s partial[s,g,...]`` for j >= i, unless the flag is set. One program: [BLOCK_I, BLOCK_J]."""
    if is_raised(flag):
        return
    R, G, C, K, D = shape
    across, down = tl.cdiv(D, BLOCK_J), tl.cdiv(D, BLOCK_I)
    group = long(tl.program_id(0) // (across * down))
    i = (tl.program_id(0) // across % down * BLOCK_I + tl.arange(0, BLOCK_I))[:, None]
    j = (tl.program_id(0) % across * BLOCK_J + tl.arange(0, BLOCK_J))[None, :]
    inside = (j < D) & (i <= j)
    from_i = tl.where(i < C * K, i % K * C + i // K, i)
    from_j = tl.where(j < C * K, j % K * C + j // K, j)
    low, high = tl.minimum(from_i, from_j), tl.maximum(from_i, from_j)
    tiles = tl.cdiv(D, BLOCK)
    tile = group * (tiles * (tiles + 1) // 2) + _tile_index(low // BLOCK, high // BLOCK, tiles)
    partial += tile * (BLOCK * BLOCK) + low % BLOCK * BLOCK + high % BLOCK
    values = tl.zeros([BLOCK_I, BLOCK_J], tl.float64)
    for r in range(R):
        values += tl.load(partial + long(r) * G * (tiles * (tiles + 1) // 2) * (BLOCK * BLOCK), mask=inside, other=0.0)
    out = acc + (group * D + i) * D + j
    before = tl.load(out, mask=inside, other=0.0)
    tl.store(out, (before + values * scale).to(before.dtype), mask=inside)


def conv_gram_(
    acc: Tensor,
    x: Tensor,
    scale: float = 1.0,
    *,
    weight: Tensor | None = None,
    bias: bool = False,
    flag: Tensor | None = None,
    kernel: tuple[int, ...] = (),
    positions: tuple[int, ...] = (),
    stride: tuple[int, ...] = (),
    padding: tuple[int, ...] = (),
    dilation: tuple[int, ...] = (),
    groups: int = 1,
) -> None:
    """Launch the implicit GEMM and the fold of its shares."""
    with torch.cuda.device_of(acc):
        raise_flag_(flag, as_rows(x), weight)
        geometry = geometry_of(x, kernel, positions, stride, padding, dilation)
        N, T, D = len(x), math.prod(geometry.positions), acc.shape[1]
        C, K = x.shape[1] // groups, math.prod(geometry.kernel)
        if 0 in (N, T, D):
            return
        dtype = x.dtype if weight is None else torch.promote_types(x.dtype, torch.float32)
        x = channels_last(x, C) if weight is None else x
        inputs = Inputs(x, scale, weight, bias, flag, geometry, groups, dtype)

        def trial(choice: Choice) -> None:
            _launch(torch.zeros_like(acc), inputs, choice)

        choices = candidates(groups, C, K, bias, N * T, dtype, architecture(acc.device))
        key = (N, T, groups, C, K, int(bias), *geometry, dtype, weight is not None, precision(dtype))
        _launch(acc, inputs, best("conv_gram_", key, choices, trial, acc.device))


def _launch(acc: Tensor, inputs: Inputs, choice: Choice) -> None:
    x, scale, weight, bias, flag, geometry, G, dtype = inputs
    blocks, shares = choice
    N, T, C, K = len(x), math.prod(geometry.positions), x.shape[1] // G, math.prod(geometry.kernel)
    D, BLOCK = C * K + bias, blocks["BLOCK"]
    steps = triton.cdiv(N * T, blocks["BLOCK_T"])
    share = triton.cdiv(steps, shares)
    shares = triton.cdiv(steps, share)  # none of them empty
    tiles = triton.cdiv(D, BLOCK)
    computed = torch.promote_types(x.dtype, torch.float32)
    partial = torch.empty(shares, G * upper_tiles(tiles), BLOCK**2, dtype=computed, device=acc.device)
    shape = (N, T, G, max(C, 1), C * K)
    grid = (G * (tiles + 1) * triton.cdiv(tiles, 2), shares)
    _conv_gram_kernel[grid](
        partial, x, weight, flag, shape, geometry, image_strides(x), share, steps, fold_size(share),
        AXES=x.dim() - 2, BIAS=int(bias), PRECISION=precision(dtype), **blocks,
    )  # fmt: skip
    BLOCK_I, BLOCK_J = power_of_two(D, 1, 8), power_of_two(D, 1, 64)
    programs = G * triton.cdiv(D, BLOCK_I) * triton.cdiv(D, BLOCK_J)
    _fold_upper_kernel[(programs,)](acc, partial, flag, (shares, G, max(C, 1), K, D), scale, BLOCK, BLOCK_I, BLOCK_J)
