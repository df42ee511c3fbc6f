# SPDX-License-Identifier: Apache-2.0
"""``conv_sq_``: the sum of squared sample gradients of a convolution's weight."""

from __future__ import annotations

from torch import Tensor

from fisherfast import _backend
from fisherfast._precision import wide
from fisherfast.ops import _common as common
from fisherfast.ops import _conv as conv

_GEOMETRY = "int[] stride=[], int[] padding=[], int[] dilation=[], int groups=1"
_SCHEMA = f"conv_sq_(Tensor(a!) acc, Tensor x, Tensor g, {common.OUTPUTS}, {_GEOMETRY}) -> ()"


def _check(
    acc, x, g, scale=1.0, *, weight=None, offsets=None, total=None, sqnorm=None, flag=None,
    stride=(), padding=(), dilation=(), groups=1,
) -> None:  # fmt: skip
    name = "conv_sq_"
    common.require(
        3 <= acc.dim() <= 5, lambda: f"{name}: acc must be [O, C / groups, *K] with 1 to 3 kernel axes, got {common.shape(acc)}"
    )
    axes = acc.dim() - 2
    common.require(
        x.dim() == g.dim() == acc.dim(),
        lambda: (
            f"{name}: x and g must be [N, C, *S] and [N, O, *P], {axes} axes each after the channels as acc, got "
            f"{common.shape(x)} and {common.shape(g)}"
        ),
    )
    common.require(
        x.shape[0] == g.shape[0], lambda: f"{name}: x and g must hold the same images, got {x.shape[0]} and {g.shape[0]}"
    )
    common.check_dtype(name, "x", x, common.INPUT_DTYPES)
    common.require(x.dtype == g.dtype, lambda: f"{name}: x and g must have one dtype, got {x.dtype} and {g.dtype}", TypeError)
    common.require(
        all(len(values) in (0, axes) for values in (stride, padding, dilation)) and min((*stride, *dilation, 1)) >= 1,
        lambda: (
            f"{name}: stride, padding and dilation must be empty or one integer per kernel axis ({axes}), stride and dilation "
            f">= 1, got {list(stride)}, {list(padding)}, {list(dilation)}"
        ),
    )
    conv.check_reach(name, stride, padding, dilation)
    C, O = x.shape[1], g.shape[1]
    common.require(
        groups >= 1 and C % groups == 0 and O % groups == 0,
        lambda: f"{name}: groups must divide C = {C} and O = {O}, got {groups}",
    )
    N = g.shape[0] if offsets is None else common.num_samples(name, offsets)
    expected = (O, C // groups, *acc.shape[2:])
    common.check_outputs(name, acc, "[O, C / groups, *K]", expected, N, weight=weight, total=total, sqnorm=sqnorm, flag=flag)
    common.check_devices(name, acc, x=x, g=g, weight=weight, offsets=offsets, total=total, sqnorm=sqnorm, flag=flag)


@_backend.op(_SCHEMA, _check)
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
    """``acc[o,c,k] += scale * sum_n w_n (sum_p g[n,o,p] x[n,c, p stride + k dilation - padding])^2``, x zero outside.

    ``padding`` is what lies before an axis; what lies after it follows from g's size, so ``padding="same"`` of an even
    kernel is covered. The gradient of a transposed convolution's weight ``[C, O / groups, *K]`` is this op with the
    roles of x and g exchanged.

    Shapes:   acc [O, C / groups, *K] float32 or float64, contiguous, 1 to 3 kernel axes; x [N, C, *S], g [N, O, *P], any
              strides, one dtype of float32, bfloat16, float16, float64; c runs over the channels of o's group. stride,
              padding, dilation: one integer per kernel axis, or empty for 1, 0, 1. With offsets [N+1] the first axis
              holds M images and sample n owns images ``offsets[n]:offsets[n+1]``. Optional: weight [N], total like acc,
              sqnorm [N], flag [1]; their meaning is in ``fisherfast.ops._common``.
    Scale:    a sum over n, not a mean; g must be the gradient of a summed loss.
    Errors:   ValueError for shapes, strides, devices or geometry that do not fit; TypeError for dtypes; BackendError when
              a forced backend cannot run the call.
    Numerics: as ``linear_sq_``. ``2 N |P| O (C / groups) |K|`` FLOPs; the unfolded input is never formed.
    Source:   the chain rule; Dangel et al. 2020 (arXiv:1912.10985) for the quantity.
    """
    if common.stopped(flag, x, g, weight):
        return
    x, g = wide(x), wide(g)
    axes = acc.dim() - 2
    stride, padding, dilation = conv.options(axes, stride, padding, dilation)
    sums = common.Sums(acc, scale, weight, total, sqnorm)
    samples = list(common.samples(g, offsets))
    if 0 in g.shape[2:]:
        return
    padded = conv.framed(x, g.shape[2:], acc.shape[2:], stride, padding, dilation)
    for n, images in samples:
        images = slice(n, n + 1) if isinstance(images, int) else images
        sums.add(n, conv.weight_gradient(padded[images], g[images], acc.shape, stride, (0,) * axes, dilation, groups))
    sums.store()
