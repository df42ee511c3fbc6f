# SPDX-License-Identifier: Apache-2.0
"""Likelihoods: what ``p_w(y | x)`` is, given the network's output.

The one idea: every kind of Fisher is a set of gradients *at the output*. For a likelihood with natural parameters z, the
score of a label y at z is known in closed form, so no loss is built: labels of the data, labels drawn from the model and
the columns of a square root of the output Hessian all become cotangents of z, and backward passes do the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fisherfast import _random

FISHER_TYPES = ("mc", "exact", "empirical")


@dataclass(frozen=True)
class Predictions:
    """A batch as its likelihood sees it.

    ``values``: part of the graph, sample axis first: logits ``[N, L, C]`` of L labels per sample, or outputs ``[N, K]``;
    ``targets``: ``[N, L]`` or ``[N, K]``, or None; ``counted``: bool, which labels exist, ``[N, L]`` or ``[N, K]``;
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
        """Sample number and position among the counted ones, broadcast to ``[N, L]``: what random numbers hang on."""
        position = (self.counted.cumsum(1) - 1).clamp_min(0)
        return self.sample.unsqueeze(1).expand_as(position), position


class Likelihood(Protocol):
    """What ``ff.fisher`` needs of ``p_w(y | x)``; every gradient is of the *negative* log-likelihood."""

    @property
    def name(self) -> str:
        """Stored with the result; results of different likelihoods do not pool."""

    def predictions(self, output: Tensor, targets: Tensor | None, mask: Tensor | None, sample: Tensor) -> Predictions:
        """Bring output and targets to canonical form; ``mask`` is the batch's attention mask. Checks shapes and labels."""

    def empirical(self, predictions: Predictions) -> Tensor:
        """Gradient at ``values`` for the labels of the data."""

    def sampled(self, predictions: Predictions, seed: int, draw: int) -> Tensor:
        """Gradient at ``values`` for labels drawn from the model."""

    def num_columns(self, predictions: Predictions) -> int:
        """How many backward passes the exact Fisher takes."""

    def columns(self, predictions: Predictions) -> Iterator[Tensor]:
        """Cotangents at ``values`` whose outer products sum to the Hessian of ``-log p`` at the output."""


def _batch_mismatch(name: str, output: Tensor, targets: Tensor) -> ValueError:
    return ValueError(
        f"{name}: targets do not fit the output, got targets {tuple(targets.shape)} and output {tuple(output.shape)}"
    )


@dataclass(frozen=True)
class Categorical:
    """``y ~ softmax(z)``, one label per sample (``[N, C]``) or several (``[N, L, C]``).

    The log-likelihood of a sample is the sum over its counted labels: those that differ from ``ignore_index``; without
    labels those where the attention mask is not zero; else all. Class axis last unless ``axis`` says otherwise.
    """

    axis: int = -1
    ignore_index: int = -100

    @property
    def name(self) -> str:
        """See ``Likelihood``."""
        return "categorical"

    def predictions(self, output: Tensor, targets: Tensor | None, mask: Tensor | None, sample: Tensor) -> Predictions:
        """See ``Likelihood``."""
        N = output.shape[0]
        if output.dim() < 2:
            raise ValueError(f"{self.name}: output must be [N, C] or [N, L, C], got {tuple(output.shape)}; add the class axis")
        if self.axis == -1 and output.dim() > 3:
            raise ValueError(
                f"{self.name}: the class axis of an output {tuple(output.shape)} is ambiguous; say which with "
                "likelihood=ff.Categorical(axis=1) (images) or ff.Categorical(axis=3)"
            )
        if targets is not None and targets.is_floating_point():
            raise ValueError(
                f"{self.name}: targets must be class indices (integers), got {targets.dtype}; use 'gaussian' or 'bernoulli'"
            )
        values = output.movedim(self.axis, -1)
        labels = values.shape[:-1]
        if targets is not None and targets.shape != labels:
            error = _batch_mismatch(self.name, output, targets)
            error.add_note("A class axis that is not last is given by likelihood=ff.Categorical(axis=...)")
            raise error
        values = values.reshape(N, -1, values.shape[-1])
        counted = self._counted(targets, mask, labels, values)
        if targets is not None:
            targets = targets.reshape(N, -1)
            self._check_range(targets[counted], values.shape[-1])
        return Predictions(values, targets, counted, sample)

    def _counted(self, targets: Tensor | None, mask: Tensor | None, labels: torch.Size, values: Tensor) -> Tensor:
        if targets is not None:
            return (targets != self.ignore_index).reshape(values.shape[:2])
        if mask is not None and mask.shape == labels:
            return (mask != 0).reshape(values.shape[:2])
        return torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)

    def _check_range(self, labels: Tensor, C: int) -> None:
        if labels.numel() and not bool(((labels >= 0) & (labels < C)).all()):
            raise ValueError(
                f"{self.name}: labels must lie in [0, C = {C}) or be ignore_index = {self.ignore_index}, "
                f"got {int(labels.min())} .. {int(labels.max())}"
            )

    def _score(self, predictions: Predictions, labels: Tensor) -> Tensor:
        # In place on the probabilities: p - e_y, zero where nothing is counted.
        score = predictions.values.softmax(-1, dtype=_wide(predictions.values))
        score.scatter_add_(-1, labels.unsqueeze(-1), score.new_full((), -1.0).expand(*labels.shape, 1))
        if not bool(predictions.counted.all()):
            score.mul_(predictions.counted.unsqueeze(-1))
        return score.to(predictions.values.dtype)

    def empirical(self, predictions: Predictions) -> Tensor:
        """See ``Likelihood``: ``p - e_y``."""
        assert predictions.targets is not None
        return self._score(predictions, predictions.targets.where(predictions.counted, 0))

    def sampled(self, predictions: Predictions, seed: int, draw: int) -> Tensor:
        """See ``Likelihood``: one uniform number a label, inverse CDF by a running sum in float64."""
        u = _random.uniform(seed, *predictions.keys(), draw)
        labels = torch.empty_like(u, dtype=torch.int64)
        C = predictions.values.shape[-1]
        rows, flat_u, flat = predictions.values.reshape(-1, C), u.reshape(-1, 1), labels.view(-1)
        step = max(1, 2**20 // C)  # a bounded workspace: the float64 running sum is never [N, L, C]
        for start in range(0, len(rows), step):
            cut = slice(start, start + step)
            cdf = rows[cut].softmax(-1, dtype=_wide(rows)).cumsum(-1, dtype=torch.float64)
            flat[cut] = torch.searchsorted(cdf, flat_u[cut] * cdf[:, -1:], right=True).squeeze(-1).clamp_max_(C - 1)
        return self._score(predictions, labels)

    def num_columns(self, predictions: Predictions) -> int:
        """See ``Likelihood``: ``L (C - 1)``; positions are never seeded together."""
        return predictions.values.shape[1] * (predictions.values.shape[2] - 1)

    def columns(self, predictions: Predictions) -> Iterator[Tensor]:
        """See ``Likelihood``: column k is ``sqrt(p_k r_{k+1} / r_k) (e_k - sum_{j>k} p_j e_j / r_{k+1})``, r the tail sums."""
        values = predictions.values
        _, L, C = values.shape
        p = values.softmax(-1, dtype=torch.float64)
        r = p.flip(-1).cumsum(-1).flip(-1)
        for position in range(L):
            keep = predictions.counted[:, position, None]
            for k in range(C - 1):
                tail = r[:, position, k + 1, None]
                column = torch.zeros_like(p[:, position])
                column[:, k + 1 :] = -p[:, position, k + 1 :] / tail.clamp_min(torch.finfo(p.dtype).tiny)
                column[:, k] = 1.0
                column *= (p[:, position, k, None] * tail / r[:, position, k, None]).nan_to_num(0.0).sqrt() * keep
                cotangent = torch.zeros_like(values)
                cotangent[:, position] = column.to(values.dtype)
                yield cotangent


@dataclass(frozen=True)
class CausalLM(Categorical):
    """``Categorical`` with the shift of a causal language model: the output at position t predicts token t + 1.

    For Hugging Face's dict batches: position t counts if ``labels[t+1] != ignore_index``; without labels, if
    ``attention_mask[t+1]`` is set; the last position never does.
    """

    @property
    def name(self) -> str:
        """See ``Likelihood``."""
        return "causal_lm"

    def predictions(self, output: Tensor, targets: Tensor | None, mask: Tensor | None, sample: Tensor) -> Predictions:
        """See ``Likelihood``."""
        if output.dim() != 3:
            raise ValueError(f"{self.name}: output must be logits [N, T, V], got {tuple(output.shape)}")
        if targets is not None and targets.shape != output.shape[:2]:
            raise _batch_mismatch(self.name, output, targets)
        if targets is None:
            known = torch.ones(output.shape[:2], dtype=torch.bool, device=output.device) if mask is None else mask != 0
            targets_or_mask = torch.where(known, 0, self.ignore_index)
        else:
            targets_or_mask = targets
        shifted = torch.full_like(targets_or_mask, self.ignore_index)
        shifted[:, :-1] = targets_or_mask[:, 1:]
        predictions = super().predictions(output, shifted, None, sample)
        return predictions if targets is not None else replace(predictions, targets=None)


@dataclass(frozen=True)
class Bernoulli:
    """``y_k ~ Bernoulli(sigmoid(z_k))``, independent, for each output k of a sample."""

    @property
    def name(self) -> str:
        """See ``Likelihood``."""
        return "bernoulli"

    def predictions(self, output: Tensor, targets: Tensor | None, mask: Tensor | None, sample: Tensor) -> Predictions:
        """See ``Likelihood``."""
        predictions = _real_valued(self.name, output, targets, sample)
        y = predictions.targets
        if y is not None and not bool(((y >= 0) & (y <= 1)).all()):
            raise ValueError(f"{self.name}: targets must lie in [0, 1], got {float(y.min())} .. {float(y.max())}")
        return predictions

    def empirical(self, predictions: Predictions) -> Tensor:
        """See ``Likelihood``: ``sigmoid(z) - y``."""
        assert predictions.targets is not None
        return predictions.values.sigmoid() - predictions.targets.to(predictions.values.dtype)

    def sampled(self, predictions: Predictions, seed: int, draw: int) -> Tensor:
        """See ``Likelihood``: ``sigmoid(z) - y`` with ``y = [u < sigmoid(z)]``."""
        p = predictions.values.double().sigmoid()
        y = _random.uniform(seed, *predictions.keys(), draw) < p
        return (p - y.double()).to(predictions.values.dtype)

    def num_columns(self, predictions: Predictions) -> int:
        """See ``Likelihood``: one per output."""
        return predictions.values.shape[1]

    def columns(self, predictions: Predictions) -> Iterator[Tensor]:
        """See ``Likelihood``: ``sqrt(p_k (1 - p_k)) e_k``."""
        p = predictions.values.double().sigmoid()
        yield from _unit_columns((p * (1 - p)).sqrt().to(predictions.values.dtype))


@dataclass(frozen=True)
class Gaussian:
    """``y_k ~ N(z_k, sigma^2)``, independent, for each output k of a sample."""

    sigma: float = 1.0

    def __post_init__(self) -> None:
        if not (self.sigma > 0 and math.isfinite(self.sigma)):
            raise ValueError(f"gaussian: sigma must be positive and finite, got {self.sigma}")

    @property
    def name(self) -> str:
        """See ``Likelihood``."""
        return "gaussian" if self.sigma == 1.0 else f"gaussian(sigma={self.sigma!r})"

    def predictions(self, output: Tensor, targets: Tensor | None, mask: Tensor | None, sample: Tensor) -> Predictions:
        """See ``Likelihood``."""
        return _real_valued(self.name, output, targets, sample)

    def empirical(self, predictions: Predictions) -> Tensor:
        """See ``Likelihood``: ``(z - y) / sigma^2``."""
        assert predictions.targets is not None
        return (predictions.values - predictions.targets.to(predictions.values.dtype)) / self.sigma**2

    def sampled(self, predictions: Predictions, seed: int, draw: int) -> Tensor:
        """See ``Likelihood``: ``- noise / sigma`` with standard normal noise."""
        return (-_random.normal(seed, *predictions.keys(), draw) / self.sigma).to(predictions.values.dtype)

    def num_columns(self, predictions: Predictions) -> int:
        """See ``Likelihood``: one per output."""
        return predictions.values.shape[1]

    def columns(self, predictions: Predictions) -> Iterator[Tensor]:
        """See ``Likelihood``: ``e_k / sigma``."""
        yield from _unit_columns(torch.full_like(predictions.values, 1 / self.sigma))


def _real_valued(name: str, output: Tensor, targets: Tensor | None, sample: Tensor) -> Predictions:
    if targets is not None and targets.shape != output.shape:
        raise _batch_mismatch(name, output, targets)
    values = output.reshape(output.shape[0], -1)
    targets = None if targets is None else targets.reshape(values.shape)
    if targets is not None and not bool(torch.isfinite(targets).all()):
        raise ValueError(f"{name}: targets must be finite, got NaN or infinity")
    return Predictions(values, targets, torch.ones_like(values, dtype=torch.bool), sample)


def _unit_columns(root: Tensor) -> Iterator[Tensor]:
    for k in range(root.shape[1]):
        column = torch.zeros_like(root)
        column[:, k] = root[:, k]
        yield column


def _wide(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


_BY_NAME: dict[str, Any] = {"categorical": Categorical, "bernoulli": Bernoulli, "gaussian": Gaussian}


def resolve(likelihood: str | Likelihood) -> Likelihood:
    """A likelihood from its name; objects pass through."""
    if not isinstance(likelihood, str):
        return likelihood
    if likelihood not in _BY_NAME:
        raise ValueError(f"likelihood: must be one of {sorted(_BY_NAME)} or a likelihood object, got {likelihood!r}")
    return _BY_NAME[likelihood]()
