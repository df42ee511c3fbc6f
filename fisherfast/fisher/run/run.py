# SPDX-License-Identifier: Apache-2.0
"""A run: what ``ff.fisher`` and ``ff.collect`` share - the capture, the passes, the counts, and the result at any moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn

from fisherfast._error import NonFiniteError
from fisherfast.capture.calls import Call, Key
from fisherfast.capture.capture import Capture
from fisherfast.capture.collector import Collector, Held, Samples
from fisherfast.capture.parameters import unwrapped
from fisherfast.capture.passes import Passes
from fisherfast.fisher.counts import Counts
from fisherfast.fisher.coverage import OPS
from fisherfast.fisher.engine import Engine
from fisherfast.fisher.protocol import Provenance
from fisherfast.fisher.request import Request
from fisherfast.fisher.run import interrupts
from fisherfast.fisher.run.covered import Covered
from fisherfast.fisher.run.memory import check
from fisherfast.fisher.run.tally import Tally


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; ``.fisher`` holds what was accumulated before: the result, or a tuple where several were asked for."""

    fisher: Any


@dataclass(frozen=True)
class Explored:
    """What a run has found out about its model, for another one over the same data."""

    capture: Capture
    scattered: set[Key]
    calls: list[Call]
    missing: dict[str, str]
    sizes: dict[str, int]
    writes_inputs: bool


class Run:
    """The state of one measurement.

    ``known``: what an earlier one has found out; ``fills``: also fill the parameters' ``.grad``, with the ``"sum"`` over each batch or
    its ``"mean"``.
    """

    def __init__(
        self,
        model: nn.Module,
        structures: Sequence[Request],
        provenance: Provenance,
        allow_missing: bool,
        transactional: bool = False,
        known: Explored | None = None,
        fills: str | None = None,
    ) -> None:
        for structure in structures:
            structure.check(provenance.fisher_type)
        self.structures = tuple(structures)
        self.capture = Capture(model) if known is None else known.capture
        own = [structure.collector(self.capture, transactional) for structure in self.structures]
        served = [structure for structure, mine in zip(self.structures, own, strict=True) if mine is None]
        self.engine = Engine(self.capture, served, transactional, fills) if served or fills else None
        self.sources: list[Any] = [mine or self.engine for mine in own]  # of each structure
        every = (*self.sources, self.engine)
        self.collectors: list[Collector] = list({id(source): source for source in every if source is not None}.values())
        self.passes = Passes(self.capture, self.collectors)
        self.provenance = provenance
        self.covered = Covered(self.passes, self.collectors, allow_missing)
        self.tally = Tally()
        self.writes_inputs = known is not None and known.writes_inputs  # in its forward pass
        self._fits = False  # whether the sums were found to
        self._torn = False  # a batch may be in the sums without its weight
        self._partial = False  # whether the batch that failed may be in some of the sums, with its weight there
        self._transactional = transactional
        self._shown: list[Call] = []  # to the collectors, last
        if known is not None:
            self.passes.locator.scattered |= known.scattered
            self.covered.missing.update(known.missing)
            self.covered.sizes.update(known.sizes)
            self.show(known.calls)

    def show(self, calls: list[Call]) -> None:
        """Show the collectors how the parameters are used, and note which op serves each."""
        self._shown = calls
        for collector in self.collectors:
            collector.explore(calls)
        self.covered.note_ops(calls)

    @property
    def explored(self) -> Explored:
        """What it has found out about the model."""
        return Explored(
            self.capture, self.passes.locator.scattered, self._shown, self.covered.missing, self.covered.sizes, self.writes_inputs
        )

    def holds(self, passes: int) -> list[Held]:
        """What the collectors take, once the model is explored, with batches of so many backward passes."""
        return [held for collector in self.collectors for held in collector.holds(passes)]

    def restore(self, before: Sequence[Any]) -> None:
        """Go on from a checkpoint: one earlier result for each structure."""
        first, self._fits = before[0], True
        self.tally.restore(first.num_samples, first.num_positions, first.batches)
        for name, why in first.coverage.missing.items():
            self.covered.leave_out(name, why)
        for structure, source, result in zip(self.structures, self.sources, before, strict=True):
            structure.restore(source, result)

    def note_draw(self, calls: list[Call]) -> None:
        """Inside a transaction: if the samples behind ``calls`` were counted before, the batch is another draw for them."""
        follows = self.tally.draw(calls)
        if follows is not None and self.engine is not None:
            self.engine.values.again(follows)

    def results(self) -> tuple[Any, ...]:
        """What has been accumulated so far, for each structure. Errors: RuntimeError if a batch was broken off while it was counted."""
        if self._torn:
            raise RuntimeError(
                f"batch {self.tally.batches}: must be counted to its end, got an error or a third signal in between, which leaves the sums inconsistent; "
                "resume from a checkpoint, or measure again"
            )
        aliases = {alias: name for alias, name in self.capture.aliases.items() if name in self.capture.tracked}
        counts = Counts(
            self.tally.samples, self.tally.positions, self.tally.batches, self.provenance, self.covered.report(), aliases
        )
        asked = zip(self.structures, self.sources, strict=True)
        with interrupts.deferred(self._tear):  # sums are folded on the way
            return tuple(structure.result(source, counts) for structure, source in asked)

    def raise_not_finite(self, values: Tensor, what: str) -> NoReturn:
        """Raise before the backward pass that the forward pass produced NaN or infinity, naming where it began."""
        name = self.capture.read(values).first_non_finite()
        where = f"the input of {name!r} is the first that is not finite" if name else "all inputs of parameters are finite"
        bad = next((one.name for one in self.capture.tracked.values() if not one.detached.isfinite().all()), None)
        where = where if bad is None else f"the parameter {bad!r} itself is not finite"
        raise NonFiniteError(
            f"batch {self.tally.batches}: {what} must be finite, got NaN or infinity; {where}. Nothing of this batch was added"
        )

    def raise_not_finite_gradients(self, where: str) -> NoReturn:
        """Raise after a backward pass that brought NaN or infinity, saying where first."""
        hint = "; float16 overflows above 65504: give a lower loss_scale" if self.capture.narrow else ""
        raise NonFiniteError(
            f"batch {self.tally.batches}: gradients must be finite, and so must their squares, got NaN or infinity, first at {where}{hint}"
        )

    def _tear(self) -> None:
        self._torn = True

    @contextmanager
    def transaction(self, samples: Samples, positions: int) -> Iterator[None]:
        """One batch: whatever happens inside, what was added gets its weight and the error carries the result so far.

        Signals wait for its end. Before the first one nothing is allocated: MemoryError if there is no room.
        """
        self._partial = False
        if not self._fits:
            check(self.holds(samples.passes), self.capture.device)
            self._fits = True
        staged = self._transactional or samples.passes > 1
        with interrupts.deferred(lambda: None if staged else self._tear()):  # what is staged is dropped whole
            for collector in self.collectors:
                collector.begin(samples)
            self.tally.begin()
            complete = False
            try:
                yield
                complete = True
            finally:
                bad = self._settle(complete, samples.N, positions)
                self._partial = not (staged or (complete and not bad))
        if bad:
            self.raise_not_finite_gradients(f"{bad[0]!r} ({len(bad)} parameters in all); they added nothing of this batch")

    def _settle(self, complete: bool, samples: int, positions: int) -> list[str]:
        """Weights for what was added, and the counts if that is all: until they are there, the sums are no result."""
        self._torn, torn = True, self._torn
        with self.capture.aside():
            bad = list(dict.fromkeys(name for collector in self.collectors for name in collector.settle(complete)))
        if complete and not bad:
            self.tally.complete(samples, positions)
        self._torn = torn
        return bad

    @contextmanager
    def rescue(self) -> Iterator[None]:
        """Attach the result so far to any error (``err.fisher``) and turn Ctrl-C into ``Interrupted``."""
        try:
            with self.covered.timed(OPS):
                yield
        except KeyboardInterrupt as interrupt:
            raise self.interrupted(interrupt) from interrupt
        except Exception as error:
            self.attach(error)
            raise

    def interrupted(self, interrupt: KeyboardInterrupt) -> Interrupted:
        """A Ctrl-C that carries the result so far."""
        error = Interrupted(*interrupt.args)
        self.attach(error)
        return error

    def attach(self, error: BaseException) -> None:
        """Have the error carry the result so far."""
        if not self._fits and isinstance(error, MemoryError):
            return  # a result, even of nothing, takes the memory that is not there
        try:
            results = self.results()
        except Exception as problem:  # noqa: BLE001  no memory for what a result takes: what went wrong first is what counts
            error.add_note(f"fisherfast: stopped in batch {self.tally.batches}; what came before could not be kept: {problem}")
            return
        error.fisher = results[0] if len(results) == 1 else results  # type: ignore[attr-defined]
        if not self.tally.samples and not self._partial:
            return  # a result of nothing is not worth a word
        error.add_note(
            f"fisherfast: stopped in batch {self.tally.batches}; the {self.tally.samples} samples of the batches before are kept in .fisher"
        )
        if self._partial:
            self._partial = False  # later errors are not of this batch
            error.add_note(
                "fisherfast: some parameters may hold this batch, too, in sum and weight, so that their means are right; taken again, its "
                "samples count twice for them"
            )


def model_name(model: nn.Module) -> str:
    """What provenance calls the model."""
    return type(unwrapped(model)).__name__
