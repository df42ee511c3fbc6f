# SPDX-License-Identifier: Apache-2.0
"""From a batch's output to what its likelihood sees: packed samples apart, each with its number."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfast.batches import IGNORED, Batch
from fisherfast.likelihood.protocol import Likelihood, Predictions


def predictions_of(likelihood: Likelihood, batch: Batch, output: Tensor, start: int = 0) -> Predictions:
    """What the output says of a batch whose first sample is number ``start`` of the run.

    Errors:   ValueError for an output ``[N, K]`` beside an attention mask ``[N, K]`` that leaves something out.
    """
    sample = torch.arange(start, start + batch.N, device=output.device)
    unpacked = batch.unpacked(output, getattr(likelihood, "ignore_index", IGNORED))
    predictions = likelihood.predictions(*unpacked, sample)
    if batch.offsets is None and batch.mask is not None and batch.mask.shape == output.shape == predictions.counted.shape:
        if not bool(batch.mask.all()):
            raise ValueError(
                f"{likelihood.name}: an output {tuple(output.shape)} is ambiguous beside an attention mask of that shape: return "
                "[N, L, 1], targets alike, if its second axis is positions, [N, 1, K] if it is the outputs of a sample"
            )
    return predictions
