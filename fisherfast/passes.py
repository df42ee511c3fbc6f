# SPDX-License-Identifier: Apache-2.0
"""Passes: backward passes through a captured graph, from the probe that finds the sample axis to the ones that count.

The driver between capture (which hears x and g of each call) and the collectors (which add them up). It knows nothing of
likelihoods or of what a collector computes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fisherfast.capture import Call, CallUse, Capture, Listener, Tracked
from fisherfast.layout import Evidence, masks
from fisherfast.rules import Form, Rows


class NonFiniteError(ArithmeticError):
    """A NaN or an infinity where a finite number was needed; ``.fisher`` holds what was accumulated before."""


class Collector(Protocol):
    """What a Fisher structure does with the rows of a batch. One batch is ``begin``, any adds, ``settle``."""

    def begin(self, passes: int, N: int, weight: Tensor | None) -> None:
        """Start a batch of N samples, weighted ``[N]`` float32 or not, and of that many backward passes."""

    def add(self, tracked: Tracked, form: Form, rows: Rows, scale: float) -> None:
        """Take one parameter's rows of one backward pass, samples first: ``scale * (sample gradient)^2`` counts."""

    def add_gradients(self, tracked: Tracked, gradients: Tensor, first: int, scale: float) -> None:
        """Take whole sample gradients ``[n, *parameter]`` of samples ``first, ..., first + n - 1``, from the fallback."""

    def touch(self, tracked: Tracked) -> None:
        """Note that the batch's gradient of this parameter is zero."""

    def settle(self, N: int, complete: bool) -> list[str]:
        """End the batch: weights for what was added. Returns the parameters that met non-finite rows (not added)."""


@dataclass(frozen=True)
class Pass:
    """One backward pass that counts: the gradient of the summed loss at the root, and the scale of its squares."""

    cotangent: Tensor
    scale: float = 1.0


class Passes:
    """Runs backward passes on the graphs of one capture."""

    def __init__(self, capture: Capture, collectors: list[Collector]) -> None:
        self.capture, self.collectors = capture, collectors
        self.undetermined: set[str] = set()  # covered by rules, but of unknown layout in the batch at hand

    # -- exploring

    def reached(self, root: Tensor) -> set[str]:
        """Names of the parameters whose leaf stand-ins the root depends on."""
        leaves = {id(t.leaf): t.name for t in self.capture.tracked.values()}
        seen, stack, names = set(), [root.grad_fn], set()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in leaves:
                names.add(leaves[id(variable)])
            stack.extend(parent for parent, _ in node.next_functions)
        return names

    def probe(self, root: Tensor, cotangent: Tensor) -> dict[tuple[str, int], Evidence]:
        """Back-propagate subsets of the samples and record what each use saw; keeps the graph.

        ``root`` and ``cotangent`` have the sample axis first.
        """
        N = root.shape[0]
        self.capture.calls(root)
        evidence: defaultdict[tuple[str, int], Evidence] = defaultdict(Evidence)
        for mask in masks(N, root.device):

            def see(call: Call, g: Tensor | None, saved: tuple[Tensor, ...], mask: Tensor = mask) -> None:
                if g is not None:
                    for use in call.uses:
                        evidence[use.key].see(_rows(use, g, saved).g, mask)

            chosen = cotangent * mask.to(cotangent.dtype).view(-1, *(1,) * (cotangent.dim() - 1))
            self._backward(root, chosen, see, keep=True)
        return dict(evidence)

    def route_mixed_forms(self, root: Tensor) -> None:
        """Send parameters used in different forms (an embedding tied to a head, say) to the loop over samples."""
        forms: defaultdict[str, set[tuple[str, bool]]] = defaultdict(set)
        for call, _ in self.capture.calls(root):
            for use in call.uses:
                forms[use.tracked.name].add((use.form.op, getattr(use.form, "transposed", False)))
        for name, kinds in forms.items():
            if len(kinds) > 1:
                ops = " and ".join(sorted({op for op, _ in kinds}))
                self.capture.tracked[name].loop_reason = f"one tensor used in different forms ({ops})"

    # -- counting

    def run(self, root: Tensor, passes: Iterable[Pass], count: int, keep: bool = False) -> list[Call]:
        """Back-propagate ``count`` passes and hand each parameter's rows, all its uses joined, to the collectors.

        Returns the calls that the root depends on.
        """
        calls = [call for call, _ in self.capture.calls(root)]
        expected: defaultdict[str, int] = defaultdict(int)
        for call in calls:
            for use in call.uses:
                expected[use.tracked.name] += 1
        for number, one in enumerate(passes, start=1):
            self._run_one(root, one, expected, keep or number < count)
        for name, tracked in self.capture.tracked.items():
            if not expected[name] and tracked.loop_reason is None:
                for collector in self.collectors:
                    collector.touch(tracked)
        return calls

    def _run_one(self, root: Tensor, one: Pass, expected: dict[str, int], keep: bool) -> None:
        N = root.shape[0]
        visited: defaultdict[str, int] = defaultdict(int)
        waiting: defaultdict[str, list[Rows]] = defaultdict(list)

        def listen(call: Call, g: Tensor | None, saved: tuple[Tensor, ...]) -> None:
            for use in call.uses:
                if use.tracked.loop_reason is not None:
                    continue
                name = use.tracked.name
                visited[name] += 1
                rows = None if g is None else self._samples_first(use, _rows(use, g, saved), N)
                if rows is not None:
                    waiting[name].append(rows)
                if visited[name] == expected[name] and name not in self.undetermined:
                    self._hand_over(use, waiting.pop(name, []), one.scale)

        self._backward(root, one.cotangent, listen, keep)
        for name, uses in expected.items():
            if visited[name] != uses and self.capture.tracked[name].loop_reason is None:
                raise RuntimeError(
                    f"{name}: its {uses} uses must each be visited once by the backward pass, got {visited[name]} visits; "
                    "part of the graph was cut or replaced after the forward pass. Nothing of this batch is trusted"
                )

    def _samples_first(self, use: CallUse, rows: Rows, N: int) -> Rows | None:
        """Rows as ``[N, T, ...]``, or None where g is zero or its layout is unknown (then noted as undetermined)."""
        x, g, _ = rows
        if N == 1:
            return Rows(None if x is None else x.reshape(1, -1, x.shape[-1]), g.reshape(1, -1, g.shape[-1]))
        layout = self.capture.layouts.get(use.key)
        if layout is None:
            if bool((g != 0).any()):
                self.undetermined.add(use.tracked.name)
            return None
        lead = tuple(g.shape[:-1])
        if not layout.fits(lead, N):
            raise ValueError(
                f"{use.tracked.name}: rows must hold the batch's {N} samples along axis {layout.axis} ({layout.kind.value}, as the "
                f"probe found), got leading axes {lead}; the model's layout must not change from batch to batch"
            )
        return Rows(None if x is None else layout.samples_first(x, N), layout.samples_first(g, N))

    def _hand_over(self, use: CallUse, rows: list[Rows], scale: float) -> None:
        if not rows:
            for collector in self.collectors:
                collector.touch(use.tracked)
            return
        joined = rows[0] if len(rows) == 1 else use.form.joined(rows)
        for collector in self.collectors:
            collector.add(use.tracked, use.form, joined, scale)

    def loop(self, root: Tensor, tracked: list[Tracked], n: int, passes: Iterable[Pass]) -> None:
        """Hand sample n's gradients by autograd itself to the collectors: the loop's share. Keeps the graph."""
        leaves = [t.leaf for t in tracked]
        for one in passes:
            grads = self._grad(root, leaves, one.cotangent, lambda *_: None, keep=True)
            for which, grad in zip(tracked, grads, strict=True):
                gradient = torch.zeros_like(which.leaf) if grad is None else grad
                for collector in self.collectors:
                    collector.add_gradients(which, gradient.unsqueeze(0), n, one.scale)

    def _backward(self, root: Tensor, cotangent: Tensor, listener: Listener, keep: bool) -> None:
        self._grad(root, [self.capture.anchor], cotangent, listener, keep)

    def _grad(
        self, root: Tensor, inputs: list[Tensor], cotangent: Tensor, listener: Listener, keep: bool
    ) -> tuple[Tensor | None, ...]:
        self.capture.listener = listener
        try:
            return torch.autograd.grad(root, inputs, cotangent, retain_graph=keep, allow_unused=True)
        finally:
            self.capture.listener = None


def _rows(use: CallUse, g: Tensor, saved: tuple[Tensor, ...]) -> Rows:
    return use.form.rows(g, tuple(saved[i] for i in use.picks))


def conclude(capture: Capture, evidence: dict[tuple[str, int], Evidence]) -> set[str]:
    """Write the layouts the evidence establishes into the capture; return the parameters whose rows mix samples."""
    mixing = set()
    for key, seen in evidence.items():
        if seen.layout is not None:
            capture.layouts[key] = seen.layout
        elif seen.mixes_samples:
            mixing.add(key[0])
    return mixing
