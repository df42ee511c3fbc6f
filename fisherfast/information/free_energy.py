# SPDX-License-Identifier: Apache-2.0
"""The free energy of a minimum and the time noisy gradient descent takes to leave it (Eyring and Kramers).

``dw = -grad L dt + sqrt(2 T) dW`` with the same noise in every direction. Of two minima of one depth it leaves the flatter one
later by the ratio of the square roots of their determinants, at every small T alike: a temperature that decides *how much*
flatness counts needs noise that is itself larger in sharp directions, as SGD's is. That is not in these formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from fisherfast import _checks
from fisherfast.fisher import Fisher
from fisherfast.information import _arguments, _conditions, _directions, _prior
from fisherfast.information._prior import GivenScale


@dataclass(frozen=True)
class FreeEnergy:
    """``loss + T / 2 logdet`` of a point of weight space; made by ``free_energy``, or from numbers known otherwise.

    ``logdet`` is ``log |F + damping I|``, or ``log |I + lambda^2 F / T|`` where ``prior_scale`` is not None.
    """

    loss: float
    logdet: float
    temperature: float
    damping: float = 0.0
    prior_scale: GivenScale | None = None
    fisher: Fisher | None = field(default=None, repr=False)

    @property
    def value(self) -> float:
        """The free energy, in units of the mean loss."""
        return self.loss + self.temperature / 2 * self.logdet

    def conditions(self) -> str:
        """Everything it depends on, in one line."""
        regular = f"damping {self.damping:g}"
        if self.prior_scale is not None:
            regular = f"prior scale {_prior.scale_in_words(self.prior_scale)}"
        source = "numbers given" if self.fisher is None else _conditions.measured_and_missing(self.fisher)
        return f"loss = {self.loss:.4g}, T = {self.temperature:.3g}, {regular}, {source}"

    def __str__(self) -> str:
        return f"free energy {self.value:.6g}: {self.conditions()}"


@dataclass(frozen=True)
class EscapeTime:
    """The mean time to leave a minimum over a saddle, in units of the Langevin equation's time; made by ``escape_time``."""

    log_time: float
    curvature: float
    minimum: FreeEnergy = field(repr=False)
    saddle: FreeEnergy = field(repr=False)

    @property
    def time(self) -> float:
        """``exp(log_time)``; inf where that is too large for a float."""
        return math.exp(self.log_time) if self.log_time < math.log(torch.finfo(torch.float64).max) else math.inf

    @property
    def barrier(self) -> float:
        """How far the loss rises. The formula is for T far below it."""
        return self.saddle.loss - self.minimum.loss

    def __str__(self) -> str:
        return (
            f"mean escape time exp({self.log_time:.4g}): barrier {self.barrier:.4g}, T = {self.minimum.temperature:.3g}, "
            f"curvature {self.curvature:.3g} along the way, log-determinants {self.minimum.logdet:.4g} at the minimum and "
            f"{self.saddle.logdet:.4g} at the saddle"
        )


def free_energy(
    F: Fisher,
    loss: float,
    *,
    temperature: float,
    damping: float | None = None,
    prior_scale: GivenScale | None = None,
) -> FreeEnergy:
    """``loss + T / 2 log |F + damping I|``, or with a prior ``loss + T / 2 log |I + lambda^2 F / T|``.

    The first is only good for differences between points with one damping and number of weights: its zero is where the
    determinant is 1. The second is finite for a singular F and zero above the loss where F is zero; with T = beta it is, but for
    ``beta ||w - c||^2 / (2 lambda^2)``, the Lagrangian ``E_Q loss + beta KL`` at its minimum.

    ``loss``         the mean loss at the point.
    ``temperature``  T; of SGD, proportional to learning rate / batch size.
    ``damping``      0 for F itself, which must then be regular: else -inf, with a FisherWarning.
    ``prior_scale``  lambda: a number, or {layer or parameter name: number}; instead of ``damping``.

    Shapes:   none beyond those of F.
    Scale:    units of the mean loss; F is a mean over samples.
    Errors:   ValueError unless exactly one of damping and prior_scale is given; for numbers that are not finite, a temperature
              or prior_scale not above zero, a negative damping, names that are not F's.
    Numerics: float64 sums, one block's eigenvalues at a time; log(1 + s) keeps its digits for small s.
    Source:   Proposition 2.8 of arXiv:1905.12213; with the prior, Proposition 2.5.
    """
    _arguments.check_fisher("free_energy", F)
    loss = _checks.number("free_energy", "loss", loss, "it is the mean loss at the point")
    temperature = _checks.positive("free_energy", "temperature", temperature, "of SGD it goes with learning rate / batch size")
    if (damping is None) == (prior_scale is None):
        raise ValueError(
            f"free_energy: must be given damping or prior_scale, got damping={damping!r} and prior_scale={prior_scale!r}; "
            "prior_scale is finite for a singular Fisher"
        )
    if prior_scale is not None:
        sums = _directions.sums_by_layer("free_energy", F, prior_scale, temperature, torch.log1p, price="temperature")
        logdet = math.fsum(sums.values())
        return FreeEnergy(loss, logdet, temperature, 0.0, prior_scale, F)
    damping = _checks.non_negative("free_energy", "damping", damping, "0 is F itself")
    return FreeEnergy(loss, F.logdet(damping), temperature, damping, None, F)


def escape_time(minimum: FreeEnergy, saddle: FreeEnergy, *, curvature: float) -> EscapeTime:
    """``2 pi / |lambda_1| exp((Fr(saddle) - Fr(minimum)) / T)``, Fr = loss + T / 2 log |det H|: the mean time, for T near 0.

    ``minimum``, ``saddle``  of one temperature. The determinants are those of the Hessian, at the saddle its absolute value. The
                             Fisher stands for it at a minimum that fits; at a saddle it has no negative direction, so there
                             give numbers: ``FreeEnergy(loss, log |det H|, T)``.
    ``curvature``            lambda_1, the Hessian's one negative eigenvalue at the saddle.

    Shapes:   numbers.
    Scale:    the time of ``dw = -grad L dt + sqrt(2 T) dW``; an SGD step is one learning rate of it.
    Errors:   ValueError for different temperatures, dampings or priors, determinants of zero, a saddle that is not above the
              minimum, a curvature that is not below zero.
    Numerics: the relative error of the formula is of order T; ``log_time`` is exact where ``time`` is too large for a float.
    Source:   Eyring 1935 and Kramers 1940, Proposition 2.8 of arXiv:1905.12213; proven by Bovier, Eckhoff, Gayrard and Klein 2004.
    """
    curvature = _checks.negative("escape_time", "curvature", curvature, "it is that of the way down")
    for name in ("temperature", "damping", "prior_scale"):
        if (low := getattr(minimum, name)) != (high := getattr(saddle, name)):
            raise ValueError(f"escape_time: {name} must be that of the minimum at the saddle, got {low!r} and {high!r}")
    for what, point in (("minimum", minimum), ("saddle", saddle)):
        _checks.positive("escape_time", f"{what}.temperature", point.temperature, "the formula is for small ones")
        _checks.number("escape_time", f"{what}.loss", point.loss, "it is the mean loss there")
        _checks.number("escape_time", f"{what}.logdet", point.logdet, "a flat direction needs damping, or a prior")
    if not saddle.loss > minimum.loss:
        raise ValueError(f"escape_time: the saddle must be above the minimum, got losses {saddle.loss:g} and {minimum.loss:g}")
    # Not through the free energies: their difference would lose the digits of the determinants where T is small.
    log_time = (saddle.loss - minimum.loss) / minimum.temperature + (saddle.logdet - minimum.logdet) / 2
    return EscapeTime(log_time + math.log(2 * math.pi / -curvature), curvature, minimum, saddle)
