# SPDX-License-Identifier: Apache-2.0
"""``ghost_norm_``: squared norms of sample gradients without the gradients, by pairs of positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisherfast import _backend
from fisherfast._precision import wide
from fisherfast.ops import _common as common
from fisherfast.ops import _conv as conv

_SCHEMA = (
    "ghost_norm_(Tensor(a!) sqnorm, Tensor x, Tensor g, *, Tensor(b!)? size=None, Tensor(c!)? flag=None, int[] kernel=[], "
    "int[] stride=[], int[] padding=[], int[] dilation=[]) -> ()"
)


def _check(sqnorm, x, g, *, size=None, flag=None, kernel=(), stride=(), padding=(), dilation=()) -> None:
    name = "ghost_norm_"
    axes = g.dim() - 2
    common.require(1 <= axes <= 3, lambda: f"{name}: g must be [N, O, *P] with 1 to 3 axes of positions, got {common.shape(g)}")
    N = g.shape[0]
    common.require(
        x.dim() == g.dim() and x.shape[0] == N,
        lambda: f"{name}: x must be [N, C, *S] with N = {N} and {axes} axes, got {common.shape(x)}",
    )
    common.check_dtype(name, "g", g, common.INPUT_DTYPES)
    common.require(x.dtype == g.dtype, lambda: f"{name}: x must have g's dtype {g.dtype}, got {x.dtype}", TypeError)
    given = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    common.require(
        all(len(values) in (0, axes) for values in given.values()) and min((*kernel, *stride, *dilation, 1)) >= 1,
        lambda: (
            f"{name}: kernel, stride, padding and dilation must be empty or one integer per axis ({axes}), kernel, stride and "
            f"dilation >= 1, got {', '.join(f'{k}={list(v)}' for k, v in given.items())}"
        ),
    )
    conv.check_reach(name, stride, padding, dilation)
    common.check_dtype(name, "sqnorm", sqnorm, common.ACCUMULATOR_DTYPES)
    common.check_shape(name, "sqnorm", sqnorm, "[N]", (N,))
    common.check_optional(name, "size", size, common.ACCUMULATOR_DTYPES, "[N]", (N,))
    common.check_optional(name, "flag", flag, (torch.int32,), "[1]", (1,))
    common.check_devices(name, sqnorm, x=x, g=g, size=size, flag=flag)


@_backend.op(_SCHEMA, _check)
def ghost_norm_(
    sqnorm: Tensor,
    x: Tensor,
    g: Tensor,
    *,
    size: Tensor | None = None,
    flag: Tensor | None = None,
    kernel: Sequence[int] = (),
    stride: Sequence[int] = (),
    padding: Sequence[int] = (),
    dilation: Sequence[int] = (),
) -> None:
    """``sqnorm[n] += |sum_p g[n,:,p] u[n,p,:]^T|^2 = sum_pq (g[n,:,p] . g[n,:,q]) (u[n,p,:] . u[n,q,:])``, with patches
    ``u[n,p,(c,k)] = x[n,c, p stride + k dilation - padding]``, x zero outside.

    With the kernel left out, 1 x 1, x and g of one size are rows, those of a linear layer at ``[N, T, I]`` passed as ``x.mT``.
    Fewer operations than squaring the gradient where positions are few: ``P^2 (C + O) / 2`` beside ``P O C`` of a linear layer.

    Shapes:   sqnorm [N] float32 or float64; x [N, C, *S], g [N, O, *P], 1 to 3 axes, any strides, of one dtype, float32,
              bfloat16, float16 or float64. kernel, stride, padding, dilation: one integer per axis, or empty for 1, 1, 0, 1.
              Optional: flag [1], see ``fisherfast.ops._common``; size [N], to which the magnitudes of what is added up are added:
              ``sum_pqk |(g[n,:,p] . g[n,:,q]) (u[n,p,(:,k)] . u[n,q,(:,k)])|``.
    Scale:    of each sample's own gradient, unweighted.
    Errors:   ValueError for shapes, strides, devices or geometry that do not fit; TypeError for dtypes; BackendError when
              a forced backend cannot run the call.
    Numerics: dot products in float32 (float64 for float64 inputs) in short chains, their products added up in float64. The terms
              cancel: where size / sqnorm is at most 4, the error is at most twice that of the gradient formed and squared in
              float32; beyond, form the gradient (``linear_sq_``, ``conv_sq_``). Repeats bit by bit.
    Source:   Li et al. 2022 (arXiv:2110.05679), section 4; of convolutions Bu et al. 2022 (arXiv:2205.10683), there unfolded.
    """
    if common.stopped(flag, g, x):
        return
    if g.numel() == 0 or x.numel() == 0:
        return
    axes = g.dim() - 2
    kernel = tuple(kernel) or (1,) * axes
    stride, padding, dilation = conv.options(axes, stride, padding, dilation)
    frames = conv.framed(wide(x), g.shape[2:], kernel, stride, padding, dilation)
    for n, (frame, rows) in enumerate(zip(frames, wide(g).flatten(2), strict=True)):
        met = conv.patches(frame, g.shape[2:], kernel, stride, dilation).flatten(1, axes).flatten(2).transpose(0, 1)  # [K, C, P]
        products = (rows.mT @ rows).double() * (met.mT @ met)
        sqnorm[n] += products.sum()
        if size is not None:
            size[n] += products.abs().sum()
