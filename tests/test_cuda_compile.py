# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ kernels compile for sm_80, sm_90a and sm_100, and the machine code is what they promise: no GPU is needed to read it."""

import ast
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a", "100")

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH: no CUDA kernel can be compiled")


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


def compile_file(source: Path, folder: Path) -> tuple[Path, str]:
    target = folder / f"{source.stem}.o"
    includes = [f"-I{path}" for path in (str(ROOT / "csrc"), *include_paths("cpu"))]
    architectures = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    flags = [*setup_flags(), *COMMON_NVCC_FLAGS, "--compiler-options", "-fPIC", "-Xptxas", "-v", *architectures]
    run = subprocess.run(["nvcc", "-c", str(source), "-o", str(target), *flags, *includes], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return target, run.stderr


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """``{file name: (object file, what the compiler said)}``, two files at a time."""
    folder = tmp_path_factory.mktemp("cuda")
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda source: compile_file(source, folder), SOURCES)
    return dict(zip((source.name for source in SOURCES), results, strict=True))


@pytest.fixture(scope="session")
def kernels(compiled):
    found = []
    for _, report in compiled.values():
        for m in REPORT.finditer(report):
            numbers = (int(m[field] or 0) for field in ("stack", "stores", "loads", "registers", "shared"))
            found.append(Kernel(readable(m["name"]), m["arch"], *numbers))
    return found


@pytest.fixture(scope="session")
def listings(compiled):
    """``{(arch, kernel): machine code}`` as the disassembler of Triton's package reads it."""
    triton = pytest.importorskip("triton", reason="Triton's package carries the disassembler")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    code: dict[tuple[str, str], str] = {}
    for target, _ in compiled.values():
        for arch in ARCHITECTURES:
            command = [tool, "-arch", f"sm_{arch}", "-sass", target]
            listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for function in listing.split("Function : ")[1:]:
                code[arch, readable(function.split(maxsplit=1)[0])] = function
    return code


@pytest.fixture(scope="session")
def machine_code(listings):
    """``{(arch, kernel): set of opcodes}``."""
    opcode = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.x]+)", re.MULTILINE)
    return {kernel: set(opcode.findall(listing)) for kernel, listing in listings.items()}


def opcodes_of(machine_code, arch, *parts):
    chosen = [opcodes for (a, name), opcodes in machine_code.items() if a == arch and all(part in name for part in parts)]
    assert chosen, f"no kernel of sm_{arch} is named {parts}"
    return chosen


def test_compiles_without_warnings(compiled):
    for name, (_, report) in compiled.items():
        assert "warning" not in report, f"{name}: {report}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_spills_and_no_stack(kernels, arch):
    mine = [k for k in kernels if k.arch == arch]
    print(f"\nsm_{arch}: registers, static shared bytes, kernel")
    for k in mine:
        print(f"{k.registers:4d} {k.shared:6d}  {k.name}")
    assert {k.name.split()[0] for k in mine} >= {
        "linear_sq_mma_kernel",
        "linear_sq_fma_kernel",
        "linear_sq_wgmma_kernel",
        "gram_mma_kernel",
        "gram_fma_kernel",
        "gram_wgmma_kernel",
        "runs_kernel",
        "kron_sums_kernel",
    }
    for k in mine:
        assert (k.stack, k.spill_stores, k.spill_loads) == (0, 0, 0), k


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", ["linear_sq_mma_kernel", "gram_mma_kernel"])
@pytest.mark.parametrize(("dtype", "product"), [("BFloat16", "HMMA.16816.F32.BF16"), ("Half", "HMMA.16816.F32")])
def test_16_bit_inputs_use_tensor_cores(machine_code, arch, kernel, dtype, product):
    """Products with float sums, transposed matrix loads, asynchronous 16-byte copies."""
    for opcodes in opcodes_of(machine_code, arch, kernel, dtype):
        assert product in opcodes
        assert any(code.startswith("LDSM.16.MT88.4") for code in opcodes)
        assert any(code.startswith("LDGSTS") and ".128" in code for code in opcodes)


@pytest.mark.parametrize("kernel", ["linear_sq_wgmma_kernel", "gram_wgmma_kernel"])
@pytest.mark.parametrize(("dtype", "product"), [("BFloat16", "F32.BF16"), ("Half", "F32")])
def test_hopper_multiplies_by_warpgroup_what_its_copy_engine_brings(machine_code, kernel, dtype, product):
    """Products of 64 x 128 or 64 x 192, both operands from shared memory; boxes copied to a cluster; registers moved between warpgroups."""
    for opcodes in opcodes_of(machine_code, "90a", kernel, dtype):
        assert opcodes & {f"HGMMA.64x128x16.{product}", f"HGMMA.64x192x16.{product}"}
        assert {"UTMALDG.3D", "UTMALDG.3D.MULTICAST", "USETMAXREG.DEALLOC.CTAPOOL"} <= opcodes
        assert not any(code.startswith(("HMMA", "LDSM", "LDGSTS")) for code in opcodes)


def test_nothing_waits_for_products_but_where_it_is_written(listings):
    """The compiler puts a wait of its own where it cannot follow the registers: products of two stages would never overlap."""
    for (arch, name), listing in listings.items():
        if arch == "90a" and "wgmma_kernel" in name:
            waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([01])", listing)
            assert sorted(waits) == ["0", "1"], name


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("kernel", "product"),
    [
        ("linear_sq_fma_kernel NS_9FmaTraitsIf", "FFMA"),
        ("linear_sq_fma_kernel NS_9FmaTraitsId", "DFMA"),
        ("gram_fma_kernel f", "FFMA"),
        ("gram_fma_kernel d", "DFMA"),
        ("gram_fma_kernel N3c108BFloat16", "FFMA"),
    ],
)
def test_float32_and_float64_are_not_rounded(machine_code, arch, kernel, product):
    """No tensor core, whose float32 mode keeps ten bits; shared memory is read 16 bytes at a time."""
    for opcodes in opcodes_of(machine_code, arch, kernel):
        assert product in opcodes
        assert "LDS.128" in opcodes
        assert not any(code.startswith(("HMMA", "HGMMA")) for code in opcodes)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_atomics_and_no_local_memory(machine_code, arch):
    """The order of sums is fixed, and register arrays stay in registers."""
    for opcodes in opcodes_of(machine_code, arch):
        assert not [code for code in opcodes if code.partition(".")[0] in ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "LDL", "STL")]
