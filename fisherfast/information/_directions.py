# SPDX-License-Identifier: Apache-2.0
"""Sums over all directions of a Fisher, by layer, of functions of ``s = lambda^2 f / t``; lambda may differ between layers."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from fisherfast.fisher import Fisher
from fisherfast.information import _prior, _series
from fisherfast.information._prior import GivenScale


def sums_by_layer(
    caller: str, F: Fisher, prior_scale: GivenScale, temperature: float, term: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """``sum_j term(lambda^2 f_j / t)`` for each layer, in the order of F's parameters; one block's spectrum at a time."""
    layers = F.by_layer()
    scales = _prior.given(prior_scale, layers, caller)
    sums: dict[str, list[float]] = {layer: [] for layer in layers}
    for spectrum in F.spectra():
        scale = _prior.of_block(spectrum, scales, caller)
        sums[spectrum.layer] += _series.sum_over(spectrum, scale**2 / temperature, term)
    return {layer: math.fsum(parts) for layer, parts in sums.items()}
