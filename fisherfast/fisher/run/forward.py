# SPDX-License-Identifier: Apache-2.0
"""The model's forward passes, and what its output says."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fisherfast.capture.backward import Pass
from fisherfast.capture.uses import Uses
from fisherfast.data.batches import Batch
from fisherfast.fisher.run.dependence import precision, same_but_rounding
from fisherfast.fisher.run.run import Run
from fisherfast.fisher.run.settings import Settings
from fisherfast.likelihood import Predictions


class Forward:
    """Runs the model under the run's capture; ``passes`` are the backward passes of what comes out."""

    def __init__(self, run: Run, model: nn.Module, settings: Settings) -> None:
        self._run, self.model, self._settings = run, model, settings

    def __call__(self, batch: Batch, exploring: bool = False, model: nn.Module | None = None) -> tuple[Tensor, Predictions]:
        """Run the model, or a copy, on a batch: its output, and what that says."""
        with torch.enable_grad():
            output = self.output_of(batch, exploring, model)
            if self._run.capture.mode.doubtful and not exploring:
                self._check_expanded(batch, output)
            return output, self.predictions(batch, output)

    def predictions(self, batch: Batch, output: Tensor, first: int = 0) -> Predictions:
        """What the likelihood makes of the model's output for a batch whose first sample is number ``first`` of the current one."""
        start = self._settings.sample_offset + self._run.tally.samples + first
        predictions = self._settings.labelling.predictions(batch, output, start)
        if not self._settings.labelling.says_something(predictions):
            self._run.raise_not_finite(predictions.values, "the model's output")
        return predictions

    def _check_expanded(self, batch: Batch, output: Tensor) -> None:
        """A use was given a sample axis whose first axis is as long as the batch, and may hold the samples: compare without."""
        # The same shapes and mode of autograd: the same kernels and rounding.
        alone = batch.copied().feed(self.model, self._settings.output)
        if not same_but_rounding(alone, output, self.precision(output)):
            raise ValueError(
                f"model: what has no sample axis in one batch must not have one in another, got a batch of as many positions as samples, {batch.N}; "
                "give batches of another size"
            )

    def precision(self, values: Tensor) -> float:
        """The relative rounding error of what the model returns."""
        return precision(self.model, values)

    def values(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """The likelihood's values, for a batch that is looked at."""
        return self(batch, exploring=True, model=model)[1].values

    def output_of(self, batch: Batch, exploring: bool, model: nn.Module | None = None) -> Tensor:
        """What the model, or a copy, returns, caught by the capture."""
        self._run.capture.begin(exploring, batch.N, batch.offsets)
        fed = batch.copied() if exploring or self._run.writes_inputs else batch  # they are fed again
        before = fed.versions()
        with self._run.capture, torch.enable_grad():
            output = fed.feed(self.model if model is None else model, self._settings.output)
        if fed.versions() != before:
            self._run.writes_inputs = True
            if fed is batch and self._run.covered.looped:
                raise ValueError(
                    "model: must not write into its inputs, got a later batch in which it does; clone them in forward, because the fallback reads them again"
                )
        return output

    def uses(self, values: Tensor) -> Uses:
        """The uses behind what the last forward pass gave. Errors: ValueError if an earlier one made some of them: what the model keeps of it
        can be differentiated once, and knows nothing of what was decided since.
        """
        capture = self._run.capture
        uses = capture.read(values)
        kept = next((call for call in uses.calls if call.under is not capture.mode.settings), None)
        if kept is not None:
            raise ValueError(
                "model: must not keep tensors made of its parameters between forward passes, got one made of "
                f"{kept.uses[0].tracked.name!r} in an earlier one; make it in every forward pass"
            )
        return uses

    def passes(self, predictions: Predictions) -> Iterator[Pass]:
        """The likelihood's, with the loss scale in them."""
        loss_scale = self._settings.loss_scale
        for one in self._settings.labelling.passes(predictions):
            yield Pass(one.cotangent * loss_scale, one.scale, loss_scale) if loss_scale != 1 else one
