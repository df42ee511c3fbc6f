# SPDX-License-Identifier: Apache-2.0
"""An activation ``z = f_w(x)`` of one sample, flat, and its Jacobians about the weights and about the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisherfast import _checks
from fisherfast._functional import call_with
from fisherfast.capture.parameters import unwrapped
from fisherfast.capture.refusals import Refusals, refuse_train_mode
from fisherfast.data.batches import Batch, Output
from fisherfast.fisher import Fisher

MAX_NUMBERS = 2**28  # of what is held of one sample: 2 GiB in float64
_CHUNK_NUMBERS = 2**24  # of what one vectorised backward pass makes


class Jacobians(NamedTuple):
    """Of one sample, float64: z ``[D]``, dz/dw ``[D, P]`` in the order of ``F.names``, dz/dx ``[D, input]``."""

    z: Tensor
    by_weights: Tensor
    by_input: Tensor


class Activation:
    """The model's output, or that of the submodule ``layer``: all D units of it, or those in ``units``."""

    def __init__(
        self, caller: str, model: nn.Module, F: Fisher, layer: str | None, units: Sequence[int] | Tensor | None, output: Output
    ) -> None:
        refuse_train_mode(model)
        self.caller, self.layer, self._root, self._output = caller, layer, unwrapped(model), output
        self._refusals = Refusals(self._root)
        weights = dict(self._root.named_parameters())
        _checks.named(caller, "model", weights, F.names, "F")
        self._weights = {name: weights[name].detach() for name in F.names}
        self._sizes = [weight.numel() for weight in self._weights.values()]
        self.dtype = next(iter(self._weights.values())).dtype
        modules = dict(self._root.named_modules())
        if layer is not None and layer not in modules:
            names = [name for name in modules if name]
            raise ValueError(f"{caller}: layer must be None or the name of a submodule, got {layer!r}; there are {names[:20]}")
        self._module = None if layer is None else modules[layer]
        self._units = None if units is None else self._checked_units(units)

    def _checked_units(self, units: Sequence[int] | Tensor) -> Tensor:
        index = torch.as_tensor(units)
        plain = index.dim() == 1 and index.numel() and not index.is_floating_point() and index.dtype != torch.bool
        if not plain or int(index.min()) < 0 or len(index.unique()) < len(index):
            raise ValueError(f"{self.caller}: units must be distinct indices >= 0 into the flat activation, got {units}")
        return index.long()

    def check_inputs(self, x: Any) -> Tensor:
        """Raise ValueError unless x is a batch that z can be differentiated about."""
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 and x.numel()):
            got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"{self.caller}: x must be a floating tensor [N, ...] of inputs, got {got}; tokens have no derivative"
            )
        if not bool(x.isfinite().all()):
            raise ValueError(f"{self.caller}: x must be finite, got {int((~x.isfinite()).sum())} entries that are not")
        return x.detach()

    def __call__(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The activation z ``[D]`` of the input x, which has no sample axis."""
        results: list[Any] = []
        if self._module is None:
            # Batch.feed finds the tensor among what the model returns; the call is call_with's.
            results.append(Batch((x.unsqueeze(0),), None, None, 1).feed(self._bound(weights), self._output))
        else:
            # A copy: an in-place activation may follow.
            hook = self._module.register_forward_hook(lambda module, inputs, result: results.append(_copied(result)))
            try:
                self._bound(weights)(x.unsqueeze(0))
            finally:
                hook.remove()
        if len(results) != 1 or not isinstance(results[0], Tensor):
            what = [type(result).__name__ for result in results]
            raise ValueError(f"{self.caller}: layer {self.layer!r} must return one tensor, once in a forward pass, got {what}")
        z = results[0].reshape(-1)
        if self._units is None:
            return z
        if int(self._units.max()) >= len(z):
            raise ValueError(f"{self.caller}: units must be below dim z = {len(z)}, got {int(self._units.max())}")
        return z[self._units.to(z.device)]

    def _bound(self, weights: Mapping[str, Tensor]) -> Any:
        def call(*inputs: Tensor) -> Any:
            # The attention whose backward pass can be vectorised and has a derivative.
            with self._refusals, sdpa_kernel(SDPBackend.MATH):
                return call_with(self._root, weights, inputs)

        return call

    def jacobians(self, x: Tensor) -> Jacobians:
        """One backward pass for every unit, vectorised a few at a time.

        Errors:   ValueError where dz/dw of one sample has more than ``MAX_NUMBERS`` entries, or z is not finite.
        """
        z, pull = torch.func.vjp(self.__call__, self._weights, x)[:2]
        size = sum(self._sizes)
        if len(z) * size > MAX_NUMBERS:
            raise ValueError(
                f"{self.caller}: units times weights must be <= {MAX_NUMBERS:,}, got {len(z):,} x {size:,}; choose fewer with units="
            )
        if not bool(z.isfinite().all()):
            raise ValueError(f"{self.caller}: the activation must be finite, got NaN or infinity")
        cotangents = torch.eye(len(z), dtype=z.dtype, device=z.device)
        pulled = torch.func.vmap(pull, chunk_size=max(1, _CHUNK_NUMBERS // size))(cotangents)
        by_weights = torch.cat([pulled[0][name].unsqueeze(1).flatten(1) for name in self._weights], 1)
        return Jacobians(z.detach().double(), by_weights.detach().double(), pulled[1].unsqueeze(1).flatten(1).detach().double())

    def slopes_of_products(self, x: Tensor, vectors: Tensor) -> Tensor:
        """``d/dx (dz/dw v_j)`` for vectors v_j ``[D, P]`` that stay as they are: ``[D, D, input]``.

        Errors:   ValueError where that has more than ``MAX_NUMBERS`` entries.
        """
        D = len(vectors)
        if D * D * x.numel() > MAX_NUMBERS:
            raise ValueError(
                f"{self.caller}: units^2 times dim x must be <= {MAX_NUMBERS:,} for both terms, got {D:,}^2 x {x.numel():,}; "
                "choose fewer with units="
            )

        def products(x: Tensor) -> Tensor:
            z, pull = torch.func.vjp(lambda weights: self(weights, x), self._weights)[:2]
            # Not vectorised: under vmap (torch 2.13) the derivative of a layer norm's backward pass comes out wrong.
            rows = [pull(cotangent)[0] for cotangent in torch.eye(len(z), dtype=z.dtype, device=z.device)]
            flat = torch.stack([torch.cat([row[name].flatten() for name in self._weights]) for row in rows])
            return flat @ vectors.to(z.dtype).mT

        slopes = torch.func.jacrev(products, chunk_size=max(1, _CHUNK_NUMBERS // (D * sum(self._sizes))))(x)
        return slopes.detach().double().flatten(2)


def _copied(result: Any) -> Any:
    return result.clone() if isinstance(result, Tensor) else result
