# SPDX-License-Identifier: Apache-2.0
"""Measure the ceilings and every op in every GPU backend; write one JSON file, case by case, so that a stop loses nothing.

Run it again on the same day with the same sources and it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import clock, cost, problems

import fisherfast as ff
from fisherfast import _backend

ROOT = Path(__file__).parents[2]
BACKENDS = ("triton", "cuda")


def _first_line(*command: str) -> str | None:
    """What a tool says, or None where it is not there or has nothing to say (no git in a copied tree)."""
    try:
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()[0].strip()
    except (FileNotFoundError, subprocess.CalledProcessError, IndexError):
        return None


def facts() -> dict[str, object]:
    """What a number depends on."""
    return {
        "device": torch.cuda.get_device_name(),
        "multiprocessors": torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "commit": _first_line("git", "rev-parse", "HEAD"),
        "sha256": {folder: cost.sources_sha256(ROOT / folder) for folder in ("csrc", "kernels")},
    }


def path_today(device: str) -> Path:
    """``bench/results/<device>/<date>.json``."""
    return ROOT / "bench" / "results" / cost.slug(device) / f"{datetime.date.today().isoformat()}.json"


def resumed(path: Path, machine: dict[str, object]) -> dict | None:
    """What an earlier run of today left, if it measured these sources on this machine."""
    if not path.exists():
        return None
    earlier = json.loads(path.read_text())
    return earlier if earlier["machine"] == machine else None


def error(value: torch.Tensor, oracle: torch.Tensor) -> float:
    """``max|value - oracle| / max|oracle|``."""
    return float((value.double() - oracle).abs().max() / oracle.abs().max())


def gated(problem: problems.Problem, oracle: torch.Tensor, plain: float, backend: str, ceilings: dict[str, float]) -> dict:
    """One backend's record; without a time if its result is wrong."""
    acc = torch.zeros(problem.acc, device="cuda")
    with ff.backend(backend):
        problem.ours(acc)
        wrong = error(acc, oracle)
        record = {"route": backend, "error": wrong, "passes": cost.passes(wrong, plain)}
        if record["passes"]:
            quartiles = clock.seconds(lambda: problem.ours(acc))
            record |= {"seconds": quartiles, "fraction": cost.fraction(problem.cost, ceilings, quartiles[1])}
    return record


def measure(case: str, dtype: str, problem: problems.Problem, ceilings: dict[str, float]) -> dict:
    """Everything about one case in one dtype."""
    oracle = problem.oracle()
    plain = error(problem.plain(), oracle)
    routes = [
        gated(problem, oracle, plain, b, ceilings) for b in BACKENDS if _backend.OPS[problem.op].unavailable(b, "cuda") is None
    ]
    for name, run in problem.peers.items():
        acc = torch.zeros(problem.acc, device="cuda")
        result = run(acc)
        found = error(result, oracle) if result is acc else None  # the yardstick computes something else
        routes.append({"route": name, "error": found, "seconds": clock.seconds(lambda run=run, acc=acc: run(acc))})
    least = cost.bound(problem.cost, ceilings)
    head = {"op": problem.op, "case": case, "dtype": dtype, "shape": problem.shape}
    return {**head, "bound": least._asdict(), **problem.cost._asdict(), "plain_error": plain, "routes": routes}


def lines(record: dict) -> str:
    """One case for the log."""
    least = record["bound"]
    head = f"{record['op']} {record['case']} {record['dtype']}: bound {least['seconds'] * 1e3:.3f} ms by {least['by']}"
    rows = []
    for r in record["routes"]:
        if "seconds" not in r:
            rows.append(f"  {r['route']:22s} WRONG: error {r['error']:.2e}, plain torch {record['plain_error']:.2e}")
            continue
        share = f", {r['fraction']:.0%} of the bound" if "fraction" in r else ""
        found = "" if r["error"] is None else f", error {r['error']:.1e}"
        rows.append(f"  {r['route']:22s} {r['seconds'][1] * 1e3:9.3f} ms{share}{found}")
    return "\n".join([head, *rows])


def main() -> int:
    """Measure what is left, until ``--seconds`` are over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=420)
    deadline = time.monotonic() + parser.parse_args().seconds
    torch.manual_seed(0)
    machine = facts()
    path = path_today(str(machine["device"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    document = resumed(path, machine) or {"machine": machine, "ceilings": clock.ceilings(), "results": []}
    print(json.dumps({"machine": machine, "ceilings": document["ceilings"]}, indent=1))
    done = {(r["op"], r["case"], r["dtype"]) for r in document["results"]}
    left = [
        (op, case, dtype)
        for op, (_, cases) in problems.CASES.items()
        for case in cases
        for dtype in problems.DTYPES
        if (op, case, dtype) not in done
    ]
    while left and time.monotonic() < deadline:
        op, case, dtype = left.pop(0)
        build, cases = problems.CASES[op]
        record = measure(case, dtype, build(problems.DTYPES[dtype], *cases[case]), document["ceilings"])
        torch.cuda.empty_cache()
        document["results"].append(record)
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(lines(record), flush=True)
    print(f"wrote {path}" + (f"; {len(left)} cases left, run again to go on" if left else ""))
    wrong = [
        f"{record['op']} {record['case']} {record['dtype']} {route['route']}"
        for record in document["results"]
        for route in record["routes"]
        if not route.get("passes", True)
    ]
    if wrong:
        print("wrong results, not timed: " + "; ".join(wrong))
    return 1 if wrong or left else 0


if __name__ == "__main__":
    sys.exit(main())
