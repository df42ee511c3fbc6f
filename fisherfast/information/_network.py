# SPDX-License-Identifier: Apache-2.0
"""The weights of a network, as estimators take them, and the forms that the paper's formulas have."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fisherfast.capture.parameters import unwrapped

VARIANTS = ("exact", "paper")
Weights = nn.Module | Mapping[str, Tensor]


def tensors(caller: str, source: Weights) -> dict[str, Tensor]:
    """The weights by name. Errors: TypeError."""
    if not isinstance(source, nn.Module | Mapping):
        raise TypeError(
            f"{caller}: weights must be a network or {{name: tensor}}, got {type(source).__name__}; pass the module or dict(model.named_parameters())"
        )
    return dict(unwrapped(source).named_parameters()) if isinstance(source, nn.Module) else dict(source)
