# SPDX-License-Identifier: Apache-2.0
"""How each parameter was covered, and what share of the numbers and of the time each way took."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

OPS = "ops"  # the time that no other way claims: forward and backward passes with the ops inside them
# Between ways, not between the words of a reason: what follows is an op's name or a way with its reason.
_BETWEEN = re.compile(r" \+ (?=\w+_(?: \+ |$)|(?:chain|loop|vmap|missing):)")


class Coverage(dict[str, str]):
    """``{parameter name: how}``, how being an op's name, ``"chain: why"``, ``"vmap: why"``, ``"loop: why"`` or ``"missing: why"``.

    A dictionary like any other; equality is that of its entries. ``print`` shows a table.

    Shapes:   ``sizes`` {parameter name: how many numbers it holds}; ``seconds`` {way: wall time}; ``underflow`` {parameter name:
              [float16 gradients so small that they lose digits, all that were seen]}.
    Scale:    shares are fractions of one.
    Errors:   ValueError for a share of what was not recorded (a Fisher built from tensors).
    Numerics: times are those of the host; on a GPU the fallback ways are synchronised, the rest is not.
    Source:   ours.
    """

    def __init__(
        self,
        how: Mapping[str, str] | None = None,
        sizes: Mapping[str, int] | None = None,
        seconds: Mapping[str, float] | None = None,
        underflow: Mapping[str, list[int]] | None = None,
    ) -> None:
        super().__init__(how or {})
        self.sizes: dict[str, int] = {**getattr(how, "sizes", {}), **(sizes or {})}
        self.seconds: dict[str, float] = {**getattr(how, "seconds", {}), **(seconds or {})}
        self.underflow: dict[str, list[int]] = {**getattr(how, "underflow", {}), **(underflow or {})}

    @property
    def missing(self) -> dict[str, str]:
        """The parameters that are left out, and why: ``{name: reason}``."""
        return {name: how.removeprefix("missing:").strip() for name, how in self.items() if how.startswith("missing")}

    @property
    def ways(self) -> dict[str, str]:
        """``{parameter name: way}``: ``how`` without its reasons; ``"loop + vmap"`` if runs pooled covered it differently."""
        return {name: " + ".join(part.partition(":")[0] for part in _BETWEEN.split(how)) for name, how in self.items()}

    def share_of_parameters(self) -> dict[str, float]:
        """``{way: fraction of all numbers in parameters}``, the missing ones among them, largest first."""
        unknown = [name for name in self if name not in self.sizes]
        if unknown or not self:
            raise ValueError(
                f"coverage: the size of every parameter must be recorded, got none for {unknown[0] if unknown else 'any'!r}; pass sizes"
            )
        counts: dict[str, int] = {}
        for name, way in self.ways.items():
            counts[way] = counts.get(way, 0) + self.sizes[name]
        return _shares(counts)

    def share_of_time(self) -> dict[str, float]:
        """``{way: fraction of the run's wall time}``, largest first.

        ``"ops"`` is what the fallbacks leave: the data, forward and backward passes, and the ops inside them. Around your
        own forward passes (``ff.collect``) the run is what happens in ``stats.backward``.
        """
        if not self.seconds:
            raise ValueError("coverage: the run's time must have been recorded, got none; measure with ff.fisher or ff.collect")
        return _shares(self.seconds)

    def __add__(self, other: Mapping[str, str]) -> Coverage:
        """Of both runs together: both ways named where they differ, times added."""
        other = Coverage(other)
        how = {name: " + ".join(dict.fromkeys(c[name] for c in (self, other) if name in c)) for name in {**self, **other}}
        ways = {**self.seconds, **other.seconds}
        seconds = {way: self.seconds.get(way, 0.0) + other.seconds.get(way, 0.0) for way in ways}
        counts = {name: [c.underflow.get(name, [0, 0]) for c in (self, other)] for name in {**self.underflow, **other.underflow}}
        underflow = {name: [sum(column) for column in zip(*pair, strict=True)] for name, pair in counts.items()}
        return Coverage(how, {**self.sizes, **other.sizes}, seconds, underflow)

    def state(self) -> dict[str, Any]:
        """Fields for a file: plain values."""
        parts = {"sizes": self.sizes, "seconds": self.seconds, "underflow": self.underflow}
        return {"coverage": dict(self), **{f"coverage_{name}": part for name, part in parts.items()}}

    @classmethod
    def from_state(cls, fields: Mapping[str, Any]) -> Coverage:
        """The coverage whose ``state`` is among the fields."""
        return cls(fields["coverage"], *(fields[f"coverage_{name}"] for name in ("sizes", "seconds", "underflow")))

    def __str__(self) -> str:
        """A table: a line for each way, then the parameters outside the ops with the reason."""
        ways = self.ways
        tensors = {way: list(ways.values()).count(way) for way in ways.values()}
        numbers = self.share_of_parameters() if self and all(name in self.sizes for name in self) else {}
        times = self.share_of_time() if self.seconds else {}
        lines = [f"{'way':<18}{'tensors':>9}{'parameters':>13}{'time':>9}"]
        for way in {**numbers, **tensors, **times}:
            columns = (tensors.get(way, ""), _percent(numbers.get(way)), _percent(times.get(way)))
            lines.append(f"{way:<18}{columns[0]:>9}{columns[1]:>13}{columns[2]:>9}")
        lines += [f"{name}: {how}" for name, how in self.items() if ":" in how]
        lines += [
            f"{name}: {_percent(small / every)} of its float16 gradients underflow"
            for name, (small, every) in self.underflow.items()
        ]
        return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _shares(amounts: Mapping[str, float]) -> dict[str, float]:
    whole = sum(amounts.values()) or 1.0
    return {way: amount / whole for way, amount in sorted(amounts.items(), key=lambda item: -item[1])}


class Stopwatch:
    """Wall time by way. A way timed inside another is charged to the inner one only, so that the times add up."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def timed(self, way: str) -> Iterator[None]:
        """Charge the block to ``way``. On a GPU, waits for it at both ends unless the way is ``OPS``."""
        self._charge(wait=way != OPS)
        self._open.append(way)
        try:
            yield
        finally:
            self._charge(wait=way != OPS)
            self._open.pop()

    def _charge(self, wait: bool = False) -> None:
        if wait and self._device.type == "cuda":
            torch.accelerator.synchronize(self._device)  # noqa: TID251  to time a fallback, which waits for every sample anyway
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    def seconds(self) -> dict[str, float]:
        """The times so far, those of open blocks included."""
        self._charge()
        return dict(self._seconds)
