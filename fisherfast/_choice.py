# SPDX-License-Identifier: Apache-2.0
"""Which GPU backend runs a call where several can: the one that was faster at the nearest call that was measured.

The measurements are in ``choice.json``, which ``bench/gpu/choose.py`` writes from the results of ``make gpu-check``. It is empty: no GPU
has been measured, and the router's own order stands. A table is of one compute capability, which has one machine code:

    {"9.0": {"device": ..., "source": ..., "ops": {op: [{"mode": ..., "extents": [[O, I], ...], "backend": ..., "seconds": {...}}]}}}

This file knows nothing of what an op computes: a call is the dtype of its inputs, the shapes of its tensors, and which of the optional
tensors it has that other kernels may be for. Where no call with those was measured, the router's own order stands.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("choice.json")
_SHORT = {torch.bfloat16: "bf16", torch.float16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}

_OPTIONS = ("offsets", "total", "weight")

Extents = tuple[tuple[int, ...], ...]


@functools.cache
def table() -> dict[str, Any]:
    """What was measured."""
    return json.loads(PATH.read_text())


@functools.cache
def capability(device: torch.device) -> str:
    """The compute capability of a GPU, as the table names it."""
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def extents(args: tuple[Any, ...]) -> Extents:
    """The shapes of the tensors among an op's positional arguments, the accumulator's first."""
    return tuple(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))


def mode(args: tuple[Any, ...]) -> str:
    """What a call is computed in: the dtype of its inputs (both of 16 bits have one rate), and TF32 where torch is allowed it."""
    dtype = next(a.dtype for a in args[1:] if isinstance(a, torch.Tensor) and a.is_floating_point())
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else _SHORT[dtype]


def _measured(op: str, capability: str) -> list[dict[str, Any]]:
    return table().get(capability, {"ops": {}})["ops"].get(op, [])


def preferred(op: str, capability: str) -> set[str]:
    """The backends that were the fastest at some measured call of an op."""
    return {one["backend"] for one in _measured(op, capability)}


def options(kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """The optional tensors of a call that its kernel may depend on."""
    return tuple(name for name in _OPTIONS if kwargs.get(name) is not None)


def fastest(op: str, capability: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """The backend that was fastest at the nearest measured call of this op, mode, number of axes and options; None if there is none."""
    if not _measured(op, capability):
        return None
    return _nearest(op, capability, mode(args), extents(args), options(kwargs))


@functools.lru_cache(maxsize=4096)
def _nearest(op: str, capability: str, mode: str, called: Extents, options: tuple[str, ...]) -> str | None:
    """Nearest by the sum of the logarithms of how many times each extent is larger or smaller."""
    axes = [len(shape) for shape in called]
    same = [one for one in _measured(op, capability) if (one["mode"], tuple(one.get("options", ()))) == (mode, options)]
    alike = [one for one in same if [len(e) for e in one["extents"]] == axes]
    nearest = min(alike, key=lambda one: _distance(one["extents"], called), default=None)
    return None if nearest is None else nearest["backend"]


def _distance(measured: list[list[int]], called: Extents) -> float:
    pairs = ((a, b) for one, other in zip(measured, called, strict=True) for a, b in zip(one, other, strict=True))
    return sum(abs(math.log((a + 1) / (b + 1))) for a, b in pairs)
