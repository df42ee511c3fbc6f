# SPDX-License-Identifier: Apache-2.0
"""Weight noise, drawn where it costs least: at the outputs of linear layers and convolutions, else on the weights.

Independent noise of variance v on the weights of ``z = W x + b`` makes z normal with the variance ``v_W x^2 + v_b``. Drawing z itself
gives every sample noise of its own, so gradients by v are far less noisy than with one draw of W for a whole batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Below this a variance is none: the square root has no derivative at 0, which an input of zeros reaches.
_NONE = 1e-30


class _Uses(TorchFunctionMode):
    """How many calls that make a tensor take each parameter, by its id: a layer's own weight may be used elsewhere by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``."""
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self.counted.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, nn.Parameter))
        return result


class LocalNoise:
    """Which layers of a model get their noise at the output; ``over`` runs the model so."""

    def __init__(self, model: nn.Module, names: set[str], run: Callable[[], Any]) -> None:
        """``names`` are the parameters with noise; ``run`` runs the model once, and shows which layers it calls once."""
        uses = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
        candidates = {
            module: weight
            for layer, module in model.named_modules()
            if type(module) in _LAYERS
            and (weight := f"{layer}.weight" if layer else "weight") in names
            and all(uses[parameter] == 1 for parameter in module.parameters(recurse=False))
        }
        calls: Counter[nn.Module] = Counter()
        handles = [module.register_forward_hook(lambda module, _inputs, _output: calls.update([module])) for module in candidates]
        try:
            with _Uses() as uses_of:
                run()
        finally:
            for handle in handles:
                handle.remove()
        # A layer whose weight is used elsewhere, or whose module is called again, needs the same noise in every use.
        self._weights = {
            module: weight
            for module, weight in candidates.items()
            if calls[module] == 1 and all(uses_of.counted[id(p)] <= 1 for p in module.parameters(recurse=False))
        }
        biases = {f"{weight.removesuffix('weight')}bias" for weight in self._weights.values()}
        self.names = {*self._weights.values(), *(biases & names)}

    @contextmanager
    def over(self, stds: Mapping[str, Tensor]) -> Iterator[None]:
        """While this is open the model's layers add their noise; ``stds`` by parameter name, differentiable."""
        called: set[nn.Module] = set()

        def noisy(module: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Tensor], output: Tensor) -> Tensor:
            weight = self._weights[module]
            if module in called:
                raise ValueError(
                    f"model: the layer of {weight!r} must be called once, as in the first batch, got twice; pass noise='weight'"
                )
            called.add(module)
            (x,) = (*inputs, *options.values())
            variance = _variance(module, x, stds[weight], stds.get(f"{weight.removesuffix('weight')}bias"))
            with torch._C.DisableTorchFunction():  # the noise is ours; one that the model draws itself is refused
                noise = torch.randn_like(variance)
            return output + (variance.clamp_min(_NONE).sqrt() * noise).to(output.dtype)

        handles = [module.register_forward_hook(noisy, with_kwargs=True) for module in self._weights]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _variance(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer of squares, ``x^2`` through ``weight^2`` and ``bias^2``, in the precision of these: squares have a wide range."""
    with torch.autocast(x.device.type, enabled=False):
        squares, of_bias = x.to(weight.dtype).square(), None if bias is None else bias.square()
        if isinstance(module, nn.Linear):
            return functional.linear(squares, weight.square(), of_bias)
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        return module._conv_forward(squares, weight.square(), of_bias)
