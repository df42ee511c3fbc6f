# SPDX-License-Identifier: Apache-2.0
"""Which weights, and which parts of packed ones, have a block of their own; which biases join them, which share their inputs.

Read off the calls of a first look at the model. A part is entries of a parameter's first axis: the queries, the keys or the
values of one projection, an expert of a stack.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fisherfast.capture.calls import Call, CallUse
from fisherfast.capture.tracked import Tracked
from fisherfast.fisher.protocol import layer_of
from fisherfast.rules import ALL, Convolution, Elementwise, Entries, Form, Lookup, MatMul, Window


@dataclass(frozen=True, eq=False)
class Unit:
    """A parameter, or a part of one, all of whose uses have one form; they are in the calls ``key``.

    ``row_axes``: of a weight that is used as a matrix, the axes that make the rows of it as it is stored.
    A part that no call has used yet has the form of the others; its key is that of other such parts if the others go together.
    """

    tracked: Tracked
    entries: Entries
    window: Window | None
    form: Form
    uses: tuple[CallUse, ...]
    key: tuple[Any, ...]
    row_axes: tuple[int, ...] = (0,)

    @property
    def name(self) -> str:
        """What it is called."""
        return self.entries.named(self.tracked.name)

    @property
    def tensor(self) -> Tensor:
        """As the calls have it: a view of the parameter may have other axes."""
        parameter = self.tracked.detached
        return parameter if self.window is None else self.window.used(parameter)

    @property
    def used_as(self) -> tuple[Any, ...]:
        """Where it is used, and how many times itself: what a weight and its bias have in common."""
        return self.key, self.tracked.expand, tuple(use.factor for use in self.uses)

    @property
    def outputs(self) -> int:
        """The number of outputs of a weight."""
        return self.tensor.shape[1 if isinstance(self.form, MatMul) and self.form.transposed else 0]


def of_weights(tracked: Mapping[str, Tracked], calls: Iterable[Call]) -> tuple[list[Unit], dict[str, Unit]]:
    """The units that multiply, are looked up or slid over images, in the model's order; and {name of a unit: the bias that joins it}."""
    uses: defaultdict[str, dict[Window | None, list[tuple[int, CallUse]]]] = defaultdict(dict)
    for call in calls:
        for use in call.uses:
            uses[use.tracked.name].setdefault(use.window, []).append((call.index, use))
    units = [unit for name, one in tracked.items() if not one.fallback for unit in _units(one, uses[name])]
    weights = _all_of(units, lambda unit: isinstance(unit.form, (MatMul, Lookup, Convolution)))
    biases = _all_of(units, lambda unit: isinstance(unit.form, Elementwise) and not any(use.saved_at for use in unit.uses))
    return weights, _joined(weights, biases)


def _all_of(units: Sequence[Unit], kind: Callable[[Unit], bool]) -> list[Unit]:
    """Those of parameters of which every unit is of this kind."""
    others = {unit.tracked.name for unit in units if not kind(unit)}
    return [unit for unit in units if unit.tracked.name not in others]


def _units(tracked: Tracked, uses: Mapping[Window | None, Sequence[tuple[int, CallUse]]]) -> list[Unit]:
    """The parameter, or the parts in which it is used, in their order; none unless they are parts that make it up."""
    shape, found = tracked.parameter.shape, []
    for window, mine in uses.items():
        forms = {use.form.inner for _, use in mine}
        where = (ALL, (0,)) if window is None else _where(window, shape, forms)
        if where is None or len(forms) > 1:
            return []
        calls, its = zip(*mine, strict=True)
        found.append(Unit(tracked, where[0], window, forms.pop(), its, calls, where[1]))
    extent = shape[0] if shape else 1
    if found and all(len(unit.entries) == 1 for unit in found):
        found += _unused(found, extent)
    found.sort(key=lambda unit: unit.entries)
    spans = [unit.entries.span(extent) for unit in found]
    return found if [0, *(last for _, last in spans)] == [*(first for first, _ in spans), extent] else []


def _where(window: Window, shape: tuple[int, ...], forms: Iterable[Form]) -> tuple[Entries, tuple[int, ...]] | None:
    """The entries of a parameter that a part is, and the axes of its rows; None if it is no part that may have a block."""
    if all(isinstance(form, MatMul) for form in forms):
        return window.matrix(shape)
    entries = window.entries(shape)
    return None if entries is None else (entries, (0,))


def _unused(stack: Sequence[Unit], extent: int) -> list[Unit]:
    """The other entries of a stack: a first look may not ask every expert."""
    first, used = stack[0], {unit.entries for unit in stack}
    assert first.window is not None
    size = math.prod(first.window.shape)
    return [
        replace(first, entries=Entries((k,)), window=replace(first.window, start=k * size), uses=(), key=(first.key, k))
        for k in range(extent)
        if (k,) not in used
    ]


def _joined(weights: Sequence[Unit], biases: Sequence[Unit]) -> dict[str, Unit]:
    """For each weight the bias that is added wherever the weight is used, nowhere else, and one number to each output.

    A bias that is used in parts joins its weights only if all parts do, and all those weights are of one layer.
    """
    # The outputs of a transposed convolution are not positions of its inputs: its bias is in no column.
    beside = [unit for unit in weights if not (isinstance(unit.form, Convolution) and unit.form.transposed)]
    by_use = {unit.used_as: unit for unit in reversed(biases)}
    pairs = ((unit, by_use.get(unit.used_as)) for unit in beside)
    found = {unit: bias for unit, bias in pairs if bias is not None and bias.tensor.numel() == unit.outputs}
    layers: defaultdict[str, list[str]] = defaultdict(list)
    for unit, bias in found.items():
        layers[bias.tracked.name].append(layer_of(unit.tracked.name))
    parts = Counter(unit.tracked.name for unit in biases)
    whole = {name for name, mine in layers.items() if len(mine) == parts[name] and len(set(mine)) == 1}
    return {unit.name: bias for unit, bias in found.items() if bias.tracked.name in whole}


def same_inputs(weights: Iterable[Unit], with_bias: Container[str]) -> dict[str, str]:
    """``{weight: leader}``: the first weight that multiplies the same inputs, as that of the queries does for keys and values."""
    first: dict[Any, str] = {}
    shared = {}
    for unit in weights:
        # Rows chosen by the data come in the order of their gradients, which weights that see the same inputs do not share.
        if isinstance(unit.form, MatMul) and len(unit.uses) == 1 and unit.uses[0].inputs and not unit.uses[0].gathered:
            (use,) = unit.uses
            leader = first.setdefault((use.inputs, unit.form.left, unit.tracked.expand, unit.name in with_bias), unit.name)
            if leader != unit.name:
                shared[unit.name] = leader
    return shared
