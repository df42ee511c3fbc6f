# SPDX-License-Identifier: Apache-2.0
"""The channel from an input to an activation of a network with noisy weights, and its Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fisherfast import _checks
from fisherfast._names import listed
from fisherfast.fisher import Fisher
from fisherfast.information import _arguments, _conditions, _prior
from fisherfast.information._prior import PriorScale
from fisherfast.information.weights import information_at_betas


@dataclass(frozen=True)
class Channel:
    """``z_n = f_{w + n}(x)``, ``n ~ N(0, Sigma)``, ``Sigma = beta (F + damping)^-1``: what every number of an activation depends on.

    ``dampings`` by parameter name: ``beta / lambda^2`` of the prior, or the damping given without one; none where nothing is
    inverted, as in the printed formula.
    """

    layer: str | None
    beta: float
    prior_scale: PriorScale | None
    dampings: Mapping[str, float] = field(repr=False)
    fisher: Fisher = field(repr=False)

    @classmethod
    def of(
        cls,
        caller: str,
        model: nn.Module,
        F: Fisher,
        *,
        layer: str | None,
        beta: float,
        prior_scale: PriorScale | None,
        damping: float | None,
        inverted: bool = True,
    ) -> Channel:
        """Raise ValueError unless the noise is well defined: a prior, a damping, or a Fisher that is regular by itself."""
        _arguments.check_fisher(caller, F)
        beta = _arguments.beta(caller, beta)
        if not inverted:
            return cls(layer, beta, None, {}, F)
        if prior_scale is None:
            value = 0.0 if damping is None else _checks.non_negative(caller, "damping", damping, "it is beta / prior_scale^2")
            if not value:
                _check_regular(caller, F)
            return cls(layer, beta, None, dict.fromkeys(F.names, value), F)
        if damping is not None:
            raise ValueError(
                f"{caller}: damping must be None with a prior_scale, whose damping is beta / prior_scale^2, got {damping!r}"
            )
        (info,) = information_at_betas(caller, F, model, (beta,), prior_scale=prior_scale)
        scales = info.prior_scales
        if unusable := [name for name, scale in scales.items() if not 0 < scale < math.inf]:
            raise ValueError(
                f"{caller}: a fitted prior_scale must be > 0 and finite, got others for {listed(unusable)}; give numbers there"
            )
        return cls(layer, beta, prior_scale, {name: beta / scale**2 for name, scale in scales.items()}, F)

    def noise(self, rows: Tensor) -> Tensor:
        """Each row ``[R, P]`` times Sigma."""
        return self.beta * torch.stack([self.fisher.solve(row, damping=self.dampings) for row in rows])

    def metric(self, rows: Tensor) -> Tensor:
        """Each row ``[R, P]`` times F."""
        return torch.stack([self.fisher @ row for row in rows])

    def conditions(self) -> str:
        """Everything the numbers depend on, in one line."""
        where = "output" if self.layer is None else f"layer {self.layer!r}"
        return f"{where}, beta = {self.beta:.3g}, {self._prior_in_words()}, {_conditions.measured(self.fisher)}"

    def _prior_in_words(self) -> str:
        if not self.dampings:
            return "no prior"
        scale = "uninformative" if self.prior_scale is None else _prior.scale_in_words(self.prior_scale)
        return f"prior scale {scale} (damping {_conditions.span(self.dampings.values())})"


def _check_regular(caller: str, F: Fisher) -> None:
    """Raise ValueError for a zero eigenvalue, which what is zero but for rounding is in any spectrum, and where F solves damped only."""
    for spectrum in F.spectra():
        if spectrum.zeros or any(bool((factor <= 0).any()) for factor in spectrum.factors):
            raise ValueError(
                f"{caller}: F must be regular without a prior, got zero eigenvalues in {list(spectrum.parameters)}; give prior_scale, or damping > 0"
            )
    try:
        F.solve(torch.zeros(F.num_parameters, dtype=torch.float64))
    except ValueError as error:
        raise ValueError(
            f"{caller}: F must be solved without damping where there is no prior, got structure {F.structure!r} ({error}); give "
            "prior_scale, or damping > 0, or measure another structure"
        ) from error


@dataclass(frozen=True, eq=False)
class Whitening:
    """W ``[D, D]`` with ``W S W^T`` the identity on the range of S, zero rows for the rest; ``logdet`` of S on its range.

    Numerics: units are first scaled to variance 1, so that units of very different scales cost no digits. Eigenvalues of
              what remains below ``D eps^2`` (eps of the model's precision, squared as variances are) count as zero.
    """

    matrix: Tensor
    rank: int
    logdet: float
    _null: Tensor = field(repr=False)
    _scale: Tensor = field(repr=False)
    _tolerance: float = field(repr=False)

    @classmethod
    def of(cls, S: Tensor, dtype: torch.dtype) -> Whitening:
        """From a covariance in float64, of a model in ``dtype``."""
        deviations = S.diagonal().clamp_min(0).sqrt()
        inverse = torch.where(deviations > 0, 1 / deviations, 0.0)
        values, vectors = torch.linalg.eigh(inverse[:, None] * S * inverse)
        kept = values > len(S) * max(torch.finfo(dtype).eps ** 2, torch.finfo(torch.float64).eps)
        roots = torch.where(kept, values, 1.0).rsqrt() * kept
        logdet = float(values[kept].log().sum() + 2 * deviations[deviations > 0].log().sum())
        # Not more than a tenth, where eps is large: else slopes all across the noise would pass as rounding.
        tolerance = max(min(1e3 * torch.finfo(dtype).eps, 0.1), 1e-6)
        return cls(roots[:, None] * vectors.mT * inverse, int(kept.sum()), logdet, vectors[:, ~kept].mT, inverse, tolerance)

    def carries(self, columns: Tensor) -> bool:
        """Whether columns ``[D, m]`` lie in the range of S, where the noise is, but for rounding."""
        # A unit without any noise has no scale to be compared on: there only zeros will do.
        scaled = self._scale[:, None] * columns
        lost = float((self._null @ scaled).norm())
        return lost <= self._tolerance * float(scaled.norm()) and not bool(columns[self._scale == 0].any())
