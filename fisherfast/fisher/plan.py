# SPDX-License-Identifier: Apache-2.0
"""``plan``: what a Fisher will take, in memory and in work, found out on a few samples before anything is measured."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import nn

from fisherfast import _checks
from fisherfast.capture.backward import Pass
from fisherfast.capture.collector import Cost, Held, Samples
from fisherfast.capture.eager import uncompiled
from fisherfast.capture.layout import PROBED
from fisherfast.capture.passes import Passes
from fisherfast.capture.refusals import refuse_train_mode
from fisherfast.data.batches import Batch, Output
from fisherfast.fisher.parse import Requests, factors_first, needs_basis, parse
from fisherfast.fisher.run import memory
from fisherfast.fisher.run.labelling import Labelling
from fisherfast.fisher.run.ledger import Ledger
from fisherfast.fisher.run.measurement import Measurement
from fisherfast.fisher.run.memory import in_words
from fisherfast.fisher.run.run import Run
from fisherfast.fisher.run.settings import Settings
from fisherfast.likelihood import Likelihood, Predictions


@dataclass(frozen=True)
class Row:
    """Parameters, or parts of packed ones, that have their sums in common.

    ``way`` is the op, or ``"chain: why"``, ``"vmap: why"``, ``"missing: why"``; ``holds`` what is kept. ``bytes`` are those of the sums, and of rows
    that are kept; ``flops`` those of a batch beside its forward and backward passes.
    """

    names: tuple[str, ...]
    way: str
    holds: str
    bytes: int
    flops: float


@dataclass(frozen=True, repr=False)
class Plan:
    """What ``ff.plan`` finds; ``rows`` in the model's order, ``table()`` for ``rich.console.Console.print``.

    Shapes:   ``rows`` one for each block, or parameter without a block; of several requests each has
              rows of its own.
    Scale:    ``total_bytes`` are what every row holds at the end of a run; ``peak_bytes`` those allocated at once at most, the
              result and, for EKFAC, the workspace of an eigendecomposition included. A batch takes more while it is there:
              ``activation_bytes``, what the forward pass leaves for the backward pass, its output and two gradients at
              it, the second of which tells the samples of the first batches apart (one where a batch is one sample); ``scratch_bytes``, what one layer's rows are turned into. ``needed_bytes`` is the sum of these three. FLOPs are those
              of one batch: ``flops`` of the ops, ``step_flops`` of one plain forward and backward pass, ``run_flops`` of all
              passes and ops, ``ratio = run_flops / step_flops``.
    Errors:   none of its own.
    Numerics: ``total_bytes`` is exact for runs of more than 64 additions to a sum (one per batch), except that an EKFAC basis built from
              few rows takes less and that mixture-of-experts layers depend on the data; shorter runs hold half of it. Activations are extrapolated from two sizes of batch, exactly where samples are of one length. FLOPs are
              an estimate: the products of matrices, a backward pass as twice the forward pass, half of that where the weights are
              frozen. Not counted: the model and the batch, gradients on their way back, the fallback's vmap, the chain rule's products, the kernels' own
              panels, values of single samples, and what is computed from a result later.
    Source:   ours.
    """

    structure: str
    rows: tuple[Row, ...]
    peak_bytes: int
    activation_bytes: int
    scratch_bytes: int
    free_bytes: int | None
    passes: int
    readings: int
    step_flops: float
    problem: str | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows of the table."""
        return sum(row.bytes for row in self.rows)

    @property
    def needed_bytes(self) -> int:
        """The most bytes needed at once."""
        return self.peak_bytes + self.activation_bytes + self.scratch_bytes

    @property
    def fits(self) -> bool:
        """Whether ``needed_bytes`` are free, or what is free is unknown; if not, ``problem`` says what would help."""
        return self.problem is None

    @property
    def flops(self) -> float:
        """FLOPs of the ops, for one batch."""
        return sum(row.flops for row in self.rows)

    @property
    def run_flops(self) -> float:
        """FLOPs of one batch, all its passes and ops; the weights are frozen, so a backward pass costs as much as a forward pass."""
        return self.readings * (1 + self.passes) * self.step_flops / 3 + self.flops

    @property
    def ratio(self) -> float:
        """One batch of the run in units of a plain forward and backward pass."""
        return self._steps(self.run_flops)

    def _steps(self, flops: float) -> float:
        return flops / self.step_flops if self.step_flops else float("nan")

    def table(self) -> Table:
        """A line for each row, and the total."""
        table = Table(
            title=f"Plan of {self.structure}", title_justify="left", caption=Text(self._summary()), caption_justify="left"
        )
        for heading in ("parameters", "covered by", "held"):
            table.add_column(heading, overflow="fold")
        for heading in ("bytes", "FLOPs", "of a step"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*map(Text, ("\n".join(row.names), row.way, row.holds)), in_words(row.bytes), *self._work(row.flops))
        table.add_section()
        table.add_row("all", "", "", in_words(self.total_bytes), *self._work(self.flops))
        return table

    def _work(self, flops: float) -> tuple[str, str]:
        return f"{flops:.3g}", f"{self._steps(flops):.1%}"

    def _summary(self) -> str:
        free = "an unknown amount" if self.free_bytes is None else in_words(self.free_bytes)
        passes = f"{self.passes} backward pass{'es' * (self.passes > 1)} a batch" + ", the data read twice" * (self.readings > 1)
        return (
            f"{in_words(self.peak_bytes)} at most with the result, at least {in_words(self.activation_bytes)} of activations and "
            f"{in_words(self.scratch_bytes)} of scratch for a batch, {free} free: {'fits' if self.fits else 'does not fit'}; "
            f"{passes}; a batch takes {self.ratio:.2f} times the FLOPs of a plain step"
        )

    def __repr__(self) -> str:
        rows = f"{len(self.rows)} row{'s' * (len(self.rows) != 1)}"
        return f"Plan({self.structure}, {rows}, {in_words(self.total_bytes)} of sums; {self._summary()})"


@uncompiled
def plan(
    model: nn.Module,
    batch: Any,
    structure: Requests = "diagonal",
    fisher_type: str = "mc",
    likelihood: str | Likelihood = "categorical",
    *,
    draws: int = 1,
    seed: int = 0,
    sample_offset: int = 0,
    max_passes: int = 1000,
    output: Output = None,
    loss_scale: float = 1.0,
    allow_missing: bool = False,
    checkpoint: str | os.PathLike[str] | bool | None = None,
    progress: bool = True,
    num_samples: int | None = None,
) -> Plan:
    """What ``ff.fisher`` with these arguments will hold, by layer, and the work of a batch as ``run FLOPs / plain step's FLOPs``.

    ``batch`` is one that the data yield; a few of its samples go through the model, as at the beginning of every run, and what
    is seen is scaled to all of them. Nothing is measured, no sum is allocated. With ``checkpoint``, a path as for ``ff.fisher`` or
    True, every batch is staged; no file is read or written. ``progress`` is for ``ff.fisher`` alone.
    ``num_samples``: of all data, where what is held grows with them (``"gram"``); those of ``batch`` if None.

    Shapes:   as ``ff.fisher``.
    Scale:    bytes of a whole run, FLOPs, activations and scratch of one batch.
    Errors:   those of ``ff.fisher`` for a model, a batch or arguments that cannot be measured: an input factor above
              ``max_factor_dim``, more than ``max_passes`` (counted on the samples that are looked at), more rows than
              ``max_rows``. What does not fit the memory is no error here: ``.fits`` is False and ``.problem`` is the message of
              ``ff.fisher``'s MemoryError, which comes when the first batch's activations are there.
    Numerics: see ``Plan``.
    Source:   ours.
    """
    structures = parse("plan", structure)
    labelling = Labelling.of("plan", fisher_type, likelihood, draws, seed, max_passes)
    settings = Settings.of(labelling, sample_offset=sample_offset, output=output, loss_scale=loss_scale)
    if num_samples is not None:
        num_samples = _checks.integer("plan", "num_samples", num_samples, 1, "it is how many samples the data hold")
    refuse_train_mode(model)
    first, staged = tuple(map(factors_first, structures)), checkpoint is not None and checkpoint is not False
    measurement = Measurement(model, first, settings, allow_missing=allow_missing, transactional=staged)
    whole = Batch.of(batch, measurement.capture.device, measurement.model)
    readings = 2 if any(map(needs_basis, structures)) else 1
    name = structure if isinstance(structure, str) else ", ".join(type(one).__name__ for one in structures)
    return _planned(measurement, whole, whole.N if num_samples is None else num_samples, readings, name)


def _planned(measurement: Measurement, whole: Batch, every: int, readings: int, structure: str) -> Plan:
    """The plan for ``every`` samples in batches like ``whole``."""
    run, device = measurement.run, measurement.capture.device
    few = whole.cut(0, min(whole.N, PROBED))
    measurement.exploration.explore(whole)
    gradients = 1 if whole.N == 1 else 2  # at the output: the one of a pass, and the one that tells the samples apart
    half = _forward(measurement, few.cut(0, few.N // 2), gradients)[0] if whole.N > few.N else None
    forward, predictions = _forward(measurement, few, gradients)  # after the other: the capture is left as this one needs it
    passes = measurement.settings.labelling.num_passes(predictions)
    for collector in run.collectors:
        collector.begin(Samples(every, passes))  # as if all data were one batch: refuses what a run would refuse in the end
    sums = [collector.holds(passes) for collector in run.collectors]
    ledger = _ledger(measurement, predictions, passes, whole.N)
    step = 3 * forward.flops * whole.N / few.N
    held = [[_with_rows(one, costs, every / whole.N) for one in mine] for mine, costs in zip(sums, ledger.costs, strict=True)]
    together = [one for mine in held for one in mine]
    activations, free = forward.extrapolated(half, whole), memory.free_bytes(device)
    scratch = max((cost.scratch for mine in ledger.costs for cost in mine.values()), default=0)
    return Plan(
        structure=structure,
        rows=tuple(_rows(run, held, ledger, of_loop=readings * passes * step)),
        peak_bytes=memory.peak(together),
        activation_bytes=activations,
        scratch_bytes=scratch,
        free_bytes=free,
        passes=passes,
        readings=readings,
        step_flops=step,
        problem=memory.refusal(together, activations + scratch, free, device),
    )


def _ledger(measurement: Measurement, predictions: Predictions, passes: int, N: int) -> Ledger:
    """What so many backward passes of such samples take."""
    capture = measurement.capture
    ledger = Ledger(measurement.run.collectors, passes, N)
    values = predictions.values
    Passes(capture, [ledger]).run(capture.read(values), [Pass(torch.ones_like(values))], Samples(len(values)))
    for tracked in capture.tracked.values():
        if tracked.fallback is not None:
            ledger.note_whole(tracked)
    return ledger


def _rows(run: Run, held: Sequence[Sequence[Held]], ledger: Ledger, of_loop: float) -> Iterator[Row]:
    """The table's; ``of_loop``: the FLOPs of the fallback, which goes forward and backward once more for all its parameters and collectors."""
    coverage, looped = run.covered.report(), run.covered.looped
    each = of_loop / max(1, len(looped) * len(held))
    for mine, costs in zip(held, ledger.costs, strict=True):
        work = {name: cost.flops for name, cost in costs.items()} | dict.fromkeys(looped, each)
        yield from (_row(one, coverage, work) for one in mine)
    yield from (Row((name,), coverage[name], "nothing", 0, 0.0) for name in coverage.missing)


def _with_rows(held: Held, costs: Mapping[str, Cost], times: float) -> Held:
    """With what is kept of so many batches."""
    kept = round(times * sum(costs[name].kept for name in held.names if name in costs))
    return replace(held, bytes=held.bytes + kept, peaks=tuple(size + kept for size in held.peaks))


def _row(held: Held, coverage: Mapping[str, str], work: Mapping[str, float]) -> Row:
    flops = sum(work.get(name, 0.0) for name in held.names)
    how = coverage.get(held.names[0], "")  # a part of a packed one has a way of its own
    way = how if held.way is None or ":" in how else held.way  # with a reason, if its gradients take another way to the op
    return Row(held.names, way, held.holds, held.bytes, flops)


@dataclass(frozen=True)
class _Forward:
    """A forward pass of a batch: its FLOPs, and the bytes that it leaves for the backward pass, output and its gradients included."""

    batch: Batch
    flops: int
    bytes: int

    def extrapolated(self, smaller: _Forward | None, whole: Batch) -> int:
        """The bytes for the whole batch, along the line through two sizes; None: this is the whole batch."""
        if smaller is None:
            return self.bytes
        here, there = _size(self.batch), _size(smaller.batch)
        return round(self.bytes + (self.bytes - smaller.bytes) / (here - there) * (_size(whole) - here))


def _size(batch: Batch) -> int:
    """What its memory grows with: samples, or positions of packed samples."""
    return batch.N if batch.offsets is None else int(batch.offsets[-1])


def _forward(measurement: Measurement, batch: Batch, gradients: int) -> tuple[_Forward, Predictions]:
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, which whoever plans nothing need not

    model = measurement.model
    saved = memory.SavedBytes([*model.parameters(), *model.buffers(), *batch.tensors()])
    with FlopCounterMode(display=False) as counter, saved.noted():
        output, predictions = measurement.forward(batch)
    values = predictions.values
    return _Forward(
        batch, counter.get_total_flops(), saved.with_those_of((output, values)) + gradients * values.nbytes
    ), predictions
