# SPDX-License-Identifier: Apache-2.0
"""Regression: outputs are means."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from fisherfast import _random
from fisherfast._precision import wide
from fisherfast.likelihood._tensors import check_last, counted_only, digest, real_valued, tiled, unit_columns
from fisherfast.likelihood.protocol import Predictions


@dataclass(frozen=True, eq=False)
class Gaussian:
    """``y_k ~ N(z_k, sigma_k^2)``, independent, for each output k of a sample; ``sigma``: one number, or one per output.

    Outputs ``[N]``, ``[N, K]``, or ``[N, L, ...]`` of L positions; what lies at a position where the batch's attention mask
    ``[N, L]`` is zero is not counted. ``sigma`` as a tensor has the length of the last axis.

    Shapes:   targets like the output.
    Scale:    a sum over the outputs of a sample.
    Errors:   ValueError for shapes that do not fit, counted targets that are not finite, and sigma out of range.
    Numerics: in the output's dtype, or float32 for 16 bits; the score is rounded to the output's dtype at the end.
    Source:   the score of the normal distribution in its mean.
    """

    sigma: float | Tensor = 1.0

    def __post_init__(self) -> None:
        sigma = self.sigma
        if isinstance(sigma, Tensor):
            plain = sigma.dim() <= 1 and sigma.numel() > 0 and not sigma.is_complex()
            valid = plain and bool(((sigma > 0) & torch.isfinite(sigma)).all())
        else:
            valid = isinstance(sigma, Real) and 0 < sigma < math.inf
        if not valid:
            raise ValueError(f"gaussian: sigma must be positive and finite, one number or a tensor [K], got {sigma}")

    @property
    def name(self) -> str:
        """See ``Likelihood``."""
        if isinstance(self.sigma, Tensor) and self.sigma.dim():
            return f"gaussian(sigma={digest(self.sigma)})"
        return "gaussian" if self.sigma == 1.0 else f"gaussian(sigma={float(self.sigma)!r})"

    def predictions(self, output: Tensor, targets: Tensor | None, mask: Tensor | None, sample: Tensor) -> Predictions:
        """See ``Likelihood``."""
        check_last("gaussian", "sigma", self.sigma if isinstance(self.sigma, Tensor) else None, output)
        return real_valued(self.name, output, targets, mask, sample)

    def _sigma(self, values: Tensor) -> Tensor | float:
        return tiled(self.sigma, values) if isinstance(self.sigma, Tensor) else self.sigma

    def empirical(self, predictions: Predictions) -> Tensor:
        """See ``Likelihood``: ``(z - y) / sigma^2``."""
        assert predictions.targets is not None
        z = wide(predictions.values.detach())  # 16 bits would round the target, and lose a small residual
        return counted_only(predictions, (z - predictions.targets.to(z.dtype)) / self._sigma(z) ** 2)

    def losses(self, predictions: Predictions) -> Tensor:
        """See ``Likelihood``: ``(z - y)^2 / (2 sigma^2) + log sigma + log(2 pi) / 2``, added up."""
        assert predictions.targets is not None
        z = wide(predictions.values)
        sigma = torch.as_tensor(self._sigma(z), dtype=z.dtype, device=z.device)
        each = ((z - predictions.targets.to(z.dtype)) / sigma).square() / 2 + sigma.log() + math.log(2 * math.pi) / 2
        return each.masked_fill(~predictions.counted, 0.0).sum(1)

    def sampled(self, predictions: Predictions, seed: int, draw: int) -> Tensor:
        """See ``Likelihood``: ``- noise / sigma`` with standard normal noise."""
        noise = _random.normal(seed, *predictions.keys(), draw)
        return counted_only(predictions, -noise / self._sigma(noise))

    def num_columns(self, predictions: Predictions) -> int:
        """See ``Likelihood``: one per output of the sample that has most."""
        return predictions.most_counted()

    def columns(self, predictions: Predictions) -> Iterator[Tensor]:
        """See ``Likelihood``: ``e_k / sigma_k``."""
        z = wide(predictions.values.detach())
        yield from unit_columns(predictions, torch.ones_like(z) / self._sigma(z))
