# SPDX-License-Identifier: Apache-2.0
"""Which rows of a weight there are, by the batch's masks: of padding there is an input, but no position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, permutations

import torch
from torch import Tensor

from fisherfast._warning import warn

_EVERY = -1  # the place of all masks together; that of a mask is counted from the last


class ExistingRows:
    """Asks the masks about the rows of one weight; ``name`` is what a warning calls it."""

    def __init__(self, name: str) -> None:
        self._name, self._warned = name, False
        self._mask: int | None = None  # the place of the mask that was alone in leaving out no row with a gradient
        self._uses: int | None = None  # of those whose positions in turn were, and left out all others

    def among(self, g: Tensor, masks: Sequence[Tensor]) -> Tensor | None:
        """Which rows of gradients ``g`` ``[N, T, O]`` there are ``[N, T]``; None if no mask leaves any out. The last mask is the output's.

        They are the T positions of a mask, although few of them may have a gradient; else those of one or several masks in an order
        in which exactly the positions that are left out have none (rows of which a head reads only the first would fit anything); else
        the positions of each mask in turn, or of one, once for each use.
        """
        numbered = {
            k: mask != 0 for k, mask in enumerate(reversed(masks)) if mask.dim() == 2 and len(mask) == len(g) and mask.shape[1]
        }
        if not numbered or g.dim() != 3:
            return None
        alive = (g != 0).any(-1)
        T = alive.shape[1]
        positions = {k: mask for k, mask in numbered.items() if mask.shape[1] == T}
        rows = self._one_of(positions, alive)
        rows = self._of_several(numbered, alive) if rows is None else rows
        if rows is None:
            self._warn(alive, masks)
        return None if rows is None or bool(rows.all()) else rows

    def _one_of(self, candidates: Mapping[int, Tensor], alive: Tensor) -> Tensor | None:
        """Of the candidates that leave out no row with a gradient the one that was alone in this before; else the one that leaves out exactly
        those without; else the first, the output's: an encoder's positions all have a gradient, it is a decoder's that may have no label.
        """
        fitting = _fitting(candidates, alive)
        if not fitting:
            return None
        if len(fitting) == 1:
            (self._mask,) = fitting
        if self._mask in fitting:
            return fitting[self._mask]
        exact = [rows for rows in fitting.values() if _match(alive, rows)]
        first, *others = exact or fitting.values()
        if not all(torch.equal(first, rows) for rows in others):
            self._say(
                f"{self._name}: its rows should have gradients that tell which mask they are the positions of, got {len(fitting)} that leave out "
                "none with a gradient; KFAC takes the decoder's. Pad encoder and decoder to different lengths"
            )
        return first

    def _of_several(self, masks: Mapping[int, Tensor], alive: Tensor) -> Tensor | None:
        """Rows of several uses: of those that were told before; else in any order that leaves out exactly the rows without a gradient; else
        as ``_one_of`` says.
        """
        uses = _fitting(_of_uses(masks, alive), alive)
        if self._uses in uses:
            return uses[self._uses]
        orders = chain(uses.values(), _in_other_orders([*masks.values()], alive.shape[1]))
        rows = next((rows for rows in orders if _match(alive, rows)), None)
        if rows is None:
            return self._one_of(uses, alive)
        if len(uses) == 1 and rows is next(iter(uses.values())) and not bool(rows.all()):  # without padding all orders are alike
            (self._uses,) = uses
        return rows

    def _say(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warn(message)

    def _warn(self, alive: Tensor, masks: Sequence[Tensor]) -> None:
        """Rows that end earlier the shorter a sample is are positions, too, in some order or number of their own."""
        if self._warned or not any(_ends_with(alive, mask) for mask in masks):
            return
        lengths = " or ".join(str(mask.shape[1]) for mask in masks)
        self._say(
            f"{self._name}: its rows should be the positions of a mask, got {alive.shape[1]} rows a sample beside a mask of {lengths}, the fewer with a "
            f"gradient the shorter the sample; KFAC counts all {alive.shape[1]} as inputs, those of padding too. Take batches of samples of one length"
        )


def _fitting(candidates: Mapping[int, Tensor], alive: Tensor) -> dict[int, Tensor]:
    """Those that leave out no row with a gradient."""
    return {k: rows for k, rows in candidates.items() if not bool((alive & ~rows).any())}


def _of_uses(masks: Mapping[int, Tensor], alive: Tensor) -> dict[int, Tensor]:
    """The positions of every mask in turn, the output's last, and of each mask several times, where all such uses have a gradient."""
    T, some = alive.shape[1], alive.any(0).cpu()
    in_turn = {_EVERY: [*masks.values()][::-1]} | {k: [mask] * (T // mask.shape[1]) for k, mask in masks.items()}
    found: dict[int, Tensor] = {}
    for k, uses in in_turn.items():
        lengths = [mask.shape[1] for mask in uses]
        if len(uses) > 1 and sum(lengths) == T and all(bool(use.any()) for use in some.split(lengths)):
            found[k] = torch.cat(uses, 1)
    return found


def _match(alive: Tensor, rows: Tensor) -> bool:
    """Whether the rows with a gradient are all of ``rows`` and no other; a sample without labels says nothing."""
    return torch.equal(alive, rows & alive.any(1, keepdim=True))


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
        beside = T - mask.shape[1]
        if beside > 0:
            # Rows without a gradient, as many as further uses have, are no padding: a use whose gradient was lost.
            for always in (True, False) if more else (True,):
                others = mask.new_full((len(mask), beside), always)
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
