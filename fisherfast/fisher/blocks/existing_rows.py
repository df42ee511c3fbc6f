# SPDX-License-Identifier: Apache-2.0
"""Which rows of a weight there are, by the batch's masks: of padding there is an input, but no position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fisherfast._warning import warn


class ExistingRows:
    """Asks the masks about the rows of one weight; ``name`` is what a warning calls it."""

    def __init__(self, name: str) -> None:
        self._name, self._warned = name, False

    def among(self, g: Tensor, masks: Sequence[Tensor]) -> Tensor | None:
        """Which rows of gradients ``g`` ``[N, T, O]`` there are ``[N, T]``; None if no mask leaves any out.

        A mask ``[N, L]`` says something of these rows if it has their shape in one of the ways in which positions come to lie, and
        none that it leaves out has a gradient: a decoder may be as long as the encoder it is not of. Of several that do, the one with
        fewest rows.
        """
        masks = [mask != 0 for mask in masks if mask.dim() == 2 and len(mask) == len(g) and mask.shape[1]]
        if not masks or g.dim() != 3:
            return None
        alive = (g != 0).any(-1)
        fitting = (
            next((rows for rows in _laid_out(mask, g.shape[1]) if not bool((alive & ~rows).any())), None) for mask in masks
        )
        found = min((rows for rows in fitting if rows is not None), key=lambda rows: int(rows.sum()), default=None)
        if found is None:
            self._warn(alive, masks)
        return None if found is None or bool(found.all()) else found

    def _warn(self, alive: Tensor, masks: Sequence[Tensor]) -> None:
        T = alive.shape[1]
        if self._warned or T == 1 or bool(alive.all()) or all(bool(mask.all()) for mask in masks):
            return
        self._warned = True
        lengths = " or ".join(str(mask.shape[1]) for mask in masks)
        warn(
            f"{self._name}: its rows should be the positions that a mask tells apart from padding, got {T} rows a sample, some without a gradient, "
            f"beside a mask of {lengths} positions that does not describe them; KFAC counts all {T} as inputs, those of padding too. Take batches "
            "of samples of one length, unless these rows are something else than positions"
        )


def _laid_out(mask: Tensor, T: int) -> Iterator[Tensor]:
    """A mask ``[N, L]`` as rows ``[N, T]`` may lie: all pairs of positions; all positions once for each use, or each several times (heads);
    in reverse; after or before others that always exist (a prompt, a mean).
    """
    N, L = mask.shape
    times, more = divmod(T, L)
    if not more and times:
        if times == L > 1:
            yield (mask.unsqueeze(2) & mask.unsqueeze(1)).flatten(1)
        yield mask.repeat(1, times)
        yield mask.repeat_interleave(times, 1) if times > 1 else mask.flip(1)
    elif times == 1:
        others = mask.new_ones(N, more)
        yield torch.cat([others, mask], 1)
        yield torch.cat([mask, others], 1)
