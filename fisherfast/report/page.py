# SPDX-License-Identifier: Apache-2.0
"""The page: one HTML file that needs nothing else, neither the network nor a script."""

from __future__ import annotations

from datetime import UTC, datetime

from jinja2 import Environment, PackageLoader, StrictUndefined

from fisherfast import environment
from fisherfast.fisher import Fisher
from fisherfast.information import WHOLE, Information, RateDistortion
from fisherfast.information.result import cells
from fisherfast.report import charts, words
from fisherfast.report.text import summary
from fisherfast.timing import TimeRatio

_TEMPLATES = Environment(
    loader=PackageLoader("fisherfast"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_VERSIONS = ("fisherfast", "torch", "numpy", "python")


def page(
    F: Fisher,
    info: Information,
    ratio: TimeRatio | None = None,
    *,
    curve: RateDistortion | None = None,
    command: str | None = None,
    date: datetime | None = None,
) -> str:
    """The report as HTML; ``curve``, ``command`` and ``date`` (now, if not given) are shown on it.

    Errors:   ImportError if matplotlib is not installed.
    """
    facts = environment.facts()
    made = {
        "date": f"{date or datetime.now(UTC):%Y-%m-%d %H:%M %Z}",
        "command": command or "called from Python",
        **{name: facts[name] for name in _VERSIONS},
    }
    return _TEMPLATES.get_template("report.html.jinja").render(
        model=F.provenance.model or "a network",
        nats=f"{info.nats:,.0f}",
        bits=f"{info.bits:,.0f}",
        parameters=f"{info.num_parameters:,}",
        lines=summary(F, info, ratio),
        warnings=words.warnings(F, info) or ["None."],
        layers=layers(info),
        charts=charts.charts(F, info, curve),
        settings=words.settings(F, info) | made,
        terms=words.TERMS,
    )


def layers(info: Information) -> charts.Table:
    """All layers and the total."""
    headings = ("nats", "share", "parameters", "bits/parameter", "trace", "effective dimension")
    rows = [
        [name or WHOLE, *cells(layer, headings), "by parameter" if layer.prior_scale is None else f"{layer.prior_scale:.3g}"]
        for name, layer in info.by_layer().items()
    ]
    rows.append(["all", *cells(info.total, headings), ""])
    return charts.Table("Information in the weights, by layer", ("layer", *headings, "prior scale"), rows)
