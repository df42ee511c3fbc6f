# SPDX-License-Identifier: Apache-2.0
"""What is made of the sweeps of ``test_scaling.py``, from their records alone: labelled curves, exponents, the figure."""

from __future__ import annotations

import math
from pathlib import Path

PLAIN, STEADY, WHOLE = "plain forward and backward", "fisherfast, a further batch", "fisherfast, start to result"
Curve = tuple[list[int], list[float]]


def label(way: str) -> str:
    """A way's name across the sweeps: without what only tells it from others of the same package."""
    if way == "plain":
        return PLAIN
    if way.startswith("fisherfast"):
        return STEADY if "further" in way or "run over" in way else WHOLE
    return way.partition(",")[0]


def labelled(records: list[dict], sweep: str) -> dict[str, Curve]:
    """``{label: (points, seconds)}`` of one sweep, the plain step among them."""
    found: dict[str, Curve] = {}
    for record in records:
        if record["sweep"] == sweep:
            for way, seconds in record["seconds"].items():
                points, times = found.setdefault(label(way), ([], []))
                points.append(record["point"])
                times.append(seconds)
    return found


def exponent(points: list[int], seconds: list[float]) -> float:
    """The slope of log seconds against log points by least squares."""
    x, y = [math.log(p) for p in points], [math.log(s) for s in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


# Okabe and Ito's colours, which the colour-blind tell apart too, and a marker each.
_STYLES = {
    PLAIN: {"color": "black", "linestyle": "--", "zorder": 5},
    STEADY: {"color": "#0072B2", "marker": "o", "linewidth": 2.4, "zorder": 6},
    WHOLE: {"color": "#0072B2", "marker": "o", "linewidth": 1.6, "linestyle": ":", "zorder": 6},
    "BackPACK": {"color": "#E69F00", "marker": "s"},
    "nngeometry": {"color": "#009E73", "marker": "^"},
    "ASDL": {"color": "#CC79A7", "marker": "D"},
    "Opacus": {"color": "#D55E00", "marker": "v"},
    "torch.func": {"color": "#56B4E9", "marker": "P"},
    "loop over samples": {"color": "#8a8a8a", "marker": "X"},
}


def draw(records: list[dict], path: Path) -> None:
    """The figure: a panel per sweep, milliseconds on log axes. The same records give the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    titles = {record["sweep"]: record["title"] for record in records}
    with plt.rc_context({"svg.hashsalt": "fisherfast", "font.size": 9, "lines.linewidth": 1.2, "lines.markersize": 4}):
        figure, panels = plt.subplots(2, 2, figsize=(9, 7.4))
        handles = {}
        for panel, (sweep, title) in zip(panels.flat, titles.items(), strict=True):
            for name, (points, seconds) in labelled(records, sweep).items():
                (line,) = panel.plot(points, [1e3 * s for s in seconds], **_STYLES[name])
                handles.setdefault(name, line)
            ticks = [record["point"] for record in records if record["sweep"] == sweep]
            panel.set(xscale="log", yscale="log", xlabel=sweep, ylabel="milliseconds per batch")
            panel.set_title(title, fontsize=9)
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            panel.grid(True, alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
        figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=4, frameon=False)
        figure.tight_layout(rect=(0, 0.08, 1, 1))
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
