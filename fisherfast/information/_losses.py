# SPDX-License-Identifier: Apache-2.0
"""The losses of a data set's samples at weights that are not the model's own; the model itself is left as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fisherfast import _checks
from fisherfast._error import NonFiniteError
from fisherfast._functional import call_with
from fisherfast.capture.parameters import unwrapped
from fisherfast.capture.refusals import Refusals, refuse_train_mode
from fisherfast.data.batches import IGNORED, Batch, Output
from fisherfast.likelihood import Categorical, CausalLM, Likelihood, check_model, predictions_of, resolve

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SampleLosses:
    """A model, and what its loss is: ``-log p`` of a likelihood, or a function of output and targets."""

    caller: str
    model: nn.Module
    likelihood: Likelihood
    loss: Loss | None
    output: Output

    @classmethod
    def of(cls, caller: str, model: nn.Module, likelihood: str | Likelihood, loss: Loss | None, output: Output) -> SampleLosses:
        """From what a caller says. Errors: ValueError for an unknown likelihood, one without a loss, or dropout left on."""
        refuse_train_mode(model)
        chosen = resolve(likelihood)
        check_model(chosen, unwrapped(model))
        if loss is None and not hasattr(chosen, "losses"):
            raise ValueError(f"{caller}: likelihood must have losses(predictions), got {chosen!r}; add it, or pass loss=")
        return cls(caller, unwrapped(model), chosen, loss, output)

    @cached_property
    def _refusals(self) -> Refusals:
        return Refusals(self.model)

    def batches(self, data: Iterable[Any]) -> Iterator[Batch]:
        """What the data set yields, on the model's device, with labels, of which some count. Errors: ValueError."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        seen = counted = False
        for item in data:
            batch = Batch.of(item, device, self.model)
            if batch.targets is None:
                raise ValueError(f"{self.caller}: data must have labels, got a batch without; a loss is of the data's labels")
            seen, counted = True, counted or self._counts(batch.targets)
            yield batch
        if seen and not counted:
            raise ValueError(
                f"{self.caller}: data must have a label that counts, got none: all are ignored, and a loss of 0 would say nothing"
            )

    def _counts(self, targets: Tensor) -> bool:
        """Whether any label is not ignored."""
        ignored = getattr(self.likelihood, "ignore_index", None)
        if ignored is None or (
            self.loss is not None and targets.is_floating_point()
        ):  # numbers, of which the likelihood knows nothing
            return True
        labels = (
            targets[:, 1:] if isinstance(self.likelihood, CausalLM) and targets.dim() > 1 else targets
        )  # none predicts the first
        return bool((labels != ignored).any())

    def of_batch(self, batch: Batch, weights: Mapping[str, Tensor]) -> Tensor:
        """``[N]``: each sample's loss where the parameters named in ``weights`` are replaced; differentiable in them."""

        def replaced(*args: Any, **kwargs: Any) -> Any:
            with self._refusals:
                return call_with(self.model, weights, args, kwargs)

        output = batch.copied().feed(replaced, self.output)  # the data are read again
        if self.loss is None:
            return self.likelihood.losses(predictions_of(self.likelihood, batch, output))
        assert batch.targets is not None
        if isinstance(self.likelihood, CausalLM):  # each position beside the token that it predicts
            predictions = predictions_of(self.likelihood, batch, output)
            assert predictions.targets is not None
            return self._of_samples(predictions.values, predictions.targets.masked_fill(~predictions.counted, IGNORED), batch.N)
        targets = self._labels(batch.targets)
        if batch.offsets is None:
            return self._of_samples(output, targets, batch.N)
        # Each sample by itself: spread to one length they would have positions that are not theirs.
        bounds = pairwise(batch.offsets.tolist())
        return torch.cat([self._of_samples(output[:, start:stop], targets[:, start:stop], 1) for start, stop in bounds])

    def _labels(self, targets: Tensor) -> Tensor:
        """The targets with -100 for what the likelihood ignores: a loss does not know its ``ignore_index``."""
        ignored = self.likelihood.ignore_index if isinstance(self.likelihood, Categorical) else IGNORED
        if ignored == IGNORED or targets.is_floating_point():
            return targets
        return targets.long().masked_fill(targets == ignored, IGNORED)

    def _of_samples(self, output: Tensor, targets: Tensor, N: int) -> Tensor:
        """What ``loss`` says of N samples, checked."""
        assert self.loss is not None
        each = self.loss(output, targets)
        if not isinstance(each, Tensor) or each.shape != (N,):
            got = tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__
            raise ValueError(f"{self.caller}: loss must return one number per sample, [N] = ({N},), got {got}")
        _checks.real(self.caller, "loss", each)
        return each

    @torch.no_grad()
    def mean(self, data: Iterable[Any], weights: Mapping[str, Tensor], where: str, advice: str = "") -> float:
        """The mean over the data's samples, in float64. Errors: ValueError for no samples, NonFiniteError naming ``where``."""
        own = dict(self.model.named_parameters())
        placed = {name: value.to(own[name]) for name, value in weights.items()}
        sums, total = [], 0.0
        for number, batch in enumerate(self.batches(data)):
            each = self.of_batch(batch, placed).double()
            if bad := int((~each.isfinite()).sum()):
                raise NonFiniteError(
                    f"{self.caller}: losses must be finite, got {bad} others in batch {number} {where}; "
                    + (advice or "less noise (a smaller beta or prior_scale) or a bounded loss (loss=) keeps them so")
                )
            weight = torch.ones_like(each) if batch.weight is None else batch.weight.double()
            sums.append(float((weight * each).sum()))
            total += float(weight.sum())
        if not total:
            raise ValueError(f"{self.caller}: data must hold samples of a weight > 0, got none; was the iterator used up?")
        return math.fsum(sums) / total
