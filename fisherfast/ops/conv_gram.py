# SPDX-License-Identifier: Apache-2.0
"""``conv_gram_``: the Gram matrix of a convolution's patches, KFAC's input factor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fisherfast import _backend
from fisherfast._precision import wide
from fisherfast.ops import _common as common
from fisherfast.ops import _conv as conv

_SCHEMA = (
    "conv_gram_(Tensor(a!) acc, Tensor x, float scale=1.0, *, Tensor? weight=None, bool bias=False, Tensor(b!)? flag=None, "
    "int[] kernel=[], int[] positions=[], int[] stride=[], int[] padding=[], int[] dilation=[], int groups=1) -> ()"
)


def _check(
    acc, x, scale=1.0, *, weight=None, bias=False, flag=None,
    kernel=(), positions=(), stride=(), padding=(), dilation=(), groups=1,
) -> None:  # fmt: skip
    name = "conv_gram_"
    axes = x.dim() - 2
    common.require(
        1 <= axes <= 3, lambda: f"{name}: x must be [N, C, *S] with 1 to 3 axes after the channels, got {common.shape(x)}"
    )
    common.check_dtype(name, "x", x, common.INPUT_DTYPES)
    given = {"kernel": kernel, "positions": positions, "stride": stride, "padding": padding, "dilation": dilation}
    common.require(
        all(len(values) in (0, axes) for values in given.values())
        and min((*kernel, *stride, *dilation, 1)) >= 1
        and min((*positions, 0)) >= 0,
        lambda: (
            f"{name}: kernel, positions, stride, padding and dilation must be empty or one integer per axis ({axes}), kernel, "
            f"stride and dilation >= 1, positions >= 0, got {', '.join(f'{k}={list(v)}' for k, v in given.items())}"
        ),
    )
    conv.check_reach(name, stride, padding, dilation)
    N, C = x.shape[:2]
    common.require(groups >= 1 and C % groups == 0, lambda: f"{name}: groups must divide C = {C}, got {groups}")
    D = C // groups * math.prod(kernel) + int(bias)  # a SymInt and a bool have no sum in torch 2.11
    common.check_dtype(name, "acc", acc, common.ACCUMULATOR_DTYPES)
    common.check_shape(name, "acc", acc, "[groups, D, D] with D = C / groups * |K| + bias", (groups, D, D))
    common.check_optional(name, "weight", weight, (torch.float32,), "[N]", (N,))
    common.check_optional(name, "flag", flag, (torch.int32,), "[1]", (1,))
    common.check_devices(name, acc, x=x, weight=weight, flag=flag)


@_backend.op(_SCHEMA, _check)
def conv_gram_(
    acc: Tensor,
    x: Tensor,
    scale: float = 1.0,
    *,
    weight: Tensor | None = None,
    bias: bool = False,
    flag: Tensor | None = None,
    kernel: Sequence[int] = (),
    positions: Sequence[int] = (),
    stride: Sequence[int] = (),
    padding: Sequence[int] = (),
    dilation: Sequence[int] = (),
    groups: int = 1,
) -> None:
    """``acc[i,j] += scale * sum_n w_n sum_p u[n,p,i] u[n,p,j]`` for j >= i, with ``u[n,p,(c,k)] = x[n,c, p stride + k dilation - padding]``.

    Of each group, and x zero outside. Only the upper triangle is added to: entries below the diagonal are neither read
    nor written, as in BLAS syrk. (c, k) is the order of ``weight.flatten(1)``; with ``bias`` a 1 is appended to u. With the
    kernel left out, 1 x 1, it is the Gram matrix over images and positions, as of an output gradient.

    Shapes:   acc [G, D, D] float32 or float64, contiguous, G = groups, D = C / G |K| + bias; x [N, C, *S], 1 to 3 axes, any
              strides, float32, bfloat16, float16 or float64. kernel, positions, stride, padding, dilation: one integer per
              axis, or empty for 1, ``(S + 2 padding - dilation (K - 1) - 1) // stride + 1``, 1, 0, 1. Positions are given
              where what lies after an axis is not what lies before it. Optional: weight [N], flag [1]; their meaning is in
              ``fisherfast.ops._common``.
    Scale:    a sum over n and p, not a mean.
    Errors:   ValueError for shapes, strides, devices or geometry that do not fit; TypeError for dtypes; BackendError when
              a forced backend cannot run the call.
    Numerics: accumulates in float32 (float64 for float64 inputs) in short chains; error at most twice that of the unfolded
              input's float32 product. At most ``N |P| D^2`` FLOPs; the unfolded input is never formed. Repeats bit by bit.
    Source:   Grosse & Martens 2016 (arXiv:1602.01407), the factor Omega of section 3.
    """
    if common.stopped(flag, x, weight):
        return
    axes, D = x.dim() - 2, acc.shape[1]
    kernel = tuple(kernel) or (1,) * axes
    stride, padding, dilation = conv.options(axes, stride, padding, dilation)
    positions = conv.positions(x.shape[2:], kernel, positions, stride, padding, dilation)
    if 0 in positions or D == 0:
        return
    frames = conv.framed(wide(x), positions, kernel, stride, padding, dilation)
    sums = torch.zeros_like(acc, dtype=torch.float64)
    for n, frame in enumerate(frames):
        u = (
            conv.patches(frame, positions, kernel, stride, dilation)
            .unflatten(0, (groups, x.shape[1] // groups))
            .flatten(1, 1 + axes)
            .flatten(2)
        )
        if bias:
            u = torch.cat([u, u.new_ones(groups, 1, u.shape[2])], 1)
        w = 1.0 if weight is None else float(weight[n])
        sums += w * (u @ u.mT).double()
    i, j = torch.triu_indices(D, D, device=acc.device)
    acc[:, i, j] += (scale * sums[:, i, j]).to(acc.dtype)
