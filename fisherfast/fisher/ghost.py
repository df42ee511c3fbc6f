# SPDX-License-Identifier: Apache-2.0
"""Norms of a matrix multiplication's sample gradients without the gradients, where a sample has one position.

With more positions a sum over pairs of them would do (Li et al. 2022, arXiv:2110.05679), in fewer operations where they are
few. But its terms cancel: on a small transformer it was six times as inexact in float32 as squaring the gradient, which the
squares kernel does in registers anyway.
"""

from __future__ import annotations

from torch import Tensor

from fisherfast._precision import wide
from fisherfast.rules import Form, Rows


def applies(form: Form, rows: Rows) -> bool:
    """Whether the sample gradients are outer products."""
    return form.op == "linear_sq_" and rows.offsets is None and rows.x is not None and rows.g.shape[1] == 1


def squared_norms(rows: Rows) -> Tensor:
    """``|g_n x_n^T|^2 = |g_n|^2 |x_n|^2``.

    Shapes:   x [N, 1, I], g [N, 1, O]; returns [N].
    Scale:    of each sample's own gradient, unweighted.
    Errors:   none; NaN and infinity come out as such.
    Numerics: float32 (float64 for float64 rows); every term is positive.
    Source:   Goodfellow 2015 (arXiv:1510.01799).
    """
    return wide(rows.g[:, 0]).square().sum(1) * wide(rows.inputs[:, 0]).square().sum(1)
