# SPDX-License-Identifier: Apache-2.0
"""The picture of an ``Information``: nats and Fisher trace by layer. matplotlib is needed here and nowhere else."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from fisherfast.information.result import WHOLE, Information

# Okabe and Ito's colour-blind safe blue and vermillion.
_BLUE, _VERMILLION = "#0072B2", "#D55E00"


def by_layer(info: Information) -> Any:
    """A matplotlib figure of two panels, a row per layer: nats as bars, traces as points on a logarithmic axis."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Information.plot: matplotlib is not installed; pip install 'fisherfast[plot]'") from error
    layers = info.by_layer()
    names = [name or WHOLE for name in layers]
    figure = Figure(figsize=(10, 0.32 * len(layers) + 2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, names, [layer.nats for layer in layers.values()])
    left.set(title=f"Information in the weights: {info.nats:,.0f} nats", xlabel="nats")
    _points(right, names, [layer.trace for layer in layers.values()])
    right.set(title=f"Trace of the Fisher: {info.trace:.3g}", xlabel="trace, nats per squared unit of weight (logarithmic)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.title.set_fontsize(11)
    left.set_ylim(len(names) - 0.4, -0.6)  # the first layer on top
    figure.supxlabel("\n".join(textwrap.wrap(info.conditions(), 150)), fontsize=8, color="0.35")
    return figure


def _bars(axes: Any, names: list[str], nats: list[float]) -> None:
    bars = axes.barh(names, nats, color=_BLUE, height=0.7)
    axes.bar_label(bars, labels=[f"{value:,.4g}" for value in nats], padding=3, fontsize=8)
    axes.margins(x=0.2)


def _points(axes: Any, names: list[str], traces: list[float]) -> None:
    # Points, not bars: on a logarithmic axis the length of a bar means nothing. A trace of zero has no place on it.
    shown = [(name, trace) for name, trace in zip(names, traces, strict=True) if trace > 0]
    if shown:
        exponents = [math.log10(trace) for _, trace in shown]
        axes.set_xscale("log")
        axes.set_xlim(10 ** math.floor(min(exponents) - 0.1), 10 ** math.ceil(max(exponents) + 0.1))
    axes.plot([trace for _, trace in shown], [name for name, _ in shown], "o", color=_VERMILLION, markersize=7)
    for name, trace in zip(names, traces, strict=True):
        at = {"xy": (trace, name)} if trace > 0 else {"xy": (0, name), "xycoords": ("axes fraction", "data")}
        axes.annotate(f"{trace:.3g}", **at, xytext=(7, 0), textcoords="offset points", va="center", fontsize=8)
    axes.grid(axis="both", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
