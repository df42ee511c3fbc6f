# SPDX-License-Identifier: Apache-2.0
"""How blocks are collected: which parameters have one, and to whose sums the rows of a batch go.

A structure of blocks gives the sums of a weight's block (``BlockSums``) and a ``BlockCollector`` that makes them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisherfast.accumulator import Accumulator
from fisherfast.capture import Call, CallUse, Capture, Tracked
from fisherfast.fisher.block_sums import BlockSums, DiagonalSums, GradientSums, WeightSums
from fisherfast.fisher.exact_sums import ExactSums
from fisherfast.fisher.kronecker import Place
from fisherfast.fisher.memory import Held
from fisherfast.passes import Cost, Samples, in_parts
from fisherfast.rules import Convolution, Elementwise, Form, Lookup, MatMul, Rows


class BlockCollector:
    """The sums behind a structure of blocks; see ``passes.Collector`` for its protocol.

    Which parameters have a block is decided when the first batch that counts begins: those that only multiply or are looked
    up, always in one way, or are slid over images once. A bias that is added in exactly the calls of its weight joins the weight's
    block. Of the others, those of ``max_exact_dim`` numbers at most have an exact block, the rest a diagonal.
    """

    separate = True  # every pass has output gradients of its own

    def __init__(self, capture: Capture, transactional: bool, max_exact_dim: int) -> None:
        self._tracked, self._max_exact_dim = capture.tracked, max_exact_dim
        self._transactional, self._staged, self._samples = transactional, False, Samples(0)
        self._uses: dict[str, list[tuple[int, CallUse]]] = {}
        self._calls: dict[int, list[CallUse]] = {}
        self._sums: dict[str, BlockSums | DiagonalSums] = {}
        self._in_parts: set[str] = set()
        self._weight_of: dict[str, str] = {}  # of a bias
        self._counted: dict[str, int] = {}  # numbers in g of a weight with a bias, in this pass
        self._before: tuple[list[Any], dict[str, Accumulator]] = ([], {})  # of a checkpoint

    def new_block(self, place: Place, form: Form, tracked: Tracked, made: Mapping[str, Any]) -> BlockSums:
        """The sums of the block of a weight that is used in this form; ``made`` are those of the parameters before it."""
        raise NotImplementedError

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the parameters, in the model's order."""
        return {name: tracked.parameter.shape for name, tracked in self._tracked.items()}

    def explore(self, calls: list[Call]) -> None:
        """See ``passes.Collector``."""
        uses: defaultdict[str, list[tuple[int, CallUse]]] = defaultdict(list)
        for call in calls:
            for use in call.uses:
                uses[use.tracked.name].append((call.index, use))
        self._uses, self._calls = dict(uses), {call.index: call.uses for call in calls}
        self._in_parts |= in_parts(calls)

    def forget(self, name: str) -> None:
        """See ``passes.Collector``: nothing is planned yet."""

    def holds(self, passes: int) -> list[Held]:
        """What batches of so many backward passes take, once the model is explored."""
        self._plan()
        staged = self._transactional or passes > 1
        return [sums.holds(staged or name in self._in_parts) for name, sums in self._sums.items()]

    def cost(self, tracked: Tracked, form: Form, rows: Rows, number: int) -> Cost:
        """See ``passes.Collector``; a bias that joins its weight takes no more."""
        sums = self._sums.get(tracked.name)
        return Cost() if sums is None else Cost(sums.flops(form, rows, number), scratch=sums.scratch(rows))

    def begin(self, samples: Samples) -> None:
        """See ``passes.Collector``."""
        self._plan()
        if any(self._before):
            self._go_on()
        self._staged, self._samples = self._transactional or samples.passes > 1, samples

    def _plan(self) -> None:
        if self._sums:
            return
        multiply = {name: tracked for name, tracked in self._tracked.items() if self._multiplies(tracked)}
        self._weight_of = {bias: name for name in multiply for bias in self._bias_of(name)}
        bias_of = {weight: bias for bias, weight in self._weight_of.items()}
        input_of = self._same_inputs(multiply, bias_of)
        sums: dict[str, BlockSums | DiagonalSums] = {}
        for name, tracked in self._tracked.items():
            if name in multiply:
                form = self._uses[name][0][1].form
                place = replace(_place(name, bias_of.get(name), form), input_of=input_of.get(name))
                sums[name] = self.new_block(place, form, tracked, sums)
            elif name not in self._weight_of:
                small = tracked.parameter.numel() <= self._max_exact_dim
                sums[name] = ExactSums(tracked) if small else DiagonalSums(tracked)
        self._sums = sums

    def _multiplies(self, tracked: Tracked) -> bool:
        forms = {use.form for _, use in self._uses.get(tracked.name, [])}
        if tracked.fallback or len(forms) != 1:
            return False
        (form,) = forms
        once = len(self._uses[tracked.name]) == 1  # images of several sizes are brought to one by positions that do not exist
        return isinstance(form, (MatMul, Lookup)) or (isinstance(form, Convolution) and not form.transposed and once)

    def _same_inputs(self, weights: Iterable[str], bias_of: Mapping[str, str]) -> dict[str, str]:
        """Of a weight that multiplies what another one before it multiplies (queries, keys and values), that other one."""
        first: dict[Any, str] = {}
        shared = {}
        for name in weights:
            (_, use), *more = self._uses[name]
            if isinstance(use.form, MatMul) and not more:
                leader = first.setdefault((use.inputs, use.form.left, use.tracked.expand, name in bias_of), name)
                if leader != name:
                    shared[name] = leader
        return shared

    def _bias_of(self, weight: str) -> list[str]:
        """The bias that is added wherever the weight is used, and nowhere else."""
        calls = [index for index, _ in self._uses[weight]]
        others = [use for use in self._calls[calls[0]] if use.tracked.name != weight]
        return [
            use.tracked.name
            for use in others
            if isinstance(use.form, Elementwise)
            and not use.picks
            and (use.tracked.fallback, use.tracked.expand) == (None, self._tracked[weight].expand)
            and [index for index, _ in self._uses[use.tracked.name]] == calls
        ][:1]

    @torch.no_grad()
    def add(self, tracked: Tracked, form: Form, rows: Rows, scale: float, number: int) -> None:
        """See ``passes.Collector``."""
        name = tracked.name
        if name in self._weight_of:
            if self._counted.pop(self._weight_of[name], None) != rows.g.numel():
                raise ValueError(
                    f"{name}: must be used with {self._weight_of[name]!r} as in the first batch, got another use of it"
                )
            return
        sums = self._sums[name]
        sums.check(form)
        sums.add(form, rows, scale, number, self._samples, self._waits(name))
        sums.touch(self._samples)
        if isinstance(sums, WeightSums):
            transposed = isinstance(form, MatMul) and form.transposed
            self._counted[name] = rows.x.numel() if transposed and rows.x is not None else rows.g.numel()

    @torch.no_grad()
    def add_gradients(self, tracked: Tracked, gradients: Tensor, first: int, scale: float, number: int) -> None:
        """See ``passes.Collector``."""
        sums = self._sums[tracked.name]
        if not isinstance(sums, GradientSums):
            raise ValueError(
                f"{tracked.name}: must be used as in the first batch, got a use without a rule; begin with 2 samples or more"
            )
        sums.add_gradients(gradients, first, scale, self._samples, self._waits(tracked.name))
        sums.touch(self._samples)

    def _waits(self, name: str) -> bool:
        """Whether what is added counts only with its whole batch: also of a parameter that comes part by part."""
        return self._staged or name in self._in_parts

    def expect(self, tracked: Tracked, parts: int) -> None:
        """See ``passes.Collector``."""
        if parts > 1:
            self._in_parts.add(tracked.name)
        elif parts == 0:
            self._part(tracked.name)
            self.touch(tracked)

    def _part(self, name: str) -> None:
        """A weight is not used in a batch: its inputs are no longer those of weights that are."""
        if isinstance(sums := self._sums.get(name), WeightSums):
            leader = sums.place.input_of or name
            for other in self._sums.values():
                if isinstance(other, WeightSums) and other.place.input_of == leader:
                    other.part()

    def touch(self, tracked: Tracked) -> None:
        """See ``passes.Collector``."""
        if tracked.name in self._sums:
            self._sums[tracked.name].touch(self._samples)

    @torch.no_grad()
    def settle(self, complete: bool) -> list[str]:
        """See ``passes.Collector``."""
        every = [(name, one) for name, sums in self._sums.items() for one in sums.sums]  # each once, also if it is shared
        flags = torch.cat([one.flag for _, one in every]).tolist()
        bad = list(dict.fromkeys(name for (name, _), flag in zip(every, flags, strict=True) if flag))
        for (_, one), flag in zip(every, flags, strict=True):
            one.settle(whole=complete and not bad, alone=not flag)
        for sums in self._sums.values():
            sums.end()
        self._counted.clear()
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
        blocks, diagonals = {block.place.weight: block for block in self._before[0]}, self._before[1]
        for name, block in blocks.items():
            sums = self._sums.get(name)
            if isinstance(sums, WeightSums) and sums.place.input_of is not None and block.place.input_of is None:
                sums.part()  # it did before, after the first batch
        planned = {name: None if isinstance(sums, DiagonalSums) else sums.place for name, sums in self._sums.items()}
        if planned != {name: block.place for name, block in blocks.items()} | dict.fromkeys(diagonals):
            raise ValueError(
                "fisher: a checkpoint must be of the same model, used in the same way, got other blocks; remove the file"
            )
        for name, sums in self._sums.items():
            if isinstance(sums, DiagonalSums):
                sums.squares.running.restore(diagonals[name])
            else:
                sums.restore(blocks[name])
        self._before = ([], {})


def _place(weight: str, bias: str | None, form: Form) -> Place:
    groups = form.groups if isinstance(form, Convolution) else 1
    transposed = isinstance(form, Lookup) or (isinstance(form, MatMul) and form.transposed)
    op = {"conv_sq_": "conv_gram_", "embedding_sq_": "counts"}.get(form.op, "gram_")
    return Place(weight, bias, groups, transposed, op)
