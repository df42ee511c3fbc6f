# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels as machine code, without a GPU: nothing spills, and the matrix units are used. And their heuristics.

``pytest -s tests/test_triton_aot.py`` prints the table.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import machine_code
import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
from fisherfast.kernels import (  # noqa: E402
    _common,
    _products,
    _squares,
    categorical_score,
    conv_gram,
    conv_sq,
    embedding_sq,
    ghost_norm,
    gram,
    kron_log1p_sum,
    linear_sq,
    log1p_sum,
    scale_sq,
)

HERE = Path(__file__).parent
TARGETS = (80, 90, 100)
# Which instruction multiplies, by target and input dtype. Blackwell's tensor memory does not do float64: plain FMA there.
MATRIX = {
    80: {"bf16": ["HMMA"], "fp16": ["HMMA"], "fp32": ["HMMA"], "fp64": ["DMMA"]},
    90: {"bf16": ["HGMMA"], "fp16": ["HGMMA"], "fp32": ["HGMMA"], "fp64": ["DMMA"]},
    100: {"bf16": ["UTCHMMA"], "fp16": ["UTCHMMA"], "fp32": ["UTCHMMA"], "fp64": []},
}


@pytest.fixture(scope="module")
def report() -> dict:
    """Every kernel as ``bench/gpu/static.py`` compiled it; that it is of these sources is for ``test_gpu_static.py`` to say."""
    return json.loads((HERE.parent / "bench" / "gpu" / "kernels.json").read_text())


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: f"sm_{target}")
def compiled(request, report) -> tuple[int, list[dict]]:
    """Every kernel the launchers start in representative calls, for one target."""
    rows = [row for row in report["triton"] if row["target"] == f"sm_{request.param}"]
    for row in rows:
        print(
            f"\n{row['target']:7}{row['call']:36}{row['kernel']:24}{row['registers']:4} registers "
            f"{row['local_bytes']:4} B local {row['shared_bytes']:7} B shared {row['threads']:4} threads  {' '.join(row['matrix'])}",
            end="",
        )
    return request.param, rows


@pytest.mark.slow
def test_what_is_compiled_here_is_what_the_report_says(report):
    """The first call of each op and dtype, for Hopper: all calls and targets would take seven minutes."""
    missing = [name for name in ("ptxas", "cuobjdump", "nvdisasm") if not (machine_code.tools() / name).exists()]
    if missing:
        pytest.skip(f"this triton does not bundle {', '.join(missing)} (looked in {machine_code.tools()})")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, HERE / "compile_ahead.py", "90", "--first"]
    run = subprocess.run(command, env={**environment, "PYTHONSAFEPATH": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    rows = json.loads(run.stdout)
    assert {row["call"].split()[0] for row in rows} == {row["call"].split()[0] for row in report["triton"]}
    assert [row for row in rows if row["local_bytes"]] == []
    if triton.__version__ == report["versions"]["triton"]:  # another compiler allots other registers
        assert [row for row in rows if row not in report["triton"]] == []


@pytest.mark.slow
def test_nothing_spills(compiled):
    _, rows = compiled
    assert [row for row in rows if row["local_bytes"] or row["local_accesses"]] == []
    assert [row for row in rows if row["atomics"]] == []  # the order of sums is fixed


@pytest.mark.slow
def test_no_copy_overwrites_what_a_product_reads(compiled):
    """Where products run beside the copies of steps to come, on Hopper."""
    _, rows = compiled
    assert [(row["call"], row["overwritten"]) for row in rows if row["overwritten"]] == []


@pytest.mark.parametrize("target", TARGETS)
def test_what_autotuning_may_choose_does_not_spill(target, report):
    rows = [row for row in report["others"] if row["target"] == f"sm_{target}"]
    assert {row["call"].split()[0] for row in rows} == {"linear_sq", "gram", "conv_sq", "conv_gram"}
    assert [row for row in rows if row["local_bytes"]] == []


@pytest.mark.slow
def test_matrix_units_are_used(compiled):
    target, rows = compiled
    # "small" and "groups" fill no more than Ampere's instructions.
    kernels = (
        "_linear_sq_kernel",
        "_linear_sq_flat_kernel",
        "_conv_sq_kernel",
        "_gram_kernel",
        "_conv_gram_kernel",
        "_ghost_norm_kernel",
    )
    gemms = [r for r in rows if r["kernel"] in kernels and r["call"].split()[2] not in ("small", "groups", "depthwise")]
    assert len(gemms) >= 13 + 20 + 17 + 17 + 11
    used = [(r["call"], sorted({machine_code.base(name) for name in r["matrix"]})) for r in gemms]
    wrong = [(call, found) for call, found in used if found != MATRIX[target][call.split()[1]]]
    assert wrong == []


@pytest.mark.slow
def test_every_kernel_is_compiled(compiled):
    """A kernel that no representative call reaches is a kernel nobody looked at."""
    defined = {
        name
        for file in (
            *(_common, _squares, categorical_score, conv_gram, conv_sq, gram, linear_sq, scale_sq, embedding_sq),
            *(ghost_norm, log1p_sum, kron_log1p_sum),
        )
        for name in vars(file)
        if name.endswith("_kernel")
    }
    assert defined == {row["kernel"] for row in compiled[1]}


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("O", "I"), [(1, 1), (7, 11), (128, 4096), (1000, 1000), (50257, 768)])
def test_linear_candidates(O, I, dtype, arch):
    """Powers of two that tl.dot accepts, no larger than needed; no empty share, a bounded workspace, the best one first."""
    for T, N, tiles in itertools.product((1, 5, 512, 8192), (1, 7, 4096), (2, 3, 4)):
        work = linear_sq.Work(O, I, N, T, dtype, tiles)
        times = []
        for blocks, shares in linear_sq.candidates(work, arch):
            sizes = {name: blocks[f"BLOCK_{name}"] for name in "OIT"}
            assert all(size >= 16 and size & (size - 1) == 0 for size in sizes.values())
            assert all(sizes[name] < 2 * max(extent, 16) for name, extent in (("O", O), ("I", I), ("T", T)))
            parts = linear_sq.parts_of(N, shares)
            assert shares == N * parts if shares > N else shares == triton.cdiv(N, triton.cdiv(N, shares))
            assert parts == 1 or T >= linear_sq.PART_ROWS * parts
            assert linear_sq.workspace_bytes(work, shares) <= linear_sq.WORKSPACE
            times.append(linear_sq.seconds(work, sizes["O"], sizes["I"], shares))
        assert times[0] == min(times)


@pytest.mark.parametrize(("O", "I"), [(4096, 4096), (14336, 4096), (4096, 14336)])
@pytest.mark.parametrize("T", [512, 2048])
def test_large_matrices_take_the_largest_tile_and_no_workspace(O, I, T):
    work = linear_sq.Work(O, I, 8, T, torch.bfloat16, 2)
    blocks, shares = linear_sq.candidates(work, 90)[0]
    assert (blocks["BLOCK_O"], blocks["BLOCK_I"], blocks["BLOCK_T"], blocks["num_warps"]) == (128, 128, 64, 8)
    assert shares == 1 and linear_sq.workspace_bytes(work, 1) == 0


def test_few_tiles_share_the_samples():
    """36 tiles of 128 x 128 would leave most multiprocessors idle."""
    work = linear_sq.Work(768, 768, 32, 128, torch.bfloat16, 2)
    blocks, shares = linear_sq.candidates(work, 90)[0]
    assert shares > 1 and 36 * shares <= _products.MULTIPROCESSORS
    assert linear_sq.seconds(work, blocks["BLOCK_O"], blocks["BLOCK_I"], shares) < 0.6 * linear_sq.seconds(work, 128, 128, 1)


def test_few_samples_are_split_into_parts():
    """One long text would take 64 tiles of 128 x 128; two parts of it fill the chip. A short one is not worth a workspace."""
    work = linear_sq.Work(1024, 1024, 1, 8192, torch.bfloat16, 2)
    blocks, shares = linear_sq.candidates(work, 90)[0]
    assert (blocks["BLOCK_O"], blocks["BLOCK_I"], linear_sq.parts_of(1, shares)) == (128, 128, 2)
    assert linear_sq.seconds(work, 128, 128, 2) < 0.7 * linear_sq.seconds(work, 128, 128, 1)
    assert linear_sq.candidates(work._replace(T=512), 90)[0][1] == 1


@pytest.mark.parametrize("steps", [1, 2, 16, 17, 100, 1000, 10**5])
def test_fold_size_covers_every_step_in_few_chains(steps):
    fold = _products.fold_size(steps)
    chains = -(-steps // fold)
    assert 1 <= fold <= steps
    assert chains == 1 if steps <= 16 else chains <= (2 * steps) ** (1 / 3) + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("N", "T", "D"), [(1, 1, 1), (3, 5, 7), (8, 512, 4096), (4096, 1, 1024), (100000, 1, 131072)])
def test_scale_config(N, T, D, dtype):
    """Tiles of at most 4096 values, at most 32 float32 additions in a row, no empty share."""
    blocks, shares = scale_sq.config(N, T, D, dtype)
    assert all(size & (size - 1) == 0 for size in blocks.values())
    assert blocks["BLOCK_N"] * blocks["BLOCK_T"] * blocks["BLOCK_D"] <= 4096
    assert triton.cdiv(N, shares * blocks["BLOCK_N"]) <= 32
    assert 1 <= shares <= triton.cdiv(N, blocks["BLOCK_N"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("R", "C"), [(1, 1), (65536, 10), (3, 1000), (1024, 128256)])
def test_score_config(R, C, dtype):
    """Tiles no larger than needed, of at most 4096 logits, or 8192 where a row is long; some hundreds of them a warp."""
    blocks = categorical_score.config(R, C, dtype)
    assert all(size & (size - 1) == 0 for size in blocks.values())
    assert blocks["BLOCK_R"] < 2 * R and blocks["BLOCK_C"] < 2 * max(C, 16)
    cells = blocks["BLOCK_R"] * blocks["BLOCK_C"]
    assert cells <= (8192 if C >= 2**14 else 4096) and cells <= 512 * blocks["num_warps"] and blocks["num_warps"] <= 32


def test_long_rows_of_16_bits_are_one_program_a_multiprocessor():
    """Of 2048 threads and 65536 registers two would fit with at most 32 a thread; then the rows would not fit in the L2."""
    C, L2 = 128256, 60e6
    blocks = categorical_score.config(4096, C, torch.bfloat16)
    assert blocks["num_warps"] == 32 and blocks["STAGES"] > 1
    rows = _products.MULTIPROCESSORS * blocks["BLOCK_R"]
    assert rows * C * 2 < L2 < 2 * rows * C * 2
    assert categorical_score.config(4096, 1000, torch.bfloat16)["STAGES"] == 1


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tiles", [2, 3, 4])
@pytest.mark.parametrize("N", [1, 64, 10**5])
@pytest.mark.parametrize(
    ("groups", "O", "C", "K", "T"),
    [
        (1, 1, 1, 1, 1),
        (1, 64, 3, 49, 12544),
        (1, 64, 64, 9, 3136),
        (1, 512, 512, 9, 49),
        (32, 4, 4, 9, 3136),
        (1, 96, 48, 1, 784),
    ],
)
def test_conv_candidates(groups, O, C, K, T, N, tiles, dtype, arch):
    """As ``test_linear_candidates``; the shares fill the chip when the tiles do not, and workspaces stay below 64 MiB."""
    for blocks, shares in conv_sq.candidates(groups, O, C, K, N, T, dtype, tiles, arch):
        sizes = {name: blocks[f"BLOCK_{name}"] for name in "OIT"}
        assert all(size >= 16 and size & (size - 1) == 0 for size in sizes.values())
        assert all(sizes[name] < 2 * max(extent, 16) for name, extent in (("O", O), ("I", K * C), ("T", T)))
        programs = groups * triton.cdiv(O, sizes["O"]) * triton.cdiv(K * C, sizes["I"])
        assert programs * max(N, shares) >= _products.PRODUCT_PROGRAMS or max(sizes["O"], sizes["I"]) <= 32
        parts = max(shares // N, 1)
        assert shares >= 1 and (parts == 1 or (shares == N * parts and T >= parts * conv_sq.PART_ROWS))
        assert shares == 1 or shares * programs <= 4 * _products.PRODUCT_PROGRAMS
        assert shares == 1 or shares * groups * O * C * K * max(dtype.itemsize, 4) <= 2**26
        offsets = {column // C for column in range(min(sizes["I"], K * C))}
        assert not blocks["ONE_OFFSET"] or len(offsets) == 1


@pytest.mark.parametrize(("C", "tile"), [(256, 128), (64, 64), (3, 128)])
def test_conv_tiles_keep_to_one_kernel_offset_where_channels_allow(C, tile):
    blocks, _ = conv_sq.candidates(1, 256, C, 9, 64, 1024, torch.bfloat16, 2, 90)[0]
    assert blocks["ONE_OFFSET"] == (C % 64 == 0)
    assert blocks["BLOCK_I"] == (tile if C > 3 else 32)


@pytest.mark.parametrize(("pairs", "K", "N", "T"), [(1, 1, 1, 1), (256, 9, 64, 1024), (7, 49, 3, 5), (4096, 9, 10**5, 49)])
def test_conv_direct_config(pairs, K, N, T):
    blocks, shares = conv_sq.direct_config(pairs, K, N, T, 90)
    assert blocks["BLOCK_E"] < 2 * pairs and blocks["BLOCK_E"] * blocks["BLOCK_T"] <= 1024
    assert 1 <= shares <= N


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize(("I", "M"), [(0, 5), (1, 1), (7, 100000), (576, 32768), (4096, 8192), (16384, 3)])
def test_gram_candidates(I, M, even, dtype, arch):
    """Tiles that tl.dot accepts, every upper tile once, shares of at least four steps, a bounded workspace."""
    for blocks, shares in gram.candidates(I, M, even, dtype, arch):
        side = -(-max(I, 1) // blocks["BLOCK"])
        assert gram.programs(I, blocks) == blocks["ACROSS"] * side * (side + 1) / 2
        assert min(blocks["BLOCK"] // blocks["ACROSS"], blocks["BLOCK_M"]) >= 16
        assert shares == 1 or (4 * shares * I * I <= gram.WORKSPACE and M > 4 * blocks["BLOCK_M"] * (shares - 1))


@pytest.mark.parametrize("I", [512, 768, 1024, 2048, 4096])
def test_gram_programs_leave_few_multiprocessors_idle(I):
    blocks, shares = gram.candidates(I, 8192, True, torch.bfloat16, 90)[0]
    programs = shares * gram.programs(I, blocks)
    assert programs / (_products.MULTIPROCESSORS * -(-programs // _products.MULTIPROCESSORS)) > 0.75


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("M", [1, 1000, 10**7])
@pytest.mark.parametrize(("groups", "C", "K"), [(1, 1, 1), (1, 3, 49), (1, 512, 9), (32, 4, 9), (1, 48, 1)])
def test_conv_gram_candidates(groups, C, K, M, bias, dtype, arch):
    """As ``test_conv_candidates``; a tile is square."""
    for blocks, shares in conv_gram.candidates(groups, C, K, bias, M, dtype, arch):
        size, steps = blocks["BLOCK"], triton.cdiv(M, blocks["BLOCK_T"])
        assert size >= 16 and size & (size - 1) == 0 and size < 2 * max(K * C + bias, 16)
        assert blocks["BLOCK_T"] >= 16 and blocks["BLOCK_T"] < 2 * max(M, 16)
        programs = groups * conv_gram.upper_tiles(triton.cdiv(K * C + bias, size))
        assert programs * steps >= _products.PRODUCT_PROGRAMS or size <= 32
        assert 1 <= shares <= steps and (shares == 1 or shares * programs <= 4 * _products.PRODUCT_PROGRAMS)
        assert not blocks["ONE_OFFSET"] or K == 1 or C % size == 0


@pytest.mark.parametrize("D", [1, 7, 128, 4096])
@pytest.mark.parametrize("M", [1, 16384, 10**6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_embedding_config(M, D, dtype):
    blocks = embedding_sq.config(M, D, dtype)
    assert 16 <= blocks["BLOCK_D"] <= 1024 and blocks["BLOCK_D"] < 2 * max(D, 16)
    assert blocks["num_warps"] * 256 >= blocks["BLOCK_D"]
    assert blocks["PIECE"] >= 64 and M / blocks["PIECE"] <= 512


@pytest.mark.parametrize(("found", "usable"), [(75, False), (80, True), (90, True), (100, True), ("gfx942", False)])
def test_reason_names_the_gpu_that_cannot(monkeypatch, found, usable):
    monkeypatch.setattr(_common, "architecture", lambda device: found)
    reason = _common.device_problem(torch.device("cpu"))
    assert reason is None if usable else f"got {found}" in reason
