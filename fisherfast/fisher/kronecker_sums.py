# SPDX-License-Identifier: Apache-2.0
"""What a backward pass adds to the factors of Kronecker blocks, and to the diagonals of parameters that have none."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from fisherfast.accumulator import Accumulator, RunningSum
from fisherfast.capture import Call, CallUse, Capture, Tracked
from fisherfast.fisher.kronecker import KroneckerBlock, Place
from fisherfast.ops.conv_gram import conv_gram_
from fisherfast.ops.gram import gram_
from fisherfast.passes import Samples
from fisherfast.rules import Convolution, Elementwise, Form, Lookup, MatMul, Rows


class _Sum:
    """A running sum with its flag; a batch that may have to be dropped waits in a stage."""

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        self.running = RunningSum(like.detach().new_empty(()).expand(shape))
        self.flag = torch.zeros(1, dtype=torch.int32, device=like.device)
        self._stage: Tensor | None = None
        self._weight: Tensor | float | None = None  # of what was added in this batch; None: nothing was

    def target(self, staged: bool) -> Tensor:
        """Where a batch goes."""
        if not staged:
            return self.running.low
        if self._stage is None:
            self._stage = torch.zeros_like(self.running.low)
        return self._stage

    def visited(self, weight: Tensor | float) -> None:
        """Note the weight of the batch."""
        self._weight = weight

    def settle(self, whole: bool, alone: bool) -> None:
        """End the batch; ``whole``: it counts; ``alone``: this sum counts although the batch did not complete."""
        if self._weight is not None and (whole or (alone and self._stage is None)):
            if self._stage is not None:
                self.running.low.add_(self._stage)
            self.running.counted(float(self._weight))
        if self._stage is not None:
            self._stage.zero_()
        self.flag.zero_()
        self._weight = None


class _Diagonal:
    """The sums of a parameter that has no Kronecker block."""

    def __init__(self, tracked: Tracked) -> None:
        self.squares = _Sum(tuple(tracked.parameter.shape), tracked.parameter)
        self.sums = (self.squares,)

    def add(self, form: Form, rows: Rows, scale: float, number: int, samples: Samples, staged: bool) -> None:
        """Take the rows of one pass."""
        form.accumulate(self.squares.target(staged), rows, scale, weight=samples.weight, flag=self.squares.flag)

    def touch(self, samples: Samples) -> None:
        """Count the batch."""
        self.squares.visited(_total(samples))


class _Kronecker:
    """The sums of one Kronecker block."""

    def __init__(self, place: Place, form: Form, tracked: Tracked, max_factor_dim: int) -> None:
        self.place, self.form = place, form
        shape, extra = tracked.parameter.shape, place.bias is not None
        O, D = (shape[1], shape[0]) if place.transposed else (shape[0], math.prod(shape[1:]))
        O, D = O // place.groups, D + extra
        self._kernel = shape[2:]
        counts = isinstance(form, Lookup)  # of every row of a table: the factor of inputs that are one-hot is diagonal
        if D > max_factor_dim and not counts:
            raise ValueError(
                f"{place.weight}: its input factor must be at most max_factor_dim = {max_factor_dim}, got {D} x {D} "
                f"({4 * D * D / 2**30:.2f} GiB in float32); pass KFAC(max_factor_dim={D}), or measure its diagonal"
            )
        self.A = _Sum((place.groups, D) if counts else (place.groups, D, D), tracked.parameter)
        self._vector = max_factor_dim < O
        self.B = _Sum((place.groups, O) if self._vector else (place.groups, O, O), tracked.parameter)
        self.sums = (self.A, self.B)

    def touch(self, samples: Samples) -> None:
        """Count the batch's samples."""
        self.B.visited(_total(samples))

    def add(self, form: Form, rows: Rows, scale: float, number: int, samples: Samples, staged: bool) -> None:
        """Take the rows of one pass; the inputs are those of all passes, and count once."""
        A = self.A.target(staged) if number == 0 else None
        B = self.B.target(staged)
        if isinstance(form, Convolution):
            self._add_images(form, rows, scale, samples.weight, A, B)
        else:
            self._add_rows(rows, scale, samples, A, B)

    def _add_images(
        self, form: Convolution, rows: Rows, scale: float, weight: Tensor | None, A: Tensor | None, B: Tensor
    ) -> None:
        x, g = rows.x, rows.g
        assert x is not None
        if weight is not None and rows.offsets is not None:
            weight = weight.repeat_interleave(rows.offsets.diff())
        if A is not None:
            where = {"kernel": self._kernel, "positions": g.shape[2:], "stride": form.stride, "padding": form.padding}
            more = {"dilation": form.dilation, "groups": form.groups, "bias": self.place.bias is not None}
            conv_gram_(A, x, weight=weight, flag=self.A.flag, **where, **more)
            images = len(g) if weight is None else weight.sum(dtype=torch.float64)
            self.A.visited(images * math.prod(g.shape[2:]))
        if self._vector:
            _add_squares(B[0], g.flatten(2).mT, scale, None if weight is None else weight.unsqueeze(1), self.B.flag)
        else:
            conv_gram_(B, g, scale, weight=weight, flag=self.B.flag, groups=form.groups)

    def _add_rows(self, rows: Rows, scale: float, samples: Samples, A: Tensor | None, B: Tensor) -> None:
        x, g = rows.x, rows.g
        assert x is not None
        if isinstance(self.form, MatMul) and self.form.transposed:
            x, g = g, x  # the rows are as the parameter is stored
        weight = _of_samples(rows, samples.weight)
        if A is not None:
            self._add_inputs(x, _of_positions(g, weight, samples.exists), A)
        if isinstance(self.form, Lookup):
            weight = self._counted(x, weight)
        if self._vector:
            _add_squares(B[0], g, scale, weight, self.B.flag)
        else:
            gram_(B[0], g, scale, weight=weight, flag=self.B.flag)

    def _add_inputs(self, x: Tensor, weight: Tensor | None, A: Tensor) -> None:
        self.A.visited(math.prod(x.shape[:-1]) if weight is None else weight.sum(dtype=torch.float64))
        if isinstance(self.form, Lookup):
            counts = self._counted(x, weight).flatten().double()
            A[0] += torch.bincount(x.flatten(), counts, minlength=A.shape[1]).to(A.dtype)
        else:
            gram_(A[0], x, weight=weight, bias=self.place.bias is not None, flag=self.A.flag)

    def _counted(self, ids: Tensor, weight: Tensor | None) -> Tensor:
        """The weights of the rows of a table that are looked up; the padding row has no gradient."""
        assert isinstance(self.form, Lookup)
        counted = (ids.squeeze(-1) != self.form.padding_idx).to(torch.float32)
        return counted if weight is None else weight * counted


def _total(samples: Samples) -> Tensor | float:
    return float(samples.N) if samples.weight is None else samples.weight.sum(dtype=torch.float64)


def _of_samples(rows: Rows, weight: Tensor | None) -> Tensor | None:
    """The weight of every row, that of its sample; None if all are 1."""
    if weight is None or rows.offsets is None:
        return None if weight is None else weight.unsqueeze(1).expand(rows.g.shape[:2]).contiguous()
    return weight.repeat_interleave(rows.offsets.diff())


def _of_positions(g: Tensor, weight: Tensor | None, exists: Tensor | None) -> Tensor | None:
    """The weight of every row ``[N, T]``, and 0 where there is no position.

    A mask says something of these rows if it has their shape (a weight that is used several times has the positions of each
    use, one after the other) and none that it leaves out has a gradient: a decoder may be as long as the encoder it is not of.
    """
    if exists is None or exists.dim() != 2 or g.dim() != 3 or not exists.shape[1] or g.shape[1] % exists.shape[1]:
        return weight
    mask = (exists != 0).repeat(1, g.shape[1] // exists.shape[1])
    if bool((g[~mask] != 0).any()):
        return weight
    return mask.to(torch.float32) if weight is None else weight * mask


def _add_squares(acc: Tensor, g: Tensor, scale: float, weight: Tensor | None, flag: Tensor) -> None:
    """``acc[o] += scale * sum_{n,t} w_nt g[n,t,o]^2``, unless something is not finite."""
    squares = g.to(acc.dtype).square()
    squares = squares if weight is None else squares * weight.unsqueeze(-1)
    sums = squares.flatten(0, -2).sum(0)
    flag |= ~sums.isfinite().all()
    acc += torch.where(flag == 0, scale * sums, 0.0)


class KroneckerCollector:
    """The sums behind a KFAC; see ``passes.Collector`` for its protocol.

    Which parameters have a block is decided when the first batch that counts begins: those that only multiply or are looked
    up, always in one way, or are slid over images once. A bias that is added in exactly the calls of its weight joins the weight's block.
    """

    separate = True  # every pass has output gradients of its own

    def __init__(self, capture: Capture, max_factor_dim: int, transactional: bool) -> None:
        self._tracked, self._max = capture.tracked, max_factor_dim
        self._transactional, self._staged, self._samples = transactional, False, Samples(0)
        self._uses: dict[str, list[tuple[int, CallUse]]] = {}
        self._calls: dict[int, list[CallUse]] = {}
        self._sums: dict[str, _Kronecker | _Diagonal] = {}
        self._weight_of: dict[str, str] = {}  # of a bias
        self._counted: dict[str, int] = {}  # numbers in g of a weight with a bias, in this pass

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

    def forget(self, name: str) -> None:
        """See ``passes.Collector``: nothing is planned yet."""

    def begin(self, samples: Samples) -> None:
        """See ``passes.Collector``."""
        if not self._sums:
            self._plan()
        self._staged, self._samples = self._transactional or samples.passes > 1, samples

    def _plan(self) -> None:
        multiply = {name: tracked for name, tracked in self._tracked.items() if self._multiplies(tracked)}
        self._weight_of = {bias: name for name in multiply for bias in self._bias_of(name)}
        bias_of = {weight: bias for bias, weight in self._weight_of.items()}
        sums: dict[str, _Kronecker | _Diagonal] = {}
        for name, tracked in self._tracked.items():
            if name in multiply:
                form = self._uses[name][0][1].form
                groups = form.groups if isinstance(form, Convolution) else 1
                transposed = isinstance(form, Lookup) or (isinstance(form, MatMul) and form.transposed)
                op = {"conv_sq_": "conv_gram_", "embedding_sq_": "counts"}.get(form.op, "gram_")
                place = Place(name, bias_of.get(name), groups, transposed, op)
                sums[name] = _Kronecker(place, form, tracked, self._max)
            elif name not in self._weight_of:
                sums[name] = _Diagonal(tracked)
        self._sums = sums

    def _multiplies(self, tracked: Tracked) -> bool:
        forms = {use.form for _, use in self._uses.get(tracked.name, [])}
        if tracked.fallback or len(forms) != 1:
            return False
        (form,) = forms
        once = len(self._uses[tracked.name]) == 1  # images of several sizes are brought to one by positions that do not exist
        return isinstance(form, (MatMul, Lookup)) or (isinstance(form, Convolution) and not form.transposed and once)

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
        if isinstance(sums, _Kronecker) and form != sums.form:
            raise ValueError(f"{name}: must be used as in the first batch ({sums.form}), got {form}")
        sums.add(form, rows, scale, number, self._samples, self._staged)
        sums.touch(self._samples)
        if isinstance(sums, _Kronecker):
            transposed = isinstance(form, MatMul) and form.transposed
            self._counted[name] = rows.x.numel() if transposed and rows.x is not None else rows.g.numel()

    @torch.no_grad()
    def add_gradients(self, tracked: Tracked, gradients: Tensor, first: int, scale: float, number: int) -> None:
        """See ``passes.Collector``."""
        sums = self._sums[tracked.name]
        if not isinstance(sums, _Diagonal):
            raise ValueError(
                f"{tracked.name}: must be used as in the first batch, got a use without a rule; begin with 2 samples or more"
            )
        weight = self._samples.weight
        flat = gradients.flatten(1)
        each = None if weight is None else weight[first : first + len(flat)]
        _add_squares(sums.squares.target(self._staged).view(-1), flat, scale, each, sums.squares.flag)
        sums.touch(self._samples)

    def touch(self, tracked: Tracked) -> None:
        """See ``passes.Collector``."""
        if tracked.name in self._sums:
            self._sums[tracked.name].touch(self._samples)

    @torch.no_grad()
    def settle(self, complete: bool) -> list[str]:
        """See ``passes.Collector``."""
        every = [(name, one) for name, sums in self._sums.items() for one in sums.sums]
        flags = torch.cat([one.flag for _, one in every]).tolist()
        bad = list(dict.fromkeys(name for (name, _), flag in zip(every, flags, strict=True) if flag))
        for (_, one), flag in zip(every, flags, strict=True):
            one.settle(whole=complete and not bad, alone=not self._staged and not flag)
        self._counted.clear()
        return bad

    def snapshot(self) -> tuple[list[KroneckerBlock], dict[str, Accumulator]]:
        """What was added, on memory of its own: blocks, and diagonals of the other parameters."""
        blocks, diagonals = [], {}
        planned = self._sums or {name: _Diagonal(tracked) for name, tracked in self._tracked.items()}  # stopped before a batch
        for name, sums in planned.items():
            if isinstance(sums, _Kronecker):
                blocks.append(KroneckerBlock(sums.place, *(_mirrored(one.running.snapshot()) for one in sums.sums)))
            else:
                diagonals[name] = sums.squares.running.snapshot()
        return blocks, diagonals


def _mirrored(accumulator: Accumulator) -> Accumulator:
    """The ops add to the upper triangle only."""
    if accumulator.sum.dim() == 3:
        upper = accumulator.sum.triu_()
        accumulator.sum = upper + upper.triu(1).mT
    return accumulator
