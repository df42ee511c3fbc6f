# SPDX-License-Identifier: Apache-2.0
"""Classes and tokens: a softmax over the last axis."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisherfast import _random
from fisherfast._precision import wide
from fisherfast.likelihood._tensors import add_up_to_one, batch_mismatch, check_real, check_weights, digest
from fisherfast.likelihood.protocol import Predictions
from fisherfast.ops.categorical_score import categorical_score_

_NO_LABEL = -100  # what a label that is not counted becomes in the cross entropy


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
    Source:   the score of the softmax; columns: docs/semantics.md.
    """

    axis: int = -1
    ignore_index: int = -100
    class_weight: Tensor | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_weights(self.name, "class_weight", self.class_weight, "[C]", (1,))
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"{self.name}: label_smoothing must lie in [0, 1], got {self.label_smoothing}")

    @property
    def name(self) -> str:
        """See ``Likelihood``."""
        return "categorical"

    @property
    def loss_settings(self) -> str:
        """See ``stored_name``."""
        weight = "" if self.class_weight is None else f"class_weight={digest(self.class_weight)}"
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
        check_real(self.name, output, targets)
        if targets is not None and targets.is_floating_point():
            raise ValueError(f"{self.name}: targets must be class indices (integers), got {self._described(targets, output)}")
        values = output.movedim(self.axis, -1)
        labels = values.shape[:-1]
        if targets is not None and targets.shape != labels:
            raise batch_mismatch(self.name, output, targets, labels, self._way_out(targets, output))
        C = values.shape[-1]
        if C < 2:
            raise ValueError(
                f"{self.name}: the class axis must hold at least 2 classes, got an output {tuple(output.shape)}; one logit for yes or "
                "no is likelihood='bernoulli', one real number 'gaussian'"
            )
        if self.class_weight is not None and len(self.class_weight) != C:
            raise ValueError(f"{self.name}: class_weight must be [C] = ({C},), got {tuple(self.class_weight.shape)}")
        values = values.reshape(N, math.prod(labels[1:]), C)
        counted = self._counted(targets, mask, labels, values)
        if targets is not None:
            targets = targets.reshape(counted.shape).long()
            self._check_range(targets[counted], C)
        return Predictions(values, targets, counted, sample)

    def _described(self, targets: Tensor, output: Tensor) -> str:
        """What floating targets are, and what to do with them."""
        if targets.shape == output.shape and bool((targets >= 0).all()) and add_up_to_one(targets.movedim(self.axis, -1)):
            return (
                f"class probabilities ({targets.dtype}), which are no label; pass (inputs, None) for 'mc' and 'exact', which take labels "
                f"from the model; of one-hot ones targets.argmax({self.axis}); for the gradients of a loss with soft labels ff.collect, or "
                "ff.LogLikelihood"
            )
        return (
            f"{targets.dtype}; pass targets.long() where they are classes, else likelihood='gaussian' (real numbers) or 'bernoulli' "
            "(0 or 1 per output)"
        )

    def _way_out(self, targets: Tensor, output: Tensor) -> str:
        """What to do about targets of a shape that does not fit."""
        if targets.shape == output.shape:
            return f"labels are the numbers of the classes: of one-hot ones pass targets.argmax({self.axis})"
        if targets.shape == (*output.movedim(self.axis, -1).shape[:-1], 1):
            return "labels have no class axis: pass targets.squeeze(-1)"
        return "a class axis that is not last is given by likelihood=ff.Categorical(axis=...)"

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
        flat = {name: label.reshape(-1).contiguous() for name, label in labels.items()}
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
        values, labels = wide(predictions.values), predictions.targets.masked_fill(~predictions.counted, _NO_LABEL)
        each = torch.nn.functional.cross_entropy(
            values.flatten(0, 1),
            labels.flatten(),
            weight=None if self.class_weight is None else self.class_weight.to(values),
            ignore_index=_NO_LABEL,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        return each.view(labels.shape).sum(1)

    def _weigh(self, score: Tensor, labels: Tensor, counted: Tensor) -> None:
        """``(1 - e) w_y (p - e_y) + (e / C) sum_c w_c (p - e_c)`` of ``score = p - e_y`` [L, C], in place."""
        C, e = score.shape[-1], self.label_smoothing
        weighed = wide(score)
        w = weighed.new_ones(C) if self.class_weight is None else self.class_weight.to(weighed)
        y = labels.where(counted, 0).unsqueeze(1)
        total = e / C * w.sum() * counted.unsqueeze(1)
        weighed.mul_((1 - e) * w[y] + total).sub_(e / C * w * counted.unsqueeze(1)).scatter_add_(1, y, total)
        score.copy_(weighed)

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
            roots = (p[:, :-1] * r[:, 1:] / r[:, :-1]).nan_to_num_(0.0).sqrt_().mul_(exists.unsqueeze(1))
            shares = roots / r[:, 1:].clamp_min(torch.finfo(p.dtype).tiny)
            for k in range(C - 1):
                column = torch.zeros_like(p)
                torch.mul(p[:, k + 1 :], -shares[:, k, None], out=column[:, k + 1 :])
                column[:, k] = roots[:, k]
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
            remedy = "labels are tokens, one for each position that the model reads"
            raise batch_mismatch(self.name, output, targets, output.shape[:2], remedy)
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
