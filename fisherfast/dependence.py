# SPDX-License-Identifier: Apache-2.0
"""Whether samples depend on each other: what each gives without the others, and when two outputs are the same but for rounding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fisherfast.batches import Batch


def check_independent(outputs: Callable[[Batch], Tensor], few: Batch, values: Tensor, hint: str = "") -> None:
    """Raise ValueError if the outputs ``values`` ``[N, ...]`` of a few samples are others where each is without the rest.

    Then it is in a batch of as many copies of it, which rounds as the batch does; packed, by itself.
    """
    alone = torch.cat([_without_others(outputs, few, values, n) for n in range(few.N)])
    if same_but_rounding(alone, values):
        return
    apart = (alone - values.detach()).abs().flatten(1).amax(1)
    n = int(apart.argmax())
    raise ValueError(
        f"model: samples must not depend on each other, but sample {n}'s output changes with its batch (by {float(apart[n]):.2g})"
        f"{hint}. Batch statistics and contrastive losses have no per-sample gradient"
    )


def _without_others(outputs: Callable[[Batch], Tensor], few: Batch, values: Tensor, n: int) -> Tensor:
    if few.offsets is None:
        return outputs(few.repeated(n))[n : n + 1].detach()
    alone = outputs(few.cut(n, n + 1)).detach()
    return torch.cat([alone, values[n : n + 1, alone.shape[1] :].detach()], 1)  # where the batch is longer


def same_but_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether outputs ``[N, ...]`` of the same samples differ by rounding only.

    It is held against an output itself, and against how far samples are apart in the outputs that differ at all: one of -1e9 that masks,
    or a large offset, says nothing of the others.
    """
    if a.shape != b.shape:
        return False
    a, b = a.detach(), b.detach()
    apart, infinity = a != b, torch.tensor(torch.inf, device=b.device, dtype=b.dtype)
    if not apart.any():
        return True
    ranges = torch.where(apart, b, -infinity).amax(0) - torch.where(apart, b, infinity).amin(0)
    allowed = 4 * b.abs() + 16 * ranges[apart.any(0)].median().clamp_min(1.0)
    return bool(((a - b).abs() <= torch.finfo(a.dtype).eps * allowed)[apart].all())


def check_first(alone: Tensor, together: Tensor) -> None:
    """Raise ValueError if the first sample by itself is plainly another than in its batch: an input was cut that holds no samples."""
    first = together[:1].detach()
    if alone.shape == first.shape:
        apart = (alone.detach() - first).abs()
        others = first[apart != 0]  # an output that masks is the same, and says nothing of how large the others are
        if not others.numel() or apart.max() <= 0.01 * others.abs().median():  # rounding, whatever the precision
            return
    raise ValueError(
        "data: inputs whose first axis is as long as the batch must hold its samples, got one that does not: the first sample alone "
        "has another output than in its batch; pass such an input as [1, ...], or expanded to [N, ...]"
    )
