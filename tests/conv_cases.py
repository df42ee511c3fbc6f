# SPDX-License-Identifier: Apache-2.0
"""Calls of ``conv_sq_``: geometries of one to three axes, inputs, memory layouts and answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from gate import product_in
from op_cases import Problem, Target, draw, sliced, strided, transposed
from targets import DEVICES

from fisherfast import _backend

OP = "conv_sq_"
TARGETS = [Target(OP, backend, device) for device in DEVICES for backend in _backend.OPS[OP].usable(device)]
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
every_target = pytest.mark.parametrize("target", TARGETS, ids=str)


class Geometry(NamedTuple):
    """N images of C channels; one integer per axis: input, kernel, stride, zeros before and after, dilation."""

    N: int
    C: int
    O: int
    S: tuple[int, ...]
    K: tuple[int, ...]
    stride: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def axes(self) -> list[tuple[int, ...]]:
        """Of each axis (S, K, stride, before, after, dilation)."""
        absent = {"stride": 1, "before": 0, "after": 0, "dilation": 1}
        return list(zip(self.S, self.K, *(getattr(self, k) or (v,) * len(self.S) for k, v in absent.items()), strict=True))

    @property
    def P(self) -> tuple[int, ...]:
        return tuple(max(0, (s + b + a - d * (k - 1) - 1) // stride + 1) for s, k, stride, b, a, d in self.axes)

    @property
    def parameter(self) -> tuple[int, ...]:
        return (self.O, self.C // self.groups, *self.K)

    @property
    def frame(self) -> list[int]:
        """What to add before and after every axis so that exactly the pixels remain that the positions reach."""
        reach = [(p - 1) * stride + (k - 1) * d + 1 for p, (_, k, stride, _, _, d) in zip(self.P, self.axes, strict=True)]
        pairs = [(b, r - b - s) for r, (s, _, _, b, _, _) in zip(reach, self.axes, strict=True)]
        return [value for pair in reversed(pairs) for value in pair]

    def __str__(self) -> str:
        lists = [name + "x".join(map(str, getattr(self, name))) for name in ("S", "K", "stride", "before", "after", "dilation")]
        named = [
            part for part, name in zip(lists, ("S", "K", "stride", "before", "after", "dilation"), strict=True) if part != name
        ]
        return "-".join(
            [f"N{self.N}", f"C{self.C}", f"O{self.O}", *named, *([f"groups{self.groups}"] if self.groups > 1 else [])]
        )


@dataclass(frozen=True)
class ConvProblem(Problem):
    geometry: Geometry = field(kw_only=True)

    @property
    def parameter(self) -> tuple[int, ...]:
        return self.geometry.parameter

    @property
    def keywords(self) -> dict:
        shape = self.geometry
        options = {"stride": shape.stride, "padding": shape.before, "dilation": shape.dilation, "groups": shape.groups}
        return {"weight": self.weight, "offsets": self.offsets, **options}

    def _gradient(self, piece, dtype: torch.dtype) -> torch.Tensor:
        images = slice(piece, piece + 1) if isinstance(piece, int) else piece
        x, g = self.first[images], self.g[images]
        if x.numel() == 0 or g.numel() == 0:
            return torch.zeros(self.parameter, dtype=dtype, device=g.device)
        grown = F.pad(x, [max(side, 0) for side in self.geometry.frame])
        framed = F.pad(grown, [min(side, 0) for side in self.geometry.frame])
        return self._by_autograd(framed.double(), g.double()) if dtype == torch.float64 else self._by_product(framed, g)

    def _by_autograd(self, framed: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        shape = self.geometry
        weight = torch.zeros(self.parameter, dtype=g.dtype, device=g.device, requires_grad=True)
        stride, dilation = zip(*((a[2], a[5]) for a in shape.axes), strict=True)
        out = CONVOLUTIONS[len(shape.S)](framed, weight, None, stride, 0, dilation, shape.groups)
        (gradient,) = torch.autograd.grad(out, weight, g)
        return gradient

    def _by_product(self, framed: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        shape, groups = self.geometry, self.geometry.groups
        framed = framed.contiguous()
        steps = framed.stride()
        size = (len(framed), groups, shape.C // groups, *shape.K, *shape.P)
        lead = (steps[0], shape.C // groups * steps[1], steps[1])
        along_kernel = [s * a[5] for s, a in zip(steps[2:], shape.axes, strict=True)]
        along_positions = [s * a[2] for s, a in zip(steps[2:], shape.axes, strict=True)]
        patches = framed.as_strided(size, (*lead, *along_kernel, *along_positions)).flatten(3 + len(shape.K)).flatten(3, -2)
        outputs = g.reshape(len(g), groups, shape.O // groups, -1).permute(1, 2, 0, 3).flatten(2)
        inputs = patches.permute(1, 0, 4, 2, 3).flatten(3).flatten(1, 2)
        return product_in(torch.float32, outputs, inputs).reshape(self.parameter)


BASIC = Geometry(3, 4, 6, (5, 7), (3, 2), (1, 2), (1, 0), (1, 1))
SHAPES = [
    BASIC,
    Geometry(2, 3, 5, (1,), (1,)),
    Geometry(13, 7, 11, (2, 2), (2, 2)),
    Geometry(2, 17, 24, (6, 5), (3, 3), before=(1, 1), after=(1, 1)),
    Geometry(2, 33, 9, (4, 4), (1, 1), (2, 2)),
    Geometry(3, 2, 3, (157,), (5,), (1,), (4,), (0,)),
    Geometry(2, 3, 4, (4, 3, 5), (2, 3, 2), before=(1, 1, 0), after=(0, 1, 1)),
    Geometry(2, 24, 24, (6, 6), (3, 3), before=(1, 1), after=(1, 1), groups=24),
    Geometry(2, 12, 8, (5, 5), (3, 3), dilation=(2, 1), before=(2, 1), after=(2, 1), groups=4),
    Geometry(37, 2, 3, (4,), (3,)),
]


def problem(
    target: Target,
    shape: Geometry = BASIC,
    dtype: torch.dtype = torch.float32,
    *,
    integers=False,
    ragged=False,
    weighted=False,
    **more,
) -> ConvProblem:
    images = [0 if n == 1 else 1 + n % 3 for n in range(shape.N)] if ragged else [1] * shape.N
    reach = 2 if math.prod(shape.P) * max(images, default=1) < 40 else 1  # keeps sums of squares of integers below 2^24
    values = partial(draw, target, dtype, reach if integers else None)
    x, g = values(sum(images), shape.C, *shape.S), values(sum(images), shape.O, *shape.P)
    weight = torch.randint(0, 3, (shape.N,)).float() if integers else torch.rand(shape.N)
    offsets = torch.tensor([0, *images]).cumsum(0).to(target.device) if ragged else None
    weight = weight.to(target.device) if weighted else None
    return ConvProblem(OP, x, g, shape.O, weight=weight, offsets=offsets, geometry=shape, **more)


def channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def same_everywhere(t: torch.Tensor) -> torch.Tensor:
    """Stride 0 along the last axis."""
    return t[..., :1].expand(t.shape)


def same_channels(t: torch.Tensor) -> torch.Tensor:
    return t[:, :1].expand(t.shape)


LAYOUTS = [channels_last, transposed, sliced, strided, same_everywhere, same_channels]
