# SPDX-License-Identifier: Apache-2.0
"""Capture: what is caught is the use of a parameter by a function, whatever module wrote the call.

A ``TorchFunctionMode`` sees every torch function that receives a tracked parameter, or a view of one. Where a rule covers
the call, the parameter is replaced by its detached alias (so autograd never runs the weight-gradient GEMM) and the output
passes through a *tap*: an autograd node that changes nothing, keeps the saved inputs as any node does, and in the backward
pass hands them with g to whoever listens. A function that is made of such functions is taken apart. A function that gives
back memory of the parameter itself makes a view, which is followed. What a function makes of parameters alone, before a
sample comes in, is followed as if it were a parameter. Where nothing fits, the parameter is replaced by a leaf alias that
autograd can differentiate, for the fallback. The model itself is never touched: no hooks, no flags, no ``.grad``.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from fisherfast._nested import replaced, tensors
from fisherfast._warning import warn
from fisherfast.capture.alias import Alias, Aliases, is_part, keeps_derivative
from fisherfast.capture.calls import Call, CallUse, Decisions, Key, Site, Tap, graph, nodes, writable
from fisherfast.capture.chosen_rows import Chosen, ChosenRows
from fisherfast.capture.eager import EAGER
from fisherfast.capture.layout import Layout
from fisherfast.capture.parameters import measurable
from fisherfast.capture.tracked import Made, Tracked
from fisherfast.capture.train_mode import CHANCE, DRAWING, Draws, is_parameter, refused_chance, undivided, unwrapped
from fisherfast.capture.under_way import Given, runs
from fisherfast.capture.uses import Uses, number
from fisherfast.rules import DECOMPOSITIONS, RULES, Use, Window, part

_GRAD = vars(torch._C.TensorBase)["grad"]
_DATA = vars(torch._C.TensorBase)["data"]
Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]
Listener = Callable[[Call, Tensor | None, tuple[Tensor, ...]], None]


class Capture(TorchFunctionMode):
    """The mode that catches the uses of a model's parameters while it is entered."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        root = unwrapped(model)
        named = measurable(root)
        self.device = next(iter(named.values())).device
        self._root = root
        self._draws = Draws(root)
        self.given: Given | None = None  # what the model is called with, where someone asks
        self._first = {id(p): p for p in named.values()}  # held, so that no other gets the id of one
        self._forgotten: dict[int, str] = {}  # names of parameters that are no longer tracked
        self.tracked = {name: Tracked(name, p) for name, p in named.items()}
        names = {id(t.parameter): t.name for t in self.tracked.values()}
        self.aliases = {
            alias: names[id(p)]
            for alias, p in root.named_parameters(remove_duplicate=False)
            if id(p) in names and alias != names[id(p)]
        }
        self.anchor = torch.zeros((), device=self.device, requires_grad=True)
        self.layouts: dict[Key, Layout] = {}
        self.listener: Listener | None = None
        self._halves = False  # whether a use had a float16 output: autocast may be over when it is differentiated
        self._early: dict[Site, str] = {}  # see ``Decisions``; from the next forward pass on
        self._counter, self._numbers = itertools.count(), itertools.count()
        self._keepers: list[Hooks | None] = []  # what autograd's saved tensors went through when the mode was entered
        self.begin(exploring=True)

    def __enter__(self) -> Capture:
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "model: must be measured outside torch.inference_mode(), which keeps no graph; torch.no_grad() is no obstacle"
            )
        EAGER.take()
        outermost = not self._keepers  # inside, they are those of a part of the model
        self._keepers.append(torch._C._autograd._top_saved_tensors_default_hooks(True) if outermost else self._keepers[-1])
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        EAGER.give_back()
        self._keepers.pop()

    def begin(self, exploring: bool, num_samples: int | None = None, offsets: Tensor | None = None) -> None:
        """Prepare a forward pass: what was decided since the last one comes into force.

        ``exploring``: stand-ins keep autograd's own path to every parameter open beside the tap. ``num_samples``: of the
        batch, where known; needed to expand. ``offsets``: where packed samples begin and end.
        """
        self.offsets, self.doubtful = offsets, False
        self.without_graph: set[str] = set()  # names of parameters that were used where no graph is kept
        for tracked in self.tracked.values():
            tracked.begin(exploring)
        ways = {tracked.name: tracked.ways for tracked in self.tracked.values()}
        self._now = Decisions(exploring, num_samples, dict(self._early), ways)
        self._chosen = ChosenRows(num_samples)
        self._seen = WeakTensorKeyDictionary()  # inputs of calls, numbered
        self._aliases = Aliases(self.tracked.values())

    @contextmanager
    def again(self, root: Tensor) -> Iterator[None]:
        """Where parts of the forward pass behind ``root`` run again: under the decisions that were in force in it."""
        first = next(filter(None, map(self._call_of, graph(root))), None)
        then, now = self._now if first is None else first.under, self._now
        if then is now:
            yield
            return
        self._set(then)
        try:
            yield
        finally:
            self._set(now)

    def _set(self, decisions: Decisions) -> None:
        self._now = decisions
        for name, tracked in self.tracked.items():
            tracked.ways = decisions.ways[name]

    @property
    def narrow(self) -> bool:
        """Whether gradients pass through float16."""
        kind = self.device.type
        cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        return cast or self._halves or any(t.parameter.dtype == torch.float16 for t in self.tracked.values())

    def follow_further(self, uses: Uses, names: Container[str], reason: str) -> bool:
        """From the next forward pass on, treat what calls make of none but the parameters ``names``, where no sample comes in, as
        parameters themselves. Returns whether the root of ``uses`` depends on any such call.
        """
        calls = [call for call in uses.calls if all(use.tracked.name in names for use in call.uses)]
        sites = {call.site for call in calls if call.site is not None}
        if sites - self._early.keys():  # what is made of parameters is numbered, and will have other numbers
            self.layouts = {key: layout for key, layout in self.layouts.items() if key[0] in self.tracked}
        self._early.update((site, reason) for site in sites)
        return bool(sites)

    def forget(self, name: str) -> None:
        """Stop tracking a parameter; ``read`` warns of the first root that it reaches."""
        parameter = self.tracked.pop(name).parameter
        self._aliases.forget(parameter)
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

    def heard(self, call: Call, g: Tensor | None, saved: tuple[Tensor, ...]) -> Tensor | None:
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

    # -- the forward pass

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` as ``_run`` does, unless it is one of those that leave no sample a gradient of its own."""
        kwargs = kwargs or {}
        if func in CHANCE:
            why = refused_chance(func, args, kwargs, lambda tensor: tensor in self._aliases or is_parameter(tensor))
            if why and self._concerns(tensors(args, kwargs)):
                raise ValueError(why)
        out = self._run(func, *undivided(func, args, kwargs))
        if func in DRAWING:
            self._draws.look(func, kwargs, out)
        return out

    def _concerns(self, given: list[Tensor]) -> bool:
        """Whether a call is the measured model's: a method of it is running, or a tensor that it was given depends on a parameter."""
        if runs(self._root):
            return True
        leaves = {id(leaf) for t in self.tracked.values() for leaf in t.leaves}

        def ours(node: Any) -> bool:
            return self._call_of(node) is not None or id(getattr(node, "variable", None)) in leaves

        return any(id(t) in leaves or t in self._aliases or any(map(ours, nodes(t))) for t in given)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run ``func``; where it receives tracked parameters, with their stand-ins and a tap."""
        if getattr(func, "__self__", None) is _DATA:
            self._aliases.give_up_copies_of(args[0])
        given = tensors(args, kwargs)
        found = self._aliases.among(given)
        if not found or _without_a_graph(func):
            out = func(*args, **kwargs)
            for alias in found:
                alias.tracked.follow()
                if not torch.is_grad_enabled():
                    self.without_graph |= {source.name for source in alias.tracked.sources}
            self._chosen.follow(func, args, kwargs, given, out)
            return out
        if getattr(func, "__name__", "") == "__get__" and not isinstance(func(*args, **kwargs), Tensor):
            return func(*args, **kwargs)
        if torch._C._are_functorch_transforms_active():  # whose tensors a tap cannot see through
            return self._uncovered(func, args, kwargs, found, "a transform of torch.func", transformed=True)
        if func in DECOMPOSITIONS and _fits(func, args, kwargs):
            with self:
                out = DECOMPOSITIONS[func](*args, **kwargs)
            if out is not NotImplemented:
                return out
        uses = self._covered(func, args, kwargs, given, found)
        if uses is None:
            return self._uncovered(func, args, kwargs, found, f"no rule for {_name(func)}")
        site = self._site(func, given, uses)
        if site in self._now.early:
            return self._uncovered(func, args, kwargs, [alias for _, alias in uses], self._now.early[site])
        stand_ins = {id(alias.tensor): alias.stand_in(alias.tracked.differentiated) for _, alias in uses}
        args, kwargs = replaced(args, stand_ins), replaced(kwargs, stand_ins)
        out = func(*args, **kwargs)
        chosen = self._chosen.of(given)
        tapped = self._tapped(out, uses, chosen, (args, kwargs), site)
        if chosen:
            self._chosen.add(tapped, chosen)
        return tapped

    def _covered(
        self, func: Any, args: Any, kwargs: Any, given: list[Tensor], found: list[Alias]
    ) -> list[tuple[Use, Alias]] | None:
        """The uses the function's rule declares, or None unless they cover every tracked argument exactly once.

        What was made of parameters may also be what the others are used on: then it holds samples, and is no parameter.
        """
        if func not in RULES or any(
            tensor.is_complex() or tensor.is_nested for tensor in given
        ):  # rows are of real numbers, side by side
            return None
        try:
            declared = RULES[func](*args, **kwargs)  # a generator: nothing in it has run yet
        except TypeError:
            return None  # not the form that the rule is written for: ``out=``, or arguments of old
        uses = [(use, self._aliases.of(use.parameter)) for use in declared if use.parameter in self._aliases]
        covered = [id(use.parameter) for use, _ in uses]
        others = [alias for alias in found if id(alias.tensor) not in covered]
        if not uses or len(covered) != len(found) - len(others):
            return None
        if not all(isinstance(alias.tracked, Made) for alias in others):
            return None
        for alias in others:
            alias.tracked.give_up(f"no rule for {_name(func)} of what is made of it")
        return uses

    def _site(self, func: Any, given: list[Tensor], uses: list[tuple[Use, Alias]]) -> Site | None:
        """The site of a covered call that no sample enters; None if one does, or if nobody will ask for it."""
        if not (self._now.exploring or self._now.early):
            return None
        mine = [alias for _, alias in uses]
        others = _but(given, mine)
        if any(tensor.requires_grad for tensor in others):
            return None
        return Site(_structure(func, mine), frozenset(itertools.chain(*(tensor.shape for tensor in others))))

    def _uncovered(self, func: Any, args: Any, kwargs: Any, found: list[Alias], reason: str, transformed: bool = False) -> Any:
        stand_ins = {id(r.tensor): r.outside() for r in found}
        # Of parameters alone, or of them and tensors that no parameter went into: no sample has come in.
        alone = not transformed and not any(tensor.requires_grad for tensor in _but(tensors(args, kwargs), found))

        def make(tensor: Tensor) -> Any:
            mine = {**stand_ins, id(found[0].tensor): tensor}
            return func(*replaced(args, mine), **replaced(kwargs, mine))

        with _kept(self._keepers[-1]) if alone else nullcontext():
            out = make(stand_ins[id(found[0].tensor)])
        written = tensors(args, kwargs) if out is None else tensors(out)  # t[...] = parameter returns nothing
        outputs = [o for o in written if o.requires_grad]
        if len(found) == 1 and outputs and not found[0].made and all(is_part(o, found[0].tracked.parameter) for o in outputs):
            for o in outputs:
                window = Window.of(o, found[0].tracked.parameter)
                self._aliases.add(Alias(o, found[0].tracked, window, version=o._version))
        elif len(found) == 1 and outputs and keeps_derivative(func, args, kwargs, out):
            made = (*found[0].made, make)
            self._aliases.add(replace(found[0], tensor=out, made=made, version=out._version))
        elif outputs and alone and out is not None:
            self._make(func, outputs, found, reason)
        elif outputs:
            for alias in found:
                alias.tracked.give_up(reason)
        for alias in found:
            self._aliases.left(alias)
        return out

    def _make(self, func: Any, outputs: list[Tensor], found: list[Alias], reason: str) -> None:
        """Follow what a call has made of parameters alone as parameters."""
        sources = tuple({t.name: t for r in found for t in r.tracked.sources}.values())
        lost = not all(t.caught for t in sources) or any(out.layout is not torch.strided or out.is_nested for out in outputs)
        for source in sources:
            source.give_up(reason) if lost else source.chain(reason)
        for out in outputs:
            if not lost and out not in self._aliases:
                made = Made(_name(func), out, sources, _structure(func, found))
                self._aliases.add(Alias(out, made, version=out._version))

    def _tapped(self, out: Tensor, uses: list[tuple[Use, Alias]], chosen: Chosen, given: Any, site: Site | None) -> Tensor:
        caught = [(use, alias) for use, alias in uses if alias.tracked.caught]
        if not caught:
            return out
        if self.given is not None:
            self.given.note()
        self._halves |= out.dtype == torch.float16
        bare = next((alias.tracked.expanding for _, alias in caught if alias.tracked.expanding), None)
        if self._now.num_samples is not None and bare is not None:
            self.doubtful |= bare.doubts(out.shape, self._now.num_samples)
            out = out.expand(bare.with_samples(self._now.num_samples, out.shape))
        saved: list[Tensor] = []
        call = Call(next(self._counter), self, out.shape, self._now, site)
        for use, alias in caught:
            form = use.form if alias.window is None else part(use.form, alias.window, alias.tracked.parameter)
            picks = tuple(_place(tensor, saved) for tensor in use.inputs)
            numbers = (
                tuple(self._seen.setdefault(tensor, next(self._numbers)) for tensor in use.inputs) if self._now.exploring else ()
            )
            differentiated = alias.tracked.differentiated
            call.uses.append(CallUse(alias.tracked, form, picks, numbers, chosen=chosen, differentiated=differentiated))
        saved = [tensor.detach() if tensor in self._aliases else tensor for tensor in saved]
        tapped = Tap.apply(writable(out, given), self.anchor, call, *saved)
        call.viewed = tapped.shape != out.shape
        return tapped.view(out.shape) if call.viewed else tapped

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
        outdated = bool(self._early) and any(call.site in self._early for call in calls)
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

    def _call_of(self, node: Any) -> Call | None:
        call = getattr(node, "call", None)
        return call if isinstance(call, Call) and call.capture is self else None


@functools.cache
def _signature(func: Any) -> inspect.Signature:
    return inspect.signature(DECOMPOSITIONS[func])


def _fits(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call has the form that its decomposition is written for: not ``out=``, no arguments of old."""
    try:
        _signature(func).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _but(given: list[Tensor], found: list[Alias]) -> list[Tensor]:
    """Those of the tensors that stand for no parameter found among them."""
    mine = {id(alias.tensor) for alias in found}
    return [tensor for tensor in given if id(tensor) not in mine]


def _place(tensor: Tensor, saved: list[Tensor]) -> int:
    """Where a tensor is among those to be saved; it is put there if it is not."""
    for place, other in enumerate(saved):
        if other is tensor:
            return place
    saved.append(tensor)
    return len(saved) - 1


def _without_a_graph(func: Any) -> bool:
    """Whether a call makes nothing to differentiate: an optimizer's step, what is set, and ``.grad`` of the parameter itself."""
    sets = getattr(func, "__name__", "") in ("__set__", "requires_grad_")
    return not torch.is_grad_enabled() or sets or getattr(func, "__self__", None) is _GRAD


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def _structure(func: Any, found: list[Alias]) -> int:
    # A part of what was made of parameters is larger in longer batches: that it is a part is all that stays.
    windows = (r.window is not None if isinstance(r.tracked, Made) else r.window for r in found)
    return hash((_name(func), *((r.tracked.structure, window) for r, window in zip(found, windows, strict=True))))


def _kept(by: Hooks | None) -> AbstractContextManager[Any]:
    """Where the graph keeps its tensors as it did around the model: gradient checkpointing inside it would run its part of the model
    again for each sample.
    """
    return torch.autograd.graph.saved_tensors_hooks(*(by or (Tensor.detach, _same)))  # itself, an output would hold what holds it


def _same(saved: Any) -> Any:
    return saved
