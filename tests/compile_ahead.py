# SPDX-License-Identifier: Apache-2.0
"""Compile, without a GPU, the Triton kernels that the launchers would start; print what the machine code holds, as JSON.

``python compile_ahead.py 90`` compiles for sm_90. A stand-in driver names the target and every launch becomes a
compilation, so the block sizes, the dtypes and the specialisations are those of real calls. Run by test_triton_aot.py in
a process of its own, since Triton's interpreter must be off and the stand-in driver stays.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fisherfast.kernels import embedding_sq, linear_sq, scale_sq

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# In SASS, by generation: Ampere's warp-wide, Hopper's warpgroup-wide, Blackwell's tensor-memory instructions; fp64; plain FMA.
MATRIX_INSTRUCTIONS = ("UTCHMMA", "UTCQMMA", "HGMMA", "DMMA", "HMMA")


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


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def describe(kernel) -> dict:
    """Registers, local memory and matrix instructions, from the machine code itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        code = tool("nvdisasm", "--print-code", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = set(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", code, re.MULTILINE))
    return {
        "kernel": kernel.metadata.name,
        "registers": numbers["REG"],
        "stack": numbers["STACK"] + numbers["LOCAL"],
        "spills": sum(op in ("LDL", "STL") for op in opcodes),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "matrix": [m for m in MATRIX_INSTRUCTIONS if m in opcodes],
    }


def calls() -> list[tuple[str, callable]]:
    """Representative calls: real shapes of a decoder layer, ragged rows, a single row a sample, and small shapes."""

    def outputs(*parameter: int, N: int, dtype=torch.float32) -> dict:
        return {"total": torch.empty(parameter, dtype=dtype), "sqnorm": torch.empty(N, dtype=dtype), "flag": torch.zeros(1, dtype=torch.int32)}

    cases = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")

        def values(*shape: int, dtype=dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype)

        def linear(label, N, T, I, O, *, acc=torch.float32, values=values, name=name, **keywords):
            g, x = (values(N, T, O), values(N, T, I)) if T else (values(64, O), values(64, I))
            if not T:
                keywords["offsets"] = torch.tensor([0, *[64] * N])
            call = lambda: linear_sq.linear_sq_(torch.empty(O, I, dtype=acc), x, g, 0.5, **keywords)
            cases.append((f"linear_sq {label} {name}", call))

        linear("T=512", 8, 512, 4096, 4096)
        linear("T=512 all outputs", 8, 512, 4096, 4096, weight=torch.ones(8), **outputs(4096, 4096, N=8))
        linear("T=512 acc fp64", 8, 512, 4096, 4096, acc=torch.float64)
        linear("ragged all outputs", 8, 0, 1024, 4096, **outputs(4096, 1024, N=8))
        linear("T=1", 256, 1, 1024, 1024)
        linear("T=1 all outputs", 256, 1, 4096, 4096, weight=torch.ones(256), **outputs(4096, 4096, N=256))
        linear("small", 3, 5, 7, 11, **outputs(11, 7, N=3))

        def scale(label, N, T, D, values=values, name=name):
            call = lambda: scale_sq.scale_sq_(torch.empty(D), values(N, T, D), values(N, T, D), weight=torch.ones(N), **outputs(D, N=N))
            cases.append((f"scale_sq {label} {name}", call))

        scale("T=512", 8, 512, 4096)
        scale("T=1", 4096, 1, 1024)

        def embedding(values=values, name=name):
            ids = torch.zeros(8, 512, dtype=torch.int64)
            acc, g = torch.empty(1000, 4096), values(8, 512, 4096)
            call = lambda: embedding_sq.embedding_sq_(acc, ids, g, weight=torch.ones(8), **outputs(1000, 4096, N=8))
            cases.append((f"embedding_sq {name}", call))

        embedding()
    return cases


def main(capability: int) -> list[dict]:
    driver.set_active(StandInDriver(capability))
    launch, compiled = JITFunction.run, []

    def compile_instead(self, *args, **kwargs):
        compiled.append(launch(self, *args, **{**kwargs, "warmup": True}))

    JITFunction.run = compile_instead
    rows = []
    for label, call in calls():
        compiled.clear()
        call()
        rows += [{"call": label, "target": f"sm_{capability}", **describe(kernel)} for kernel in compiled]
    return rows


if __name__ == "__main__":
    json.dump(main(int(sys.argv[1])), sys.stdout)
