# SPDX-License-Identifier: Apache-2.0
"""Measure the ceilings and every op in every backend; write one JSON file, route by route, so that a stop loses nothing.

Run it again on the same day with the same sources and it goes on where it stopped. ``--rehearse FOLDER`` runs all of it on the CPU
with extents of a few and writes there: it proves the bench, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is defined

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import gate
from gpu import clock, cost, problems, record
from gpu.calls import alive

import fisherfast as ff
from fisherfast import _backend, _choice

BACKENDS = {"cuda": ("triton", "cuda"), "cpu": ("cpu", "reference")}
SECONDS = 60  # for a route, or the oracle, at most: the kernels it compiles included


def arguments(description: str | None) -> argparse.Namespace:
    """What the command lines of ``smoke.py``, ``run.py`` and ``models.py`` have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=420, help="begin no further case after this time")
    parser.add_argument("--rehearse", type=Path, metavar="FOLDER", help="tiny cases on the CPU, results under FOLDER")
    return parser.parse_args()


def started(rehearse: Path | None) -> tuple[str, record.Document]:
    """The device, and the file with the ceilings in it, measured unless they are there."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what is being measured goes out of the file
    torch.manual_seed(0)
    device = "cuda" if rehearse is None else "cpu"
    document = record.Document(record.facts(device), *([] if rehearse is None else [rehearse]))
    if document.content["ceilings"] is None:
        document.save(ceilings=clock.ceilings(device))
    print("ceilings: " + ", ".join(f"{name} {value:.4g}" for name, value in document.content["ceilings"].items()), flush=True)
    return device, document


def gated(
    device: str, problem: problems.Problem, oracle: torch.Tensor, plain: float, backend: str, ceilings: dict
) -> dict[str, Any]:
    """What there is to say of one backend; without a time if its result is not even close."""
    acc = problem.acc.clone()
    with ff.backend(backend):
        problem.ours(acc)
        off = gate.error(problem.compared(acc), oracle)
        found = {"error": off, "passes": cost.passes(off, plain, problem.mode)}
        if found["passes"] or off <= cost.CLOSE:
            quartiles = clock.seconds(lambda: problem.ours(acc), device)
            found |= {"seconds": quartiles, "fraction": cost.fraction(problem.cost, ceilings, quartiles[1])}
    return found


def peer(device: str, problem: problems.Problem, oracle: torch.Tensor, name: str) -> dict[str, Any]:
    """What there is to say of a peer: its error where it computes the same, and its time."""
    acc = problem.acc.clone()
    result = problem.peers[name](acc)
    off = gate.error(problem.compared(result), oracle) if result is acc else None
    return {"error": off, "seconds": clock.seconds(lambda: problem.peers[name](acc), device)}


def measure(
    device: str, document: record.Document, op: str, case: str, mode: str, tiny: bool = False, deadline: float = math.inf
) -> dict[str, Any]:
    """Measure what is left of one case in one mode: a record, made anew with the routes that it has where a process left it behind."""
    ops, ceilings = document.content["ops"], document.content["ceilings"]
    before = next((r for r in ops if (r["op"], r["case"], r["mode"]) == (op, case, mode)), None)
    if before is not None:
        ops.remove(before)
    routes = [] if before is None else before["routes"]
    measures: dict[str, Callable[[], dict[str, Any]]] = {}

    def prepare() -> dict[str, Any]:
        problem = problems.build(device, op, case, mode, tiny)
        oracle = problem.oracle()
        plain = gate.error(problem.compared(problem.plain()), oracle)
        usable = [b for b in BACKENDS[device] if _backend.OPS[op].unavailable(b, device) is None]
        for b in usable:
            why = dropped(document.content, op, b)
            measures[b] = partial(dict, why=why) if why else partial(gated, device, problem, oracle, plain, b, ceilings)
        measures.update({name: partial(peer, device, problem, oracle, name) for name in problem.peers})
        return {
            "shape": problem.shape,
            "extents": _choice.extents((problem.acc, *problem.inputs)),
            **problem.cost._asdict(),
            "bound": cost.bound(problem.cost, ceilings)._asdict(),
            "plain_error": plain,
            "left": [name for name in measures if name not in {r["route"] for r in routes}],
        }

    with clock.tf32(mode == "tf32"):
        found = document.attempt(ops, {"op": op, "case": case, "mode": mode, "routes": routes}, prepare, SECONDS)
        # Of a broken device all that follow would take the blame.
        while found.get("left") and alive(device) and time.monotonic() < deadline:
            name = found["left"][0]
            head = {"route": name, "error": None} | ({"passes": False} if name in BACKENDS[device] else {})
            document.attempt(routes, head, measures[name], SECONDS)
            found["left"].remove(name)
            document.save()
    return found


def dropped(content: dict[str, Any], op: str, backend: str) -> str | None:
    """Why a backend of an op is not run any more: it failed on every small call, or was lost twice. Once may have been the lease's end."""
    failed = [r["why"] for r in content["smoke"] if (r["op"], r["route"]) == (op, backend) and "why" in r]
    if failed:
        return f"not run: on small calls {failed[0]}"
    lost = [
        f"{r['case']} {r['mode']}"
        for r in content["ops"]
        if r["op"] == op and any(one["route"] == backend and one.get("why") == record.LOST for one in r["routes"])
    ]
    return f"not run: {record.LOST} at {' and '.join(lost)}" if len(lost) > 1 else None


def unfinished(content: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The cases that no process has begun, and those that one left with routes to measure."""
    begun = {(r["op"], r["case"], r["mode"]): r for r in content["ops"]}
    return [key for key in problems.order() if key not in begun or begun[key].get("left")]


def lines(found: dict[str, Any]) -> str:
    """One case for the log."""
    head = f"{found['op']} {found['case']} {found['mode']}"
    if "why" in found:
        return f"{head}: {found['why']}"
    least = found["bound"]
    rows = [f"{head}: bound {least['seconds'] * 1e3:.3f} ms by {least['by']}"]
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
    for key in unfinished(document.content):
        if time.monotonic() > deadline:
            break
        print(lines(measure(device, document, *key, given.rehearse is not None, deadline)), flush=True)
        if not alive(device):
            return lost()
        if device == "cuda":
            torch.cuda.empty_cache()
    left = unfinished(document.content)
    print(f"wrote {document.path}" + (f"; {len(left)} cases left, run again to go on" if left else ""))
    failed = failures(document.content)
    if failed:
        print("results that fail the gate, or are none: " + "; ".join(failed))
    return record.ENDED if failed or left else 0


def failures(content: dict[str, Any]) -> list[str]:
    """The cases that could not be prepared, and the backends without a right result."""
    found = []
    for r in content["ops"]:
        case = f"{r['op']} {r['case']} {r['mode']}"
        found += [case] if "why" in r else []
        found += [f"{case} {one['route']}" for one in r["routes"] if not one.get("passes", True)]
    return found


def lost() -> int:
    """Say that nothing runs in this process any more."""
    print("the device is lost to this process; run again to go on", flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
