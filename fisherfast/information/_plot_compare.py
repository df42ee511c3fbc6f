# SPDX-License-Identifier: Apache-2.0
"""The picture of a ``Comparison``: the nats of both networks by layer, and their differences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fisherfast.fisher.plots import chart
from fisherfast.information.compare import Comparison


def by_layer(comparison: Comparison, path: str | Path | None = None) -> Any:
    """A matplotlib figure of two panels, a row per layer: two points and the line between them; the differences as bars."""
    layers = comparison.by_layer()
    shown = chart.rows({name: abs(layer.difference) for name, layer in layers.items()})
    figure = chart.figure("Comparison.plot", 10, 0.32 * len(shown) + 2.2)
    left, right = figure.subplots(1, 2, sharey=True)
    summed = [[layers[name] for name in row.layers] for row in shown]
    first, second = (
        (math.fsum(layer.first for layer in row) for row in summed),
        (math.fsum(layer.second for layer in row) for row in summed),
    )
    _pairs(left, comparison.names, shown, list(first), list(second))
    left.set_title(f"Nats: {comparison.first.nats:,.0f} and {comparison.second.nats:,.0f}", loc="left", fontsize=11)
    left.set_xlabel("nats")
    chart.bars(right, shown, [math.fsum(layer.difference for layer in row) for row in summed], signed=True)
    right.axvline(0, color="0.2", linewidth=0.8)
    right.set(
        title=f"Difference: {comparison.difference:+,.0f} nats", xlabel=f"nats of {comparison.names[1]} - {comparison.names[0]}"
    )
    right.xaxis.label.set_parse_math(False)
    chart.label_rows(left, [row.label for row in shown])
    right.tick_params(axis="y", length=0)
    return chart.finished(figure, comparison.conditions(), path)


def _pairs(axes: Any, names: tuple[str, str], shown: list[chart.Row], first: list[float], second: list[float]) -> None:
    """Of a sum, which would dwarf the others, the numbers alone."""
    drawn = [at for at, row in enumerate(shown) if not row.summed]
    axes.hlines(drawn, [first[at] for at in drawn], [second[at] for at in drawn], color="0.6", linewidth=2)
    for name, values, color, marker in zip(names, (first, second), (chart.BLUE, chart.VERMILLION), "os", strict=True):
        axes.plot([values[at] for at in drawn], drawn, marker, color=color, markersize=7, label=name)
    for at in range(len(drawn), len(shown)):
        text = f"{chart.number(first[at])} and {chart.number(second[at])} (no points)"
        axes.annotate(text, (0.02, at), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    for label in axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2).get_texts():
        label.set_parse_math(False)
    axes.grid(axis="both", color=chart.GRID, linewidth=0.8)
