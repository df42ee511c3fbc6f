# SPDX-License-Identifier: Apache-2.0
"""Several yes-or-no labels for each sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fisherfast import _random
from fisherfast._precision import wide
from fisherfast.likelihood._tensors import (
    check_last,
    check_weights,
    counted_only,
    digest,
    real_valued,
    tiled,
    unit_columns,
)
from fisherfast.likelihood.protocol import Predictions


@dataclass(frozen=True, eq=False)
class Bernoulli:
    """``y_k ~ Bernoulli(sigmoid(z_k))``, independent, for each output k of a sample; targets in [0, 1].

    Outputs ``[N, K]``, or ``[N, L, K]`` of L positions; what lies at a position where the batch's attention mask ``[N, L]`` is
    zero, and what has the target ``ignore_index``, is not counted. ``pos_weight`` (w, like the last axis or one number) makes
    the loss ``-w y log p - (1 - y) log(1 - p)``: for "empirical" only, as ``Categorical``'s settings.

    Shapes:   targets like the output.
    Scale:    a sum over the outputs of a sample.
    Errors:   ValueError for shapes that do not fit, targets outside [0, 1], and weights out of range.
    Numerics: in the output's dtype, or float32 for 16 bits; ``p - y`` keeps its relative precision where p is close to a target of 0 or 1.
    Source:   the score of the logistic.
    """

    ignore_index: float = -100.0
    pos_weight: Tensor | None = None

    def __post_init__(self) -> None:
        check_weights(self.name, "pos_weight", self.pos_weight, "[K] or []", (0, 1))

    @property
    def name(self) -> str:
        """See ``Likelihood``."""
        return "bernoulli"

    @property
    def loss_settings(self) -> str:
        """See ``stored_name``."""
        return "" if self.pos_weight is None else f"pos_weight={digest(self.pos_weight)}"

    def predictions(self, output: Tensor, targets: Tensor | None, mask: Tensor | None, sample: Tensor) -> Predictions:
        """See ``Likelihood``."""
        check_last(self.name, "pos_weight", self.pos_weight, output)
        predictions = real_valued(self.name, output, targets, mask, sample)
        if targets is None:
            return predictions
        predictions = replace(predictions, counted=predictions.counted & (predictions.targets != self.ignore_index))
        assert predictions.targets is not None
        y = predictions.targets[predictions.counted]
        if y.numel() and not bool(((y >= 0) & (y <= 1)).all()):
            raise ValueError(
                f"{self.name}: targets must lie in [0, 1] or be ignore_index = {self.ignore_index}, "
                f"got {float(y.min())} .. {float(y.max())}"
            )
        return predictions

    def empirical(self, predictions: Predictions) -> Tensor:
        """See ``Likelihood``: ``sigmoid(z) - y``."""
        assert predictions.targets is not None
        z = wide(predictions.values.detach())  # 16 bits would round the target, and lose a small residual
        y = predictions.targets.to(z.dtype)
        w = 1.0 if self.pos_weight is None else tiled(self.pos_weight, z)
        return counted_only(predictions, (1 - y) * z.sigmoid() - w * y * (-z).sigmoid())

    def losses(self, predictions: Predictions) -> Tensor:
        """See ``Likelihood``: ``-w y log p - (1 - y) log(1 - p)``, added up."""
        assert predictions.targets is not None
        z = wide(predictions.values)
        y = predictions.targets.masked_fill(~predictions.counted, 0).to(z.dtype)
        w = 1.0 if self.pos_weight is None else tiled(self.pos_weight, z)
        # A label of no share costs nothing, also where its log p is -inf: 0 * inf would be NaN.
        ones = torch.where(y == 0, 0.0, -w * y * logsigmoid(z))
        each = ones + torch.where(y == 1, 0.0, (y - 1) * logsigmoid(-z))
        return each.masked_fill(~predictions.counted, 0.0).sum(1)

    def sampled(self, predictions: Predictions, seed: int, draw: int) -> Tensor:
        """See ``Likelihood``: ``sigmoid(z) - y`` with ``y = [u < sigmoid(z)]``."""
        z = predictions.values.detach().double()
        y = _random.uniform(seed, *predictions.keys(), draw) < z.sigmoid()
        return counted_only(predictions, torch.where(y, -(-z).sigmoid(), z.sigmoid()))

    def num_columns(self, predictions: Predictions) -> int:
        """See ``Likelihood``: one per output of the sample that has most."""
        return predictions.most_counted()

    def columns(self, predictions: Predictions) -> Iterator[Tensor]:
        """See ``Likelihood``: ``sqrt(p_k (1 - p_k)) e_k``."""
        z = predictions.values.detach().double()
        yield from unit_columns(predictions, (z.sigmoid() * (-z).sigmoid()).sqrt())
