# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of ``ghost_norm_``: ``sqnorm[n] += sum_pq (g[n,:,p] . g[n,:,q]) (u[n,p,:] . u[n,q,:])``, u the patches of x.

A program owns a square tile of pairs of positions on or above the diagonal: it forms both Gram matrices of it in registers, reads the
patches from x in place, zero outside, and hands over two sums, which are added in a fixed order. No Gram matrix is stored. The
contract is in ``fisherfast.ops.ghost_norm``.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import architecture, fold_, has_warpgroups, is_raised, long, power_of_two, raise_flag_, zero_sums
from ._conv import as_rows, digits, geometry_of, image_strides, kernel_offset, largest_index, look
from ._products import all_chains, dot, end_chain, fold_size, precision


def why_not(sqnorm: Tensor, x: Tensor, g: Tensor, *, kernel=(), stride=(), padding=(), dilation=(), **_: Any) -> str | None:
    """Why this call cannot run under Triton, or None."""
    largest = largest_index(geometry_of(x, kernel, g.shape[2:], stride, padding, dilation))
    if largest >= 2**30:
        return f"positions are counted in 32 bits: 2^30 in an image are too many, got {largest}"
    return None


def tiles_of(T: int, dtype: torch.dtype, arch: int) -> dict[str, int]:
    """Tile sizes for pairs of T positions; a pure function."""
    # Of float32 in parts, which all pass through registers before Hopper, a large tile would not fit into them.
    largest = 64 if dtype.itemsize == 2 or (dtype.itemsize == 4 and has_warpgroups(arch)) else 32
    BLOCK = power_of_two(T, 16, largest)
    return {"BLOCK": BLOCK, "BLOCK_C": max(16, 64 // dtype.itemsize), "num_warps": 8 if BLOCK > 32 else 4}


@triton.jit
def _rows(pointer, start, channel, channels, stride, inside):
    """``pointer[start + channel * stride]``, zero outside: rows of positions by columns of channels, or the other way round."""
    return tl.load(pointer + (start + long(channel) * stride), mask=inside & (channel < channels), other=0.0)


@triton.jit(do_not_specialize=["g_chain", "x_chain"])
def _ghost_norm_kernel(
    partial,
    x,
    g,
    flag,
    shape,
    geometry,
    x_strides,
    g_strides,
    g_chain,
    x_chain,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    AXES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``partial[tile, :, n]`` = the sums of the products and of their magnitudes over the pairs of a tile, and of its mirror image.

    ``g_chain``, ``x_chain``: how many steps of BLOCK_C channels are added up before they are added to the chains before.

    Tile:  [BLOCK, BLOCK] pairs of positions of a sample. FLOPs: T (T + BLOCK) (O + K C) a sample.
    Bytes: the rows of g once and those of x K times for each tile of their line, mostly from the L2.
    """
    if is_raised(flag):
        return
    N, T, O, C, K = shape
    tiles = tl.cdiv(T, BLOCK)
    tile = tl.program_id(0) % (tiles * tiles)
    row = tile // tiles
    column = tile % tiles
    if row > column:
        return
    n = long(tl.program_id(0) // (tiles * tiles))
    P = geometry[0]
    p = row * BLOCK + tl.arange(0, BLOCK)[:, None]
    q = column * BLOCK + tl.arange(0, BLOCK)[None, :]
    p0, p1, p2 = digits(p, P)
    q0, q1, q2 = digits(q, P)
    down = tl.arange(0, BLOCK_C)[:, None]
    across = tl.arange(0, BLOCK_C)[None, :]

    p_start = n * g_strides[0] + long(p0) * g_strides[2] + long(p1) * g_strides[3] + long(p2) * g_strides[4]
    q_start = n * g_strides[0] + long(q0) * g_strides[2] + long(q1) * g_strides[3] + long(q2) * g_strides[4]
    of_g = zero_sums([BLOCK, BLOCK], g)
    total = of_g
    for o in range(0, O, BLOCK_C):
        left = _rows(g, p_start, o + across, O, g_strides[1], p < T)
        right = _rows(g, q_start, o + down, O, g_strides[1], q < T)
        of_g = dot(left, right, of_g, PRECISION)
        total, of_g = end_chain(total, of_g, o // BLOCK_C + 1, g_chain)
    of_g = all_chains(total, of_g)

    sqnorm = tl.full((), 0.0, tl.float64)
    size = sqnorm
    for k in range(K):
        at0, at1, at2 = kernel_offset(k, geometry)
        start = n * x_strides[0] + long(at0) * x_strides[2] + long(at1) * x_strides[3] + long(at2) * x_strides[4]
        p_offset, p_inside = look(p0, p1, p2, at0, at1, at2, geometry, x_strides, AXES)
        q_offset, q_inside = look(q0, q1, q2, at0, at1, at2, geometry, x_strides, AXES)
        of_x = zero_sums([BLOCK, BLOCK], x)
        total = of_x
        for c in range(0, C, BLOCK_C):
            left = _rows(x, start + p_offset, c + across, C, x_strides[1], p_inside & (p < T))
            right = _rows(x, start + q_offset, c + down, C, x_strides[1], q_inside & (q < T))
            of_x = dot(left, right, of_x, PRECISION)
            total, of_x = end_chain(total, of_x, c // BLOCK_C + 1, x_chain)
        products = of_g.to(tl.float64) * all_chains(total, of_x).to(tl.float64)
        sqnorm += tl.sum(products)
        size += tl.sum(tl.abs(products))
    twice = tl.where(row < column, 2.0, 1.0)
    out = partial + long(tile) * 2 * N + n
    tl.store(out, sqnorm * twice)
    tl.store(out + N, size * twice)


def ghost_norm_(
    sqnorm: Tensor,
    x: Tensor,
    g: Tensor,
    *,
    size: Tensor | None = None,
    flag: Tensor | None = None,
    kernel: tuple[int, ...] = (),
    stride: tuple[int, ...] = (),
    padding: tuple[int, ...] = (),
    dilation: tuple[int, ...] = (),
) -> None:
    """Launch the kernel over tiles of pairs and samples, then add the results."""
    with torch.cuda.device_of(sqnorm):
        raise_flag_(flag, as_rows(x), as_rows(g))
        geometry = geometry_of(x, kernel, g.shape[2:], stride, padding, dilation)
        N, O, C, T, K = len(g), g.shape[1], x.shape[1], math.prod(geometry.positions), math.prod(geometry.kernel)
        if 0 in (g.numel(), x.numel()):
            return
        blocks = tiles_of(T, g.dtype, architecture(g.device))
        tiles = triton.cdiv(T, blocks["BLOCK"])
        partial = torch.zeros(tiles * tiles, 2, N, dtype=torch.float64, device=g.device)  # zeros below the diagonal
        _ghost_norm_kernel[(N * tiles * tiles,)](
            partial, x, g, flag, (N, T, O, C, K), geometry, image_strides(x), image_strides(g),
            fold_size(triton.cdiv(O, blocks["BLOCK_C"])), fold_size(triton.cdiv(C, blocks["BLOCK_C"])),
            AXES=x.dim() - 2, PRECISION=precision(g.dtype), **blocks,
        )  # fmt: skip
        fold_(sqnorm, partial[:, 0].contiguous(), 1.0, flag)
        fold_(size, partial[:, 1].contiguous(), 1.0, flag)
