# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of ``linear_sq_``: ``acc[o,i] += scale * sum_n w_n (sum_t g[n,t,o] x[n,t,i])^2``.

The squares kernel is the weight-gradient GEMM: a program owns a tile of ``[O, I]``, walks the samples, runs the GEMM
over t on the matrix units, and squares the tile in registers after each sample. Without positions (T = 1) the sum over
n itself is a GEMM, of squares. The contract is in ``fisherfast.ops.linear_sq``.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    architecture,
    check_offsets,
    device_problem,
    fold_,
    interpreted,
    long,
    power_of_two,
    raise_flag_,
    rows_and_strides,
    sample_rows,
    wide,
)

# Tiles are made smaller until at least this many programs share the work: about one per multiprocessor.
PROGRAMS = 128


def why_not(acc: Tensor, x: Tensor, g: Tensor, scale: float = 1.0, **_: Any) -> str | None:
    """Why this call cannot run under Triton, or None."""
    return device_problem(acc.device)


def config(O: int, I: int, T: int, dtype: torch.dtype, tiles: int, arch: int) -> dict[str, int]:
    """Tile sizes for ``[O, I]`` and a GEMM over T, with ``tiles`` tiles held in registers; a pure function."""
    largest = {torch.float64: 64, torch.float32: 64}.get(dtype, 128)
    BLOCK_O, BLOCK_I = power_of_two(O, 16, largest), power_of_two(I, 16, largest)
    if tiles > 2 or arch // 10 not in (9, 10):  # without warpgroup instructions the operands pass through registers too
        BLOCK_I = min(BLOCK_I, largest // 2)
    while max(BLOCK_O, BLOCK_I) > 32 and triton.cdiv(O, BLOCK_O) * triton.cdiv(I, BLOCK_I) < PROGRAMS:
        if BLOCK_O >= BLOCK_I:
            BLOCK_O //= 2
        else:
            BLOCK_I //= 2
    return {
        "BLOCK_O": BLOCK_O,
        "BLOCK_I": BLOCK_I,
        "BLOCK_T": power_of_two(T, 16, 64 if dtype.itemsize == 2 else 32),
        "num_warps": 8 if BLOCK_O * BLOCK_I >= 64 * 64 else 4,
        "num_stages": 3,
    }


def tiles_held(acc: Tensor, total: Tensor | None) -> int:
    """Tiles in registers: the sample's (or the squared operands), the squares, and what the other outputs add."""
    return 2 + (total is not None) + (acc.dtype == torch.float64)


def fold_size(steps: int) -> int:
    """How many steps one launch adds up in float32 registers before adding them to memory; a pure function.

    A chain of L additions rounds like a random walk, ~ sqrt(L). In K chains of steps / K, then K additions in memory, the
    variance ~ steps / K^2 + K is least at K = (2 steps)^(1/3).
    """
    return steps if steps <= 16 else math.ceil(steps / (2 * steps) ** (1 / 3))


def precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies: float32 is split into three bfloat16, which keeps all its bits, unless TF32 is allowed."""
    if interpreted():
        return "emulated"
    if dtype != torch.float32:
        return "ieee"
    # The older switch, allow_tf32, is reflected here; reading it instead fails once a program has used this one.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "bf16x6"


@triton.jit
def _dot(a, b, c, PRECISION: tl.constexpr):
    if PRECISION == "emulated":  # Triton's interpreter would multiply the bit patterns of bfloat16
        return tl.dot(wide(a), wide(b), c, input_precision="ieee", out_dtype=c.dtype)
    else:
        return tl.dot(a, b, c, input_precision=PRECISION, out_dtype=c.dtype)


@triton.jit
def _add(out, tile, index, inside):
    """``out[index] += tile`` in the precision of ``out``."""
    tl.store(out + index, tl.load(out + index, mask=inside, other=0.0) + tile.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _tile(shape, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    """The rows and columns of ``[O, I]`` that this program owns."""
    tiles_o = tl.cdiv(shape[3], BLOCK_O)
    o = long(tl.program_id(0) % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = long(tl.program_id(0) // tiles_o) * BLOCK_I + tl.arange(0, BLOCK_I)
    return o, i


@triton.jit
def _sample_gradient(x, g, T, x_stride_t, g_stride_t, inside_o, inside_i, c, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr):
    """``c + g^T x`` over the T rows of one sample; ``x`` [1, BLOCK_I] and ``g`` [BLOCK_O, 1] point at its first row."""
    for start in range(0, T, BLOCK_T):
        t = long(start) + tl.arange(0, BLOCK_T)
        gs = tl.load(g + t[None, :] * g_stride_t, mask=inside_o & (t < T)[None, :], other=0.0)  # [BLOCK_O, BLOCK_T]
        xs = tl.load(x + t[:, None] * x_stride_t, mask=inside_i & (t < T)[:, None], other=0.0)  # [BLOCK_T, BLOCK_I]
        c = _dot(gs, xs, c, PRECISION)
    return c


@triton.jit(do_not_specialize=["begin", "end"])
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
    begin,
    end,
    scale: tl.float64,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc += scale * sum_n w_n c_n^2``, ``total += sum_n w_n c_n``, ``norms[tile, n] = sum c_n^2``; ``c_n = g_n^T x_n``.

    The sums are over samples ``begin`` to ``end``; a long sum takes several launches, see ``fold_size``.

    Tile:  [BLOCK_O, BLOCK_I] of [O, I] a program; c_n, the sum of squares and (if asked) the sum stay in registers.
    FLOPs: 2 N T I O. Bytes: x read O / BLOCK_O times and g I / BLOCK_I times, mostly from L2; acc and total read and
           written once a launch.
    """
    if flag is not None:
        if tl.load(flag) != 0:
            return
    N, T, I, O = shape
    o, i = _tile(shape, BLOCK_O, BLOCK_I)
    inside_o, inside_i = (o < O)[:, None], (i < I)[None, :]
    zero = tl.zeros([BLOCK_O, BLOCK_I], tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
    squares = zero
    sums = zero
    for n in range(begin, end):
        first, rows = sample_rows(offsets, long(n), T)
        x_n = x + long(n) * x_strides[0] + first * x_strides[1] + i[None, :] * x_strides[2]
        g_n = g + long(n) * g_strides[0] + first * g_strides[1] + o[:, None] * g_strides[2]
        c = _sample_gradient(x_n, g_n, rows, x_strides[1], g_strides[1], inside_o, inside_i, zero, BLOCK_T, PRECISION)
        if norms is not None:
            tl.store(norms + long(tl.program_id(0)) * N + n, tl.sum(c * c))
        w = 1.0
        if weight is not None:
            w = tl.load(weight + n)
        squares += c * c * w
        if total is not None:
            sums += c * w
    index = o[:, None] * I + i[None, :]
    _add(acc, squares * scale, index, inside_o & inside_i)
    if total is not None:
        _add(total, sums, index, inside_o & inside_i)


@triton.jit(do_not_specialize=["begin", "end"])
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
    begin,
    end,
    scale: tl.float64,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """T = 1: ``acc += scale * (w g^2)^T x^2`` and ``total += (w g)^T x``, GEMMs over n; squares are formed in float32.

    Tile:  [BLOCK_O, BLOCK_I] of [O, I] a program, BLOCK_T samples a step.
    FLOPs: 2 N I O, and as many again for total. Bytes: as ``_linear_sq_kernel``.
    """
    if flag is not None:
        if tl.load(flag) != 0:
            return
    _, _, I, O = shape
    o, i = _tile(shape, BLOCK_O, BLOCK_I)
    inside_o, inside_i = (o < O)[:, None], (i < I)[None, :]
    zero = tl.zeros([BLOCK_O, BLOCK_I], tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
    squares = zero
    sums = zero
    for start in range(begin, end, BLOCK_T):
        n = long(start) + tl.arange(0, BLOCK_T)
        gs = wide(
            tl.load(g + n[None, :] * g_strides[0] + o[:, None] * g_strides[2], mask=inside_o & (n < end)[None, :], other=0.0)
        )
        xs = wide(
            tl.load(x + n[:, None] * x_strides[0] + i[None, :] * x_strides[2], mask=inside_i & (n < end)[:, None], other=0.0)
        )
        weighted = gs
        if weight is not None:
            weighted = gs * tl.load(weight + n, mask=n < end, other=0.0)[None, :]
        squares = _dot(gs * weighted, xs * xs, squares, PRECISION)
        if total is not None:
            sums = _dot(weighted, xs, sums, PRECISION)
    index = o[:, None] * I + i[None, :]
    _add(acc, squares * scale, index, inside_o & inside_i)
    if total is not None:
        _add(total, sums, index, inside_o & inside_i)


@triton.jit
def _flat_norms_kernel(sqnorm, x, g, flag, shape, x_strides, g_strides, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """T = 1: ``sqnorm[n] += |g_n|^2 |x_n|^2``, x and g read once. One program: BLOCK_N samples."""
    if flag is not None:
        if tl.load(flag) != 0:
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
    squares = tl.zeros([BLOCK_N, BLOCK_C], tl.float64 if rows.dtype.element_ty == tl.float64 else tl.float32)
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
        if T == 1 and offsets is None:
            _launch_flat(acc, x, g, scale, weight, total, sqnorm, flag, sizes)
        else:
            _launch(acc, x, g, scale, weight, offsets, total, sqnorm, flag, sizes)


def _launch(acc, x, g, scale, weight, offsets, total, sqnorm, flag, sizes) -> None:
    N, T, I, O = sizes[0]
    blocks = config(O, I, T, x.dtype, tiles_held(acc, total), architecture(acc.device))
    tiles = triton.cdiv(O, blocks["BLOCK_O"]) * triton.cdiv(I, blocks["BLOCK_I"])
    norms = None
    if sqnorm is not None:
        norms = torch.empty(tiles, N, device=acc.device, dtype=torch.promote_types(x.dtype, torch.float32))
    fold = fold_size(N)
    for begin in range(0, N, fold):
        end = min(begin + fold, N)
        _linear_sq_kernel[(tiles,)](
            acc, total, norms, x, g, weight, offsets, flag, *sizes, begin, end, scale, PRECISION=precision(x.dtype), **blocks
        )
    if norms is not None:
        fold_(sqnorm, norms, 1.0, flag)


def _launch_flat(acc, x, g, scale, weight, total, sqnorm, flag, sizes) -> None:
    N, _, I, O = sizes[0]
    computed = torch.promote_types(x.dtype, torch.float32)
    blocks = config(O, I, N, computed, tiles_held(acc, total), architecture(acc.device))
    tiles = triton.cdiv(O, blocks["BLOCK_O"]) * triton.cdiv(I, blocks["BLOCK_I"])
    fold = fold_size(triton.cdiv(N, blocks["BLOCK_T"])) * blocks["BLOCK_T"]
    for begin in range(0, N, fold):
        end = min(begin + fold, N)
        _linear_sq_flat_kernel[(tiles,)](
            acc, total, x, g, weight, flag, *sizes, begin, end, scale, PRECISION=precision(computed), **blocks
        )
    if sqnorm is not None:
        _flat_norms_kernel[(triton.cdiv(N, 16),)](sqnorm, x, g, flag, *sizes, BLOCK_N=16, BLOCK_C=128)
