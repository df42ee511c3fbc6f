# SPDX-License-Identifier: Apache-2.0
"""The picture of a ``RateDistortion``: the expected loss over the nats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fisherfast.fisher.plots import chart
from fisherfast.information.rate_distortion import RateDistortion

_LABELS = 6  # betas written beside their points: more would overlap


def curve(rate_distortion: RateDistortion, path: str | Path | None = None) -> Any:
    """A matplotlib figure: the curve, with error bars where it was measured, and the loss of weights without noise."""
    figure = chart.figure("RateDistortion.plot", 7, 4.5)
    axes = figure.subplots()
    errors = [point.stderr for point in rate_distortion.points]
    axes.errorbar(
        rate_distortion.nats,
        rate_distortion.expected_losses,
        yerr=errors,
        fmt="o-",
        color=chart.BLUE,
        markersize=4,
        label="E loss under noise",
    )
    axes.axhline(rate_distortion.points[0].loss, color=chart.VERMILLION, linestyle="--", linewidth=1, label="loss without noise")
    step = -(-len(rate_distortion.points) // _LABELS)
    for point in rate_distortion.points[::step]:
        at = (point.nats, point.expected_loss)
        axes.annotate(f"beta {point.beta:.1g}", at, xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set(title="Loss against information in the weights", xlabel="KL(Q || P), nats", ylabel="expected loss, nats per sample")
    axes.grid(color=chart.GRID, linewidth=0.8)
    axes.legend(frameon=False)
    return chart.finished(figure, rate_distortion.conditions(), path)
