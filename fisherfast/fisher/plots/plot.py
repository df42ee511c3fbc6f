# SPDX-License-Identifier: Apache-2.0
"""The picture of a Fisher of any structure: its trace by layer and its spectrum."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fisherfast.fisher.plots import chart
from fisherfast.fisher.plots.histogram import Histogram, histogram
from fisherfast.fisher.protocol import Fisher

_MAX_MARKERS = 50
TRACE_AXIS = "trace, nats / weight² (logarithmic)"


class Plotted:
    """``F.plot()``, from the methods of ``protocol.Fisher`` alone."""

    def plot(self: Fisher, path: str | Path | None = None) -> Any:
        """Draw the trace by layer and the sorted eigenvalues; returns the matplotlib figure, written to ``path`` if given.

        Of more than 40 layers the ones of the largest trace are drawn and the others summed in one row.

        Errors:   ImportError if matplotlib is not installed (``pip install fisherfast[plot]``).
        Numerics: the spectrum is counted a chunk at a time; a value is drawn within 2.4%.
        """
        layers, counted = self.by_layer(), histogram(self.spectra())
        shown = chart.rows({name: layer.trace for name, layer in layers.items()})
        figure = chart.figure(f"{type(self).__name__}.plot", 10, max(0.32 * len(shown), 2.5) + 1.5)
        left, right = figure.subplots(1, 2)
        chart.label_rows(left, [row.label for row in shown])
        chart.points(left, [math.fsum(layers[name].trace for name in row.layers) for row in shown])
        left.set(title=f"Trace of the Fisher: {self.trace():.3g}", xlabel=TRACE_AXIS)
        spectrum(right, counted)
        right.set(title=spectrum_title(counted))
        return chart.finished(figure, conditions(self), path)


def spectrum(axes: Any, counted: Histogram) -> None:
    """The sorted eigenvalues on logarithmic axes."""
    if counted.counts:
        axes.set(xscale="log", yscale="log")
    ranks, values = counted.ranked()
    axes.plot(ranks, values, color=chart.BLUE, linewidth=1.8, marker="o" if len(ranks) <= _MAX_MARKERS else "", markersize=3)
    axes.set(xlabel="rank, largest first (logarithmic)", ylabel="eigenvalue, nats / weight² (logarithmic)")
    axes.grid(color=chart.GRID, linewidth=0.8)


def spectrum_title(counted: Histogram) -> str:
    """How many eigenvalues are drawn, and how many are left out."""
    negligible = f"; {counted.negligible:,} more are (nearly) zero" if counted.negligible else ""
    return f"Spectrum: {sum(counted.counts):,} eigenvalues{negligible}"


def conditions(F: Fisher) -> str:
    """What the numbers depend on, in one line."""
    how = F.provenance
    return (
        f"{F.structure} Fisher, {how.fisher_type or 'unknown'} labels, {how.likelihood or 'unknown'} likelihood, "
        f"N = {F.num_samples:,} samples, k = {F.num_parameters:,} weights"
    )
