# SPDX-License-Identifier: Apache-2.0
"""Work so large, or so divided, that every loop of a Triton kernel runs more than once: exact in integers, under the interpreter."""

from __future__ import annotations

import importlib
from dataclasses import replace

import conv_cases
import pytest
import test_conv_gram
import test_gram
import torch
from op_cases import (
    PRIMES,
    TARGETS,
    Shape,
    Target,
    assert_exact,
    copies,
    problem,
    sliced,
    strided,
    transposed,
)  # fmt: skip

import fisherfast as ff
from fisherfast import _backend

if not any(target.emulated for target in TARGETS):
    pytest.skip("Triton's interpreter is off: there is a GPU, or no Triton", allow_module_level=True)

TILES = {"BLOCK_O": 16, "BLOCK_I": 16, "BLOCK_T": 16, "num_warps": 4, "num_stages": 3}
every_target = pytest.mark.parametrize("target", TARGETS, ids=str)


@pytest.fixture
def patch(monkeypatch):
    def patched(module: str, **values) -> None:
        for name, value in values.items():
            monkeypatch.setattr(importlib.import_module(f"fisherfast.kernels.{module}"), name, value)

    return patched


def triton(op: str) -> Target:
    return Target(op, "triton", "cpu")


@pytest.mark.parametrize("T", [1, 3])
def test_more_than_eight_rows_of_tiles(patch, T):
    """They are numbered in bands of 8."""
    patch("linear_sq", candidates=lambda work, arch: [(TILES, 1)])
    assert_exact(problem(triton("linear_sq_"), Shape(2, T, 35, 16 * 17 + 3), integers=True, weighted=True), "triton")


def test_a_last_share_of_whole_steps(patch):
    """Of 3 steps of 32 samples the second share has one: less than a chain, and no step is cut."""
    patch("linear_sq", candidates=lambda work, arch: [({**TILES, "BLOCK_T": 32}, 2)])
    assert_exact(problem(triton("linear_sq_"), Shape(96, 1, 5, 7), integers=True, weighted=True), "triton")


@pytest.mark.parametrize(("I", "O"), [(300, 3), (3, 300)])
def test_norms_of_long_rows(I, O):
    assert_exact(problem(triton("linear_sq_"), Shape(3, 1, I, O), integers=True), "triton")


def test_more_than_128_ragged_samples_in_a_share(patch):
    patch("linear_sq", candidates=lambda work, arch: [(TILES, 1)])
    case = problem(triton("linear_sq_"), Shape(150, 1, 3, 5), integers=True)
    offsets = torch.arange(151).clamp(max=140)
    offsets[-1] = 150
    assert_exact(replace(case, first=case.first[:, 0], g=case.g[:, 0], offsets=offsets), "triton")


def test_more_than_256_partial_results():
    assert_exact(problem(triton("scale_sq_"), Shape(16 * 257, 1, 3, 1), integers=True, weighted=True), "triton")


@pytest.mark.parametrize("ragged", [False, True])
def test_shares_of_several_steps(patch, ragged):
    patch("scale_sq", PROGRAMS=2)
    assert_exact(problem(triton("scale_sq_"), Shape(13, 20, 3, 1), integers=True, weighted=True, ragged=ragged), "triton")


@pytest.mark.parametrize("ragged", [False, True])
def test_norms_of_long_token_sequences(ragged):
    assert_exact(problem(triton("embedding_sq_"), Shape(2, 150, 3, 5), integers=True, ragged=ragged), "triton")


@pytest.mark.parametrize("piece", [2, 64])
def test_more_pieces_than_programs(patch, piece):
    patch("embedding_sq", PROGRAMS=3, config=lambda M, D, dtype: {"BLOCK_D": 16, "PIECE": piece, "num_warps": 1})
    assert_exact(problem(triton("embedding_sq_"), Shape(4, 9, 19, 12), integers=True, weighted=True), "triton")


@pytest.mark.parametrize("layout", [transposed, sliced, strided])
@every_target
def test_ragged_and_noncontiguous(target, layout):
    case = problem(target, PRIMES, integers=True, ragged=True, weighted=True)
    assert_exact(replace(case, first=layout(case.first), g=layout(case.g)), target.backend)


@pytest.mark.parametrize("layout", [torch.clone, strided])
@pytest.mark.parametrize("where", ["first", "g"])
@every_target
def test_flag_sees_the_last_of_many_values(target, where, layout):
    case = problem(target, Shape(2, 3, 2100, 2100 if where == "g" else 3))
    if where == "first" and target.op == "embedding_sq_":
        pytest.skip("ids are integers")
    getattr(case, where)[-1, -1, -1] = float("nan")
    case = replace(case, first=layout(case.first), g=layout(case.g))
    outputs, flag = case.outputs(integers=True), torch.zeros(1, dtype=torch.int32, device=target.device)
    before = copies(outputs)
    case.run(target.backend, outputs, flag=flag)
    assert flag.item() == 1 and all(torch.equal(outputs[name], before[name]) for name in outputs)


# ---- convolutions


CONV = triton("conv_sq_")


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("shape", [conv_cases.BASIC, conv_cases.SHAPES[7]], ids=["tiles", "direct"])
def test_conv_shares_of_several_chains(patch, shape, ragged):
    more = {"ONE_OFFSET": False, **TILES}
    patch("conv_sq", candidates=lambda *_: [(more, 2)], fold_size=lambda steps: 2)
    patch("conv_sq", direct_config=lambda *_: ({"BLOCK_E": 8, "BLOCK_T": 16, "num_warps": 4}, 2))
    case = conv_cases.problem(CONV, shape._replace(N=11), integers=True, ragged=ragged, weighted=True, scale=2.0)
    assert_exact(case, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_conv_tiles_of_one_kernel_offset(dtype):
    shape = conv_cases.Geometry(2, 64, 8, (7,), (3,), before=(1,), after=(1,))
    assert_exact(conv_cases.problem(CONV, shape, dtype, integers=True), "triton")


def test_conv_folds_many_channels_and_offsets():
    shape = conv_cases.Geometry(1, 70, 2, (6, 5), (5, 5))
    assert_exact(conv_cases.problem(CONV, shape, integers=True), "triton")


GRAM = test_conv_gram.Target("triton", "cpu")


@pytest.mark.parametrize("weighted", [False, True])
def test_conv_gram_shares_of_several_chains(patch, weighted):
    blocks = {"BLOCK": 16, "BLOCK_T": 16, "ONE_OFFSET": False, "num_warps": 4, "num_stages": 3}
    patch("conv_gram", candidates=lambda *_: [(blocks, 2)], fold_size=lambda steps: 2)
    for shape in (test_conv_gram.SAME._replace(C=5), test_conv_gram.Geometry(29, 5, 0, (3,), (2,))):
        test_conv_gram.assert_exact(GRAM, test_conv_gram.case(GRAM, shape, integers=True, weighted=weighted, bias=True))


def test_conv_gram_tiles_of_one_kernel_offset():
    shape = test_conv_gram.Geometry(2, 64, 0, (7,), (2,), before=(1,), after=(1,))
    test_conv_gram.assert_exact(GRAM, test_conv_gram.case(GRAM, shape, integers=True, bias=True))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shares", [2, 20])
def test_gram_shares_of_several_chains(patch, shares, weighted):
    """The last share is shorter, or has no rows; its last chain is one step."""
    blocks = {"BLOCK": 16, "ACROSS": 1, "BLOCK_M": 16, "num_warps": 4, "num_stages": 3}
    patch("gram", candidates=lambda *_: [(blocks, shares)], fold_size=lambda steps: 2)
    case = test_gram.problem("cpu", 16 * 2 * shares * 2 + 40, 21, integers=True, weighted=weighted, bias=True, scale=2.0)
    test_gram.assert_exact(case, "triton")


@pytest.mark.parametrize("shares", [1, 3])
def test_gram_matrices_of_many_rows_are_one_launch(patch, shares):
    """Each chain was one once, and every launch read and wrote all of acc."""
    launched = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append(grid)
            return self.kernel[grid]

    gram_blocks = {"BLOCK": 16, "ACROSS": 1, "BLOCK_M": 16, "num_warps": 4, "num_stages": 3}
    conv_blocks = {"BLOCK": 16, "BLOCK_T": 16, "ONE_OFFSET": False, "num_warps": 4, "num_stages": 3}
    for module, kernel, blocks in (("gram", "_gram_kernel", gram_blocks), ("conv_gram", "_conv_gram_kernel", conv_blocks)):
        found = importlib.import_module(f"fisherfast.kernels.{module}")
        choices = [(blocks, shares)]
        patch(module, **{kernel: Counted(getattr(found, kernel)), "candidates": lambda *_, choices=choices: choices})
    test_gram.assert_exact(test_gram.problem("cpu", 1000, 7, integers=True), "triton")
    test_conv_gram.assert_exact(GRAM, test_conv_gram.case(GRAM, test_conv_gram.Geometry(60, 2, 0, (17,), (2,)), integers=True))
    assert [grid[1] for grid in launched] == [shares, shares]


# ---- rows and sums


@pytest.mark.parametrize("backend", [b for b in _backend.OPS["categorical_score_"].usable("cpu")])
@pytest.mark.parametrize("masked", [slice(0, 4500), slice(4096, None), slice(500, 5000)], ids=str)
@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2.0**-53])
def test_tiles_of_masked_classes(backend, masked, u):
    """A tile of -inf before, between and behind those that are not."""
    logits = torch.randn(3, 9000)
    logits[:, masked] = -float("inf")
    out, drawn = torch.empty_like(logits), torch.zeros(3, dtype=torch.int64)
    with ff.backend(backend):
        ff.ops.categorical_score_(out, logits, uniform=torch.full((3,), u, dtype=torch.float64), drawn=drawn)
    assert (logits.gather(1, drawn.unsqueeze(1)) > -float("inf")).all()
    p = logits.double().softmax(-1)
    exact = p - torch.nn.functional.one_hot(drawn, 9000)
    assert (out - exact).abs().max() < 1e-6


def test_log_sums_of_several_steps(patch):
    patch("log1p_sum", PROGRAMS=2)
    patch("kron_log1p_sum", PROGRAMS=2)
    f = torch.rand(5 * 512 + 3, dtype=torch.float64)
    acc, kron = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    with ff.backend("triton"):
        ff.ops.log1p_sum(acc, f, 0.75)
        ff.ops.kron_log1p_sum(kron, f[:9], f[9:700], 0.75)
    for got, s in ((acc, 0.75 * f), (kron, 0.75 * f[:9, None] * f[None, 9:700])):
        expected = torch.stack([s.log1p().sum(), (s.log1p() - s / (1 + s)).sum()])
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


# ---- addresses


@pytest.fixture
def no_copies(monkeypatch):
    """The interpreter would copy every storage back onto itself, 4 GiB of them."""
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)


FAR = 2**30  # a step that fits into 32 bits; two of them do not


def far(values: torch.Tensor) -> torch.Tensor:
    """The same, the entries of the first axis 2^30 elements apart; the memory between them is never touched."""
    room = torch.empty(2 * FAR + 2**14, dtype=values.dtype)
    return room.as_strided(values.shape, (FAR, *values[0].contiguous().stride())).copy_(values)


@pytest.mark.parametrize("where", ["first", "g"])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("op", ["linear_sq_", "scale_sq_", "embedding_sq_"])
def test_addresses_beyond_32_bits(no_copies, op, T, where):
    if (op, where) == ("embedding_sq_", "first"):
        pytest.skip("16 GiB of ids, which torch sorts")
    case = problem(triton(op), Shape(3, T, 5, 7), torch.bfloat16, integers=True)
    assert_exact(replace(case, **{where: far(getattr(case, where))}), "triton")


@pytest.mark.parametrize("where", ["first", "g"])
@pytest.mark.parametrize("ragged", [False, True])
def test_conv_addresses_beyond_32_bits(no_copies, ragged, where):
    case = conv_cases.problem(CONV, conv_cases.BASIC, torch.bfloat16, integers=True)
    offsets = torch.tensor([0, 0, 1, 3]) if ragged else None
    assert_exact(replace(case, offsets=offsets, **{where: far(getattr(case, where))}), "triton")


def test_gram_addresses_beyond_32_bits(no_copies):
    case = test_gram.problem("cpu", 3, 4, 5, dtype=torch.bfloat16, integers=True, bias=True)
    test_gram.assert_exact(replace(case, x=far(case.x)), "triton")
    case = test_gram.problem("cpu", 3, 5, dtype=torch.bfloat16, integers=True, bias=True)
    test_gram.assert_exact(replace(case, x=far(case.x)), "triton")


def test_conv_gram_addresses_beyond_32_bits(no_copies):
    problem = test_conv_gram.case(GRAM, test_conv_gram.BASIC, torch.bfloat16, integers=True, bias=True)
    test_conv_gram.assert_exact(GRAM, replace(problem, x=far(problem.x)))


def test_score_addresses_beyond_32_bits(no_copies):
    logits, labels = torch.randn(3, 37).bfloat16(), torch.tensor([3, 5, 7])
    near, distant = torch.empty_like(logits), torch.empty_like(logits)
    with ff.backend("triton"):
        ff.ops.categorical_score_(near, logits, labels=labels)
        ff.ops.categorical_score_(distant, far(logits), labels=labels)
    assert torch.equal(near, distant)


@pytest.mark.parametrize("backend", _backend.OPS["categorical_score_"].usable("cpu"))
@pytest.mark.parametrize("C", [300, 4200])
def test_masked_classes_at_the_end_are_not_drawn_where_rounding_hides_the_last_one(backend, C):
    """The sum of a tile and that of its classes round differently: a bound may lie between them."""
    logits = torch.randn(200, C)
    logits[:, 250:] = -float("inf")
    drawn = torch.zeros(200, dtype=torch.int64)
    uniform = torch.full((200,), 1 - 2.0**-53, dtype=torch.float64)
    out = torch.empty_like(logits)
    with ff.backend(backend):
        ff.ops.categorical_score_(out, logits, uniform=uniform, drawn=drawn)
    assert (0 <= drawn).all() and (drawn < 250).all()
