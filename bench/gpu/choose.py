# SPDX-License-Identifier: Apache-2.0
"""Write ``fisherfast/choice.json`` from the newest ``bench/results/<gpu>/*.json``: which backend is faster, case by case.

Where the quartiles of two times overlap, neither is faster, and the case keeps the default, Triton. The slower one can still be had by
``ff.backend``. A result that fails the gate is never chosen; of the ops that have one backend there is nothing to choose.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import record

from fisherfast import _choice

BACKENDS = ("triton", "cuda")  # the default first


def table(paths: Iterable[Path]) -> dict[str, Any]:
    """The table of these results, by compute capability; of two devices with one capability the later file counts."""
    found = {}
    for path in sorted(paths, key=lambda path: path.stem):
        run = json.loads(path.read_text())
        ops: dict[str, list[dict[str, Any]]] = {}
        for measured in run["ops"]:
            if (entry := choice(measured)) is not None:
                ops.setdefault(measured["op"], []).append(entry)
        if ops:
            machine = run["machine"]
            source = {"device": machine["device"], "source": f"{path.parent.name}/{path.name}", "sha256": machine["sha256"]}
            found[machine["capability"]] = {**source, "ops": ops}
    return found


def choice(measured: dict[str, Any]) -> dict[str, Any] | None:
    """The entry of one case, the other than the default only where it is plainly faster, or where it alone is right; None if neither
    is.
    """
    seconds = {r["route"]: r["seconds"] for r in measured["routes"] if r["route"] in BACKENDS and r["passes"]}
    default, other = BACKENDS
    if not seconds:
        return None
    both = len(seconds) == len(BACKENDS)
    winner = next(iter(seconds)) if not both else other if seconds[other][2] < seconds[default][0] else default
    medians = {name: float(f"{quartiles[1]:.4g}") for name, quartiles in seconds.items()}
    return {
        "case": measured["case"],
        "mode": measured["mode"],
        "extents": measured["extents"],
        "backend": winner,
        "seconds": medians,
    }


def main() -> None:
    """Write the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    found = table(record.newest())
    _choice.PATH.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {_choice.PATH}: {sum(len(e) for t in found.values() for e in t['ops'].values())} cases of {len(found)} devices")


if __name__ == "__main__":
    main()
