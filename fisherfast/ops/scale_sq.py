# SPDX-License-Identifier: Apache-2.0
"""``scale_sq_``: the sum of squared sample gradients of a parameter that multiplies, or is added to, features."""

from __future__ import annotations

from torch import Tensor

from fisherfast import _backend
from fisherfast._precision import wide
from fisherfast.ops import _common as common

_SCHEMA = f"scale_sq_(Tensor(a!) acc, Tensor? x, Tensor g, {common.OUTPUTS}) -> ()"


def _check(acc, x, g, scale=1.0, *, weight=None, offsets=None, total=None, sqnorm=None, flag=None) -> None:
    name = "scale_sq_"
    N = common.check_rows(name, g, offsets, "D")
    common.check_dtype(name, "g", g, common.INPUT_DTYPES)
    if x is not None:
        common.require(
            x.shape == g.shape, lambda: f"{name}: x and g must have one shape, got {common.shape(x)} and {common.shape(g)}"
        )
        common.require(x.dtype == g.dtype, lambda: f"{name}: x and g must have one dtype, got {x.dtype} and {g.dtype}", TypeError)
    common.check_outputs(name, acc, "[D]", (g.shape[-1],), N, weight=weight, total=total, sqnorm=sqnorm, flag=flag)
    common.check_devices(name, acc, x=x, g=g, weight=weight, offsets=offsets, total=total, sqnorm=sqnorm, flag=flag)


@_backend.op(_SCHEMA, _check)
def scale_sq_(
    acc: Tensor,
    x: Tensor | None,
    g: Tensor,
    scale: float = 1.0,
    *,
    weight: Tensor | None = None,
    offsets: Tensor | None = None,
    total: Tensor | None = None,
    sqnorm: Tensor | None = None,
    flag: Tensor | None = None,
) -> None:
    """``acc[d] += scale * sum_n w_n (sum_t g[n,t,d] x[n,t,d])^2``; without x (biases, tables): x = 1.

    Serves norm weights, biases, and any parameter that enters by a broadcast product or sum.

    Shapes:   acc [D] float32 or float64, contiguous; g [N, T, D] and x like g or None, any strides (0 included), one
              dtype of float32, bfloat16, float16, float64. With offsets [N+1]: g [M, D]. Optional: weight [N],
              total [D], sqnorm [N], flag [1]; their meaning is in ``fisherfast.ops._common``.
    Scale:    a sum over n, not a mean; g must be the gradient of a summed loss.
    Errors:   ValueError for shapes, strides or devices that do not fit; TypeError for dtypes; BackendError when a
              forced backend cannot run the call.
    Numerics: as ``linear_sq_``. Bound by memory: g (and x) are read once.
    Source:   the chain rule; Dangel et al. 2020 (arXiv:1912.10985) for the quantity.
    """
    if common.stopped(flag, x, g, weight):
        return
    g = wide(g)
    product = g if x is None else g * wide(x)
    sums = common.Sums(acc, scale, weight, total, sqnorm)
    for n, rows in common.samples(g, offsets):
        sums.add(n, product[rows].sum(0))
    sums.store()
