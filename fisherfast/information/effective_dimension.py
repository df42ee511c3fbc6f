# SPDX-License-Identifier: Apache-2.0
"""The effective dimension: how many directions of weight space the data, rather than the prior, decide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fisherfast.fisher import Fisher
from fisherfast.information import _arguments, _conditions, _directions, _prior
from fisherfast.information._prior import GivenScale
from fisherfast.ops import _log1p


@dataclass(frozen=True)
class EffectiveDimension:
    """``sum_j s_j / (1 + s_j)``, in all and by layer, with what it depends on; made by ``effective_dimension``."""

    layers: Mapping[str, float] = field(repr=False)
    beta: float
    prior_scale: GivenScale
    fisher: Fisher = field(repr=False)

    @property
    def value(self) -> float:
        """The effective dimension of the whole network, between 0 and the number of its weights."""
        return math.fsum(self.layers.values())

    def by_layer(self) -> dict[str, float]:
        """That of each layer, in the order of the Fisher's parameters."""
        return dict(self.layers)

    def conditions(self) -> str:
        """Everything it depends on, in one line."""
        scale = _prior.scale_in_words(self.prior_scale)
        return f"beta = {self.beta:.3g}, prior scale {scale}, {_conditions.measured_and_missing(self.fisher)}"

    def __str__(self) -> str:
        return f"{self.value:,.1f} directions decided by the data: {self.conditions()}"


def effective_dimension(F: Fisher, *, beta: float, prior_scale: GivenScale) -> EffectiveDimension:
    """``sum_j s_j / (1 + s_j) = tr F (F + beta / lambda^2 I)^-1``, s_j = lambda^2 f_j / beta.

    A direction counts as one where the data decide it, as nothing where the prior does. For a linear model it is the trace of
    the hat matrix of ridge regression, the number of its parameters that are in use.

    ``beta``         the price of a nat in mean loss; 1 / N is the Bayesian choice for N training samples.
    ``prior_scale``  lambda, the prior's standard deviation: a number, or {layer or parameter name: number}.

    Shapes:   none beyond those of F.
    Scale:    a number of directions; F is a mean over samples, so beta goes with a mean loss.
    Errors:   ValueError for a beta or prior_scale that is not finite and above zero, and for names that are not F's.
    Numerics: float64 sums, one block's eigenvalues at a time; nothing cancels.
    Source:   MacKay 1992, "Bayesian Interpolation" (gamma); the trace term of Proposition 2.5 of arXiv:1905.12213.
    """
    beta = _arguments.beta("effective_dimension", beta)
    layers = _directions.sums_by_layer("effective_dimension", F, prior_scale, beta, _log1p.share)
    return EffectiveDimension(layers, beta, prior_scale, F)
