# SPDX-License-Identifier: Apache-2.0
"""What several likelihoods do with their tensors: shapes, checks, masks, columns."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fisherfast import _checks
from fisherfast.likelihood.protocol import Predictions


def symbolic(shape: Sequence[int]) -> str:
    """A shape in words, its samples being N: a probe looks at a few only."""
    return "[" + ", ".join(["N", *map(str, shape[1:])]) + "]"


def batch_mismatch(name: str, output: Tensor, targets: Tensor, wanted: Sequence[int], remedy: str) -> ValueError:
    """The error for targets of another shape than the ``wanted`` one, which the output asks for, and what to do about it."""
    return ValueError(
        f"{name}: targets must be {symbolic(wanted)} for an output {symbolic(output.shape)}, got {symbolic(targets.shape)}; {remedy}"
    )


def add_up_to_one(values: Tensor) -> bool:
    """Whether the numbers of every row do, up to the rounding of their dtype."""
    tolerance = max(1e-4, torch.finfo(values.dtype).eps)
    return bool(((values.sum(-1, dtype=torch.float32) - 1).abs() <= tolerance).all())


def existing_positions(output: Tensor, mask: Tensor | None) -> Tensor | None:
    """The attention mask as which positions of ``output`` [N, L, ...] count; None where it is not one."""
    return (mask != 0) if mask is not None and output.dim() > 1 and mask.shape == output.shape[:2] else None


def check_real(name: str, output: Tensor, targets: Tensor | None) -> None:
    """Raise ValueError for complex numbers."""
    _checks.real(name, "output", output)
    if targets is not None:
        _checks.real(name, "targets", targets)


def real_valued(name: str, output: Tensor, targets: Tensor | None, mask: Tensor | None, sample: Tensor) -> Predictions:
    """The predictions of a likelihood with one target for each number of the output: both as ``[N, K]``, K numbers a sample."""
    check_real(name, output, targets)
    if targets is not None and targets.shape != output.shape:
        one = output.numel() == targets.numel()  # [N, 1] beside [N]
        remedy = "an axis of 1 too many goes by targets.squeeze(-1), or output=lambda result: result.logits.squeeze(-1)"
        remedy = remedy if one else "pass one target for each number of the output, or the part that they are of by output="
        raise batch_mismatch(name, output, targets, output.shape, remedy)
    values = output.reshape(output.shape[0], -1)
    positions = existing_positions(output, mask)
    counted = torch.ones_like(values, dtype=torch.bool)
    if positions is not None:
        counted = positions.repeat_interleave(math.prod(output.shape[2:]), 1)
    if targets is not None:
        targets = targets.reshape(values.shape).masked_fill(~counted, 0)
        if not bool(torch.isfinite(targets).all()):
            raise ValueError(f"{name}: targets must be finite, got NaN or infinity")
    return Predictions(values, targets, counted, sample)


def check_last(name: str, what: str, tensor: Tensor | None, output: Tensor) -> None:
    """Raise ValueError unless a setting is one number, or has one for each entry of the output's last axis."""
    last = output.shape[-1] if output.dim() > 1 else 1
    if tensor is not None and tensor.dim() and len(tensor) != last:
        raise ValueError(f"{name}: {what} must be as long as the output's last axis, [{last}], got {tuple(tensor.shape)}")


def tiled(tensor: Tensor, values: Tensor) -> Tensor:
    """``tensor``, one number or [K], beside ``values`` [N, L K]."""
    return tensor.to(values).expand(1) if tensor.dim() == 0 else tensor.to(values).repeat(values.shape[-1] // len(tensor))


def check_weights(name: str, what: str, tensor: Tensor | None, symbols: str, axes: tuple[int, ...]) -> None:
    """Raise ValueError unless the weights of a loss are finite, not negative, and a tensor with one of these numbers of axes."""
    if tensor is None:
        return
    fits = isinstance(tensor, Tensor) and tensor.dim() in axes and not tensor.is_complex()
    if not fits or not bool((torch.isfinite(tensor) & (tensor >= 0)).all()):
        raise ValueError(f"{name}: {what} must be {symbols}, finite and not negative, got {tensor}")


def counted_only(predictions: Predictions, score: Tensor) -> Tensor:
    """The score in the output's dtype, zero where nothing is counted."""
    return score.masked_fill(~predictions.counted, 0.0).to(predictions.values.dtype)


def unit_columns(predictions: Predictions, root: Tensor) -> Iterator[Tensor]:
    """The columns ``root_k e_k`` of a diagonal square root, one for each counted output of a sample."""
    for at, exists in predictions.turns():
        column = torch.zeros_like(predictions.values)
        column[at] = (root[at] * exists).to(column.dtype)
        yield column


def digest(tensor: Tensor) -> str:
    """A tensor inside a name: its numbers where they are few, else how many and a fingerprint."""
    values = tensor.detach().double().flatten().cpu()
    if len(values) <= 4:
        return str(values.tolist())
    return f"[{len(values)}]#{hashlib.sha256(values.numpy().tobytes()).hexdigest()[:8]}"
