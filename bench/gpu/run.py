# SPDX-License-Identifier: Apache-2.0
"""Measure the ceilings and every op in every backend; write one JSON file, case by case, so that a stop loses nothing.

Run it again on the same day with the same sources and it goes on where it stopped. ``--rehearse FOLDER`` runs all of it on the CPU
with extents of a few and writes there: it proves the bench, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is defined

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import clock, cost, problems, record

import fisherfast as ff
from fisherfast import _backend, _choice

BACKENDS = {"cuda": ("triton", "cuda"), "cpu": ("cpu", "reference")}


def arguments(description: str | None) -> argparse.Namespace:
    """What the command lines of ``run.py`` and ``models.py`` have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=420, help="begin no further case after this time")
    parser.add_argument("--rehearse", type=Path, metavar="FOLDER", help="tiny cases on the CPU, results under FOLDER")
    return parser.parse_args()


def started(rehearse: Path | None) -> tuple[str, record.Document]:
    """The device, and the file with the ceilings in it, measured unless they are there."""
    torch.manual_seed(0)
    device = "cuda" if rehearse is None else "cpu"
    document = record.Document(record.facts(device), *([] if rehearse is None else [rehearse]))
    if document.content["ceilings"] is None:
        document.save(ceilings=clock.ceilings(device))
    print("ceilings: " + ", ".join(f"{name} {value:.4g}" for name, value in document.content["ceilings"].items()), flush=True)
    return device, document


def error(value: torch.Tensor, oracle: torch.Tensor) -> float:
    """``max|value - oracle| / max|oracle|``."""
    return float((value.double() - oracle).abs().max() / oracle.abs().max())


def gated(
    device: str, problem: problems.Problem, oracle: torch.Tensor, plain: float, backend: str, ceilings: dict
) -> dict[str, Any]:
    """One backend's record; without a time if its result is not even close or there is none."""
    found: dict[str, Any] = {"route": backend, "error": None, "passes": False}
    try:
        acc = problem.acc.clone()
        with ff.backend(backend):
            problem.ours(acc)
            off = error(problem.compared(acc), oracle)
            found |= {"error": off, "passes": cost.passes(off, plain, problem.mode)}
            if found["passes"] or off <= cost.CLOSE:
                quartiles = clock.seconds(lambda: problem.ours(acc), device)
                found |= {"seconds": quartiles, "fraction": cost.fraction(problem.cost, ceilings, quartiles[1])}
    except Exception as raised:  # the other cases are still to be measured
        found |= {"passes": False, "why": reason(raised)}
    return found


def peer(device: str, problem: problems.Problem, oracle: torch.Tensor, name: str) -> dict[str, Any]:
    """A peer's record: its error where it computes the same, and its time; or why there is none."""
    found: dict[str, Any] = {"route": name, "error": None}
    try:
        acc = problem.acc.clone()
        result = problem.peers[name](acc)
        if result is acc:
            found["error"] = error(problem.compared(result), oracle)
        return found | {"seconds": clock.seconds(lambda: problem.peers[name](acc), device)}
    except Exception as raised:  # is what there is to say of it
        return found | {"why": reason(raised)}


def alive(device: str) -> bool:
    """Whether the device still answers: after a bad access nothing of this process runs any more."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:  # what every CUDA error is
        return False
    return True


def reason(raised: Exception) -> str:
    """Why there is no number, in one line."""
    text = (str(raised).splitlines() or [""])[0][:200]
    if isinstance(raised, (torch.OutOfMemoryError, MemoryError)):
        return f"out of memory: {text}"
    return f"raises {type(raised).__name__}: {text}"


def measure(device: str, op: str, case: str, mode: str, ceilings: dict[str, float], tiny: bool = False) -> dict[str, Any]:
    """Everything about one case in one mode."""
    problem = problems.build(device, op, case, mode, tiny)
    with clock.tf32(mode == "tf32"):
        oracle = problem.oracle()
        plain = error(problem.compared(problem.plain()), oracle)
        usable = [b for b in BACKENDS[device] if _backend.OPS[op].unavailable(b, device) is None]
        measures = [partial(gated, device, problem, oracle, plain, backend, ceilings) for backend in usable]
        measures += [partial(peer, device, problem, oracle, name) for name in problem.peers]
        routes = []
        while measures and alive(device):  # a kernel that broke the device would take the blame for all that follow
            routes.append(measures.pop(0)())
    extents = _choice.extents((problem.acc, *problem.inputs))
    head = {"op": op, "case": case, "mode": mode, "shape": problem.shape, "extents": extents}
    bound = cost.bound(problem.cost, ceilings)._asdict()
    return {**head, **problem.cost._asdict(), "bound": bound, "plain_error": plain, "routes": routes}


def lines(found: dict[str, Any]) -> str:
    """One case for the log."""
    least = found["bound"]
    rows = [f"{found['op']} {found['case']} {found['mode']}: bound {least['seconds'] * 1e3:.3f} ms by {least['by']}"]
    for r in found["routes"]:
        parts = [f"{r['seconds'][1] * 1e3:9.3f} ms"] if "seconds" in r else []
        parts += [f"{r['fraction']:.0%} of the bound"] if "fraction" in r else []
        parts += [f"error {r['error']:.2e}"] if r["error"] is not None else []
        if "why" in r:
            parts.append(r["why"])
        elif not r.get("passes", True):
            parts.append(f"FAILS THE GATE: plain torch's error is {found['plain_error']:.2e}")
        rows.append(f"  {r['route']:28s} {', '.join(parts)}")
    return "\n".join(rows)


def main() -> int:
    """Measure what is left, until ``--seconds`` are over."""
    given = arguments(__doc__)
    deadline = time.monotonic() + given.seconds
    device, document = started(given.rehearse)
    done = {(r["op"], r["case"], r["mode"]) for r in document.content["ops"]}
    left = [key for key in problems.order() if key not in done]
    while left and time.monotonic() < deadline and alive(device):
        found = measure(device, *left.pop(0), document.content["ceilings"], tiny=given.rehearse is not None)
        document.append("ops", found)
        print(lines(found), flush=True)
        if device == "cuda" and alive(device):
            torch.cuda.empty_cache()
    print(f"wrote {document.path}" + (f"; {len(left)} cases left, run again to go on" if left else ""))
    failed = [
        f"{r['op']} {r['case']} {r['mode']} {route['route']}"
        for r in document.content["ops"]
        for route in r["routes"]
        if not route.get("passes", True)
    ]
    if failed:
        print("results that fail the gate: " + "; ".join(failed))
    return 1 if failed or left else 0


if __name__ == "__main__":
    sys.exit(main())
