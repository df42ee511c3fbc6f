# SPDX-License-Identifier: Apache-2.0
"""Whose each row is, from batch to batch: by the layout of its use, and by tags where there is none or where it is to be looked at again."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Sequence

import torch
from torch import Tensor

from fisherfast.capture.calls import CallUse, Key
from fisherfast.capture.capture import Capture
from fisherfast.capture.collector import Samples
from fisherfast.capture.layout import PROBED, UNKNOWN, Finding, Gathered, Kind, Layout, completed
from fisherfast.rules import Rows

NO_AXIS = "no sample axis where it is used"  # why a parameter whose rows are of several samples is covered otherwise


class Locator:
    """Brings the rows of one capture's uses into the order of samples.

    The layouts are the capture's: what the probe of the first batch found. Data may decide how rows lie, and the first batch may
    not show it, so in batches 2, 4, 8, ... all rows are looked at; where they are seen to, in every batch.
    """

    def __init__(self, capture: Capture, averages: bool) -> None:
        self._capture, self._averages = capture, averages  # whether anybody averages a sample's rows
        self.batches = 0  # so far, this one included
        self._samples = Samples(0)  # of this batch
        self.every = True  # whether a row that has no gradient may be counted as any sample's input
        self.scattered: set[Key] = set()  # uses whose rows lie as the data has it (experts): tagged in every batch
        # Of the batches the last in which all rows were looked at, of layouts that are flat or not; and the one before it.
        self._looked = self._before = {True: 0, False: 0}

    def learn(self, findings: dict[Key, Finding]) -> None:
        """Keep the layouts that a probe found."""
        self._capture.layouts.update((key, found.layout) for key, found in findings.items() if found.layout is not None)

    def begin(self, uses: Iterable[CallUse], samples: Samples) -> tuple[set[Key], set[Key]]:
        """Start a batch. Returns ``(unlocated, again)``: the uses without a known layout, and those whose known layout is to be checked in
        this batch.
        """
        self.batches += 1
        self._samples, N = samples, samples.N
        self.every = samples.alike and not self._averages and not samples.padding
        if N == 1:  # whose rows cannot lie otherwise: where all batches before were looked at, they still are
            last = self.batches - 1
            self._looked = {flat: looked + 1 if looked == last else looked for flat, looked in self._looked.items()}
            return set(), set()
        uses = list(uses)
        self.scattered |= {use.key for use in uses if use.chosen}  # a layout that rows chosen by data seem to have is none
        known = {use.key for use in uses if use.key in self._capture.layouts} - self.scattered
        return {use.key for use in uses} - known, self._due(known, N)

    def _due(self, known: set[Key], N: int) -> set[Key]:
        """Of uses with a known layout those that are to be looked at: in batches 2, 4, 8, ... all.

        In the first batch, of which few samples were probed, only where samples and positions share an axis: sequences that are
        of one length by chance lie like blocks. Where the data choose rows, in every batch all: what is made of no sample, as an initial
        state, lies as the rows that it meets, and the tagged passes run anyway.
        """
        if self.scattered:
            self._before, self._looked = self._looked, dict.fromkeys(self._looked, self.batches)
            return known
        if self.batches & (self.batches - 1):
            return set()
        first, all_probed = self.batches == 1, N <= PROBED
        self._before = self._looked
        self._looked = {flat: self.batches if flat or not first or all_probed else 0 for flat in (True, False)}
        if first and all_probed:
            return set()
        return {key for key in known if not first or self._capture.layouts[key].kind.flat}

    def samples_first(self, use: CallUse, rows: Rows, N: int) -> Rows:
        """Rows as ``[N, T, ...]`` by what is known. Errors: ValueError, naming the parameter, if they do not fit that."""
        found = self.if_it_fits(use, rows, N)
        if found is None:
            layout, lead = self._capture.layouts[use.key], tuple(rows.g.shape[: rows.g.dim() - use.form.features])
            raise ValueError(
                f"{use.tracked.name}: rows must hold the batch's {N} samples along axis {layout.axis} ({layout.kind.value}, as the "
                f"probe found), got leading axes {lead}; the model's layout must not change from batch to batch"
            )
        return found

    def if_it_fits(self, use: CallUse, rows: Rows, N: int) -> Rows | None:
        """Rows as ``[N, T, ...]`` by what is known, or None if they do not fit that."""
        features = use.form.features
        if N == 1:
            return rows.each(lambda t: t.reshape(1, -1, *t.shape[t.dim() - features :]))
        layout, lead = self._capture.layouts[use.key], tuple(rows.g.shape[: rows.g.dim() - features])
        return self._laid_out(layout, rows, N, features) if layout.fits(lead, N, self._capture.offsets) else None

    def _laid_out(self, layout: Layout, rows: Rows, N: int, features: int) -> Rows:
        offsets = self._capture.offsets
        if layout.kind is Kind.PACKED and offsets is not None:
            each = math.prod(rows.g.shape[: rows.g.dim() - features]) // rows.g.shape[layout.axis]
            return rows.each(lambda t: layout.packed(t, features), offsets * each)
        return rows.each(lambda t: layout.samples_first(t, N, features))

    def gathered(self, use: CallUse, rows: Rows, N: int, numbers: Tensor) -> Rows:
        """Rows of the samples ``numbers``: ``[N, T, ...]`` if they turn out to have a layout, else packed with offsets.

        Errors: ValueError, naming the parameter, for rows of several samples, and for a layout that held in batches nobody looked at.
        """
        finding = Finding.of(numbers, N, self._capture.offsets)
        if finding.mixes_samples:
            raise ValueError(
                f"{use.tracked.name}: a row must belong to one sample, got rows that depend on several: batch statistics, a "
                "contrastive loss, or a table without a sample axis that earlier batches did not show"
            )
        before, offsets = self._capture.layouts.get(use.key), self._capture.offsets
        known = before is not None and before.explains(finding.numbers, N, offsets)
        layout = before if known else finding.layout
        fits = layout is not None and (  # packed samples have no padding
            layout.kind is Kind.PACKED or not self._may_be_padding(use, layout.samples_first(finding.numbers, N, 0) != UNKNOWN)
        )
        if layout is not None and fits and (before is None or known or use.key in self.scattered):
            if use.key not in self.scattered:
                self._capture.layouts[use.key] = layout
            return self._laid_out(layout, rows, N, use.form.features)
        if use.key not in self.scattered and before is not None:
            self._distrust(use, before)
        if before is None and finding.possible and not (use.gathered and self._samples.padding):
            # Too few rows have a gradient to tell.
            return self._laid_out(self._likely(finding.possible), rows, N, use.form.features)
        self.scattered.add(use.key)
        numbers = finding.numbers if self._samples.padding else completed(finding.numbers, N)
        return self._packed(use, rows, numbers, N)

    def _may_be_padding(self, use: CallUse, alive: Tensor) -> bool:
        """Whether some of these rows ``[N, T]``, chosen by the data, may be padding: they have no gradient, and are not the positions
        that the mask is of, some of which it leaves out although they have one.
        """
        if not self._samples.padding or not use.gathered or bool(alive.all()):
            return False
        mask = self._samples.mask
        return mask is None or mask.shape != alive.shape or bool((alive & ~mask).any())

    def _likely(self, possible: Sequence[Layout]) -> Layout:
        """That of most other uses; whose the rows without a gradient are matters where a mask says which of them exist."""
        others = Counter(self._capture.layouts.values())
        return max(possible, key=lambda layout: others[layout])

    def without_gradient(self, use: CallUse, rows: Rows, N: int) -> Rows | None:
        """Rows of a use none of whose rows has a gradient, so that tags cannot tell the samples.

        Where every row counts alike it does not matter whose they are, and the last sample gets them; else they take the layout that most
        other uses have. None if they fit none, or may be padding that no mask describes: then they are left out.
        """
        nobodys = torch.full(rows.g.shape[: rows.g.dim() - use.form.features], UNKNOWN, device=rows.g.device)
        if self.every:
            return self._packed(use, rows, nobodys, N)
        possible = Finding.of(nobodys, N, self._capture.offsets).possible
        return (
            None
            if (use.gathered and self._samples.padding) or not possible
            else self._laid_out(self._likely(possible), rows, N, use.form.features)
        )

    def alone(self, use: CallUse, rows: Rows, numbers: Tensor | None) -> Rows:
        """Rows of a batch of one sample. Rows that were chosen by the data and have no gradient may be padding: they are left out, as
        in larger batches, unless the rows are the very positions that the mask is about.

        ``numbers``: the sample of each row, ``UNKNOWN`` for padding, where that was found for all passes together.
        """
        if not self._samples.padding or not use.gathered:
            return self.samples_first(use, rows, 1)
        if numbers is None:
            features = use.form.features
            alive = (rows.g != 0).flatten(rows.g.dim() - features).any(-1) if features else rows.g != 0
            numbers = torch.where(alive, 0, UNKNOWN)
        if numbers.dim() > 1 and not self._may_be_padding(use, numbers.flatten(1) != UNKNOWN):
            return self.samples_first(use, rows, 1)
        return self._packed(use, rows, numbers, 1)

    def _packed(self, use: CallUse, rows: Rows, numbers: Tensor, N: int) -> Rows:
        gathered = Gathered(numbers, N, self.every)
        return rows.each(lambda t: gathered.packed(t, use.form.features), gathered.offsets)

    def _distrust(self, use: CallUse, before: Layout) -> None:
        """The layout does not hold in this batch: raise, unless all batches before it were looked at."""
        looked, number = self._before[before.kind.flat], self.batches - 1
        if looked < number:
            since = f"the batches since number {looked - 1}" if looked else "those before it"
            raise ValueError(
                f"{use.tracked.name}: rows must lie as in the batches before (samples along axis {before.axis}, {before.kind.value}), "
                f"got others in batch {number}; {since} were not looked at and may be wrong. Where the "
                "data decide how rows lie, begin with batches that show it: samples of different lengths, say"
            )


def mixing(findings: dict[Key, Finding], parameters: Container[str], chosen: Container[Key]) -> set[str]:
    """Names of the parameters, and of what is made of them, whose rows cannot be assigned to samples, because for one of their uses

    * a row depends on several samples, or
    * no layout fits, the data have not ``chosen`` the rows, and all uses show one sample's gradient at most (others may follow in later
      batches), or
    * it is made of ``parameters`` and has no layout: it may hold samples.
    """
    owners: defaultdict[str, set[int]] = defaultdict(set)
    for key, finding in findings.items():
        owners[key[0]] |= finding.owners

    def unclear(key: Key, finding: Finding) -> bool:
        if finding.layout is not None:
            return False
        return key[0] not in parameters or (key not in chosen and finding.lies_nowhere and len(owners[key[0]]) <= 1)

    return {key[0] for key, finding in findings.items() if finding.mixes_samples or unclear(key, finding)}
