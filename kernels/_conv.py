# SPDX-License-Identifier: Apache-2.0
"""Patches read in place: a convolution's geometry over three axes, the layout of its images, and where they are looked at."""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._common import long, power_of_two


class Geometry(NamedTuple):
    """A convolution over three axes; those that are not there come first, with extent 1."""

    positions: tuple[int, int, int]
    extents: tuple[int, int, int]
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]


def geometry_of(x: Tensor, kernel=(), positions=(), stride=(), padding=(), dilation=()) -> Geometry:
    """The geometry of a call over three axes, absent options filled in."""
    S = x.shape[2:]
    axes = len(S)
    kernel, stride, padding, dilation = (
        tuple(v) or (absent,) * axes for v, absent in ((kernel, 1), (stride, 1), (padding, 0), (dilation, 1))
    )
    each = zip(S, kernel, stride, padding, dilation, strict=True)
    positions = tuple(positions) or tuple(max(0, (s + 2 * b - d * (k - 1) - 1) // step + 1) for s, k, step, b, d in each)

    def padded(values, absent: int) -> tuple[int, int, int]:
        a, b, c = (absent,) * (3 - axes) + tuple(values)
        return a, b, c

    return Geometry(
        padded(positions, 1), padded(S, 1), padded(kernel, 1), padded(stride, 1), padded(padding, 0), padded(dilation, 1)
    )


def largest_index(geometry: Geometry) -> int:
    """A bound of what kernels compute with in 32 bits: positions, extents, and coordinates, those outside too."""
    positions, extents, kernel, stride, padding, dilation = geometry
    coordinate = max(stride) * max(positions) + max(dilation) * max(kernel) + max(map(abs, padding))
    return max(math.prod(positions), *extents, coordinate)


def image_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of ``[N, C, *S]`` over three axes."""
    return (*tensor.stride()[:2], *(0,) * (5 - tensor.dim()), *tensor.stride()[2:])


def block(extent: int, largest: int) -> int:
    """Side of a tile: the largest power of two, unless half of it leaves at least a fifth fewer cells empty; pure."""
    size = power_of_two(extent, 16, largest)
    while size > 32 and 4 * triton.cdiv(extent, size) > 5 * triton.cdiv(extent, size // 2) / 2:
        size //= 2
    return size


def as_rows(tensor: Tensor) -> Tensor:
    """The same values with at most three axes, without a copy where channels are first or last in dense memory."""
    last = tensor.movedim(1, -1)
    return last if last.is_contiguous() else tensor.flatten(2)


def channels_last(tensor: Tensor, channels: int) -> Tensor:
    """16-bit values in a layout that is copied asynchronously, which takes aligned neighbours: 4 bytes at least."""
    if tensor.element_size() > 2 or channels % 16 or tensor.stride(1) == 1:
        return tensor
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


@triton.jit
def digits(i, extents):
    """The coordinates of flat index ``i``."""
    rest = i // extents[2]
    return rest // extents[1], rest % extents[1], i % extents[2]


@triton.jit
def kernel_offset(k, geometry):
    """Where kernel offset(s) ``k`` look from position 0: ``k dilation - padding`` per axis."""
    _, _, K, _, padding, dilation = geometry
    k0, k1, k2 = digits(k, K)
    return k0 * dilation[0] - padding[0], k1 * dilation[1] - padding[1], k2 * dilation[2] - padding[2]


@triton.jit
def look(p0, p1, p2, at0, at1, at2, geometry, x_strides, AXES: tl.constexpr):
    """Offset of position(s) p from that of position 0, and whether p looks inside x; only the second depends on ``at``."""
    _, S, _, stride, _, _ = geometry
    s2 = p2 * stride[2]
    offset = long(s2) * x_strides[4]
    inside = (s2 + at2 >= 0) & (s2 + at2 < S[2])
    if AXES > 1:
        s1 = p1 * stride[1]
        offset += long(s1) * x_strides[3]
        inside = inside & (s1 + at1 >= 0) & (s1 + at1 < S[1])
    if AXES > 2:
        s0 = p0 * stride[0]
        offset += long(s0) * x_strides[2]
        inside = inside & (s0 + at0 >= 0) & (s0 + at0 < S[0])
    return offset, inside


@triton.jit
def advance(p0, p1, p2, step, P, AXES: tl.constexpr):
    """The coordinates ``step`` positions on: digits added with carry, since a division costs more than the load."""
    d0, d1, d2 = digits(step, P)
    if AXES == 1:
        return p0, p1, p2 + step
    else:
        p2 += d2
        p1 += tl.where(p2 >= P[2], d1 + 1, d1)
        p2 = tl.where(p2 >= P[2], p2 - P[2], p2)
        if AXES == 3:
            p0 += tl.where(p1 >= P[1], d0 + 1, d0)
            p1 = tl.where(p1 >= P[1], p1 - P[1], p1)
        return p0, p1, p2
