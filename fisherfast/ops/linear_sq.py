# SPDX-License-Identifier: Apache-2.0
"""``linear_sq_``: the sum of squared sample gradients of a matrix multiplication's weight."""

from __future__ import annotations

from torch import Tensor

from fisherfast import _backend
from fisherfast._precision import wide
from fisherfast.ops import _common as common

_SCHEMA = f"linear_sq_(Tensor(a!) acc, Tensor x, Tensor g, {common.OUTPUTS}) -> ()"


def _check(acc, x, g, scale=1.0, *, weight=None, offsets=None, total=None, sqnorm=None, flag=None) -> None:
    name = "linear_sq_"
    N = common.check_rows(name, g, offsets, "O")
    common.require(
        x.dim() == g.dim() and x.shape[:-1] == g.shape[:-1],
        lambda: f"{name}: x and g must share all axes but the last, got {common.shape(x)} and {common.shape(g)}",
    )
    common.check_dtype(name, "x", x, common.INPUT_DTYPES)
    common.require(x.dtype == g.dtype, lambda: f"{name}: x and g must have one dtype, got {x.dtype} and {g.dtype}", TypeError)
    expected = (g.shape[-1], x.shape[-1])
    common.check_outputs(name, acc, "[O, I]", expected, N, weight=weight, total=total, sqnorm=sqnorm, flag=flag)
    common.check_devices(name, acc, x=x, g=g, weight=weight, offsets=offsets, total=total, sqnorm=sqnorm, flag=flag)


@_backend.op(_SCHEMA, _check)
def linear_sq_(
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
) -> None:
    """``acc[o,i] += scale * sum_n w_n (sum_t g[n,t,o] x[n,t,i])^2``, never forming the ``[N, O, I]`` sample gradients.

    Shapes:   acc [O, I] float32 or float64, contiguous; x [N, T, I]; g [N, T, O], any strides, one dtype of float32,
              bfloat16, float16, float64. With offsets [N+1]: x [M, I], g [M, O]. Optional: weight [N], total [O, I],
              sqnorm [N], flag [1]; their meaning is in ``fisherfast.ops._common``.
    Scale:    a sum over n, not a mean; g must be the gradient of a summed loss. For a mean-reduced loss pass
              scale = N**2 (and divide total by hand: it is not scaled).
    Errors:   ValueError for shapes, strides or devices that do not fit; TypeError for dtypes; BackendError when a
              forced backend cannot run the call.
    Numerics: products, sums over t and squares in float32 (float64 for float64 inputs), whatever the input dtype; the
              error against float64 is at most twice that of the plain float32 einsum, of up to some 10^5 samples a call (for 16-bit
              inputs on a GPU: of torch's own products of them with float32 output, on the same tensor cores). The
              order of sums is fixed, so results repeat bit by bit on one machine (float64 norms: with one number of threads).
              Where T = 1, g and x are squared before they are multiplied: entries above 1.8e19 overflow, and those below 1e-19
              lose digits, also where their products would not.
              ``2 N T I O`` FLOPs, workspace independent of N.
    Source:   Dangel, Kunstner, Hennig 2020 (BackPACK, arXiv:1912.10985), second moment; here without materialising.
    """
    if common.stopped(flag, x, g, weight):
        return
    x, g = wide(x), wide(g)
    sums = common.Sums(acc, scale, weight, total, sqnorm)
    for n, rows in common.samples(g, offsets):
        sums.add(n, g[rows].mT @ x[rows])
    sums.store()
