# SPDX-License-Identifier: Apache-2.0
"""The engine that adds up what requests need: one op call per parameter and pass, for the union of what is asked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fisherfast._precision import wide, wide_dtype
from fisherfast.accumulator import Accumulator, RunningSum
from fisherfast.capture.calls import Call, in_parts
from fisherfast.capture.capture import Capture
from fisherfast.capture.collector import Cost, Held, Samples
from fisherfast.capture.tracked import Tracked
from fisherfast.fisher import ghost
from fisherfast.fisher.request import Request
from fisherfast.fisher.sample_values import Norms, SampleValues
from fisherfast.rules import Form, Rows, Window


class Engine:
    """The sums over parameters behind all requests of a run; see ``Collector`` for its protocol.

    A batch of one backward pass goes into the running sums directly; if the pass stops half-way, each parameter's weight
    says what it has. A batch of several passes (columns of the exact Fisher, draws) means nothing until they are complete:
    it goes into staging tensors, one more per running sum, that are folded in, or dropped, at the end. So does, of any batch,
    a parameter whose rows come part by part. ``transactional`` stages every batch, for checkpoints. What is per sample counts
    only when its batch is complete, and ``.grad`` is filled only then.
    """

    def __init__(
        self, capture: Capture, structures: Sequence[Request], transactional: bool = False, fills: str | None = None
    ) -> None:
        parameters = {name: t.parameter for name, t in capture.tracked.items()}
        needs = [structure.needs for structure in structures]
        self.squares = {name: RunningSum(p) for name, p in parameters.items() if any(need.squares for need in needs)}
        self.totals = {name: RunningSum(p) for name, p in parameters.items() if any(need.totals for need in needs)}
        self._copies = [self.squares for need in needs if need.squares] + [self.totals for need in needs if need.totals]
        self.squared_weights = dict.fromkeys(self.totals, 0.0)  # sum of w^2, where the sum of w is in the running sums
        self._fills = fills  # ``.grad`` with each batch's "sum" or "mean"
        self._tracked = dict(capture.tracked)
        self.reached: set[str] = set()  # by the loss at hand: only these get a .grad
        norms = {need.norms for need in needs}
        kept: Norms | None = "layers" if "layers" in norms else "whole" if "whole" in norms else None
        self.values = SampleValues(list(parameters), kept, any(need.spread for need in needs), capture.device)
        self._transactional, self._device = transactional, capture.device
        self._arrange(list(parameters))
        self._scratch = torch.zeros(0, device=capture.device)
        self._staged = False
        self._in_parts: set[str] = set()
        self._samples = Samples(0)
        self._staged_squares: dict[str, Tensor] = {}
        self._staged_totals: dict[str, Tensor] = {}
        self._touched: dict[str, None] = {}

    def _arrange(self, names: list[str]) -> None:
        """Give each parameter its flag."""
        self._flags = torch.zeros(len(names), dtype=torch.int32, device=self._device)
        self._flag = dict(zip(names, self._flags.split(1), strict=True))

    def forget(self, name: str) -> None:
        """Drop a parameter that the run does not cover."""
        for sums in (self.squares, self.totals, self.squared_weights):
            sums.pop(name, None)
        left = [other for other in self._flag if other != name]
        self._arrange(left)
        self.values.arrange(left)

    # -- what it takes

    def holds(self, passes: int) -> list[Held]:
        """What batches of so many backward passes take; values of samples are not counted."""
        staged = self._transactional or passes > 1
        held = [self._held(name, staged or name in self._in_parts) for name in self._flag]
        return [of_parameter.written() for of_parameter in held] if self._transactional else held

    def _held(self, name: str, staged: bool) -> Held:
        sums = [group[name] for group in (self.squares, self.totals) if name in group]
        of_sums = sum(running.held(staged) for running in sums) + self._filled(name)
        kinds = [kind for kind, group in (("diagonal", self.squares), ("mean", self.totals)) if name in group]
        what = f"{' and '.join(kinds)} {list(sums[0].shape)}" if sums else "norms"
        of_results = sum(copied[name].nbytes for copied in self._copies)
        copies = of_results - sum(running.nbytes for running in sums)  # of what several results are made of
        return Held((name,), what, of_sums, (of_sums + copies,), result=of_results)

    def _filled(self, name: str) -> int:
        """The batch's sum of gradients, which becomes ``.grad`` where that may be as wide."""
        parameter = self._tracked[name].parameter
        dtype = wide_dtype(parameter.dtype)
        of_grad = 0 if dtype == parameter.dtype else parameter.nbytes
        return parameter.numel() * dtype.itemsize + of_grad if self._fills else 0

    def cost(self, tracked: Tracked, form: Form, rows: Rows) -> Cost:
        """See ``Collector``."""
        parameter, shape = tracked.parameter, tracked.parameter.shape
        by_ghosts = self._by_ghosts(tracked, form, rows)
        room = tracked.name not in self.squares and not (by_ghosts and ghost.is_outer(form, rows))
        scratch = room * parameter.numel() * wide_dtype(parameter.dtype).itemsize
        return Cost(ghost.flops(form, rows, shape) if by_ghosts else form.flops(rows, shape), scratch=scratch)

    # -- one batch

    averages = False
    by_use = False

    @property
    def separate(self) -> bool:
        """See ``Collector``: passes added up leave the sum of their squares, and no sum of gradients."""
        return bool(self.totals or self._fills)

    def explore(self, calls: list[Call]) -> None:
        """See ``Collector``."""
        self._in_parts = in_parts(calls)

    def begin(self, samples: Samples) -> None:
        """See ``Collector``."""
        self._staged = self._transactional or samples.passes > 1
        self._samples = samples
        self.values.begin(samples)

    def add(self, tracked: Tracked, form: Form, rows: Rows, scale: float, number: int) -> None:
        """See ``Collector``."""
        if self._samples.sparse and form.op == "linear_sq_" and rows.g.shape[-2] > 1:
            rows = self._without_zeros(tracked, form, rows)
        name, flag, sqnorm = tracked.name, self._flag[tracked.name], self.values.target(tracked.name, scale)
        self._accumulate(tracked, form, rows, scale, sqnorm, flag)
        self._touched[name] = None  # afterwards, so that what fails has no weight

    def _without_zeros(self, tracked: Tracked, form: Form, rows: Rows) -> Rows:
        """Rows of the positions that have a gradient, unless pairs of all positions take fewer operations."""
        packed, shape = rows.without_zeros(), tracked.parameter.shape
        pairs = self._by_ghosts(tracked, form, rows) and ghost.flops(form, rows, shape) < form.flops(packed, shape)
        return rows if pairs else packed

    def _by_ghosts(self, tracked: Tracked, form: Form, rows: Rows) -> bool:
        """Whether norms alone are asked for, and take fewer operations without the gradients."""
        alone = tracked.name not in self.squares and not self._fills
        return alone and ghost.applies(form, rows, tracked.parameter.shape)

    def _accumulate(self, tracked: Tracked, form: Form, rows: Rows, scale: float, sqnorm: Tensor | None, flag: Tensor) -> None:
        name = tracked.name
        if name in self.squares or self._fills:
            asked = name in self.squares
            acc = self._target(self.squares, self._staged_squares, name) if asked else self._scratch_like(tracked.parameter)
            total = self._total(name, scale) if self.totals or self._fills else None
            form.accumulate(acc, rows, scale, weight=self._samples.weight, total=total, sqnorm=sqnorm, flag=flag)
        elif sqnorm is not None and self._by_ghosts(tracked, form, rows):
            parameter = tracked.parameter
            ghost.add_norms(sqnorm, form, rows, parameter.shape, flag, partial(self._scratch_like, parameter))
        else:
            form.accumulate(self._scratch_like(tracked.parameter), rows, scale, sqnorm=sqnorm, flag=flag)

    def add_gradients(self, tracked: Tracked, gradients: Tensor, first: int, scale: float, number: int) -> None:
        """See ``Collector``. Outside a staged batch every call is a transaction of its own."""
        name, n = tracked.name, len(gradients)
        if self._fills:
            self._in_parts.add(name)  # .grad is of whole batches
        gradients = wide(gradients)
        squares = gradients.square()
        norms = squares.reshape(n, -1).sum(1)
        sqnorm = self.values.target(name, scale)
        if not torch.isfinite(norms).all():
            self._flag[name].fill_(1)
            self._touched[name] = None
            return
        if sqnorm is not None:
            sqnorm[first : first + n] += norms
        weight = self._samples.weight_of(first, n)
        if name in self.squares:
            self._target(self.squares, self._staged_squares, name).add_(_weighted_sum(squares, weight), alpha=scale)
        if name in self.totals or self._fills:
            self._total(name, scale).add_(_weighted_sum(gradients, weight))
        if self._waits(name):
            self._touched[name] = None
        else:
            self._counted(name, *_weights(weight, n))

    def expect(self, tracked: Tracked, windows: set[Window | None]) -> None:
        """See ``Collector``."""
        if not windows:
            self._touched[tracked.name] = None
        elif len(windows) > 1:
            self._in_parts.add(tracked.name)

    def touch(self, tracked: Tracked, window: Window | None) -> None:
        """See ``Collector``."""
        self._touched[tracked.name] = None

    def settle(self, complete: bool) -> list[str]:
        """See ``Collector``. Parameters come in the order of the backward pass."""
        bad = self._bad()
        whole = complete and not bad
        weights = _weights(self._samples.weight, self._samples.N)
        for name in self._touched:
            if whole or not (self._waits(name) or name in bad):
                self._take_staged(name)
                self._counted(name, *weights)
        if whole and self._fills:
            self._fill()
        if whole:
            self.values.settle()
        self._clear_batch()
        return list(bad)

    def _bad(self) -> dict[str, None]:
        """Parameters of the batch with something that is not finite. Where that spoiled a running sum, the sum is dropped."""
        flagged = dict(zip(self._flag, self._flags.tolist(), strict=True))
        for name in self._overflowed():
            flagged[name] = 1
            if not self._waits(name):
                self.squares[name].clear()
        return {name: None for name in self._touched if flagged[name]}

    def _take_staged(self, name: str) -> None:
        """Add what waited for the batch's end to the running sums."""
        if name in self._staged_squares:
            self.squares[name].low.add_(self._staged_squares[name])
        if name in self._staged_totals and name in self.totals:
            self.totals[name].low.add_(self._staged_totals[name], alpha=1 / self._samples.passes)

    def _clear_batch(self) -> None:
        """Make room for the next one, on the same memory; what failed may have added to it, too."""
        for staged in (*self._staged_squares.values(), *self._staged_totals.values()):
            staged.zero_()
        self._flags.zero_()
        self._touched.clear()

    def _fill(self) -> None:
        """Add the batch's gradients to ``.grad``, as a backward pass of autograd's would."""
        divisor = self._samples.N if self._fills == "mean" else 1
        for name in self._touched.keys() & self._staged_totals.keys() & self.reached:
            parameter, total = self._tracked[name].parameter, self._staged_totals[name].div_(divisor)
            if not parameter.requires_grad:  # frozen since
                continue
            if parameter.grad is not None:
                parameter.grad.add_(total)
            elif (total.dtype, total.stride()) == (parameter.dtype, parameter.stride()):
                parameter.grad = self._staged_totals.pop(name)
            else:
                parameter.grad = torch.empty_like(parameter).copy_(total)

    def _waits(self, name: str) -> bool:
        return self._staged or name in self._in_parts

    def _overflowed(self) -> list[str]:
        """Parameters whose gradients are finite but whose sum of squares overflowed.

        If the batch was already added to the running sum, that sum is lost. Only layers whose per-sample norms, where they are kept, add
        up to the float32 maximum or more are looked at; below it no square can overflow.
        """
        norms = self.values.totals() if self.squares else {}
        most = torch.finfo(torch.float32).max
        suspects = [name for name in self._touched if norms and not norms[name] < most]
        return [name for name in suspects if not self._target(self.squares, self._staged_squares, name).isfinite().all()]

    def _target(self, sums: dict[str, RunningSum], stage: dict[str, Tensor], name: str) -> Tensor:
        if not self._waits(name):
            return sums[name].low
        if name not in stage:
            stage[name] = torch.zeros_like(sums[name].low)
        return stage[name]

    def _total(self, name: str, scale: float) -> Tensor:
        if abs(scale * self._samples.passes - 1) > 1e-6:
            raise RuntimeError(
                f"{name}: the passes of a batch must be draws of scale 1/{self._samples.passes}, got scale {scale}"
            )
        if not self._fills:
            return self._target(self.totals, self._staged_totals, name)
        if name not in self._staged_totals:
            parameter = self._tracked[name].parameter
            self._staged_totals[name] = torch.zeros(parameter.shape, dtype=wide_dtype(parameter.dtype), device=self._device)
        return self._staged_totals[name]

    def _scratch_like(self, parameter: Tensor) -> Tensor:
        """Where an op may write squares that nobody wants; never read."""
        dtype = wide_dtype(parameter.dtype)
        if self._scratch.dtype != dtype or self._scratch.numel() < parameter.numel():
            self._scratch = torch.zeros(parameter.numel(), dtype=dtype, device=self._device)
        return self._scratch[: parameter.numel()].view(parameter.shape)

    def _counted(self, name: str, weight: float, squared: float) -> None:
        for sums in (self.squares, self.totals):
            if name in sums:
                sums[name].counted(weight)
        if name in self.squared_weights:
            self.squared_weights[name] += squared / self._samples.passes  # draws are sample gradients of weight w / draws each

    # -- going on from a checkpoint

    def restore_squares(self, before: dict[str, Accumulator]) -> None:
        """Start from these sums of squares."""
        for name, accumulator in before.items():
            self.squares[name].restore(accumulator)

    def restore_totals(self, before: dict[str, Accumulator], squared_weights: dict[str, float]) -> None:
        """Start from these sums of gradients."""
        for name, accumulator in before.items():
            self.totals[name].restore(accumulator)
        self.squared_weights.update(squared_weights)


def _weights(weight: Tensor | None, n: int) -> tuple[float, float]:
    """The sum of the weights of n samples and of their squares."""
    if weight is None:
        return float(n), float(n)
    weights = weight.double()
    total, squared = torch.stack([weights.sum(), weights.square().sum()]).tolist()
    return total, squared


def _weighted_sum(values: Tensor, weight: Tensor | None) -> Tensor:
    """``sum_n w_n values[n]``."""
    if weight is None:
        return values.sum(0)
    return (weight.to(values.dtype) @ values.reshape(len(values), -1)).view(values.shape[1:])
