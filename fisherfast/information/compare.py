# SPDX-License-Identifier: Apache-2.0
"""Two networks of one architecture beside each other: which layers of the second hold more information, and how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fisherfast.fisher.protocol import WHOLE
from fisherfast.information import _comparable, _conditions
from fisherfast.information.result import Information


@dataclass(frozen=True)
class LayerDifference:
    """The nats that one layer holds in each network."""

    first: float
    second: float

    @property
    def difference(self) -> float:
        """``second - first``, in nats."""
        return self.second - self.first


@dataclass(frozen=True)
class Comparison:
    """Two informations that were measured alike; made by ``compare``.

    ``notes`` says what differs between the measurements without making them incomparable.
    """

    first: Information
    second: Information
    names: tuple[str, str]
    notes: tuple[str, ...]

    @property
    def difference(self) -> float:
        """``second.nats - first.nats``."""
        return self.second.nats - self.first.nats

    def by_layer(self) -> dict[str, LayerDifference]:
        """The nats of both by layer, in the order of the Fisher's parameters."""
        second = self.second.by_layer()
        return {name: LayerDifference(layer.nats, second[name].nats) for name, layer in self.first.by_layer().items()}

    def table(self) -> Table:
        """One row per layer, and the total, for ``rich.console.Console.print``."""
        table = Table(title="Information in the weights, nats", title_justify="left", caption=Text(self.conditions()))
        table.add_column("layer", overflow="fold")
        for heading in (*self.names, "difference"):
            table.add_column(Text(heading), justify="right", no_wrap=True)
        for name, layer in self.by_layer().items():
            table.add_row(Text(name or WHOLE), *_cells(layer))
        table.add_section()
        table.add_row("all", *_cells(LayerDifference(self.first.nats, self.second.nats)))
        return table

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the nats of both by layer and their differences; returns the matplotlib figure, written to ``path`` if given.

        Of more than 40 layers the ones of the largest difference are drawn and the others summed in one row.

        Errors:   ImportError if matplotlib is not installed (``pip install fisherfast[plot]``).
        """
        from fisherfast.information import _plot_compare

        return _plot_compare.by_layer(self, path)

    def conditions(self) -> str:
        """Everything both depend on, and what differs, in one line."""
        return "; ".join([f"{self.names[0]}: {self.first.conditions()}", *self.notes])

    def __str__(self) -> str:
        first, second = self.names
        return (
            f"{self.difference:+,.1f} nats from {first} ({self.first.nats:,.1f}) to {second} ({self.second.nats:,.1f}): "
            f"{self.conditions()}"
        )


def compare(first: Information, second: Information, *, names: Sequence[str] = ("first", "second")) -> Comparison:
    """``nats_second - nats_first`` by layer, of two networks of one architecture, measured alike.

    ``names``  what the two are called in tables and pictures.

    Shapes:   both have the same parameters in the same shapes.
    Scale:    nats.
    Errors:   ValueError, naming all that differs, for other layers or shapes, or another beta, variant, fisher_type, likelihood
              or structure; and for names that are not two different ones. Another prior scale, center, N, number of draws or
              list of excluded parameters is noted in ``.notes``.
    Numerics: as the informations'.
    Source:   ours.
    """
    for info in (first, second):
        if not isinstance(info, Information):
            raise TypeError(
                f"compare: both must be results of information_in_weights, got {type(info).__name__}; measure those first"
            )
    first_name, second_name = _checked(names)
    if problems := _comparable.differences(first, second):
        raise ValueError(
            f"compare: {first_name} and {second_name} must be of one architecture and measured alike, got {'; '.join(problems)}; "
            "measure both with the same settings"
        )
    return Comparison(first, second, (first_name, second_name), _notes(first, second, (first_name, second_name)))


def _checked(names: Sequence[str]) -> tuple[str, str]:
    if isinstance(names, str) or len(names) != 2 or names[0] == names[1]:
        raise ValueError(f"compare: names must be two different names, got {names!r}")
    return str(names[0]), str(names[1])


def _notes(first: Information, second: Information, names: tuple[str, str]) -> tuple[str, ...]:
    """What differs, in words, and can."""
    of_second = _may_differ(second)
    return tuple(
        f"{what}: {value} in {names[0]}, {of_second[what]} in {names[1]}"
        for what, value in _may_differ(first).items()
        if value != of_second[what]
    )


def _may_differ(info: Information) -> dict[str, str]:
    scales = info.prior_scales.values()
    span = _conditions.span(scales, ".6g") if scales else "none"
    return {
        "prior scale": f"{span} ({info.prior_in_words()})",
        "norm of the center": f"{info.center_norm:.6g}",
        "samples": f"{info.fisher.num_samples:,}",
        "draws per sample": str(info.fisher.provenance.draws),
        "excluded parameters": ", ".join(info.excluded) or "none",
    }


def _cells(layer: LayerDifference) -> list[str]:
    return [f"{layer.first:,.1f}", f"{layer.second:,.1f}", f"{layer.difference:+,.1f}"]
