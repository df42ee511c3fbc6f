# SPDX-License-Identifier: Apache-2.0
"""What a likelihood is asked for, and a batch as it sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

FISHER_TYPES = ("mc", "exact", "empirical")


@dataclass(frozen=True)
class Predictions:
    """A batch as its likelihood sees it.

    ``values``: part of the graph, sample axis first: logits ``[N, L, C]`` of L labels per sample, or outputs ``[N, K]``;
    ``targets``: ``[N, L]`` or ``[N, K]``, or None; ``counted``: bool, which labels exist, ``[N, L]`` or ``[N, K]``. What is not
    counted (padding, ignored labels) has no gradient, no random number and no backward pass of its own.
    ``sample``: the number of each sample in the whole run, ``[N]`` int64.
    """

    values: Tensor
    targets: Tensor | None
    counted: Tensor
    sample: Tensor

    @property
    def num_positions(self) -> int:
        """How many labels are counted in this batch."""
        return int(self.counted.sum())

    def detached(self) -> Predictions:
        """The same numbers outside the graph."""
        return replace(self, values=self.values.detach())

    def one(self, n: int) -> Predictions:
        """Sample n alone."""
        cut = slice(n, n + 1)
        targets = None if self.targets is None else self.targets[cut]
        return Predictions(self.values[cut], targets, self.counted[cut], self.sample[cut])

    def keys(self) -> tuple[Tensor, Tensor]:
        """Sample number and position among the counted ones, broadcast to ``[N, L]``: the keys of the counter-based random numbers."""
        position = (self.counted.cumsum(1) - 1).clamp_min(0)
        return self.sample.unsqueeze(1).expand_as(position), position

    def most_counted(self) -> int:
        """The number of labels of the sample that has most."""
        return int(self.counted.sum(1).max())

    def everywhere(self) -> Tensor:
        """``counted`` as a mask of ``values``, which it broadcasts to."""
        if self.counted.shape == self.values.shape[:2]:
            return self.counted.view(*self.counted.shape, *[1] * (self.values.dim() - 2))
        return self.counted.view(len(self.values), *[1] * (self.values.dim() - 1))  # one for all outputs of a sample

    def turns(self) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        """Each sample's first counted label, then each one's second, ...: their index ``(n, label)``, and which samples have one.

        One label of every sample a round: the gradients of different samples are independent, those of one sample's labels are not.
        """
        n = torch.arange(len(self.counted), device=self.counted.device)
        order = self.counted.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        for turn in range(self.most_counted()):
            yield (n, order[:, turn]), self.counted[n, order[:, turn]]


class Likelihood(Protocol):
    """What ``ff.fisher`` needs of ``p_w(y | x)``; every gradient is of the *negative* log-likelihood."""

    @property
    def name(self) -> str:
        """Stored with the result; results of different likelihoods do not pool. See ``stored_name``."""

    def predictions(self, output: Tensor, targets: Tensor | None, mask: Tensor | None, sample: Tensor) -> Predictions:
        """Bring output and targets to canonical form; ``mask`` is the batch's attention mask. Checks shapes and labels."""

    def empirical(self, predictions: Predictions) -> Tensor:
        """Gradient at ``values`` for the labels of the data."""

    def sampled(self, predictions: Predictions, seed: int, draw: int) -> Tensor:
        """Gradient at ``values`` for labels drawn from the model."""

    def losses(self, predictions: Predictions) -> Tensor:
        """``[N]``: each sample's ``-log p`` at the labels of the data, a part of the graph; ``empirical`` is its gradient."""

    def num_columns(self, predictions: Predictions) -> int:
        """How many backward passes the exact Fisher takes."""

    def columns(self, predictions: Predictions) -> Iterator[Tensor]:
        """Cotangents at ``values`` whose outer products sum to the Hessian of ``-log p`` at the output."""
