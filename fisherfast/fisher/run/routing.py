# SPDX-License-Identifier: Apache-2.0
"""What ``collect`` finds out on its first batches, whose forward passes are the user's and cannot be run again."""

from __future__ import annotations

from fisherfast._warning import warn
from fisherfast.capture.backward import Pass
from fisherfast.capture.calls import Key
from fisherfast.capture.layout import Finding
from fisherfast.capture.locator import NO_AXIS, mixing
from fisherfast.capture.uses import Uses
from fisherfast.fisher.run.run import Run


class Routing:
    """Which parameters the losses reach, in which forms, where their sample axis is, and which are left to a loop over samples."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.known = False  # the parameters' forms, and samples were told apart at least once
        self._told_apart = False  # samples, in a batch of several
        self._postponed: set[str] = set()  # looped in the batch at hand, to be followed further from the next on

    def look(self, uses: Uses, one: Pass) -> None:
        """Explore a batch, if there is something to find out; ``one`` differentiates the sum of its losses."""
        if not self.known or uses.outdated:
            self._explore(uses, one)
        self._check_caught(uses)

    def settle(self) -> None:
        """The batch is done: what was looped for it alone is followed from the next on."""
        for name in self._postponed:
            self._run.capture.tracked[name].fallback = None
            self._run.covered.note(name, f"loop: {NO_AXIS}, in the first batches")
        self._postponed.clear()

    def _explore(self, uses: Uses, one: Pass) -> None:
        run = self._run
        if not run.tally.batches:
            run.covered.check_reached(uses.root)
        run.show(uses.calls)
        if len(uses.root) > 1:
            findings = run.passes.tagging.probe(uses, one.cotangent, large=one.loss_scale > 1)
            names = sorted(mixing(findings, run.capture.tracked, uses.chosen))
            if names and (
                bad := run.passes.backward.first_non_finite(uses.root, one)
            ):  # which looks like a row of several samples
                run.raise_not_finite_gradients(f"{bad!r}; nothing of this batch was added")
            self._route_mixing(uses, findings, names)
            self._told_apart = True
            self.known = not self._postponed

    def _route_mixing(self, uses: Uses, findings: dict[Key, Finding], names: list[str]) -> None:
        """Parameters without a sample axis where they are used.

        Loop over this batch's samples, and follow what is made of them from the next on, if there is more to follow. In a batch after the
        first of several samples an axis may be as long as the batch by chance.
        """
        capture = self._run.capture
        free = {use.key for call in uses.calls if call.site and not call.site.may_hold(len(uses.root)) for use in call.uses}
        with_axis = {key[0] for key, one in findings.items() if one.mixes_samples and one.had_sample_axis and key not in free}
        for name in names:
            if name in with_axis and not self._told_apart:
                raise ValueError(
                    f"{name}: a row must belong to one sample, got rows that depend on several; batch statistics and contrastive losses "
                    "have no per-sample gradient. If this is a table that has no sample axis but is as long as the batch, use ff.fisher, "
                    "which can tell, or another batch size"
                )
        further = capture.follow_further(uses, set(names) - with_axis, NO_AXIS)
        followed = uses.followed
        for source in {source.name: source for name in names for source in followed[name].sources}.values():
            if further and not source.looped:
                self._postponed.add(source.name)
            source.give_up(NO_AXIS)

    def _check_caught(self, uses: Uses) -> None:
        """What is used where no function shows it is left to the loop, with a warning if that is all.

        Errors: ValueError if there is nothing, or if what is looped is used where autograd's graph is cut off.
        """
        looped = self._run.covered.looped
        if not uses.calls:
            if not looped:
                raise ValueError(
                    "collect: the loss must depend on the model's parameters, got one that none of them reaches; run the model itself, "
                    "not with other tensors in their place"
                )
            if not self._run.capture.mode.transformed:
                warn(
                    "collect: the model should run in the block, got a loss in which no use of a parameter was caught; a loop over samples "
                    "differentiates them all, which is slow",
                )
        cut = {source.name for use in uses.all if not use.differentiated for source in use.tracked.sources} if looped else ()
        late = [name for name in looped if name in cut]
        if late:
            raise ValueError(
                f"{late[0]}: its uses must be those of the first batch, got a function without a rule in a later one "
                f"({self._run.capture.tracked[late[0]].fallback}); use ff.fisher, or begin with a batch that shows all uses"
            )
