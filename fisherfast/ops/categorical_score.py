# SPDX-License-Identifier: Apache-2.0
"""``categorical_score_``: the gradient of ``-log softmax(logits)[y]`` at the logits, for labels given or drawn from it."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfast import _backend
from fisherfast._precision import wide
from fisherfast.ops import _common as common

_SCHEMA = (
    "categorical_score_(Tensor(a!) out, Tensor logits, *, Tensor? labels=None, Tensor? uniform=None, Tensor? counted=None, "
    "Tensor(b!)? drawn=None) -> ()"
)


def _check(out, logits, *, labels=None, uniform=None, counted=None, drawn=None) -> None:
    name = "categorical_score_"
    common.require(logits.dim() == 2, lambda: f"{name}: logits must be [R, C], got {common.shape(logits)}; flatten the rest")
    common.check_dtype(name, "logits", logits, common.INPUT_DTYPES)
    common.require(
        out.dtype == logits.dtype,
        lambda: f"{name}: out must have the dtype of logits, {logits.dtype}, got {out.dtype}",
        TypeError,
    )
    R, C = logits.shape
    common.check_shape(name, "out", out, "[R, C]", (R, C))
    common.require(
        (labels is None) != (uniform is None),
        lambda: f"{name}: exactly one of labels and uniform must be given, got {'neither' if labels is None else 'both'}",
    )
    vectors = {
        "labels": (labels, torch.int64),
        "uniform": (uniform, torch.float64),
        "counted": (counted, torch.bool),
        "drawn": (drawn, torch.int64),
    }
    for what, (tensor, dtype) in vectors.items():
        common.check_optional(name, what, tensor, (dtype,), "[R]", (R,))
    given = {what: tensor for what, (tensor, _) in vectors.items()}
    common.check_devices(name, out, "out", logits=logits, **given)


@_backend.op(_SCHEMA, _check)
def categorical_score_(
    out: Tensor,
    logits: Tensor,
    *,
    labels: Tensor | None = None,
    uniform: Tensor | None = None,
    counted: Tensor | None = None,
    drawn: Tensor | None = None,
) -> None:
    """``out[r] = counted_r (p_r - e_{y_r})``, ``p_r = softmax(logits[r])``, with ``y_r`` given, or drawn from ``p_r``.

    Drawn from ``uniform[r]`` = u in (0, 1) by inverse CDF: y is the first class of non-zero probability up to which the
    probabilities add to more than u. It therefore depends on u and p alone; two ways of adding may disagree only where u
    lies within rounding of a boundary, and no class of probability zero (a masked one, logit -inf) is ever drawn.

    Shapes:   out [R, C], contiguous, of the dtype of logits; it may be the logits themselves. logits [R, C], any strides,
              float32, bfloat16, float16 or float64. Exactly one of labels [R] int64 in [0, C) and uniform [R] float64.
              counted [R] bool: rows that are not counted become zero, whatever they hold, and their labels are not read.
              drawn [R] int64 receives y, and -1 where nothing is counted.
    Scale:    per row, no mean: the gradient of a summed loss.
    Errors:   ValueError for shapes, strides or devices that do not fit, and for labels out of range (on a GPU an
              asynchronous device assertion); TypeError for dtypes; BackendError when a forced backend cannot run the call.
    Numerics: exponentials and sums within a tile in float32 (float64 for float64 logits), running sums in float64, whatever
              the dtype; one rounding to the dtype at the end. The entry of y is minus the sum of the other probabilities, so
              it keeps its relative precision where the network is nearly certain and ``p_y - 1`` would cancel. A logit that
              is NaN or +inf makes its row NaN, as softmax does. Two reads and one write; no wide copy of 16-bit logits
              beyond a workspace that does not grow with R.
    Source:   the score of the categorical distribution in its natural parameters.
    """
    R, C = logits.shape
    if drawn is not None:
        drawn.fill_(-1)
    if R == 0 or C == 0:
        return
    if labels is not None:
        _check_labels(labels if counted is None else labels[counted], C)
    step = max(1, 2**20 // C)
    for start in range(0, R, step):
        rows = slice(start, start + step)
        keep = None if counted is None else counted[rows].unsqueeze(1)
        z = wide(logits[rows])
        e = (z - z.amax(1, keepdim=True)).exp_()
        total = e.sum(1, keepdim=True, dtype=torch.float64)
        y = _drawn(e, uniform[rows]) if uniform is not None else labels[rows]  # type: ignore[index]
        if keep is not None:
            y = y.where(keep.squeeze(1), 0)
        y = y.unsqueeze(1)
        e.scatter_(1, y, 0.0)
        at_y = -e.sum(1, keepdim=True, dtype=torch.float64).div_(total).to(e.dtype)
        score = e.div_(total.to(e.dtype)).scatter_(1, y, at_y)
        out[rows] = score if keep is None else score.masked_fill_(~keep, 0.0)
        if drawn is not None:
            drawn[rows] = y.squeeze(1) if keep is None else y.where(keep, -1).squeeze(1)


def _check_labels(labels: Tensor, C: int) -> None:
    if labels.numel() and not bool(((labels >= 0) & (labels < C)).all()):
        raise ValueError(
            f"categorical_score_: labels must lie in [0, C = {C}), got {int(labels.min())} .. {int(labels.max())}; "
            "leave rows without a label out with counted"
        )


def _drawn(e: Tensor, u: Tensor) -> Tensor:
    """The first class of non-zero probability whose running sum exceeds ``u`` times the total; the last such class at worst."""
    sums = e.cumsum(-1, dtype=torch.float64)
    index = torch.arange(e.shape[-1], device=e.device)
    last = torch.where(e > 0, index, 0).amax(-1, keepdim=True)
    return torch.where((e > 0) & (sums > u.unsqueeze(1) * sums[:, -1:]), index, last).amin(-1)
