# SPDX-License-Identifier: Apache-2.0
"""A model called with other tensors in its parameters' places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def call_with(
    model: nn.Module, weights: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> Any:
    """``model(*args, **kwargs)`` with ``weights`` in place of the parameters of these names, wherever those are used.

    ``functional_call`` finds the places of tied parameters by name; of a module under two names it would take the same place twice, and
    the second time put back what it had put there itself: the model's own parameter would be gone. Here each module comes once.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    given = {id(named[name]): value for name, value in weights.items()}
    places = {
        f"{path}.{own}" if path else own: given[id(parameter)]
        for path, module in model.named_modules()
        for own, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in given
    }
    return functional_call(model, places, args, dict(kwargs or {}), tie_weights=False)
