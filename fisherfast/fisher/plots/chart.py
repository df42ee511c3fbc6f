# SPDX-License-Identifier: Apache-2.0
"""What all pictures share: matplotlib only when one is drawn, Okabe and Ito's colours, a row per layer as long as they can be read."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisherfast.fisher.protocol import WHOLE

# Of Okabe and Ito's colours, which the colour-blind tell apart.
BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
GRID = "#E6E6E6"
MAX_ROWS = 40


@dataclass(frozen=True)
class Row:
    """A row of a chart: what it is called, and the layers that it shows or adds up."""

    label: str
    layers: tuple[str, ...]
    summed: bool = False


def rows(sizes: Mapping[str, float], limit: int = MAX_ROWS) -> list[Row]:
    """The ``limit`` layers of the largest size, in the order given; the others in one more row, which says how many they are."""
    kept = set(sorted(sizes, key=lambda name: sizes[name], reverse=True)[:limit])
    shown = [Row(name or WHOLE, (name,)) for name in sizes if name in kept]
    others = tuple(name for name in sizes if name not in kept)
    return [*shown, Row(f"{len(others):,} other layers, summed", others, summed=True)] if others else shown


def figure(caller: str, width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches. Errors: ImportError, naming the caller, if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{caller}: matplotlib is not installed; pip install 'fisherfast[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def finished(drawn: Any, conditions: str, path: str | Path | None) -> Any:
    """The figure with the conditions under it, written to ``path`` if given."""
    for axes in drawn.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.title.set_fontsize(11)
    columns = int(15 * drawn.get_figwidth())
    drawn.supxlabel("\n".join(textwrap.wrap(conditions, columns)), fontsize=8, color="0.35", parse_math=False)
    if path is not None:
        drawn.savefig(path, dpi=150)
    return drawn


def label_rows(axes: Any, labels: Sequence[str]) -> None:
    """Name the rows 0, 1, ... of ``axes``, the first on top; a name is text, whatever signs it has."""
    axes.set_yticks(range(len(labels)), labels)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(labels) - 0.4, -0.6)


def bars(axes: Any, shown: Sequence[Row], values: Sequence[float], *, height: float = 0.7, signed: bool = False) -> None:
    """A bar and its number in each row; of a sum, which would dwarf the others, the number alone. ``signed`` is for differences."""
    colors = [VERMILLION if signed and value > 0 else BLUE for value in values]
    lengths = [0.0 if row.summed else value for row, value in zip(shown, values, strict=True)]
    drawn = axes.barh(range(len(values)), lengths, color=colors, height=height)
    labels = [number(value, "+" if signed else "") for value in values]
    labels = [f"{label} (no bar)" if row.summed else label for row, label in zip(shown, labels, strict=True)]
    axes.bar_label(drawn, labels=labels, padding=3, fontsize=8)
    axes.margins(x=0.25)


def number(value: float, sign: str = "") -> str:
    """Four digits, or all of a large number's before the point."""
    return f"{value:{sign},.0f}" if abs(value) >= 1e4 else f"{value:{sign},.4g}"


def points(axes: Any, values: Sequence[float]) -> None:
    """A point and its number in each row, on a logarithmic axis, where the length of a bar would mean nothing."""
    shown = [(row, value) for row, value in enumerate(values) if value > 0]  # zero has no place on such an axis
    if shown:
        exponents = [math.log10(value) for _, value in shown]
        axes.set_xscale("log")
        axes.set_xlim(10.0 ** math.floor(min(exponents) - 0.1), 10.0 ** min(math.ceil(max(exponents) + 0.1), 308))
    axes.plot([value for _, value in shown], [row for row, _ in shown], "o", color=VERMILLION, markersize=7)
    for row, value in enumerate(values):
        at = {"xy": (value, row)} if value > 0 else {"xy": (0, row), "xycoords": ("axes fraction", "data")}
        axes.annotate(f"{value:.3g}", **at, xytext=(7, 0), textcoords="offset points", va="center", fontsize=8)
    axes.grid(axis="both", color=GRID, linewidth=0.8)
