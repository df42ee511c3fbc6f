# SPDX-License-Identifier: Apache-2.0
"""The picture of an ``Information``: nats and Fisher trace by layer. matplotlib is needed here and nowhere else."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from fisherfast.information.result import WHOLE, Information

# Okabe and Ito's colour-blind safe blue and vermillion.
_BLUE, _VERMILLION = "#0072B2", "#D55E00"


def by_layer(info: Information) -> Any:
    """A matplotlib figure of two panels with a bar per layer: nats, linear; trace, logarithmic."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Information.plot: matplotlib is not installed; pip install fisherfast[plot]") from error
    layers = info.by_layer()
    figure = Figure(figsize=(11, max(2.8, 0.3 * len(layers) + 1.6)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, {name or WHOLE: layer.nats for name, layer in layers.items()}, _BLUE, "{:,.0f}")
    left.set_title(f"Information in the weights: {info.nats:,.0f} nats", fontsize=11)
    left.set_xlabel("nats")
    _bars(right, {name or WHOLE: layer.trace for name, layer in layers.items()}, _VERMILLION, "{:.2g}")
    right.set_title(f"Trace of the Fisher: {info.trace:.3g}", fontsize=11)
    right.set_xlabel("trace, nats per unit weight change squared (log scale)")
    if any(layer.trace > 0 for layer in layers.values()):
        right.set_xscale("log")
    left.invert_yaxis()
    figure.suptitle("\n".join(textwrap.wrap(info.conditions(), 130)), fontsize=8, color="0.35")
    return figure


def _bars(axes: Any, values: Mapping[str, float], color: str, label: str) -> None:
    bars = axes.barh(list(values), list(values.values()), color=color, height=0.7)
    axes.bar_label(bars, labels=[label.format(value) for value in values.values()], padding=3, fontsize=8)
    axes.margins(x=0.14)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
