# SPDX-License-Identifier: Apache-2.0
"""What the squares ops have in common: the tail of their schema, its checks, and how the reference walks samples.

Common arguments (N samples; a *sample gradient* is the parameter-shaped gradient of one sample):

* ``scale``    multiplies what is added to ``acc``; ``total`` and ``sqnorm`` are not scaled.
* ``weight``   [N] float32, ``w_n``: ``acc += scale * sum_n w_n (sample gradient)^2``, ``total += sum_n w_n (sample gradient)``.
* ``offsets``  [N+1] int64, rising from 0 to M: rows are packed, ``[M, ...]`` instead of ``[N, T, ...]``, and sample n owns
  rows ``offsets[n]:offsets[n+1]``.
* ``total``    like ``acc``: receives the sum of the sample gradients.
* ``sqnorm``   [N] float32 or float64: ``sqnorm[n] += |sample gradient|^2`` (unweighted).
* ``flag``     [1] int32: set to 1 when an input is not finite; while it is set, nothing is added to any output.
  Without it non-finite inputs propagate as in any torch op.

No output may share memory with another one or with an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

OUTPUTS = (
    "float scale=1.0, *, Tensor? weight=None, Tensor? offsets=None, "
    "Tensor(b!)? total=None, Tensor(c!)? sqnorm=None, Tensor(d!)? flag=None"
)
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACCUMULATOR_DTYPES = (torch.float32, torch.float64)
_WRITTEN = ("acc", "out", "drawn", "total", "sqnorm", "size", "flag")


def shape(tensor: Tensor) -> tuple[int, ...]:
    """A tensor's shape as a plain tuple, for messages."""
    return tuple(tensor.shape)


def require(condition: Any, message: Callable[[], str], error: type[Exception] = ValueError) -> None:
    """Raise ``error`` unless the condition holds; under tracing the condition may be symbolic."""
    if condition is not True:  # eager calls are many and their conditions are plain booleans
        (torch._check_type if error is TypeError else torch._check_value)(condition, message)


def check_dtype(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError unless ``tensor`` has one of the allowed dtypes."""
    if tensor.dtype not in allowed:
        raise TypeError(f"{op}: {name} must be one of {[str(d).removeprefix('torch.') for d in allowed]}, got {tensor.dtype}")


def check_shape(op: str, name: str, tensor: Tensor, symbols: str, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless ``tensor`` is contiguous and has the expected shape."""
    if tensor.shape != expected:
        raise ValueError(f"{op}: {name} must be {symbols} = {expected}, got {shape(tensor)}")
    if not tensor.is_contiguous():
        way = "it is written in place" if name in _WRITTEN else f"pass {name}.contiguous()"
        raise ValueError(f"{op}: {name} must be contiguous, got strides {tensor.stride()}; {way}")


def check_optional(
    op: str, name: str, tensor: Tensor | None, allowed: tuple[torch.dtype, ...], symbols: str, expected: tuple[int, ...]
) -> None:
    """Both checks of a tensor that may be absent."""
    if tensor is not None:
        check_dtype(op, name, tensor, allowed)
        check_shape(op, name, tensor, symbols, expected)


def num_samples(op: str, offsets: Tensor) -> int:
    """Check the offsets of packed rows and return N."""
    require(offsets.dim() == 1 and offsets.shape[0] >= 1, lambda: f"{op}: offsets must be [N+1], got {shape(offsets)}")
    check_dtype(op, "offsets", offsets, (torch.int64,))
    require(
        offsets.is_contiguous(),
        lambda: f"{op}: offsets must be contiguous, got strides {offsets.stride()}; pass offsets.contiguous()",
    )
    return offsets.shape[0] - 1


def check_rows(op: str, g: Tensor, offsets: Tensor | None, feature: str) -> int:
    """Check the layout of ``g`` and return N."""
    if offsets is None:
        require(g.dim() == 3, lambda: f"{op}: g must be [N, T, {feature}], got {shape(g)}; T is 1 where there are no positions")
        return g.shape[0]
    require(g.dim() == 2, lambda: f"{op}: with offsets g must be [M, {feature}], got {shape(g)}")
    N = num_samples(op, offsets)
    require((N > 0) | (g.shape[0] == 0), lambda: f"{op}: offsets must end with M = {g.shape[0]}, got those of no sample")
    return N


def check_outputs(
    op: str,
    acc: Tensor,
    symbols: str,
    expected: tuple[int, ...],
    samples: int,
    *,
    weight: Tensor | None,
    total: Tensor | None,
    sqnorm: Tensor | None,
    flag: Tensor | None,
) -> None:
    """Check accumulator and the optional tensors against the shapes the inputs imply."""
    check_dtype(op, "acc", acc, ACCUMULATOR_DTYPES)
    check_shape(op, "acc", acc, symbols, expected)
    check_optional(op, "weight", weight, (torch.float32,), "[N]", (samples,))
    check_optional(op, "total", total, ACCUMULATOR_DTYPES, symbols, expected)
    check_optional(op, "sqnorm", sqnorm, ACCUMULATOR_DTYPES, "[N]", (samples,))
    check_optional(op, "flag", flag, (torch.int32,), "[1]", (1,))


def check_devices(op: str, acc: Tensor, of: str = "acc", /, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on the device of the one that is written, which the op calls ``of``."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != acc.device:
            raise ValueError(f"{op}: {name} must be on {of}'s device {acc.device}, got {tensor.device}")


def stopped(flag: Tensor | None, *inputs: Tensor | None) -> bool:
    """Update ``flag`` from the inputs; True if nothing may be added."""
    if flag is None:
        return False
    for tensor in inputs:
        if tensor is not None and not torch.isfinite(tensor).all():
            flag.fill_(1)
    return bool(flag.item())


def samples(g: Tensor, offsets: Tensor | None) -> Iterator[tuple[int, slice | int]]:
    """Yield ``(n, index)`` such that ``g[index]`` holds the rows ``[T_n, ...]`` of sample n."""
    if offsets is None:
        yield from ((n, n) for n in range(g.shape[0]))
        return
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != g.shape[0] or sorted(bounds) != bounds:
        raise ValueError(f"offsets: must rise from 0 to M = {g.shape[0]}, got {bounds}")
    yield from ((n, slice(a, b)) for n, (a, b) in enumerate(pairwise(bounds)))


class Sums:
    """The reference's outputs: sample gradients are added up in float64 and go to acc and total once, at the end."""

    def __init__(self, acc: Tensor, scale: float, weight: Tensor | None, total: Tensor | None, sqnorm: Tensor | None) -> None:
        self.acc, self.scale, self.weight, self.total, self.sqnorm = acc, scale, weight, total, sqnorm
        self._squares = torch.zeros_like(acc, dtype=torch.float64)
        self._gradients = None if total is None else torch.zeros_like(total, dtype=torch.float64)

    def add(self, n: int, gradient: Tensor, rows: Tensor | slice = slice(None)) -> None:
        """Take sample n's gradient, of all of the parameter or of some of its rows."""
        w = 1.0 if self.weight is None else float(self.weight[n])
        square = gradient.square()
        self._squares[rows] += w * square.double()
        if self._gradients is not None:
            self._gradients[rows] += w * gradient.double()
        if self.sqnorm is not None:
            self.sqnorm[n] += square.sum(dtype=torch.float64)

    def store(self) -> None:
        """Write acc and total."""
        self.acc.add_(self._squares, alpha=self.scale)
        if self.total is not None and self._gradients is not None:
            self.total.add_(self._gradients)
