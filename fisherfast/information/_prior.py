# SPDX-License-Identifier: Apache-2.0
"""The prior's scale lambda for every parameter: given once, given by layer or parameter, or fitted by layer."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

from fisherfast import _checks
from fisherfast._names import listed
from fisherfast.fisher import Spectrum
from fisherfast.information import _series

GivenScale = float | Mapping[str, float]  # one number, or one per layer or parameter name
PriorScale = GivenScale | str  # or "fit"

LEAST, LARGEST = 1e-150, 1e150  # between them scales have squares
_MAX_STEPS = 100
_CONVERGED = 1e-11  # error of log lambda^2
_MIDDLE_SLOPE = 1.5  # of the slopes there are, 1 to 2


def checked(caller: str, prior_scale: PriorScale) -> PriorScale:
    """The prior scale with every number as a float. Errors: ValueError for a word other than "fit", and for scales out of range."""
    if isinstance(prior_scale, Mapping):
        return {name: checked_scale(caller, f"prior_scale[{name!r}]", value) for name, value in prior_scale.items()}
    if not isinstance(prior_scale, str):
        return checked_scale(caller, "prior_scale", prior_scale)
    if prior_scale != "fit":
        raise ValueError(f"{caller}: prior_scale must be a number, a mapping or 'fit', got {prior_scale!r}")
    return prior_scale


def checked_scale(caller: str, name: str, value: float) -> float:
    """``value`` as a prior scale. Errors: ValueError; says what to compute instead of an infinite one."""
    if isinstance(value, float) and value == math.inf:
        raise ValueError(
            f"{caller}: {name} must be finite, got inf; the information in the weights grows without bound with it "
            "and only differences of 0.5 * F.logdet(damping=...) between models of the same size are meaningful: compare those"
        )
    positive = _checks.positive(caller, name, value, "it is the standard deviation of the weights before training")
    if not LEAST < positive < LARGEST:
        raise ValueError(f"{caller}: {name} must be above {LEAST:g} and below {LARGEST:g}, which have squares, got {value!r}")
    return positive


def square_over(caller: str, scale: float, price: float, name: str) -> float:
    """``lambda^2 / price`` of a price that is called ``name``. Errors: ValueError if it, or twice that, overflows."""
    if price / 2 == 0 or scale**2 / price > sys.float_info.max / 4:
        raise ValueError(f"{caller}: prior_scale^2 / {name} must be finite, got {name} = {price} with {scale}")
    return scale**2 / price


def given(caller: str, prior_scale: GivenScale, layers: Mapping[str, Sequence[str]], of: str = "F") -> dict[str, float]:
    """Lambda by parameter name, from one number or a mapping of layer and parameter names; a parameter's own name wins."""
    layer_of = {name: layer for layer, members in layers.items() for name in members}
    if not isinstance(prior_scale, Mapping):
        return dict.fromkeys(layer_of, checked_scale(caller, "prior_scale", prior_scale))
    if unknown := set(prior_scale) - {*layer_of, *layers}:
        raise ValueError(
            f"{caller}: prior_scale must name layers or parameters of {of}, got {listed(unknown)}; layers: {listed(layers)}"
        )
    keys = {name: name if name in prior_scale else layer for name, layer in layer_of.items()}
    if missing := [name for name, key in keys.items() if key not in prior_scale]:
        raise ValueError(f"{caller}: prior_scale must cover every parameter, got none for {listed(missing)}")
    return {name: checked_scale(caller, f"prior_scale[{key!r}]", prior_scale[key]) for name, key in keys.items()}


def scale_in_words(prior_scale: PriorScale) -> str:
    """``0.1``, or how it was found."""
    if isinstance(prior_scale, str):
        return "fitted by layer"
    return "given by layer" if isinstance(prior_scale, Mapping) else f"{prior_scale:g}"


def in_words(prior_scale: PriorScale, centered: bool) -> str:
    """A prior scale and its center: ``0.1 around 0``."""
    return f"{scale_in_words(prior_scale)} around {'the given center' if centered else '0'}"


def of_block(caller: str, spectrum: Spectrum, scales: Mapping[str, float]) -> float:
    """The one lambda of a block's parameters. Errors: ValueError if they have several."""
    scale, *others = (scales[name] for name in spectrum.parameters)
    if any(other != scale for other in others):
        raise ValueError(
            f"{caller}: prior_scale must be one number for a block of F, got several for {list(spectrum.parameters)}; "
            "a diagonal Fisher has a block for every parameter"
        )
    return scale


def fitted(caller: str, spectra: Sequence[Spectrum], squared_distance: float, temperature: float) -> float:
    """The lambda of one layer that minimises the Lagrangian: the fixed point of ``lambda^2 = (||w - c||^2 + tr Sigma) / k``.

    With Sigma at its own optimum this reads ``lambda^2 sum_j u_j = ||w - c||^2``, u_j the share of direction j. The left
    side grows with lambda, so the solution is unique. Two limits carry no information: weights at their center (lambda =
    0), and a layer whose Fisher is zero (lambda = inf). A sample of the eigenvalues gives the first guess, so that few
    steps read all of them.
    """
    if squared_distance == 0:
        return 0.0
    log_distance = math.log(squared_distance)
    start = log_distance - math.log(sum(spectrum.num_parameters for spectrum in spectra)), _MIDDLE_SLOPE
    sampled = _solved(caller, [_series.thinned(spectrum) for spectrum in spectra], log_distance, temperature, *start)
    if not math.isfinite(sampled[0]):
        sampled = start
    log_square, _ = _solved(caller, [(spectrum, 1.0) for spectrum in spectra], log_distance, temperature, *sampled)
    return math.exp(log_square / 2)


def _solved(
    caller: str,
    spectra: Sequence[tuple[Spectrum, float]],
    log_distance: float,
    temperature: float,
    log_square: float,
    slope: float,
) -> tuple[float, float]:
    """``log lambda^2`` and the slope there, by the secant method from a guess of both; inf if every eigenvalue is zero.

    Each spectrum counts as often as said. In ``x = log lambda^2`` the equation is ``h(x) = x + log sum_j u_j - log
    ||w - c||^2 = 0``. With E the mean over j weighted by u_j, ``h' = 2 - E u`` and ``h'' = 2 E u^2 - E u - (E u)^2``, so that
    ``1 <= h' <= 2`` and ``|h''| <= 1/4``: steps contract, where the fixed-point iteration crawls on flat layers, and a
    secant's error is at most ``|h_n h_(n-1)| / 8``, that of any slope in this range ``|h_n|``.
    """
    previous = math.inf
    for _ in range(_MAX_STEPS):
        scale = math.exp(log_square) / temperature
        shares = math.fsum(times * _series.costs_and_shares(spectrum, scale)[1] for spectrum, times in spectra)
        if shares == 0:
            return math.inf, slope
        value = log_square + math.log(shares) - log_distance
        if math.isfinite(previous):
            slope = min(2.0, max(1.0, slope * (previous - value) / previous))  # the last step was previous / slope
        log_square -= value / slope
        if abs(value) * min(1.0, abs(previous) / 8) < _CONVERGED:
            return log_square, slope
        previous = value
    raise ValueError(
        f"{caller}: prior_scale must be a number for a beta this far from the Fisher's eigenvalues, got 'fit' at {temperature:g}"
    )
