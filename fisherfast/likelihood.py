# SPDX-License-Identifier: Apache-2.0
"""Likelihoods: what ``p_w(y | x)`` is, given the network's output.

The one idea: every kind of Fisher is a set of gradients *at the output*. For a likelihood with natural parameters z, the
score of a label y at z is known in closed form, so no loss is built: labels of the data, labels drawn from the model and
the columns of a square root of the output Hessian all become cotangents of z, and backward passes do the rest.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fisherfast import _random
from fisherfast._warning import FisherWarning
from fisherfast.ops.categorical_score import categorical_score_

FISHER_TYPES = ("mc", "exact", "empirical")
_NO_LABEL = -100  # what a label that is not counted becomes in the cross entropy


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
        """Sample number and position among the counted ones, broadcast to ``[N, L]``: what random numbers hang on."""
        position = (self.counted.cumsum(1) - 1).clamp_min(0)
        return self.sample.unsqueeze(1).expand_as(position), position

    def most_counted(self) -> int:
        """The number of labels of the sample that has most."""
        return int(self.counted.sum(1).max())

    def turns(self) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        """Each sample's first counted label, then each one's second, ...: their index ``(n, label)``, and which samples have one.

        Samples take turns together wherever their labels are, since their gradients do not meet; labels of one never do.
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


def _batch_mismatch(name: str, output: Tensor, targets: Tensor) -> ValueError:
    return ValueError(
        f"{name}: targets do not fit the output, got targets {tuple(targets.shape)} and output {tuple(output.shape)}"
    )


@dataclass(frozen=True, eq=False)
class Categorical:
    """``y ~ softmax(z)``, one label per sample (``[N, C]``) or several (``[N, L, C]``).

    The log-likelihood of a sample is the sum over its counted labels: those that differ from ``ignore_index``; without
    labels those where the attention mask is not zero; else all. Class axis last unless ``axis`` says otherwise.

    ``class_weight`` (w, ``[C]``) and ``label_smoothing`` (e) belong to a loss, not to ``p(y | x)``: ``fisher_type="empirical"``
    takes the gradient of ``(1 - e) w_y (-log p_y) + (e / C) sum_c w_c (-log p_c)``, summed, as torch's ``cross_entropy`` with
    ``reduction="sum"``; "mc" and "exact" do not look at them and say so in a FisherWarning.

    Shapes:   output ``[N, C]``, ``[N, L, C]``, or any with ``axis``; targets like it without the class axis, integers.
    Scale:    a sum over the labels of a sample, never divided by their number or by ``class_weight``.
    Errors:   ValueError for shapes that do not fit or are ambiguous, labels out of range, and settings out of range.
    Numerics: ``categorical_score_``: float32 or wider whatever the output's dtype. The columns of "exact" in float64.
    Source:   the score of the softmax; columns: docs/design.md.
    """

    axis: int = -1
    ignore_index: int = -100
    class_weight: Tensor | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_weights(self.name, "class_weight", self.class_weight, "[C]")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"{self.name}: label_smoothing must lie in [0, 1], got {self.label_smoothing}")

    @property
    def name(self) -> str:
        """See ``Likelihood``."""
        return "categorical"

    @property
    def loss_settings(self) -> str:
        """See ``stored_name``."""
        weight = "" if self.class_weight is None else f"class_weight={_digest(self.class_weight)}"
        smoothing = f"label_smoothing={self.label_smoothing!r}" if self.label_smoothing else ""
        return ", ".join(filter(None, (weight, smoothing)))

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
        C = values.shape[-1]
        if self.class_weight is not None and len(self.class_weight) != C:
            raise ValueError(f"{self.name}: class_weight must be [C] = ({C},), got {tuple(self.class_weight.shape)}")
        values = values.reshape(N, math.prod(labels[1:]), C)
        counted = self._counted(targets, mask, labels, values)
        if targets is not None:
            targets = targets.reshape(counted.shape).long()
            self._check_range(targets[counted], C)
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

    def _score(self, predictions: Predictions, **labels: Tensor) -> Tensor:
        """``p - e_y`` for ``labels`` given or drawn by ``uniform``, both ``[N, L]``; zero where nothing is counted."""
        values = predictions.values.detach()
        rows = values.reshape(-1, values.shape[-1])
        # Where the class axis is not last the rows are a copy already: they become the result.
        fresh = rows.is_contiguous() and rows.untyped_storage().data_ptr() != values.untyped_storage().data_ptr()
        score = rows if fresh else torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        flat = {name: label.reshape(-1) for name, label in labels.items()}
        categorical_score_(score, rows, counted=predictions.counted.reshape(-1), **flat)
        return score.view(values.shape)

    def empirical(self, predictions: Predictions) -> Tensor:
        """See ``Likelihood``: ``p - e_y``, or the gradient of the loss that ``class_weight`` and ``label_smoothing`` make."""
        assert predictions.targets is not None
        score = self._score(predictions, labels=predictions.targets)
        if self.loss_settings:
            for n in range(len(score)):  # in float32, and no copy of more than one sample's logits
                self._weigh(score[n], predictions.targets[n], predictions.counted[n])
        return score

    def losses(self, predictions: Predictions) -> Tensor:
        """See ``Likelihood``: the cross entropy, with ``class_weight`` and ``label_smoothing``."""
        assert predictions.targets is not None
        values, labels = predictions.values, predictions.targets.masked_fill(~predictions.counted, _NO_LABEL)
        each = torch.nn.functional.cross_entropy(
            values.flatten(0, 1).to(_wide(values)),
            labels.flatten(),
            weight=None if self.class_weight is None else self.class_weight.to(values.device, _wide(values)),
            ignore_index=_NO_LABEL,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        return each.view(labels.shape).sum(1)

    def _weigh(self, score: Tensor, labels: Tensor, counted: Tensor) -> None:
        """``(1 - e) w_y (p - e_y) + (e / C) sum_c w_c (p - e_c)`` of ``score = p - e_y`` [L, C], in place."""
        C, e = score.shape[-1], self.label_smoothing
        wide = score.to(_wide(score))
        w = wide.new_ones(C) if self.class_weight is None else self.class_weight.to(wide)
        y = labels.where(counted, 0).unsqueeze(1)
        total = e / C * w.sum() * counted.unsqueeze(1)
        wide.mul_((1 - e) * w[y] + total).sub_(e / C * w * counted.unsqueeze(1)).scatter_add_(1, y, total)
        score.copy_(wide)

    def sampled(self, predictions: Predictions, seed: int, draw: int) -> Tensor:
        """See ``Likelihood``: one uniform number a label, inverse CDF by a running sum with a float64 carry."""
        return self._score(predictions, uniform=_random.uniform(seed, *predictions.keys(), draw))

    def num_columns(self, predictions: Predictions) -> int:
        """See ``Likelihood``: ``L (C - 1)``, L the counted labels of the sample that has most; labels are never seeded together."""
        return predictions.most_counted() * (predictions.values.shape[2] - 1)

    def columns(self, predictions: Predictions) -> Iterator[Tensor]:
        """See ``Likelihood``: column k is ``sqrt(p_k r_{k+1} / r_k) (e_k - sum_{j>k} p_j e_j / r_{k+1})``, r the tail sums."""
        values = predictions.values.detach()
        C = values.shape[-1]
        for at, exists in predictions.turns():
            p = values[at].softmax(-1, dtype=torch.float64)
            r = p.flip(-1).cumsum(-1).flip(-1)
            for k in range(C - 1):
                tail = r[:, k + 1, None]
                column = torch.zeros_like(p)
                column[:, k + 1 :] = -p[:, k + 1 :] / tail.clamp_min(torch.finfo(p.dtype).tiny)
                column[:, k] = 1.0
                column *= (p[:, k, None] * tail / r[:, k, None]).nan_to_num(0.0).sqrt() * exists.unsqueeze(1)
                cotangent = torch.zeros_like(values)
                cotangent[at] = column.to(values.dtype)
                yield cotangent


@dataclass(frozen=True, eq=False)
class CausalLM(Categorical):
    """``Categorical`` with the shift of a causal language model: the output at position t predicts token t + 1.

    For Hugging Face's dict batches: position t counts if ``labels[t+1] != ignore_index``; without labels, if
    ``attention_mask[t+1]`` is set; the last position never does. Nor does a position that is itself padding: with padding
    on the left, Hugging Face's loss lets the last padded position predict the first token; here padding changes nothing.
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
        if mask is not None and mask.shape == shifted.shape:
            shifted.masked_fill_(mask == 0, self.ignore_index)
        predictions = super().predictions(output, shifted, None, sample)
        return predictions if targets is not None else replace(predictions, targets=None)


@dataclass(frozen=True, eq=False)
class Bernoulli:
    """``y_k ~ Bernoulli(sigmoid(z_k))``, independent, for each output k of a sample; targets in [0, 1].

    Outputs ``[N, K]``, or ``[N, L, K]`` of L positions; what lies at a position where the batch's attention mask ``[N, L]`` is
    zero, and what has the target ``ignore_index``, is not counted. ``pos_weight`` (w, like the last axis or one number) makes
    the loss ``-w y log p - (1 - y) log(1 - p)``: for "empirical" only, as ``Categorical``'s settings.

    Shapes:   targets like the output.
    Scale:    a sum over the outputs of a sample.
    Errors:   ValueError for shapes that do not fit, targets outside [0, 1], and weights out of range.
    Numerics: in the output's dtype; ``p - y`` keeps its relative precision where p is close to a target of 0 or 1.
    Source:   the score of the logistic.
    """

    ignore_index: float = -100.0
    pos_weight: Tensor | None = None

    def __post_init__(self) -> None:
        _check_weights(self.name, "pos_weight", self.pos_weight, "[K]")

    @property
    def name(self) -> str:
        """See ``Likelihood``."""
        return "bernoulli"

    @property
    def loss_settings(self) -> str:
        """See ``stored_name``."""
        return "" if self.pos_weight is None else f"pos_weight={_digest(self.pos_weight)}"

    def predictions(self, output: Tensor, targets: Tensor | None, mask: Tensor | None, sample: Tensor) -> Predictions:
        """See ``Likelihood``."""
        _check_last(self.name, "pos_weight", self.pos_weight, output)
        predictions = _real_valued(self.name, output, targets, mask, sample)
        if targets is None:
            return predictions
        predictions = replace(predictions, counted=predictions.counted & (predictions.targets != self.ignore_index))
        y = predictions.targets[predictions.counted]  # type: ignore[index]
        if y.numel() and not bool(((y >= 0) & (y <= 1)).all()):
            raise ValueError(
                f"{self.name}: targets must lie in [0, 1] or be ignore_index = {self.ignore_index}, "
                f"got {float(y.min())} .. {float(y.max())}"
            )
        return predictions

    def empirical(self, predictions: Predictions) -> Tensor:
        """See ``Likelihood``: ``sigmoid(z) - y``."""
        assert predictions.targets is not None
        z, y = predictions.values.detach(), predictions.targets.to(predictions.values.dtype)
        w = 1.0 if self.pos_weight is None else _tiled(self.pos_weight, z)
        return _counted_only(predictions, (1 - y) * z.sigmoid() - w * y * (-z).sigmoid())

    def losses(self, predictions: Predictions) -> Tensor:
        """See ``Likelihood``: ``-w y log p - (1 - y) log(1 - p)``, added up."""
        assert predictions.targets is not None
        z = predictions.values.to(_wide(predictions.values))
        y = predictions.targets.masked_fill(~predictions.counted, 0).to(z.dtype)
        w = None if self.pos_weight is None else _tiled(self.pos_weight, z)
        each = torch.nn.functional.binary_cross_entropy_with_logits(z, y, pos_weight=w, reduction="none")
        return each.masked_fill(~predictions.counted, 0.0).sum(1)

    def sampled(self, predictions: Predictions, seed: int, draw: int) -> Tensor:
        """See ``Likelihood``: ``sigmoid(z) - y`` with ``y = [u < sigmoid(z)]``."""
        z = predictions.values.detach().double()
        y = _random.uniform(seed, *predictions.keys(), draw) < z.sigmoid()
        return _counted_only(predictions, torch.where(y, -(-z).sigmoid(), z.sigmoid()))

    def num_columns(self, predictions: Predictions) -> int:
        """See ``Likelihood``: one per output of the sample that has most."""
        return predictions.most_counted()

    def columns(self, predictions: Predictions) -> Iterator[Tensor]:
        """See ``Likelihood``: ``sqrt(p_k (1 - p_k)) e_k``."""
        z = predictions.values.detach().double()
        yield from _unit_columns(predictions, (z.sigmoid() * (-z).sigmoid()).sqrt())


@dataclass(frozen=True, eq=False)
class Gaussian:
    """``y_k ~ N(z_k, sigma_k^2)``, independent, for each output k of a sample; ``sigma``: one number, or one per output.

    Outputs ``[N]``, ``[N, K]``, or ``[N, L, ...]`` of L positions; what lies at a position where the batch's attention mask
    ``[N, L]`` is zero is not counted. ``sigma`` as a tensor has the length of the last axis.

    Shapes:   targets like the output.
    Scale:    a sum over the outputs of a sample.
    Errors:   ValueError for shapes that do not fit, counted targets that are not finite, and sigma out of range.
    Numerics: in the output's dtype.
    Source:   the score of the normal distribution in its mean.
    """

    sigma: float | Tensor = 1.0

    def __post_init__(self) -> None:
        sigma = torch.as_tensor(self.sigma)
        if sigma.dim() > 1 or not bool(((sigma > 0) & torch.isfinite(sigma)).all()):
            raise ValueError(f"gaussian: sigma must be positive and finite, one number or [K], got {self.sigma}")

    @property
    def name(self) -> str:
        """See ``Likelihood``."""
        if isinstance(self.sigma, Tensor) and self.sigma.dim():
            return f"gaussian(sigma={_digest(self.sigma)})"
        return "gaussian" if self.sigma == 1.0 else f"gaussian(sigma={float(self.sigma)!r})"

    def predictions(self, output: Tensor, targets: Tensor | None, mask: Tensor | None, sample: Tensor) -> Predictions:
        """See ``Likelihood``."""
        _check_last("gaussian", "sigma", torch.as_tensor(self.sigma), output)
        return _real_valued(self.name, output, targets, mask, sample)

    def _sigma(self, values: Tensor) -> Tensor | float:
        return _tiled(self.sigma, values) if isinstance(self.sigma, Tensor) else self.sigma

    def empirical(self, predictions: Predictions) -> Tensor:
        """See ``Likelihood``: ``(z - y) / sigma^2``."""
        assert predictions.targets is not None
        z = predictions.values.detach()
        return _counted_only(predictions, (z - predictions.targets.to(z.dtype)) / self._sigma(z) ** 2)

    def losses(self, predictions: Predictions) -> Tensor:
        """See ``Likelihood``: ``(z - y)^2 / (2 sigma^2) + log sigma + log(2 pi) / 2``, added up."""
        assert predictions.targets is not None
        z = predictions.values.to(_wide(predictions.values))
        sigma = torch.as_tensor(self._sigma(z)).to(z)
        each = ((z - predictions.targets.to(z.dtype)) / sigma).square() / 2 + sigma.log() + math.log(2 * math.pi) / 2
        return each.masked_fill(~predictions.counted, 0.0).sum(1)

    def sampled(self, predictions: Predictions, seed: int, draw: int) -> Tensor:
        """See ``Likelihood``: ``- noise / sigma`` with standard normal noise."""
        noise = _random.normal(seed, *predictions.keys(), draw)
        return _counted_only(predictions, -noise / self._sigma(noise))

    def num_columns(self, predictions: Predictions) -> int:
        """See ``Likelihood``: one per output of the sample that has most."""
        return predictions.most_counted()

    def columns(self, predictions: Predictions) -> Iterator[Tensor]:
        """See ``Likelihood``: ``e_k / sigma_k``."""
        yield from _unit_columns(predictions, torch.ones_like(predictions.values) / self._sigma(predictions.values))


class Draws:
    """Random numbers for the labels of a batch, handed to ``LogLikelihood.sample``.

    Each is a function of (seed, number of the sample in the run, index within the sample, draw, how many were asked for
    before): it depends neither on the batch nor on its order, nor on padding where the first axis asked for is that of the
    positions. Anything else that draws (torch's global generator) would make the result depend on the batches.
    """

    def __init__(self, predictions: Predictions, seed: int, draw: int) -> None:
        self._predictions, self._seed, self._draw = predictions, seed, draw
        self._asked = 0

    def _keys(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        sample, rank = self._predictions.keys()
        N, L = rank.shape
        inner = torch.arange(math.prod(shape), device=rank.device).expand(N, -1)
        if shape and shape[0] == L:
            rest = math.prod(shape[1:])
            inner = (rank.unsqueeze(2) * rest + torch.arange(rest, device=rank.device)).reshape(N, L * rest)
        return sample[:, :1].expand_as(inner), inner

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in (0, 1), ``[N, *shape]`` float64."""
        sample, index = self._keys(shape)
        self._asked += 1
        return _random.uniform(self._seed, sample, index, self._draw, stream=self._asked).view(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, ``[N, *shape]`` float64."""
        u, v = self.uniform(*shape), self.uniform(*shape)
        return (-2.0 * u.log()).sqrt() * (2.0 * math.pi * v).cos()


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """A likelihood from ``log p``: any distribution whose log-probability torch can differentiate.

    ``log_prob(output, y)``: one number per sample ``[N]``, or one per position ``[N, L]`` (added over the positions where the
    batch's attention mask is not zero); ``output`` is the model's, sample axis first, and no sample may look at another.
    ``sample(output, draws)``: labels drawn from the model, in the form that ``log_prob`` takes; ``draws.uniform(*shape)`` and
    ``draws.normal(*shape)`` give ``[N, *shape]`` random numbers. Only ``fisher_type="mc"`` needs it.
    ``columns_of(output)``: the columns of a square root of the Hessian of ``-log p`` at the output, each like the output, for
    ``fisher_type="exact"``. ``name`` is stored with the result: choose one per distribution, since results of one name pool.

    Shapes:   output ``[N, ...]``, targets whatever ``log_prob`` takes, samples first.
    Scale:    the gradient of ``-log p``, summed over the positions of a sample.
    Errors:   ValueError where ``log_prob`` returns another shape or does not depend on the output, and for a fisher_type whose
              function was not given.
    Numerics: autograd, in the output's dtype.
    Source:   the definition of the score.
    """

    log_prob: Callable[[Tensor, Tensor], Tensor]
    sample: Callable[[Tensor, Draws], Tensor] | None = None
    columns_of: Callable[[Tensor], Iterable[Tensor]] | None = None
    name: str = field(kw_only=True)

    def predictions(self, output: Tensor, targets: Tensor | None, mask: Tensor | None, sample: Tensor) -> Predictions:
        """See ``Likelihood``."""
        counted = _positions(output, mask)
        if counted is None:
            counted = torch.ones(len(output), 1, dtype=torch.bool, device=output.device)
        return Predictions(output, targets, counted, sample)

    def _score(self, predictions: Predictions, y: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = predictions.values.detach().requires_grad_()
            return torch.autograd.grad(-self._log_p(replace(predictions, values=leaf), y).sum(), leaf)[0]

    def _log_p(self, predictions: Predictions, y: Tensor) -> Tensor:
        """What ``log_prob`` says of each sample, checked and added over its positions: ``[N]``."""
        log_p = self.log_prob(predictions.values, y)
        N, L = predictions.counted.shape
        fits = log_p.shape[:1] == (N,) and (log_p.dim() == 1 or (log_p.dim() == 2 and L in (1, log_p.shape[1])))
        lacks_graph = predictions.values.requires_grad and not log_p.requires_grad
        if not fits or lacks_graph:
            raise ValueError(
                f"{self.name}: log_prob must return one number per sample [N] = ({N},), or one per position [N, L], that depends "
                f"on the output through autograd, got shape {tuple(log_p.shape)}" + (" without a graph" if lacks_graph else "")
            )
        return log_p.masked_fill(~predictions.counted, 0.0).sum(1) if log_p.dim() == 2 else log_p

    def losses(self, predictions: Predictions) -> Tensor:
        """See ``Likelihood``: ``-log_prob``."""
        assert predictions.targets is not None
        return -self._log_p(predictions, predictions.targets)

    def empirical(self, predictions: Predictions) -> Tensor:
        """See ``Likelihood``: by autograd."""
        assert predictions.targets is not None
        return self._score(predictions, predictions.targets)

    def sampled(self, predictions: Predictions, seed: int, draw: int) -> Tensor:
        """See ``Likelihood``: by autograd, for labels from ``sample``."""
        if self.sample is None:
            raise ValueError(f"{self.name}: fisher_type='mc' needs LogLikelihood(sample=...), got None; or use 'empirical'")
        return self._score(predictions, self.sample(predictions.values.detach(), Draws(predictions, seed, draw)))

    def num_columns(self, predictions: Predictions) -> int:
        """See ``Likelihood``."""
        return sum(1 for _ in self.columns(predictions))

    def columns(self, predictions: Predictions) -> Iterator[Tensor]:
        """See ``Likelihood``: those of ``columns_of``."""
        if self.columns_of is None:
            raise ValueError(
                f"{self.name}: fisher_type='exact' needs LogLikelihood(columns_of=...), got None; use fisher_type='mc' with draws"
            )
        values = predictions.values.detach()
        for column in self.columns_of(values):
            if column.shape != values.shape:
                raise ValueError(
                    f"{self.name}: columns_of must yield columns like the output {tuple(values.shape)}, got {tuple(column.shape)}"
                )
            if predictions.counted.shape[1] > 1:
                column = column.masked_fill(~predictions.counted.view(*values.shape[:2], *[1] * (values.dim() - 2)), 0.0)
            yield column.to(values.dtype)


def _positions(output: Tensor, mask: Tensor | None) -> Tensor | None:
    """The attention mask as which positions of ``output`` [N, L, ...] count; None where it is not one."""
    return (mask != 0) if mask is not None and output.dim() > 2 and mask.shape == output.shape[:2] else None


def _real_valued(name: str, output: Tensor, targets: Tensor | None, mask: Tensor | None, sample: Tensor) -> Predictions:
    if targets is not None and targets.shape != output.shape:
        raise _batch_mismatch(name, output, targets)
    values = output.reshape(output.shape[0], -1)
    positions = _positions(output, mask)
    counted = torch.ones_like(values, dtype=torch.bool)
    if positions is not None:
        counted = positions.repeat_interleave(math.prod(output.shape[2:]), 1)
    if targets is not None:
        targets = targets.reshape(values.shape).masked_fill(~counted, 0)
        if not bool(torch.isfinite(targets).all()):
            raise ValueError(f"{name}: targets must be finite, got NaN or infinity")
    return Predictions(values, targets, counted, sample)


def _check_last(name: str, what: str, tensor: Tensor | None, output: Tensor) -> None:
    last = output.shape[-1] if output.dim() > 1 else 1
    if tensor is not None and tensor.dim() and len(tensor) != last:
        raise ValueError(f"{name}: {what} must be as long as the output's last axis, [{last}], got {tuple(tensor.shape)}")


def _tiled(tensor: Tensor, values: Tensor) -> Tensor:
    """``tensor``, one number or [K], beside ``values`` [N, L K]."""
    return tensor.to(values).expand(1) if tensor.dim() == 0 else tensor.to(values).repeat(values.shape[-1] // len(tensor))


def _check_weights(name: str, what: str, tensor: Tensor | None, symbols: str) -> None:
    if tensor is not None and (tensor.dim() > 1 or not bool((torch.isfinite(tensor) & (tensor >= 0)).all())):
        raise ValueError(f"{name}: {what} must be {symbols}, finite and not negative, got {tensor}")


def _counted_only(predictions: Predictions, score: Tensor) -> Tensor:
    return score.masked_fill(~predictions.counted, 0.0).to(predictions.values.dtype)


def _unit_columns(predictions: Predictions, root: Tensor) -> Iterator[Tensor]:
    for at, exists in predictions.turns():
        column = torch.zeros_like(predictions.values)
        column[at] = (root[at] * exists).to(column.dtype)
        yield column


def _digest(tensor: Tensor) -> str:
    """A tensor inside a name: its numbers where they are few, else how many and a fingerprint."""
    values = tensor.detach().double().flatten().cpu()
    if len(values) <= 4:
        return str(values.tolist())
    return f"[{len(values)}]#{hashlib.sha256(values.numpy().tobytes()).hexdigest()[:8]}"


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


def stored_name(likelihood: Likelihood, fisher_type: str) -> str:
    """What a result is stored under: the likelihood's name, with the settings of its loss where "empirical" looked at them.

    Class weights and label smoothing change a loss, not ``p(y | x)``: "mc" and "exact" leave them out, with a FisherWarning.
    """
    settings = getattr(likelihood, "loss_settings", "")
    if settings and fisher_type != "empirical":
        warnings.warn(
            f"{likelihood.name}: {settings} change the loss, not p(y | x); fisher_type={fisher_type!r} does not look at them",
            FisherWarning,
            stacklevel=4,  # the caller of ff.fisher
        )
    return f"{likelihood.name}({settings})" if settings and fisher_type == "empirical" else likelihood.name
