# SPDX-License-Identifier: Apache-2.0
"""The rate-distortion curve of a task: how many nats of weights a lower loss takes, traced by the price of a nat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fisherfast.data.batches import Output
from fisherfast.fisher import Fisher
from fisherfast.information import _arguments
from fisherfast.information._network import Weights
from fisherfast.information._prior import PriorScale
from fisherfast.information.complexity import Complexity, LossSource
from fisherfast.likelihood import Likelihood


@dataclass(frozen=True, eq=False)
class RateDistortion:
    """The points ``(KL(Q || P), E_Q loss)``, one for each beta; made by ``rate_distortion``, or from ``measured_complexity``'s.

    ``points`` are complexities, the smallest beta, with the most nats, first.
    """

    points: tuple[Complexity, ...]

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("RateDistortion: points must hold at least one complexity, got none")
        object.__setattr__(self, "points", tuple(sorted(self.points, key=lambda point: point.beta)))

    @property
    def betas(self) -> tuple[float, ...]:
        """The prices of a nat, rising."""
        return tuple(point.beta for point in self.points)

    @property
    def nats(self) -> tuple[float, ...]:
        """The rates ``KL(Q || P)``; they fall as beta rises."""
        return tuple(point.nats for point in self.points)

    @property
    def expected_losses(self) -> tuple[float, ...]:
        """The distortions ``E_Q loss``."""
        return tuple(point.expected_loss for point in self.points)

    @property
    def rises(self) -> tuple[float, ...]:
        """How far each ``E_Q loss`` is above the loss at the mean of Q."""
        return tuple(point.expected_loss - point.loss for point in self.points)

    @property
    def complexities(self) -> tuple[float, ...]:
        """``E_Q loss + beta KL``; of the exact formulas a concave function of beta whose slope is the nats."""
        return tuple(point.complexity for point in self.points)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the loss over the nats; returns the matplotlib figure, written to ``path`` if given.

        Errors:   ImportError if matplotlib is not installed (``pip install fisherfast[plot]``).
        """
        from fisherfast.information import _plot_rate_distortion

        return _plot_rate_distortion.curve(self, path)

    def conditions(self) -> str:
        """Everything the curve depends on, in one line: those of its first point, and the range of beta."""
        return f"{len(self.points)} points up to beta = {self.betas[-1]:.3g}, the first at {self.points[0].conditions()}"

    def __str__(self) -> str:
        rows = (f"beta {p.beta:.3g}: {p.nats:,.1f} nats, expected loss {p.expected_loss:.6g}" for p in self.points)
        return "\n".join((*rows, self.conditions()))


@torch.no_grad()
def rate_distortion(
    F: Fisher,
    model: Weights,
    betas: float | Sequence[float],
    *,
    prior_scale: PriorScale,
    center: Weights | None = None,
    variant: str = "exact",
    loss: float | None = None,
    method: str = "analytic",
    data: Iterable[Any] | None = None,
    likelihood: str | Likelihood | None = None,
    draws: int = 8,
    seed: int = 0,
    output: Output = None,
) -> RateDistortion:
    """``(KL(Q_beta || P), E_{Q_beta} L)`` for every beta, Q_beta the posterior with the least ``E_Q L + beta KL(Q || P)``.

    To second order in the loss the curve falls and is convex, beta is its slope, ``dE_Q L / dKL = -beta``, and the nats are the
    slope of the complexity, ``dC / dbeta = KL``: also where ``prior_scale="fit"`` chooses another prior at every beta.
    (The formulas as printed are those of half the beta: there the slope of the curve is ``-beta / 2``, and dC / dbeta another.)

    ``betas`` are any number of prices, in any order. ``method="monte-carlo"`` measures every point on ``data``, all of them
    with the same random numbers, so that they differ by beta alone; ``data`` is then read twice a draw for each. The other
    arguments are those of ``task_complexity``.

    Shapes:   as there.
    Scale:    nats against the mean loss's units.
    Errors:   those of ``task_complexity``; ValueError without a beta.
    Numerics: those of ``task_complexity``. F's spectrum is computed once for all betas, a layer at a time.
    Source:   Definition 2.1 of arXiv:1905.12213; the slopes by the envelope theorem.
    """
    prices = _arguments.as_list(betas)
    if not prices:
        raise ValueError("rate_distortion: betas must hold at least one price of a nat, got none")
    source = LossSource("rate_distortion", method, data, F.provenance.likelihood, likelihood, draws, seed, output)
    found = source.complexities(F, model, prices, loss, prior_scale=prior_scale, center=center, variant=variant)
    return RateDistortion(tuple(found))
