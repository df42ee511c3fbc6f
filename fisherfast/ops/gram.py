# SPDX-License-Identifier: Apache-2.0
"""``gram_``: the sum of outer products of rows, a Kronecker factor; upper triangle only."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfast import _backend
from fisherfast._precision import wide
from fisherfast.ops import _common as common

_SCHEMA = "gram_(Tensor(a!) acc, Tensor x, float scale=1.0, *, Tensor? weight=None, bool bias=False, Tensor(b!)? flag=None) -> ()"


def _check(acc, x, scale=1.0, *, weight=None, bias=False, flag=None) -> None:
    name = "gram_"
    common.require(x.dim() in (2, 3), lambda: f"{name}: x must be [M, I] or [N, T, I], got {common.shape(x)}; flatten the rest")
    common.check_dtype(name, "x", x, common.INPUT_DTYPES)
    common.check_dtype(name, "acc", acc, common.ACCUMULATOR_DTYPES)
    D = x.shape[-1] + bias
    common.check_shape(name, "acc", acc, "[I + 1, I + 1]" if bias else "[I, I]", (D, D))
    rows = "[M]" if x.dim() == 2 else "[N, T]"
    common.check_optional(name, "weight", weight, (torch.float32,), rows, tuple(x.shape[:-1]))
    common.check_optional(name, "flag", flag, (torch.int32,), "[1]", (1,))
    common.check_devices(name, acc, x=x, weight=weight, flag=flag)


@_backend.op(_SCHEMA, _check)
def gram_(
    acc: Tensor,
    x: Tensor,
    scale: float = 1.0,
    *,
    weight: Tensor | None = None,
    bias: bool = False,
    flag: Tensor | None = None,
) -> None:
    """``acc[i,j] += scale * sum_m w_m x[m,i] x[m,j]`` for ``j >= i`` only: what lies below the diagonal is neither read nor written.

    As in BLAS ``syrk``; mirror once at the end, ``acc.triu() + acc.triu(1).mT``. With bias, x has one more column, of
    ones, which nobody has to append: it is never in memory.

    Shapes:   acc [D, D] float32 or float64, contiguous, D = I, or I + 1 with bias; x [M, I] or [N, T, I] (M = N T), any
              strides, float32, bfloat16, float16 or float64. Optional: weight float32, contiguous, of the shape of x
              without its last axis: a weight for each row, of any sign, or a mask of zeros and ones. flag [1], see
              ``fisherfast.ops._common``: it is raised by x and weight, also by a row of x whose weight is zero.
    Scale:    a sum over rows, not a mean.
    Errors:   ValueError for shapes, strides or devices that do not fit; TypeError for dtypes; BackendError when a
              forced backend cannot run the call.
    Numerics: products and sums in float32 (float64 for float64 inputs), whatever the input dtype; the error against
              float64 is at most twice that of plain ``x.T @ x`` in float32 (for 16-bit x on a GPU: of torch's own
              product of them with float32 output, on the same tensor cores). A finite row of weight zero adds exactly nothing. The order of sums is fixed, so results repeat bit by bit on one machine. ``M D^2`` FLOPs, half of
              those of the matrix product.
    Source:   Martens & Grosse 2015 (KFAC, arXiv:1503.05671) for the factor; the BLAS' syrk for the triangle.
    """
    if common.stopped(flag, x, weight):
        return
    rows = wide(x).flatten(0, -2)
    if bias:
        rows = torch.nn.functional.pad(rows, (0, 1), value=1.0)
    weighted = rows if weight is None else rows * weight.view(-1, 1)
    upper = torch.ones(acc.shape, dtype=torch.bool, device=acc.device).triu()
    acc[upper] += scale * (weighted.mT @ rows)[upper].to(acc.dtype)
