# SPDX-License-Identifier: Apache-2.0
"""``python bench/gpu/static.py``: what the machine code of every GPU kernel holds, for every target, without a GPU.

Compiles the Triton kernels that representative calls start (``tests/compile_ahead.py``) and the CUDA C++ files
(``tests/compile_cuda.py``), writes kernels.json beside this file and from it docs/gpu-kernels.md. ``--page`` only rewrites
the page from the stored file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import markdown_table
import origin
from gpu import cost
from markdown_table import NONE

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
RESULTS = Path(__file__).with_name("kernels.json")
PAGE = ROOT / "docs" / "gpu-kernels.md"
CAPABILITIES = (90, 80, 100)  # the slowest to compile first
OF_OTHERS = ("call", "kernel", "target", "threads", "registers", "local_bytes")  # what is kept of autotuning's other candidates
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int32": 4, "int64": 8, "bool": 1}

# And of products: float32 ones are six of bfloat16; those of float64 have tensor cores too, twice as fast by the data sheet.
LEADS = cost.LEADS | {"fp32 as bf16x6": cost.LEADS["bf16"] / 6, "fp64 product": 2 * cost.LEADS["fp64"]}


class Multiprocessor(NamedTuple):
    """What the blocks on one multiprocessor share."""

    registers: int
    warps: int
    blocks: int
    shared: int  # bytes, of which every block takes 1 KiB more than it asks for
    largest: int  # bytes a block may ask for


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(65536, 64, 32, 164 * 1024, 163 * 1024),
    "sm_90": Multiprocessor(65536, 64, 32, 228 * 1024, 227 * 1024),
    "sm_100": Multiprocessor(65536, 64, 32, 228 * 1024, 227 * 1024),
}
WARP, REGISTERS_AT_ONCE, RESERVED = 32, 256, 1024


def blocks_at_once(registers: int, threads: int, shared_bytes: int, target: str) -> int:
    """How many blocks a multiprocessor holds; 0 for one that cannot start. Registers are dealt out 256 a warp."""
    limit = MULTIPROCESSORS[target.removesuffix("a")]
    if shared_bytes > limit.largest:
        return 0
    warps = -(-threads // WARP)
    of_warp = -(-registers * WARP // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    return min(
        limit.blocks,
        limit.warps // warps,
        limit.registers // (of_warp * warps),
        limit.shared // (shared_bytes + RESERVED),
    )


def occupancy(registers: int, threads: int, shared_bytes: int, target: str) -> float:
    """The share of a multiprocessor's warps that can be resident."""
    warps = -(-threads // WARP)
    return blocks_at_once(registers, threads, shared_bytes, target) * warps / MULTIPROCESSORS[target.removesuffix("a")].warps


def work(call: str, arguments: dict[str, tuple[list[int], str]]) -> cost.Cost:
    """What a call must do at least: products and sums, inputs read once, outputs read and written, scores only written."""
    op, dtype = call.split()[:2]
    size = {name: math.prod(shape) for name, (shape, _) in arguments.items()}
    width = {name: BYTES[kind] for name, (_, kind) in arguments.items()}
    shape = {name: shape for name, (shape, _) in arguments.items()}
    moved = {name: size[name] * width[name] * (2 if name in ("acc", "total", "sqnorm") else 1) for name in size}
    products = "fp64 product" if dtype == "fp64" else "bf16" if dtype in ("bf16", "fp16") else "fp32 as bf16x6"
    if "tf32" in call:
        products = "tf32"
    if op == "linear_sq":
        flops = 2 * size["x"] * shape["g"][-1]
        products = "fp32 as bf16x6" if "T=1" in call.split() and products != "fp64 product" else products  # of squares
    elif op == "conv_sq":
        flops = 2 * size["acc"] * size["g"] // shape["g"][1]
    elif op == "ghost_norm":
        T = math.prod(shape["g"][2:])
        offsets = {"rows": 1, "3x3": 9, "1d": 3, "3d": 27}[call.split()[2]]
        flops = shape["g"][0] * T * (T + 1) * (shape["g"][1] + shape["x"][1] * offsets)
    elif op in ("gram", "conv_gram"):
        D = shape["acc"][-1]
        rows = size["x"] // shape["x"][-1] if op == "gram" else size["x"] // shape["x"][1]  # a stride takes fewer
        flops = rows * D * (D + 1) * (shape["acc"][0] if op == "conv_gram" else 1)
        moved["acc"] = moved["acc"] * (D + 1) // (2 * D)
        products = "fp32 as bf16x6" if "weight" in shape and products == "bf16" else products
    else:
        flops = size[next(name for name in ("g", "f", "logits", "a") if name in size)]
        flops *= {"scale_sq": 2, "embedding_sq": 1, "categorical_score": 9, "log1p_sum": 70, "kron_log1p_sum": 70}[op]
        flops *= size["b"] if op == "kron_log1p_sum" else 1
        products = "fp64" if dtype == "fp64" or "log1p" in op else "fp32"
        if op == "embedding_sq":
            for name in {"acc", "total"} & moved.keys():  # only the rows that occur
                moved[name] = moved[name] * min(shape["acc"][0], size["ids"]) // shape["acc"][0]
    return cost.Cost(flops, sum(moved.values()), products)


def least_seconds(work: cost.Cost) -> tuple[float, str]:
    """What nothing beats by the leads: operations over the rate of their unit, or bytes over the copy bandwidth."""
    return max((work.flops / LEADS[work.unit], work.unit), (work.bytes / LEADS["copy"], "copy"))


def triton_rows(capability: int, *options: str) -> list[dict]:
    """Every Triton kernel of one target, from a process of its own; ``--others``: those that autotuning would try."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, TESTS / "compile_ahead.py", str(capability), *options]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"compile_ahead.py {capability} failed: {run.stderr[-4000:]}")
    return json.loads(run.stdout)


def cuda_rows() -> list[dict]:
    """Every CUDA C++ kernel of every architecture."""
    sys.path.insert(0, str(TESTS))
    import compile_cuda
    import machine_code

    if shutil.which("nvcc") is None:
        raise RuntimeError("static.py: nvcc is not on the PATH, and the page would lose its CUDA C++ kernels; install it")
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_cuda.compile_all(Path(folder))
        objects = [target for target, _ in compiled.values()]
        code, threads = compile_cuda.listings_of(objects), compile_cuda.threads_of(objects)
        return [
            {
                "kernel": k.name,
                "target": f"sm_{k.arch}",
                "registers": k.registers,
                "local_bytes": k.stack + k.spill_stores + k.spill_loads,
                "shared_bytes": k.shared,
                "threads": threads[k.arch, k.name],
                **machine_code.summary(machine_code.opcodes(code[k.arch, k.name])),
            }
            for k in compile_cuda.kernels(compiled)
            if "wgmma" not in k.name or k.arch == "90a"  # elsewhere they are left empty
        ]


def measure() -> dict:
    """Compile everything, two compilers at a time."""
    import torch
    import triton

    with ThreadPoolExecutor(2) as pool:
        cuda = pool.submit(cuda_rows)
        triton_found = [row for rows in pool.map(triton_rows, CAPABILITIES) for row in rows]
        others = [row for rows in pool.map(lambda target: triton_rows(target, "--others"), CAPABILITIES) for row in rows]
        return {
            "versions": {"torch": torch.__version__, "triton": triton.__version__, "nvcc": _nvcc_version()},
            "sha256": {folder: origin.sources_sha256(ROOT / folder) for folder in ("kernels", "csrc")},
            "triton": triton_found,
            "others": [{key: row[key] for key in OF_OTHERS} for row in others if _own(row)],
            "cuda": cuda.result(),
        }


def _nvcc_version() -> str:
    said = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return said.partition("release ")[2].partition(",")[0]


HEAD = """\
# GPU kernels: what the machine code holds

Written by `python bench/gpu/static.py`, which needs no GPU; do not edit. Nothing on this page was measured on one.

*at once*: blocks a multiprocessor holds by registers, threads and shared memory, and the share of its warps. *products*: the matrix
instructions, with how often each occurs in the code. *copies*: asynchronous ones (LDGSTS: a thread's `cp.async`; UTMALDG, UBLKCP: the bulk copy
engine). *loads*: the widest load from global memory in bits, and of how many. *least*: for the whole call on an H200, operations
(2NTIO and the like) over the rate of their unit or bytes (inputs once, outputs read and written) over the copy bandwidth, whichever is longer. Its
rates are leads, not measurements of these kernels: {leads}.
No kernel spills to local memory or uses an atomic operation; the tests hold them to that.
"""
FOLDS = """\
### Around them

Checks for values that are not finite, and sums of partial results in a fixed order; the largest of each kernel's variants.
"""
CUDA = """\
## CUDA C++

Compiled by nvcc {nvcc} for sm_80, sm_90a and sm_100. Shared memory that a kernel asks for at launch is not in its object file: *at once* is by
registers, threads and static shared memory alone, an upper bound.
"""
TRITON = """\
## Triton

Compiled by Triton {triton} for sm_90, with registers and blocks at once for sm_80 and sm_100 beside it. A call is `op dtype shape`, as in
`tests/compile_ahead.py`. Autotuning, where it is asked for, would also try {others} others for these calls and targets; none of them spills, either.
"""


def render(found: dict) -> str:
    """The whole page."""
    leads = ", ".join(f"{unit} {rate / 1e12:.3g} T{'B' if unit == 'copy' else 'FLOP'}/s" for unit, rate in LEADS.items())
    return "\n".join(
        [
            HEAD.format(leads=leads),
            f"torch {found['versions']['torch']}; sha256 of {origin.hashes(found)}.\n",
            TRITON.format(**found["versions"], others=len(found["others"])),
            *_triton(found["triton"]),
            CUDA.format(**found["versions"]),
            _cuda(found["cuda"]),
        ]
    )


def _own(row: dict) -> bool:
    """Whether it is a kernel of the op that was called, not of what happens around it."""
    return row["kernel"].startswith(f"_{row['call'].split()[0]}_")


def _triton(rows: list[dict]) -> list[str]:
    own = [row for row in rows if _own(row)]
    parts = []
    for op in dict.fromkeys(row["call"].split()[0] for row in own):
        mine = [row for row in own if row["call"].split()[0] == op]
        calls = dict.fromkeys((row["call"], row["kernel"]) for row in mine)
        by_target = {(row["call"], row["kernel"], row["target"]): row for row in mine}
        body = []
        for call, kernel in calls:
            each = {target: by_target.get((call, kernel, target)) for target in MULTIPROCESSORS}
            row = each["sm_90"]
            others = [f"{other['registers']} ({_at_once(other)})" if other else NONE for t, other in each.items() if t != "sm_90"]
            body.append([call.partition(" ")[2], f"`{kernel.strip('_')}`", *_facts(row), *others, _least(row)])
        head = ["call", "kernel", *FACTS, "sm_80 registers (at once)", "sm_100", "least"]
        parts.append(f"### `{op}`\n\n{markdown_table.table(head, body, left=len(head))}")
    around: dict[tuple[str, str], dict] = {}
    for row in rows:
        if row not in own:
            key = (row["kernel"], row["target"])
            around[key] = max(around.get(key, row), row, key=lambda r: r["registers"])
    body = [[f"`{kernel.strip('_')}`", target, *_facts(row)] for (kernel, target), row in sorted(around.items())]
    return [*parts, FOLDS + "\n" + markdown_table.table(FACT_HEAD, body, left=len(FACT_HEAD))]


def _cuda(rows: list[dict]) -> str:
    ordered = sorted(rows, key=lambda r: (r["kernel"], r["target"]))
    return markdown_table.table(FACT_HEAD, [[f"`{r['kernel']}`", r["target"], *_facts(r)] for r in ordered], left=len(FACT_HEAD))


FACTS = ["registers", "threads", "shared KiB", "at once", "products", "copies", "loads"]
FACT_HEAD = ["kernel", "target", *FACTS]


def _facts(row: dict) -> list[str]:
    return [
        str(row["registers"]),
        str(row["threads"]),
        f"{row['shared_bytes'] / 1024:.3g}",
        _at_once(row),
        _counts(row["matrix"]),
        _counts(row["copies"]),
        _widest(row["loads"]),
    ]


def _at_once(row: dict) -> str:
    arguments = (row["registers"], row["threads"], row["shared_bytes"], row["target"])
    return f"{blocks_at_once(*arguments)}, {100 * occupancy(*arguments):.0f} %"


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{name} x {count}" for name, count in found.items()) or NONE


def _widest(loads: dict[str, int]) -> str:
    bits = [_bits(name) for name, count in loads.items() for _ in range(count)]
    return f"{max(bits)} ({bits.count(max(bits))} of {len(bits)})" if bits else NONE


def _bits(load: str) -> int:
    return next((int(part.lstrip("US")) for part in load.split(".")[1:] if part.lstrip("US").isdigit()), 32)


def _least(row: dict) -> str:
    seconds, by = least_seconds(work(row["call"], row["arguments"]))
    return f"{seconds * 1e6:.3g} us, {by}"


def main() -> None:
    """Compile unless only the page is asked for; write both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="only write docs/gpu-kernels.md from the stored results")
    if not parser.parse_args().page:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    PAGE.write_text(render(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
