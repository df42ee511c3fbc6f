# SPDX-License-Identifier: Apache-2.0
"""The trace of a Fisher whose parts are independent of each other: of all of them, and by layer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from fisherfast.fisher.counts import Measured
from fisherfast.fisher.protocol import LayerSummary, layer_of


class Layered(Measured):
    """``trace()`` and ``by_layer()``, of the traces of the parts."""

    def _traces(self) -> Iterable[tuple[str, float]]:
        """Of each part, with the parameter to whose layer it counts."""
        raise NotImplementedError

    def _counts_to(self) -> dict[str, str]:
        """The parameters that count to the layer of another one: ``{name: the other}``."""
        return {}

    def trace(self) -> float:
        """The sum of the eigenvalues."""
        return math.fsum(trace for _, trace in self._traces())

    def by_layer(self) -> dict[str, LayerSummary]:
        """Each layer's parameters and trace, in the order of ``names``; a bias counts to the layer of its weight."""
        others = self._counts_to()
        members, traces = defaultdict(list), defaultdict(list)
        for name in self.names:
            members[layer_of(others.get(name, name))].append(name)
        for name, trace in self._traces():
            traces[layer_of(name)].append(trace)
        return {
            layer: LayerSummary(layer, tuple(names), sum(self.shapes[name].numel() for name in names), math.fsum(traces[layer]))
            for layer, names in members.items()
        }
