# SPDX-License-Identifier: Apache-2.0
"""What the ops of a convolution have in common: absent options, and the part of the input that the positions reach."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fisherfast.ops._common import require


@contextmanager
def float32_convolutions() -> Iterator[None]:
    """Torch's convolutions in full float32 and one order of addition: on a GPU cuDNN multiplies in TF32 unless told not to."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.deterministic
    cudnn.conv.fp32_precision, cudnn.deterministic = "ieee", True
    try:
        yield
    finally:
        cudnn.conv.fp32_precision, cudnn.deterministic = before


def weight_gradient(x: Tensor, g: Tensor, shape: Sequence[int], stride, padding, dilation, groups: int) -> Tensor:
    """The gradient of a weight of that shape, summed over the images; zero of none. Padding is the same at both ends."""
    if len(x) == 0 or math.prod(shape) == 0:
        return g.new_zeros(shape)
    weight, mask = g.new_zeros(()).expand(shape), [False, True, False]
    geometry = (stride, padding, dilation, False, [0] * len(stride), groups)
    with float32_convolutions():
        return torch.ops.aten.convolution_backward(g, x, weight, None, *geometry, mask)[1]


def options(
    axes: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Stride, padding and dilation with one integer per axis: 1, 0 and 1 where they are empty."""
    stride, padding, dilation = (tuple(v) or (d,) * axes for v, d in ((stride, 1), (padding, 0), (dilation, 1)))
    return stride, padding, dilation


def check_reach(op: str, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> None:
    """Raise ValueError for numbers of 2^31 and more: sums of products of them would not fit into 64 bits."""
    require(
        max(map(abs, (*stride, *padding, *dilation, 0))) < 2**31,
        lambda: f"{op}: stride, padding and dilation must be below 2^31, got {list(stride)}, {list(padding)}, {list(dilation)}",
    )


def framed(x: Tensor, positions: Sequence[int], kernel: Sequence[int], stride, padding, dilation) -> Tensor:
    """The input with exactly the border that the positions reach: zeros where it is outside, cut where nothing looks."""
    for axis, before in enumerate(padding, start=2):
        reach = (positions[axis - 2] - 1) * stride[axis - 2] + (kernel[axis - 2] - 1) * dilation[axis - 2] + 1
        first, last = min(max(-before, 0), x.shape[axis]), min(max(reach - before, 0), x.shape[axis])
        inside = x.narrow(axis, first, max(last - first, 0))
        frame = x.new_zeros([*x.shape[:axis], reach, *x.shape[axis + 1 :]])
        if inside.shape[axis]:
            frame.narrow(axis, max(before, 0), inside.shape[axis]).copy_(inside)
        x = frame
    return x


def patches(frames: Tensor, positions: Sequence[int], kernel: Sequence[int], stride, dilation) -> Tensor:
    """The pixel that each entry of the kernel meets at each position, ``[..., *kernel, *positions]`` of framed images: a view."""
    lead = frames.dim() - len(kernel)
    ahead, steps = frames.stride()[:lead], frames.stride()[lead:]
    along_kernel = [step * d for step, d in zip(steps, dilation, strict=True)]
    along_positions = [step * s for step, s in zip(steps, stride, strict=True)]
    return frames.as_strided((*frames.shape[:lead], *kernel, *positions), (*ahead, *along_kernel, *along_positions))


def positions(size: Sequence[int], kernel: Sequence[int], given: Sequence[int], stride, padding, dilation) -> tuple[int, ...]:
    """The output's size: as given, or that of a convolution with as much padding after an axis as before it."""
    axes = zip(size, kernel, stride, padding, dilation, strict=True)
    return tuple(given) or tuple(max(0, (s + 2 * b - d * (k - 1) - 1) // step + 1) for s, k, step, b, d in axes)
