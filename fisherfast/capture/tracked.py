# SPDX-License-Identifier: Apache-2.0
"""What a capture follows: parameters, what is made of them before any sample comes in, and the tensors in which they appear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unbatched:
    """The shape of the output of a use without a sample axis: how many axes it has, and whether axis 0 has length 1 and can be expanded to N."""

    axes: int
    has_place: bool

    @classmethod
    def of(cls, shape: torch.Size) -> Unbatched:
        """From the shape of an output that is known to have no sample axis."""
        return cls(len(shape), shape[:1] == (1,))

    def with_samples(self, N: int, shape: torch.Size) -> tuple[int, ...]:
        """The shape of a use's output with N samples in front; as it is, if it has them already."""
        if len(shape) != self.axes:
            return tuple(shape)
        if self.has_place:
            return (N, *shape[1:]) if shape[0] == 1 else tuple(shape)
        return (N, *shape)

    def doubts(self, shape: torch.Size, N: int) -> bool:
        """Whether an output that seems to lack the sample axis may have it: its first axis is as long as the batch."""
        return len(shape) == self.axes and not self.has_place and shape[:1] == (N,) and N > 1


class Ways(NamedTuple):
    """How the uses of a parameter are treated in one forward pass."""

    caught: bool
    differentiated: bool  # whether autograd's own path to it stays open beside the taps
    expanding: Unbatched | None  # the uses that are given a sample axis


class Tracked:
    """A parameter that asks for a gradient, its stand-ins, and how it is covered.

    Uses that are caught see ``detached``, or ``leaf`` where autograd is to differentiate them. What else is made of it, views and
    copies first of all, is made of ``outer``: a graph that leads there, or to the parameter, holds a use that was not caught.
    """

    def __init__(self, name: str, parameter: Tensor) -> None:
        self.name, self.parameter = name, parameter
        self.detached = parameter.detach()
        self.leaf, self.outer = parameter.detach().requires_grad_(), parameter.detach().requires_grad_()
        self.fallback: str | None = None  # why no op covers it
        # Whether all its uses are caught nonetheless: sample gradients are sums over them, by the chain rule.
        self.chained = False
        self.expand: Unbatched | None = None  # give it a sample axis where it is used without one
        self.ways = Ways(caught=True, differentiated=False, expanding=None)  # in force in this forward pass

    @property
    def sources(self) -> tuple[Tracked, ...]:
        """The parameters that it is, or is made of."""
        return (self,)

    @property
    def structure(self) -> int:
        """A number for how it is made, the same in every forward pass."""
        return hash(self.name)

    @property
    def in_chain(self) -> bool:
        """Whether its uses are summed, sample by sample, for a parameter in the chain rule."""
        return any(source.chained for source in self.sources)

    @property
    def looped(self) -> bool:
        """Whether its sample gradients are left to autograd."""
        return self.fallback is not None and not self.chained

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors by which a graph can lead to it."""
        return self.leaf, self.outer, self.parameter

    def begin(self, exploring: bool) -> None:
        """Bring into force, for a forward pass, what was decided since the last one."""
        self.follow()
        self.ways = Ways(not self.looped, exploring or self.expand is not None or self.looped, self.expand)

    def follow(self) -> None:
        """Have the stand-ins share the parameter's memory, also where somebody gave it another (``parameter.data = ...``)."""
        if self.detached.data_ptr() != self.parameter.data_ptr():
            self.detached.data = self.leaf.data = self.outer.data = self.parameter.data

    def give_up(self, reason: str) -> None:
        """Leave it to the fallback; of several reasons the first is reported."""
        self.fallback, self.chained = self.fallback or reason, False

    def chain(self, reason: str) -> None:
        """Cover it by the chain rule, unless it is left to the fallback already."""
        if self.fallback is None:
            self.fallback, self.chained = reason, True

    def pull_back(self, gradient: Tensor) -> list[Tensor]:
        """The gradients of its sources, from its own gradient."""
        return [gradient]


class Derived(Tracked):
    """What a function without samples has made of parameters: a normed weight, a table of biases looked up at every position.

    For the uses that follow it is a parameter, of this forward pass: its sample gradients are those of its sources, by the chain rule.
    """

    def __init__(self, by: str, tensor: Tensor, sources: tuple[Tracked, ...], structure: int) -> None:
        self.kind = self.name = f"what {by} makes of {' and '.join(t.name for t in sources)}"  # the name is numbered later
        self.parameter, self._sources, self._structure = tensor, sources, structure
        self.reason = sources[0].fallback or ""  # why these are in the chain
        self.outer, self.detached = tensor, tensor.detach()
        self.ways = Ways(all(t.ways.caught for t in sources), any(t.ways.differentiated for t in sources), expanding=None)
        self.leaf = Boundary.apply(tensor) if self.ways.differentiated else tensor
        self.fallback, self.chained, self.expand = "made of parameters", False, None

    @property
    def sources(self) -> tuple[Tracked, ...]:
        """See ``Tracked``."""
        return self._sources

    @property
    def structure(self) -> int:
        """See ``Tracked``."""
        return self._structure

    def follow(self) -> None:
        """See ``Tracked``: nobody can give it other memory."""

    def give_up(self, reason: str) -> None:
        """See ``Tracked``."""
        for source in self.sources:
            source.give_up(reason)

    def chain(self, reason: str) -> None:
        """See ``Tracked``."""
        for source in self.sources:
            source.chain(reason)

    def pull_back(self, gradient: Tensor) -> list[Tensor]:
        """See ``Tracked``. The graph is kept."""
        inputs = [source.outer for source in self.sources]
        found = torch.autograd.grad(self.parameter, inputs, gradient, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(t) if grad is None else grad for t, grad in zip(inputs, found, strict=True)]


class Boundary(torch.autograd.Function):
    """Identity node between what was made of parameters and the caught uses of it.

    ``calls.graph(closed=True)`` does not look behind it: what is there was itself made of ``outer`` tensors, which anywhere else mark a use
    that was not caught.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """A copy, because torch forbids a later use to write into a view made here."""
        ctx.boundary = True
        ctx.set_materialize_grads(False)
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Tensor | None:
        """The gradient as it is."""
        return g
