# SPDX-License-Identifier: Apache-2.0
"""Sums over all directions of a Fisher, by layer, of functions of ``s = lambda^2 f / t``; lambda may differ between layers."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from fisherfast._names import listed
from fisherfast.fisher import Fisher
from fisherfast.information import _arguments, _prior, _series
from fisherfast.information._prior import GivenScale


def sums_by_layer(
    caller: str, F: Fisher, prior_scale: GivenScale, temperature: float, term: Callable[[Tensor], Tensor], price: str = "beta"
) -> dict[str, float]:
    """``sum_j term(lambda^2 f_j / t)`` for each layer, in the order of F's parameters; one block's spectrum at a time. ``price``: what t is called."""
    _arguments.check_fisher(caller, F)
    layers = {name: layer.parameters for name, layer in F.by_layer().items()}
    scales = _prior.given(caller, prior_scale, layers)
    sums: dict[str, list[float]] = {layer: [] for layer in layers}
    for spectrum in F.spectra():
        scale = _prior.of_block(caller, spectrum, scales)
        ratio = _prior.square_over(caller, scale, temperature, price)
        sums[spectrum.layer] += _series.sum_over(spectrum, ratio, term)
    totals = {layer: math.fsum(parts) for layer, parts in sums.items()}
    if bad := [layer for layer, total in totals.items() if not math.isfinite(total)]:
        raise ValueError(
            f"{caller}: prior_scale^2 f / {price} must be finite for every eigenvalue f, got others in {listed(bad)}"
        )
    return totals
