# SPDX-License-Identifier: Apache-2.0
"""What a run finds out on its first batches: how the model uses its parameters, and where the sample axis is."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fisherfast._error import raised_here
from fisherfast._pieces import pieces
from fisherfast._warning import warn
from fisherfast.capture.calls import Call
from fisherfast.capture.layout import PROBED
from fisherfast.capture.locator import NO_AXIS, mixing
from fisherfast.capture.parameters import unwrapped
from fisherfast.capture.tracked import Unbatched
from fisherfast.capture.uses import Uses
from fisherfast.data.batches import Batch
from fisherfast.fisher.run.dependence import check_alone, check_independent, dependent, same_but_rounding
from fisherfast.fisher.run.forward import Forward
from fisherfast.fisher.run.run import Run
from fisherfast.likelihood import Predictions

_LARGE = 2**26  # bytes of a buffer


class Exploration:
    """Expands parameters, follows them, or leaves them to the fallback. ``explored``: an earlier run has."""

    def __init__(self, run: Run, forward: Forward, explored: bool) -> None:
        self._run, self._forward = run, forward
        self._explored = self._probed = explored

    def look(self, batch: Batch) -> None:
        """Explore the first batch, and the first of several samples."""
        if not self._explored or (not self._probed and batch.N > 1):
            self.explore(batch)

    def explore(self, batch: Batch) -> None:
        """On a few samples: what is reached, in which forms, where the sample axis is; expands or loops where it has to."""
        few, predictions = self._looked_at(batch)
        values, noted = predictions.values, few
        uses = self._forward.uses(values)
        if not self._explored:
            self._run.show(uses.calls)
            if few.N < batch.N and self._run.passes.backward.reached(values) < self._run.capture.tracked.keys():
                everything, noted = self._forward.values(batch), batch  # an expert may be none of the few samples'
                self._run.covered.check_reached(everything)
                self._run.show(self._forward.uses(everything).calls)
            else:
                self._run.covered.check_reached(values)
            self._run.passes.route_mixed_forms(uses)
            self._explored = True
            if few.N == 1 and few.offsets is None and _may_hide_a_table(uses.calls):
                alone = values.detach()
                del values, uses, predictions  # with their graph: a sample may be all that fits
                self._explore_as_pair(few, alone)
                return
        if few.N > 1:
            mixed = self._probe(uses)
            if mixed:
                self._resolve(self._forward.values, few, uses, mixed, noted)
            elif not batch.ragged:  # of which there are no copies of a sample
                counted, eps = _counted(predictions), self._forward.precision(values)
                del values, uses, predictions  # with their graph, as above
                self._warn_if_dependent(batch, counted, eps)
            self._probed = True

    def _looked_at(self, batch: Batch) -> tuple[Batch, Predictions]:
        """A few samples and what the model says of them; the whole batch where its labels, which are as long as its longest sample, do not
        fit the few.
        """
        few = batch.cut(0, min(batch.N, PROBED))
        try:
            return few, self._forward(few, exploring=True)[1]
        except Exception as error:
            if few.N == batch.N:
                raise
            if not raised_here(error):
                error.add_note(
                    f"fisherfast: these were the batch's first {few.N} samples. Inputs that are as long as the batch must hold its samples; "
                    "pass others as [1, ...], or expanded to [N, ...]"
                )
                raise
        return batch, self._forward(batch, exploring=True)[1]

    def _probe(self, uses: Uses) -> set[str]:
        return mixing(self._run.passes.tagging.probe(uses, noise(uses.root)), self._run.capture.tracked, uses.chosen)

    def _warn_if_dependent(self, batch: Batch, values: Tensor, eps: float) -> None:
        """Samples that depend on each other through what is detached have a gradient each, but of the batch that they were in."""
        device = self._run.capture.device
        try:
            model = _without_state(self._forward.model)
            with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
                outputs = partial(self._forward, exploring=True, model=model)
                n = dependent(lambda few: _counted(outputs(few)[1]), batch, values, eps)
        except Exception:  # noqa: BLE001  user code may raise anything for two copies of a sample
            return
        if n is not None:
            warn(
                f"model: samples should not depend on each other, got one, sample {n}, whose output changes with its batch; the result "
                "depends on how the data are batched. Statistics of a batch do this, also where they are detached; an input "
                "without samples that is as long as the batch does, too: pass it as [1, ...]"
            )

    def _explore_as_pair(self, one: Batch, values: Tensor) -> None:
        """For a first batch of one sample: explore a batch of two copies of it, because with N = 1 a tensor without a sample axis cannot be
        told from one with it, and that decides which block a parameter gets.

        A copy of the model takes that batch, so that what it may keep of it is lost. A model that takes no such batch is left as it is.
        """
        if not any(collector.by_use for collector in self._run.collectors):
            return
        model, two = self._forward.model, one.repeated(0, 2)
        try:
            of = partial(self._forward.values, model=_without_state(model))
            twice = self._forward.uses(of(two))
            check_alone(values, twice.root[:1], self._forward.precision(twice.root))
            if mixed := self._probe(twice):
                self._resolve(of, two, twice, mixed, one)
        except Exception:  # noqa: BLE001  user code may raise anything for such a batch
            pass

    def _resolve(self, of: Callable[[Batch], Tensor], few: Batch, uses: Uses, mixed: set[str], noted: Batch) -> None:
        """Parameters without a sample axis where they are used: expand them there, else follow them to where a sample comes in,
        else the fallback. ``of``: the model's values; ``noted``: the samples whose uses the collectors were shown.
        """
        hint = f"; rows that mix samples reach {sorted(mixed)[:3]}"
        if few.ragged:
            hint += ", and inputs have more rows than there are samples; ff.collect can measure samples that cannot be cut out"
        check_independent(of, few, uses.root, self._forward.precision(uses.root), hint)
        if few.offsets is None:  # packed samples have no axis to expand to
            mixed = self._not_expanded(of, few, uses, mixed)
        further = False
        while mixed and self._run.capture.follow_further(uses, mixed, NO_AXIS):
            uses, further = self._forward.uses(of(few)), True
            mixed = self._probe(uses)
        followed = uses.followed
        for name in mixed:
            followed[name].give_up(NO_AXIS)
        if further:  # their uses are others now
            self._run.show((uses if noted is few else self._forward.uses(of(noted))).calls)

    def _not_expanded(self, of: Callable[[Batch], Tensor], few: Batch, uses: Uses, mixed: set[str]) -> set[str]:
        followed, values = uses.followed, uses.root
        tracked = [followed[name] for name in mixed]
        every = [(call, use) for call in uses.calls for use in call.uses]
        tables = {use.tracked.name for use in uses.all if use.form.op == "embedding_sq_"}  # of which few rows are looked up
        bare = {one.name: {Unbatched.of(call.shape) for call, use in every if use.tracked is one} for one in tracked}
        for one in tracked:
            can = not one.in_chain and (one.name in tables or uses.only_broadcast(one.name))
            one.expand = next(iter(bare[one.name])) if can and len(bare[one.name]) == 1 else None
        try:
            expanded = of(few)
            if same_but_rounding(expanded, values, self._forward.precision(values)):
                mixed = self._probe(self._forward.uses(expanded))
        except Exception:  # noqa: BLE001  user code may raise anything for such a shape: then this use cannot be expanded
            pass
        for one in tracked:
            one.expand = None if one.name in mixed else one.expand
        return mixed


def _counted(predictions: Predictions) -> Tensor:
    """The values for which a label counts, and zeros elsewhere: what a model says of padding is arbitrary."""
    values, counted = predictions.values.detach(), predictions.counted
    if counted.all():
        return values  # no copy of them
    counted = counted if values.dim() > 1 else counted.any(1)
    return torch.where(counted.view(*counted.shape, *[1] * (values.dim() - counted.dim())), values, 0.0)


def _without_state(model: nn.Module) -> nn.Module:
    """A copy that shares parameters and large buffers (as those of quantised weights): what it stores of a batch is discarded with it."""
    model = unwrapped(model)  # whose copy waits for no other rank
    large = [buffer for buffer in model.buffers() if buffer.nbytes > _LARGE]
    return copy.deepcopy(model, {id(one): one for one in (*model.parameters(), *large)})


def _may_hide_a_table(calls: Sequence[Call]) -> bool:
    """Whether, in a batch of one sample, some use may lack the sample axis: its first axis is not 1, or its parameter has several uses."""
    uses = Counter((use.tracked.name, use.form.op) for call in calls for use in call.uses)
    return any(call.shape[:1] != (1,) for call in calls) or max(uses.values(), default=0) > 1


def noise(like: Tensor) -> Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    for piece in pieces(numbers):
        piece.copy_(torch.randn(piece.shape, generator=generator, device="cpu"))
    return numbers
