# SPDX-License-Identifier: Apache-2.0
"""Passes: the backward passes through a captured graph that count.

The driver between capture (which hears x and g of each call) and the collectors (which add them up). It knows nothing of
likelihoods or of what a collector computes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor

from fisherfast._precision import wide_dtype
from fisherfast.capture.backward import Backward, Pass
from fisherfast.capture.calls import Call, CallUse, Key
from fisherfast.capture.capture import Capture
from fisherfast.capture.collector import Receiver, Samples
from fisherfast.capture.folded import Folded, one_position
from fisherfast.capture.layout import Sightings
from fisherfast.capture.locator import Locator
from fisherfast.capture.tagging import Tagging
from fisherfast.capture.tracked import Tracked
from fisherfast.capture.uses import Uses
from fisherfast.rules import Form, Rows, Window, combines, joined

Group = tuple[str, Window | None]  # a parameter, or a part of it
_MOST_CHAINED, _CHAINED_BYTES = 16, 2**26  # samples, and bytes of their gradients, at a time


@dataclass
class _Batch:
    """What the passes through one graph share."""

    root: Tensor
    groups: dict[Group, list[CallUse]]
    unlocated: set[Key]
    again: set[Key]  # uses whose layout is known, to be looked at once more
    owners: dict[Key, Tensor]  # whose each row is, in any pass
    folds: bool  # whether passes over one position may be added up
    folded: dict[int, Folded | None] = field(default_factory=dict)  # by the call's index; None: one that cannot be
    chained: list[tuple[Tracked, Form, Rows]] = field(default_factory=list)  # uses of one pass whose sample gradients are summed

    @property
    def N(self) -> int:
        """Samples."""
        return self.root.shape[0]


class Passes:
    """Runs the backward passes of each batch on the graphs of one capture, and hands over what they bring."""

    def __init__(self, capture: Capture, collectors: Sequence[Receiver]) -> None:
        self.capture, self.collectors = capture, collectors
        self._separate = any(collector.separate for collector in collectors)
        self._combine: set[tuple[Any, ...]] = set()  # the ways in which a parameter was used several times that combine
        averages = any(collector.averages for collector in collectors)
        self.locator, self.backward = Locator(capture, averages), Backward(capture)
        self.tagging = Tagging(capture, self.backward, self.locator)
        self._underflow: dict[str, tuple[int | Tensor, int]] = {}  # of each parameter: subnormal float16 gradients, and all

    @property
    def underflow(self) -> dict[str, list[int]]:
        """``{parameter name: [float16 gradients that are subnormal, all of them]}``."""
        return {name: [int(small), every] for name, (small, every) in self._underflow.items()}

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

        ``support``: makes a pass that gives a gradient to every row that any of several passes gives one; rows chosen by the data are
        those, in each of them.
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
        batch = _Batch(root, groups, unlocated, again, owners, count > 1 and not self._separate)
        for number, one in enumerate(passes):
            self._run_one(batch, one, number, keep or number + 1 < count)
        with self.capture.aside():
            for folded in filter(None, batch.folded.values()):
                for use, rows in folded.rows():
                    self._hand_over(use.tracked, use.form, use.form.oriented(self.locator.samples_first(use, rows, N)), 1.0, 0)

    def _run_one(self, batch: _Batch, one: Pass, number: int, keep: bool) -> None:
        visited: defaultdict[Group, int] = defaultdict(int)
        waiting: defaultdict[Group, list[tuple[Form, Rows]]] = defaultdict(list)
        held: defaultdict[Group, list[tuple[CallUse, Rows]]] = defaultdict(list)  # of uses that nothing is known of yet
        again = self.tagging.doubtful(batch.root, one, batch.again) if number == 0 else set()
        tagged = ((batch.unlocated & self.locator.scattered) | again) - batch.owners.keys()
        sightings = self.tagging.sightings(batch.root, one, tagged) if tagged else {}

        def listen(call: Call, g: Tensor | None, saved: tuple[Tensor, ...]) -> None:
            folded = g is not None and batch.folds and self._fold(batch, one, call, g, saved, sightings)
            for use in call.uses:
                group = use.key[:2]
                if group not in batch.groups:
                    continue
                visited[group] += 1
                if g is not None:
                    self._count_underflow(use, g)
                    if folded:
                        continue
                    rows = use.rows(one.unscaled(g), saved)
                    located = self._located(batch, use, rows, sightings)
                    if located is None and bool((g != 0).any()):
                        held[group].append((use, rows))
                        continue
                    if located is None:
                        located = self.locator.without_gradient(use, rows, batch.N)
                    if located is not None:
                        waiting[group].append((use.form, located))
                if visited[group] == len(batch.groups[group]) and group not in held:
                    self._joined(batch, group, waiting.pop(group, []), one.scale, number)

        self.backward.run(batch.root, one.cotangent, listen, keep or bool(batch.unlocated))
        if held:
            sightings = self.tagging.sightings(batch.root, one, {use.key for uses in held.values() for use, _ in uses})
        with self.capture.aside():
            for group, uses in held.items():
                rows = [(use.form, self._gathered(batch.N, use, r, sightings)) for use, r in uses]
                self._joined(batch, group, waiting[group] + rows, one.scale, number)
        batch.unlocated |= batch.again & self.locator.scattered
        for group, expected in batch.groups.items():
            if visited[group] != len(expected):
                raise RuntimeError(
                    f"{group[0]}: its {len(expected)} uses must each be visited once by the backward pass, got {visited[group]} "
                    "visits; part of the graph was cut or replaced after the forward pass. Nothing of this batch is trusted"
                )
        self._hand_over_chained(batch, one, number)

    def _located(self, batch: _Batch, use: CallUse, rows: Rows, sightings: Mapping[Key, Sightings]) -> Rows | None:
        """Rows in the order of samples, by what is known of their use; None if nothing is known yet."""
        if batch.N == 1:
            return self.locator.alone(use, rows, batch.owners.get(use.key))
        if use.key in batch.owners:
            return self.locator.gathered(use, rows, batch.N, batch.owners[use.key])
        if use.key in sightings:
            return self._gathered(batch.N, use, rows, sightings)
        return None if use.key in batch.unlocated else self.locator.samples_first(use, rows, batch.N)

    def _gathered(self, N: int, use: CallUse, rows: Rows, sightings: Mapping[Key, Sightings]) -> Rows:
        return self.locator.gathered(use, rows, N, sightings[use.key].numbers(rows.g, use.form.features))

    def _fold(self, batch: _Batch, one: Pass, call: Call, g: Tensor, saved: tuple[Tensor, ...], tagged: Container[Key]) -> bool:
        """Add a pass to a call's others; False where they cannot be added up, or its rows are being looked at."""
        if any(use.key in tagged or use.key in batch.owners for use in call.uses):
            return False
        if call.index not in batch.folded:
            batch.folded[call.index] = Folded(call, saved) if self._can_fold(batch, call, g, saved) else None
        folded = batch.folded[call.index]
        if folded is not None:
            folded.add(one.unscaled(g), one.scale)
        return folded is not None

    def _can_fold(self, batch: _Batch, call: Call, g: Tensor, saved: tuple[Tensor, ...]) -> bool:
        """Whether samples have one position each, and each parameter no other use."""
        alone = all(
            use.key not in batch.unlocated and len(batch.groups.get(use.key[:2], ())) == 1 and not use.tracked.in_chain
            for use in call.uses
        )
        return alone and all(one_position(self.locator.samples_first(use, use.rows(g, saved), batch.N)) for use in call.uses)

    def _joined(self, batch: _Batch, group: Group, uses: list[tuple[Form, Rows]], scale: float, number: int) -> None:
        """One part of a parameter, all its uses heard: hand it over."""
        tracked = batch.groups[group][0].tracked
        if tracked.in_chain:
            batch.chained += [(tracked, form, form.oriented(rows)) for form, rows in uses]
        elif not uses:
            for collector in self.collectors:
                collector.touch(tracked, group[1])
        else:
            form, rows = joined([(form, form.oriented(rows)) for form, rows in uses])
            self._hand_over(tracked, form, rows, scale, number)

    def _hand_over(self, tracked: Tracked, form: Form, rows: Rows, scale: float, number: int) -> None:
        for collector in self.collectors:
            collector.add(tracked, form, rows, scale, number)

    def _hand_over_chained(self, batch: _Batch, one: Pass, number: int) -> None:
        """The sample gradients that are sums over the uses of a parameter and of what is made of it, some samples at a time."""
        tracked = [t for t in self.capture.tracked.values() if t.chained]
        if not tracked:
            return
        largest = max((made.parameter.nbytes for made, _, _ in batch.chained), default=1)
        step = max(1, min(_MOST_CHAINED, _CHAINED_BYTES // largest))
        for first in range(0, batch.N, step):
            last = min(first + step, batch.N)
            sums = {t.name: _zeros(last - first, t.detached) for t in tracked}
            for made, form, rows in batch.chained:
                with self.capture.aside():
                    gradients = form.gradients(rows.samples(first, last), made.parameter.shape) * one.loss_scale
                    gradients = gradients.to(made.parameter.dtype)
                for n, gradient in enumerate(gradients):
                    for source, pulled in zip(made.sources, made.pull_back(gradient), strict=True):
                        if source.name in sums:
                            sums[source.name][n] += one.unscaled(pulled)
            for which in tracked:
                self.hand_over_gradients(which, sums[which.name], first, one.scale, number)
        batch.chained.clear()

    def _count_underflow(self, use: CallUse, g: Tensor) -> None:
        if g.dtype == torch.float16:
            small = ((g != 0) & (g.abs() < torch.finfo(g.dtype).tiny)).sum()
            for source in use.tracked.sources:
                found, every = self._underflow.get(source.name, (0, 0))
                self._underflow[source.name] = found + small, every + g.numel()  # on the device: nothing waits for it

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


def _zeros(n: int, like: Tensor) -> Tensor:
    return torch.zeros((n, *like.shape), dtype=wide_dtype(like.dtype), device=like.device)


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
