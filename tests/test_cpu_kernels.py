# SPDX-License-Identifier: Apache-2.0
"""Every instruction set that this processor has gives results inside the numerical gate, whatever the number of threads."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from gate import error, passes

import fisherfast as ff
import fisherfast._C

SHAPES = [(7, 5, 3, 11), (3, 1, 13, 17), (5, 131, 53, 101), (67, 1, 97, 61), (2, 300, 49, 8)]


def run(x, g, threads=2):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        acc = torch.zeros(g.shape[-1], x.shape[-1])
        with ff.backend("cpu"):
            ff.ops.linear_sq_(acc, x, g)
        return acc
    finally:
        torch.set_num_threads(before)


def assert_gate(value, plain, exact):
    assert passes(error(value, exact), error(plain, exact))


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_sq_matches_float64(isa, shape):
    N, T, I, O = shape
    x, g = torch.randn(N, T, I), torch.randn(N, T, O)
    exact = torch.einsum("nto,nti->noi", g.double(), x.double()).square().sum(0)
    assert_gate(run(x, g), torch.einsum("nto,nti->noi", g, x).square().sum(0), exact)


def test_linear_sq_of_many_samples_matches_float64(isa):
    """The accumulator gets few of the sums of many blocks, each of few."""
    x, g = torch.randn(60_000, 1, 10), torch.randn(60_000, 1, 3)
    exact = torch.einsum("nto,nti->noi", g.double(), x.double()).square().sum(0)
    assert_gate(run(x, g), torch.einsum("nto,nti->noi", g, x).square().sum(0), exact)


@pytest.mark.parametrize("M", [38_913, 65_537, 98_500])  # so that of 19, 32 and 32 shares of the rows the last are empty
def test_gram_of_rows_that_do_not_fill_all_shares_matches_float64(isa, M):
    acc, x = torch.zeros(9, 9), torch.randn(M, 9)
    with ff.backend("cpu"):
        ff.ops.gram_(acc, x)
    assert_gate(acc.triu(), (x.mT @ x).triu(), (x.double().mT @ x.double()).triu())


def test_linear_sq_repeats_bit_by_bit(isa):
    x, g = torch.randn(13, 7, 19), torch.randn(13, 7, 23)
    assert torch.equal(run(x, g), run(x, g))


@pytest.mark.parametrize("threads", [1, 3])
def test_linear_sq_within_the_gate_for_any_number_of_threads(isa, threads):
    x, g = torch.randn(5, 37, 211), torch.randn(5, 37, 307)
    exact = torch.einsum("nto,nti->noi", g.double(), x.double()).square().sum(0)
    assert_gate(run(x, g, threads), torch.einsum("nto,nti->noi", g, x).square().sum(0), exact)


@pytest.mark.parametrize(
    ("N", "C", "O", "S", "groups"),
    [(3, 5, 7, (6, 5), 1), (2, 35, 19, (9, 11), 1), (2, 24, 24, (5, 6), 2), (5, 37, 37, (7, 9), 37), (2, 40, 20, (8, 8), 20)],
)
def test_conv_sq_matches_float64_and_does_not_depend_on_the_number_of_threads(isa, N, C, O, S, groups):
    x, g = torch.randn(N, C, *S), torch.randn(N, O, *S)
    patches = torch.nn.functional.unfold(x.double(), 3, padding=1).unflatten(1, (groups, C // groups, 9)).to(x.dtype)
    rows = g.flatten(2).unflatten(1, (groups, O // groups))
    exact, plain = (
        torch.einsum("ngop,ngckp->ngock", rows.to(dtype), patches.to(dtype)).square().sum(0).reshape(O, C // groups, 3, 3)
        for dtype in (torch.float64, torch.float32)
    )

    def outputs(threads):
        acc, total, sqnorm = torch.zeros(exact.shape), torch.zeros(exact.shape), torch.zeros(N)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with ff.backend("cpu"):
                ff.ops.conv_sq_(acc, x, g, total=total, sqnorm=sqnorm, padding=(1, 1), groups=groups)
        finally:
            torch.set_num_threads(before)
        return acc, total, sqnorm

    one, three = outputs(1), outputs(3)
    assert_gate(one[0], plain, exact)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_scale_sq_and_embedding_sq_match_float64(isa):
    g, ids = torch.randn(13, 7, 23), torch.randint(0, 5, (13, 7))
    one_hot = torch.nn.functional.one_hot(ids, 5)
    scale, table = torch.zeros(23), torch.zeros(5, 23)
    with ff.backend("cpu"):
        ff.ops.scale_sq_(scale, None, g)
        ff.ops.embedding_sq_(table, ids, g)
    assert_gate(scale, g.sum(1).square().sum(0), g.double().sum(1).square().sum(0))
    plain, exact = (torch.einsum("ntv,ntd->nvd", one_hot.to(h.dtype), h).square().sum(0) for h in (g, g.double()))
    assert_gate(table, plain, exact)


@pytest.mark.parametrize("T", [1, 15, 16, 49])
@pytest.mark.parametrize("has_x", [False, True])
def test_scale_sq_of_channels_first_matches_float64(isa, T, has_x):
    g, x = (torch.randn(13, 71, T).transpose(1, 2) for _ in range(2))
    product = g.double() * x.double() if has_x else g.double()
    scale = torch.zeros(71)
    with ff.backend("cpu"):
        ff.ops.scale_sq_(scale, x if has_x else None, g)
    assert_gate(scale, product.float().sum(1).square().sum(0), product.sum(1).square().sum(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_sq_does_not_depend_on_the_number_of_threads(isa, shape):
    N, T, I, O = shape
    x, g = torch.randn(N, T, I), torch.randn(N, T, O)

    def outputs(threads):
        acc, total, sqnorm = torch.zeros(O, I), torch.zeros(O, I), torch.zeros(N)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with ff.backend("cpu"):
                ff.ops.linear_sq_(acc, x, g, total=total, sqnorm=sqnorm)
        finally:
            torch.set_num_threads(before)
        return acc, total, sqnorm

    for one, three in zip(outputs(1), outputs(3), strict=True):
        assert torch.equal(one, three)


def test_the_blas_is_used_on_intel_processors_with_avx512():
    isa, vendor = torch.ops.fisherfast_cpp.cpu_isa(None), platform.processor()
    if platform.system() == "Linux":
        vendor = Path("/proc/cpuinfo").read_text()
    assert torch.ops.fisherfast_cpp.cpu_blas(None) == ("GenuineIntel" in vendor and isa in ("avx512", "amx"))


@pytest.fixture(params=[False, True], ids=["tiles", "blas"])
def blas(request):
    """Force the BLAS, or our own tiles, for products over samples; whether results repeat with any number of threads.

    MKL's for AMD, which is never chosen, adds up in another order inside a region of several threads.
    """
    force = torch.ops.fisherfast_cpp.cpu_blas
    before = force(None)
    try:
        possible = force(request.param) == request.param
    except ValueError:
        possible = False
    if not possible:
        pytest.skip("no BLAS that can be called here, or no AVX-512")
    yield before or not request.param
    force(before)


@pytest.mark.parametrize("precision", ["highest", "medium"])  # the latter lets torch's own products round to bfloat16
@pytest.mark.parametrize(
    ("N", "I", "O"), [(3, 13, 17), (64, 512, 512), (64, 600, 300), (130, 63, 70), (256, 3, 244), (256, 520, 10), (700, 300, 57)]
)
def test_linear_sq_of_single_positions_by_tiles_and_by_the_blas(blas, precision, N, I, O):
    x, g, weight = torch.randn(N, 1, 2 * I)[..., ::2], torch.randn(1, N, O).transpose(0, 1), torch.rand(N)

    def outputs(threads):
        acc, total, sqnorm = torch.zeros(O, I), torch.zeros(O, I), torch.zeros(N)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        try:
            with ff.backend("cpu"):
                ff.ops.linear_sq_(acc, x, g, 0.5, weight=weight, total=total, sqnorm=sqnorm)
        finally:
            torch.set_float32_matmul_precision("highest")
            torch.set_num_threads(before)
        return acc, total, sqnorm

    one, three = outputs(1), outputs(3)
    assert not blas or all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    plain, exact = (torch.einsum("nto,nti->noi", g.to(dtype), x.to(dtype)) for dtype in (torch.float32, torch.float64))
    w = weight.view(-1, 1, 1)
    assert_gate(one[0], (0.5 * w * plain.square()).sum(0), (0.5 * w.double() * exact.square()).sum(0))
    assert_gate(one[1], (w * plain).sum(0), (w.double() * exact).sum(0))
    assert_gate(one[2], plain.square().sum((1, 2)), exact.square().sum((1, 2)))


def instructions(tool, function):
    """The instructions of every function of the extension whose demangled name holds ``function``."""
    command = [tool, "--disassemble", "--demangle", "--no-show-raw-insn", fisherfast._C.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    blocks = re.findall(r"^[0-9a-f]+ <([^\n]*)>:\n(.*?)(?:\n\n|\Z)", listing, re.M | re.S)
    return [block.splitlines() for name, block in blocks if function in name and "@plt" not in name]


@pytest.mark.parametrize("real", ["float", "double"])
@pytest.mark.parametrize("kernel", ["micro_kernel", "sym_chain"])
def test_avx512_accumulators_stay_in_registers(kernel, real):
    # A spilled accumulator shows as a zmm instruction that addresses the stack: it halves the speed and fails nothing else.
    tool = shutil.which("objdump")
    if tool is None:
        pytest.skip("objdump (binutils) is not installed, so the machine code cannot be read")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"AVX-512 is of x86-64, this is {platform.machine()}")
    (body,) = instructions(tool, f"avx512::{kernel}<{real}, 3>")
    assert sum("vfmadd" in line and "zmm" in line for line in body) >= 24
    assert not [line for line in body if "zmm" in line and re.search(r"%r[sb]p\b", line)]


def test_a_number_of_samples_that_the_data_decide_compiles():
    acc, x, g = torch.zeros(3, 5), torch.randn(10, 5), torch.randn(10, 3)

    def squares(acc, owners):
        _, counts = torch.unique_consecutive(owners, return_counts=True)
        ff.ops.linear_sq_(acc, x, g, offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    owners = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 5])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.compile(squares, fullgraph=True, backend="eager")(acc, owners)
    exact = sum((g[owners == n].mT @ x[owners == n]).square() for n in owners.unique())
    torch.testing.assert_close(acc, exact, rtol=1e-5, atol=1e-5)
