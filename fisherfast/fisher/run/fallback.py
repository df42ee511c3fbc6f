# SPDX-License-Identifier: Apache-2.0
"""Sample gradients by ``torch.func``, the fallback's fast way: of several samples at once, in chunks whose gradients fit a fixed budget.

Where vmap cannot (control flow that depends on data), or does not give what autograd gives, a loop over samples does, which is always right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from fisherfast._functional import call_with
from fisherfast.capture.parameters import unwrapped
from fisherfast.capture.refusals import Refusals
from fisherfast.capture.tracked import Tracked
from fisherfast.data.batches import Batch, Output
from fisherfast.fisher.run.dependence import check_alone, precision, roughly_same

_BUDGET = 2**28  # bytes of sample gradients at a time
_MOST = 16  # samples at a time: activations are held too


class SampleGradients:
    """Sample gradients by ``torch.func``; ``problem`` is why it cannot be used for this model, once that is known."""

    def __init__(self, model: nn.Module, output: Output) -> None:
        self._model, self._output = unwrapped(model), output
        self._refusals = Refusals(self._model)
        self.problem: str | None = None
        self._verified = False

    def __call__(
        self, batch: Batch, output: Tensor, cotangent: Tensor, tracked: list[Tracked], check: Callable[[], Mapping[str, Tensor]]
    ) -> Iterator[tuple[int, dict[str, Tensor]]] | None:
        """``(first sample, {name: [n, *parameter]})`` chunk by chunk, or None if vmap cannot.

        ``cotangent`` is the gradient at the model's output. A chunk whose samples have other outputs than in the batch is given up, or, after
        others, refused (ValueError): an input was cut that holds no samples. ``check`` gives the first sample's gradients by autograd: what the
        first sample of a run must equal.
        """
        if self.problem is not None:
            return None
        size = sum(t.parameter.nbytes for t in tracked)
        step = max(1, min(batch.N, _MOST, _BUDGET // max(size, 1)))
        try:
            first, outputs = self._chunk(batch, cotangent, tracked, 0, step)
        except torch.OutOfMemoryError:
            raise
        # Whatever torch.func raises where it cannot: the loop takes over, whose own error is the model's, and coverage says why.
        except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError) as error:
            self.problem = f"vmap cannot, {type(error).__name__}: {str(error).strip().partition('. ')[0]}"
            return None
        eps = precision(self._model, output)
        if not roughly_same(outputs, output[:step], eps):
            self.problem = "vmap cannot take these samples apart"
            return None
        if not self._verified and not _equal({name: g[0] for name, g in first.items()}, check()):
            self.problem = "vmap does not give the model's own gradient"
            return None
        self._verified = True

        def following() -> Iterator[tuple[int, dict[str, Tensor]]]:
            for start in range(step, batch.N, step):
                gradients, outputs = self._chunk(batch, cotangent, tracked, start, step)
                check_alone(outputs, output[start : start + step], eps)
                yield start, gradients

        return chain([(0, first)], following())

    def _chunk(
        self, whole: Batch, cotangents: Tensor, tracked: list[Tracked], start: int, step: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The gradients of samples ``start, ..., start + step - 1``, or up to the last, and their outputs."""
        stop = min(start + step, whole.N)
        batch, cotangent = whole.cut(start, stop).copied(), cotangents[start:stop]
        frozen = {name: p.detach() for name, p in self._model.named_parameters()}
        parameters = {t.name: t.detached for t in tracked}

        inputs = batch.inputs if isinstance(batch.inputs, dict) else dict(enumerate(batch.inputs))
        tensors = {key: value for key, value in inputs.items() if batch.has_samples(value)}

        def scalar(parameters: dict[str, Tensor], samples: dict[Any, Tensor], cotangent: Tensor) -> tuple[Tensor, Tensor]:
            # A batch of one sample: what vmap takes away from the samples' axis.
            mine = {**inputs, **{key: value.unsqueeze(0) for key, value in samples.items()}}
            one = Batch(mine if isinstance(batch.inputs, dict) else tuple(mine.values()), None, None, 1)
            result = one.feed(partial(self._call, {**frozen, **parameters}), self._output)
            return (result[0] * cotangent).sum(), result[0]

        return vmap(grad(scalar, has_aux=True), in_dims=(None, 0, 0))(parameters, tensors, cotangent)

    def _call(self, parameters: dict[str, Tensor], *inputs: Any, **named: Any) -> Any:
        with self._refusals:
            return call_with(self._model, parameters, inputs, named)


def _equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    for name, value in expected.items():
        tolerance = 1e4 * torch.finfo(value.dtype).eps * float(value.abs().max())
        if not math.isfinite(tolerance) or float((found[name] - value).abs().max()) > tolerance:
            return False
    return True
