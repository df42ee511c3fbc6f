# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show of the ops: streams, graphs, devices, no waiting, tensors of more than 2^31 elements, TF32.

Where there is none, what needs none runs on the CPU's kernels with extents of a few, and so does the rest of this file's own code.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import gate
import pytest
import torch
from gpu import calls, clock, cost, model_cases, problems

import fisherfast as ff
from fisherfast import _backend
from fisherfast.fisher.blocks import rank

GPU = torch.cuda.is_available()
DEVICE, BACKENDS = ("cuda", ("triton", "cuda")) if GPU else ("cpu", ("cpu",))
TARGETS = [(op, b) for op in calls.CALLS for b in BACKENDS if _backend.OPS[op].unavailable(b, DEVICE) is None]
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")]
every_target = pytest.mark.parametrize(("op", "backend"), TARGETS, ids=[f"{op.rstrip('_')}-{b}" for op, b in TARGETS])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
one_at_a_time = pytest.mark.xdist_group("large")  # their memory would not fit side by side


def on_gpu(test):
    """Mark a test that has no meaning elsewhere."""
    for mark in needs_gpu:
        test = mark(test)
    return test


# ---- the numerical gate, on shapes that fill several tiles and end inside of one

SHAPES = {
    "linear_sq_": [
        (3, 37, 131, 67),
        (2, 300, 520, 264),
        (300, 1, 257, 130),
        (5, 64, 128, 256),
        (1, 700, 48, 1030),
        (4, 130, 1024, 640),
    ],
    "gram_": [(4, 250, 300), (8, 512, 64), (7, 11, 1030)],
    "conv_sq_": [(5, 16, 24, 13, 3, 1, 1), (3, 8, 8, 20, 5, 2, 8), (4, 64, 96, 14, 1, 1, 1), (2, 3, 64, 33, 7, 2, 1)],
    "conv_gram_": [(5, 16, 13, 3, 1), (3, 96, 14, 1, 1), (2, 3, 33, 7, 2)],
    "ghost_norm_": [(5, 16, 24, 13, 3), (4, 64, 96, 5, 1), (2, 300, 40, 9, 3)],
    "scale_sq_": [(3, 700, 300, True), (70, 5, 33, False)],
    "embedding_sq_": [(3, 700, 50, 300), (40, 5, 1000, 33)],
    "categorical_score_": [(70, 1000), (3, 50257)],
    "log1p_sum": [(700, 301)],
    "kron_log1p_sum": [(300, 2500)],
}
GATED = [
    (op, backend, mode, shape)
    for op, backend in TARGETS
    for mode in (("bf16", "fp16", "fp32", "tf32") if GPU else ("bf16", "fp16", "fp32"))
    if {"fp16": "bf16"}.get(mode, mode) in problems.CASES[op].modes
    for shape in (SHAPES[op] if GPU else [problems.CASES[op].tiny])
]


@pytest.mark.parametrize(("op", "backend", "mode", "shape"), GATED, ids=[f"{o.rstrip('_')}-{b}-{m}-{s}" for o, b, m, s in GATED])
def test_matches_float64(op, backend, mode, shape):
    """The largest error over several draws: of one draw, plain torch's may be zero by luck."""
    mine, plain = 0.0, 0.0
    with clock.tf32(mode == "tf32"), ff.backend(backend):
        for _ in range(4):
            problem = problems.CASES[op].build(problems.Draw(DEVICE, mode), *shape)
            oracle, acc = problem.oracle(), problem.acc.clone()
            problem.ours(acc)
            mine = max(mine, gate.error(problem.compared(acc), oracle))
            plain = max(plain, gate.error(problem.compared(problem.plain()), oracle))
    assert cost.passes(mine, plain, mode), f"error {mine:.2e}, plain torch {plain:.2e}"


# ---- what memory holds, and when a call runs, does not matter


def results(call: calls.Call) -> calls.Outputs:
    """What a call makes of fresh outputs."""
    outputs = call.fresh()
    call.run(outputs)
    return outputs


def assert_same(found: calls.Outputs, expected: calls.Outputs) -> None:
    """Bit by bit, and no NaN."""
    for name, value in expected.items():
        assert not value.isnan().any(), name
        assert torch.equal(found[name], value), f"{name} differs by {(found[name].double() - value.double()).abs().max():.2e}"


def fill_free_memory(value: float) -> None:
    """Leave ``value`` in the memory that is allocated next, by native code too."""
    sizes = [2**k for k in range(7, 23 if GPU else 10)] * 4
    held = [torch.full((size,), value, device=DEVICE) for size in sizes]
    del held


@every_dtype
@every_target
def test_repeats_bitwise_whatever_free_memory_holds(op, backend, dtype):
    with ff.backend(backend):
        for call in calls.calls(op, DEVICE, dtype):
            expected = results(call)
            for value in (math.nan, 1e30):
                fill_free_memory(value)
                assert_same(results(call), expected)


@every_dtype
@every_target
def test_equals_the_reference(op, backend, dtype):
    """With every option; both add in float32. To the last bits it is ``test_ops.py``'s business."""
    for call in calls.calls(op, DEVICE, dtype):
        with ff.backend(backend):
            found = results(call)
        with ff.backend("reference"):
            expected = results(call)
        for name, value in expected.items():
            close = 2**-7 if value.dtype == torch.bfloat16 else 1e-4
            top = float(value.abs().max())
            assert float((found[name].double() - value.double()).abs().max()) <= close * top, name


@on_gpu
@every_target
def test_runs_on_the_current_stream(op, backend):
    """The outputs get their values on a stream that is kept busy: a launch on another one would come before them."""
    side = torch.cuda.Stream()
    with ff.backend(backend):
        for call in calls.calls(op, DEVICE, torch.bfloat16):
            expected = results(call)
            found = {name: torch.full_like(value, 7) for name, value in call.outputs.items()}
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                torch.cuda._sleep(20_000_000)
                for name, value in call.outputs.items():
                    found[name].copy_(value)
                call.run(found)
            torch.cuda.synchronize()
            assert_same(found, expected)


@on_gpu
@every_dtype
@every_target
def test_is_captured_in_a_graph(op, backend, dtype):
    with ff.backend(backend):
        for call in calls.calls(op, DEVICE, dtype):
            expected = results(call)  # and compiles: nothing may be loaded during the capture
            found, graph = call.fresh(), torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                call.run(found)
            for _ in range(2):
                for name, value in call.outputs.items():
                    found[name].copy_(value)
                graph.replay()
                torch.cuda.synchronize()
                assert_same(found, expected)


@on_gpu
@every_dtype
@every_target
def test_does_not_wait_for_the_device(op, backend, dtype):
    with ff.backend(backend):
        for call in calls.calls(op, DEVICE, dtype):
            outputs = results(call)  # compiles
            torch.cuda.set_sync_debug_mode("error")
            try:
                call.run(outputs)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_target
def test_runs_on_the_device_of_its_tensors(op, backend):
    with ff.backend(backend):
        for call in calls.calls(op, "cuda:1", torch.bfloat16):
            with torch.cuda.device(1):
                expected = results(call)
            with torch.cuda.device(0):
                found = results(call)
                assert torch.cuda.current_device() == 0
            torch.cuda.synchronize(1)
            assert_same(found, expected)


# ---- 64-bit indices: what is added over parts of fewer than 2^31 elements is what is added over all of it


class Large(NamedTuple):
    """A call on tensors that are split along their first axis: every op adds over it, but the score, which has rows."""

    inputs: tuple[torch.Tensor, ...]
    acc: tuple[int, ...]
    run: Callable[..., object]  # acc, *inputs


def integers(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """-1, 0 and 1: sums of few of them are exact in any order."""
    return torch.randint(-1, 2, size, device=DEVICE, dtype=torch.int8).to(dtype)


LARGE = {  # by op; n is more than 2^31 elements on a GPU
    "linear_sq_": lambda n: Large(
        (integers(n // 4096 + 1, 2, 2048), integers(n // 4096 + 1, 2, 16)),
        (16, 2048),
        lambda acc, x, g: ff.ops.linear_sq_(acc, x, g),
    ),
    "gram_": lambda n: Large((integers(n // 64 + 1, 64),), (64, 64), lambda acc, x: ff.ops.gram_(acc, x)),
    "conv_sq_": lambda n: Large(
        (integers(n // 4096 + 1, 4, 32, 32), integers(n // 4096 + 1, 4, 32, 32)),
        (4, 4, 3, 3),
        lambda acc, x, g: ff.ops.conv_sq_(acc, x, g, padding=(1, 1)),
    ),
    "conv_gram_": lambda n: Large(
        (integers(n // 4096 + 1, 4, 32, 32),),
        (1, 36, 36),
        lambda acc, x: ff.ops.conv_gram_(acc, x, kernel=(3, 3), padding=(1, 1)),
    ),
    "scale_sq_": lambda n: Large((integers(n // 8192 + 1, 4, 2048),), (2048,), lambda acc, g: ff.ops.scale_sq_(acc, None, g)),
    "embedding_sq_": lambda n: Large(
        (torch.randint(50, (n // 8192 + 1, 4), device=DEVICE), integers(n // 8192 + 1, 4, 2048)),
        (50, 2048),
        lambda acc, ids, g: ff.ops.embedding_sq_(acc, ids, g),
    ),
    "log1p_sum": lambda n: Large((torch.rand(n // 16 + 1, 16, device=DEVICE),), (2,), lambda acc, f: ff.ops.log1p_sum(acc, f)),
}


@one_at_a_time
@pytest.mark.parametrize("op", LARGE)
def test_parts_add_up_to_the_whole(op):
    elements = 2**31 + 2**20 if GPU else 10_000
    if GPU and torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory for tensors of more than 2^31 elements")
    large = LARGE[op](elements)
    assert max(t.numel() for t in large.inputs) > elements
    half = len(large.inputs[0]) // 2
    for backend in (b for o, b in TARGETS if o == op):
        whole, parts = (torch.zeros(large.acc, dtype=torch.float64, device=DEVICE) for _ in range(2))
        with ff.backend(backend):
            large.run(whole, *large.inputs)
            for part in (slice(0, half), slice(half, None)):
                large.run(parts, *(t[part] for t in large.inputs))
        difference, top = float((whole - parts).abs().max()), float(parts.abs().max())
        assert top > 0 and difference <= 1e-5 * top, f"{backend}: {difference / top:.2e} of the maximum"


@one_at_a_time
@pytest.mark.parametrize("op", ["linear_sq_", "gram_"])
def test_parts_of_a_large_accumulator_are_what_it_is_made_of(op):
    """The last rows of an accumulator of more than 2^31 elements are those of a call on the last features alone."""
    if GPU and torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory for a tensor of more than 2^31 elements")
    side = 46500 if GPU else 150  # 46500^2 > 2^31
    x, last = integers(2, 3, side), slice(-100, None)
    for backend in (b for o, b in TARGETS if o == op):
        with ff.backend(backend):
            acc, corner = torch.zeros(side, side, device=DEVICE), torch.zeros(100, 100, device=DEVICE)
            if op == "linear_sq_":
                ff.ops.linear_sq_(acc, x, x)
                ff.ops.linear_sq_(corner, x[..., last].contiguous(), x[..., last].contiguous())
            else:
                ff.ops.gram_(acc, x)
                ff.ops.gram_(corner, x[..., last].contiguous())
        assert corner.any() and torch.equal(acc[last, last], corner), backend


@one_at_a_time
def test_rows_beyond_2_to_the_31_are_scored():
    rows, C = (2**31 // 131072 + 9, 131072) if GPU else (9, 31)
    if GPU and torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory for a tensor of more than 2^31 elements")
    logits, labels = torch.randn(rows, C, device=DEVICE, dtype=torch.bfloat16), torch.randint(C, (rows,), device=DEVICE)
    for backend in (b for o, b in TARGETS if o == "categorical_score_"):
        with ff.backend(backend):
            out, last = torch.full_like(logits, math.nan), torch.full_like(logits[-5:], math.nan)
            ff.ops.categorical_score_(out, logits, labels=labels)
            ff.ops.categorical_score_(last, logits[-5:].contiguous(), labels=labels[-5:].contiguous())
        assert torch.equal(out[-5:], last), backend


# ---- whole models


def measured(model, batch, structure: str) -> dict[str, float]:
    """The trace and, where nothing turns within degenerate eigenvalues, the diagonal's norm, of one run."""
    fisher = ff.fisher(model, [batch], structure=structure, fisher_type="empirical", progress=False)
    norms = {name: float(value.double().norm()) for name, value in fisher.diagonal().items()} if structure != "ekfac" else {}
    return {"trace": float(fisher.trace()), **norms}


@on_gpu
@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
@pytest.mark.parametrize("case", model_cases.CASES)
def test_a_fisher_is_the_same_on_the_gpu_and_on_the_cpu(case, structure):
    model, x, y = model_cases.CASES[case].build("cpu", "fp32", tiny=True)
    with clock.tf32(False):
        expected = measured(model, (x, y), structure)
        found = measured(model.to(DEVICE), (x, y), structure)  # batches move to the model's device
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-9)


@on_gpu
@pytest.mark.parametrize("rows", [9, 40])
def test_eigenvalues_that_are_zero_are_counted_as_on_the_cpu(rows):
    x = torch.randn(2, rows, 12, dtype=torch.float64)
    gram, eps = x.mT @ x, torch.finfo(torch.float32).eps
    assert torch.equal(rank.zeros(gram.to(DEVICE), eps).cpu(), rank.zeros(gram, eps))
