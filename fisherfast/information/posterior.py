# SPDX-License-Identifier: Apache-2.0
"""The noise that trained weights tolerate, as a distribution to draw from: ``Q = N(w, Sigma)`` at its optimum."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fisherfast import _checks
from fisherfast._names import listed
from fisherfast._precision import wide, wide_dtype
from fisherfast.fisher import Fisher
from fisherfast.information._network import Weights, tensors
from fisherfast.information._prior import PriorScale
from fisherfast.information.result import Information
from fisherfast.information.weights import information_at_betas

_LEAST = 1e-60  # damping of draws in float32


class GaussianPosterior(ABC):
    """``Q = N(mean, Sigma)`` over weights by name: what ``expected_loss`` needs, for any Sigma from any source.

    ``mean`` is {parameter name: tensor}; a parameter of the model that is not in it has no noise.
    """

    mean: Mapping[str, Tensor]

    @property
    @abstractmethod
    def kl(self) -> float:
        """``KL(Q || P)`` in nats."""

    @property
    @abstractmethod
    def beta(self) -> float:
        """The price of a nat that Q was found at, in units of the mean loss."""

    @property
    def likelihood(self) -> str | None:
        """The name of the likelihood whose loss Q was found for; None where that is not known."""
        return None

    @abstractmethod
    def variance(self) -> dict[str, Tensor]:
        """The variance of each weight, given the others: ``1 / (Sigma^-1)_ii``, shaped like the parameters."""

    @abstractmethod
    def conditions(self) -> str:
        """Everything Q depends on, in one line."""

    @abstractmethod
    def _noise(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        """One draw from ``N(0, Sigma)``, in float32 or wider."""

    @torch.no_grad()
    def draws(self, n: int, *, generator: torch.Generator | None = None, seed: int | None = None) -> Iterator[dict[str, Tensor]]:
        """``n`` draws of all weights, one after the other: one is in memory at a time. See ``sample``."""
        n = _checks.integer("posterior.draws", "n", n, 0)
        if generator is not None and seed is not None:
            raise ValueError(f"posterior.draws: generator or seed must be None, got both (seed {seed}); pass one")
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
        for _ in range(n):
            noise = self._noise(generator)
            yield {name: wide(mean) + noise[name].to(mean.device) for name, mean in self.mean.items()}

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None, seed: int | None = None) -> dict[str, Tensor]:
        """``n`` draws from Q, ``{name: [n, *shape]}``: those of ``draws``, which keeps one at a time.

        Shapes:   a draw is shaped like the parameter.
        Errors:   ValueError for a negative n, for a generator and a seed at once, and where Sigma is unbounded.
        Numerics: float32, or float64 for weights in float64; the same seed gives the same draws. Without generator and seed
                  torch's global generator is used.
        """
        each = list(self.draws(n, generator=generator, seed=seed))
        empty = {name: mean.new_zeros((0, *mean.shape), dtype=wide_dtype(mean.dtype)) for name, mean in self.mean.items()}
        return {name: torch.stack([draw[name] for draw in each]) if each else empty[name] for name in self.mean}


@dataclass(frozen=True, eq=False)
class Posterior(GaussianPosterior):
    """The optimal ``Q = N(w, Sigma)``; made by ``optimal_posterior``, which says what Sigma is."""

    mean: Mapping[str, Tensor] = field(repr=False)
    information: Information

    @classmethod
    def of(cls, information: Information, model: Weights) -> Posterior:
        """Around the weights of ``model`` as they are now, for nats that are known."""
        weights = tensors("optimal_posterior", model)
        return cls({name: weights[name].detach().clone() for name in information.fisher.names}, information)

    @property
    def kl(self) -> float:
        """``KL(Q || P)`` in nats, at the Sigma of this variant."""
        return self.information.kl

    @property
    def beta(self) -> float:
        """The price of a nat, in units of the mean loss."""
        return self.information.beta

    @property
    def likelihood(self) -> str | None:
        """The name of the Fisher's likelihood; None where that is not known."""
        return self.information.fisher.provenance.likelihood

    def variance(self) -> dict[str, Tensor]:
        """``t / (f_ii + t / lambda^2)``: the variance of each weight given the others; of a diagonal Fisher, that of Sigma.

        Between weights that Sigma correlates, the variance over all draws is larger: ``.sample(n)`` has it.

        Shapes:   like the parameters.
        Numerics: float64; 0 and infinity at the limits of a fitted prior.
        """
        return self.information.posterior_variance()

    def conditions(self) -> str:
        """Everything Q depends on, in one line."""
        return self.information.conditions()

    def _noise(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        info = self.information
        if unbounded := [name for name, scale in info.prior_scales.items() if scale == math.inf]:
            raise ValueError(
                f"posterior.sample: Sigma must be bounded, but the Fisher of {listed(unbounded)} is zero and prior_scale='fit' has no "
                "largest value there; give prior_scale as a number, or leave these parameters out of the Fisher"
            )
        t = info.temperature
        # A fitted scale of 0 leaves no noise at all: any regular damping will do, since its draws are multiplied by 0.
        dampings = {name: t / scale**2 if scale else 1.0 for name, scale in info.prior_scales.items()}
        # A draw of a flat direction is 1 / sqrt(damping) before it is scaled, which may not fit float32.
        needed = min(dampings.values(), default=1.0) < _LEAST or any(mean.dtype == torch.float64 for mean in self.mean.values())
        dtype = torch.float64 if needed else torch.float32
        draw = info.fisher.sample(1, damping=dampings, generator=generator, dtype=dtype)
        factors = {name: math.sqrt(t) if scale else 0.0 for name, scale in info.prior_scales.items()}
        return {name: draw[name][0].mul_(factors[name]).to(wide_dtype(mean.dtype)) for name, mean in self.mean.items()}


@torch.no_grad()
def optimal_posterior(
    F: Fisher,
    model: Weights,
    *,
    prior_scale: PriorScale,
    beta: float,
    center: Weights | None = None,
    variant: str = "exact",
) -> Posterior:
    """``Q = N(w, Sigma)``, ``Sigma = t (F + t / lambda^2 I)^-1``, t = beta (exact) or beta / 2 (as printed).

    The Gaussian around the trained weights that minimises ``E_Q loss + beta KL(Q || P)`` to second order: the noise that
    the weights tolerate when a nat is worth ``beta`` of mean loss. Its KL is the information in the weights.

    The arguments are those of ``information_in_weights``, whose result is ``.information``. With ``prior_scale="fit"`` a layer
    whose weights are at the center has no noise (lambda = 0); one whose Fisher is zero has no bound (lambda = inf), and
    drawing from it is refused.

    Shapes:   ``.mean`` and ``.variance()`` like the parameters; ``.sample(n)`` ``{name: [n, *shape]}``.
    Scale:    F is a mean over samples and beta goes with a mean loss; Sigma is in squared units of weight.
    Errors:   those of ``information_in_weights``; ValueError from ``.sample`` where Sigma is unbounded.
    Numerics: as F's ``sample`` and ``information_in_weights``. ``.mean`` is a copy: what becomes of the model later does
              not change it.
    Source:   Proposition 2.5 of Achille, Paolini and Soatto (arXiv:1905.12213).
    """
    (info,) = information_at_betas(
        "optimal_posterior", F, model, (beta,), prior_scale=prior_scale, center=center, variant=variant
    )
    return Posterior.of(info, model)
