# SPDX-License-Identifier: Apache-2.0
"""Compile the CUDA C++ kernels without a GPU, and read what the compiler and the disassembler say of each.

Shared by ``test_cuda_compile.py`` and the static report (``bench/gpu/static.py``).
"""

import ast
import re
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import machine_code

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a", "100")


class Kernel(NamedTuple):
    """What ptxas reports of one kernel."""

    name: str
    arch: str
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int
    shared: int  # static; the tensor core kernel asks for its dynamic part at launch


REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:, used \d+ barriers)?(?:, (?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def readable(symbol: str) -> str:
    """The kernel's name and, still mangled, its template arguments."""
    return re.sub(r"^_ZN.*\d([a-z_]+_kernel)(?:I(.*?)EEvN.*|EN.*)$", r"\1 \2", symbol).strip()


def setup_flags() -> list[str]:
    """The nvcc flags of setup.py, read without running it."""
    names = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id in ("STABLE_ABI", "NVCC", "SM90A"):
            exec(compile(ast.Module([node], []), "setup.py", "exec"), names)
    return [*names["NVCC"], names["SM90A"]]


def compiler_flags(architectures: Sequence[str]) -> list[str]:
    """What nvcc is given for every file: setup.py's flags, torch's, the architectures, the folders of headers."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    includes = [f"-I{path}" for path in (str(ROOT / "csrc"), *include_paths("cpu"))]
    return [*setup_flags(), *COMMON_NVCC_FLAGS, "--compiler-options", "-fPIC", "-Xptxas", "-v", *targets, *includes]


def compile_file(source: Path, folder: Path, flags: Sequence[str]) -> tuple[Path, str]:
    """The object file and what the compiler said."""
    target = folder / f"{source.stem}.o"
    run = subprocess.run(["nvcc", "-c", str(source), "-o", str(target), *flags], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return target, run.stderr


def compile_all(folder: Path, architectures: Sequence[str] = ARCHITECTURES) -> dict[str, tuple[Path, str]]:
    """``{file name: (object file, what the compiler said)}``, two files at a time."""
    flags = compiler_flags(architectures)  # before the threads: Python 3.11 may fail when two parse at once
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda source: compile_file(source, folder, flags), SOURCES)
    return dict(zip((source.name for source in SOURCES), results, strict=True))


def kernels(compiled: dict[str, tuple[Path, str]]) -> list[Kernel]:
    """Every kernel of every file and architecture."""
    found = []
    for _, report in compiled.values():
        for m in REPORT.finditer(report):
            numbers = (int(m[field] or 0) for field in ("stack", "stores", "loads", "registers", "shared"))
            found.append(Kernel(readable(m["name"]), m["arch"], *numbers))
    return found


def listings_of(objects: Iterable[Path], architectures: Sequence[str] = ARCHITECTURES) -> dict[tuple[str, str], str]:
    """``{(arch, kernel): machine code}``."""
    code = {}
    for target in objects:
        for arch in architectures:
            listing = machine_code.tool("cuobjdump", "-arch", f"sm_{arch}", "-sass", target)
            for function in listing.split("Function : ")[1:]:
                code[arch, readable(function.split(maxsplit=1)[0])] = function
    return code


def threads_of(objects: Iterable[Path]) -> dict[tuple[str, str], int]:
    """``{(arch, kernel): threads of a block at most}``, as its launch bounds say."""
    found = {}
    for target in objects:
        for arch in ARCHITECTURES:
            listing = machine_code.tool("cuobjdump", "-arch", f"sm_{arch}", "-elf", target)
            for section in re.split(r"^\.nv\.info\.", listing, flags=re.MULTILINE)[1:]:
                bound = re.search(r"EIATTR_MAX_THREADS.*?Value:\s*0x([0-9a-f]+)", section, re.DOTALL)
                if bound:
                    found[arch, readable(section.split(maxsplit=1)[0])] = int(bound[1], 16)
    return found
