# SPDX-License-Identifier: Apache-2.0
"""From a batch's output to what its likelihood sees: packed samples apart, each with its number."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfast.batches import Batch
from fisherfast.likelihood.protocol import Likelihood, Predictions

_IGNORED = -100  # torch's and Hugging Face's ignore_index, for a likelihood that has none


def unpacked(likelihood: Likelihood, batch: Batch, output: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output, targets and mask with the sample axis first; a label past a packed sample's end is one that is not counted."""
    return batch.unpacked(output, getattr(likelihood, "ignore_index", _IGNORED))


def predictions_of(likelihood: Likelihood, batch: Batch, output: Tensor, start: int = 0) -> Predictions:
    """What the output says of a batch whose first sample is number ``start`` of the run."""
    sample = torch.arange(start, start + batch.N, device=output.device)
    return likelihood.predictions(*unpacked(likelihood, batch, output), sample)
