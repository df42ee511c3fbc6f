# SPDX-License-Identifier: Apache-2.0
"""What the kernels share: the GPUs they run on, reading a sample's rows, the non-finite flag, and adding partial results.

No kernel uses a floating-point atomic: partial results go to a workspace and are added by ``fold_`` in a fixed order, so
results repeat bit by bit. Nothing here waits for the device.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

# Enough programs for a few on each multiprocessor of a large GPU.
PROGRAMS = 1024


def interpreted() -> bool:
    """Whether Triton emulates the kernels on the CPU (``TRITON_INTERPRET=1``)."""
    return bool(knobs.runtime.interpret)


@functools.cache
def architecture(device: torch.device) -> Any:
    """80 (Ampere), 90 (Hopper), 100 (Blackwell); a name where the GPU is not NVIDIA's. Emulation takes Hopper's tiles."""
    if interpreted():
        return 90
    with torch.cuda.device(device if device.type == "cuda" else -1):
        return driver.active.get_current_target().arch


def has_warpgroups(arch: int) -> bool:
    """Whether products have instructions of a warpgroup, whose operands do not pass through registers; a pure function."""
    return arch // 10 in (9, 10)


def device_problem(device: torch.device) -> str | None:
    """Why the kernels cannot run on ``device``, or None."""
    found = architecture(device)
    if isinstance(found, str) or found < 80:
        return f"the Triton kernels need an NVIDIA GPU of compute capability 8.0 or newer, got {found}"
    return None


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two not below ``n``, kept between ``low`` and ``high``."""
    return max(low, min(high, triton.next_power_of_2(max(n, 1))))


def rows_and_strides(tensor: Tensor, offsets: Tensor | None) -> tuple[int, ...]:
    """Strides of ``[N, T, C]``; of packed ``[M, C]`` with 0 for the axis of samples, whose rows the offsets name."""
    return tensor.stride() if offsets is None else (0, *tensor.stride())


def check_offsets(offsets: Tensor | None, rows: int) -> None:
    """Assert, on the device and without waiting for it, that the offsets rise from 0 to ``rows``."""
    if offsets is not None:
        covers = (offsets[0] == 0) & (offsets[-1] == rows) & (offsets.diff() >= 0).all()
        torch._assert_async(covers, f"offsets: must rise from 0 to M = {rows}")


@triton.jit
def long(i):
    """``i`` as a 64-bit scalar: addresses of large tensors do not fit in 32."""
    return tl.full((), 0, tl.int64) + i


@triton.jit
def is_raised(flag):
    """Whether there is a flag and it is set."""
    if flag is None:
        return False
    else:
        return tl.load(flag) != 0


@triton.jit
def zero_sums(shape, pointer):
    """Where sums of the values at ``pointer`` begin: zeros in float32, or in float64 if they are."""
    if pointer.dtype.element_ty == tl.float64:
        return tl.zeros(shape, tl.float64)
    else:
        return tl.zeros(shape, tl.float32)


@triton.jit
def wide(values):
    """16-bit values as float32: products and squares are never formed in 16 bits."""
    if values.dtype.primitive_bitwidth < 32:
        return values.to(tl.float32)
    else:
        return values


@triton.jit
def add_to(out, index, values, scale, inside, known=True):
    """``out[index] += scale * values`` in the precision of ``out``, whose content counts as 0 where ``known`` is false."""
    before = tl.load(out + index, mask=inside & known, other=0.0)
    tl.store(out + index, before + values.to(before.dtype) * tl.full((), scale, before.dtype), mask=inside)


@triton.jit
def add_both(acc, total, index, squares, sums, scale, inside, known=True):
    """``acc[index] += scale * squares`` and, where there is a total, ``total[index] += sums``; otherwise as ``add_to``."""
    add_to(acc, index, squares, scale, inside, known)
    if total is not None:
        add_to(total, index, sums, 1.0, inside, known)


@triton.jit
def sample_rows(offsets, n, T):
    """First packed row of sample(s) ``n`` (0 where samples have an axis of their own), and how many there are."""
    if offsets is None:
        return n * 0, n * 0 + T
    else:
        first = tl.load(offsets + n)
        return first, tl.load(offsets + n + 1) - first


@triton.jit
def _raise_flag_kernel(flag, x, shape, strides, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Set ``flag`` if a value of ``x`` [N, T, C] is not finite. One program: [BLOCK_R rows of N T, BLOCK_C columns]."""
    N, T, C = shape
    blocks = tl.cdiv(C, BLOCK_C)
    row = long(tl.program_id(0) // blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = long(tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = row // T * strides[0] + row % T * strides[1]
    inside = (row < long(N) * T)[:, None] & (column < C)[None, :]
    values = wide(tl.load(x + start[:, None] + column[None, :] * strides[2], mask=inside, other=0.0))
    finite = tl.abs(values) < float("inf")  # false for NaN too
    # Every program that stores writes the same 1, so the order does not matter.
    tl.store(flag, 1, mask=tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0)


def raise_flag_(flag: Tensor | None, *inputs: Tensor | None) -> None:
    """Set ``flag`` on the device if any input holds a value that is not finite. Reads each input once."""
    for tensor in inputs if flag is not None else ():
        if tensor is not None and tensor.numel():
            # One long row where the memory allows it: no index arithmetic by row.
            x = tensor.view(1, 1, -1) if tensor.is_contiguous() else tensor[(None,) * (3 - tensor.dim())]
            N, T, C = x.shape
            BLOCK_C = power_of_two(C, 16, 256 if N * T > 1 else 4096)
            BLOCK_R = power_of_two(N * T, 1, 4096 // BLOCK_C)
            grid = (triton.cdiv(N * T, BLOCK_R) * triton.cdiv(C, BLOCK_C),)
            _raise_flag_kernel[grid](flag, x, (N, T, C), x.stride(), BLOCK_R, BLOCK_C)


@triton.jit
def _fold_kernel(out, partial, flag, R, C, scale: tl.float64, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """``out[c] += scale * sum_r partial[r, c]`` unless the flag is set. One program: BLOCK_C columns, all rows."""
    if is_raised(flag):
        return
    column = long(tl.program_id(0)) * BLOCK_C + tl.arange(0, BLOCK_C)
    values = tl.zeros([BLOCK_R, BLOCK_C], partial.dtype.element_ty)
    for r in range(0, R, BLOCK_R):
        row = long(r) + tl.arange(0, BLOCK_R)
        inside = (row < R)[:, None] & (column < C)[None, :]
        values += tl.load(partial + row[:, None] * C + column[None, :], mask=inside, other=0.0)
    before = tl.load(out + column, mask=column < C, other=0.0)
    tl.store(out + column, before + tl.sum(values, 0).to(before.dtype) * scale, mask=column < C)


def fold_(out: Tensor | None, partial: Tensor | None, scale: float, flag: Tensor | None) -> None:
    """``out[c] += scale * sum_r partial[r, c]`` in a fixed order, on the device; nothing while the flag is set, or without out."""
    if out is None or partial is None:
        return
    R, C = partial.shape
    BLOCK_R = power_of_two(R, 1, 256)
    BLOCK_C = power_of_two(C, 16, 4096 // max(BLOCK_R, 4))
    _fold_kernel[(triton.cdiv(C, BLOCK_C),)](out, partial, flag, R, C, scale, BLOCK_R, BLOCK_C)
