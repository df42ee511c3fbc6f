# SPDX-License-Identifier: Apache-2.0
"""The picture of an ``Information``: nats and Fisher trace by layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fisherfast.fisher.plots import chart
from fisherfast.fisher.plots.plot import TRACE_AXIS
from fisherfast.information.result import Information


def by_layer(info: Information, path: str | Path | None = None) -> Any:
    """A matplotlib figure of two panels, a row per layer: nats as bars, traces as points on a logarithmic axis."""
    layers = info.by_layer()
    shown = chart.rows({name: layer.nats for name, layer in layers.items()})
    figure = chart.figure("Information.plot", 10, 0.32 * len(shown) + 2)
    left, right = figure.subplots(1, 2, sharey=True)
    chart.bars(left, shown, [math.fsum(layers[name].nats for name in row.layers) for row in shown])
    left.set(title=f"Information in the weights: {info.nats:,.0f} nats", xlabel="nats")
    chart.points(right, [math.fsum(layers[name].trace for name in row.layers) for row in shown])
    right.set(title=f"Trace of the Fisher: {info.trace:.3g}", xlabel=TRACE_AXIS)
    chart.label_rows(left, [row.label for row in shown])
    right.tick_params(axis="y", length=0)
    return chart.finished(figure, info.conditions(), path)
