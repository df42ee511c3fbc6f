# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of ``linear_sq_``: ``acc[o,i] += scale * sum_n w_n (sum_t g[n,t,o] x[n,t,i])^2``.

The squares kernel is the weight-gradient GEMM: a program owns a tile of ``[O, I]``, walks the samples, runs the GEMM
over t on the matrix units, and squares the tile in registers after each sample. Without positions (T = 1) the sum over
n itself is a GEMM, of squares. Where the tiles do not fill the chip, the samples are split into shares, each with a
workspace of its own, folded in a fixed order. Where there are too few samples for that, each is split into parts of its
rows, whose products are added up before they are squared. The contract is in ``fisherfast.ops.linear_sq``.
"""

import functools
import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._autotune import Choice, best
from ._common import (
    add_both,
    architecture,
    check_offsets,
    fold_,
    has_warpgroups,
    is_raised,
    long,
    power_of_two,
    raise_flag_,
    rows_and_strides,
    sample_rows,
    wide,
    zero_sums,
)
from ._products import dot, fold_size, precision, product_seconds
from ._squares import MOST_PARTS, PART_ROWS, Outputs, add_sample, square_parts_, steps_of, tiles_held


class Work(NamedTuple):
    """A sum over N samples, each a product over T rows, for a matrix [O, I]; ``tiles`` of which are held in registers."""

    O: int
    I: int
    N: int
    T: int
    dtype: torch.dtype
    tiles: int


class Inputs(NamedTuple):
    """One call: ``sizes`` are N, T, I, O and the strides of x and g; ``unit`` samples are one of ``work``."""

    x: Tensor
    g: Tensor
    weight: Tensor | None
    offsets: Tensor | None
    scale: float
    sizes: tuple[tuple[int, ...], ...]
    work: Work
    unit: int


WORKSPACE = 2**26  # bytes
MOST_SHARES = 32


def parts_of(N: int, shares: int) -> int:
    """Parts of a sample where there are more shares than samples, else 1: a share is some samples or a part of one."""
    return max(shares // N, 1)


def seconds(work: Work, BLOCK_O: int, BLOCK_I: int, shares: int) -> float:
    """How long tiles of this size and so many shares might take; a pure function."""
    tiles = triton.cdiv(work.O, BLOCK_O) * triton.cdiv(work.I, BLOCK_I)
    rows = triton.cdiv(work.N, shares) * triton.cdiv(triton.cdiv(work.T, parts_of(work.N, shares)), 16) * 16
    return product_seconds(tiles * shares, rows, BLOCK_O, BLOCK_I, work.dtype, workspace_bytes(work, shares))


def workspace_bytes(work: Work, shares: int) -> int:
    """Bytes of the workspace for the squares, or for the products of parts; 0 with one share."""
    return shares * work.O * work.I * max(work.dtype.itemsize, 4) if shares > 1 else 0


def splits(work: Work) -> list[int]:
    """The numbers of shares to choose from: of whole samples, none of them empty, or of parts of each sample."""
    whole = {triton.cdiv(work.N, triton.cdiv(work.N, shares)) for shares in range(1, min(work.N, MOST_SHARES) + 1)}
    parts = {work.N * parts for parts in range(2, min(work.T // PART_ROWS, MOST_PARTS) + 1)}
    few = {shares for shares in parts if shares <= MOST_SHARES}
    return sorted(shares for shares in whole | few if workspace_bytes(work, shares) <= WORKSPACE)


@functools.lru_cache(maxsize=4096)
def candidates(work: Work, arch: int) -> list[Choice]:
    """Tile sizes and shares, the least time by ``seconds`` first; a pure function.

    Of equals the largest tile and the fewest shares.
    """
    width, warpgroups = work.dtype.itemsize, has_warpgroups(arch)
    rows, columns = {2: (128, 128), 4: (128 if warpgroups else 64, 64), 8: (64, 64)}[width]
    if work.tiles > 2 or not warpgroups:  # without warpgroup instructions the operands pass through registers too
        columns //= 2
    most = [power_of_two(work.O, 16, rows), power_of_two(work.I, 16, columns)]
    sides = [[size for size in (128, 64, 32, 16) if min(32, top) <= size <= top] for top in most]
    ranked = sorted(itertools.product(*sides, splits(work)), key=lambda choice: seconds(work, *choice))
    fewest = {(BLOCK_O, BLOCK_I): shares for BLOCK_O, BLOCK_I, shares in reversed(ranked)}  # the best shares of each tile
    tiles = sorted(((*tile, shares) for tile, shares in fewest.items()), key=ranked.index)

    def blocks(BLOCK_O: int, BLOCK_I: int) -> dict[str, int]:
        return {
            "BLOCK_O": BLOCK_O,
            "BLOCK_I": BLOCK_I,
            "BLOCK_T": power_of_two(work.T, 16, 64 if width == 2 else 32),
            "num_warps": 8 if BLOCK_O * BLOCK_I >= 64 * 64 else 4,
            "num_stages": 3,
        }

    found = [(blocks(BLOCK_O, BLOCK_I), shares) for BLOCK_O, BLOCK_I, shares in tiles[:4]]
    # Float32 is multiplied in parts, which are in registers, too: with four warps some tiles spill.
    return found[:1] + [other for other in found[1:] if width != 4 or other[0]["num_warps"] == 8]


@triton.jit
def _tile(shape, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    """The rows and columns of ``[O, I]`` that this program owns, and where its share's ``[O, I]`` begins.

    Tiles are numbered in bands of 8 rows, column by column: programs that run together read few rows and columns. In one
    column after the other, 132 programs would read a g of 14336 columns whole and x's 128 at a time, five times the bytes.
    """
    tiles_o, tiles_i = tl.cdiv(shape[3], BLOCK_O), tl.cdiv(shape[2], BLOCK_I)
    band, place = tl.program_id(0) // (8 * tiles_i), tl.program_id(0) % (8 * tiles_i)
    height = tl.minimum(tiles_o - 8 * band, 8)
    o = long(8 * band + place % height) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = long(place // height) * BLOCK_I + tl.arange(0, BLOCK_I)
    return o, i, long(tl.program_id(1)) * shape[3] * shape[2]


@triton.jit
def _operands(x, g, n, row, inside_t, inside_o, inside_i, x_strides, g_strides):
    """Rows of sample n: of g ``[BLOCK_O, BLOCK_T]``, of x ``[BLOCK_T, BLOCK_I]``; the columns are in the pointers."""
    g_t = g + long(n) * g_strides[0] + row[None, :] * g_strides[1]
    x_t = x + long(n) * x_strides[0] + row[:, None] * x_strides[1]
    gs = tl.load(g_t, mask=inside_o & inside_t[None, :], other=0.0)
    xs = tl.load(x_t, mask=inside_i & inside_t[:, None], other=0.0)
    return gs, xs


@triton.jit(do_not_specialize=["share", "chain"])
def _linear_sq_kernel(
    acc,
    total,
    norms,
    x,
    g,
    weight,
    offsets,
    flag,
    shape,
    x_strides,
    g_strides,
    share,
    chain,
    scale: tl.float64,
    WORKSPACE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc[s] += scale * sum_n w_n c_n^2``, ``total[s] += sum_n w_n c_n``, ``norms[tile, n] = sum c_n^2``; ``c_n = g_n^T x_n``.

    Share s sums samples ``s share`` to ``(s + 1) share``, ``chain`` of them in registers at a time. A workspace need not be
    zero before.

    One loop over the steps of all samples: the loads of the next sample are under way while this one is squared. (Nested
    loops would wait for memory at the start of every sample.)

    Tile:  [BLOCK_O, BLOCK_I] of [O, I] a program; c_n, the sum of squares and (if asked) the sum stay in registers:
           128 x 128 in 8 warps is 2 x 64 of a thread's 255; 128 x 256 would be 2 x 128.
    FLOPs: 2 N T I O. Bytes: x read O / BLOCK_O times and g I / BLOCK_I times, mostly from L2; acc and total read and
           written once every ``chain`` samples.
    """
    if is_raised(flag):
        return
    N, T, I, O = shape
    o, i, out = _tile(shape, BLOCK_O, BLOCK_I)
    inside_o, inside_i = (o < O)[:, None], (i < I)[None, :]
    g += o[:, None] * g_strides[2]
    x += i[None, :] * x_strides[2]
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, N)
    zero = zero_sums([BLOCK_O, BLOCK_I], x)
    c = zero
    squares = zero
    sums = zero
    n = begin
    start = 0
    for _ in range(steps_of(offsets, begin, end, T, BLOCK_T)):
        first, rows = sample_rows(offsets, long(n), T)
        t = start + tl.arange(0, BLOCK_T)
        gs, xs = _operands(x, g, n, first + t, t < rows, inside_o, inside_i, x_strides, g_strides)
        c = dot(gs, xs, c, PRECISION)
        start += BLOCK_T
        ends = start >= rows
        if ends:
            squares, sums = add_sample(squares, sums, c, n, N, weight, total, norms)
            c = zero
            done = n + 1 - begin
            if (done % chain == 0) | (n + 1 == end):
                known = done > chain if WORKSPACE else True
                index = out + o[:, None] * I + i[None, :]
                add_both(acc, total, index, squares, sums, scale, inside_o & inside_i, known)
                squares, sums = zero, zero
        # Beside the branch, not in it: where the next loads begin must not wait for the product.
        n += ends.to(tl.int32)
        start = tl.where(ends, 0, start)


@triton.jit(do_not_specialize=["parts"])
def _linear_part_kernel(
    products,
    x,
    g,
    offsets,
    flag,
    shape,
    x_strides,
    g_strides,
    parts,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``products[n, p] = g^T x`` over the rows of part p of sample n, zero where it has none.

    Tile:  [BLOCK_O, BLOCK_I] of [O, I] a program, of one part of one sample.
    FLOPs: 2 N T I O. Bytes: as ``_linear_sq_kernel``, and products written once.
    """
    if is_raised(flag):
        return
    _, T, I, O = shape
    o, i, out = _tile(shape, BLOCK_O, BLOCK_I)
    inside_o, inside_i = (o < O)[:, None], (i < I)[None, :]
    g += o[:, None] * g_strides[2]
    x += i[None, :] * x_strides[2]
    n, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    first, rows = sample_rows(offsets, long(n), T)
    length = tl.cdiv(tl.cdiv(rows.to(tl.int32), parts), BLOCK_T) * BLOCK_T
    begin = part * length
    end = tl.minimum(begin + length, rows.to(tl.int32))
    c = tl.zeros([BLOCK_O, BLOCK_I], products.dtype.element_ty)
    for start in range(begin, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        gs, xs = _operands(x, g, n, first + t, t < end, inside_o, inside_i, x_strides, g_strides)
        c = dot(gs, xs, c, PRECISION)
    tl.store(products + out + o[:, None] * I + i[None, :], c, mask=inside_o & inside_i)


@triton.jit(do_not_specialize=["share", "chain"])
def _linear_sq_flat_kernel(
    acc,
    total,
    x,
    g,
    weight,
    flag,
    shape,
    x_strides,
    g_strides,
    share,
    chain,
    scale: tl.float64,
    WORKSPACE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """T = 1: ``acc[s] += scale * (w g^2)^T x^2`` and ``total[s] += (w g)^T x``, GEMMs over n; squares are formed in float32.

    As ``_linear_sq_kernel``; ``chain`` counts steps of BLOCK_T samples.

    Tile:  [BLOCK_O, BLOCK_I] of [O, I] a program, BLOCK_T samples a step.
    FLOPs: 2 N I O, and as many again for total. Bytes: as ``_linear_sq_kernel``.
    """
    if is_raised(flag):
        return
    N, _, I, O = shape
    o, i, out = _tile(shape, BLOCK_O, BLOCK_I)
    inside_o, inside_i = (o < O)[:, None], (i < I)[None, :]
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, N)
    zero = zero_sums([BLOCK_O, BLOCK_I], x)
    squares = zero
    sums = zero
    for step in range(tl.cdiv(end - begin, BLOCK_T)):
        n = begin + step * BLOCK_T + tl.arange(0, BLOCK_T)
        g_n = g + long(n)[None, :] * g_strides[0] + o[:, None] * g_strides[2]
        x_n = x + long(n)[:, None] * x_strides[0] + i[None, :] * x_strides[2]
        gs = wide(tl.load(g_n, mask=inside_o & (n < end)[None, :], other=0.0))
        xs = wide(tl.load(x_n, mask=inside_i & (n < end)[:, None], other=0.0))
        weighted = gs
        if weight is not None:
            weighted = gs * tl.load(weight + n, mask=n < end, other=0.0)[None, :]
        squares = dot(gs * weighted, xs * xs, squares, PRECISION)
        if total is not None:
            sums = dot(weighted, xs, sums, PRECISION)
        done = step + 1
        if (done % chain == 0) | (begin + done * BLOCK_T >= end):
            known = done > chain if WORKSPACE else True
            index = out + o[:, None] * I + i[None, :]
            add_both(acc, total, index, squares, sums, scale, inside_o & inside_i, known)
            squares, sums = zero, zero


@triton.jit
def _flat_norms_kernel(sqnorm, x, g, flag, shape, x_strides, g_strides, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """T = 1: ``sqnorm[n] += |g_n|^2 |x_n|^2``, x and g read once. One program: BLOCK_N samples."""
    if is_raised(flag):
        return
    N, _, I, O = shape
    n = long(tl.program_id(0)) * BLOCK_N + tl.arange(0, BLOCK_N)
    size_x = _row_squares(x + n[:, None] * x_strides[0], (n < N)[:, None], I, x_strides[2], BLOCK_N, BLOCK_C)
    size_g = _row_squares(g + n[:, None] * g_strides[0], (n < N)[:, None], O, g_strides[2], BLOCK_N, BLOCK_C)
    before = tl.load(sqnorm + n, mask=n < N, other=0.0)
    tl.store(sqnorm + n, before + (size_x * size_g).to(before.dtype), mask=n < N)


@triton.jit
def _row_squares(rows, inside, C, stride, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """``sum_c rows[n, c]^2`` [BLOCK_N]."""
    squares = zero_sums([BLOCK_N, BLOCK_C], rows)
    for start in range(0, C, BLOCK_C):
        c = long(start) + tl.arange(0, BLOCK_C)
        values = wide(tl.load(rows + c[None, :] * stride, mask=inside & (c < C)[None, :], other=0.0))
        squares += values * values
    return tl.sum(squares, 1)


def linear_sq_(
    acc: Tensor,
    x: Tensor,
    g: Tensor,
    scale: float = 1.0,
    *,
    weight: Tensor | None = None,
    offsets: Tensor | None = None,
    total: Tensor | None = None,
    sqnorm: Tensor | None = None,
    flag: Tensor | None = None,
) -> None:
    """Launch the kernel that fits: one GEMM of squares where every sample has one row, else a GEMM a sample."""
    O, I = acc.shape
    N, T = g.shape[:2] if offsets is None else (len(offsets) - 1, triton.cdiv(len(g), max(len(offsets) - 1, 1)))
    with torch.cuda.device_of(acc):
        check_offsets(offsets, len(g))
        raise_flag_(flag, x, g, weight)
        if 0 in (N, T, I, O):
            return
        sizes = ((N, T, I, O), rows_and_strides(x, offsets), rows_and_strides(g, offsets))
        flat = T == 1 and offsets is None
        multiplied = torch.promote_types(x.dtype, torch.float32) if flat else x.dtype
        unit = power_of_two(N, 16, 32) if flat else 1  # the samples of a step, which stay together
        work = Work(O, I, triton.cdiv(N, unit), unit if flat else T, multiplied, tiles_held(acc, total))
        outputs, inputs = Outputs(acc, total, sqnorm, flag), Inputs(x, g, weight, offsets, scale, sizes, work, unit)

        def trial(choice: Choice) -> None:
            _launch(outputs.zeros(), inputs, choice)

        choices = candidates(work, architecture(acc.device))
        _launch(outputs, inputs, best("linear_sq_", (*work, precision(multiplied)), choices, trial, acc.device))


def _launch(outputs: Outputs, inputs: Inputs, choice: Choice) -> None:
    """Sums of squares of all samples, of shares of them, or of gradients that are computed in parts."""
    (acc, total, sqnorm, flag), (x, g, weight, offsets, scale, sizes, work, unit) = outputs, inputs
    (N, T, I, O), (blocks, shares) = sizes[0], choice
    flat = T == 1 and offsets is None
    computed = torch.promote_types(x.dtype, torch.float32)
    tiles = triton.cdiv(O, blocks["BLOCK_O"]) * triton.cdiv(I, blocks["BLOCK_I"])
    blocks = {"PRECISION": precision(work.dtype), **blocks}
    if (parts := parts_of(work.N, shares)) > 1:
        products = torch.empty(N, parts, O * I, device=acc.device, dtype=computed)
        _linear_part_kernel[(tiles, shares)](products, x, g, offsets, flag, *sizes, parts, **blocks)
        square_parts_(acc, total, sqnorm, products, weight, scale, flag)
        return

    def summed(out: Tensor | None) -> Tensor | None:
        return out if out is None or shares == 1 else torch.empty(shares, O * I, device=acc.device, dtype=computed)

    squares, sums = summed(acc), summed(total)
    plan = {"WORKSPACE": shares > 1, **blocks}
    share = triton.cdiv(work.N, shares)
    chain, factor = fold_size(share), scale if shares == 1 else 1.0
    norms = None
    if flat:
        arguments = (squares, sums, x, g, weight, flag, *sizes, share * unit, chain, factor)
        _linear_sq_flat_kernel[(tiles, shares)](*arguments, **plan)
    else:
        norms = None if sqnorm is None else torch.empty(tiles, N, device=acc.device, dtype=computed)
        arguments = (squares, sums, norms, x, g, weight, offsets, flag, *sizes, share, chain, factor)
        _linear_sq_kernel[(tiles, shares)](*arguments, **plan)
    if shares > 1:
        fold_(acc, squares, scale, flag)
        fold_(total, sums, 1.0, flag)
    if norms is not None:
        fold_(sqnorm, norms, 1.0, flag)
    elif sqnorm is not None:
        _flat_norms_kernel[(triton.cdiv(N, 16),)](sqnorm, x, g, flag, *sizes, BLOCK_N=16, BLOCK_C=128)
