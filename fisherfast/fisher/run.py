# SPDX-License-Identifier: Apache-2.0
"""A run: what ``ff.fisher`` and ``ff.collect`` share - the capture, the passes, the counts, and the result at any moment."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fisherfast._error import NonFiniteError
from fisherfast._names import listed
from fisherfast._warning import warn
from fisherfast.capture.calls import Call, Key
from fisherfast.capture.capture import Capture
from fisherfast.capture.collector import Collector, Samples
from fisherfast.capture.parameters import unwrapped
from fisherfast.capture.passes import Passes
from fisherfast.capture.tracked import Tracked
from fisherfast.fisher import interrupts
from fisherfast.fisher.counts import Counts
from fisherfast.fisher.coverage import OPS, Coverage, Stopwatch
from fisherfast.fisher.engine import Engine
from fisherfast.fisher.memory import Held, check
from fisherfast.fisher.protocol import Provenance
from fisherfast.fisher.request import Request
from fisherfast.fisher.tally import Tally

_MANY = 0.01  # of the gradients of one parameter


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
    """The state of one measurement; ``known``: what an earlier one has found out."""

    def __init__(
        self,
        model: nn.Module,
        structures: Sequence[Request],
        provenance: Provenance,
        allow_missing: bool,
        transactional: bool = False,
        known: Explored | None = None,
    ) -> None:
        for structure in structures:
            structure.check(provenance.fisher_type)
        self.structures = tuple(structures)
        self.capture = Capture(model) if known is None else known.capture
        own = [structure.collector(self.capture, transactional) for structure in self.structures]
        served = [structure for structure, mine in zip(self.structures, own, strict=True) if mine is None]
        self.engine = Engine(self.capture, served, transactional) if served else None
        self.sources: list[Any] = [mine or self.engine for mine in own]  # of each structure
        self.collectors: list[Collector] = list({id(source): source for source in self.sources}.values())
        self.passes = Passes(self.capture, self.collectors)
        self.provenance = provenance
        self.allow_missing = allow_missing
        self.tally = Tally()
        self.missing: dict[str, str] = {} if known is None else dict(known.missing)
        self.missing_parameters: list[Tensor] = []
        self.writes_inputs = known is not None and known.writes_inputs  # in its forward pass
        self.ops: dict[str, str] = {}
        # Why the fallback must loop over samples, or None while it can use vmap: whoever runs the fallback knows.
        self.vmap_problem: str | None = "the forward pass is yours and runs once"
        self._sizes = {name: t.parameter.numel() for name, t in self.capture.tracked.items()} if known is None else known.sizes
        self._watch = Stopwatch(self.capture.device)
        self._fits = False  # whether the sums were found to
        self._torn = False  # a batch may be in the sums without its weight
        self._partial = False  # whether the batch that failed may be in some of the sums, with its weight there
        self._transactional = transactional
        self._shown: list[Call] = []  # to the collectors, last
        if known is not None:
            self.passes.locator.scattered |= known.scattered
            self.show(known.calls)

    def check_reached(self, root: Tensor) -> None:
        """After a first forward pass: raise, or record, parameters that the loss does not depend on."""
        reached = self.passes.backward.reached(root)
        lost = [name for name in self.capture.tracked if name not in reached]
        if not lost:
            return
        if len(lost) == len(self.capture.tracked) or not self.allow_missing:
            graphless = [name for name in lost if name in self.capture.mode.without_graph]
            if graphless:
                raise ValueError(
                    f"model: every parameter with requires_grad must reach the loss, got {len(graphless)} of {len(self.capture.tracked)} that "
                    f"were used where autograd keeps no graph, {listed(graphless)}: in torch.no_grad(), or in gradient checkpointing with "
                    "use_reentrant=True; pass use_reentrant=False, or freeze what is not to be measured (requires_grad_(False))"
                )
            if root.grad_fn is None:
                raise ValueError(
                    "model: the output must depend on the parameters, got one without a graph; leave out detach(), torch.no_grad(), NumPy and "
                    "argmax on the way to it"
                )
            computed = [name for name in lost if not self.capture.tracked[name].parameter.is_leaf]
            if computed:
                raise ValueError(
                    f"model: parameters must be leaves of autograd's graph, got {len(computed)} of {len(self.capture.tracked)} that were computed "
                    f"from others, {listed(computed)}; copy.deepcopy of a scripted model makes such: script the copy of the model instead"
                )
            raise ValueError(
                f"model: every parameter with requires_grad must reach the loss, got {len(lost)} of {len(self.capture.tracked)} that "
                f"do not, {listed(lost)}; freeze them (requires_grad_(False)), begin with a batch that reaches all "
                "(experts), or pass allow_missing=True to record them as missing. "
                "Calls inside an already compiled model are not seen: pass the model itself"
            )
        for name in lost:
            unseen = name in self.capture.mode.without_graph
            self._leave_out(
                name, f"missing: {'it is used where autograd keeps no graph' if unseen else 'the loss does not depend on it'}"
            )

    def _leave_out(self, name: str, why: str) -> None:
        self.missing[name] = why
        self.missing_parameters.append(self.capture.tracked[name].parameter)
        self.capture.forget(name)
        for collector in self.collectors:
            collector.forget(name)

    def show(self, calls: list[Call]) -> None:
        """Show the collectors how the parameters are used, and remember which op serves each, for the coverage report."""
        self._shown = calls
        for collector in self.collectors:
            collector.explore(calls)
        forms: defaultdict[str, dict[str, None]] = defaultdict(dict)
        for call in calls:
            for use in call.uses:
                forms[use.tracked.name][use.form.op] = None
        self.ops.update((name, " + ".join(ops)) for name, ops in forms.items())

    @property
    def explored(self) -> Explored:
        """What it has found out about the model."""
        return Explored(self.capture, self.passes.locator.scattered, self._shown, self.missing, self._sizes, self.writes_inputs)

    def holds(self, passes: int) -> list[Held]:
        """What the collectors take, once the model is explored, with batches of so many backward passes."""
        return [held for collector in self.collectors for held in collector.holds(passes)]

    def timed(self, way: str) -> AbstractContextManager[None]:
        """Charge the wall time of the block to a way of covering parameters (``"loop"``, ``"vmap"``), for ``F.coverage``."""
        return self._watch.timed(way)

    def restore(self, before: Sequence[Any]) -> None:
        """Go on from a checkpoint: one earlier result for each structure."""
        first, self._fits = before[0], True
        self.tally.restore(first.num_samples, first.num_positions, first.batches)
        for name, how in first.coverage.items():
            if how.startswith("missing"):
                self._leave_out(name, how)
        for structure, source, result in zip(self.structures, self.sources, before, strict=True):
            structure.restore(source, result)

    def note_draw(self, calls: list[Call]) -> None:
        """Inside a transaction: if the samples behind ``calls`` were counted before, the batch is another draw for them."""
        follows = self.tally.draw(calls)
        if follows is not None and self.engine is not None:
            self.engine.values.again(follows)

    @property
    def coverage(self) -> Coverage:
        """How each parameter is covered: an op, "loop: reason", or "missing: reason"."""
        covered = {
            name: self._fallback(t) if t.fallback else self.ops.get(name, "not used yet")
            for name, t in self.capture.tracked.items()
        }
        return Coverage({**covered, **self.missing}, self._sizes, self._watch.seconds(), self.passes.underflow)

    def warn_of_underflow(self) -> None:
        """At the end: say so if many float16 gradients were too small for their digits."""
        shares = {name: small / every for name, (small, every) in self.passes.underflow.items()}
        worst = max(shares, key=lambda name: shares[name], default="")
        if worst and shares[worst] > _MANY:
            warn(
                f"{worst}: float16 gradients must not underflow, got {shares[worst]:.1%} below {torch.finfo(torch.float16).tiny:.0e}, "
                "where digits are lost; pass loss_scale=2**10 or larger, or use bfloat16. F.coverage.underflow counts them",
            )

    def _fallback(self, tracked: Tracked) -> str:
        reason = tracked.fallback
        if tracked.chained:
            return f"chain: {reason}"
        return f"vmap: {reason}" if self.vmap_problem is None else f"loop: {reason} ({self.vmap_problem})"

    @property
    def looped(self) -> list[str]:
        """Parameters whose sample gradients are left to autograd."""
        return [name for name, t in self.capture.tracked.items() if t.looped]

    def results(self) -> tuple[Any, ...]:
        """What has been accumulated so far, for each structure. Errors: RuntimeError if a batch was broken off while it was counted."""
        if self._torn:
            raise RuntimeError(
                f"batch {self.tally.batches}: must be counted to its end, got an error or a third signal in between, which leaves the sums inconsistent; "
                "resume from a checkpoint, or measure again"
            )
        aliases = {alias: name for alias, name in self.capture.aliases.items() if name in self.capture.tracked}
        counts = Counts(self.tally.samples, self.tally.positions, self.tally.batches, self.provenance, self.coverage, aliases)
        asked = zip(self.structures, self.sources, strict=True)
        with interrupts.deferred(self._tear):  # sums are folded on the way
            return tuple(structure.result(source, counts) for structure, source in asked if structure.fills is None)

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
            with self.timed(OPS):
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
