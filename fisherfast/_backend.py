# SPDX-License-Identifier: Apache-2.0
"""The router: one registered op, several backends, chosen inside the op at call time.

Every op of the library is registered once with ``torch.library`` under ``fisherfast::``. What is registered is not a
kernel but the choice of one, so ``torch.compile(fullgraph=True)`` sees a single opaque node and eager and compiled
code take the same path. A backend is found by name alone:

* ``reference``  the Python function of ``fisherfast.ops`` itself, plain torch;
* ``cpu``        ``fisherfast_cpp::<op>`` registered for CPU by ``csrc/cpu/``;
* ``cuda``       ``fisherfast_cpp::<op>`` registered for CUDA by ``csrc/cuda/``;
* ``triton``     ``fisherfast.kernels.<module>.<op>``, and ``why_not`` where it cannot run every call.

On a GPU the one that was faster at the nearest measured call comes first (``_choice``); without a measurement, Triton.

This file knows nothing of what an op computes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fisherfast import _checks, _choice

BACKENDS = ("reference", "cpu", "triton", "cuda")
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
_NAMESPACE = "fisherfast"
_NATIVE_NAMESPACE = "fisherfast_cpp"
_LIBRARY = torch.library.Library(_NAMESPACE, "DEF")

OPS: dict[str, Op] = {}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run this call; the message says why and what can."""


def _known(name: str | None) -> str | None:
    return None if name is None else _checks.one_of("backend", "name", name, BACKENDS)


# Process-wide, not a context variable: on a GPU autograd calls the ops from its own threads, which inherit no context.
_forced: str | None = _known(os.environ.get("FISHERFAST_BACKEND") or None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force every op inside the block to one backend, for the whole process.

    Takes precedence over the environment variable ``FISHERFAST_BACKEND``. A forced backend that cannot run a call
    raises ``BackendError`` with the reason; nothing falls back.

    Errors: ValueError if ``name`` is not one of ``reference``, ``cpu``, ``triton``, ``cuda``.
    """
    global _forced
    before, _forced = _forced, _known(name)
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The backend that every op is forced to, or None."""
    return _forced


@functools.cache
def native_problem() -> str | None:
    """Why the compiled extension cannot be used, or None."""
    if importlib.util.find_spec("fisherfast._C") is None:
        return "fisherfast._C is not built; reinstall with a C++ compiler and without FISHERFAST_NATIVE=none"
    try:
        importlib.import_module("fisherfast._C")
    except ImportError as error:
        return f"fisherfast._C does not load ({error}); reinstall fisherfast against this torch"
    return None


@functools.cache
def _triton_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    return None


class Op:
    """One op: its schema, its check (which is also the fake kernel), and its backends."""

    def __init__(self, schema: str, check: Callable[..., None], reference: Callable[..., None]) -> None:
        self.name = schema.partition("(")[0]
        self.module = reference.__module__.rpartition(".")[2]
        self.check, self.reference = check, reference
        _LIBRARY.define(schema)
        _LIBRARY.impl(self.name, self._route, "CompositeExplicitAutograd")
        _LIBRARY.impl(self.name, self._below_autograd, "Autograd")
        torch.library.register_fake(f"{_NAMESPACE}::{self.name}", check, lib=_LIBRARY)
        self.overload = getattr(getattr(torch.ops, _NAMESPACE), self.name).default
        written = [a for a in self.overload._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        self._mutated = {a.name for a in written if a.kwarg_only}  # besides the first argument, acc
        self._warned: set[str] = set()
        self._native: dict[str, bool] = {}
        self._loaded: dict[str, Callable[..., None]] = {}
        self._settled: dict[str, Callable[..., None]] = {}  # by device: the implementation that runs every call on it
        OPS[self.name] = self

    def unavailable(self, name: str, device: str) -> str | None:
        """Why backend ``name`` cannot run this op on ``device`` ("cpu", "cuda") at all, or None if it can."""
        if name == "reference":
            return None
        if name == "triton":
            return _triton_problem() or self._triton_device_problem(device)
        if name != device:
            return f"needs {name} tensors, got {device}"
        problem = native_problem()
        if problem is None and not self._native_has(name):
            problem = f"fisherfast._C was built without {name} kernels; rebuild where nvcc and a CUDA torch are installed"
        return problem

    def usable(self, device: str) -> list[str]:
        """The backends that can run this op on ``device``, best first."""
        order = (*_PREFERENCE.get(device, ()), *BACKENDS)
        return [name for name in dict.fromkeys(order) if self.unavailable(name, device) is None]

    def _triton_device_problem(self, device: str) -> str | None:
        if device == "cuda":
            return None
        from triton import knobs

        return None if knobs.runtime.interpret else f"needs cuda tensors, got {device} (or TRITON_INTERPRET=1 to emulate)"

    def _native_has(self, name: str) -> bool:
        if name not in self._native:
            defined = hasattr(getattr(torch.ops, _NATIVE_NAMESPACE), self.name)
            key = f"{_NATIVE_NAMESPACE}::{self.name}"
            self._native[name] = defined and torch._C._dispatch_has_kernel_for_dispatch_key(key, name.upper())
        return self._native[name]

    def _implementation(self, name: str) -> Callable[..., None]:
        if name == "reference":
            return self.reference
        if name not in self._loaded:
            if name == "triton":
                self._loaded[name] = getattr(importlib.import_module(f"fisherfast.kernels.{self.module}"), self.name)
            else:
                self._loaded[name] = getattr(getattr(torch.ops, _NATIVE_NAMESPACE), self.name).default
        return self._loaded[name]

    def _why_not(self, name: str, device: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        problem = self.unavailable(name, device)
        if problem is None and name == "triton":
            problem = self._triton_call_problem(args, kwargs)
        return problem

    def _triton_call_problem(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        device_problem = importlib.import_module("fisherfast.kernels._common").device_problem
        kernels = importlib.import_module(f"fisherfast.kernels.{self.module}")
        why_not = getattr(kernels, "why_not", lambda *_, **__: None)
        return device_problem(args[0].device) or why_not(*args, **kwargs)

    def _route(self, *args: Any, **kwargs: Any) -> None:
        self.check(*args, **kwargs)
        device = args[0].device.type
        if _forced is not None:
            problem = self._why_not(_forced, device, args, kwargs)
            if problem is not None:
                raise BackendError(
                    f"{self.name}: backend {_forced!r} was asked for but cannot run here: {problem}. "
                    f"Usable on {device}: {self.usable(device)}"
                )
            return self._implementation(_forced)(*args, **kwargs)
        if device in self._settled:
            return self._settled[device](*args, **kwargs)
        for name in self._order(device, args, kwargs):
            problem = self._why_not(name, device, args, kwargs)
            if problem is None:
                if device == "cpu":  # nothing in a call matters there
                    self._settled[device] = self._implementation(name)
                return self._implementation(name)(*args, **kwargs)
            self._warn_once(name, problem)
        raise AssertionError("unreachable: the reference runs everywhere")

    def _order(self, device: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
        order = _PREFERENCE.get(device, ("reference",))
        faster = _choice.fastest(self.name, _choice.capability(args[0].device), args, kwargs) if device == "cuda" else None
        return order if faster is None else tuple(dict.fromkeys((faster, *order)))

    def _warn_once(self, name: str, problem: str) -> None:
        if problem not in self._warned:
            self._warned.add(problem)
            warnings.warn(f"{self.name}: backend {name!r} is not used: {problem}. Running a slower one.", stacklevel=4)

    def _below_autograd(self, *args: Any, **kwargs: Any) -> None:
        # Statistics have no gradient: run below autograd on detached inputs. Native code writes through pointers, which
        # autograd cannot see, so the version counters of what was written are advanced by hand.
        def detached(value: Any) -> Any:
            return value.detach() if isinstance(value, torch.Tensor) and value.requires_grad else value

        with torch._C._AutoDispatchBelowAutograd():
            self.overload(*map(detached, args), **{k: detached(v) for k, v in kwargs.items()})
        written = [args[0], *(v for k, v in kwargs.items() if k in self._mutated and v is not None)]
        torch.autograd.graph.increment_version(written)


def op(schema: str, check: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register the decorated plain-torch function as an op; the result calls the op, through the router."""

    def register(reference: Callable[..., None]) -> Callable[..., None]:
        registered = Op(schema, check, reference)
        overload = registered.overload

        @functools.wraps(reference)
        def call(*args: Any, **kwargs: Any) -> None:
            overload(*args, **kwargs)

        call.op = registered  # type: ignore[attr-defined]
        return call

    return register
