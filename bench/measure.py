# SPDX-License-Identifier: Apache-2.0
"""How everything here is measured: timing in turns, and the facts about the machine."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any

import origin
import torch

from fisherfast import _backend

ROOT = Path(__file__).parents[1]
THREADS = 2
DISTURBED = 0.05  # of a run's time spent waiting for a processor; 0 to 2 % on a quiet machine
TRIES = 5
LONG = 0.2  # seconds: what a run finds in the caches at its start no longer matters, so no untimed run goes before it
_TARGET = "target"
PACKAGES = (
    "fisherfast",
    "torch",
    "triton",
    "numpy",
    "backpack-for-pytorch",
    "nngeometry",
    "asdfghjkl",
    "opacus",
    "curvlinops-for-pytorch",
    "kronfluence",
)


def _waited() -> float:
    """Seconds the threads of this process stood ready to run and were not run (Linux; elsewhere unknown, so 0)."""
    return sum(int(stat.read_text().split()[1]) for stat in Path("/proc/self/task").glob("*/schedstat")) * 1e-9


def _timed(function: Callable[[], Any], untimed: bool) -> tuple[float, float]:
    """Seconds of a run, after an untimed one, and how many of them it waited for a processor. Disturbed, it tries again."""
    for _ in range(TRIES):
        if untimed:
            function()
        waited, start = _waited(), time.perf_counter()
        function()
        seconds, waited = time.perf_counter() - start, _waited() - waited
        if waited <= DISTURBED * seconds:
            break
    return seconds, waited


def interleaved(
    benchmark: Any,
    target: Callable[[], Any],
    others: dict[str, Callable[[], Any]],
    seconds: float,
    least: int = 11,
    batches: int = 1,
) -> None:
    """Time the others and the target in turn, round after round, for about ``seconds`` but ``least`` rounds; keep quartiles.

    A ratio is taken within a round, so a machine that slows for a while slows both sides. Every timed run that is not long
    follows an untimed run of the same function: each finds the caches as it leaves them. Where another process took a
    processor, the run is left out; too few others, and there is no number. The target's times are divided by ``batches``.
    """
    rounds: list[dict[str, tuple[float, float]]] = []
    waited = 0.0
    first = {name: _timed(run, untimed=False)[0] for name, run in {**others, _TARGET: target}.items()}
    untimed = {name: alone < LONG for name, alone in first.items()}
    a_round = sum(first[name] * (1 + untimed[name]) for name in first)
    count = max(least, min(51, int(seconds / a_round)))

    def discard() -> None:
        target()

    def setup() -> None:
        nonlocal waited
        rounds.append({name: _timed(other, untimed[name]) for name, other in others.items()})
        if untimed[_TARGET]:
            target()
        waited = _waited()

    def teardown() -> None:
        rounds[-1][_TARGET] = (benchmark.stats.stats.data[-1], _waited() - waited)

    benchmark.pedantic(discard, setup=setup, teardown=teardown, rounds=count)
    for r in rounds:
        r[_TARGET] = (r[_TARGET][0] / batches, r[_TARGET][1] / batches)
    benchmark.extra_info |= {
        "seconds": _quartiles([r[_TARGET][0] for r in _undisturbed(rounds, _TARGET)]),
        "rounds": count,
        "others": {name: _compare(rounds, name) for name in others},
    }


def _undisturbed(rounds: list[dict[str, tuple[float, float]]], *names: str) -> list[dict[str, tuple[float, float]]]:
    clean = [r for r in rounds if all(waited <= DISTURBED * seconds for seconds, waited in (r[n] for n in names))]
    assert len(clean) >= 5, f"the machine is busy: {len(clean)} of {len(rounds)} rounds ran undisturbed; leave it alone, repeat"
    return clean


def _compare(rounds: list[dict[str, tuple[float, float]]], name: str) -> dict[str, list[float]]:
    pairs = [(r[name][0], r[_TARGET][0]) for r in _undisturbed(rounds, name, _TARGET)]
    return {
        "seconds": _quartiles([other for other, _ in pairs]),
        "ratio": _quartiles([target / other for other, target in pairs]),
    }


def _quartiles(values: list[float]) -> list[float]:
    return quantiles(values, n=4, method="inclusive")


def _native() -> Any:
    problem = _backend.native_problem()
    if problem is not None:
        raise RuntimeError(f"bench: needs the compiled extension: {problem}")
    return torch.ops.fisherfast_cpp


def fma_peak_gflops() -> float:
    """The float32 multiply-add rate of ``THREADS`` threads, best of five: what a GEMM is a fraction of."""
    return max(_native().fma_peak_gflops(0.2) for _ in range(5))


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def machine() -> dict[str, Any]:
    """What a number depends on: processor, threads, versions, commit, and the sources of the kernels."""
    return {
        "cpu": _cpu(),
        "isa": _native().cpu_isa(None),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted": bool(_git("status", "--porcelain", "--", "csrc", "kernels", "fisherfast", "bench/*.py")),
        "sha256": {folder: origin.sources_sha256(ROOT / folder) for folder in ("csrc", "kernels")},
    }
