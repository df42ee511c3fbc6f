# SPDX-License-Identifier: Apache-2.0
"""The picture of a ``RateDistortion``: the expected loss over the nats. matplotlib is needed here."""

from __future__ import annotations

import textwrap
from typing import Any

from fisherfast.information.rate_distortion import RateDistortion

_BLUE, _VERMILLION = "#0072B2", "#D55E00"  # of Okabe and Ito
_LABELS = 6  # betas written beside their points: more would overlap


def curve(found: RateDistortion) -> Any:
    """A matplotlib figure: the curve, with error bars where it was measured, and the loss of weights without noise."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("RateDistortion.plot: matplotlib is not installed; pip install 'fisherfast[plot]'") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    errors = [point.stderr for point in found.points]
    axes.errorbar(found.nats, found.expected_losses, yerr=errors, fmt="o-", color=_BLUE, markersize=4, label="E loss under noise")
    axes.axhline(found.points[0].loss, color=_VERMILLION, linestyle="--", linewidth=1, label="loss without noise")
    step = -(-len(found.points) // _LABELS)
    for point in found.points[::step]:
        at = (point.nats, point.expected_loss)
        axes.annotate(f"beta {point.beta:.1g}", at, xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set(title="Loss against information in the weights", xlabel="KL(Q || P), nats", ylabel="expected loss, nats per sample")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    figure.supxlabel("\n".join(textwrap.wrap(found.conditions(), 110)), fontsize=8, color="0.35")
    return figure
