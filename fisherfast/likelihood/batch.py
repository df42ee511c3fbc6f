# SPDX-License-Identifier: Apache-2.0
"""From a batch's output to what its likelihood sees: packed samples apart, each with its number."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfast.data.batches import IGNORED, Batch
from fisherfast.likelihood.doubts import point_out
from fisherfast.likelihood.protocol import Likelihood, Predictions


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
    if start == 0:
        point_out(likelihood, batch, unpacked, predictions)
    if ambiguous and mask is not None and predictions.counted.shape == output.shape:
        raise ValueError(
            f"{likelihood.name}: an output {tuple(output.shape)} is ambiguous beside an attention mask of that shape: return "
            "[N, L, 1], targets alike, if its second axis is positions (output=lambda result: result.logits[..., None]), [N, 1, K] if it "
            "is the outputs of a sample (result.logits[:, None])"
        )
    return predictions
