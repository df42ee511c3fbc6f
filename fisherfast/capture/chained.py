# SPDX-License-Identifier: Apache-2.0
"""The chain rule: sample gradients that are sums over the uses of a parameter and of what is made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fisherfast._precision import wide_dtype
from fisherfast.capture.backward import Pass
from fisherfast.capture.capture import Capture
from fisherfast.capture.tracked import Tracked
from fisherfast.rules import Form, Rows

Used = tuple[Tracked, Form, Rows]  # of one use, the rows, samples first
_MOST, _BYTES = 16, 2**26  # samples, and bytes of their gradients, at a time


def hand_over_chained(
    capture: Capture, uses: Sequence[Used], N: int, one: Pass, take: Callable[[Tracked, Tensor, int], None]
) -> None:
    """Give ``take`` the gradients ``[n, *parameter]`` of samples ``first, ..., first + n - 1`` in a pass, of each parameter in the chain
    rule, some samples at a time.
    """
    chained = [tracked for tracked in capture.tracked.values() if tracked.chained]
    if not chained:
        return
    largest = max((made.parameter.nbytes for made, _, _ in uses), default=1)
    step = max(1, min(_MOST, _BYTES // largest))
    for first in range(0, N, step):
        last = min(first + step, N)
        sums = {tracked.name: _zeros(last - first, tracked.detached) for tracked in chained}
        for made, form, rows in uses:
            with capture.aside():
                gradients = form.gradients(rows.samples(first, last), made.parameter.shape) * one.loss_scale
                gradients = gradients.to(made.parameter.dtype)
            _pull_back(made, gradients, sums, one)
        for tracked in chained:
            take(tracked, sums[tracked.name], first)


def _pull_back(made: Tracked, gradients: Tensor, sums: dict[str, Tensor], one: Pass) -> None:
    """Add the gradients of what is made of parameters to the sums of those parameters."""
    for n, gradient in enumerate(gradients):
        for source, pulled in zip(made.sources, made.pull_back(gradient), strict=True):
            if source.name in sums:
                sums[source.name][n] += one.unscaled(pulled)


def _zeros(n: int, like: Tensor) -> Tensor:
    return torch.zeros((n, *like.shape), dtype=wide_dtype(like.dtype), device=like.device)
