# SPDX-License-Identifier: Apache-2.0
"""Backward passes through a captured graph: autograd's own, with somebody who listens to the taps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfast._precision import wide
from fisherfast.capture.calls import Call, graph
from fisherfast.capture.capture import Capture, Listener
from fisherfast.capture.tracked import Tracked

# torch.autograd.grad without its looks at the arguments, each of which the capture would be shown. And as a function that modes
# see, it would switch them off for all that happens inside.
_run_backward = torch.autograd.graph._engine_run_backward


@dataclass(frozen=True)
class Pass:
    """One backward pass that counts: the gradient of the summed loss at the root, and the scale of its squares.

    ``loss_scale``: what the gradient was multiplied by, to be taken out before anything is squared.
    """

    cotangent: Tensor
    scale: float = 1.0
    loss_scale: float = 1.0

    def unscaled(self, g: Tensor) -> Tensor:
        """A gradient without the factor, in float32 or wider, where digits lost to a factor would stay lost."""
        return g if self.loss_scale == 1 else wide(g) / self.loss_scale

    def times(self, factors: Tensor) -> Tensor:
        """The gradient at the root ``[N, ...]``, each sample's part of it times a number of ``[N]``."""
        return self.cotangent * factors.to(self.cotangent.dtype).view(-1, *(1,) * (self.cotangent.dim() - 1))


class Backward:
    """Backward passes on the graphs of one capture. What is kept of a graph, ``keep``, serves the passes that follow."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture

    def reached(self, root: Tensor) -> set[str]:
        """Names of the parameters that the root depends on."""
        leaves = {id(leaf): t.name for t in self._capture.tracked.values() for leaf in t.leaves}
        variables = (getattr(node, "variable", None) for node in graph(root))
        return {leaves[id(variable)] for variable in variables if id(variable) in leaves}

    def run(self, root: Tensor, cotangent: Tensor, listener: Listener, keep: bool = True) -> None:
        """One pass; ``listener`` hears of each caught call."""
        self._gradients(root, [self._capture.mode.anchor], cotangent, listener, keep)

    def first_non_finite(self, root: Tensor, one: Pass) -> str | None:
        """The parameter that a pass first brings a gradient that is not finite."""
        found: list[str] = []

        def listen(call: Call, g: Tensor | None, saved: tuple[Tensor, ...]) -> None:
            if not found and g is not None and not bool(g.isfinite().all()):
                found.append(call.uses[0].tracked.name)

        self.run(root, one.cotangent, listen)
        return next(iter(found), None)

    def gradients(self, root: Tensor, tracked: Sequence[Tracked], cotangent: Tensor) -> list[Tensor]:
        """Gradients of parameters that autograd differentiates in this graph, by autograd itself."""
        ways = [(t, leaf) for t in tracked for leaf in t.leaves]
        found = {t.name: torch.zeros_like(t.detached) for t in tracked}
        for (t, _), grad in zip(ways, self.gradients_of_leaves(root, [leaf for _, leaf in ways], cotangent), strict=True):
            if grad is not None:
                found[t.name] = found[t.name] + grad
        return list(found.values())

    def gradients_of_leaves(self, root: Tensor, leaves: list[Tensor], cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """The same of any leaves."""
        return self._gradients(root, leaves, cotangent, lambda *_: None, keep=True)

    def _gradients(
        self, root: Tensor, inputs: list[Tensor], cotangent: Tensor, listener: Listener, keep: bool
    ) -> tuple[Tensor | None, ...]:
        capture = self._capture
        capture.listener = listener
        try:
            # Gradient checkpointing runs parts of the forward pass again, and they must be caught again.
            with capture.again(root), torch._C._EnableTorchFunction(), capture:
                return _run_backward((root,), (cotangent,), keep, False, tuple(inputs), True, accumulate_grad=False)
        except RuntimeError as error:
            if "selective activation checkpoint" not in str(error):
                raise
            raise ValueError(
                "model: gradient checkpointing must be of whole parts, got torch's selective activation checkpointing, whose saved tensors are "
                "good for one backward pass; leave out context_fn while the model is measured"
            ) from error
        finally:
            capture.listener = None
