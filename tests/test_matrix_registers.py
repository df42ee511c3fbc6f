# SPDX-License-Identifier: Apache-2.0
"""The tiles that AMX multiplies: float32 in three bfloat16 parts, rows of samples in steps of 32, edges, chains and layouts.

On a processor with AMX the library itself is tested, on others the same sources compiled with emulated registers.
"""

import re
import shutil
import subprocess
from itertools import pairwise

import pytest
import torch
from emulated import ROOT
from gate import error, passes
from torch.utils.cpp_extension import include_paths, library_paths

import fisherfast._C

SOURCES = ("blas", "conv_direct", "conv_geometry", "conv_sq", "cpu", "finite", "gram", "isa", "linear_sq", "tile")
FLAGS = (
    "-O1",
    "-ftree-loop-vectorize",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-ffp-contract=fast",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    """The native ops, with matrix registers of the processor or emulated ones."""
    best = torch.ops.fisherfast_cpp.cpu_isa(None)
    if best == "amx":
        return torch.ops.fisherfast_cpp
    if best != "avx512":
        pytest.skip(f"this processor has {best}: the code around the matrix registers is AVX-512's")
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on the PATH: the emulation cannot be compiled")
    folder = tmp_path_factory.mktemp("amx")
    includes = [f"-I{path}" for path in (ROOT / "csrc", ROOT / "tests" / "amx_on_cpu", *include_paths("cpu"))]
    # A library of ops of its own, beside the real one.
    names = ["-DFISHERFAST_EMULATED_AMX", "-Dfisherfast_cpp=fisherfast_amx", "-Dfisherfast=fisherfast_emulated"]
    sources = [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in SOURCES]
    torch_libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", *FLAGS, *names, *includes, *sources, "-o", folder / "amx.so", *torch_libraries], check=True)
    torch.ops.load_library(folder / "amx.so")
    return torch.ops.fisherfast_amx


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def assert_gate(value, plain, exact):
    assert value.isfinite().all()
    assert passes(error(value, exact), error(plain, exact))


def gradients(x, g, dtype):
    return torch.einsum("nto,nti->noi", g.to(dtype), x.to(dtype))


def assert_sums(ops, x, g, samples=None, weight=None, offsets=None):
    """acc, total and sqnorm of ``linear_sq_`` against float64; ``samples``: x and g of every one, if they differ from [N, T, .]."""
    samples = samples or [(x[n], g[n]) for n in range(len(x))]
    N, O, I = len(samples), g.shape[-1], x.shape[-1]
    acc, total, sqnorm = torch.full((O, I), 0.25), torch.full((O, I), -0.5), torch.ones(N)
    ops.linear_sq_(acc, x, g, 0.5, weight=weight, offsets=offsets, total=total, sqnorm=sqnorm)
    w = (torch.ones(N) if weight is None else weight)[:, None, None]
    plain, exact = (torch.cat([gradients(a[None], b[None], d) for a, b in samples]) for d in (torch.float32, torch.float64))
    assert_gate(acc - 0.25, (0.5 * w * plain.square()).sum(0), (0.5 * w.double() * exact.square()).sum(0))
    assert_gate(total + 0.5, (w * plain).sum(0), (w.double() * exact).sum(0))
    assert_gate(sqnorm - 1, plain.square().sum((1, 2)), exact.square().sum((1, 2)))
    alone = torch.zeros(O, I)
    ops.linear_sq_(alone, x, g, 0.5, weight=weight, offsets=offsets)
    assert_gate(alone, (0.5 * w * plain.square()).sum(0), (0.5 * w.double() * exact.square()).sum(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "T", "I", "O"),
    [
        (3, 32, 128, 128),  # whole steps and panels
        (5, 27, 113, 131),  # a step that is not full, panels with more than half of their columns
        (37, 31, 139, 103),  # many samples in a block of rows, several blocks
        (2, 300, 107, 151),  # a sample in parts
        (1, 129, 600, 97),  # two tiles across, a last part of one row
    ],
)
def test_linear_sq_matches_float64(ops, dtype, N, T, I, O):
    x, g, weight = torch.randn(N, T, I).to(dtype), torch.randn(N, T, O).to(dtype), torch.rand(N)
    assert_sums(ops, x, g)
    assert_sums(ops, x, g, weight=weight)


def test_linear_sq_of_samples_of_different_length(ops):
    lengths = [40, 0, 1, 129, 33, 64, 0, 95]
    x, g = torch.randn(sum(lengths), 127), torch.randn(sum(lengths), 113)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    assert_sums(ops, x, g, list(zip(x.split(lengths), g.split(lengths), strict=True)), torch.rand(len(lengths)), offsets)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_sq_of_any_layout(ops, dtype):
    layouts = {
        "columns apart": lambda M: torch.randn(4, 45, 2 * M).to(dtype)[..., ::2],
        "rows of another tensor": lambda M: torch.randn(4, 45, M + 3).to(dtype)[..., 1 : M + 1],
        "positions first": lambda M: torch.randn(45, 4, M).to(dtype).transpose(0, 1),
        "channels first": lambda M: torch.randn(4, M, 45).to(dtype).transpose(1, 2),
        "one row again and again": lambda M: torch.randn(4, 1, M).to(dtype).expand(4, 45, M),
    }
    for layout in layouts.values():
        assert_sums(ops, layout(119), layout(128))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [31, 130, 700])
def test_linear_sq_of_single_positions(ops, dtype, N):
    x, g = torch.randn(N, 1, 127).to(dtype), torch.randn(N, 1, 163).to(dtype)
    assert_sums(ops, x, g, weight=torch.rand(N))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "D", "bias", "weighted"), [(100, 128, 0, 0), (517, 163, 1, 0), (517, 160, 1, 1), (4500, 127, 0, 1), (64, 127, 1, 0)]
)
def test_gram_matches_float64(ops, dtype, M, D, bias, weighted):
    x, w = torch.randn(M, D).to(dtype), torch.rand(M)
    acc = torch.zeros(D + bias, D + bias)
    ops.gram_(acc, x, 0.5, weight=w if weighted else None, bias=bool(bias))
    rows = torch.cat([x.float(), torch.ones(M, bias)], 1)
    left = rows * w[:, None] if weighted else rows
    plain, exact = 0.5 * (left.T @ rows), 0.5 * (left.double().T @ rows.double())
    assert_gate(acc.triu(), plain.triu(), exact.triu())
    assert torch.equal(acc.tril(-1), torch.zeros_like(acc))


def test_gram_of_samples_that_do_not_follow_each_other(ops):
    x = torch.randn(37, 5, 131).transpose(0, 1)[:, :29]
    acc, rows = torch.zeros(131, 131), x.reshape(-1, 131)
    ops.gram_(acc, x)
    assert_gate(acc.triu(), (rows.T @ rows).triu(), (rows.double().T @ rows.double()).triu())


def assert_conv(ops, x, g, groups, padding, stride, offsets=None):
    """acc, total and sqnorm of ``conv_sq_`` with a kernel of 3 x 3 against float64."""
    bounds = range(len(x) + 1) if offsets is None else offsets.tolist()
    (N, C), O, options = x.shape[:2], g.shape[1], {"padding": padding, "stride": stride}
    patches = torch.nn.functional.unfold(x.double(), 3, **options).view(N, groups, C // groups, 9, -1)
    rows = g.double().reshape(N, groups, O // groups, -1)

    def gradients(dtype):
        of_samples = [(rows[a:b].to(dtype), patches[a:b].to(dtype)) for a, b in pairwise(bounds)]
        return torch.stack([torch.einsum("ngop,ngckp->gock", *one).reshape(O, C // groups, 3, 3) for one in of_samples])

    plain, exact = gradients(torch.float32), gradients(torch.float64)
    acc, total, sqnorm = torch.zeros(exact.shape[1:]), torch.zeros(exact.shape[1:]), torch.zeros(len(exact))
    ops.conv_sq_(acc, x, g, 1.0, offsets=offsets, total=total, sqnorm=sqnorm, groups=groups, **options)
    assert_gate(acc, plain.square().sum(0), exact.square().sum(0))
    assert_gate(total, plain.sum(0), exact.sum(0))
    assert_gate(sqnorm, plain.square().sum((1, 2, 3, 4)), exact.square().sum((1, 2, 3, 4)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "C", "O", "S", "groups", "stride"),
    [
        (3, 51, 181, (7, 9), 1, 1),
        (2, 104, 362, (8, 8), 2, 1),  # channels that are not whole vectors
        (40, 24, 190, (5, 5), 1, 1),
        (3, 48, 141, (7, 10), 1, 1),  # images of pairs: a last panel of one vector
        (2, 96, 302, (8, 8), 2, 1),
        (37, 32, 160, (4, 8), 1, 1),  # several samples in a block
        (2, 32, 163, (16, 16), 1, 2),  # pairs of pixels that are not neighbours
        (2, 16, 340, (30, 20), 1, 1),  # a sample in parts
    ],
)
def test_conv_sq_matches_float64(ops, dtype, N, C, O, S, groups, stride):
    x = torch.randn(N, C, *S).to(dtype)
    g = torch.randn(N, O, *((size - 1) // stride + 1 for size in S)).to(dtype)
    assert_conv(ops, x, g, groups, [1, 1], [stride, stride])
    channels_last = torch.channels_last
    assert_conv(ops, x.to(memory_format=channels_last), g.to(memory_format=channels_last), groups, [1, 1], [stride, stride])


@pytest.mark.parametrize("dtype", DTYPES)
def test_conv_sq_of_several_images_a_sample(ops, dtype):
    offsets = torch.tensor([0, 3, 3, 4, 9])
    x, g = torch.randn(9, 32, 6, 8).to(dtype), torch.randn(9, 160, 4, 6).to(dtype)
    assert_conv(ops, x, g, 1, [0, 0], [1, 1], offsets)


def test_sums_depend_neither_on_threads_nor_on_the_run(ops):
    x, g = torch.randn(6, 150, 331), torch.randn(6, 150, 547)

    def outputs(threads):
        torch.set_num_threads(threads)
        acc, total, sqnorm, gram = torch.zeros(547, 331), torch.zeros(547, 331), torch.zeros(6), torch.zeros(331, 331)
        ops.linear_sq_(acc, x, g, total=total, sqnorm=sqnorm)
        ops.gram_(gram, x)
        return acc, total, gram

    assert all(torch.equal(a, b) for a, b in zip(outputs(1), outputs(1), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(outputs(1), outputs(3), strict=True))


def test_a_float_is_its_three_parts(ops):
    # 24 bits that differ: products with a single one show every bit of the input.
    x = (torch.rand(1, 33, 128) + 1) * torch.tensor([1e-20, 1.0, -3e18, 1e-3]).repeat(32)
    g = torch.zeros(1, 33, 128)
    g[0, 5] = 1
    total = torch.zeros(128, 128)
    ops.linear_sq_(torch.zeros(128, 128), x, g, total=total)
    assert torch.equal(total, x[0, 5].expand(128, 128))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(ops, value):
    x, g, acc = torch.randn(2, 40, 128), torch.randn(2, 40, 128), torch.zeros(128, 128)
    x[1, 3, 17] = value
    ops.linear_sq_(acc, x, g)
    assert not acc[:, 17].isfinite().any()
    assert acc[:, :17].isfinite().all() and acc[:, 18:].isfinite().all()


def test_the_shapes_above_go_to_the_matrix_registers(ops):
    # They round otherwise than the vector code, which smaller gradients are left to.
    def differs(N, T, I, O, dtype=torch.float32):
        x, g = torch.randn(N, T, I).to(dtype), torch.randn(N, T, O).to(dtype)
        results = []
        for isa in ("amx", "avx512"):
            ops.cpu_isa(isa)
            results.append(torch.zeros(O, I))
            ops.linear_sq_(results[-1], x, g)
        ops.cpu_isa("amx")
        return not torch.equal(*results)

    large = [(3, 32, 128, 128), (5, 27, 113, 131), (2, 300, 107, 151), (60, 1, 127, 163, torch.bfloat16), (130, 1, 127, 163)]
    small = [(3, 32, 64, 64), (5, 17, 512, 512), (9, 33, 300, 300)]
    if ops.cpu_blas(None):
        small.append((60, 1, 127, 163))
    assert all(differs(*shape) for shape in large) and not any(differs(*shape) for shape in small)


def test_the_instructions_are_in_the_machine_code():
    tool = shutil.which("objdump")
    if tool is None:
        pytest.skip("objdump (binutils) is not installed, so the machine code cannot be read")
    listing = subprocess.run([tool, "--disassemble", fisherfast._C.__file__], capture_output=True, text=True, check=True).stdout
    if "zmm" not in listing:
        pytest.skip("not built for x86-64")

    def count(name):
        return len(re.findall(rf"\t{name}\b", listing))

    assert count("tdpbf16ps") >= 3 * 4 and count("tilerelease") >= count("ldtilecfg") >= 3
