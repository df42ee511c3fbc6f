# SPDX-License-Identifier: Apache-2.0
"""Norms of sample gradients without the gradients, where that takes fewer operations.

A sample gradient of one position is an outer product. That of several is a sum of them, whose squared norm is a sum over pairs of
positions (``ghost_norm_``). Its terms cancel, more so the more positions there are; the op says by how much, and where that is too much
for float32, gradients are formed after all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import itemgetter

from torch import Tensor

from fisherfast._precision import wide
from fisherfast.ops.ghost_norm import ghost_norm_
from fisherfast.rules import Convolution, Form, Rows

_MOST_CANCELLED = 32.0  # of the magnitude that is added up to what is left
_MOST_PIXELS = 2048  # whose Gram matrix takes 16 MiB a thread
_TERM, _APART = 10, 50  # what a pair of positions takes at an offset of a kernel, in multiply-adds; where strides keep them apart


def applies(form: Form, rows: Rows, shape: Sequence[int]) -> bool:
    """Whether the norms of a parameter of this shape take fewer operations without the gradients."""
    return is_outer(form, rows) or _few_pairs(form, rows, shape)


def is_outer(form: Form, rows: Rows) -> bool:
    """Whether the sample gradients are outer products."""
    return form.op == "linear_sq_" and rows.offsets is None and rows.x is not None and rows.g.shape[1] == 1


def flops(form: Form, rows: Rows, shape: Sequence[int]) -> int:
    """Of the norms of a parameter of this shape, for which this way ``applies``."""
    x, g = _images(form, rows)
    pixels, positions = math.prod(x.shape[2:]), math.prod(g.shape[2:])
    offsets = math.prod(shape[2:])
    return len(g) * (pixels**2 * x.shape[1] + positions**2 * (g.shape[1] + 2 * offsets))


def add_norms(sqnorm: Tensor, form: Form, rows: Rows, shape: Sequence[int], flag: Tensor, unwanted: Callable[[], Tensor]) -> None:
    """``sqnorm[n] += |sample gradient|^2`` of a parameter of this shape; ``unwanted``: where an op may add squares, if it has to.

    Shapes:   sqnorm [N]; flag [1], set where something is not finite, and then nothing is added.
    Scale:    of each sample's own gradient, unweighted.
    Numerics: see ``ghost_norm_``; of one position float32 (float64 for float64 rows), where every term is positive.
    Source:   Goodfellow 2015 (arXiv:1510.01799) for one position; see ``ghost_norm_`` for more.
    """
    if is_outer(form, rows):
        norms = _outer_norms(rows)
        flag |= ~norms.isfinite().all()
    else:
        norms, size = sqnorm.new_zeros(2, len(sqnorm))
        ghost_norm_(norms, *_images(form, rows), size=size, flag=flag, **_geometry(form, shape))
        cancelled = ~(size <= _MOST_CANCELLED * norms)
        if cancelled.any():
            again = sqnorm.new_zeros(int(cancelled.sum()))
            form.accumulate(unwanted(), rows.each(itemgetter(cancelled)), 1.0, sqnorm=again, flag=flag)
            norms[cancelled] = again
    sqnorm += norms


def _outer_norms(rows: Rows) -> Tensor:
    """``|g_n x_n^T|^2 = |g_n|^2 |x_n|^2``, of x [N, 1, I] and g [N, 1, O]."""
    return wide(rows.g[:, 0]).square().sum(1) * wide(rows.inputs[:, 0]).square().sum(1)


def _few_pairs(form: Form, rows: Rows, shape: Sequence[int]) -> bool:
    if form.op not in ("linear_sq_", "conv_sq_") or rows.offsets is not None or rows.x is None:
        return False
    if rows.g.device.type != "cpu" or 0 in rows.g.shape or 0 in rows.x.shape:  # on a GPU nothing was measured
        return False
    if isinstance(form, Convolution) and form.groups != 1:
        return False
    x, g = _images(form, rows)
    pixels, positions, offsets = math.prod(x.shape[2:]), math.prod(g.shape[2:]), math.prod(shape[2:])
    term = _TERM if max(_geometry(form, shape).get("stride", (1,))) == 1 else _APART
    pairs = (pixels**2 * x.shape[1] + positions**2 * (g.shape[1] + offsets * term)) / 2
    return max(pixels, positions) <= _MOST_PIXELS and pairs < positions * g.shape[1] * x.shape[1] * offsets


def _images(form: Form, rows: Rows) -> tuple[Tensor, Tensor]:
    """X ``[N, C, *S]`` and g ``[N, O, *P]``."""
    return (rows.inputs, rows.g) if isinstance(form, Convolution) else (rows.inputs.mT, rows.g.mT)


def _geometry(form: Form, shape: Sequence[int]) -> dict[str, Sequence[int]]:
    if not isinstance(form, Convolution):
        return {}
    return {"kernel": shape[2:], "stride": form.stride, "padding": form.padding, "dilation": form.dilation}
