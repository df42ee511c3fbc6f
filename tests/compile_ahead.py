# SPDX-License-Identifier: Apache-2.0
"""Compile, without a GPU, the Triton kernels that the launchers would start; print what the machine code holds, as JSON.

``python compile_ahead.py 90`` compiles for sm_90. A stand-in driver names the target and every launch becomes a
compilation, so block sizes, dtypes and specialisations are those of real calls. Run by test_triton_aot.py in a process
of its own, since Triton's interpreter must be off and the stand-in driver stays.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
from fisherfast.kernels import embedding_sq, linear_sq, scale_sq
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# As they are called in machine code: Blackwell's, Hopper's, Ampere's for float64, Ampere's.
MATRIX_INSTRUCTIONS = ("UTCHMMA", "HGMMA", "DMMA", "HMMA")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class StandInDriver:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def outputs(*parameter: int, N: int) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.ones(N),
        "total": torch.empty(parameter),
        "sqnorm": torch.empty(N),
        "flag": torch.zeros(1, dtype=torch.int32),
    }


def linear(dtype: torch.dtype, N: int, T: int, I: int, O: int, *, acc: torch.dtype = FP32, every: bool = False) -> None:
    more = outputs(O, I, N=N) if every else {}
    linear_sq.linear_sq_(
        torch.empty(O, I, dtype=acc), torch.empty(N, T, I, dtype=dtype), torch.empty(N, T, O, dtype=dtype), **more
    )


def tf32_linear(*arguments: int) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    linear(FP32, *arguments)
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def ragged_linear(dtype: torch.dtype, N: int, M: int, I: int, O: int) -> None:
    offsets = torch.linspace(0, M, N + 1).long()
    x, g = torch.empty(M, I, dtype=dtype), torch.empty(M, O, dtype=dtype)
    linear_sq.linear_sq_(torch.empty(O, I), x, g, offsets=offsets, **outputs(O, I, N=N))


def scale(dtype: torch.dtype, N: int, T: int, D: int) -> None:
    scale_sq.scale_sq_(torch.empty(D), torch.empty(N, T, D, dtype=dtype), torch.empty(N, T, D, dtype=dtype), **outputs(D, N=N))


def embedding(dtype: torch.dtype, N: int, T: int, V: int, D: int) -> None:
    ids = torch.zeros(N, T, dtype=torch.int64)
    embedding_sq.embedding_sq_(torch.empty(V, D), ids, torch.empty(N, T, D, dtype=dtype), **outputs(V, D, N=N))


def calls() -> dict[str, Callable[[], None]]:
    """Calls as a decoder layer makes them, in each input dtype, and the shapes that take another path."""
    cases = {}
    for name, dtype in {"bf16": BF16, "fp16": FP16, "fp32": FP32, "fp64": FP64}.items():
        cases[f"linear_sq {name} T=512"] = partial(linear, dtype, 8, 512, 4096, 4096)
        cases[f"linear_sq {name} T=1 every output"] = partial(linear, dtype, 256, 1, 4096, 4096, every=True)
        cases[f"scale_sq {name} T=512"] = partial(scale, dtype, 8, 512, 4096)
        cases[f"embedding_sq {name}"] = partial(embedding, dtype, 8, 512, 1000, 4096)
    for name, dtype in {"bf16": BF16, "fp32": FP32, "fp64": FP64}.items():
        cases[f"linear_sq {name} T=512 every output"] = partial(linear, dtype, 8, 512, 4096, 4096, every=True)
    cases["linear_sq bf16 T=512 acc fp64"] = partial(linear, BF16, 8, 512, 4096, 4096, acc=FP64)
    cases["linear_sq fp32 T=512 tf32 allowed"] = partial(tf32_linear, 8, 512, 4096, 4096)
    cases["linear_sq bf16 ragged every output"] = partial(ragged_linear, BF16, 8, 500, 1024, 4096)
    cases["linear_sq bf16 T=1"] = partial(linear, BF16, 256, 1, 1024, 1024)
    cases["linear_sq bf16 small every output"] = partial(linear, BF16, 3, 5, 7, 11, every=True)
    cases["scale_sq fp32 T=1"] = partial(scale, FP32, 4096, 1, 1024)
    return cases


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def describe(kernel) -> dict:
    """Registers, local memory and matrix instructions, read from the machine code itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        code = tool("nvdisasm", "--print-code", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", code, re.MULTILINE)
    return {
        "kernel": kernel.metadata.name,
        "registers": numbers["REG"],
        "local_bytes": numbers["STACK"] + numbers["LOCAL"],
        "local_accesses": sum(opcode in ("LDL", "STL") for opcode in opcodes),
        "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "matrix": [name for name in MATRIX_INSTRUCTIONS if name in opcodes],
        "opcodes": len(opcodes),
    }


def main(capability: int) -> list[dict]:
    driver.set_active(StandInDriver(capability))
    launch, compiled = JITFunction.run, []

    def compile_only(self, *args, **kwargs):
        compiled.append(launch(self, *args, **{**kwargs, "warmup": True}))

    JITFunction.run = compile_only
    rows = {}
    for label, call in calls().items():
        compiled.clear()
        call()
        for kernel in compiled:
            rows[label, kernel.hash] = {"call": label, "target": f"sm_{capability}", **describe(kernel)}
    return list(rows.values())


if __name__ == "__main__":
    json.dump(main(int(sys.argv[1])), sys.stdout)
