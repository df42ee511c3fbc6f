# SPDX-License-Identifier: Apache-2.0
"""Whole models: diagonal, KFAC, EKFAC against plain forward and backward and the peers' ways in plain torch; time and peak memory.

Records go to the same file as the ops', way by way; run it again and it goes on where it stopped. ``--rehearse FOLDER`` runs all
of it on the CPU with widths of a few.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is defined

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import ways
from gpu import capacity, clock, model_cases, networks, record, run
from gpu.model_ways import WAYS, Way
from models import loss_per_sample, text

import fisherfast as ff

MODES = ("bf16", "fp32")
LIMITS = {"bf16": 0.1, "fp32": 1e-3}  # of the difference from plain torch in the same mode, whose own rounding is in it
SECONDS = 3.0  # about this long for one way, beside plain
LIMIT = 180  # seconds for a way at most, with its reference and, once, the model


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def in_turn(plain: Callable[[], object], way: Callable[[], object], device: str) -> dict[str, list[float]]:
    """Quartiles of both times and of their ratio within a round; both have run before."""
    first = timed(plain, device), timed(way, device)
    rounds = max(3, min(15, int(SECONDS / sum(first)))) if device == "cuda" else 3
    pairs = [(timed(plain, device), timed(way, device)) for _ in range(rounds)]
    each = {"plain_seconds": [p for p, _ in pairs], "seconds": [w for _, w in pairs], "ratio": [w / p for p, w in pairs]}
    return {name: quantiles(values, n=4, method="inclusive") for name, values in each.items()}


def peak(function: Callable[[], object], device: str, resting: int) -> int | None:
    """The most bytes allocated during a call, above those of the resting model."""
    if device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - resting


def difference(ours: ways.Result, reference: ways.Result, scale: float) -> float:
    """The largest ``|ours scale - reference| / |reference|`` of a part, by norms; of parts that the reference has."""
    return max(
        float((ours[k].float() * scale - r.float()).norm()) / (float(r.float().norm()) or 1.0) for k, r in reference.items()
    )


class Plain(NamedTuple):
    """A model with its batch, its plain step, and their memory."""

    problem: ways.Problem
    step: Callable[[], object]
    resting: int
    peak: int | None


class Bench:
    """One case in one mode: the model, its plain step, and a reference for each quantity that is asked for."""

    def __init__(self, case: str, mode: str, device: str, tiny: bool) -> None:
        self.case, self.mode, self.device, self.tiny = model_cases.CASES[case], mode, device, tiny
        self.head = {"case": case, "summary": self.case.summary, "mode": mode, "parameters": self.case.parameters(tiny)}

    @cached_property
    def plain(self) -> Plain:
        """Made for the first way that is measured: if it cannot be, that is on record."""
        problem = self.case.build(self.device, self.mode, self.tiny)
        resting = torch.cuda.memory_allocated() if self.device == "cuda" else 0
        step = ways.plain(*problem)
        step()
        return Plain(problem, step, resting, peak(step, self.device, resting))

    def measure(self, document: record.Document, quantity: str, way: Way) -> dict[str, Any]:
        """Add a way's record to the file: without a time if its result is wrong, or there is none, and then with the reason."""
        head = {**self.head, "quantity": quantity, "way": way.name, "ours": way.ours}
        return document.attempt(document.content["models"], head, partial(self._measured, quantity, way), LIMIT)

    def _measured(self, quantity: str, way: Way) -> dict[str, Any]:
        problem, step, resting, plain_peak = self.plain
        problem[0].zero_grad()
        prepared = way.prepare(*problem)
        off = self._difference(quantity, ways.found(prepared)) if way.ours else None
        if off is not None and not off <= LIMITS[self.mode]:
            return {"difference": off, "why": f"differs from plain torch by {off:.2g}"}
        most = peak(prepared, self.device, resting)
        return {
            "difference": off,
            **in_turn(step, prepared, self.device),
            "peak_bytes": most,
            "plain_peak_bytes": plain_peak,
        }

    def _difference(self, quantity: str, ours: ways.Result) -> float:
        problem = self.plain.problem
        reference = next(way for way in WAYS[quantity] if not way.ours)
        scale = len(problem[1]) if quantity == "diagonal" else 1.0  # the loop's is a sum over the samples
        return difference(ours, ways.found(reference.prepare(*problem)), scale)


def left(done: set[tuple[str, ...]]) -> Iterator[tuple[str, str, list[tuple[str, Way]]]]:
    """Case by case, in bfloat16 first, the ways that have no record yet."""
    for mode in MODES:
        for case, one in model_cases.CASES.items():
            missing = [(q, way) for q in one.quantities for way in WAYS[q] if (case, mode, q, way.name) not in done]
            if missing:
                yield case, mode, missing


def largest(device: str, document: record.Document, tiny: bool) -> dict[str, Any]:
    """Run the diagonal of the largest decoder of Llama 3 8B's widths that fits: its record."""
    depth = capacity.LLAMA_8B.layers(capacity.parameters(document.content["machine"].get("memory_bytes", 0)))
    sizes = model_cases.TINY_LLAMA if tiny else model_cases.llama(depth, capacity.LLAMA_8B)
    case = model_cases.Case("", networks.Llama, sizes, model_cases.TINY_LLAMA, text, 1, 256, 5, ())
    size = case.parameters(tiny)
    head = {"layers": sizes["depth"], "parameters": size, "expected_bytes": size * capacity.bytes_per_parameter()}
    return document.attempt(document.content["largest"], head, partial(diagonal, case, device, tiny), LIMIT)


def diagonal(case: model_cases.Case, device: str, tiny: bool) -> dict[str, Any]:
    """The time of a batch's diagonal in bfloat16, and the memory of it all."""
    model, x, y = case.build(device, "bf16", tiny)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        seconds = [timed(lambda: stats.backward(loss_per_sample(model(x), y)), device) for _ in range(3)][-1]
    return {
        "seconds": seconds,
        "trace": float(stats.result().trace()),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def largest_once(device: str, document: record.Document, tiny: bool, deadline: float) -> None:
    """Add ``largest`` to the file, unless it is there or the time is over."""
    if not document.content["largest"] and time.monotonic() < deadline:
        print(f"largest: {largest(device, document, tiny)}", flush=True)
        released(device)


def line(found: dict[str, Any]) -> str:
    """One way for the log."""
    head, memory = f"{found['case']} {found['mode']} {found['quantity']}: {found['way']}", ""
    if "why" in found:
        return f"{head}: {found['why']}"
    if found["peak_bytes"] is not None:
        memory = f", {found['peak_bytes'] / 2**30:.2f} GiB, plain {found['plain_peak_bytes'] / 2**30:.2f}"
    off = "" if found["difference"] is None else f", differs by {found['difference']:.1e}"
    return f"{head}: {median(found['ratio']):.2f} of plain's {found['plain_seconds'][1] * 1e3:.1f} ms{memory}{off}"


def main() -> int:
    """Measure what is left, until ``--seconds`` are over."""
    given = run.arguments(__doc__)
    deadline = time.monotonic() + given.seconds
    device, document = run.started(given.rehearse)
    tiny = given.rehearse is not None

    def missing() -> list[tuple[str, str, list[tuple[str, Way]]]]:
        return list(left({(r["case"], r["mode"], r["quantity"], r["way"]) for r in document.content["models"]}))

    for case, mode, of_case in missing():
        if time.monotonic() > deadline:
            break
        bench = Bench(case, mode, device, tiny)
        with clock.tf32(False):
            for quantity, way in of_case:
                if time.monotonic() < deadline and run.alive(device):
                    print(line(bench.measure(document, quantity, way)), flush=True)
        del bench
        if not run.alive(device):
            return run.lost()
        released(device)
        largest_once(device, document, tiny, deadline)  # after the first case, then never again
    largest_once(device, document, tiny, deadline)
    remaining = sum(len(of_case) for *_, of_case in missing()) + (not document.content["largest"])
    print(f"wrote {document.path}" + (f"; {remaining} ways left, run again to go on" if remaining else ""))
    failed = [r for r in document.content["models"] if r["ours"] and "why" in r]
    return record.ENDED if failed or remaining else 0


def released(device: str) -> None:
    """Give back what the last case held, in reference cycles too."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
