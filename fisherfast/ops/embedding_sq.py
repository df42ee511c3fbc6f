# SPDX-License-Identifier: Apache-2.0
"""``embedding_sq_``: the sum of squared sample gradients of an embedding table."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfast import _backend
from fisherfast._precision import wide
from fisherfast.ops import _common as common

_SCHEMA = f"embedding_sq_(Tensor(a!) acc, Tensor ids, Tensor g, {common.OUTPUTS}, int padding_idx=-1) -> ()"


def _check(acc, ids, g, scale=1.0, *, weight=None, offsets=None, total=None, sqnorm=None, flag=None, padding_idx=-1) -> None:
    name = "embedding_sq_"
    N = common.check_rows(name, g, offsets, "D")
    common.check_dtype(name, "g", g, common.INPUT_DTYPES)
    common.check_dtype(name, "ids", ids, (torch.int64,))
    common.require(
        ids.shape == g.shape[:-1],
        lambda: f"{name}: ids must have the axes of g but the last, {common.shape(g)[:-1]}, got {common.shape(ids)}",
    )
    common.require(acc.dim() == 2, lambda: f"{name}: acc must be [V, D], got {common.shape(acc)}")
    V = acc.shape[0]
    common.require(
        -1 <= padding_idx < V, lambda: f"{name}: padding_idx must be -1 (none) or a row below V = {V}, got {padding_idx}"
    )
    expected = (V, g.shape[-1])
    common.check_outputs(name, acc, "[V, D]", expected, N, weight=weight, total=total, sqnorm=sqnorm, flag=flag)
    common.check_devices(name, acc, ids=ids, g=g, weight=weight, offsets=offsets, total=total, sqnorm=sqnorm, flag=flag)


@_backend.op(_SCHEMA, _check)
def embedding_sq_(
    acc: Tensor,
    ids: Tensor,
    g: Tensor,
    scale: float = 1.0,
    *,
    weight: Tensor | None = None,
    offsets: Tensor | None = None,
    total: Tensor | None = None,
    sqnorm: Tensor | None = None,
    flag: Tensor | None = None,
    padding_idx: int = -1,
) -> None:
    """``acc[v,d] += scale * sum_n w_n (sum_{t: ids[n,t] = v} g[n,t,d])^2``, touching only the rows that occur.

    Shapes:   acc [V, D] float32 or float64, contiguous; ids [N, T] int64 in [0, V); g [N, T, D], any strides, float32,
              bfloat16, float16 or float64. With offsets [N+1]: ids [M], g [M, D]. ``padding_idx``: a row whose gradient
              is zero, -1 for none. Optional: weight [N], total [V, D], sqnorm [N], flag [1]; their meaning is in
              ``fisherfast.ops._common``.
    Scale:    a sum over n, not a mean; g must be the gradient of a summed loss.
    Errors:   ValueError for shapes, strides or devices that do not fit, and for ids out of range (on a GPU an
              asynchronous device assertion, as torch's own embedding); TypeError for dtypes; BackendError when a
              forced backend cannot run the call.
    Numerics: as ``linear_sq_``. ``N T D`` additions.
    Source:   the chain rule; Dangel et al. 2020 (arXiv:1912.10985) for the quantity.
    """
    if ids.numel() and not bool(((ids >= 0) & (ids < acc.shape[0])).all()):
        raise ValueError(f"embedding_sq_: ids must lie in [0, V = {acc.shape[0]}), got {int(ids.min())} .. {int(ids.max())}")
    if common.stopped(flag, g, weight):
        return
    g = wide(g)
    if padding_idx >= 0:
        g = g.masked_fill((ids == padding_idx).unsqueeze(-1), 0.0)
    sums = common.Sums(acc, scale, weight, total, sqnorm)
    for n, rows in common.samples(g, offsets):
        touched, inverse = ids[rows].unique(return_inverse=True)
        sums.add(n, g.new_zeros(len(touched), g.shape[-1]).index_add_(0, inverse, g[rows]), touched)
    sums.store()
