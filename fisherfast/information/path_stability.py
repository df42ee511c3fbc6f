# SPDX-License-Identifier: Apache-2.0
"""Path stability: how far apart two training runs end, measured in the noise that the weights tolerate.

Two runs that share seed and order but differ in one example end at w1 and w2. With ``Q = N(w, beta F^-1)`` of either run their
distance is ``KL(Q1 || Q2)``: what the exchanged example put into the weights (smooth unique information).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fisherfast import _checks
from fisherfast.fisher import Fisher
from fisherfast.information import _arguments, _conditions
from fisherfast.information._network import Weights, tensors

_CALLER = "path_stability"


@dataclass(frozen=True)
class PathStability:
    """How far apart two runs ended, in nats, in all and by layer, with what it depends on; made by ``path_stability``.

    ``quadratic`` is ``d^T F d`` of the displacement d, without damping, ``isotropic`` what it would be on average in a random
    direction, ``||d||^2 tr F / k``.
    """

    layers: Mapping[str, float] = field(repr=False)
    quadratic: float
    isotropic: float
    squared_distance: float
    beta: float
    damping: float
    fisher: Fisher = field(repr=False)

    @property
    def nats(self) -> float:
        """``1/2 d^T (F + damping I) d / beta``."""
        return (self.quadratic + self.damping * self.squared_distance) / (2 * self.beta)

    @property
    def alignment(self) -> float:
        """``quadratic / isotropic``: below 1 where the runs parted along directions that the data do not fix; nan for 0 / 0.

        It lies between 0 and ``k f_max / tr F``. A displacement drawn from ``N(0, F^-1)`` has about
        ``k^2 / (tr F tr F^-1)``, at most 1.
        """
        return self.quadratic / self.isotropic if self.isotropic else math.nan

    def by_layer(self) -> dict[str, float]:
        """The nats of each layer, ``1/2 d_l^T ((F + damping I) d)_l / beta``; below zero only where F couples layers."""
        return dict(self.layers)

    def conditions(self) -> str:
        """Everything it depends on, in one line."""
        return f"beta = {self.beta:.3g}, damping {self.damping:g}, {_conditions.measured_and_missing(self.fisher)}"

    def __str__(self) -> str:
        return f"{self.nats:,.4g} nats apart, alignment {self.alignment:.3g}: {self.conditions()}"


@torch.no_grad()
def path_stability(F: Fisher, first: Weights, second: Weights, *, beta: float, damping: float = 0.0) -> PathStability:
    """``1/2 (w1 - w2)^T (F + damping I) (w1 - w2) / beta``, the divergence of ``N(w1, Sigma)`` from ``N(w2, Sigma)``.

    Sigma is ``beta (F + damping I)^-1``; with ``damping = beta / lambda^2`` that of ``information_in_weights``.

    ``first``, ``second``  the weights at the ends of the two runs: networks, or {parameter name: tensor}.
    ``beta``               the price of a nat in mean loss; 1 / N is the Bayesian choice for N training samples.
    ``damping``            0: changes along directions of zero Fisher cost nothing.

    Shapes:   every tensor of ``first`` and ``second`` has the shape of the same name in F. What F lacks is not compared.
    Scale:    nats; F is a mean over samples, so beta goes with a mean loss.
    Errors:   ValueError for a beta not above zero, a negative damping, names or shapes that differ, weights that are not finite or complex.
    Numerics: differences, product and sums in float64.
    Source:   Figure 2 and Proposition 2.9 of arXiv:1905.12213; smooth sample information of Harutyunyan et al. 2021
              (arXiv:2101.06640).
    """
    _arguments.check_fisher(_CALLER, F)
    beta = _arguments.beta(_CALLER, beta)
    damping = _checks.non_negative(_CALLER, "damping", damping, "beta / lambda^2 is that of information_in_weights")
    displacement = _displacement(F, tensors(_CALLER, first), tensors(_CALLER, second))
    product = F @ displacement
    along = {name: (d * product[name]).sum().item() for name, d in displacement.items()}
    squares = {name: d.square().sum().item() for name, d in displacement.items()}
    squared_distance = math.fsum(squares.values())
    return PathStability(
        layers={
            name: math.fsum(along[n] + damping * squares[n] for n in layer.parameters) / (2 * beta)
            for name, layer in F.by_layer().items()
        },
        quadratic=math.fsum(along.values()),
        isotropic=squared_distance * F.trace() / F.num_parameters,
        squared_distance=squared_distance,
        beta=beta,
        damping=damping,
        fisher=F,
    )


def _displacement(F: Fisher, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``w1 - w2`` in float64, for every parameter of F."""
    _checks.named(_CALLER, "first", first, F.names, "F")
    _checks.named(_CALLER, "second", second, F.names, "F")
    starts = {name: first[name].detach() for name in F.names}
    _checks.shaped(_CALLER, "second", second, {name: start.shape for name, start in starts.items()}, "first")
    displacement = {}
    for name, start in starts.items():
        _checks.real(_CALLER, f"first[{name!r}]", start)
        _checks.real(_CALLER, f"second[{name!r}]", second[name])
        displacement[name] = start.double() - second[name].detach().to(start.device).double()
        if not displacement[name].isfinite().all():
            raise ValueError(f"{_CALLER}: weights must be finite, got NaN or infinity in {name!r}")
    return displacement
