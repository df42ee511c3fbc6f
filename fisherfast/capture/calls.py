# SPDX-License-Identifier: Apache-2.0
"""What is caught of a forward pass, and where it is kept: in the autograd graph behind its outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fisherfast._nested import tensors
from fisherfast._precision import wide
from fisherfast.capture.chosen_rows import Chosen
from fisherfast.capture.tracked import Tracked, Ways
from fisherfast.rules import Form, Rows, Window

Key = tuple[str, Window | None, int, int]  # parameter, part of it, number among the uses of that part, and how many they are


@dataclass(frozen=True)
class Site:
    """Identity of a covered call of parameters and of tensors that no parameter went into, by which it is recognised in later forward passes.

    ``structure`` hashes the function and its parameters; ``lengths`` are the axis lengths of the other tensors, and no part of the identity.
    """

    structure: int
    lengths: frozenset[int] = field(compare=False)  # of the axes of its other arguments

    def may_hold(self, N: int) -> bool:
        """Whether one of its other arguments may hold N samples after all: a model's inputs do, and autograd does not follow them."""
        return any(length % N == 0 for length in self.lengths if length)


@dataclass(frozen=True, eq=False)
class ForwardSettings:
    """The settings that a forward pass runs under.

    Kept with its calls, because gradient checkpointing runs parts of that pass again during the backward pass, by when later decisions may
    have been made.
    """

    exploring: bool
    num_samples: int | None
    followed_sites: dict[
        Site, str
    ]  # calls that no sample enters and whose results are followed like parameters; and why they are
    ways: dict[str, Ways]  # of each parameter


@dataclass
class CallUse:
    """One tracked parameter in one caught call; ``saved_at`` are the positions of its inputs among the call's saved ones."""

    tracked: Tracked
    form: Form
    saved_at: tuple[int, ...]
    # While exploring, which tensors its inputs are, a number each; autograd sees to it that nobody changes them.
    inputs: tuple[int, ...] = ()
    key: Key = ("", None, 0, 0)
    chosen: Chosen = Chosen.NO  # whether its rows were by what the data holds
    differentiated: bool = True  # whether autograd can differentiate it, too
    factor: float = 1.0  # what was used is so many times the parameter

    @property
    def gathered(self) -> bool:
        """Whether data surely chose its rows: those without a gradient may be padding."""
        return self.chosen is Chosen.YES

    def rows(self, g: Tensor, saved: tuple[Tensor, ...]) -> Rows:
        """Its rows, from the gradient of the call's output and all that the call saved."""
        if self.factor != 1:
            g = wide(g) * self.factor
        return self.form.rows(g, tuple([saved[i] for i in self.saved_at]))

    @property
    def window(self) -> Window | None:
        """The part of the parameter that is used; None for all of it."""
        return self.form.window


class TapOwner(Protocol):
    """A capture, as its taps see it."""

    def on_gradient(self, call: Call, g: Tensor | None, saved: tuple[Tensor, ...]) -> Tensor | None:
        """Take a tap's gradient and saved inputs; the gradient that goes on."""


@dataclass
class Call:
    """One caught call: its place in the forward pass and the uses that share its tap."""

    index: int
    capture: TapOwner
    shape: torch.Size  # of the output
    under: ForwardSettings
    site: Site | None = None  # if no sample came in here
    viewed: bool = False  # whether the tap is on what the output is a view of
    uses: list[CallUse] = field(default_factory=list)
    counted: int = 0  # backward passes that have counted: of several each is another draw of the same samples


class Tap(torch.autograd.Function):
    """The identity on a call's output; in the backward pass, passes g and the saved inputs on to the capture."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor, call: Call, *saved: Tensor) -> Tensor:
        """``out``, the same tensor."""
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.mark_dirty(out)  # the same tensor, not a view of it: an in-place activation may follow
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        """``g``, once the capture has heard it."""
        saved, call = ctx.saved_tensors, ctx.call  # once: a checkpointed tensor can be unpacked only once
        g = call.capture.on_gradient(call, g, saved)  # also of no gradient at all: a visit counts
        return (g, None, None, *(None for _ in saved))


def tapped(node: Any, owner: TapOwner) -> Call | None:
    """The call whose tap an autograd node is, if it is one that ``owner`` is told of."""
    call = getattr(node, "call", None)
    return call if isinstance(call, Call) and call.capture is owner else None


def writable(out: Tensor, given: Any) -> Tensor:
    """The tensor that a tap may mark as modified in place of ``out``: ``out`` itself, the base that it is a view of all of, or a copy.

    Marking a tensor increments its version, so what the function was ``given``, and what shares memory with that, must not be marked.
    """
    base = out._base
    if base is None:
        return out.clone() if out.is_leaf and out.requires_grad else out
    whole = base.numel() == out.numel() and base.is_contiguous() and out.is_contiguous()  # as of a linear map of sequences
    mine = all(base is not leaf and base is not leaf._base for leaf in tensors(given))
    return base if whole and mine else out.clone()


def nodes(root: Tensor, closed: bool = False) -> Iterator[Any]:
    """All autograd nodes behind ``root``; ``closed``: without those behind a ``Boundary``."""
    seen, stack = set(), [root.grad_fn]
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if closed and hasattr(node, "boundary"):
            continue
        stack.extend(parent for parent, _ in node.next_functions)


def graph(root: Tensor, closed: bool = False) -> Iterator[Any]:
    """The ``nodes`` behind a loss or a model's output. Errors: ValueError where they hide some."""
    for node in nodes(root, closed):
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise ValueError(
                "model: gradient checkpointing must be torch's with use_reentrant=False, got use_reentrant=True, which hides the layers "
                "from autograd; pass use_reentrant=False (Hugging Face: gradient_checkpointing_kwargs)"
            )
        yield node


def in_parts(calls: list[Call]) -> set[str]:
    """Names of the parameters of which several parts are used, each for itself."""
    parts = {(use.tracked.name, use.window) for call in calls for use in call.uses}
    return {name for name, count in Counter(name for name, _ in parts).items() if count > 1}
