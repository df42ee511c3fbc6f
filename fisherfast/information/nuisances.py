# SPDX-License-Identifier: Apache-2.0
"""Nuisances: ways in which an input may change that a task does not care about, as tangents ``dx/dtheta``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from fisherfast import _checks

IMAGE_NUISANCES = ("shift x", "shift y", "rotation", "brightness", "contrast")

Nuisance = Tensor | Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def image_tangents(
    x: Tensor, names: Sequence[str] = IMAGE_NUISANCES, *, shape: tuple[int, int, int] | None = None
) -> dict[str, Tensor]:
    """``dx/dtheta`` of images, ``{name: tensor like x}``: how they change with a shift, a rotation, brightness, contrast.

    ``"shift x"``, ``"shift y"`` by pixels to the right and down; ``"rotation"`` about the middle, by radians, x towards y;
    ``"brightness"`` adds to every pixel; ``"contrast"`` stretches pixels away from the image's mean, by a fraction of it.

    Shapes:   x ``[N, C, H, W]``, or ``[N, ...]`` of C H W numbers with ``shape=(C, H, W)``.
    Scale:    the pixel's units per pixel, radian, unit of brightness and fraction.
    Errors:   ValueError for a shape or a name that does not fit.
    Numerics: shifts and rotation by central differences of bilinear interpolation, a pixel each way (a rotation: a pixel at
              the middle of the far edge); outside the image is 0.
    Source:   tangent vectors of Simard et al. 1992, "Tangent Prop".
    """
    if not x.is_floating_point():
        raise ValueError(f"image_tangents: x must be floating, got {x.dtype}; convert the images as the model takes them")
    if shape is None and x.dim() != 4:
        raise ValueError(f"image_tangents: x must be [N, C, H, W], got {tuple(x.shape)}; pass shape=(C, H, W) for flat images")
    sizes = tuple(x.shape[1:]) if shape is None else tuple(shape)
    if len(sizes) != 3 or min(sizes) < 1 or not x.numel() or x.numel() != len(x) * math.prod(sizes):
        raise ValueError(f"image_tangents: x must hold images of shape {sizes}, got {tuple(x.shape)}")
    if not names or not set(names) <= set(IMAGE_NUISANCES):
        raise ValueError(f"image_tangents: names must be among {list(IMAGE_NUISANCES)}, got {list(names)}")
    images = x.detach().reshape(-1, *sizes)
    turn = 2 / max(sizes[1:])
    made = {
        "shift x": lambda: (_moved(images, right=1) - _moved(images, right=-1)) / 2,
        "shift y": lambda: (_moved(images, down=1) - _moved(images, down=-1)) / 2,
        "rotation": lambda: (_moved(images, turn=turn) - _moved(images, turn=-turn)) / (2 * turn),
        "brightness": lambda: torch.ones_like(images),
        "contrast": lambda: images - images.mean((1, 2, 3), keepdim=True),
    }
    return {name: made[name]().reshape(x.shape) for name in names}


def _moved(images: Tensor, right: float = 0.0, down: float = 0.0, turn: float = 0.0) -> Tensor:
    """The images shifted by pixels and turned by radians."""
    height, width = images.shape[2:]
    cos, sin = math.cos(turn), math.sin(turn)
    # Where each pixel comes from, in grid_sample's units, in which half the image is 1 on both axes.
    rows = [[cos, sin * height / width, -2 * right / width], [-sin * width / height, cos, -2 * down / height]]
    matrix = torch.tensor(rows, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
    grid = affine_grid(matrix, list(images.shape), align_corners=False)
    return grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def tangents(caller: str, x: Tensor, along: Mapping[str, Nuisance]) -> list[Tensor]:
    """For each sample its tangents ``[q, input]`` float64, from tensors like x and from functions ``(x, amount) -> x``."""
    if not isinstance(along, Mapping) or not along:
        raise ValueError(f"{caller}: along must be {{name: tangent or function}}, at least one, got {along!r}")
    directions = []
    for name, nuisance in along.items():
        moved, tangent = _derivative(nuisance, x) if callable(nuisance) else (x, nuisance)
        if not isinstance(tangent, Tensor) or tangent.shape != x.shape:
            got = tuple(tangent.shape) if isinstance(tangent, Tensor) else type(tangent).__name__
            raise ValueError(f"{caller}: along[{name!r}] must be, or give, a tensor {tuple(x.shape)} like x, got {got}")
        _checks.real(caller, f"along[{name!r}]", tangent)
        if not torch.allclose(moved.to(x), x, rtol=1e-3, atol=1e-3 * float(x.abs().max())):
            raise ValueError(f"{caller}: along[{name!r}] must move nothing at amount 0, got a function that moves x there")
        if not bool(tangent.isfinite().all()):
            raise ValueError(f"{caller}: along[{name!r}] must be finite, got NaN or infinity")
        directions.append(tangent.detach().double().flatten(1))
    return list(torch.stack(directions, 1))


def _derivative(move: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """``move(x, a)`` and its derivative by a, at ``a = 0``, where nothing has moved."""
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    moved, tangent = torch.func.jvp(lambda amount: move(x, amount), (zero,), (torch.ones_like(zero),))[:2]
    return moved, tangent
