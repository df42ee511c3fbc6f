# SPDX-License-Identifier: Apache-2.0
"""Whose labels the scores are of: from a batch's output to the gradients at the output, one for each backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from fisherfast import _checks
from fisherfast.capture.backward import Pass
from fisherfast.data.batches import Batch
from fisherfast.fisher.protocol import Provenance
from fisherfast.likelihood import (
    FISHER_TYPES,
    Categorical,
    Likelihood,
    LogLikelihood,
    Predictions,
    check_model,
    counting,
    predictions_of,
    resolve,
    stored_name,
)

_LABELS = ("label", "target", "targets", "label_ids")  # what labels are called elsewhere


def known_type(caller: str, fisher_type: str) -> str:
    """The one of ``FISHER_TYPES`` that is meant. Errors: ValueError for any other."""
    if fisher_type == "type-2":
        return "exact"
    if fisher_type not in FISHER_TYPES:
        raise ValueError(
            f"{caller}: fisher_type must be one of {list(FISHER_TYPES)} (or 'type-2' for 'exact'), got {fisher_type!r}"
        )
    return fisher_type


@dataclass(frozen=True)
class Labelling:
    """A likelihood, and where its labels come from: the data, draws, or the expectation over all of them."""

    fisher_type: str
    likelihood: Likelihood
    draws: int
    seed: int
    max_passes: int
    caller: str = "fisher"

    @classmethod
    def of(cls, caller: str, fisher_type: str, likelihood: str | Likelihood, draws: int, seed: int, max_passes: int) -> Labelling:
        """From what a caller says. Errors: ValueError."""
        fisher_type = known_type(caller, fisher_type)
        draws, seed = _checks.integer(caller, "draws", draws), _checks.integer(caller, "seed", seed)
        max_passes = _checks.integer(caller, "max_passes", max_passes)
        if draws < 1 or (draws > 1 and fisher_type != "mc"):
            raise ValueError(f"{caller}: draws must be >= 1, and 1 unless fisher_type='mc', got {draws} with {fisher_type!r}")
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"{caller}: seed must be at least -2**63 and below 2**63, got {seed}")
        return cls(fisher_type, resolve(likelihood), draws, seed, max_passes, caller)

    def provenance(self, model: str) -> Provenance:
        """For the result."""
        drawn = self.fisher_type == "mc"
        return Provenance(
            fisher_type=self.fisher_type,
            likelihood=stored_name(self.likelihood, self.fisher_type),
            draws=self.draws if drawn else None,
            seed=self.seed if drawn else None,
            model=model,
        )

    def counting(self) -> dict[str, str]:
        """See ``likelihood.counting``."""
        return counting(self.likelihood)

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError for a model that the likelihood cannot be one of."""
        check_model(self.likelihood, model)

    def check(self, batch: Batch) -> None:
        """Raise ValueError for a batch without the labels that are needed."""
        if self.fisher_type == "empirical" and batch.targets is None:
            keys = [*batch.inputs] if isinstance(batch.inputs, dict) else []
            where = f" the key 'labels', {keys}" if keys else ""
            rename = next((f"rename {key!r} to 'labels', or " for key in keys if key in _LABELS), "")
            raise ValueError(
                f"{self.caller}: fisher_type='empirical' needs the labels of the data, got a batch without{where}; {rename}use 'mc' or 'exact'"
            )

    def predictions(self, batch: Batch, output: Tensor, start: int) -> Predictions:
        """What the output says of a batch whose first sample is number ``start`` of the run."""
        return predictions_of(self.likelihood, batch, output, start)

    def says_something(self, predictions: Predictions) -> bool:
        """Whether the output is finite; a class that cannot be may have the logit -inf, if others and the label can."""
        values = predictions.values.detach()
        if not values.numel() or all(map(math.isfinite, low_high := torch.stack(values.aminmax()).tolist())):
            return True
        if not isinstance(self.likelihood, Categorical) or not math.isfinite(low_high[1]):
            return False
        possible = values > -math.inf
        some = possible.any(-1)
        if self.fisher_type == "empirical" and predictions.targets is not None:
            labels = predictions.targets.masked_fill(~predictions.counted, 0)
            some &= possible.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return bool((some | ~predictions.counted).all())

    def num_passes(self, predictions: Predictions) -> int:
        """Backward passes that a batch takes. Errors: ValueError if they are too many."""
        if self.fisher_type != "exact":
            return self.draws
        if isinstance(self.likelihood, LogLikelihood):  # which may go on for ever
            count = sum(1 for _ in islice(self.likelihood.columns(predictions), self.max_passes + 1))
        else:
            count = self.likelihood.num_columns(predictions)
        if count > self.max_passes:
            number = f"{count} or more" if isinstance(self.likelihood, LogLikelihood) else count
            raise ValueError(
                f"{self.caller}: fisher_type='exact' must take at most max_passes = {self.max_passes} backward passes, got {number} "
                f"for an output {tuple(predictions.values.shape)}; use fisher_type='mc', or raise max_passes"
            )
        return max(count, 1)

    @torch.no_grad()
    def passes(self, predictions: Predictions) -> Iterator[Pass]:
        """The gradients at the output, one for each backward pass."""
        if self.fisher_type == "empirical":
            yield Pass(self.likelihood.empirical(predictions))
        elif self.fisher_type == "mc":
            for draw in range(self.draws):
                yield Pass(self.likelihood.sampled(predictions, self.seed, draw), 1 / self.draws)
        else:
            for column in self.likelihood.columns(predictions):
                yield Pass(column)
            if not self.likelihood.num_columns(predictions):  # no label in the batch: its samples count all the same
                yield Pass(torch.zeros_like(predictions.values))
