# SPDX-License-Identifier: Apache-2.0
"""Which parameters a run measures, and by what: what it finds out for ``F.coverage``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fisherfast._names import listed
from fisherfast._warning import warn
from fisherfast.capture.calls import Call
from fisherfast.capture.collector import Collector
from fisherfast.capture.passes import Passes
from fisherfast.capture.tracked import Tracked
from fisherfast.fisher.coverage import Coverage, Stopwatch

_MANY = 0.01  # of the gradients of one parameter


class Covered:
    """The parameters of one run: the op or the fallback that serves each, those left out, and the time each way took."""

    def __init__(self, passes: Passes, collectors: Sequence[Collector], allow_missing: bool) -> None:
        self._passes, self._capture, self._collectors = passes, passes.capture, collectors
        self._allow_missing = allow_missing
        self.missing: dict[str, str] = {}  # and why
        self.missing_parameters: list[Tensor] = []
        self.sizes = {name: t.parameter.numel() for name, t in self._capture.tracked.items()}
        self._how: dict[str, str] = {}
        self._no_vmap: str | None = "the forward pass is yours and runs once"
        self._watch = Stopwatch(self._capture.device)

    @property
    def looped(self) -> list[str]:
        """Parameters whose sample gradients are left to autograd."""
        return [name for name, t in self._capture.tracked.items() if t.looped]

    # -- what is left out

    def check_reached(self, root: Tensor) -> None:
        """After a first forward pass: raise, or record, parameters that the loss does not depend on."""
        tracked, graphless = self._capture.tracked, self._capture.mode.without_graph
        reached = self._passes.backward.reached(root)
        lost = [name for name in tracked if name not in reached]
        if not lost:
            return
        if len(lost) == len(tracked) or not self._allow_missing:
            unseen = [name for name in lost if name in graphless]
            if unseen:
                raise ValueError(
                    f"model: every parameter with requires_grad must reach the loss, got {len(unseen)} of {len(tracked)} that "
                    f"were used where autograd keeps no graph, {listed(unseen)}: in torch.no_grad(), or in gradient checkpointing with "
                    "use_reentrant=True; pass use_reentrant=False, or freeze what is not to be measured (requires_grad_(False))"
                )
            if root.grad_fn is None:
                raise ValueError(
                    "model: the output must depend on the parameters, got one without a graph; leave out detach(), torch.no_grad(), NumPy and "
                    "argmax on the way to it"
                )
            computed = [name for name in lost if not tracked[name].parameter.is_leaf]
            if computed:
                raise ValueError(
                    f"model: parameters must be leaves of autograd's graph, got {len(computed)} of {len(tracked)} that were computed "
                    f"from others, {listed(computed)}; copy.deepcopy of a scripted model makes such: script the copy of the model instead"
                )
            raise ValueError(
                f"model: every parameter with requires_grad must reach the loss, got {len(lost)} of {len(tracked)} that "
                f"do not, {listed(lost)}; freeze them (requires_grad_(False)), begin with a batch that reaches all "
                "(experts), or pass allow_missing=True to record them as missing. "
                "Calls inside an already compiled model are not seen: pass the model itself"
            )
        for name in lost:
            why = "it is used where autograd keeps no graph" if name in graphless else "the loss does not depend on it"
            self.leave_out(name, why)

    def leave_out(self, name: str, why: str) -> None:
        """Do not measure this parameter, and say why."""
        self.missing[name] = why
        self.missing_parameters.append(self._capture.tracked[name].parameter)
        self._capture.forget(name)
        for collector in self._collectors:
            collector.forget(name)

    # -- by what the others are covered

    def note_ops(self, calls: list[Call]) -> None:
        """Remember which ops serve the parameters that the calls use."""
        ops: defaultdict[str, dict[str, None]] = defaultdict(dict)
        for call in calls:
            for use in call.uses:
                ops[use.tracked.name][use.form.op] = None
        self._how.update((name, " + ".join(of_it)) for name, of_it in ops.items())

    def note(self, name: str, how: str) -> None:
        """Remember how a parameter was covered until its uses are shown again."""
        self._how[name] = how

    def note_vmap(self, problem: str | None) -> None:
        """Whoever runs the fallback knows why it must loop over samples; None: it can use vmap."""
        self._no_vmap = problem

    def timed(self, way: str) -> AbstractContextManager[None]:
        """Charge the wall time of the block to a way of covering parameters (``"loop"``, ``"vmap"``), for ``F.coverage``."""
        return self._watch.timed(way)

    # -- what is said of it

    def report(self) -> Coverage:
        """How each parameter is covered: an op, "loop: reason", or "missing: reason"."""
        how = {
            name: self._fallback(t) if t.fallback else self._how.get(name, "not used yet")
            for name, t in self._capture.tracked.items()
        }
        missing = {name: f"missing: {why}" for name, why in self.missing.items()}
        return Coverage({**how, **missing}, self.sizes, self._watch.seconds(), self._passes.underflow)

    def _fallback(self, tracked: Tracked) -> str:
        if tracked.chained:
            return f"chain: {tracked.fallback}"
        if self._no_vmap is None:
            return f"vmap: {tracked.fallback}"
        return f"loop: {tracked.fallback} ({self._no_vmap})"

    def warn_of_underflow(self) -> None:
        """At the end: say so if many float16 gradients were too small for their digits."""
        shares = {name: small / every for name, (small, every) in self._passes.underflow.items()}
        worst = max(shares, key=lambda name: shares[name], default="")
        if worst and shares[worst] > _MANY:
            warn(
                f"{worst}: float16 gradients must not underflow, got {shares[worst]:.1%} below {torch.finfo(torch.float16).tiny:.0e}, "
                "where digits are lost; pass loss_scale=2**10 or larger, or use bfloat16. F.coverage.underflow counts them",
            )
