# SPDX-License-Identifier: Apache-2.0
"""From a batch's output to what its likelihood sees: packed samples apart, each with its number."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfast._warning import warn
from fisherfast.batches import IGNORED, Batch
from fisherfast.likelihood.categorical import Categorical
from fisherfast.likelihood.protocol import Likelihood, Predictions


def _are_the_inputs(predictions: Predictions, batch: Batch) -> bool:
    read = batch.inputs.get("input_ids") if isinstance(batch.inputs, dict) else None
    labels, counted = predictions.targets, predictions.counted
    if labels is None or not isinstance(read, Tensor) or read.shape != labels.shape or labels.shape[1] < 2:
        return False
    return bool(((labels == read) | ~counted).all()) and bool(counted.any())


def predictions_of(likelihood: Likelihood, batch: Batch, output: Tensor, start: int = 0) -> Predictions:
    """What the output says of a batch whose first sample is number ``start`` of the run.

    Errors:   ValueError for an output ``[N, K]`` beside an attention mask ``[N, K]`` that leaves something out, even by chance: say
              by another axis what K is.
    """
    sample = torch.arange(start, start + batch.N, device=output.device)
    unpacked, targets, mask = batch.unpacked(output, getattr(likelihood, "ignore_index", IGNORED))
    ambiguous = batch.offsets is None and mask is not None and mask.shape == output.shape
    if ambiguous and mask is not None and bool(mask.all()):  # it says nothing, whatever the second axis is
        mask = None
    predictions = likelihood.predictions(unpacked, targets, mask, sample)
    if start == 0 and type(likelihood) is Categorical and _are_the_inputs(predictions, batch):
        warn(
            "categorical: the labels are the input_ids themselves, position by position, as if the model had to repeat what it reads; if "
            "it is a causal language model, pass likelihood=ff.CausalLM()",
        )
    if ambiguous and mask is not None and predictions.counted.shape == output.shape:
        raise ValueError(
            f"{likelihood.name}: an output {tuple(output.shape)} is ambiguous beside an attention mask of that shape: return "
            "[N, L, 1], targets alike, if its second axis is positions (output=lambda result: result.logits[..., None]), [N, 1, K] if it "
            "is the outputs of a sample (result.logits[:, None])"
        )
    return predictions
