# SPDX-License-Identifier: Apache-2.0
"""Whether samples depend on each other: what each gives without the others, and when two outputs are the same but for rounding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fisherfast._pieces import pieces
from fisherfast.data.batches import Batch

_PACKED = (
    "They are packed: in Hugging Face's attention position_ids that start again, no attention_mask and config.use_cache=False keep them "
    "apart; 'sample_offsets': None in the batch says that each row is one sample"
)


def check_independent(
    outputs: Callable[[Batch], Tensor], few: Batch, values: Tensor, eps: float, hint: str = "", ran: Batch | None = None
) -> None:
    """Raise ValueError if the outputs ``values`` ``[N, ...]`` of a few samples are others where each is without the rest.

    Then it is in a batch of as many copies of it, which rounds as the batch does; packed, by itself. ``eps``: see ``precision``.
    A model that gives two outputs for one batch is told so instead: its samples may well be independent. ``ran``: the batch that
    gave ``values``, if it begins with the few.
    """
    alone = torch.empty_like(values)
    for n in range(few.N):
        alone[n] = _without_others(outputs, few, values, n)  # no two outputs of the model at a time
    if same_but_rounding(alone, values, eps):
        return
    check_repeatable(outputs(ran or few)[: few.N].detach(), values.detach(), eps)
    apart = _apart(alone, values.detach()).flatten(1).amax(1)
    n = int(apart.argmax())
    packed = few.offsets is not None
    raise ValueError(
        f"model: samples must not depend on each other, but sample {n}'s output changes with its batch (by {float(apart[n]):.2g})"
        f"{hint}. {_PACKED if packed else 'Batch statistics and contrastive losses have no per-sample gradient'}"
    )


def check_repeatable(again: Tensor, values: Tensor, eps: float) -> None:
    """Raise ValueError if a batch has another output again."""
    if not same_but_rounding(again, values, eps):
        raise ValueError(
            "model: must have the same output for the same batch, got two that differ by "
            f"{float(_apart(again, values).max()):.2g}: it draws random numbers, or changes its own state, in its forward pass "
            "(spectral_norm does in train mode); call model.eval(), or let the data hold what is drawn"
        )


def precision(model: nn.Module, values: Tensor) -> float:
    """The coarsest rounding that outputs went through: theirs, the parameters' and autocast's."""
    dtypes = {values.dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    if torch.is_autocast_enabled(values.device.type):
        dtypes.add(torch.get_autocast_dtype(values.device.type))
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _without_others(outputs: Callable[[Batch], Tensor], few: Batch, values: Tensor, n: int) -> Tensor:
    if few.offsets is None:
        return outputs(few.repeated(n))[n : n + 1].detach()
    alone = outputs(few.cut(n, n + 1)).detach()
    return torch.cat([alone, values[n : n + 1, alone.shape[1] :].detach()], 1)  # where the batch is longer


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """How far entries are apart; equal ones not at all, infinite or not."""
    return torch.where(a == b, 0.0, (a - b).abs())


def same_but_rounding(a: Tensor, b: Tensor, eps: float) -> bool:
    """Whether outputs ``[N, ...]`` of the same samples differ by rounding only.

    Rounding is a difference below ``eps (4 |b| + 16 scale)``; ``scale`` is the median, over the output entries that differ at all, of the
    range across samples. Entries that are equal are left out of it, so that one of -1e9 that masks, or a large offset, hides no difference.
    """
    if a.shape != b.shape:
        return False
    a, b = a.detach(), b.detach()
    different = a != b
    if not different.any():
        return True
    ranges = torch.where(different, b, -torch.inf).amax(0).sub_(torch.where(different, b, torch.inf).amin(0))
    scale = _median(ranges, different.any(0))
    if not scale > 0:  # one sample alone has no range
        scale = _median(b.abs(), different)
    return _all_within(a, b, lambda b: eps * (4 * b.abs() + 16 * scale))  # one that is infinite in one is another


def roughly_same(a: Tensor, b: Tensor, eps: float) -> bool:
    """Whether outputs are the same but for rounding that differs, as that of other kernels for another number of samples."""
    if a.shape != b.shape:
        return False
    different = a != b  # an output that masks is the same, and says nothing of how large the others are
    if not different.any():
        return True
    median = _median(b.abs(), different)
    return _all_within(a, b, lambda b: max(0.02, 16 * eps) * (b.abs() + median))


def _median(values: Tensor, mask: Tensor) -> Tensor:
    """The median of the values where the mask is; these are overwritten. Indexed by a mask, logits would give several times their size in indices."""
    return values.masked_fill_(~mask, torch.nan).nanmedian()


def _all_within(a: Tensor, b: Tensor, bound: Callable[[Tensor], Tensor]) -> bool:
    """Whether all entries are equal, or less than ``bound(b)`` apart."""
    return all(bool(((_apart(a, b) < bound(b)) | (a == b)).all()) for a, b in zip(pieces(a), pieces(b), strict=True))


def dependent(outputs: Callable[[Batch], Tensor], batch: Batch, values: Tensor, eps: float) -> int | None:
    """The sample that plainly has another output in a batch of its copies, or packed by itself; None if that one has not.

    Where no gradient passes from sample to sample nothing else shows it: statistics of the batch that were detached. It is the one of the
    smallest outputs: a maximum over the batch is rather another's. A model that gives another output each time is not looked at.
    ``values``: the outputs of the batch's first few samples; those that do not count are zero.
    """
    n = int(torch.stack([sample.abs().sum() for sample in values]).argmin())
    if batch.offsets is None:
        alone, together = outputs(batch.repeated(n, 2))[:1], values[n : n + 1]
    else:
        alone = outputs(batch.cut(n, n + 1))
        together = values[n : n + 1, : alone.shape[1]]  # where the batch is longer
    depends = not roughly_same(alone, together, eps)
    return n if depends and roughly_same(outputs(batch.cut(0, len(values))), values, eps) else None


def check_alone(alone: Tensor, together: Tensor, eps: float) -> None:
    """Raise ValueError if samples by themselves are plainly others than in their batch: an input was cut that holds no samples."""
    if roughly_same(alone.detach(), together.detach(), eps):
        return
    raise ValueError(
        "data: inputs whose first axis is as long as the batch must hold its samples, got one that does not: a sample alone "
        "has another output than in its batch; pass such an input as [1, ...], or expanded to [N, ...]. A model that draws random "
        "numbers in its forward pass has another output, too"
    )
