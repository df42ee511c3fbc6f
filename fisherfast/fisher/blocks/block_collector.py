# SPDX-License-Identifier: Apache-2.0
"""How blocks are collected: which parameters have one, and to whose sums the rows of a batch go.

A structure of blocks gives the sums of a weight's block (``BlockSums``) and a ``BlockCollector`` that makes them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisherfast.accumulator import Accumulator
from fisherfast.capture.calls import Call, in_parts
from fisherfast.capture.capture import Capture
from fisherfast.capture.collector import Cost, Held, Samples
from fisherfast.capture.tracked import Tracked
from fisherfast.fisher.blocks import units
from fisherfast.fisher.blocks.block_sums import BlockSums, DiagonalSums, GradientSums, WeightSums
from fisherfast.fisher.blocks.exact_sums import ExactSums
from fisherfast.fisher.blocks.kronecker import Place
from fisherfast.fisher.blocks.units import Unit
from fisherfast.rules import Convolution, Form, Lookup, Rows, Window

_ROUNDED = 1e-2  # sums of the same numbers differ by less, though some were rounded to 16 bits


class BlockCollector:
    """The sums behind a structure of blocks; see ``Collector`` for its protocol.

    Which parameters have a block is decided when the first batch that counts begins: those that only multiply, are looked up or
    are slid over images, always in one way; a packed one has a block for each part (``units``). A bias that is added in exactly
    the calls of its weight joins the weight's block. Of the others, those of ``max_exact_dim`` numbers at most have an exact
    block, the rest a diagonal.
    """

    separate = True  # every pass has output gradients of its own
    averages = False
    by_use = True

    def __init__(self, capture: Capture, transactional: bool, max_exact_dim: int) -> None:
        self._tracked, self._max_exact_dim = capture.tracked, max_exact_dim
        self._transactional, self._staged, self._samples = transactional, False, Samples(0)
        self._calls: list[Call] = []
        self._sums: dict[str, BlockSums | DiagonalSums] = {}
        self._parts: dict[str, dict[Window | None, str]] = {}  # of a weight, or a bias that joins one: each by its unit's name
        self._followers: defaultdict[str, list[str]] = defaultdict(list)  # the weights that share another one's inputs
        self._in_parts: set[str] = set()
        self._weight_of: dict[str, str] = {}  # of a bias
        self._with_bias: set[str] = set()
        self._seen: dict[str, list[Tensor]] = {}  # g of a weight with a bias, until the bias comes
        self._bare: set[str] = set()  # weights that this batch uses without the bias they had
        self._before: tuple[list[Any], dict[str, Accumulator]] = ([], {})  # of a checkpoint

    def new_block(self, place: Place, form: Form, weight: Tensor, made: Mapping[str, Any]) -> BlockSums:
        """The sums of the block of a weight that is used in this form; ``made`` are those before it, by name."""
        raise NotImplementedError

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the parameters, in the model's order."""
        return {name: tracked.parameter.shape for name, tracked in self._tracked.items()}

    def explore(self, calls: list[Call]) -> None:
        """See ``Collector``."""
        self._calls = calls
        self._in_parts = in_parts(calls)

    def forget(self, name: str) -> None:
        """See ``Collector``: nothing is planned yet."""

    def holds(self, passes: int) -> list[Held]:
        """What batches of so many backward passes take, once the model is explored."""
        self._plan()
        staged = self._transactional or passes > 1
        held = [sums.holds(staged or name in self._in_parts) for name, sums in self._sums.items()]
        return [one.written() for one in held] if self._transactional else held

    def cost(self, tracked: Tracked, form: Form, rows: Rows) -> Cost:
        """See ``Collector``; a bias that joins its weight takes no more."""
        name, form = self._unit(tracked, form)
        sums = self._sums.get(name)
        return Cost() if sums is None else sums.cost(form, rows)

    def begin(self, samples: Samples) -> None:
        """See ``Collector``."""
        self._plan()
        if any(self._before):
            self._go_on()
        self._staged, self._samples = self._transactional or samples.passes > 1, samples

    def _plan(self) -> None:
        if self._sums:
            return
        weights, bias_of = units.of_weights(self._tracked, self._calls)
        self._weight_of = {bias.name: weight for weight, bias in bias_of.items()}
        self._with_bias = set(bias_of)
        for unit in (*weights, *bias_of.values()):
            self._parts.setdefault(unit.tracked.name, {})[unit.window] = unit.name
        input_of = units.same_inputs(weights, bias_of)
        for follower, leader in input_of.items():
            self._followers[leader].append(follower)
        by_parameter: defaultdict[str, list[Unit]] = defaultdict(list)
        for unit in weights:
            by_parameter[unit.tracked.name].append(unit)
        sums: dict[str, BlockSums | DiagonalSums] = {}
        for name, tracked in self._tracked.items():
            for unit in by_parameter[name]:
                place = _place(unit, bias_of.get(unit.name), input_of.get(unit.name))
                sums[unit.name] = self.new_block(place, unit.form, unit.tensor, sums)
            if name not in self._parts:
                small = tracked.parameter.numel() <= self._max_exact_dim
                sums[name] = ExactSums(tracked) if small else DiagonalSums(tracked)
        self._sums = sums

    def _unit(self, tracked: Tracked, form: Form) -> tuple[str, Form]:
        """To whose sums a use's rows go, and the form that these know: of a parameter without a block any."""
        parts = self._parts.get(tracked.name)
        if parts is None:
            return tracked.name, form
        if form.window not in parts:
            raise ValueError(
                f"{tracked.name}: must be used as in the first batch, in the parts {list(parts.values())}, got {form}"
            )
        return parts[form.window], form.inner

    def add(self, tracked: Tracked, form: Form, rows: Rows, scale: float, number: int) -> None:
        """See ``Collector``."""
        name, form = self._unit(tracked, form)
        if name in self._weight_of:
            if not _same_numbers(self._seen.pop(self._weight_of[name], None), rows.g):
                raise ValueError(
                    f"{name}: must be used with {self._weight_of[name]!r} as in the first batch, got another use of it"
                )
            return
        if name in self._bare:
            raise ValueError(
                f"{name}: must be used with its bias as in the first batch, got a use without it; measure the diagonal, or such batches by themselves"
            )
        sums = self._sums[name]
        sums.check(form)
        sums.saw(rows.g.dtype)
        sums.add(form, rows, scale, number, self._samples, self._waits(name))
        sums.main.visited(self._samples.total_weight())
        if name in self._with_bias:
            self._seen[name] = [form.as_used(use)[1] for use in rows.uses or (rows,)]

    def add_gradients(self, tracked: Tracked, gradients: Tensor, first: int, scale: float, number: int) -> None:
        """See ``Collector``. Outside a staged batch every call is a transaction of its own."""
        sums = self._sums.get(tracked.name)
        if not isinstance(sums, GradientSums):
            raise ValueError(
                f"{tracked.name}: must be used as in the first batch, got a use without a rule; begin with a batch that shows all uses, "
                "of 2 samples or more"
            )
        sums.saw(gradients.dtype)
        waits = self._waits(tracked.name)
        sums.add_gradients(gradients, first, scale, self._samples, waits)
        if waits:
            sums.main.visited(self._samples.total_weight())
        else:
            weight = self._samples.weight_of(first, len(gradients))
            sums.main.count(len(gradients) if weight is None else float(weight.double().sum()))

    def _waits(self, name: str) -> bool:
        """Whether what is added counts only with its whole batch: also of a parameter that comes part by part."""
        return self._staged or name in self._in_parts

    def expect(self, tracked: Tracked, windows: set[Window | None]) -> None:
        """See ``Collector``."""
        if len(windows) > 1:
            self._in_parts.add(tracked.name)
        parts = self._parts.get(tracked.name)
        if parts is None:
            unused = [] if windows else [tracked.name]
        else:
            unused = [name for window, name in parts.items() if window not in windows]
        for name in unused:
            self._leave(name)
            self._touch(name)
            if name in self._weight_of:
                self._bare.add(self._weight_of[name])

    def _leave(self, name: str) -> None:
        """A weight is not used in a batch: its inputs are no longer those of weights that are."""
        if isinstance(sums := self._sums.get(name), WeightSums):
            for follower in self._followers.pop(sums.place.input_of or name, []):
                one = self._sums[follower]
                if isinstance(one, WeightSums) and one.place.input_of is not None:
                    one.leave()

    def touch(self, tracked: Tracked, window: Window | None) -> None:
        """See ``Collector``."""
        self._touch(self._parts.get(tracked.name, {}).get(window, tracked.name))

    def _touch(self, name: str) -> None:
        if name in self._sums:
            self._sums[name].main.visited(self._samples.total_weight())

    def settle(self, complete: bool) -> list[str]:
        """See ``Collector``."""
        every = [(name, one) for name, sums in self._sums.items() for one in sums.sums]  # each once, also if it is shared
        flags = torch.cat([one.flag for _, one in every]).tolist()
        bad = list(dict.fromkeys(name for (name, _), flag in zip(every, flags, strict=True) if flag))
        for (_, one), flag in zip(every, flags, strict=True):
            one.settle(whole=complete and not bad, alone=not flag)
        for sums in self._sums.values():
            sums.end()
        self._seen.clear()
        self._bare.clear()
        return bad

    def snapshot(self) -> tuple[list[Any], dict[str, Accumulator]]:
        """What was added, on memory of its own: blocks, and diagonals of the other parameters."""
        if any(self._before):
            return self._before
        planned = self._sums or {name: DiagonalSums(tracked) for name, tracked in self._tracked.items()}  # stopped before a batch
        diagonals = {name: s.squares.running.snapshot() for name, s in planned.items() if isinstance(s, DiagonalSums)}
        blocks: dict[str, Any] = {}
        for name, sums in planned.items():
            if not isinstance(sums, DiagonalSums):
                blocks[name] = sums.block(blocks)
        return list(blocks.values()), diagonals

    def restore(self, blocks: Sequence[Any], diagonals: dict[str, Accumulator]) -> None:
        """Start from a snapshot."""
        self._before = (list(blocks), diagonals)

    def _go_on(self) -> None:
        """Give the sums, now that they are planned, what a checkpoint has of them."""
        blocks, diagonals = {block.place.name: block for block in self._before[0]}, self._before[1]
        for name, block in blocks.items():
            sums = self._sums.get(name)
            if isinstance(sums, WeightSums) and sums.place.input_of is not None and block.place.input_of is None:
                sums.leave()  # it did before, after the first batch
        planned = {name: None if isinstance(sums, DiagonalSums) else sums.place for name, sums in self._sums.items()}
        if planned != {name: block.place for name, block in blocks.items()} | dict.fromkeys(diagonals):
            raise ValueError(
                "fisher: a checkpoint must be of the same model, used in the same way, got other blocks; remove the file"
            )
        for name, sums in self._sums.items():
            if isinstance(sums, DiagonalSums):
                sums.squares.running.restore(diagonals[name])
            else:
                sums.rounding = sums.rounding.coarser(blocks[name].rounding)
                sums.restore(blocks[name])
        self._before = ([], {})


def _same_numbers(outputs: list[Tensor] | None, g: Tensor) -> bool:
    """Whether a weight's use and its bias's are one: rows without a gradient may have been left out of one and not of the other, where
    the weight's rows are whole images; and one may have been rounded to 16 bits.
    """
    if outputs is None:
        return False
    if sum(t.numel() for t in outputs) == g.numel() and outputs[0].data_ptr() == g.data_ptr():
        return True
    mine, theirs = (sum(float(t.abs().sum(dtype=torch.float64)) for t in some) for some in (outputs, [g]))
    return math.isclose(mine, theirs, rel_tol=_ROUNDED) or not math.isfinite(mine + theirs)  # which the sums see for themselves


def _place(unit: Unit, bias: Unit | None, input_of: str | None) -> Place:
    form = unit.form
    groups = form.groups if isinstance(form, Convolution) else 1
    transposed = form.transposed or isinstance(form, Lookup)
    op = {"conv_sq_": "conv_gram_", "embedding_sq_": "counts"}.get(form.op, "gram_")
    place = Place(
        unit.tracked.name, None, groups, transposed, op, input_of=input_of, weight_part=unit.entries, row_axes=unit.row_axes
    )
    return place if bias is None else replace(place, bias=bias.tracked.name, bias_part=bias.entries)
