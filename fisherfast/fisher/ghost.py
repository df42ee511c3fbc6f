# SPDX-License-Identifier: Apache-2.0
"""Norms of sample gradients without the gradients, where that takes fewer operations.

A sample gradient of one position is an outer product. That of several is a sum of them, whose squared norm is a sum over pairs of
positions (``ghost_norm_``). Its terms cancel, more so the more positions there are; the op says by how much, and where that is too much
for float32, gradients are formed after all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter

from torch import Tensor

from fisherfast._precision import wide
from fisherfast.ops.ghost_norm import ghost_norm_
from fisherfast.rules import Form, Images, Rows

_MOST_CANCELLED = 4.0  # of what is left: where more was added up, float32 is less exact than squares
_MOST_PIXELS = 2048  # whose Gram matrix takes 16 MiB a thread
_GEOMETRY = Images._fields[2:]
_TERM, _APART = 10, 50  # what a pair of positions takes at an offset of a kernel, in multiply-adds; where strides keep them apart


def applies(form: Form, rows: Rows, shape: tuple[int, ...]) -> bool:
    """Whether the norms of a parameter of this shape take fewer operations without the gradients."""
    if is_outer(form, rows):
        return True
    images = form.images(rows, shape)
    return images is not None and _few_pairs(images)


def is_outer(form: Form, rows: Rows) -> bool:
    """Whether the sample gradients are outer products."""
    return form.op == "linear_sq_" and rows.offsets is None and rows.x is not None and rows.g.shape[1] == 1


def flops(form: Form, rows: Rows, shape: tuple[int, ...]) -> int:
    """Of the norms of a parameter of this shape, for which this way ``applies``."""
    images = form.images(rows, shape)
    assert images is not None
    pixels, positions, offsets = _sizes(images)
    return rows.num_samples * (pixels**2 * images.x.shape[1] + positions**2 * (images.g.shape[1] + 2 * offsets))


def add_norms(
    sqnorm: Tensor, form: Form, rows: Rows, shape: tuple[int, ...], flag: Tensor, unwanted: Callable[[], Tensor]
) -> None:
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
        images = form.images(rows, shape)
        assert images is not None
        x, g, *geometry = images
        norms, size = sqnorm.new_zeros(2, len(sqnorm))
        ghost_norm_(norms, x, g, size=size, flag=flag, **dict(zip(_GEOMETRY, geometry, strict=True)))
        cancelled = ~(size <= _MOST_CANCELLED * norms)
        if cancelled.any():
            again = sqnorm.new_zeros(int(cancelled.sum()))
            form.accumulate(unwanted(), rows.each(itemgetter(cancelled)), 1.0, sqnorm=again, flag=flag)
            norms[cancelled] = again
    sqnorm += norms


def _outer_norms(rows: Rows) -> Tensor:
    """``|g_n x_n^T|^2 = |g_n|^2 |x_n|^2``, of x [N, 1, I] and g [N, 1, O]."""
    return wide(rows.g[:, 0]).square().sum(1) * wide(rows.inputs[:, 0]).square().sum(1)


def _few_pairs(images: Images) -> bool:
    x, g = images.x, images.g
    if g.device.type != "cpu" or 0 in x.shape or 0 in g.shape:  # on a GPU nothing was measured
        return False
    pixels, positions, offsets = _sizes(images)
    term = _APART if max(images.stride, default=1) > 1 else _TERM
    pairs = (pixels**2 * x.shape[1] + positions**2 * (g.shape[1] + offsets * term)) / 2
    return max(pixels, positions) <= _MOST_PIXELS and pairs < positions * g.shape[1] * x.shape[1] * offsets


def _sizes(images: Images) -> tuple[int, int, int]:
    """How many pixels, positions and offsets of the kernel there are."""
    return math.prod(images.x.shape[2:]), math.prod(images.g.shape[2:]), math.prod(images.kernel)
