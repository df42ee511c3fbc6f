# SPDX-License-Identifier: Apache-2.0
"""Every backend of every op on small awkward calls, before the bench: what fails in every call or hangs here is not run there, and says why.

Results are the tests' business. Records go to the bench's file; run it again and it goes on where it stopped.
"""

from __future__ import annotations

import itertools
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

from gpu import calls, record, run

from fisherfast import _backend

SECONDS = 60  # for a backend of an op at most: the kernels it compiles included


def small(op: str, backend: str, device: str) -> dict[str, Any]:
    """Run the calls: which of them failed. Errors: RuntimeError if all did."""
    failed = calls.run_all(op, backend, device, torch.bfloat16)
    if len(failed) == len(calls.CALLS[op][1]):
        raise RuntimeError(f"every call failed, the first with {failed[0]}")
    return {"failed": failed} if failed else {}


def unfinished(content: dict[str, Any], device: str) -> list[tuple[str, str]]:
    """The backends that are there and have no record yet, op by op."""
    begun = {(r["op"], r["route"]) for r in content["smoke"]}
    pairs = itertools.product(calls.CALLS, run.BACKENDS[device])
    return [(op, b) for op, b in pairs if (op, b) not in begun and _backend.OPS[op].unavailable(b, device) is None]


def main() -> int:
    """Run what is left, until ``--seconds`` are over."""
    given = run.arguments(__doc__)
    deadline = time.monotonic() + given.seconds
    device, document = run.started(given.rehearse)
    for op, backend in unfinished(document.content, device):
        if time.monotonic() > deadline:
            break
        head = {"op": op, "route": backend}
        found = document.attempt(document.content["smoke"], head, partial(small, op, backend, device), SECONDS)
        print(f"{op} {backend}: {found.get('why') or '; '.join(found.get('failed', ['runs']))}", flush=True)
        if not run.alive(device):
            return run.lost()
    left = unfinished(document.content, device)
    print(f"wrote {document.path}" + (f"; {len(left)} backends left, run again to go on" if left else ""))
    return record.ENDED if left or any("why" in r or "failed" in r for r in document.content["smoke"]) else 0


if __name__ == "__main__":
    sys.exit(main())
