# SPDX-License-Identifier: Apache-2.0
"""The rate-distortion curve of the page: what more or fewer nats would change in the loss, over prices around the chosen one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from fisherfast.fisher import Fisher, FisherWarning
from fisherfast.information import Information, RateDistortion, Weights
from fisherfast.information import rate_distortion as of_betas

FACTORS = tuple(10 ** (step / 2) for step in range(-6, 7))


def rate_distortion(
    F: Fisher, model: Weights, info: Information, *, center: Weights | None = None, factors: Sequence[float] = FACTORS
) -> RateDistortion:
    """``ff.rate_distortion`` at ``info.beta * factor`` for each factor, all else as in ``info``; a loss not known there counts as 0.

    Errors:   those of ``ff.rate_distortion``; ValueError if ``info`` has a center and none is given, or the other way round.
    """
    if info.centered != (center is not None):
        raise ValueError(
            f"rate_distortion: center must be that of info, got {'none' if center is None else 'one, info has none'}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FisherWarning)  # of parameters left out: said when info was made
        return of_betas(
            F,
            model,
            [info.beta * factor for factor in factors],
            prior_scale=info.prior_scale,
            center=center,
            variant=info.variant,
            loss=info.loss or 0.0,
        )
