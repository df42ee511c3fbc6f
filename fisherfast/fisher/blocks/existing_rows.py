# SPDX-License-Identifier: Apache-2.0
"""Which rows of a weight there are, by the batch's masks: of padding there is an input, but no position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, permutations

import torch
from torch import Tensor

from fisherfast._warning import warn


class ExistingRows:
    """Asks the masks about the rows of one weight; ``name`` is what a warning calls it."""

    def __init__(self, name: str) -> None:
        self._name, self._warned = name, False

    def among(self, g: Tensor, masks: Sequence[Tensor]) -> Tensor | None:
        """Which rows of gradients ``g`` ``[N, T, O]`` there are ``[N, T]``; None if no mask leaves any out.

        A mask ``[N, L]`` may describe rows that are its positions, once for each use, although few of them have a gradient; of several
        that do, the one with fewest rows. In any other order it must leave out exactly those without a gradient: rows of which a head
        reads only the first would fit anything.
        """
        masks = [mask != 0 for mask in masks if mask.dim() == 2 and len(mask) == len(g) and mask.shape[1]]
        if not masks or g.dim() != 3:
            return None
        alive = (g != 0).any(-1)
        of_samples = alive.any(1, keepdim=True)  # a sample without labels says nothing
        in_order = [mask.repeat(1, alive.shape[1] // mask.shape[1]) for mask in masks if _may_be_uses(alive, mask.shape[1])]
        for rows in chain(in_order, _in_other_orders(masks, alive.shape[1])):
            if torch.equal(alive, rows & of_samples):
                return None if bool(rows.all()) else rows
        fitting = [rows for rows in in_order if not bool((alive & ~rows).any())]
        if not fitting:
            self._warn(alive, masks)
        if not fitting or any(bool(rows.all()) for rows in fitting):
            return None
        return min(fitting, key=lambda rows: int(rows.sum()))

    def _warn(self, alive: Tensor, masks: Sequence[Tensor]) -> None:
        """Rows that end earlier the shorter a sample is are positions, too, in some order or number of their own."""
        if self._warned or not any(_ends_with(alive, mask) for mask in masks):
            return
        self._warned = True
        lengths = " or ".join(str(mask.shape[1]) for mask in masks)
        warn(
            f"{self._name}: its rows should be the positions of a mask, got {alive.shape[1]} rows a sample beside a mask of {lengths}, the fewer with a "
            f"gradient the shorter the sample; KFAC counts all {alive.shape[1]} as inputs, those of padding too. Take batches of samples of one length"
        )


def _may_be_uses(alive: Tensor, L: int) -> bool:
    """Whether rows may be L positions for each of one or more uses, all of which have a gradient."""
    times, more = divmod(alive.shape[1], L)
    return not more and (times == 1 or (times > 1 and bool(alive.any(0).view(times, L).any(1).all())))


def _in_other_orders(masks: Sequence[Tensor], T: int) -> Iterator[Tensor]:
    """Masks as rows ``[N, T]`` may lie: every position several times (heads), all pairs of positions, in reverse, beside others that always
    exist (a prompt, a mean) or never do (padding of the model's own), the positions of one mask after those of another.
    """
    for mask in masks:
        times, more = divmod(T, mask.shape[1])
        if not more and times:
            yield mask.repeat_interleave(times, 1) if times > 1 else mask.flip(1)
        if T == mask.shape[1] ** 2:
            yield (mask.unsqueeze(2) & mask.unsqueeze(1)).flatten(1)
        if more and times == 1:
            for others in (mask.new_ones(len(mask), more), mask.new_zeros(len(mask), more)):
                yield torch.cat([others, mask], 1)
                yield torch.cat([mask, others], 1)
    for pair in permutations(masks, 2):
        if sum(mask.shape[1] for mask in pair) == T:
            yield torch.cat(pair, 1)


def _ends_with(alive: Tensor, mask: Tensor) -> bool:
    """Whether the last row with a gradient comes the earlier, the earlier a sample's last position does."""
    known = alive.any(1)
    if alive.shape[1] < 2 or int(known.sum()) < 2:
        return False
    ends, lasts = _last(alive)[known], _last(mask)[known]
    sooner = lasts.unsqueeze(0) < lasts.unsqueeze(1)
    in_order = not bool((sooner & (ends.unsqueeze(0) > ends.unsqueeze(1))).any())
    return in_order and bool(sooner.any()) and len(ends.unique()) > 1


def _last(rows: Tensor) -> Tensor:
    """The place of the last True of each row."""
    return rows.shape[1] - 1 - rows.flip(1).to(torch.uint8).argmax(1)
