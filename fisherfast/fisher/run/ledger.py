# SPDX-License-Identifier: Apache-2.0
"""``Ledger``: what the collectors would take for a batch, told from the rows of a few samples."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from fisherfast.capture.collector import Collector, Cost
from fisherfast.capture.folded import one_position
from fisherfast.capture.tracked import Tracked
from fisherfast.rules import ALL, Elementwise, Form, Rows, Window


class Ledger:
    """A ``Receiver`` that stands in for the collectors ``asked``: notes what each would take for the rows of ``N`` such samples, and lets the rows go."""

    separate = True
    averages = False

    def __init__(self, asked: Sequence[Collector], passes: int, N: int) -> None:
        self._asked, self._passes, self._N = asked, passes, N
        self._folds = not any(collector.separate for collector in asked)
        self.costs: list[defaultdict[str, Cost]] = [defaultdict(Cost) for _ in asked]

    def add(self, tracked: Tracked, form: Form, rows: Rows, scale: float, number: int) -> None:
        """See ``Collector``."""
        passes = 1 if self._folds and one_position(rows) else self._passes
        entries = None if form.window is None else form.window.entries(tracked.parameter.shape)
        names = {tracked.name, (entries or ALL).named(tracked.name)}  # what is held may be of the part alone
        many = _of_samples(rows, self._N)
        for collector, mine in zip(self._asked, self.costs, strict=True):
            cost = collector.cost(tracked, form, many).of_batch(passes)
            for name in names:
                mine[name] += cost

    def expect(self, tracked: Tracked, windows: set[Window | None]) -> None:
        """See ``Receiver``: nothing is kept."""

    def add_gradients(self, tracked: Tracked, gradients: Tensor, first: int, scale: float, number: int) -> None:
        """See ``Receiver``: what comes whole is noted by ``note_whole``."""

    def touch(self, tracked: Tracked, window: Window | None) -> None:
        """See ``Receiver``: nothing is kept."""

    def note_whole(self, tracked: Tracked) -> None:
        """The same of a parameter whose sample gradients come whole."""
        shape = tuple(tracked.parameter.shape)
        g = tracked.parameter.new_zeros(()).expand(self._N, 1, math.prod(shape))
        self.add(tracked, Elementwise(shape), Rows(None, g), 1.0, 0)


def _of_samples(rows: Rows, N: int) -> Rows:
    """Rows as N samples like these have them, on no memory."""
    count, offsets = N, None
    if rows.offsets is not None:
        count = round(len(rows.g) * N / rows.num_samples)
        offsets = torch.linspace(0, count, N + 1, device=rows.offsets.device).long()
    lookup = None if rows.lookup is None else _of_samples(rows.lookup, N)
    return rows.each(lambda t: t.new_zeros(()).expand(count, *t.shape[1:]), offsets)._replace(lookup=lookup)
