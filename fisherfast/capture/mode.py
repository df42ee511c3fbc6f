# SPDX-License-Identifier: Apache-2.0
"""Mode: what is caught is the use of a parameter by a function, whatever module wrote the call.

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
import weakref
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from fisherfast._nested import replaced, tensors
from fisherfast.capture.alias import Alias, Aliases, derivative, is_part, reshaped, views_of_copy
from fisherfast.capture.calls import Call, CallUse, ForwardSettings, Site, Tap, TapOwner, nodes, tapped, writable
from fisherfast.capture.chosen_rows import Chosen, ChosenRows
from fisherfast.capture.parameters import is_parameter
from fisherfast.capture.refusals import CHECKED, DATA, RANDOM, RandomDraws, refusal, undivided
from fisherfast.capture.running import InputShapes, runs
from fisherfast.capture.tracked import Derived, Tracked
from fisherfast.rules import DECOMPOSITIONS, RULES, Use, Window, part

_GRAD = vars(torch._C.TensorBase)["grad"]
Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class Mode(TorchFunctionMode):
    """The mode that catches the uses of a model's parameters in the forward passes for which it is entered.

    ``owner``: whom the taps tell of gradients. ``input_shapes``: of what the model is called with, where someone asks. ``saved_hooks``: what autograd's
    saved tensors went through, each time the mode was entered. ``halves``: whether a use had a float16 output; autocast may be over when
    it is differentiated. And of the last forward pass, ``doubtful``: whether an output that seemed to lack the sample axis may have had it;
    ``without_graph``: names of parameters that were used where no graph is kept; ``transformed``: whether some were in torch.func's transforms.
    """

    def __init__(self, root: nn.Module, device: torch.device, owner: TapOwner) -> None:
        super().__init__()
        self._root, self._draws = root, RandomDraws(root)
        self._owner_there = weakref.ref(owner)  # which holds the mode: a cycle would keep the model until garbage is collected
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.input_shapes: InputShapes | None = None
        self.saved_hooks: list[Hooks | None] = []
        self.halves = False
        self._counter, self._numbers = itertools.count(), itertools.count()

    @property
    def _owner(self) -> TapOwner:
        owner = self._owner_there()
        assert owner is not None  # it enters the mode
        return owner

    def begin(self, settings: ForwardSettings, tracked: Collection[Tracked]) -> None:
        """Prepare a forward pass, in which these parameters are followed as was decided."""
        self.settings, self._tracked = settings, tracked
        self.doubtful = self.transformed = False
        self.without_graph: set[str] = set()
        self._chosen = ChosenRows(settings.num_samples, self._root)
        self._seen = WeakTensorKeyDictionary()  # inputs of calls, numbered
        self._aliases = Aliases(tracked)

    def forget(self, parameter: Tensor) -> None:
        """Follow a parameter no longer."""
        self._aliases.forget(parameter)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` as ``_run`` does, unless it is one of those that leave no sample a gradient of its own."""
        kwargs = kwargs or {}
        if func in CHECKED:
            why = refusal(func, args, kwargs, lambda tensor: tensor in self._aliases or is_parameter(tensor))
            if why and self._concerns(tensors(args, kwargs)):
                raise ValueError(why)
        out = self._run(func, *undivided(func, args, kwargs))
        if func in RANDOM:
            self._draws.look(func, kwargs, out)
        return out

    def _concerns(self, given: list[Tensor]) -> bool:
        """Whether a call is the measured model's: a method of it is running, or a tensor that it was given depends on a parameter."""
        if runs(self._root):
            return True
        leaves = {id(leaf) for t in self._tracked for leaf in t.leaves}

        def ours(node: Any) -> bool:
            return tapped(node, self._owner) is not None or id(getattr(node, "variable", None)) in leaves

        return any(id(t) in leaves or t in self._aliases or any(map(ours, nodes(t))) for t in given)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run ``func``; where it receives tracked parameters, with their stand-ins and a tap."""
        if getattr(func, "__self__", None) is DATA:
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
            self.transformed = True
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
        if site in self.settings.followed_sites:
            return self._uncovered(func, args, kwargs, [alias for _, alias in uses], self.settings.followed_sites[site])
        stand_ins = {id(alias.tensor): alias.stand_in(alias.tracked.ways.differentiated) for _, alias in uses}
        args, kwargs = replaced(args, stand_ins), replaced(kwargs, stand_ins)
        out = func(*args, **kwargs)
        chosen = self._chosen.of(given)
        out = self._with_tap(out, uses, chosen, (args, kwargs), site)
        if chosen:
            self._chosen.add(out, chosen)
        return out

    def _covered(
        self, func: Any, args: Any, kwargs: Any, given: list[Tensor], found: list[Alias]
    ) -> list[tuple[Use, Alias]] | None:
        """The uses the function's rule declares, or None unless they cover every tracked argument exactly once.

        What was made of parameters may also be what the others are used on: then it holds samples, and is no parameter.
        """
        if func not in RULES or any(tensor.is_complex() or tensor.is_nested for tensor in given):
            return None  # rows are of real numbers, side by side
        try:
            declared = RULES[func](*args, **kwargs)  # a generator: nothing in it has run yet
        except TypeError:
            return None  # not the form that the rule is written for: ``out=``, or arguments of old
        uses = [(use, self._aliases.of(use.parameter)) for use in declared if use.parameter in self._aliases]
        covered = [id(use.parameter) for use, _ in uses]
        others = [alias for alias in found if id(alias.tensor) not in covered]
        if not uses or len(covered) != len(found) - len(others):
            return None
        if not all(isinstance(alias.tracked, Derived) for alias in others):
            return None
        for alias in others:
            alias.tracked.give_up(f"no rule for {_name(func)} of what is made of it")
        return uses

    def _site(self, func: Any, given: list[Tensor], uses: list[tuple[Use, Alias]]) -> Site | None:
        """The site of a covered call that no sample enters; None if one does, or if nobody will ask for it."""
        if not (self.settings.exploring or self.settings.followed_sites):
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

        with _kept(self.saved_hooks[-1]) if alone else nullcontext():
            out = make(stand_ins[id(found[0].tensor)])
        written = tensors(args, kwargs) if out is None else tensors(out)  # t[...] = parameter returns nothing
        outputs = [o for o in written if o.requires_grad]
        if len(found) == 1 and outputs and not found[0].made and all(is_part(o, found[0].tracked.parameter) for o in outputs):
            for o in outputs:
                window = Window.of(o, found[0].tracked.parameter)
                self._aliases.add(Alias(o, found[0].tracked, window, version=o._version))
        elif len(found) == 1 and outputs and (factor := derivative(func, args, kwargs, out)) is not None:
            made = (*found[0].made, make)
            self._aliases.add(replace(found[0], tensor=out, made=made, version=out._version, factor=found[0].factor * factor))
        elif len(found) == 1 and outputs and (windows := views_of_copy(found[0], outputs, make)):
            for o, window in zip(outputs, windows, strict=True):
                self._aliases.add(replace(found[0], tensor=o, window=window, version=o._version))
        elif len(found) == 1 and outputs and (part_of := reshaped(func, found[0], out)):
            made = (*found[0].made, make)
            self._aliases.add(replace(found[0], tensor=out, window=part_of, made=made, version=out._version))
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
        lost = not all(t.ways.caught for t in sources) or any(out.layout is not torch.strided or out.is_nested for out in outputs)
        for source in sources:
            source.give_up(reason) if lost else source.chain(reason)
        for out in outputs:
            if not lost and out not in self._aliases:
                made = Derived(_name(func), out, sources, _structure(func, found))
                self._aliases.add(Alias(out, made, version=out._version))

    def _with_tap(self, out: Tensor, uses: list[tuple[Use, Alias]], chosen: Chosen, given: Any, site: Site | None) -> Tensor:
        caught = [(use, alias) for use, alias in uses if alias.tracked.ways.caught]
        if not caught:
            return out
        if self.input_shapes is not None:
            self.input_shapes.note()
        self.halves |= out.dtype == torch.float16
        bare = next((alias.tracked.ways.expanding for _, alias in caught if alias.tracked.ways.expanding), None)
        if self.settings.num_samples is not None and bare is not None:
            self.doubtful |= bare.doubts(out.shape, self.settings.num_samples)
            out = out.expand(bare.with_samples(self.settings.num_samples, out.shape))
        saved: list[Tensor] = []
        call = Call(next(self._counter), self._owner, out.shape, self.settings, site)
        for use, alias in caught:
            form = use.form if alias.window is None else part(use.form, alias.window, alias.tracked.parameter)
            saved_at = tuple(_place(tensor, saved) for tensor in use.inputs)
            numbers = (
                tuple(self._seen.setdefault(tensor, next(self._numbers)) for tensor in use.inputs)
                if self.settings.exploring
                else ()
            )
            differentiated = alias.tracked.ways.differentiated
            call.uses.append(
                CallUse(alias.tracked, form, saved_at, numbers, chosen=chosen, differentiated=differentiated, factor=alias.factor)
            )
        saved = [tensor.detach() if tensor in self._aliases else tensor for tensor in saved]
        base = Tap.apply(writable(out, given), self.anchor, call, *saved)
        call.viewed = base.shape != out.shape
        return base.view(out.shape) if call.viewed else base


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
    windows = (r.window is not None if isinstance(r.tracked, Derived) else r.window for r in found)
    return hash((_name(func), *((r.tracked.structure, window) for r, window in zip(found, windows, strict=True))))


def _kept(by: Hooks | None) -> AbstractContextManager[Any]:
    """Where the graph keeps its tensors as it did around the model: gradient checkpointing inside it would run its part of the model
    again for each sample.
    """
    return torch.autograd.graph.saved_tensors_hooks(*(by or (Tensor.detach, _same)))  # itself, an output would hold what holds it


def _same(saved: Any) -> Any:
    return saved
