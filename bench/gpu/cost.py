# SPDX-License-Identifier: Apache-2.0
"""What an op must cost, the ceilings it runs under, and the fraction reached: arithmetic only, tested without a GPU."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

ACCUMULATOR_BYTES = 4  # acc is float32 here
ID_BYTES = 8


class Cost(NamedTuple):
    """The fewest operations and device memory bytes, and the unit that does the operations."""

    flops: int
    bytes: int
    rate: str  # a key of the measured ceilings


class Bound(NamedTuple):
    """The time nothing can beat, and what sets it."""

    seconds: float
    by: str


def linear(N: int, T: int, I: int, O: int, element: int) -> Cost:
    """``2 N T I O``; x and g once, acc read and written. 16-bit inputs use tensor cores, except for T = 1: see ``linear_sq_``."""
    rate = "bf16" if element == 2 and T > 1 else "fp32"
    return Cost(2 * N * T * I * O, element * N * T * (I + O) + 2 * ACCUMULATOR_BYTES * O * I, rate)


def scale(N: int, T: int, D: int, element: int, has_x: bool) -> Cost:
    """One addition, and with x one product, for each element of g."""
    return Cost(N * T * D * (1 + has_x), element * N * T * D * (1 + has_x) + 2 * ACCUMULATOR_BYTES * D, "fp32")


def embedding(N: int, T: int, D: int, element: int, touched: int) -> Cost:
    """One addition for each element of g; ids and g once, the ``touched`` rows of acc read and written."""
    return Cost(N * T * D, N * T * (ID_BYTES + element * D) + 2 * ACCUMULATOR_BYTES * touched * D, "fp32")


def gram(M: int, I: int, element: int) -> Cost:
    """``M I (I + 1)``, half a matrix product; x once, the upper half of acc read and written."""
    return Cost(M * I * (I + 1), element * M * I + ACCUMULATOR_BYTES * I * (I + 1), "bf16" if element == 2 else "fp32")


def bound(cost: Cost, ceilings: dict[str, float]) -> Bound:
    """The larger of operations over the measured rate (FLOP/s) and bytes over the measured bandwidth (``copy``, B/s)."""
    return max(Bound(cost.flops / ceilings[cost.rate], cost.rate), Bound(cost.bytes / ceilings["copy"], "copy"))


def fraction(cost: Cost, ceilings: dict[str, float], seconds: float) -> float:
    """The share of the binding ceiling that a time reaches."""
    return bound(cost, ceilings).seconds / seconds


def passes(error: float, plain: float) -> bool:
    """The numerical gate of the whole project: at most twice the error of plain torch in float32."""
    return error <= 2 * plain + 1e-7


def slug(device: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def architecture(capability: tuple[int, int]) -> str:
    """The entry of TORCH_CUDA_ARCH_LIST; from Hopper on with the instructions of that chip alone."""
    return f"{capability[0]}.{capability[1]}" + ("a" if capability[0] >= 9 else "")


def sources_sha256(folder: Path) -> str:
    """One digest of the names and contents of a folder's files, whatever the order they are listed in."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
