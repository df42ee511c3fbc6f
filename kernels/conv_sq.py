# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of ``conv_sq_``: ``acc[o,c,k] += scale * sum_n w_n (sum_p g[n,o,p] x[n,c,p stride + k dilation - padding])^2``.

An implicit GEMM: a program owns a tile of one group's ``[O / G, |K| C / G]`` matrix, walks the samples, runs the GEMM over
the positions p on the matrix units with x read in place, zero outside, and squares the tile in registers after each sample.
A column is (k, c) with c fastest: neighbours in memory where channels are last, and a tile that lies within one kernel offset
k looks outside of x for whole rows at a time. A convolution's weight is small and its samples are many, so the samples are
split into shares, whose sums ``_fold_columns_kernel`` adds in acc's order (c, k); a few large images are split into parts of
their positions. Groups of a few channels, depthwise above all, would leave a matrix tile empty: those multiply element by
element. The contract is in ``fisherfast.ops.conv_sq``.
"""

import functools
import math
from typing import Any, NamedTuple

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
    sample_rows,
    wide,
    zero_sums,
)
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
from ._products import PRODUCT_PROGRAMS, dot, fold_size, precision
from ._squares import MOST_PARTS, PART_ROWS, Outputs, add_sample, square_parts_, steps_of, tiles_held
from .linear_sq import linear_sq_


def why_not(acc: Tensor, x: Tensor, g: Tensor, scale: float = 1.0, *, stride=(), padding=(), dilation=(), **_: Any) -> str | None:
    """Why this call cannot run under Triton, or None."""
    largest = largest_index(geometry_of(x, acc.shape[2:], g.shape[2:], stride, padding, dilation))
    if largest >= 2**30:
        return f"positions are counted in 32 bits: those of an image must be fewer than 2^30, got {largest}"
    return None


class Inputs(NamedTuple):
    """One call: ``sizes`` are G, O, C, K, N, T; ``direct`` ones are multiplied element by element."""

    x: Tensor
    g: Tensor
    scale: float
    weight: Tensor | None
    offsets: Tensor | None
    geometry: Geometry
    sizes: tuple[int, int, int, int, int, int]
    direct: bool


@functools.lru_cache(maxsize=4096)
def candidates(groups: int, O: int, C: int, K: int, N: int, T: int, dtype: torch.dtype, tiles: int, arch: int) -> list[Choice]:
    """Tile sizes for each group's ``[O, K C]`` and a GEMM over T positions, and in how many shares to split N; if more, N and T.

    The likeliest best first: as large a tile as there are registers for, and the next smaller one. ``tiles`` is how many are
    held in registers. A pure function.
    """
    # With a step or two a sample only another program hides the latency of loads: tiles that leave room for one.
    largest = 128 if dtype.itemsize == 2 and T > 128 else 64
    first = _candidate(largest, groups, O, C, K, N, T, dtype, tiles, arch)
    half = max(first[0]["BLOCK_O"], first[0]["BLOCK_I"]) // 2
    return [first, _candidate(half, groups, O, C, K, N, T, dtype, tiles, arch)] if half >= 32 else [first]


def _candidate(
    largest: int, groups: int, O: int, C: int, K: int, N: int, T: int, dtype: torch.dtype, tiles: int, arch: int
) -> Choice:
    BLOCK_O, BLOCK_I = block(O, largest), block(K * C, largest)
    divisor = C & -C
    if K > 1 and divisor >= 64:
        BLOCK_I = min(BLOCK_I, divisor)
    # Registers: without Hopper's instructions operands, or sums on their way from tensor memory, pass through them too; 64-bit
    # numbers take two.
    warpgroups = has_warpgroups(arch)
    if tiles > 2 or arch // 10 != 9:
        BLOCK_I = min(BLOCK_I, largest // 2)
    if tiles > 2 and not (warpgroups and dtype.itemsize < 8):
        BLOCK_O = min(BLOCK_O, 64 if dtype.itemsize < 8 else 32)

    def programs() -> int:
        return groups * triton.cdiv(O, BLOCK_O) * triton.cdiv(K * C, BLOCK_I)

    def parts() -> int:
        return max(1, min(MOST_PARTS, T // PART_ROWS, triton.cdiv(PRODUCT_PROGRAMS, programs() * N)))

    while max(BLOCK_O, BLOCK_I) > 32 and programs() * N * parts() < PRODUCT_PROGRAMS:
        if BLOCK_O >= BLOCK_I:
            BLOCK_O //= 2
        else:
            BLOCK_I //= 2
    one_offset = K == 1 or C % BLOCK_I == 0
    cells, crowded = BLOCK_O * BLOCK_I, tiles > 2 or not one_offset or not warpgroups
    short = not one_offset or (tiles > 2 and cells > 64 * 64 and arch // 10 != 9)  # addresses take registers, too
    blocks = {
        "BLOCK_O": BLOCK_O,
        "BLOCK_I": BLOCK_I,
        "BLOCK_T": power_of_two(T, 16, max(16, 128 // dtype.itemsize // (2 if short else 1))),
        "ONE_OFFSET": one_offset,
        # Columns of several kernel offsets look outside of x one by one: more for a thread to hold.
        "num_warps": 8 if cells * dtype.itemsize >= 2**14 or (cells >= 2**11 and crowded) else 4,
        "num_stages": 3,
    }
    return blocks, N * parts() if parts() > 1 else max(1, min(N, 4 * PRODUCT_PROGRAMS // programs()))


def direct_config(pairs: int, K: int, N: int, T: int, arch: int) -> tuple[dict[str, int], int]:
    """Tile sizes for ``pairs`` of channels (o, c) and T positions, and in how many shares to split N; a pure function."""
    BLOCK_E = power_of_two(pairs, 1, 32)
    BLOCK_T = power_of_two(T, 16, 1024 // BLOCK_E)
    shares = max(1, min(N, 8 * PRODUCT_PROGRAMS // (triton.cdiv(pairs, BLOCK_E) * K)))
    return {"BLOCK_E": BLOCK_E, "BLOCK_T": BLOCK_T, "num_warps": 8 if arch >= 90 else 4}, shares


@triton.jit
def _images(offsets, n):
    """First image of sample ``n`` and how many it has."""
    if offsets is None:
        return long(n), 1
    else:
        return sample_rows(offsets, long(n), 1)


@triton.jit
def _tile(
    x, g, shape, geometry, x_strides, g_strides, ONE_OFFSET: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr
):  # fmt: skip
    """The tile of this program: x where its columns look from position 0, g at its rows, the group, its rows and columns, which of
    them are inside, and the columns' kernel offsets.
    """
    _, _, _, O, C, I = shape
    tiles_o, tiles_i = tl.cdiv(O, BLOCK_O), tl.cdiv(I, BLOCK_I)
    tile = tl.program_id(0)
    group = long(tile // (tiles_o * tiles_i))
    o = long(tile % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    column = long(tile // tiles_o % tiles_i) * BLOCK_I
    i = column + tl.arange(0, BLOCK_I)
    inside_o, inside_i = (o < O)[:, None], (i < I)[None, :]
    if ONE_OFFSET:
        k = column // C
        channel = (i - k * C)[None, :]
    else:
        k = (i // C)[None, :]
        channel = (i % C)[None, :]
    at0, at1, at2 = kernel_offset(k.to(tl.int32), geometry)
    x += (group * C + channel) * x_strides[1] + long(at0) * x_strides[2] + long(at1) * x_strides[3] + long(at2) * x_strides[4]
    g += (group * O + o[:, None]) * g_strides[1]
    return x, g, group, o, i, inside_o, inside_i, at0, at1, at2


@triton.jit(do_not_specialize=["share", "chain"])
def _conv_sq_kernel(
    squares_out,
    sums_out,
    norms,
    x,
    g,
    weight,
    offsets,
    flag,
    shape,
    geometry,
    x_strides,
    g_strides,
    share,
    chain,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    AXES: tl.constexpr,
    ONE_OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``squares_out[s] = sum_n w_n c_n^2``, ``sums_out[s] = sum_n w_n c_n``, ``norms[tile, n] = sum c_n^2``.

    ``c_n`` [G O, K C] is sample n's gradient; O, C and I = K C are those of one group. Share s sums samples ``s share`` to
    ``(s + 1) share``, ``chain`` of them in registers at a time. One loop over the steps of all images, as in ``linear_sq``.

    Tile:  [BLOCK_O, BLOCK_I] of one group's [O, I] and one share of the samples a program; c_n, the sum of squares and (if
           asked) the sum stay in registers. With ONE_OFFSET all its columns have the same kernel offset.
    FLOPs: 2 N T G O I. Bytes: x read K O / BLOCK_O times and g I / BLOCK_I times, mostly from L2; workspaces of 4 S G O I
           written once, read and written again every ``chain`` samples.
    """
    if is_raised(flag):
        return
    N, T, G, O, _, I = shape
    x, g, group, o, i, inside_o, inside_i, at0, at1, at2 = _tile(
        x, g, shape, geometry, x_strides, g_strides, ONE_OFFSET, BLOCK_O, BLOCK_I
    )
    first_p0, first_p1, first_p2 = digits(tl.arange(0, BLOCK_T)[:, None], geometry[0])
    zero = zero_sums([BLOCK_O, BLOCK_I], x)
    c = zero
    squares = zero
    sums = zero
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, N)
    n = begin
    image = 0  # of the sample
    start = 0
    p0, p1, p2 = first_p0, first_p1, first_p2
    for _ in range(steps_of(offsets, begin, end, 1, 1) * tl.cdiv(T, BLOCK_T)):
        first, images = _images(offsets, n)
        m = first + image
        t = start + tl.arange(0, BLOCK_T)
        present = (t < T) & (image < images)  # a sample may have no image
        offset, inside = look(p0, p1, p2, at0, at1, at2, geometry, x_strides, AXES)
        g_t = g + m * g_strides[0] + long(t)[None, :] * g_strides[2]
        gs = tl.load(g_t, mask=inside_o & present[None, :], other=0.0)  # [BLOCK_O, BLOCK_T]
        xs = tl.load(x + m * x_strides[0] + offset, mask=inside & inside_i & present[:, None], other=0.0)  # [BLOCK_T, BLOCK_I]
        c = dot(gs, xs, c, PRECISION)
        start += BLOCK_T
        whole = start >= T
        ends = whole & (image + 1 >= images)
        if ends:
            squares, sums = add_sample(squares, sums, c, n, N, weight, sums_out, norms)
            c = zero
            done = n + 1 - begin
            if (done % chain == 0) | (n + 1 == end):
                index = ((long(tl.program_id(1)) * G + group) * O + o[:, None]) * I + i[None, :]
                add_both(squares_out, sums_out, index, squares, sums, 1.0, inside_o & inside_i, done > chain)
                squares, sums = zero, zero
        # Beside the branch, not in it: where the next loads begin must not wait for the product.
        p0, p1, p2 = advance(p0, p1, p2, BLOCK_T, geometry[0], AXES)
        p0, p1, p2 = tl.where(whole, first_p0, p0), tl.where(whole, first_p1, p1), tl.where(whole, first_p2, p2)
        start = tl.where(whole, 0, start)
        image = tl.where(ends, 0, image + whole.to(tl.int32))
        n += ends.to(tl.int32)


@triton.jit(do_not_specialize=["parts"])
def _conv_part_kernel(
    products,
    x,
    g,
    offsets,
    flag,
    shape,
    geometry,
    x_strides,
    g_strides,
    parts,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    AXES: tl.constexpr,
    ONE_OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``products[n, p]`` is sample n's gradient of part p of its images' positions, zero where it has none.

    Tile:  [BLOCK_O, BLOCK_I] of one group's [O, I] a program, of one part of one sample.
    FLOPs: 2 N T G O I. Bytes: as ``_conv_sq_kernel``, and products written once.
    """
    if is_raised(flag):
        return
    _, T, G, O, _, I = shape
    x, g, group, o, i, inside_o, inside_i, at0, at1, at2 = _tile(
        x, g, shape, geometry, x_strides, g_strides, ONE_OFFSET, BLOCK_O, BLOCK_I
    )
    n, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    first, images = _images(offsets, n)
    length = tl.cdiv(tl.cdiv(T, parts), BLOCK_T) * BLOCK_T
    begin = part * length
    end = tl.minimum(begin + length, T)
    c = tl.zeros([BLOCK_O, BLOCK_I], products.dtype.element_ty)
    first_p0, first_p1, first_p2 = digits(begin + tl.arange(0, BLOCK_T)[:, None], geometry[0])
    p0, p1, p2 = first_p0, first_p1, first_p2
    m, start = first, begin
    for _ in range(images * tl.cdiv(end - begin, BLOCK_T)):
        t = start + tl.arange(0, BLOCK_T)
        offset, inside = look(p0, p1, p2, at0, at1, at2, geometry, x_strides, AXES)
        g_t = g + long(m) * g_strides[0] + long(t)[None, :] * g_strides[2]
        gs = tl.load(g_t, mask=inside_o & (t < end)[None, :], other=0.0)  # [BLOCK_O, BLOCK_T]
        xs = tl.load(x + long(m) * x_strides[0] + offset, mask=inside & inside_i & (t < end)[:, None], other=0.0)
        c = dot(gs, xs, c, PRECISION)
        start += BLOCK_T
        whole = start >= end
        p0, p1, p2 = advance(p0, p1, p2, BLOCK_T, geometry[0], AXES)
        p0, p1, p2 = tl.where(whole, first_p0, p0), tl.where(whole, first_p1, p1), tl.where(whole, first_p2, p2)
        start = tl.where(whole, begin, start)
        m += whole.to(tl.int64)
    index = ((long(tl.program_id(1)) * G + group) * O + o[:, None]) * I + i[None, :]
    tl.store(products + index, c, mask=inside_o & inside_i)


@triton.jit(do_not_specialize=["share", "chain"])
def _conv_sq_direct_kernel(
    squares_out,
    sums_out,
    norms,
    x,
    g,
    weight,
    offsets,
    flag,
    shape,
    geometry,
    x_strides,
    g_strides,
    share,
    chain,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    AXES: tl.constexpr,
):
    """As ``_conv_sq_kernel``, for groups of a few channels: products of pairs (o, c), summed over the positions.

    Tile:  BLOCK_E pairs at one kernel offset and one share of the samples a program; [BLOCK_E, BLOCK_T] products.
    FLOPs: 2 N T G O K C. Bytes: x and g read K times, g C times and x O times more, mostly from L1 and L2.
    """
    if is_raised(flag):
        return
    N, T, G, O, C, I = shape
    K = I // C
    k = tl.program_id(0) % K
    pair = tl.program_id(0) // K * BLOCK_E + tl.arange(0, BLOCK_E)  # 32 bits: a 64-bit division is a call, with a stack
    inside_e = pair < G * O * C
    channel = pair // (C * O) * C + pair % C
    o, c = long(pair // C), long(pair % C)
    at0, at1, at2 = kernel_offset(k, geometry)
    x += long(at0) * x_strides[2] + long(at1) * x_strides[3] + long(at2) * x_strides[4]
    x += (long(channel) * x_strides[1])[:, None]
    g += (o * g_strides[1])[:, None]
    first_p0, first_p1, first_p2 = digits(tl.arange(0, BLOCK_T)[None, :], geometry[0])
    zero = zero_sums([BLOCK_E], x)
    squares, sums = zero, zero
    index = (long(tl.program_id(1)) * G * O + o) * I + k * C + c
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, N)
    for n in range(begin, end):
        first, images = _images(offsets, n)
        products = tl.zeros([BLOCK_E, BLOCK_T], squares.dtype)
        for m in range(first, first + images):
            p0, p1, p2 = first_p0, first_p1, first_p2
            x_m, g_m = x + long(m) * x_strides[0], g + long(m) * g_strides[0]
            for start in range(0, T, BLOCK_T):
                t = start + tl.arange(0, BLOCK_T)[None, :]
                offset, inside = look(p0, p1, p2, at0, at1, at2, geometry, x_strides, AXES)
                inside = inside & inside_e[:, None] & (t < T)
                gs = wide(tl.load(g_m + long(t) * g_strides[2], mask=inside, other=0.0))
                products += gs * wide(tl.load(x_m + offset, mask=inside, other=0.0))
                p0, p1, p2 = advance(p0, p1, p2, BLOCK_T, geometry[0], AXES)
        squares, sums = add_sample(squares, sums, tl.sum(products, 1), n, N, weight, sums_out, norms)
        done = n + 1 - begin
        if (done % chain == 0) | (n + 1 == end):
            add_both(squares_out, sums_out, index, squares, sums, 1.0, inside_e, done > chain)
            squares, sums = zero, zero


@triton.jit
def _fold_columns_kernel(out, partial, flag, shape, scale: tl.float64, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """``out[o, c, k] += scale * sum_r partial[r, o, k, c]`` unless the flag is set. One program: [BLOCK_C, BLOCK_K] of one o."""
    if is_raised(flag):
        return
    R, O, C, K = shape
    tiles_c, tiles_k = tl.cdiv(C, BLOCK_C), tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0) % (tiles_c * tiles_k)
    o = long(tl.program_id(0) // (tiles_c * tiles_k))
    c = (tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    k = (tile // tiles_c * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    inside = (c < C) & (k < K)
    partial += (o * K + k) * C + c
    values = tl.zeros([BLOCK_C, BLOCK_K], tl.float64)
    for r in range(R):
        values += tl.load(partial + r * (long(O) * K * C), mask=inside, other=0.0)
    index = (o * C + c) * K + k
    before = tl.load(out + index, mask=inside, other=0.0)
    tl.store(out + index, (before + values * scale).to(before.dtype), mask=inside)


def _fold_columns_(out: Tensor, partial: Tensor, scale: float, flag: Tensor | None) -> None:
    """``out[o, c, *k] += scale * sum_r partial[r, o, k, c]`` in a fixed order; nothing while the flag is set."""
    R, O, K, C = partial.shape
    BLOCK_C, BLOCK_K = power_of_two(C, 1, 64), power_of_two(K, 1, 16)
    grid = (O * triton.cdiv(C, BLOCK_C) * triton.cdiv(K, BLOCK_K),)
    _fold_columns_kernel[grid](out, partial, flag, (R, O, C, K), scale, BLOCK_C, BLOCK_K)


def conv_sq_(
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
    stride: tuple[int, ...] = (),
    padding: tuple[int, ...] = (),
    dilation: tuple[int, ...] = (),
    groups: int = 1,
) -> None:
    """Launch the kernel that fits: ``linear_sq_`` of the whole input, products of channel pairs, or an implicit GEMM."""
    N = g.shape[0] if offsets is None else len(offsets) - 1
    geometry = geometry_of(x, acc.shape[2:], g.shape[2:], stride, padding, dilation)
    with torch.cuda.device_of(acc):
        whole = geometry.extents == geometry.kernel and not any(geometry.padding) and max(geometry.dilation) == 1
        if whole and set(geometry.positions) == {1} and groups == 1 and offsets is None:
            rows = (x.flatten(1).unsqueeze(1), g.flatten(1).unsqueeze(1))
            flat = None if total is None else total.flatten(1)
            linear_sq_(acc.flatten(1), *rows, scale, weight=weight, total=flat, sqnorm=sqnorm, flag=flag)
            return
        check_offsets(offsets, len(g))
        raise_flag_(flag, as_rows(x), as_rows(g), weight)
        if 0 in (N, acc.numel(), x.numel(), g.numel()):
            return
        O, C, K, T = acc.shape[0] // groups, acc.shape[1], math.prod(geometry.kernel), math.prod(geometry.positions)
        sizes, arch, held = (groups, O, C, K, N, T), architecture(acc.device), tiles_held(acc, total)
        direct = groups > 1 and O * C < 16
        if not direct:
            x = channels_last(x, C)
            g = g if T % 16 == 0 and g.is_contiguous() else channels_last(g, O)
        outputs = Outputs(acc, total, sqnorm, flag)
        inputs = Inputs(x, g, scale, weight, offsets, geometry, sizes, direct)

        def trial(choice: Choice) -> None:
            _launch(outputs.zeros(), inputs, choice)

        choices = [direct_config(groups * O * C, K, N, T, arch)] if direct else candidates(*sizes, x.dtype, held, arch)
        key = (*sizes, *geometry, x.dtype, held, precision(x.dtype))
        _launch(outputs, inputs, best("conv_sq_", key, choices, trial, acc.device))


def _launch(outputs: Outputs, inputs: Inputs, choice: Choice) -> None:
    """Sums of squares of shares of the samples, or of gradients that are computed in parts; then both go into acc's order."""
    (acc, total, sqnorm, flag), (x, g, scale, weight, offsets, geometry, sizes, direct) = outputs, inputs
    (G, O, C, K, N, T), (blocks, shares) = sizes, choice
    g, computed = g.flatten(2), torch.promote_types(x.dtype, torch.float32)
    where = ((N, T, G, O, C, C * K), geometry, image_strides(x), g.stride())
    blocks = {"AXES": acc.dim() - 2, **blocks}
    if direct:
        kernel, tiles, parts = _conv_sq_direct_kernel, triton.cdiv(G * O * C, blocks["BLOCK_E"]) * K, 1
    else:
        kernel, tiles = _conv_sq_kernel, G * triton.cdiv(O, blocks["BLOCK_O"]) * triton.cdiv(C * K, blocks["BLOCK_I"])
        blocks["PRECISION"], parts = precision(x.dtype), max(shares // N, 1)
    share = triton.cdiv(N, shares)

    def workspace(out: Tensor) -> Tensor:
        dtype, partial = torch.promote_types(out.dtype, computed), triton.cdiv(N, share) if parts == 1 else 1
        return torch.empty(partial, G * O, K, C, dtype=dtype, device=acc.device)

    squares, sums = workspace(acc), None if total is None else workspace(total)
    if parts > 1:
        products = torch.empty(N, parts, acc.numel(), device=acc.device, dtype=computed)
        _conv_part_kernel[(tiles, shares)](products, x, g, offsets, flag, *where, parts, **blocks)
        square_parts_(squares, sums, sqnorm, products, weight, 1.0, flag, known=False)
    else:
        norms = None if sqnorm is None else torch.empty(tiles, N, device=acc.device, dtype=computed)
        arguments = (squares, sums, norms, x, g, weight, offsets, flag)
        kernel[(tiles, triton.cdiv(N, share))](*arguments, *where, share, fold_size(share), **blocks)
        if norms is not None:
            fold_(sqnorm, norms, 1.0, flag)
    _fold_columns_(acc, squares, scale, flag)
    if total is not None and sums is not None:
        _fold_columns_(total, sums, 1.0, flag)
