# SPDX-License-Identifier: Apache-2.0
"""How a measurement runs the model, and whose labels count."""

from __future__ import annotations

from dataclasses import dataclass

from fisherfast import _checks
from fisherfast.data.batches import Output
from fisherfast.fisher.run.labelling import Labelling


@dataclass(frozen=True)
class Settings:
    """``sample_offset``: the number of the first sample; ``output``: what is picked of the model's output; ``loss_scale``: in gradients."""

    labelling: Labelling
    sample_offset: int
    output: Output
    loss_scale: float

    @classmethod
    def of(cls, labelling: Labelling, *, sample_offset: int, output: Output, loss_scale: float) -> Settings:
        """From what the labelling's caller says. Errors: ValueError or TypeError."""
        return cls(
            labelling,
            _checks.integer(labelling.caller, "sample_offset", sample_offset),
            output,
            _checks.positive(labelling.caller, "loss_scale", loss_scale, "a power of two rounds nothing"),
        )
