# SPDX-License-Identifier: Apache-2.0
"""``log1p_sum``: the two sums over eigenvalues that log-determinants and information need, in one read of them."""

from __future__ import annotations

from torch import Tensor

from fisherfast import _backend
from fisherfast.ops import _log1p

_SCHEMA = "log1p_sum(Tensor(a!) acc, Tensor f, float c=1.0) -> ()"


def _check(acc, f, c=1.0) -> None:
    _log1p.check("log1p_sum", acc, f=f)


@_backend.op(_SCHEMA, _check)
def log1p_sum(acc: Tensor, f: Tensor, c: float = 1.0) -> None:
    """``acc[0] += sum_j log(1 + c f_j)``, ``acc[1] += sum_j g(c f_j)`` with ``g(s) = log(1 + s) - s / (1 + s)``.

    With c = 1 / damping the first is ``log det(I + F / damping)`` of a diagonal F, with c = lambda^2 / beta the second is
    twice the information in its weights. Their difference, ``sum_j s_j / (1 + s_j)``, is the effective dimension: taking
    it costs a factor ``log s`` of the precision at most.

    Shapes:   acc [2] float64, contiguous; f any shape and strides (0 included), float32 or float64.
    Scale:    sums over the entries, not means.
    Errors:   ValueError for shapes, strides or devices that do not fit; TypeError for dtypes; BackendError when a forced
              backend cannot run the call. acc becomes NaN where an entry is NaN or 1 + c f_j is not in (0, 6e307); c f_j
              is meant to be >= 0.
    Numerics: float64 throughout, for float32 entries too and on every device: some 30 operations an entry, on a GPU with few
              float64 units the bound, but never near the cost of measuring f. Below s = sqrt(2) - 1 both terms are sums
              of positive ones in z = s / (2 + s), so that they keep their digits however small s is; relative error of
              both sums below 1e-12 (s >= 0). The same bits whatever the number of threads.
    Source:   Proposition 2.5 of arXiv:1905.12213 in the eigenbasis of the Fisher; ``log(1 + v) = 2 atanh(v / (2 + v))``.
    """
    for part in f.reshape(-1).split(_log1p.CHUNK):
        _log1p.add_(acc, c * part.double())
