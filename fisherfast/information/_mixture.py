# SPDX-License-Identifier: Apache-2.0
"""A mixture of diagonal Gaussians in groups: a Gaussian is a training run, a group a data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfast import _checks
from fisherfast.fisher.lanczos import Estimate

_CHUNK = 1 << 20  # differences held at a time, draws x Gaussians x axes: 8 MiB


@dataclass(frozen=True, eq=False)
class Mixture:
    """Gaussians [M, d] with weights that sum to 1, and the group that each belongs to."""

    mean: Tensor
    variance: Tensor
    weight: Tensor
    group: Tensor

    @classmethod
    def of_runs(cls, caller: str, runs: Sequence[Sequence[tuple[float | Tensor, float | Tensor]]], pi: Tensor) -> Mixture:
        """Every data set's runs with equal parts of its weight. Errors: ValueError for what is not a diagonal Gaussian."""
        pairs = [pair for of_one in runs for pair in of_one]
        if wrong := [pair for pair in pairs if not (isinstance(pair, tuple | list) and len(pair) == 2)]:
            raise ValueError(
                f"{caller}: each data set must have a list of runs, each (mean, variance), numbers or tensors [d], got a run that is a "
                f"{type(wrong[0]).__name__}; of posteriors flatten and join .mean and .variance()"
            )
        mean, variance = (
            [_checks.float64(caller, "means and variances", pair[i]).detach().cpu().flatten() for pair in pairs] for i in range(2)
        )
        if len(shapes := {tuple(t.shape) for t in (*mean, *variance)}) > 1 or (0,) in shapes:
            raise ValueError(f"{caller}: means and variances must have one shape, numbers or [d], got {sorted(shapes)}")
        stacked = cls(
            torch.stack(mean),
            torch.stack(variance),
            torch.cat([(p / len(of_one)).repeat(len(of_one)) for p, of_one in zip(pi, runs, strict=True)]),
            torch.tensor([i for i, of_one in enumerate(runs) for _ in of_one]),
        )
        if not stacked.mean.isfinite().all():
            raise ValueError(f"{caller}: means must be finite, got NaN or infinity")
        if not (stacked.variance.isfinite() & (stacked.variance > 0)).all():
            raise ValueError(
                f"{caller}: variances must be finite and > 0, got others; a run without noise is a point of no density"
            )
        if (stacked.variance.sqrt() < torch.finfo(torch.float64).eps * stacked.mean.abs()).any():
            raise ValueError(
                f"{caller}: standard deviations must be above the rounding of their means, got smaller ones; subtract a mean that all "
                "runs share, or multiply weights that differ by more"
            )
        return stacked

    @property
    def dimension(self) -> int:
        """The number of axes d."""
        return self.mean.shape[1]

    def log_densities(self, w: Tensor) -> Tensor:
        """Of every Gaussian at every w [n, d]: ``[n, M]``."""
        squares = (w[:, None] - self.mean).mul_(self.variance.rsqrt()).square_().sum(2)
        return squares.add_(self.variance.log().sum(1) + self.dimension * math.log(2 * math.pi)).mul_(-0.5)

    def log_density(self, w: Tensor) -> Tensor:
        """Of the whole mixture at every w [n, d]."""
        return (self.log_densities(w) + self.weight.log()).logsumexp(1)

    def expectations(
        self, terms: Mapping[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]], samples: int, generator: torch.Generator
    ) -> dict[str, Estimate]:
        """``E term(w, log density of the Gaussian drawn from, of its group, of the mixture)``, for each term.

        As many w are drawn from each Gaussian, and weighted by it: the choice of the Gaussian adds nothing to the error.
        """
        values: dict[str, list[Tensor]] = {name: [] for name in terms}
        rows = max(1, _CHUNK // self.mean.numel())
        log_weight = self.weight.log()
        for chosen in range(len(self.mean)):
            members = (self.group == self.group[chosen]).nonzero()[:, 0]
            log_share = log_weight[members].logsumexp(0)
            noise = torch.randn((samples, self.dimension), dtype=torch.float64, device=generator.device, generator=generator)
            for w in (self.mean[chosen] + self.variance[chosen].sqrt() * noise).split(rows):
                each = self.log_densities(w)
                own = each[:, chosen].clone()
                each += log_weight
                of_group = each[:, members].logsumexp(1) - log_share
                marginal = each.logsumexp(1)
                for name, term in terms.items():
                    values[name].append(term(w, own, of_group, marginal))
        return {name: self._estimate(torch.cat(parts).view(-1, samples)) for name, parts in values.items()}

    def _estimate(self, values: Tensor) -> Estimate:
        """From ``[M, samples]``: the weighted mean, and its error within the Gaussians."""
        stderr = (self.weight.square() * values.var(1) / values.shape[1]).sum().sqrt()
        return Estimate(float(self.weight @ values.mean(1)), float(stderr))
