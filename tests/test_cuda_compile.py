# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ kernels compile for sm_80 and sm_90a, and the machine code is what they promise: no GPU is needed to read it.

Of sm_100, which would take another minute, the stored report tells (``test_gpu_static.py``).
"""

import re
import shutil

import compile_cuda
import machine_code
import pytest

ARCHITECTURES = ("80", "90a")

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH: no CUDA kernel can be compiled")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    return compile_cuda.compile_all(tmp_path_factory.mktemp("cuda"), ARCHITECTURES)


@pytest.fixture(scope="session")
def kernels(compiled):
    return compile_cuda.kernels(compiled)


@pytest.fixture(scope="session")
def listings(compiled):
    """``{(arch, kernel): machine code}``."""
    pytest.importorskip("triton", reason="Triton's package carries the disassembler")
    return compile_cuda.listings_of((target for target, _ in compiled.values()), ARCHITECTURES)


@pytest.fixture(scope="session")
def opcodes(listings):
    """``{(arch, kernel): opcodes}``."""
    return {kernel: machine_code.opcodes(listing) for kernel, listing in listings.items()}


def opcodes_of(opcodes, arch, *parts):
    chosen = [found for (a, name), found in opcodes.items() if a == arch and all(part in name for part in parts)]
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


def test_static_and_dynamic_shared_memory_fit_together(kernels):
    """A launch without the attribute has 48 KiB of both; it is left out below ``kSurelyShared`` of dynamic memory."""
    (dynamic,) = re.findall(r"kSurelyShared = (\d+) \* 1024;", (compile_cuda.ROOT / "csrc" / "cuda" / "common.cuh").read_text())
    asking = [k for k in kernels if "mma_kernel" in k.name]  # the others' memory is all static
    assert asking and all(k.shared + int(dynamic) * 1024 <= 48 * 1024 for k in asking)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", ["linear_sq_mma_kernel", "gram_mma_kernel"])
@pytest.mark.parametrize(("dtype", "product"), [("BFloat16", "HMMA.16816.F32.BF16"), ("Half", "HMMA.16816.F32")])
def test_16_bit_inputs_use_tensor_cores(opcodes, arch, kernel, dtype, product):
    """Products with float sums, transposed matrix loads, asynchronous 16-byte copies."""
    for found in opcodes_of(opcodes, arch, kernel, dtype):
        assert product in found
        assert any(code.startswith("LDSM.16.MT88.4") for code in found)
        assert any(code.startswith("LDGSTS") and ".128" in code for code in found)


@pytest.mark.parametrize("kernel", ["linear_sq_wgmma_kernel", "gram_wgmma_kernel"])
@pytest.mark.parametrize(("dtype", "product"), [("BFloat16", "F32.BF16"), ("Half", "F32")])
def test_hopper_multiplies_by_warpgroup_what_its_copy_engine_brings(opcodes, kernel, dtype, product):
    """Products of 64 x 128 or 64 x 192, both operands from shared memory; boxes copied to a cluster; registers moved between warpgroups."""
    for found in opcodes_of(opcodes, "90a", kernel, dtype):
        assert found.keys() & {f"HGMMA.64x128x16.{product}", f"HGMMA.64x192x16.{product}"}
        assert {"UTMALDG.3D", "UTMALDG.3D.MULTICAST", "USETMAXREG.DEALLOC.CTAPOOL"} <= found.keys()
        assert not any(code.startswith(("HMMA", "LDSM", "LDGSTS")) for code in found)


def test_warpgroups_add_to_float_outputs_in_float_two_at_a_time(opcodes):
    """Conversions take four times as long as the memory that they would wait for. A tile's last sums are on nobody's way but theirs."""
    for (arch, name), found in opcodes.items():
        if arch != "90a" or "wgmma_kernel" not in name:
            continue
        width, total = re.search(r"Li(128|192)E(?:Lb([01])E)?E", name).groups()
        owned = int(width) // 2 * (2 if total == "1" else 1)  # elements of a thread
        to_float = sum(count for code, count in found.items() if code.startswith("F2F.F32.F64"))
        to_double = sum(count for code, count in found.items() if code.startswith("F2F.F64.F32"))
        pairs = sum(count for code, count in found.items() if code.startswith("STG") and ".64" in code)
        assert to_float <= 4, name  # gram's sums of features; none of an element of the tile
        assert owned <= to_double <= owned + 8, name  # for outputs of float64, and there alone
        assert pairs >= owned + owned // 2, name  # each of these is one; of float outputs a pair is


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
def test_float32_and_float64_are_not_rounded(opcodes, arch, kernel, product):
    """No tensor core, whose float32 mode keeps ten bits; shared memory is read 16 bytes at a time."""
    for found in opcodes_of(opcodes, arch, kernel):
        assert product in found
        assert "LDS.128" in found
        assert not any(code.startswith(("HMMA", "HGMMA")) for code in found)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_atomics_and_no_local_memory(opcodes, arch):
    """The order of sums is fixed, and register arrays stay in registers."""
    for found in opcodes_of(opcodes, arch):
        assert machine_code.of(found, machine_code.ATOMIC + machine_code.SHARED_ATOMIC + machine_code.LOCAL) == {}
