# SPDX-License-Identifier: Apache-2.0
"""How everything here is measured: the correctness gate, timing in pairs, and the facts about the machine."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from fisherfast import _backend

ROOT = Path(__file__).parents[1]
THREADS = 2
DISTURBED = 0.05  # of a pair's time spent waiting for a processor; 0 to 2 % on a quiet machine
PACKAGES = ("torch", "triton", "numpy", "backpack-for-pytorch", "nngeometry", "asdfghjkl", "opacus")


def error(result: Tensor, oracle: Tensor) -> float:
    """``max|result - oracle| / max|oracle|``, in float64."""
    return float((result.double() - oracle).abs().max() / oracle.abs().max())


def passes(measured: float, plain: float) -> bool:
    """The numerical gate of the whole project: at most twice the error of plain torch in float32."""
    return measured <= 2 * plain + 1e-7


def _waited() -> float:
    """Seconds the threads of this process stood ready to run and were not run (Linux; elsewhere unknown, so 0)."""
    return sum(int(stat.read_text().split()[1]) for stat in Path("/proc/self/task").glob("*/schedstat")) * 1e-9


def paired(benchmark: Any, target: Callable[[], Any], baseline: Callable[[], Any], seconds: float) -> None:
    """Time baseline, target, baseline, target ... for about ``seconds``; what is kept are the quartiles of times and ratios.

    A neighbour that slows the whole machine slows both halves of a pair, so the ratio is steadier than either time. Pairs in
    which another process took a processor from us are left out; too few others, and there is no number.
    """
    before: list[float] = []
    waited: list[float] = []

    def timed(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def discard() -> None:
        target()

    def setup() -> None:
        waited.append(_waited())
        before.append(timed(baseline))

    def teardown() -> None:
        waited[-1] = _waited() - waited[-1]

    for function in (baseline, discard):
        function()
    pair = timed(baseline) + timed(discard)
    rounds = max(9, min(51, int(seconds / pair)))
    benchmark.pedantic(discard, setup=setup, teardown=teardown, rounds=rounds)
    pairs = zip(before, benchmark.stats.stats.data, waited, strict=True)
    clean = [(b, t) for b, t, w in pairs if w < DISTURBED * (b + t)]
    assert len(clean) >= 5, f"the machine is busy: {len(clean)} of {rounds} pairs ran undisturbed; leave it alone and repeat"
    benchmark.extra_info |= {
        "seconds": quantiles([t for _, t in clean], n=4),
        "baseline_seconds": quantiles([b for b, _ in clean], n=4)[1],
        "ratio": quantiles([t / b for b, t in clean], n=4),
        "rounds": len(clean),
        "disturbed": rounds - len(clean),
    }


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


def _sha256(folder: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


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
        "sha256": {folder: _sha256(folder) for folder in ("csrc", "kernels")},
    }
