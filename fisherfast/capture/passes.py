# SPDX-License-Identifier: Apache-2.0
"""Passes: backward passes through a captured graph, from the probe that finds the sample axis to the ones that count.

The driver between capture (which hears x and g of each call) and the collectors (which add them up). It knows nothing of
likelihoods or of what a collector computes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor

from fisherfast._precision import wide, wide_dtype
from fisherfast.capture.calls import Call, CallUse, Key, graph
from fisherfast.capture.collector import Receiver
from fisherfast.capture.layout import PROBED, UNKNOWN, Finding, Sightings, Tags
from fisherfast.capture.locator import Locator
from fisherfast.capture.mode import Capture, Listener
from fisherfast.capture.tracked import Tracked
from fisherfast.capture.uses import Uses
from fisherfast.rules import Form, Rows, Window, combines, joined

Group = tuple[str, Window | None]  # a parameter, or a part of it
_MOST_CHAINED, _CHAINED_BYTES = 16, 2**26  # samples, and bytes of their gradients, at a time
# torch.autograd.grad without its looks at the arguments, each of which the capture would be shown. And as a function that modes
# see, it would switch them off for all that happens inside.
_run_backward = torch.autograd.graph._engine_run_backward


@dataclass(frozen=True)
class Pass:
    """One backward pass that counts: the gradient of the summed loss at the root, and the scale of its squares.

    ``loss_scale``: what the gradient was multiplied by, to be taken out before anything is squared.
    """

    cotangent: Tensor
    scale: float = 1.0
    loss_scale: float = 1.0

    def unscaled(self, g: Tensor) -> Tensor:
        """A gradient without the factor, in float32 or wider, where digits lost to a factor would stay lost."""
        return g if self.loss_scale == 1 else wide(g) / self.loss_scale


class _Folded:
    """A call whose samples have one position each, over several passes: ``sum_p (g_p x)^2 = (sum_p g_p^2) x^2``, so one op call does
    for each of its parameters.
    """

    def __init__(self, call: Call, saved: tuple[Tensor, ...]) -> None:
        self.uses, self._saved = call.uses, saved
        self._squares: Tensor | None = None

    def add(self, g: Tensor, scale: float) -> None:
        """Add one pass."""
        g = wide(g)
        if self._squares is None:
            self._squares = g.square().mul_(scale)
        else:
            self._squares.addcmul_(g, g, value=scale)

    def rows(self) -> Iterator[tuple[CallUse, Rows]]:
        """Of each use, rows whose squares are those sums."""
        assert self._squares is not None
        # Not sqrt(), which on a CPU is many times slower where there are zeros: after a ReLU they are half of all.
        g = self._squares.clamp_min(torch.finfo(self._squares.dtype).tiny).rsqrt_().mul_(self._squares)
        for use in self.uses:
            rows = _rows(use, g, self._saved)
            floats = rows.x is not None and rows.x.is_floating_point()
            yield use, rows._replace(x=rows.inputs.to(g.dtype)) if floats else rows


@dataclass
class _Batch:
    """What the passes through one graph share."""

    root: Tensor
    groups: dict[Group, list[CallUse]]
    unlocated: set[Key]
    again: set[Key]  # uses whose layout is known, to be looked at once more
    owners: dict[Key, Tensor]  # whose each row is, in any pass
    folds: bool  # whether passes over one position may be added up
    folded: dict[int, _Folded | None] = field(default_factory=dict)  # by the call's index; None: one that cannot be
    chained: list[tuple[Tracked, Form, Rows]] = field(default_factory=list)  # uses of one pass whose sample gradients are summed

    @property
    def N(self) -> int:
        """Samples."""
        return self.root.shape[0]


def _each_times(cotangent: Tensor, factors: Tensor) -> Tensor:
    """The gradient at the root ``[N, ...]``, each sample's part of it times a number of ``[N]``."""
    return cotangent * factors.view(-1, *(1,) * (cotangent.dim() - 1))


def one_position(rows: Rows) -> bool:
    """Whether every sample has one: rows whose passes may be added up before they are squared."""
    return rows.offsets is None and rows.g.dim() == 3 and rows.g.shape[1] == 1


class Passes:
    """Runs backward passes on the graphs of one capture."""

    def __init__(self, capture: Capture, collectors: Sequence[Receiver]) -> None:
        self.capture, self.collectors = capture, collectors
        self._separate = any(collector.separate for collector in collectors)
        self._combine: set[tuple[Any, ...]] = set()  # the ways in which a parameter was used several times that combine
        self.locator = Locator(capture)
        self._underflow: dict[str, tuple[int | Tensor, int]] = {}  # of each parameter: subnormal float16 gradients, and all

    @property
    def underflow(self) -> dict[str, list[int]]:
        """``{parameter name: [float16 gradients that are subnormal, all of them]}``."""
        return {name: [int(small), every] for name, (small, every) in self._underflow.items()}

    # -- exploring

    def reached(self, root: Tensor) -> set[str]:
        """Names of the parameters that the root depends on."""
        leaves = {id(leaf): t.name for t in self.capture.tracked.values() for leaf in t.leaves}
        variables = (getattr(node, "variable", None) for node in graph(root))
        return {leaves[id(variable)] for variable in variables if id(variable) in leaves}

    def probe(self, uses: Uses, cotangent: Tensor, large: bool = False) -> dict[Key, Finding]:
        """Tag the first few samples and find out which rows of each use are whose, and their layouts; keeps the graph.

        The root and ``cotangent`` have the sample axis first.
        """
        root, N = uses.root, uses.root.shape[0]
        tags = Tags(N, PROBED, self.capture.narrow, large)
        one = Pass(_each_times(cotangent, torch.arange(N, device=root.device) < tags.few))
        numbers = self._numbers(root, one, self._tag(root, one, tags))
        findings = {key: Finding.of(found, N, self.capture.offsets) for key, found in numbers.items()}
        self.locator.learn(findings)
        return findings

    def first_non_finite(self, root: Tensor, one: Pass) -> str | None:
        """The parameter that a pass first brings a gradient that is not finite; keeps the graph."""
        found: list[str] = []

        def listen(call: Call, g: Tensor | None, saved: tuple[Tensor, ...]) -> None:
            if not found and g is not None and not bool(g.isfinite().all()):
                found.append(call.uses[0].tracked.name)

        self._backward(root, one.cotangent, listen, keep=True)
        return next(iter(found), None)

    def _numbers(self, root: Tensor, one: Pass, sightings: Mapping[Key, Sightings]) -> dict[Key, Tensor]:
        """Of each use that tagged passes saw, the sample of every row: the same pass without tags."""
        numbers: dict[Key, Tensor] = {}

        def listen(call: Call, g: Tensor | None, saved: tuple[Tensor, ...]) -> None:
            for use in call.uses:
                if g is not None and use.key in sightings:
                    rows = _rows(use, one.unscaled(g), saved)
                    numbers[use.key] = sightings[use.key].numbers(rows.g, use.form.features)

        self._backward(root, one.cotangent, listen, keep=True)
        return numbers

    def _tag(self, root: Tensor, one: Pass, tags: Tags, keys: set[Key] | None = None) -> dict[Key, Sightings]:
        """The tagged passes: what they show of each use, or of those named."""
        sightings: defaultdict[Key, Sightings] = defaultdict(lambda: Sightings(tags))
        for factor in tags.factors(root.device):

            def listen(call: Call, g: Tensor | None, saved: tuple[Tensor, ...]) -> None:
                for use in call.uses:
                    if g is not None and (keys is None or use.key in keys):
                        sightings[use.key].see(_rows(use, one.unscaled(g), saved).g, use.form.features)

            self._backward(root, _each_times(one.cotangent, factor.to(one.cotangent.dtype)), listen, keep=True)
        return sightings

    def _tag_all(self, root: Tensor, one: Pass, keys: set[Key]) -> dict[Key, Sightings]:
        """The tagged passes of all samples."""
        N = root.shape[0]
        return self._tag(root, one, Tags(N, N, self.capture.narrow, one.loss_scale > 1), keys)

    def _leaking(self, batch: _Batch, one: Pass, keys: set[Key]) -> set[Key]:
        """A cheap check of known layouts, one backward pass where tags would take several: half of the samples get a gradient of zero, so
        by a right layout all rows of that half are zero. Returns the uses where some are not, or whose rows do not fit the layout.
        """
        N, suspects, leaks = batch.N, set(), {}
        order = torch.randperm(N, generator=torch.Generator().manual_seed(self.locator.batches), device="cpu")
        out = torch.zeros(N, dtype=torch.bool, device="cpu").index_fill_(0, order[: N // 2], True).to(batch.root.device)

        def listen(call: Call, g: Tensor | None, saved: tuple[Tensor, ...]) -> None:
            for use in call.uses:
                if g is None or use.key not in keys:
                    continue
                rows = self.locator.if_it_fits(use, _rows(use, g, saved), N)
                if rows is None:
                    suspects.add(use.key)
                    continue
                left_out = out if rows.offsets is None else out.repeat_interleave(rows.offsets.diff())
                leaks[use.key] = rows.g[left_out].any()

        self._backward(batch.root, _each_times(one.cotangent, ~out), listen, keep=True)
        found = torch.stack(list(leaks.values())).tolist() if leaks else []
        return suspects | {key for key, leaking in zip(leaks, found, strict=True) if leaking}

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

    # -- counting

    def run(
        self,
        uses: Uses,
        passes: Iterable[Pass],
        count: int,
        keep: bool = False,
        every: bool = True,
        positions: int | None = None,
        support: Callable[[], Pass] | None = None,
    ) -> None:
        """Back-propagate ``count`` passes and hand each parameter's rows, all its uses joined, to the collectors.

        ``every``, ``positions``: see ``Locator.begin``. ``support``: makes a pass that gives a gradient to every row that any of several passes gives
        one; rows chosen by the data are those, in each of them.
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
        N = root.shape[0]
        unlocated, again = self.locator.begin(chain.from_iterable(groups.values()), N, every, positions)
        owners: dict[Key, Tensor] = {}
        if support is not None and count > 1:
            chosen = {use.key for uses in groups.values() for use in uses if N == 1 and use.gathered}
            shared = unlocated | (set() if every else again | chosen)
            owners = self._owners(root, support(), shared) if shared else {}
            again -= owners.keys()
        batch = _Batch(root, groups, unlocated, again, owners, count > 1 and not self._separate)
        for number, one in enumerate(passes):
            self._run_one(batch, one, number, keep or number + 1 < count)
        with self.capture.aside():
            for folded in filter(None, batch.folded.values()):
                for use, rows in folded.rows():
                    self._hand_over(use.tracked, use.form, use.form.oriented(self.locator.samples_first(use, rows, N)), 1.0, 0)

    def _owners(self, root: Tensor, support: Pass, keys: set[Key]) -> dict[Key, Tensor]:
        """The samples of the rows of these uses, where any has a gradient."""
        numbers = self._numbers(root, support, self._tag_all(root, support, keys))
        known = torch.stack([(found != UNKNOWN).any() for found in numbers.values()]).tolist() if numbers else []
        return {key: found for (key, found), some in zip(numbers.items(), known, strict=True) if some}

    def _run_one(self, batch: _Batch, one: Pass, number: int, keep: bool) -> None:
        visited: defaultdict[Group, int] = defaultdict(int)
        waiting: defaultdict[Group, list[tuple[Form, Rows]]] = defaultdict(list)
        held: defaultdict[Group, list[tuple[CallUse, Rows]]] = defaultdict(list)  # of uses that nothing is known of yet
        again = batch.again if number == 0 else set()
        if again and Tags(batch.N, batch.N, self.capture.narrow).passes > 1:
            again = self._leaking(batch, one, again)
        tagged = ((batch.unlocated & self.locator.scattered) | again) - batch.owners.keys()
        sightings = self._tag_all(batch.root, one, tagged) if tagged else {}

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
                    rows = _rows(use, one.unscaled(g), saved)
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

        self._backward(batch.root, one.cotangent, listen, keep or bool(batch.unlocated))
        if held:
            sightings = self._tag_all(batch.root, one, {use.key for uses in held.values() for use, _ in uses})
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
            batch.folded[call.index] = _Folded(call, saved) if self._can_fold(batch, call, g, saved) else None
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
        return alone and all(one_position(self.locator.samples_first(use, _rows(use, g, saved), batch.N)) for use in call.uses)

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
                    for source, pulled in zip(made.sources, made.pull(gradient), strict=True):
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
            for which, gradient in zip(tracked, self.gradients(root, tracked, one.cotangent), strict=True):
                self.hand_over_gradients(which, one.unscaled(gradient).unsqueeze(0), n, one.scale, number)

    def hand_over_gradients(self, tracked: Tracked, gradients: Tensor, first: int, scale: float, number: int) -> None:
        """Whole sample gradients from a fallback, to the collectors."""
        with self.capture.aside():
            for collector in self.collectors:
                collector.add_gradients(tracked, gradients, first, scale, number)

    def gradients(self, root: Tensor, tracked: list[Tracked], cotangent: Tensor) -> list[Tensor]:
        """Gradients of parameters that autograd differentiates in this graph, by autograd itself. Keeps the graph."""
        ways = [(t, leaf) for t in tracked for leaf in t.leaves]
        grads = self._grad(root, [leaf for _, leaf in ways], cotangent, lambda *_: None, keep=True)
        found = {t.name: torch.zeros_like(t.detached) for t in tracked}
        for (t, _), grad in zip(ways, grads, strict=True):
            if grad is not None:
                found[t.name] = found[t.name] + grad
        return list(found.values())

    def gradients_of_leaves(self, root: Tensor, leaves: list[Tensor], cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """The same of what is not tracked."""
        return self._grad(root, leaves, cotangent, lambda *_: None, keep=True)

    def _backward(self, root: Tensor, cotangent: Tensor, listener: Listener, keep: bool) -> None:
        self._grad(root, [self.capture.anchor], cotangent, listener, keep)

    def _grad(
        self, root: Tensor, inputs: list[Tensor], cotangent: Tensor, listener: Listener, keep: bool
    ) -> tuple[Tensor | None, ...]:
        self.capture.listener = listener
        try:
            # Gradient checkpointing runs parts of the forward pass again, and they must be caught again.
            with self.capture.again(root), torch._C._EnableTorchFunction(), self.capture:
                return _run_backward((root,), (cotangent,), keep, False, tuple(inputs), True, accumulate_grad=False)
        except RuntimeError as error:
            if "selective activation checkpoint" not in str(error):
                raise
            raise ValueError(
                "model: gradient checkpointing must be of whole parts, got torch's selective activation checkpointing, whose saved tensors are "
                "good for one backward pass; leave out context_fn while the model is measured"
            ) from error
        finally:
            self.capture.listener = None


def _rows(use: CallUse, g: Tensor, saved: tuple[Tensor, ...]) -> Rows:
    return use.form.rows(g, tuple(saved[i] for i in use.picks))


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


def check_loss_scale(caller: str, loss_scale: float) -> None:
    """Raise ValueError unless a factor is one."""
    if not (math.isfinite(loss_scale) and loss_scale > 0):
        raise ValueError(f"{caller}: loss_scale must be a finite number > 0, got {loss_scale}; a power of two rounds nothing")
