# SPDX-License-Identifier: Apache-2.0
"""Passes: the backward passes through a captured graph that count.

The driver between capture (which hears x and g of each call) and the collectors (which add them up). It knows nothing of
likelihoods or of what a collector computes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, combinations
from typing import Any

from torch import Tensor

from fisherfast.capture.backward import Backward, Pass
from fisherfast.capture.calls import Call, CallUse, Key
from fisherfast.capture.capture import Capture
from fisherfast.capture.chained import Used, hand_over_chained
from fisherfast.capture.collector import Receiver, Samples
from fisherfast.capture.folded import Folded, one_position
from fisherfast.capture.layout import Sightings
from fisherfast.capture.locator import Locator
from fisherfast.capture.tagging import Tagging
from fisherfast.capture.tracked import Tracked
from fisherfast.capture.underflow import Underflow
from fisherfast.capture.uses import Uses
from fisherfast.rules import Form, Rows, Window, combines, joined

Group = tuple[str, Window | None]  # a parameter, or a part of it


@dataclass
class _Batch:
    """What the passes through one graph share."""

    root: Tensor
    N: int
    groups: dict[Group, list[CallUse]]
    unlocated: set[Key]
    again: set[Key]  # uses whose layout is known, to be looked at once more
    owners: dict[Key, Tensor]  # whose each row is, in any pass
    folds: bool  # whether passes over one position may be added up
    folded: dict[int, Folded | None] = field(default_factory=dict)  # by the call's index; None: one that cannot be


class Passes:
    """Runs the backward passes of each batch on the graphs of one capture, and hands over what they bring."""

    def __init__(self, capture: Capture, collectors: Sequence[Receiver]) -> None:
        self.capture, self.collectors = capture, collectors
        self._separate = any(collector.separate for collector in collectors)
        self._combine: set[tuple[Any, ...]] = set()  # the ways in which a parameter was used several times that combine
        averages = any(collector.averages for collector in collectors)
        self.locator, self.backward = Locator(capture, averages), Backward(capture)
        self.tagging = Tagging(capture, self.backward, self.locator)
        self._underflow = Underflow()

    @property
    def underflow(self) -> dict[str, list[int]]:
        """See ``Underflow.counts``."""
        return self._underflow.counts()

    def route_mixed_forms(self, uses: Uses) -> None:
        """Of parameters that are used in forms which do not combine, sum the sample gradients over the uses."""
        of_each: defaultdict[str, list[CallUse]] = defaultdict(list)
        for use in uses.all:
            of_each[use.tracked.name].append(use)
        several = {name: mine for name, mine in of_each.items() if len(mine) > 1 and not mine[0].tracked.in_chain}
        for name, mine in several.items():
            ways = (name, len(mine), frozenset((use.window, use.form) for use in mine))
            if ways in self._combine:
                continue
            reason = _conflict(mine)
            if reason is None:
                self._combine.add(ways)
            else:
                mine[0].tracked.chain(reason)

    def run(
        self,
        uses: Uses,
        passes: Iterable[Pass],
        samples: Samples,
        *,
        keep: bool = False,
        support: Callable[[], Pass] | None = None,
    ) -> None:
        """Back-propagate the passes of a batch, as many as ``samples`` says, and hand each parameter's rows, all its uses joined, to the
        collectors.

        ``support``: makes a pass in which every row has a gradient that has one in any of the others; where data choose rows, each pass
        has these rows.
        """
        root = uses.root
        self.route_mixed_forms(uses)
        groups: defaultdict[Group, list[CallUse]] = defaultdict(list)
        for use in uses.all:
            if use.tracked.fallback is None or use.tracked.in_chain:
                groups[use.key[:2]].append(use)
        windows: defaultdict[str, set[Window | None]] = defaultdict(set)
        for name, window in groups:
            windows[name].add(window)
        for name, tracked in self.capture.tracked.items():
            if tracked.fallback is None:
                for collector in self.collectors:
                    collector.expect(tracked, windows[name])
        N, count = samples.N, samples.passes
        unlocated, again = self.locator.begin(chain.from_iterable(groups.values()), samples)
        owners: dict[Key, Tensor] = {}
        if support is not None and count > 1:
            chosen = {use.key for uses in groups.values() for use in uses if N == 1 and use.gathered}
            shared = unlocated | (set() if self.locator.every else again | chosen)
            owners = self.tagging.owners(root, support(), shared) if shared else {}
            again -= owners.keys()
        batch = _Batch(root, N, groups, unlocated, again, owners, count > 1 and not self._separate)
        for number, one in enumerate(passes):
            _OnePass(self, self._underflow, batch, one, number).run(keep or number + 1 < count)
        with self.capture.aside():
            for folded in filter(None, batch.folded.values()):
                for use, rows in folded.rows():
                    self.hand_over(use.tracked, use.form, use.form.oriented(self.locator.samples_first(use, rows, N)), 1.0, 0)

    def hand_over(self, tracked: Tracked, form: Form, rows: Rows, scale: float, number: int) -> None:
        """Rows of one part of a parameter, samples first, to the collectors."""
        for collector in self.collectors:
            collector.add(tracked, form, rows, scale, number)

    def loop(self, root: Tensor, tracked: list[Tracked], n: int, passes: Iterable[Pass]) -> None:
        """Hand sample n's gradients by autograd itself to the collectors: the loop's share. Keeps the graph."""
        for number, one in enumerate(passes):
            for which, gradient in zip(tracked, self.backward.gradients(root, tracked, one.cotangent), strict=True):
                self.hand_over_gradients(which, one.unscaled(gradient).unsqueeze(0), n, one.scale, number)

    def hand_over_gradients(self, tracked: Tracked, gradients: Tensor, first: int, scale: float, number: int) -> None:
        """Whole sample gradients from a fallback, to the collectors."""
        with self.capture.aside():
            for collector in self.collectors:
                collector.add_gradients(tracked, gradients, first, scale, number)


class _OnePass:
    """One backward pass that counts: of each part of a parameter the rows, until its last use is heard and they are handed over."""

    def __init__(self, passes: Passes, underflow: Underflow, batch: _Batch, one: Pass, number: int) -> None:
        self._passes, self._locator, self._underflow = passes, passes.locator, underflow
        self._batch, self._groups, self._one, self._number = batch, batch.groups, one, number
        self._visited: defaultdict[Group, int] = defaultdict(int)
        self._waiting: defaultdict[Group, list[tuple[CallUse, Rows]]] = defaultdict(list)
        self._unknown: defaultdict[Group, list[tuple[CallUse, Rows]]] = defaultdict(list)  # of uses that nothing is known of yet
        self._chained: list[Used] = []
        self._sightings: Mapping[Key, Sightings] = {}

    def run(self, keep: bool) -> None:
        """Back-propagate it; ``keep``: further passes follow."""
        batch, passes, one = self._batch, self._passes, self._one
        again = passes.tagging.doubtful(batch.root, one, batch.again) if self._number == 0 else set()
        tagged = ((batch.unlocated & self._locator.scattered) | again) - batch.owners.keys()
        if tagged:
            self._sightings = passes.tagging.sightings(batch.root, one, tagged)
        passes.backward.run(batch.root, one.cotangent, self._hear, keep or bool(batch.unlocated))
        if self._unknown:
            self._locate_unknown()
        batch.unlocated |= batch.again & self._locator.scattered
        self._check_all_visited()
        take = partial(passes.hand_over_gradients, scale=one.scale, number=self._number)
        hand_over_chained(passes.capture, self._chained, batch.N, one, take)

    def _hear(self, call: Call, g: Tensor | None, saved: tuple[Tensor, ...]) -> None:
        folded = g is not None and self._batch.folds and self._fold(call, g, saved)
        for use in call.uses:
            group = use.key[:2]
            if group not in self._groups:
                continue
            self._visited[group] += 1
            if g is not None:
                self._underflow.add(use.tracked, g)
                if folded:
                    continue
                self._take(group, use, g, saved)
            if self._visited[group] == len(self._groups[group]) and group not in self._unknown:
                self._join(group, self._waiting.pop(group, []))

    def _take(self, group: Group, use: CallUse, g: Tensor, saved: tuple[Tensor, ...]) -> None:
        """Have a use's rows wait for the others, in the order of samples by what is known of it, or among the unknown."""
        batch, key, rows = self._batch, use.key, use.rows(self._one.unscaled(g), saved)
        located: Rows | None
        if batch.N == 1:
            located = self._locator.alone(use, rows, batch.owners.get(key))
        elif key in batch.owners:
            located = self._locator.gathered(use, rows, batch.N, batch.owners[key])
        elif key in self._sightings:
            located = self._tagged(use, rows)
        elif key not in batch.unlocated:
            located = self._locator.samples_first(use, rows, batch.N)
        elif not bool((g != 0).any()):
            located = self._locator.without_gradient(use, rows, batch.N)
        else:
            self._unknown[group].append((use, rows))
            return
        if located is not None:
            self._waiting[group].append((use, located))

    def _tagged(self, use: CallUse, rows: Rows) -> Rows:
        """Rows in the order of samples, by what tags showed."""
        return self._locator.gathered(use, rows, self._batch.N, self._sightings[use.key].numbers(rows.g, use.form.features))

    def _join(self, group: Group, heard: list[tuple[CallUse, Rows]]) -> None:
        """One part of a parameter, all its uses heard: hand it over, or leave it to the chain rule.

        Rows come in the order of the forward pass, for a use may be of a part of a mask's positions: a step, or a chunk of them.
        """
        uses = [(use.form, rows) for use, rows in sorted(heard, key=lambda pair: pair[0].key[2])]
        tracked = self._groups[group][0].tracked
        if tracked.in_chain:
            self._chained += [(tracked, form, form.oriented(rows)) for form, rows in uses]
        elif not uses:
            for collector in self._passes.collectors:
                collector.touch(tracked, group[1])
        else:
            form, rows = joined([(form, form.oriented(rows)) for form, rows in uses])
            self._passes.hand_over(tracked, form, rows, self._one.scale, self._number)

    def _fold(self, call: Call, g: Tensor, saved: tuple[Tensor, ...]) -> bool:
        """Add the pass to a call's others; False where they cannot be added up, or its rows are being looked at."""
        batch = self._batch
        if any(use.key in self._sightings or use.key in batch.owners for use in call.uses):
            return False
        if call.index not in batch.folded:
            batch.folded[call.index] = Folded(call, saved) if self._can_fold(call, g, saved) else None
        folded = batch.folded[call.index]
        if folded is not None:
            folded.add(self._one.unscaled(g), self._one.scale)
        return folded is not None

    def _can_fold(self, call: Call, g: Tensor, saved: tuple[Tensor, ...]) -> bool:
        """Whether samples have one position each, and each parameter no other use."""
        batch = self._batch
        alone = all(
            use.key not in batch.unlocated and len(self._groups.get(use.key[:2], ())) == 1 and not use.tracked.in_chain
            for use in call.uses
        )
        return alone and all(one_position(self._locator.samples_first(use, use.rows(g, saved), batch.N)) for use in call.uses)

    def _locate_unknown(self) -> None:
        """Tag the uses that nothing was known of, and hand their rows over."""
        keys = {use.key for uses in self._unknown.values() for use, _ in uses}
        self._sightings = self._passes.tagging.sightings(self._batch.root, self._one, keys)
        with self._passes.capture.aside():
            for group, uses in self._unknown.items():
                located = [(use, self._tagged(use, rows)) for use, rows in uses]
                self._join(group, self._waiting[group] + located)

    def _check_all_visited(self) -> None:
        for group, expected in self._groups.items():
            if self._visited[group] != len(expected):
                raise RuntimeError(
                    f"{group[0]}: its {len(expected)} uses must each be visited once by the backward pass, got {self._visited[group]} "
                    "visits; part of the graph was cut or replaced after the forward pass. Nothing of this batch is trusted"
                )


def _conflict(uses: list[CallUse]) -> str | None:
    """Why several uses of one parameter cannot be squared as one sum by the ops, or None."""
    parts = list(dict.fromkeys(use.window for use in uses))
    for a, b in combinations(parts, 2):
        if a is None or b is None or not a.disjoint(b):
            return "parts of one tensor that overlap"
    for window in parts:
        forms = [use.form for use in uses if use.window == window]
        if not combines(forms):
            return f"one tensor used in different forms ({' and '.join(sorted({form.op for form in forms}))})"
    return None
