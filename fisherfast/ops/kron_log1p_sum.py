# SPDX-License-Identifier: Apache-2.0
"""``kron_log1p_sum``: as ``log1p_sum``, over all products of two factors' eigenvalues, without forming them."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfast import _backend
from fisherfast.ops import _common as common
from fisherfast.ops import _log1p

_SCHEMA = "kron_log1p_sum(Tensor(a!) acc, Tensor a, Tensor b, float c=1.0) -> ()"


def _check(acc, a, b, c=1.0) -> None:
    name = "kron_log1p_sum"
    _log1p.check(name, acc, a=a, b=b)
    common.require(a.dim() == 1, lambda: f"{name}: a must be [I], got {common.shape(a)}")
    common.require(b.dim() == 1, lambda: f"{name}: b must be [O], got {common.shape(b)}")


@_backend.op(_SCHEMA, _check)
def kron_log1p_sum(acc: Tensor, a: Tensor, b: Tensor, c: float = 1.0) -> None:
    """``acc[0] += sum_ij log(1 + c a_i b_j)``, ``acc[1] += sum_ij g(c a_i b_j)`` with ``g(s) = log(1 + s) - s / (1 + s)``.

    The sums of ``log1p_sum`` over the eigenvalues of ``B (x) A``: a log-determinant and an information of a Kronecker block.

    Shapes:   acc [2] float64, contiguous; a [I] and b [O], any strides (0 included), float32 or float64 each. The [O, I]
              table is never formed.
    Scale:    sums over the products, not means.
    Errors:   ValueError for shapes, strides or devices that do not fit; TypeError for dtypes; BackendError when a forced
              backend cannot run the call. acc becomes NaN where an entry is NaN or 1 + c a_i b_j is not in (0, 6e307);
              c a_i b_j is meant to be >= 0. c times an entry of a, or of b, must be a float64.
    Numerics: as ``log1p_sum``; bound by arithmetic, I O divisions and 30 I O other operations in float64.
    Source:   as ``log1p_sum``; Martens & Grosse 2015 (arXiv:1503.05671) for the eigenvalues of a Kronecker product.
    """
    if a.numel() == 0 or b.numel() == 0:
        return
    b = b.double()
    for part in (c * a.double()).split(max(1, _log1p.CHUNK // b.numel())):
        _log1p.add_(acc, torch.outer(part, b).flatten())
