# SPDX-License-Identifier: Apache-2.0
"""A capture: the parameters of one model that are followed, what was decided of them, and what a loss's graph says of their uses."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fisherfast._warning import warn
from fisherfast.capture.calls import Call, ForwardSettings, Key, Site, graph, tapped
from fisherfast.capture.eager import EAGER
from fisherfast.capture.layout import Layout
from fisherfast.capture.mode import Mode
from fisherfast.capture.parameters import measurable, unwrapped
from fisherfast.capture.tracked import Tracked
from fisherfast.capture.uses import Uses, number

Listener = Callable[[Call, Tensor | None, tuple[Tensor, ...]], None]


class Capture:
    """The capture of one model; while it is entered, ``mode`` catches what the model does with its parameters."""

    def __init__(self, model: nn.Module) -> None:
        root = unwrapped(model)
        named = measurable(root)
        self.device = next(iter(named.values())).device
        self._root = root
        self._first = {id(p): p for p in named.values()}  # held, so that no other gets the id of one
        self._forgotten: dict[int, str] = {}  # names of parameters that are no longer tracked
        self.tracked = {name: Tracked(name, p) for name, p in named.items()}
        names = {id(t.parameter): t.name for t in self.tracked.values()}
        self.aliases = {
            alias: names[id(p)]
            for alias, p in root.named_parameters(remove_duplicate=False)
            if id(p) in names and alias != names[id(p)]
        }
        self.layouts: dict[Key, Layout] = {}
        self.listener: Listener | None = None
        self._followed_sites: dict[Site, str] = {}  # see ``ForwardSettings``; from the next forward pass on
        self.mode = Mode(root, self.device, self)
        self.begin(exploring=True)

    def __enter__(self) -> Capture:
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "model: must be measured outside torch.inference_mode(), which keeps no graph; torch.no_grad() is no obstacle"
            )
        EAGER.acquire()
        saved_hooks = self.mode.saved_hooks
        outermost = not saved_hooks  # inside, they are those of a part of the model
        saved_hooks.append(torch._C._autograd._top_saved_tensors_default_hooks(True) if outermost else saved_hooks[-1])
        self.mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)
        EAGER.release()
        self.mode.saved_hooks.pop()

    def begin(self, exploring: bool, num_samples: int | None = None, offsets: Tensor | None = None) -> None:
        """Prepare a forward pass: what was decided since the last one comes into force.

        ``exploring``: stand-ins keep autograd's own path to every parameter open beside the tap. ``num_samples``: of the
        batch, where known; needed to expand. ``offsets``: where packed samples begin and end.
        """
        self.offsets = offsets
        for tracked in self.tracked.values():
            tracked.begin(exploring)
        ways = {tracked.name: tracked.ways for tracked in self.tracked.values()}
        self.mode.begin(ForwardSettings(exploring, num_samples, dict(self._followed_sites), ways), self.tracked.values())

    @contextmanager
    def again(self, root: Tensor) -> Iterator[None]:
        """Where parts of the forward pass behind ``root`` run again: under the decisions that were in force in it."""
        first = next(filter(None, (tapped(node, self) for node in graph(root))), None)
        then, now = self.mode.settings if first is None else first.under, self.mode.settings
        if then is now:
            yield
            return
        self._set(then)
        try:
            yield
        finally:
            self._set(now)

    def _set(self, decisions: ForwardSettings) -> None:
        self.mode.settings = decisions
        for name, tracked in self.tracked.items():
            tracked.ways = decisions.ways[name]

    @property
    def narrow(self) -> bool:
        """Whether gradients pass through float16."""
        kind = self.device.type
        cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        return cast or self.mode.halves or any(t.parameter.dtype == torch.float16 for t in self.tracked.values())

    def follow_further(self, uses: Uses, names: Container[str], reason: str) -> bool:
        """From the next forward pass on, treat what calls make of none but the parameters ``names``, where no sample comes in, as
        parameters themselves. Returns whether the root of ``uses`` depends on any such call.
        """
        calls = [call for call in uses.calls if all(use.tracked.name in names for use in call.uses)]
        sites = {call.site for call in calls if call.site is not None}
        if sites - self._followed_sites.keys():  # what is made of parameters is numbered, and will have other numbers
            self.layouts = {key: layout for key, layout in self.layouts.items() if key[0] in self.tracked}
        self._followed_sites.update((site, reason) for site in sites)
        return bool(sites)

    def forget(self, name: str) -> None:
        """Stop tracking a parameter; ``read`` warns of the first root that it reaches."""
        parameter = self.tracked.pop(name).parameter
        self.mode.forget(parameter)
        self._forgotten[id(parameter)] = name

    def check_parameters(self) -> None:
        """Raise ValueError if the model has got parameters since, new ones or others in the place of those it had."""
        owned = (p for module in self._root.modules() for p in module._parameters.values() if p is not None)
        if all(id(p) in self._first or not p.requires_grad for p in owned):
            return
        for name, p in self._root.named_parameters():  # which may be fewer than the modules have, by the model's own choice
            if p.requires_grad and id(p) not in self._first:
                raise ValueError(
                    f"model: its parameters must stay those that the measurement began with, got a new, replaced or unfrozen {name!r}; "
                    "begin another measurement, or change numbers in place"
                )

    def on_gradient(self, call: Call, g: Tensor | None, saved: tuple[Tensor, ...]) -> Tensor | None:
        """Pass a tap's gradient on to the listener of the current backward pass. Returns it for the model's own functions."""
        if self.listener is None:
            raise RuntimeError(
                "model: captured layers must be differentiated by stats.backward(loss) or ff.fisher only, got another backward pass; in "
                "ff.collect call stats.backward(loss) with the vector of per-sample losses instead of loss.backward(). A model that "
                "differentiates inside its own forward pass (forces of an energy) cannot be measured"
            )
        with self.aside():
            shaped = None if g is None else g.reshape(call.shape)  # the tap may be on what the output is a view of
            self.listener(call, shaped, saved)
            # torch 2.13's batch_norm in eval mode takes the strides of one sample for others, on CPUs.
            return g.contiguous() if g is not None and g.shape[:1] == (1,) else g

    @contextmanager
    def aside(self) -> Iterator[None]:
        """For the library's own arithmetic: hidden from modes, without a graph, and not rounded by autocast."""
        kind = self.device.type
        rounds = torch.is_autocast_enabled(kind)
        with (
            torch._C.DisableTorchFunction(),
            torch._C._AutoDispatchBelowAutograd(),
            torch.autocast(kind, enabled=False) if rounds else nullcontext(),
        ):
            yield

    # -- the graph behind a loss

    def read(self, root: Tensor) -> Uses:
        """The uses that ``root`` depends on, read off the graph, so a forward pass that is never differentiated counts for nothing.

        It also brings up to date what is known of parameters, once and for all that follows:

        * What was made of parameters is named and numbered in the order of the forward pass, and so are the uses of each parameter, or of
          a part of one: a use's key ends with its number, and with how many there are.
        * A parameter with a use that was not caught, because no function shows it, goes to the fallback; one of which something was made
          and used is in the chain rule, whatever was decided since.
        * A parameter that was forgotten and is reached nonetheless has a warning, once.
        """
        found = self._taps(root)
        calls = [call for call, _ in found]
        number(calls)
        outdated = bool(self._followed_sites) and any(call.site in self._followed_sites for call in calls)
        return Uses(root, calls, [node for _, node in found], self.tracked, outdated)

    def _taps(self, root: Tensor) -> list[tuple[Call, Any]]:
        """The calls behind ``root``, each with its tap; gives up the parameters that are seen without one, and warns of forgotten ones."""
        found = []
        uncaught = {id(leaf): t for t in self.tracked.values() for leaf in (t.outer, t.parameter)}
        for node in graph(root, closed=True):
            call = getattr(node, "call", None)
            if isinstance(call, Call):
                if call.capture is not self:
                    self._refuse_shared(call)
                else:
                    found.append((call, node))
            leaf = id(getattr(node, "variable", None))
            if leaf in self._forgotten:
                warn(
                    f"{self._forgotten.pop(leaf)}: should reach the loss in the first batch, or in none, got a later batch that it reaches; "
                    "it is missing in the result. Begin with a batch that reaches every parameter",
                )
            hidden = uncaught.get(leaf)
            if hidden is not None:
                hidden.give_up("a use that no torch function shows")
        return sorted(found, key=lambda pair: pair[0].index)

    def _refuse_shared(self, call: Call) -> None:
        """Raise ValueError if the call, which another capture caught, is of a parameter of this one."""
        theirs = {id(source.parameter) for use in call.uses for source in use.tracked.sources}
        for tracked in self.tracked.values():
            if id(tracked.parameter) in theirs:
                raise ValueError(
                    f"{tracked.name}: must be caught by one collect, got a loss in which it was caught by another; give all structures to one, "
                    "collect(model, ff.Diagonal(), ff.KFAC()), or run the model in the block of one alone"
                )
