# SPDX-License-Identifier: Apache-2.0
"""The fallback, for what no rule covers: by vmap, else a loop over samples.

Labels and columns come from the whole batch's output, so that every parameter sees the same ones.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fisherfast.capture.tracked import Tracked
from fisherfast.data.batches import Batch
from fisherfast.fisher.run.dependence import check_repeatable, roughly_same
from fisherfast.fisher.run.fallback import SampleGradients
from fisherfast.fisher.run.forward import Forward
from fisherfast.fisher.run.run import Run
from fisherfast.likelihood import Predictions


class SampleLoop:
    """Sample gradients of the parameters that a run leaves to autograd."""

    def __init__(self, run: Run, forward: Forward, sample_gradients: SampleGradients) -> None:
        self._run, self._forward, self._sample_gradients = run, forward, sample_gradients
        self._ragged = False  # whether a batch was: others are, too, though they may have as many tokens as samples
        run.covered.note_vmap(problem=None)

    def add(self, batch: Batch, output: Tensor, predictions: Predictions) -> None:
        """Hand over the sample gradients of what no rule covers."""
        tracked = [self._run.capture.tracked[name] for name in self._run.covered.looped]
        self._ragged = self._ragged or batch.ragged
        if tracked and not self._by_vmap(batch, output, predictions, tracked):
            with self._run.covered.timed("loop"):
                self._loop(batch, output, predictions.detached(), tracked)

    def _by_vmap(self, batch: Batch, output: Tensor, predictions: Predictions, tracked: list[Tracked]) -> bool:
        """Hand over several samples' gradients at a time; False, with nothing handed over, if that cannot be done."""
        covered = self._run.covered
        kinds = {"packed samples": batch.offsets is not None, "ragged samples": self._ragged, "nested inputs": batch.nested}
        if kind := next((kind for kind, it_is in kinds.items() if it_is), None):
            covered.note_vmap(f"vmap cannot take {kind} apart")
            return False
        with covered.timed("vmap"):
            for number, one in enumerate(self._forward.passes(predictions.detached())):
                (cotangent,) = torch.autograd.grad(predictions.values, output, one.cotangent, retain_graph=True)
                chunks = self._sample_gradients(
                    batch, output.detach(), cotangent, tracked, partial(self._first, batch, output, cotangent, tracked)
                )
                if chunks is None:
                    covered.note_vmap(self._sample_gradients.problem)
                    return False
                for first, gradients in chunks:
                    for which in tracked:
                        unscaled = one.unscaled(gradients[which.name])
                        self._run.passes.hand_over_gradients(which, unscaled, first, one.scale, number)
        return True

    def _first(self, batch: Batch, output: Tensor, cotangent: Tensor, tracked: list[Tracked]) -> dict[str, Tensor]:
        """The first sample's gradients by autograd."""
        alone = self._forward.output_of(batch.cut(0, 1), exploring=True)
        gradients = self._run.passes.backward.gradients(alone, tracked, cotangent[:1])
        return {which.name: gradient for which, gradient in zip(tracked, gradients, strict=True)}

    def _loop(self, batch: Batch, output: Tensor, predictions: Predictions, tracked: list[Tracked]) -> None:
        if self._ragged:
            self._loop_over_losses(batch, output, predictions, tracked)
            return
        eps = self._forward.precision(output)
        for n in range(batch.N):
            one = batch.cut(n, n + 1)
            alone = self._forward.output_of(one, exploring=True)
            cut = batch.offsets is not None or roughly_same(alone, output[n : n + 1], eps)
            if not cut:  # an input that is as long as the batch holds no samples
                self._loop_over_losses(batch, output, predictions, tracked, first=n)
                return
            values = self._forward.predictions(one, alone, first=n).values
            passes = self._forward.passes(predictions.one(n))
            if batch.offsets is not None:  # a packed sample by itself is as long as it is, not as the longest
                passes = (replace(one, cotangent=one.cotangent[:, : values.shape[1]]) for one in passes)
            self._run.passes.loop(values, tracked, n, passes)

    def _loop_over_losses(
        self, batch: Batch, output: Tensor, predictions: Predictions, tracked: list[Tracked], first: int = 0
    ) -> None:
        """For samples, from ``first`` on, that cannot be cut out: one graph of all, from which each sample's loss is differentiated."""
        values = self._forward(batch, exploring=True)[1].values
        check_repeatable(values.detach(), predictions.values, self._forward.precision(output))
        for n in range(first, batch.N):
            passes = (
                replace(
                    one, cotangent=torch.cat([torch.zeros_like(values[:n]), one.cotangent, torch.zeros_like(values[n + 1 :])])
                )
                for one in self._forward.passes(predictions.one(n))
            )
            self._run.passes.loop(values, tracked, n, passes)
