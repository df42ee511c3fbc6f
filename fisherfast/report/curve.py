# SPDX-License-Identifier: Apache-2.0
"""The rate-distortion curve: what more or fewer nats would change in the loss, over prices around the chosen one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from fisherfast.fisher import Fisher, FisherWarning
from fisherfast.information import Information, information_in_weights
from fisherfast.information.weights import Weights

FACTORS = tuple(10 ** (step / 2) for step in range(-6, 7))


@dataclass(frozen=True)
class Curve:
    """``nats`` is the rate ``KL(Q || P)``, ``rises`` the distortion ``1/2 tr(F Sigma)``, both for each of ``betas``."""

    betas: tuple[float, ...]
    nats: tuple[float, ...]
    rises: tuple[float, ...]


def rate_distortion(
    F: Fisher, model: Weights, info: Information, *, center: Weights | None = None, factors: Sequence[float] = FACTORS
) -> Curve:
    """``KL(Q || P)`` and ``1/2 tr(F Sigma)`` at ``beta * factor`` for each factor, all else as in ``info``.

    A prior that ``info`` fitted by layer is fitted anew for every beta.

    Shapes:   three tuples as long as ``factors``.
    Scale:    nats, and nats of the mean loss.
    Errors:   those of ``information_in_weights``; ValueError if ``info`` has a center and none is given, or the other way round.
    Numerics: as ``information_in_weights``.
    Source:   Definition 2.1 of arXiv:1905.12213.
    """
    if info.centered != (center is not None):
        raise ValueError(
            f"rate_distortion: center must be that of info, got {'none' if center is None else 'one, info has none'}"
        )
    points = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FisherWarning)  # of parameters left out: said when info was made
        for factor in factors:
            at = information_in_weights(
                F, model, prior_scale=info.prior_scale, beta=info.beta * factor, center=center, variant=info.variant
            )
            dimension = math.fsum(layer.effective_dimension for layer in at.layers.values())
            points.append((at.beta, at.kl, at.temperature / 2 * dimension))
    betas, nats, rises = zip(*points, strict=True)
    return Curve(betas, nats, rises)
