# SPDX-License-Identifier: Apache-2.0
"""Whose labels the scores are of: from a batch's output to the gradients at the output, one for each backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfast.batches import Batch
from fisherfast.fisher import _arguments
from fisherfast.fisher.protocol import Provenance
from fisherfast.likelihood import FISHER_TYPES, Likelihood, Predictions, predictions_of, resolve, stored_name
from fisherfast.passes import Pass


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
        draws, seed = _arguments.whole(caller, "draws", draws), _arguments.whole(caller, "seed", seed)
        max_passes = _arguments.whole(caller, "max_passes", max_passes)
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

    def check(self, batch: Batch) -> None:
        """Raise ValueError for a batch without the labels that are needed."""
        if self.fisher_type == "empirical" and batch.targets is None:
            where = f" the key 'labels', {[*batch.inputs]}" if isinstance(batch.inputs, dict) else ""
            raise ValueError(
                f"{self.caller}: fisher_type='empirical' needs the labels of the data, got a batch without{where}; use 'mc' or 'exact'"
            )

    def predictions(self, batch: Batch, output: Tensor, start: int) -> Predictions:
        """What the output says of a batch whose first sample is number ``start`` of the run."""
        return predictions_of(self.likelihood, batch, output, start)

    def num_passes(self, predictions: Predictions) -> int:
        """Backward passes that a batch takes. Errors: ValueError if they are too many."""
        if self.fisher_type != "exact":
            return self.draws
        count = self.likelihood.num_columns(predictions)
        if count > self.max_passes:
            raise ValueError(
                f"{self.caller}: fisher_type='exact' must take at most max_passes = {self.max_passes} backward passes, got {count} "
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
