# SPDX-License-Identifier: Apache-2.0
"""``plan``: what a Fisher will take, in memory and in work, found out on a few samples before anything is measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn

from fisherfast.batches import Batch, Output
from fisherfast.capture import Capture, Tracked, refuse_train_mode
from fisherfast.fisher import memory
from fisherfast.fisher.collectors import Structure
from fisherfast.fisher.labelling import Labelling
from fisherfast.fisher.measure import Measurement, factors_first, needs_basis, requests
from fisherfast.fisher.memory import Held, in_words
from fisherfast.fisher.units import apart
from fisherfast.layout import PROBED
from fisherfast.likelihood import Likelihood
from fisherfast.passes import Collector, Pass, Passes, one_position
from fisherfast.rules import ALL, Form, Rows


@dataclass(frozen=True)
class Row:
    """Parameters, or parts of packed ones, that have their sums in common.

    ``way`` is the op, or ``"vmap: why"``, ``"missing: why"``; ``holds`` what is kept. ``bytes`` are those of the sums, ``flops``
    those of a batch beside its forward and backward passes.
    """

    names: tuple[str, ...]
    way: str
    holds: str
    bytes: int
    flops: float


@dataclass(frozen=True, repr=False)
class Plan:
    """What ``ff.plan`` finds; ``rows`` in the model's order, ``table()`` for ``rich.console.Console.print``.

    Shapes:   ``rows`` one for each block, or parameter without a block; of several requests each has rows of its own.
    Scale:    ``total_bytes`` are the sums at the end of a run, what every row holds; ``peak_bytes`` those allocated at once at
              most, the result included. FLOPs are those of one batch: ``flops`` of the ops, ``step_flops`` of one plain
              forward and backward pass, ``run_flops`` of all passes and ops, ``ratio = run_flops / step_flops``.
    Errors:   none of its own.
    Numerics: bytes are exact, but for a basis of few rows (EKFAC), which takes less. FLOPs are an estimate: the products of matrices, a
              backward pass as twice the forward pass, half of that where the weights are frozen. Not counted: activations,
              scratch memory of one layer at a time, values of single samples, EKFAC's few rows before they are a basis.
    Source:   ours.
    """

    structure: str
    rows: tuple[Row, ...]
    peak_bytes: int
    free_bytes: int | None
    passes: int
    readings: int
    step_flops: float
    problem: str | None = None

    @property
    def total_bytes(self) -> int:
        """Of all sums."""
        return sum(row.bytes for row in self.rows)

    @property
    def fits(self) -> bool:
        """Whether ``peak_bytes`` are free, or not known not to be; if not, ``problem`` says how they could be."""
        return self.problem is None

    @property
    def flops(self) -> float:
        """Of the ops, for one batch."""
        return sum(row.flops for row in self.rows)

    @property
    def run_flops(self) -> float:
        """Of one batch, all its passes and ops; the weights are frozen, so a backward pass is as long as a forward pass."""
        return self.readings * (1 + self.passes) * self.step_flops / 3 + self.flops

    @property
    def ratio(self) -> float:
        """One batch of the run in units of a plain forward and backward pass."""
        return self._steps(self.run_flops)

    def _steps(self, flops: float) -> float:
        return flops / self.step_flops if self.step_flops else float("nan")

    def table(self) -> Table:
        """A line for each row, and the total."""
        table = Table(title=f"Plan of {self.structure}", title_justify="left", caption=self._summary(), caption_justify="left")
        for heading in ("parameters", "covered by", "held"):
            table.add_column(heading, overflow="fold")
        for heading in ("bytes", "FLOPs", "of a step"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row("\n".join(row.names), row.way, row.holds, in_words(row.bytes), *self._work(row.flops))
        table.add_section()
        table.add_row("all", "", "", in_words(self.total_bytes), *self._work(self.flops))
        return table

    def _work(self, flops: float) -> tuple[str, str]:
        return f"{flops:.3g}", f"{self._steps(flops):.1%}"

    def _summary(self) -> str:
        free = "an unknown amount" if self.free_bytes is None else in_words(self.free_bytes)
        passes = f"{self.passes} backward pass{'es' * (self.passes > 1)} a batch" + ", the data read twice" * (self.readings > 1)
        return (
            f"{in_words(self.peak_bytes)} at most with the result, {free} free: {'fits' if self.fits else 'does not fit'}; "
            f"{passes}; a batch takes {self.ratio:.2f} plain steps"
        )

    def __repr__(self) -> str:
        rows = f"{len(self.rows)} row{'s' * (len(self.rows) != 1)}"
        return f"Plan({self.structure}, {rows}, {in_words(self.total_bytes)} of sums; {self._summary()})"


def plan(
    model: nn.Module,
    batch: Any,
    structure: str | tuple[Structure, ...] = "diagonal",
    fisher_type: str = "mc",
    likelihood: str | Likelihood = "categorical",
    *,
    draws: int = 1,
    max_passes: int = 1000,
    output: Output = None,
    allow_missing: bool = False,
    checkpoint: bool = False,
) -> Plan:
    """What ``ff.fisher`` with these arguments will hold, by layer, and the work of a batch as ``run FLOPs / plain step's FLOPs``.

    ``batch`` is one that the data yield; a few of its samples go through the model, as at the beginning of every run, and the
    work is scaled to all of them. Nothing is measured, no sum is allocated. ``checkpoint``: whether the run will have one, for
    which every batch is staged.

    Shapes:   as ``ff.fisher``.
    Scale:    bytes of a whole run, FLOPs of one batch.
    Errors:   those of ``ff.fisher`` for a model, a batch or arguments that cannot be measured: an input factor above
              ``max_factor_dim``, more than ``max_passes`` (counted on the samples that are looked at). What does not fit the
              memory is no error here: ``.fits`` is False and ``.problem`` is the message of ``ff.fisher``'s MemoryError.
    Numerics: see ``Plan``.
    Source:   ours.
    """
    structures = requests("plan", structure)
    labelling = Labelling.of("plan", fisher_type, likelihood, draws, 0, max_passes)
    refuse_train_mode(model)
    asked = tuple(map(factors_first, structures))
    measurement = Measurement(model, asked, labelling, 0, output, 1.0, allow_missing, checkpoint)
    run, capture = measurement.run, measurement.run.capture
    whole = Batch.of(batch, capture.device)
    few = whole.cut(0, min(whole.N, PROBED))
    measurement.explore(few)
    readings = 2 if any(map(needs_basis, structures)) else 1

    forward, (_, predictions) = _counted(lambda: measurement.forward(few))
    passes = labelling.num_passes(predictions)
    held = [collector.holds(passes) for collector in run.collectors]
    every = [one for mine in held for one in mine]
    ledger = _Ledger(capture, run.collectors, passes)
    ledger.run(predictions.values, [Pass(torch.ones_like(predictions.values))], 1)

    scale = whole.N / few.N
    step = 3 * forward * scale
    # The fallback goes forward and backward once more, for all its parameters and collectors together.
    of_loop = readings * passes * step / max(1, len(run.looped) * len(held))
    works = [{name: scale * flops for name, flops in mine.items()} | dict.fromkeys(run.looped, of_loop) for mine in ledger.flops]
    rows = [_row(one, run.coverage, work) for mine, work in zip(held, works, strict=True) for one in mine]
    rows += [Row((name,), why, "nothing", 0, 0.0) for name, why in run.missing.items()]
    free = memory.free_bytes(capture.device)
    return Plan(
        structure if isinstance(structure, str) else ", ".join(type(one).__name__ for one in structure),
        tuple(rows),
        memory.peak(every),
        free,
        passes,
        readings,
        step,
        memory.refusal(every, free, capture.device),
    )


def _row(held: Held, coverage: Mapping[str, str], work: Mapping[str, float]) -> Row:
    flops = sum(work.get(name, 0.0) for name in held.names)
    return Row(held.names, held.way or coverage[held.names[0]], held.holds, held.bytes, flops)


class _Ledger(Passes):
    """A backward pass that adds up what each collector would do with the rows, and lets the rows go."""

    def __init__(self, capture: Capture, asked: Sequence[Collector], passes: int) -> None:
        super().__init__(capture, ())
        self._asked, self._more = asked, passes - 1
        self._folds = not any(collector.separate for collector in asked)
        self.flops: list[defaultdict[str, float]] = [defaultdict(float) for _ in asked]

    def _hand_over(self, tracked: Tracked, form: Form, rows: Rows, scale: float, number: int) -> None:
        more = 0 if self._folds and one_position(rows) else self._more
        _, window = apart(form)
        entries = None if window is None else window.entries(tracked.parameter.shape)
        names = {tracked.name, (entries or ALL).named(tracked.name)}  # what is held may be of the part alone
        for collector, mine in zip(self._asked, self.flops, strict=True):
            first, later = (collector.flops(tracked, form, rows, number) for number in (0, 1))
            for name in names:
                mine[name] += first + more * later


def _counted(forward: Any) -> tuple[int, Any]:
    """The FLOPs of a forward pass, and what it gives."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, which whoever plans nothing need not

    with FlopCounterMode(display=False) as counter:
        result = forward()
    return counter.get_total_flops(), result
