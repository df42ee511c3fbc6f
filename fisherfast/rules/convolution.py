# SPDX-License-Identifier: Apache-2.0
"""The form of a kernel that is slid over images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfast.ops import _conv as conv
from fisherfast.ops.conv_sq import conv_sq_
from fisherfast.rules.forms import Form
from fisherfast.rules.rows import Images, Rows, merged


@dataclass(frozen=True)
class Convolution(Form):
    """A kernel that is slid over an image, one entry of the geometry per axis; ``transposed``: its weight is ``[I, O, *K]``."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    op = "conv_sq_"

    @property
    def features(self) -> int:
        """See ``Form``: channels and the axes of an image."""
        return 1 + len(self.stride)

    def rows(self, g: Tensor, inputs: tuple[Tensor, ...]) -> Rows:
        """See ``Form``."""
        (x,) = inputs
        return Rows(x if x.dtype == g.dtype else x.to(g.dtype), g)

    def oriented(self, rows: Rows) -> Rows:
        """See ``Form``; samples of one image each lose their second axis."""
        if rows.offsets is None:
            rows = rows.each(lambda images: images[:, 0]) if rows.g.shape[1] == 1 else rows.packed()
        x, g = rows.inputs, rows.g
        return Rows(g, x, rows.offsets) if self.transposed else rows

    def joined(self, uses: list[Rows]) -> Rows:
        """See ``Form``: several images a sample, brought to one size by zeros, which add nothing to a gradient."""
        xs, gs = [use.x for use in uses if use.x is not None], [use.g for use in uses]
        several = len({g.shape[2:] for g in gs}) > 1
        xs, gs = _one_size(xs), _one_size(gs)
        packed = [
            Rows(x, g, torch.arange(len(g) + 1, device=g.device) if use.offsets is None else use.offsets)
            for x, g, use in zip(xs, gs, uses, strict=True)
        ]
        return merged(packed)._replace(uses=tuple(uses) if several else ())

    def flops(self, rows: Rows, shape: tuple[int, ...]) -> int:
        """See ``Form``."""
        return 2 * rows.g.numel() * math.prod(shape[1:])

    def images(self, rows: Rows, shape: tuple[int, ...]) -> Images | None:
        """See ``Form``."""
        if rows.offsets is not None or self.groups != 1:
            return None
        return Images(rows.inputs, rows.g, tuple(shape[2:]), self.stride, self.padding, self.dilation)

    def accumulate(self, acc: Tensor, rows: Rows, scale: float, **outputs: Tensor | None) -> None:
        """See ``Form``."""
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        conv_sq_(acc, rows.inputs, rows.g, scale, offsets=rows.offsets, **outputs, **geometry)

    def framed(self, rows: Rows, kernel: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """The images, and the padding by which torch's convolution, which pads both ends alike, has the positions of g."""
        x, padding = rows.inputs, self.padding
        if conv.positions(x.shape[2:], kernel, (), self.stride, padding, self.dilation) != rows.g.shape[2:]:
            x = conv.framed(x, rows.g.shape[2:], kernel, self.stride, padding, self.dilation)
            padding = (0,) * len(kernel)
        return x, padding

    def patches(self, rows: Rows, kernel: tuple[int, ...]) -> Tensor:
        """What the kernel sees of every image at every position, ``[images, positions, C * prod(kernel)]``: unfolded, for few rows."""
        return self._met(rows, kernel).flatten(1, 1 + len(kernel)).flatten(2).mT

    def patch_sums(self, rows: Rows, kernel: tuple[int, ...]) -> Tensor:
        """The sum of an image's patches ``[images, C * prod(kernel)]``: for each offset in the kernel that of the pixels it meets."""
        met = self._met(rows, kernel)
        return met.sum(tuple(range(met.dim() - len(kernel), met.dim()))).flatten(1)

    def _met(self, rows: Rows, kernel: tuple[int, ...]) -> Tensor:
        """The pixel that each entry of the kernel meets at each position, ``[images, C, *kernel, *positions]``: a view of the framed images."""
        positions = rows.g.shape[2:]
        frames = conv.framed(rows.inputs, positions, kernel, self.stride, self.padding, self.dilation)
        return conv.patches(frames, positions, kernel, self.stride, self.dilation)

    def gradients(self, rows: Rows, shape: tuple[int, ...]) -> Tensor:
        """See ``Form``."""
        found = rows.g.new_empty(rows.num_samples, *shape)
        for sample, gradient in zip(found, self.each_gradient(rows, shape), strict=True):
            sample.copy_(gradient)
        return found

    def each_gradient(self, rows: Rows, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """The sample gradients, one by one: torch has no others."""
        x, padding = self.framed(rows, shape[2:])
        bounds = range(len(x) + 1) if rows.offsets is None else rows.offsets.tolist()
        for a, b in pairwise(bounds):
            yield conv.weight_gradient(x[a:b], rows.g[a:b], shape, self.stride, padding, self.dilation, self.groups)


def _one_size(images: list[Tensor]) -> list[Tensor]:
    largest = [max(sizes) for sizes in zip(*(image.shape[2:] for image in images), strict=True)]
    return [
        F.pad(image, [n for now, size in zip(reversed(image.shape[2:]), reversed(largest), strict=True) for n in (0, size - now)])
        for image in images
    ]
