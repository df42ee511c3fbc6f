# SPDX-License-Identifier: Apache-2.0
"""What a loss, or a model's output, makes of the parameters: the caught calls behind it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fisherfast.capture.calls import Call, CallUse, Key, graph
from fisherfast.capture.tracked import Derived, Tracked, Unbatched
from fisherfast.rules import Window


@dataclass(frozen=True, eq=False)
class Uses:
    """One reading of the graph behind ``root``, by ``Capture.read``. It holds that graph, so it should not outlive its batch."""

    root: Tensor
    calls: list[Call]  # in the order of the forward pass
    nodes: list[Any]  # of each call, its tap in the graph
    parameters: Mapping[str, Tracked]  # that are tracked now
    outdated: bool  # whether the forward pass came before something was decided that has been in force since

    @cached_property
    def all(self) -> list[CallUse]:
        """The uses of all calls."""
        return [use for call in self.calls for use in call.uses]

    @property
    def chosen(self) -> set[Key]:
        """The uses whose rows were chosen by data, or may have been."""
        return {use.key for use in self.all if use.chosen}

    @property
    def followed(self) -> dict[str, Tracked]:
        """The parameters, and what was made of them and used on the way to ``root``, by name."""
        return {**self.parameters, **{use.tracked.name: use.tracked for use in self.all}}

    def only_broadcast(self, name: str) -> bool:
        """Whether every function that consumes an output of this parameter's uses, on the way to ``root``, is an addition,
        subtraction or product whose result has as many axes as the output would have if it were expanded to N samples. Then
        expanding it changes no value.
        """
        every = list(graph(self.root))
        pairs = zip(self.calls, self.nodes, strict=True)
        taps = {node: call for call, node in pairs if any(use.tracked.name == name for use in call.uses)}
        firsts = ((node, node.next_functions[0][0]) for node in every if node.next_functions)
        views = {node: taps[tap] for node, tap in firsts if tap in taps and taps[tap].viewed}
        outputs = {node: call for node, call in taps.items() if not call.viewed} | views
        consumed = ((node, outputs[parent]) for node in every for parent, _ in node.next_functions if parent in outputs)
        return all(
            type(node).__name__ in {"AddBackward0", "SubBackward0", "MulBackward0"}
            and len(node._input_metadata[0].shape) == len(Unbatched.of(call.shape).with_samples(1, call.shape))
            for node, call in consumed
        )

    def first_non_finite(self) -> str | None:
        """The parameter whose call first received an input that is not finite, by the tensors the graph still holds."""
        for call, node in zip(self.calls, self.nodes, strict=True):
            if any(s.is_floating_point() and not torch.isfinite(s).all() for s in node.saved_tensors):
                return call.uses[0].tracked.name
        return None


def number(calls: list[Call]) -> None:
    """Name what was made of parameters, which is in the chain rule then, and number the uses of each parameter, or of a part of one, in the
    order of the forward pass.
    """
    uses = [use for call in calls for use in call.uses]
    numbers: defaultdict[tuple[str, Window | None], int] = defaultdict(int)
    made: defaultdict[str, list[Derived]] = defaultdict(list)
    for use in uses:
        one = use.tracked
        if isinstance(one, Derived) and all(one is not other for other in made[one.kind]):
            made[one.kind].append(one)
            one.name = f"{one.kind} ({len(made[one.kind])})"
            one.chain(one.reason)
        numbers[one.name, use.window] += 1
    seen: defaultdict[tuple[str, Window | None], int] = defaultdict(int)
    for use in uses:
        which = (use.tracked.name, use.window)
        use.key = (*which, seen[which], numbers[which])
        seen[which] += 1
