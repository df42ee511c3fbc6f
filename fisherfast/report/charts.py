# SPDX-License-Identifier: Apache-2.0
"""The page's charts: narrow enough for a phone at their own size, each with a text alternative and its numbers as a table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fisherfast.fisher import Fisher
from fisherfast.fisher.plots import chart, plot
from fisherfast.fisher.plots.histogram import NEGLIGIBLE, Histogram, histogram
from fisherfast.information import Information, RateDistortion
from fisherfast.report import svg

_WIDTH = 4.2  # inches: 302 points, what a phone shows without scaling
_LONGEST = 46  # letters of a layer's name that fit this width


@dataclass(frozen=True)
class Table:
    """Cells as text; the first of a row names it."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """A picture with its heading, a sentence on how to read it, and the tables of its numbers."""

    name: str
    title: str
    meaning: str
    picture: Markup
    tables: tuple[Table, ...] = ()


def charts(F: Fisher, info: Information, curve: RateDistortion | None) -> list[Chart]:
    """All of them; those of the curve if there is one."""
    always = [by_layer(info), spectrum(histogram(F.spectra()))]
    return always if curve is None else [*always, over_beta(curve, info), trade_off(curve, info)]


def by_layer(info: Information) -> Chart:
    """A bar per layer, under its name."""
    layers = info.by_layer()
    nats_of = {name: layer.nats for name, layer in layers.items()}
    shown = chart.rows(nats_of)
    nats = [math.fsum(nats_of[name] for name in row.layers) for row in shown]
    with _figure(0.38 * len(shown) + 0.6) as figure:
        axes = figure.subplots()
        chart.bars(axes, shown, nats, height=0.4)
        for at, row in enumerate(shown):
            axes.text(0, at - 0.25, _shortened(row.label), va="bottom", fontsize=9, parse_math=False)
        axes.set(yticks=[], ylim=(len(shown) - 0.6, -0.8), xlabel="nats")
        axes.spines[["left", "top", "right"]].set_visible(False)
        said = ", ".join(f"{row.label} {nats_of[row.layers[0]]:,.1f}" for row in chart.rows(nats_of, limit=5) if not row.summed)
        picture = svg.inline(figure, "layers", f"Bars of nats by layer. The largest: {said}. The table by layer has all of them.")
    omitted = f" The {chart.MAX_ROWS} largest are drawn, of the others only the sum is given." if len(shown) < len(layers) else ""
    return Chart("layers", "Nats by layer", f"Where in the network the information is.{omitted}", picture)


def spectrum(counted: Histogram) -> Chart:
    """The sorted eigenvalues, and how many there are in each power of ten."""
    with _figure(3.2) as figure:
        axes = figure.subplots()
        plot.spectrum(axes, counted)
        axes.spines[["top", "right"]].set_visible(False)
        span = f"from {counted.values[0]:.2g} down to {counted.values[-1]:.2g}" if counted.values else "none above zero"
        alternative = f"The eigenvalues of the Fisher by rank: {span}. {plot.spectrum_title(counted)}."
        picture = svg.inline(figure, "spectrum", alternative)
    decades: Counter[int] = Counter()
    for value, count in zip(counted.values, counted.counts, strict=True):
        decades[math.floor(math.log10(value))] += count
    rows = [[f"1e{power} to 1e{power + 1}", f"{count:,}"] for power, count in sorted(decades.items(), reverse=True)]
    rows += [["(nearly) zero", f"{counted.negligible:,}"]] if counted.negligible else []
    meaning = (
        "How sharply the predictions change along each direction of the weights, the sharpest first. Where a few are large and most "
        "are small, most directions may be changed freely."
    )
    if counted.negligible:
        meaning += f" {counted.negligible:,} eigenvalues, zero or below {NEGLIGIBLE:g} of the largest, are not drawn."
    return Chart("spectrum", "Spectrum of the Fisher", meaning, picture, (Table("Eigenvalues by size", ("size", "count"), rows),))


def over_beta(curve: RateDistortion, info: Information) -> Chart:
    """Nats above, the rise of the loss below, over the price of a nat."""
    with _figure(4.4) as figure:
        panels = figure.subplots(2, 1, sharex=True)
        for axes, values, color, unit in (
            (panels[0], curve.nats, chart.BLUE, "information, nats"),
            (panels[1], curve.rises, chart.VERMILLION, "rise of the loss, nats"),
        ):
            _logarithmic(axes, curve.betas, values)
            axes.plot(curve.betas, values, "o-", color=color, markersize=4, linewidth=1.5)
            axes.axvline(info.beta, color="#000000", linewidth=0.9, linestyle="--")
            axes.set_ylabel(unit)
        at = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        panels[0].annotate("chosen", (info.beta, 1), xytext=(3, -9), fontsize=8, **at)
        panels[1].set_xlabel("beta, mean loss per nat of weights (logarithmic)")
        picture = svg.inline(
            figure, "beta", f"Two curves over beta. {_ends(curve)} The chosen beta is {info.beta:.3g}; the table has all points."
        )
    rows = [
        [f"{beta:.3g}", f"{nats:,.1f}", f"{rise:.3g}"]
        for beta, nats, rise in zip(curve.betas, curve.nats, curve.rises, strict=True)
    ]
    meaning = (
        "The dearer a nat, the coarser the weights and the higher the expected loss. The rise of the loss is its second-order "
        "estimate: believe it where it is small."
    )
    headings = ("beta", "nats", "rise of the loss")
    return Chart("beta", "Over the price of a nat", meaning, picture, (Table("The points of the curve", headings, rows),))


def trade_off(curve: RateDistortion, info: Information) -> Chart:
    """The rate-distortion curve: the rise of the loss over the nats."""
    with _figure(3.2) as figure:
        axes = figure.subplots()
        _logarithmic(axes, curve.nats, curve.rises)
        axes.plot(curve.nats, curve.rises, "o-", color=chart.BLUE, markersize=4, linewidth=1.5)
        chosen = min(range(len(curve.betas)), key=lambda at: abs(math.log(curve.betas[at] / info.beta)))
        axes.plot(curve.nats[chosen], curve.rises[chosen], "s", color=chart.VERMILLION, markersize=8)
        axes.annotate(
            f"beta = {curve.betas[chosen]:.3g}",
            (curve.nats[chosen], curve.rises[chosen]),
            (7, 5),
            textcoords="offset points",
            fontsize=8,
        )
        axes.set(xlabel="information, nats", ylabel="rise of the loss, nats")
        picture = svg.inline(figure, "rate", f"The rise of the loss over the nats kept. {_ends(curve)}")
    meaning = (
        "How little the loss can rise, to second order, when the weights may hold so many nats. To the right finer weights, to the "
        "left coarser ones."
    )
    return Chart("rate", "Rate-distortion curve", meaning, picture)


@contextmanager
def _figure(height: float) -> Iterator[Any]:
    """An empty figure of the page's width in its style; what is drawn and written inside has it."""
    figure = chart.figure("report", _WIDTH, height)
    from matplotlib import rc_context

    with rc_context(svg.STYLE):
        yield figure


def _logarithmic(axes: Any, x: Sequence[float], y: Sequence[float]) -> None:
    """Logarithmic axes where all values are above zero."""
    axes.set(xscale="log" if min(x) > 0 else "linear", yscale="log" if min(y) > 0 else "linear")
    axes.grid(color=chart.GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _ends(curve: RateDistortion) -> str:
    first, last = ((curve.betas[at], curve.nats[at], curve.rises[at]) for at in (0, -1))
    return (
        f"From {first[1]:,.1f} nats and a rise of {first[2]:.2g} at beta {first[0]:.2g} "
        f"to {last[1]:,.1f} nats and a rise of {last[2]:.2g} at beta {last[0]:.2g}."
    )


def _shortened(name: str) -> str:
    half = _LONGEST // 2
    return name if len(name) <= _LONGEST else f"{name[:half]}…{name[-half + 1 :]}"
