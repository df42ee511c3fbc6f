# SPDX-License-Identifier: Apache-2.0
"""Mean and variance of the sample gradients, and the gradient noise scale: the batch size beyond which a step gains little."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from fisherfast.accumulator import Accumulator
from fisherfast.fisher import pooling, serialize
from fisherfast.fisher.counts import Counts, Measured
from fisherfast.fisher.engine import Engine
from fisherfast.fisher.request import Needs, Request


@dataclass(frozen=True)
class GradientMoments(Request["SampleMoments"]):
    """Ask for mean and variance of the sample gradients, and the gradient noise scale; see the result, ``SampleMoments``.

    Labels of the data or drawn ones. The exact Fisher has no sample gradients: its passes are columns of a square root of
    the output Hessian, whose squares mean something and whose sum does not.
    """

    @property
    def needs(self) -> Needs:
        """See ``Request``."""
        return Needs(squares=True, totals=True)

    def check(self, fisher_type: str | None) -> None:
        """See ``Request``."""
        if fisher_type == "exact":
            raise ValueError(
                "GradientMoments: fisher_type must be 'empirical' or 'mc', got 'exact'; its backward passes are columns of a square "
                "root, not gradients of labels. Over all labels the mean is zero and the second moment is ff.Diagonal()"
            )

    def result(self, engine: Engine, counts: Counts) -> SampleMoments:
        """See ``Request``."""
        return SampleMoments(
            {name: running.snapshot() for name, running in engine.totals.items()},
            {name: running.snapshot() for name, running in engine.squares.items()},
            engine.squared_weights,
            counts,
        )

    def restore(self, engine: Engine, before: SampleMoments) -> None:
        """See ``Request``."""
        engine.restore_squares(before.squares)
        engine.restore_totals(before.totals, before.squared_weights)


@serialize.storable("sample-moments")
class SampleMoments(Measured):
    """Moments of the sample gradients ``s_n`` (of the negative log-likelihood): what ``ff.GradientMoments()`` gives.

    With ``W = sum w``, ``V = sum w^2`` (no weights: both N), ``m`` the weighted mean::

        variance    = sum w (s - m)^2 / (W - V / W)            per coordinate, unbiased: N - 1 without weights
        noise       = tr Sigma = the sum of the variance
        signal      = |m|^2 - tr Sigma V / W^2                  |G|^2 of the true gradient, unbiased
        noise_scale = noise / signal

    With drawn labels (``"mc"``) each draw is a sample gradient of its own, of weight ``w / draws``; its expectation is zero
    for every input, so the mean is noise, the variance is the Fisher's diagonal, and there is no noise scale.

    Shapes:   mean, variance: {parameter name: tensor shaped like the parameter}.
    Scale:    of one sample's gradient: independent of batch size and loss reduction.
    Errors:   ValueError below two sample gradients, for pooling what was measured in different ways, and for the noise
              scale of drawn labels.
    Numerics: float64 sums; squares and gradients within a batch in float32, so a coordinate whose standard deviation is below
              about 1e-3 of its mean has no digits of its variance.
    Source:   McCandlish, Kaplan, Amodei 2018 (arXiv:1812.06162), "simple noise scale", and its appendix A with batches of 1
              and N samples.
    """

    structure: ClassVar[str]

    def __init__(
        self,
        totals: Mapping[str, Accumulator],
        squares: Mapping[str, Accumulator],
        squared_weights: Mapping[str, float],
        counts: Counts,
    ) -> None:
        self.totals, self.squares, self.squared_weights = dict(totals), dict(squares), dict(squared_weights)
        self.shapes, self._counts = {name: total.shape for name, total in self.totals.items()}, counts

    def mean(self, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """``{name: mean sample gradient}``."""
        return {name: total.mean(dtype) for name, total in self.totals.items()}

    def variance(self, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """``{name: unbiased variance of each coordinate of the sample gradients}``."""
        return {name: self._variance(name).to(dtype) for name in self.names}

    def _variance(self, name: str) -> Tensor:
        W, V = self.totals[name].weight, self.squared_weights[name]
        if W * W - V <= 1e-12 * W * W:
            raise ValueError(
                f"variance: {name!r} must have at least two sample gradients with a weight > 0, got fewer; measure more samples"
            )
        mean = self.totals[name].mean()
        return (self.squares[name].sum - W * mean.square()).clamp_min_(0) / (W - V / W)

    def noise(self) -> float:
        """``tr Sigma``: the mean squared distance of a sample gradient from the true gradient."""
        return math.fsum(float(self._variance(name).sum()) for name in self.names)

    def signal(self) -> float:
        """``|G|^2`` of the true gradient, without the share of the noise in ``|mean|^2``; below zero where noise hides it."""
        parts = []
        for name in self.names:
            share = self.squared_weights[name] / self.totals[name].weight ** 2
            parts += [float(self.totals[name].mean().square().sum()), -share * float(self._variance(name).sum())]
        return math.fsum(parts)

    def noise_scale(self) -> float:
        """``tr Sigma / |G|^2``: about the batch size above which more samples a step stop helping; inf if ``signal() <= 0``."""
        if self.provenance.fisher_type == "mc":
            raise ValueError(
                "noise_scale: fisher_type must be 'empirical', got 'mc'; the gradient of labels drawn from the model has "
                "expectation zero, so there is no signal to compare with"
            )
        signal = self.signal()
        return self.noise() / signal if signal > 0 else math.inf

    def _pooled(self, other: SampleMoments) -> SampleMoments:
        return SampleMoments(
            {name: total + other.totals[name] for name, total in self.totals.items()},
            {name: square + other.squares[name] for name, square in self.squares.items()},
            {name: value + other.squared_weights[name] for name, value in self.squared_weights.items()},
            self._counts.pooled(other._counts),
        )

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> SampleMoments:
        """Pool the data of all ranks of ``group``, in place on every rank; returns self. ``coverage`` stays the rank's own.

        Errors: ValueError on every rank alike, before anything is added, if the ranks measured different things.
        """
        names = sorted(self.names)
        device = self.totals[names[0]].device
        pooling.check_ranks(self._identity(), group, device)
        for name in names:
            self.totals[name].all_reduce(group)
            self.squares[name].all_reduce(group)
        sums = torch.tensor([self.squared_weights[name] for name in names], dtype=torch.float64, device=device)
        dist.all_reduce(sums, group=group)
        self.squared_weights = dict(zip(names, sums.tolist(), strict=True))
        self._counts = self._counts.reduced(group, device)
        return self

    def state(self) -> serialize.State:
        """See ``serialize.Storable``."""
        tensors = {f"total.{name}": total.stored() for name, total in self.totals.items()}
        tensors |= {f"square.{name}": square.stored() for name, square in self.squares.items()}
        weights = {name: [self.totals[name].weight, self.squared_weights[name]] for name in self.names}
        return tensors, {**self._counts.state(), "weights": weights}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> SampleMoments:
        """The object whose ``state`` this is."""
        weights = fields["weights"]
        return cls(
            {name: Accumulator(tensors[f"total.{name}"], W) for name, (W, _) in weights.items()},
            {name: Accumulator(tensors[f"square.{name}"], W) for name, (W, _) in weights.items()},
            {name: V for name, (_, V) in weights.items()},
            Counts.from_state(fields),
        )

    def __repr__(self) -> str:
        return (
            f"SampleMoments({len(self.names)} tensors, {self.num_samples:,} samples, fisher_type={self.provenance.fisher_type!r})"
        )
