# SPDX-License-Identifier: Apache-2.0
"""Norms of a matrix multiplication's sample gradients without the gradients, where that takes fewer operations."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfast.ops._common import wide
from fisherfast.rules import Form, Rows

_NUMBERS = 2**22  # in one chunk's two Gram matrices: 16 MiB each


def cheaper(form: Form, rows: Rows) -> bool:
    """Whether ``squared_norms`` takes fewer operations than the op: ``T (I + O) < I O``."""
    if form.op != "linear_sq_" or rows.offsets is not None or rows.x is None:
        return False
    T, I, O = rows.g.shape[1], rows.x.shape[-1], rows.g.shape[-1]
    return T == 1 or T * (I + O) < I * O


def squared_norms(rows: Rows) -> Tensor:
    """``|g_n^T x_n|^2 = sum_{t,u} (g_nt . g_nu) (x_nt . x_nu)``, for T = 1 ``|g_n|^2 |x_n|^2``.

    Shapes:   x [N, T, I], g [N, T, O]; returns [N].
    Scale:    of each sample's own gradient, unweighted.
    Errors:   none; NaN and infinity come out as such.
    Numerics: float32 (float64 for float64 rows). A sum of terms of both signs: where a sample's positions cancel, its
              relative error is ``eps (sum_t |g_t| |x_t|)^2 / |g^T x|^2``; never below zero.
    Source:   Goodfellow 2015 (arXiv:1510.01799) for T = 1; Li et al. 2022 (arXiv:2110.05679), "ghost clipping".
    """
    x, g = rows.x, rows.g
    assert x is not None
    T = g.shape[1]
    if T == 1:
        return wide(g[:, 0]).square().sum(1) * wide(x[:, 0]).square().sum(1)
    chunk = max(1, _NUMBERS // (T * T))
    return torch.cat([_by_grams(wide(a), wide(b)) for a, b in zip(x.split(chunk), g.split(chunk), strict=True)])


def _by_grams(x: Tensor, g: Tensor) -> Tensor:
    return torch.bmm(g, g.mT).mul_(torch.bmm(x, x.mT)).sum((1, 2)).clamp_min(0)
