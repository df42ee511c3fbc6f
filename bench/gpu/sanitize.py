# SPDX-License-Identifier: Apache-2.0
"""Every GPU backend of the ops named, on small awkward calls, for compute-sanitizer to watch; results are the tests' business."""

import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import calls

from fisherfast import _backend

GROUPS = {"products": ("linear_sq_", "gram_", "conv_sq_", "conv_gram_", "ghost_norm_")}
GROUPS["others"] = tuple(op for op in calls.CALLS if op not in GROUPS["products"])


def main(group: str, device: str = "cuda") -> int:
    """Run a group's calls; the sanitizer's exit status is the answer, or 1 if a call could not be run at all."""
    status = 0
    for op, dtype, name in itertools.product(GROUPS[group], (torch.float32, torch.bfloat16), ("triton", "cuda")):
        if (problem := _backend.OPS[op].unavailable(name, device)) is not None:
            print(f"{op} has no {name} backend here: {problem}")
            continue
        failed = calls.run_all(op, name, device, dtype)
        print(f"ran {op} {name} {dtype}", *failed, sep="\n", flush=True)
        status |= bool(failed)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
