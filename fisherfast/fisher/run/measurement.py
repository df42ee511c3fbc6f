# SPDX-License-Identifier: Apache-2.0
"""``Measurement``: the batches of one run, from the data to the sums."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fisherfast._pieces import pieces
from fisherfast.capture.backward import Pass
from fisherfast.capture.collector import Samples
from fisherfast.capture.parameters import unwrapped
from fisherfast.data.batches import Batch
from fisherfast.fisher.diagonal import Diagonal
from fisherfast.fisher.request import Request
from fisherfast.fisher.run.checkpoint import Checkpoint, digest, digest_of_function, digest_of_weights
from fisherfast.fisher.run.exploration import Exploration, noise
from fisherfast.fisher.run.fallback import SampleGradients
from fisherfast.fisher.run.forward import Forward
from fisherfast.fisher.run.progress import shown
from fisherfast.fisher.run.run import Explored, Run, model_name
from fisherfast.fisher.run.sample_loop import SampleLoop
from fisherfast.fisher.run.settings import Settings
from fisherfast.likelihood import Predictions


class Measurement:
    """One call of ``fisher``: feeds batches to the model and turns the likelihood into passes."""

    def __init__(
        self,
        model: nn.Module,
        structures: tuple[Request, ...],
        settings: Settings,
        *,
        allow_missing: bool = False,
        transactional: bool = False,
        known: Explored | None = None,
    ) -> None:
        self.model, self.settings = unwrapped(model), settings
        settings.labelling.check_model(self.model)
        provenance = settings.labelling.provenance(model_name(model))
        self.run = Run(model, structures, provenance, allow_missing, transactional, known)
        self.capture = self.run.capture
        self.forward = Forward(self.run, self.model, settings)
        self.exploration = Exploration(self.run, self.forward, explored=known is not None)
        self._loop = SampleLoop(self.run, self.forward, SampleGradients(model, settings.output))

    # -- the data set

    def batches(self, data: Iterable[Any], progress: bool, what: str) -> Iterator[Batch]:
        """What the data set yields, on the model's device. Errors: TypeError."""
        if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
            raise TypeError(
                f"fisher: data must be an iterable of batches, got {type(data).__name__}; pass a DataLoader or a list"
            )
        for item in shown(data, progress, what):
            yield Batch.of(item, self.capture.device, self.model)

    def over(self, batches: Iterable[Batch], path: Path | None) -> tuple[Any, ...]:
        """Measure all of them; ``path`` is the checkpoint's."""
        checkpoint = None if path is None else Checkpoint(path, self.run, self._same_again())
        with self.run.rescue():
            try:
                self._add_all(batches, checkpoint)
            except BaseException as error:
                if checkpoint is not None:
                    checkpoint.end(error)
                raise
            if checkpoint is not None:
                checkpoint.end()
            self.run.covered.warn_of_underflow()
            self.run.tally.warn_of_no_labels()
        return self.run.results()

    def _add_all(self, batches: Iterable[Batch], checkpoint: Checkpoint | None) -> None:
        for batch in batches:
            if checkpoint is not None and checkpoint.holds(batch):
                self.exploration.look(batch)  # as the run did before it stopped
                continue
            self.batch(batch)
            if checkpoint is not None:
                checkpoint.write_if_due()
        if checkpoint is not None:
            checkpoint.check_all_read()
        if not self.run.tally.samples:
            raise ValueError("fisher: data must yield at least one batch, got none; was the iterator used up?")

    def _same_again(self) -> dict[str, str]:
        """What a checkpoint must agree in, besides the provenance."""
        asked, output = self.run.structures, self.settings.output
        return {
            "sample_offset": str(self.settings.sample_offset),
            "weights": digest_of_weights(self.model),
            "modules": digest(re.sub(r" at 0x[0-9a-f]+", "", repr(self.model))),
            "parameters": digest(" ".join(sorted(self.capture.tracked))),
            **self.settings.labelling.counting(),
            **({} if output is None else {"output": output if isinstance(output, str) else digest_of_function(output)}),
            **({} if asked == (Diagonal(),) else {"structure": ", ".join(map(repr, asked))}),
        }

    # -- one batch

    def batch(self, batch: Batch) -> None:
        """Add one batch."""
        self.settings.labelling.check(batch)
        self.capture.check_parameters()
        self.exploration.look(batch)
        output, predictions = self.forward(batch)
        count = self.settings.labelling.num_passes(predictions)
        if predictions.values.grad_fn is None:
            raise ValueError(
                "model: the output must depend on the parameters through autograd, got one without a graph; is grad disabled?"
            )
        exists = tuple({id(mask): mask for mask in (batch.mask, batch.output_mask) if mask is not None}.values())
        mask = None if batch.mask is None or batch.mask.dim() != 2 else batch.mask != 0
        sparse = predictions.num_positions < 0.8 * predictions.counted.numel()
        samples = Samples(batch.N, count, batch.weight, exists, mask, sparse)
        with self.run.transaction(samples, predictions.num_positions):
            detached = predictions.detached()
            passes, uses = self.forward.passes(detached), self.forward.uses(predictions.values)
            self.run.passes.run(uses, passes, samples, support=partial(self._support, detached))
            self._loop.add(batch, output, predictions)

    def _support(self, predictions: Predictions) -> Pass:
        """A pass that gives a gradient to all that any pass of the batch gives one, and is no larger than they."""
        cotangent, loss_scale = noise(predictions.values), self.settings.loss_scale
        largest = cotangent.new_full((), 1e-4)
        for piece in pieces(cotangent):
            torch.maximum(largest, piece.abs().amax(), out=largest)
        largest = largest * predictions.values[0].numel() ** 0.5
        cotangent.div_(largest).mul_(predictions.everywhere()).mul_(loss_scale)  # in place: it may be as large as all logits
        return Pass(cotangent, loss_scale=loss_scale)
