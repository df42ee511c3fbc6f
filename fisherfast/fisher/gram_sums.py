# SPDX-License-Identifier: Apache-2.0
"""The sample gradients behind a Gram Fisher, kept as rows wherever these are smaller, and made whole a few at a time."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherfast._precision import dtype_name, wide, wide_dtype
from fisherfast.capture.calls import Call
from fisherfast.capture.capture import Capture
from fisherfast.capture.collector import Cost, Held, Samples
from fisherfast.capture.tracked import Tracked
from fisherfast.rules import Convolution, Elementwise, Form, Lookup, MatMul, Part, Rows, Tied, Window

Pieces = dict[str, tuple["Piece", ...]]  # of each parameter
_FORMS: dict[str, Any] = {form.__name__: form for form in (MatMul, Convolution, Elementwise, Lookup, Tied)}


@dataclass(frozen=True, eq=False)
class Piece:
    """The sample gradients of one parameter, or of a part of it, in one backward pass: rows ``first, ..., first + n - 1`` of G.

    ``root`` ``[n]``: what each is multiplied by, the root of its weight in the sum. ``of_g``: the dtype in which the backward pass
    gave g, which may be coarser than the rows that are kept.
    """

    first: int
    form: Form
    rows: Rows
    root: Tensor
    of_g: str

    @property
    def end(self) -> int:
        """One past its last row of G."""
        return self.first + len(self.root)

    def gradients(self, first: int, last: int, shape: torch.Size) -> Tensor:
        """Those of rows ``first, ..., last - 1`` of G, ``[last - first, *shape]`` in float64."""
        few = slice(first - self.first, last - self.first)
        rows = self.rows.samples(few.start, few.stop).mapped(lambda t: t.double() if t.is_floating_point() else t)
        return self.form.gradients(rows, shape) * self.root[few].view(-1, *[1] * len(shape))

    def moved(self, rows: int) -> Piece:
        """Further down in G."""
        return dataclasses.replace(self, first=self.first + rows)

    def state(self) -> tuple[dict[str, Tensor], list[Any]]:
        """Tensors and plain values."""
        return {"root": self.root, **_tensors(self.rows)}, [self.first, self.of_g, *_plain(self.form)]

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], fields: list[Any]) -> Piece:
        """The piece whose ``state`` this is."""
        first, of_g, *form = fields
        lookup = {name.removeprefix("lookup."): t for name, t in tensors.items() if name.startswith("lookup.")}
        rows = _rows(tensors)._replace(lookup=_rows(lookup) if lookup else None)
        return cls(first, _formed(form), rows, tensors["root"], of_g)


def _tensors(rows: Rows) -> dict[str, Tensor]:
    own = {"x": rows.x, "g": rows.g, "offsets": rows.offsets}
    more = {} if rows.lookup is None else {f"lookup.{name}": t for name, t in _tensors(rows.lookup).items()}
    return {name: t for name, t in own.items() if t is not None} | more


def _rows(tensors: Mapping[str, Tensor]) -> Rows:
    return Rows(tensors.get("x"), tensors["g"], tensors.get("offsets"))


def _plain(form: Form) -> list[Any]:
    if isinstance(form, Part):
        return ["Part", _plain(form.form), dataclasses.asdict(form.window)]
    fields = [field.name for field in dataclasses.fields(form) if field.compare]  # type: ignore[arg-type]
    return [type(form).__name__, {name: getattr(form, name) for name in fields}]


def _formed(plain: list[Any]) -> Form:
    kind, fields, *window = plain
    if kind == "Part":
        return Part(_formed(fields), Window(**_tuples(window[0])))
    return _FORMS[kind](**_tuples(fields))


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _part_shape(form: Form, shape: torch.Size) -> tuple[int, ...]:
    """The shape of what the rows are of: the parameter or a part of it."""
    return tuple(shape) if form.window is None else form.window.used_shape


def _less_whole(rows: Rows, part: tuple[int, ...]) -> bool:
    """Whether the sample gradients are smaller than the rows that they are products of."""
    return sum(t.numel() for t in _tensors(rows).values()) > rows.num_samples * math.prod(part)


def _smallest(form: Form, rows: Rows, shape: torch.Size) -> tuple[Form, Rows]:
    """The same gradients on memory of their own: as rows, or whole where that takes less."""
    inner, part = form.inner, _part_shape(form, shape)
    if _less_whole(rows, part):
        whole = inner.gradients(rows.mapped(wide), part)
        inner, rows = Elementwise(tuple(part)), Rows(None, whole.view(len(whole), 1, -1))
    else:
        rows = rows.mapped(lambda t: t.clone(memory_format=torch.contiguous_format))
    return Part(inner, form.window) if isinstance(form, Part) else inner, rows


class GramCollector:
    """Keeps the sample gradients of all batches; see ``Collector`` for its protocol. A batch counts as a whole."""

    separate = True  # every pass is a row of its own
    averages = False
    by_use = False

    def __init__(self, capture: Capture, max_rows: int) -> None:
        self._tracked, self._device = capture.tracked, capture.device
        self._max_rows, self._samples = max_rows, Samples(0)
        self._pieces: defaultdict[str, list[Piece]] = defaultdict(list)
        self._batch: list[tuple[str, Piece, Tensor]] = []  # and whether it is finite
        self.num_rows, self.weight = 0, 0.0

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the parameters, in the model's order."""
        return {name: tracked.parameter.shape for name, tracked in self._tracked.items()}

    def explore(self, calls: list[Call]) -> None:
        """See ``Collector``: nothing depends on how a parameter is used."""

    def forget(self, name: str) -> None:
        """See ``Collector``: it has no gradients yet."""

    def holds(self, passes: int) -> list[Held]:
        """See ``Collector``: nothing before there are samples."""
        smaller = "measure fewer samples or draws"
        return [Held((name,), "rows, more with every sample", 0, (0,), smaller=smaller) for name in self._tracked]

    def cost(self, tracked: Tracked, form: Form, rows: Rows) -> Cost:
        """See ``Collector``: the rows and their roots; what is multiplied is multiplied when the result is asked."""
        part, n = _part_shape(form, tracked.parameter.shape), rows.num_samples
        whole = n * math.prod(part) * wide_dtype(rows.g.dtype).itemsize
        kept = whole if _less_whole(rows, part) else sum(t.nbytes for t in _tensors(rows).values())
        return Cost(kept=kept + 8 * n)

    def begin(self, samples: Samples) -> None:
        """See ``Collector``."""
        rows = self.num_rows + samples.N * samples.passes
        if rows > self._max_rows:
            raise ValueError(
                f"gram: sample gradients must be at most max_rows = {self._max_rows}, got {rows} ({samples.passes} a sample); "
                "measure fewer samples or draws, or pass (ff.Gram(max_rows=...),): its matrix takes 8 max_rows^2 bytes"
            )
        self._samples = samples

    @torch.no_grad()
    def add(self, tracked: Tracked, form: Form, rows: Rows, scale: float, number: int) -> None:
        """See ``Collector``."""
        of_g = rows.g.dtype
        form, rows = _smallest(form, rows, tracked.parameter.shape)
        self._keep(tracked.name, form, rows, of_g, scale, number * self._samples.N, slice(None))

    @torch.no_grad()
    def add_gradients(self, tracked: Tracked, gradients: Tensor, first: int, scale: float, number: int) -> None:
        """See ``Collector``."""
        rows = Rows(None, gradients.reshape(len(gradients), 1, -1).clone())
        few = slice(first, first + len(gradients))
        form, first = Elementwise(tuple(tracked.parameter.shape)), number * self._samples.N + first
        self._keep(tracked.name, form, rows, gradients.dtype, scale, first, few)

    def _keep(self, name: str, form: Form, rows: Rows, of_g: torch.dtype, scale: float, first: int, few: slice) -> None:
        weight = self._samples.weight
        weight = rows.g.new_ones(rows.num_samples, dtype=torch.float64) if weight is None else weight[few].double()
        finite = torch.stack([t.isfinite().all() for t in _tensors(rows).values()]).all()
        piece = Piece(self.num_rows + first, form, rows, (weight * scale).sqrt(), dtype_name(of_g))
        self._batch.append((name, piece, finite))

    def expect(self, tracked: Tracked, windows: set[Window | None]) -> None:
        """See ``Collector``: nothing of a batch counts before all of it does."""

    def touch(self, tracked: Tracked, window: Window | None) -> None:
        """See ``Collector``: rows that nobody gives are zero."""

    def settle(self, complete: bool) -> list[str]:
        """See ``Collector``."""
        finite = torch.stack([good for *_, good in self._batch]).tolist() if self._batch else []
        bad = list(dict.fromkeys(name for (name, *_), good in zip(self._batch, finite, strict=True) if not good))
        if complete and not bad:
            for name, piece, _ in self._batch:
                self._pieces[name].append(piece)
            self.num_rows += self._samples.N * self._samples.passes
            self.weight += float(self._samples.total_weight())
        self._batch.clear()
        return bad

    def snapshot(self) -> Pieces:
        """What was kept: pieces never change."""
        return {name: tuple(self._pieces[name]) for name in self._tracked}

    def restore(self, pieces: Mapping[str, Sequence[Piece]], num_rows: int, weight: float) -> None:
        """Start from a snapshot."""
        self._pieces.update({name: list(of_parameter) for name, of_parameter in pieces.items()})
        self.num_rows, self.weight = num_rows, weight
