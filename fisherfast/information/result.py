# SPDX-License-Identifier: Apache-2.0
"""What ``information_in_weights`` returns: the nats, in all and by layer, with everything they depend on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fisherfast.fisher import Fisher
from fisherfast.fisher.protocol import WHOLE as WHOLE
from fisherfast.information import _conditions, _prior
from fisherfast.information._prior import PriorScale


@dataclass(frozen=True)
class LayerInformation:
    """The information in one layer's weights.

    ``share`` is this layer's part of the network's KL divergence. ``effective_dimension`` counts the directions that the
    data, rather than the prior, decide: ``sum_j s_j / (1 + s_j)``. ``prior_scale`` is None where the layer's parameters
    have different ones; they are in ``Information.prior_scales``.
    """

    num_parameters: int
    trace: float
    nats: float
    kl: float
    share: float
    effective_dimension: float
    squared_distance: float
    prior_scale: float | None

    @property
    def bits(self) -> float:
        """``nats / log 2``."""
        return self.nats / math.log(2)

    @property
    def bits_per_parameter(self) -> float:
        """``bits / num_parameters``."""
        return self.bits / self.num_parameters if self.num_parameters else 0.0


@dataclass(frozen=True)
class Information:
    """The information in a network's weights; made by ``information_in_weights``, which says what the numbers mean.

    ``nats`` is ``kl`` for ``variant="exact"`` and the printed eq. 8 for ``variant="paper"``. ``prior_scale`` is as given,
    ``prior_scales`` what it came to for each parameter; ``center_norm`` is ``||c||``, which tells centers apart. ``excluded`` names the parameters the Fisher lacks,
    ``frozen`` those of the network that ask for no gradient: neither are in the nats.
    """

    layers: Mapping[str, LayerInformation] = field(repr=False)
    beta: float
    prior_scale: PriorScale
    prior_scales: Mapping[str, float] = field(repr=False)
    centered: bool
    center_norm: float
    variant: str
    loss: float | None
    excluded: tuple[str, ...]
    fisher: Fisher = field(repr=False)
    frozen: tuple[str, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        prior = f"{self.prior_scale:.3g}" if isinstance(self.prior_scale, float) else self.prior_scale
        return (
            f"Information({self.nats:,.6g} nats in {len(self.layers)} layers, beta={self.beta:.3g}, prior_scale={prior}, "
            f"variant={self.variant!r})"
        )

    @property
    def nats(self) -> float:
        """The information in the weights: ``kl``, or the printed eq. 8."""
        return math.fsum(layer.nats for layer in self.layers.values())

    @property
    def bits(self) -> float:
        """``nats / log 2``."""
        return self.nats / math.log(2)

    @property
    def kl(self) -> float:
        """``KL(Q || P)`` at the Sigma of this variant."""
        return math.fsum(layer.kl for layer in self.layers.values())

    @property
    def loss_rise(self) -> float:
        """``1/2 tr(F Sigma)``: how much coarse weights add to the mean loss, to second order."""
        return self.temperature / 2 * math.fsum(layer.effective_dimension for layer in self.layers.values())

    @property
    def lagrangian_rise(self) -> float:
        """``1/2 tr(F Sigma) + beta kl``: what coarse weights cost in all, in units of the mean loss."""
        return self.loss_rise + self.beta * self.kl

    @property
    def num_parameters(self) -> int:
        """The number of weights k that the nats are of."""
        return sum(layer.num_parameters for layer in self.layers.values())

    @property
    def trace(self) -> float:
        """The trace of the Fisher."""
        return math.fsum(layer.trace for layer in self.layers.values())

    @property
    def complexity(self) -> float | None:
        """``E_Q loss + beta KL`` at the variant's Sigma (for "exact" the minimum over Sigma); None without a loss."""
        return None if self.loss is None else self.loss + self.lagrangian_rise

    @property
    def temperature(self) -> float:
        """``beta``, or ``beta / 2`` for the formulas as printed: the t of ``Sigma = t (F + t / lambda^2)^-1``."""
        return self.beta if self.variant == "exact" else self.beta / 2

    def by_layer(self) -> dict[str, LayerInformation]:
        """The information by layer, in the order of the Fisher's parameters."""
        return dict(self.layers)

    @property
    def total(self) -> LayerInformation:
        """The layers added up, as if they were one."""
        layers = self.layers.values()
        scales = {layer.prior_scale for layer in layers}
        return LayerInformation(
            num_parameters=self.num_parameters,
            trace=self.trace,
            nats=self.nats,
            kl=self.kl,
            share=math.fsum(layer.share for layer in layers),
            effective_dimension=math.fsum(layer.effective_dimension for layer in layers),
            squared_distance=math.fsum(layer.squared_distance for layer in layers),
            prior_scale=scales.pop() if len(scales) == 1 else None,
        )

    @torch.no_grad()
    def posterior_variance(self) -> dict[str, Tensor]:
        """``Sigma = t / (f + t / lambda^2)`` by parameter: the variance of the noise each weight tolerates; of blocks the variance of each weight
        given the others, ``1 / (Sigma^-1)_ii``.

        Shapes:   like ``F.diagonal()``.
        Scale:    t = beta (exact) or beta / 2 (as printed).
        Errors:   none for a Fisher that ``information_in_weights`` accepted.
        Numerics: float64.
        Source:   Proposition 2.5 of arXiv:1905.12213.
        """
        t = self.temperature
        precisions = {name: t / scale**2 if scale else math.inf for name, scale in self.prior_scales.items()}
        return {name: t / (f + precisions[name]) for name, f in self.fisher.diagonal(dtype=torch.float64).items()}

    def table(self) -> Table:
        """One row per layer, and the total, for ``rich.print``."""
        table = Table(title="Information in the weights, by layer", title_justify="left")
        table.add_column("layer", overflow="fold")
        headings = ("parameters", "trace", "nats", "bits/parameter", "share")
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for name, layer in self.by_layer().items():
            table.add_row(Text(name or WHOLE), *cells(layer, headings))
        table.add_section()
        table.add_row("all", *cells(self.total, headings))
        return table

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw nats and Fisher trace by layer; returns the matplotlib figure, written to ``path`` if given.

        Of more than 40 layers the ones of the most nats are drawn and the others summed in one row.

        Errors:   ImportError if matplotlib is not installed (``pip install fisherfast[plot]``).
        """
        from fisherfast.information import _plot

        return _plot.by_layer(self, path)

    def prior_in_words(self, ranged: bool = False) -> str:
        """The prior scale and its center: ``0.1 around 0``; ``ranged``: of several scales also the least and the largest."""
        scales = set(self.prior_scales.values())
        span = f": {_conditions.span(scales)}" if ranged and len(scales) > 1 else ""
        return _prior.in_words(self.prior_scale, self.centered) + span

    def conditions(self) -> str:
        """Everything the nats depend on, in one line."""
        return (
            f"beta = {self.beta:.3g}, prior scale {self.prior_in_words()}, {self.variant} formulas, "
            f"{_conditions.measured_and_missing(self.fisher)}"
        )

    def __str__(self) -> str:
        return f"{self.nats:,.1f} nats ({self.bits:,.1f} bits) in the weights: {self.conditions()}"


def cells(layer: LayerInformation, headings: Iterable[str]) -> list[str]:
    """A layer's numbers as tables show them, below these headings."""
    shown = {
        "parameters": f"{layer.num_parameters:,}",
        "trace": f"{layer.trace:.3g}",
        "nats": f"{layer.nats:,.1f}",
        "bits/parameter": f"{layer.bits_per_parameter:.3g}",
        "share": f"{layer.share:.1%}",
        "effective dimension": f"{layer.effective_dimension:,.1f}",
    }
    return [shown[heading] for heading in headings]
