# SPDX-License-Identifier: Apache-2.0
"""The run in a few lines and a table by layer, for a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fisherfast.fisher import Fisher
from fisherfast.information import Information
from fisherfast.timing import TimeRatio

MEANING = (
    "nats: what it takes to write a layer's weights down as coarsely as the loss allows, given the prior; share: of all nats; "
    "trace: how sharply the network's predictions depend on the layer's weights."
)


def render(F: Fisher, info: Information, ratio: TimeRatio | None = None) -> Group:
    """The run in a few lines and a table by layer, for ``rich.console.Console.print``."""
    lines = Table.grid(padding=(0, 2))
    lines.add_column(justify="right", style="bold")
    for line in summary(F, info, ratio).items():
        lines.add_row(*map(Text, line))
    return Group(lines, "", info.table(), Text(MEANING, style="dim"))


def summary(F: Fisher, info: Information, ratio: TimeRatio | None = None) -> dict[str, str]:
    """The lines above the table: everything its numbers depend on, in words."""
    labels, likelihood = F.provenance.fisher_type or "unknown", F.provenance.likelihood or "unknown"
    lines = {
        "Fisher": f"{F.structure}, {labels} labels, {likelihood} likelihood",
        "data": f"N = {F.num_samples:,} samples, {F.num_positions:,} labels",
        "prior": f"scale {info.prior_in_words()}",
        "price": f"beta = {info.beta:.3g}: the mean loss one nat may cost; {info.variant} formulas",
        "information": f"{info.nats:,.1f} nats = {info.bits:,.1f} bits in {info.num_parameters:,} weights",
    }
    if info.excluded:
        lines["excluded"] = ", ".join(info.excluded)
    if ratio is not None:
        lines["time"] = str(ratio)
    return lines
