# SPDX-License-Identifier: Apache-2.0
"""Weights and the noise on them while they are trained: a diagonal Gaussian, its divergence from the prior, draws from it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fisherfast import _checks
from fisherfast._names import listed
from fisherfast._precision import wide_dtype
from fisherfast.fisher.protocol import names_by_layer
from fisherfast.information import _prior, _series
from fisherfast.information._network import Weights, tensors
from fisherfast.information._prior import PriorScale

_START = 0.1  # the first std, in units of the weights or the prior, whichever is smaller


class DiagonalGaussian:
    """``Q = N(mean, diag(std^2))`` over the parameters of a model that ask for a gradient, and its prior.

    ``means`` are all of them; ``log_stds`` those with noise. A layer at its center has none under a fitted prior, whose best
    lambda is 0 there.
    """

    def __init__(
        self,
        caller: str,
        model: nn.Module,
        prior_scale: PriorScale,
        center: Weights | None,
        train_mean: bool,
    ) -> None:
        self._parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ValueError(f"{caller}: model must have a parameter that asks for a gradient, got none")
        self._centers = _centers(caller, self._parameters, center)
        self._layers = names_by_layer(self._parameters)
        self._distances = {name: _series.squared_distance(p, self._centers.get(name)) for name, p in self._parameters.items()}
        if bad := [name for name, distance in self._distances.items() if not math.isfinite(distance)]:
            raise ValueError(f"{caller}: weights must be finite, got NaN or infinity in {listed(bad)}")
        self._given = None if isinstance(prior_scale, str) else _prior.given(caller, prior_scale, self._layers, "model")
        self._train_mean = train_mean
        starts = {name: self._start(names, name) for names in self._layers.values() for name in names}
        self.log_stds = {
            name: torch.full_like(p, math.log(starts[name]), dtype=wide_dtype(p.dtype)).requires_grad_()
            for name, p in self._parameters.items()
            if starts[name]
        }
        if not self.log_stds:
            raise ValueError(f"{caller}: prior_scale must be a number where every layer is at its center, got 'fit'")
        self.means = {
            name: p.to(wide_dtype(p.dtype), copy=True).requires_grad_() if train_mean and name in self.log_stds else p.clone()
            for name, p in self._parameters.items()
        }

    def _start(self, layer: tuple[str, ...], name: str) -> float:
        """The std that training begins with; 0 for a parameter that has no noise."""
        rms = math.sqrt(math.fsum(self._distances[n] for n in layer) / max(1, self._size(layer)))
        if self._given is None:
            return _START * rms
        return _START * (min(rms, self._given[name]) if rms else self._given[name])

    @property
    def center_norm(self) -> float:
        """``||c||``."""
        return math.sqrt(math.fsum(_series.squared_distance(c, None) for c in self._centers.values()))

    def _size(self, layer: tuple[str, ...]) -> int:
        return sum(self._parameters[name].numel() for name in layer)

    def stds(self) -> dict[str, Tensor]:
        """The standard deviations, differentiable; zeros where there is no noise."""
        noisy = {name: log_std.exp() for name, log_std in self.log_stds.items()}
        return {
            name: noisy[name] if name in noisy else torch.zeros_like(p, dtype=wide_dtype(p.dtype))
            for name, p in self._parameters.items()
        }

    def weights(self, stds: Mapping[str, Tensor], elsewhere: set[str]) -> dict[str, Tensor]:
        """The weights to run the model with: a draw of all but those whose noise comes from ``elsewhere``."""

        def drawn(name: str, mean: Tensor) -> Tensor:
            quiet = name in elsewhere or name not in self.log_stds
            value = mean if quiet else mean + stds[name] * torch.randn_like(stds[name])
            return value.to(self._parameters[name].dtype)

        return {name: drawn(name, mean) for name, mean in self.means.items()}

    def scales(self, stds: Mapping[str, Tensor]) -> dict[str, float]:
        """Lambda by parameter: as given, or ``lambda^2 = (|mean - c|^2 + sum sigma^2) / k`` of each layer, 0 where it has no noise."""
        if self._given is not None:
            return self._given
        fitted: dict[str, float] = {}
        for layer in self._layers.values():
            noisy = [name for name in layer if name in self.log_stds]
            squares = math.fsum(float(self._squares(name, stds[name]).detach()) for name in noisy)
            fitted |= dict.fromkeys(layer, math.sqrt(squares / self._size(layer)) if noisy else 0.0)
        return fitted

    def kl(self, stds: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
        """``KL(Q || P) = sum_i (sigma_i^2 + d_i^2) / (2 lambda^2) - 1/2 - log(sigma_i / lambda)``, float64, differentiable.

        The derivative by a fitted lambda is zero at its optimum, so lambda may be a plain number.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, log_std in self.log_stds.items():
            scale = scales[name]
            logs = log_std.sum(dtype=torch.float64)
            total = total + self._squares(name, stds[name]) / (2 * scale**2) - logs + log_std.numel() * (math.log(scale) - 0.5)
        return total

    def _squares(self, name: str, std: Tensor) -> Tensor:
        """``sum sigma^2 + |mean - c|^2`` of one parameter."""
        if not self._train_mean:
            return std.square().sum(dtype=torch.float64) + self._distances[name]
        offset = self.means[name] - self._centers[name].to(self.means[name]) if name in self._centers else self.means[name]
        return (std.square() + offset.square()).sum(dtype=torch.float64)

    @property
    def device(self) -> torch.device:
        """The model's."""
        return next(iter(self._parameters.values())).device


def _centers(caller: str, parameters: Mapping[str, Tensor], center: Weights | None) -> dict[str, Tensor]:
    """The center by name, checked; empty for the center 0."""
    if center is None:
        return {}
    centers = tensors(caller, center)
    _checks.named(caller, "center", centers, parameters, "model")
    _checks.shaped(caller, "center", centers, {name: p.shape for name, p in parameters.items()}, "model")
    for name in parameters:
        _checks.real(caller, f"center[{name!r}]", centers[name])
    return {name: centers[name].detach().clone() for name in parameters}
