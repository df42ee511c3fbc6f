# SPDX-License-Identifier: Apache-2.0
"""The contract of the squares ops, asked of every backend that can run here.

Two yardsticks. *The gate*: with random inputs the error against float64 is at most twice that of a plain float32 einsum
of the same inputs. *Exactness*: with small integers every partial result is representable, so whatever the order of
sums the answer must be equal to the last bit; that is how options, layouts and shapes are tested.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    NONFINITE,
    OP_NAMES,
    PRIMES,
    SHAPES,
    TARGETS,
    Shape,
    Target,
    assert_equal,
    assert_exact,
    assert_gate,
    call_arguments,
    copies,
    every_target,
    expanded,
    problem,
    sliced,
    strided,
    targets_of,
    transposed,
)
from targets import SHORT

import fisherfast as ff
from fisherfast import _backend

# ---- values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
@every_target
def test_matches_float64(target, dtype, shape):
    draws = 4 if shape.I * shape.O < 100 else 2
    assert_gate(target.backend, [problem(target, shape, dtype, weighted=shape.N > 2, scale=0.3) for _ in range(draws)])


@pytest.mark.parametrize("shape", [PRIMES, Shape(13, 1, 7, 11)], ids=str)
@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
@every_target
def test_matches_float64_with_float64_outputs(target, dtype, shape):
    assert_gate(target.backend, [problem(target, shape, dtype, weighted=True, scale=0.3) for _ in range(4)], torch.float64)


@every_target
def test_float64_is_float64(target):
    case = problem(target, Shape(5, 13, 17, 19), torch.float64, scale=0.3)
    outputs = case.outputs(torch.float64)
    case.run(target.backend, outputs)
    first = case.first if case.first.dtype == torch.int64 else case.first.abs()
    magnitude = replace(case, first=first, g=case.g.abs()).answer(torch.float64)
    for name, oracle in case.answer(torch.float64).items():
        operations = 2 * 13 + 5 + 17 * 19  # longest chain of roundings behind one number: the classical forward bound
        bound = operations * torch.finfo(torch.float64).eps * magnitude[name]
        assert ((outputs[name] - oracle).abs() <= bound).all(), name


@pytest.mark.parametrize("size", [1e-4, 300.0])
@every_target
def test_squares_are_not_rounded_to_16_bits(target, size):
    """1e-8 underflows and 9e4 overflows in float16."""
    cases = [problem(target, Shape(13, 1, 7, 11), torch.float16) for _ in range(4)]
    assert_gate(target.backend, [replace(case, g=case.g * size) for case in cases])


@pytest.mark.parametrize("T", [1, 2])
@every_target
def test_many_samples_lose_nothing(target, T):
    N = 257 if target.emulated else 2053
    assert_gate(target.backend, [problem(target, Shape(N, T, 5, 3))])


# ---- options: exact in integers


@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("T", [1, 5], ids=["T1", "T5"])
@every_target
def test_accumulates(target, T, weighted, ragged, dtype):
    case = problem(target, Shape(3, T, 7, 11), dtype, integers=True, ragged=ragged, weighted=weighted, scale=-0.5)
    assert_exact(case, target.backend, flag=torch.zeros(1, dtype=torch.int32, device=target.device))


@pytest.mark.parametrize("T", [1, 5], ids=["T1", "T5"])
@pytest.mark.parametrize("asked", [(), ("total",), ("sqnorm",)], ids=["acc", "total", "sqnorm"])
@every_target
def test_outputs_are_independent(target, asked, T):
    case = problem(target, Shape(3, T, 7, 11), integers=True, weighted=True)
    assert_exact(case, target.backend, ("acc", *asked))


@every_target
def test_output_dtypes_are_independent(target):
    case = problem(target, integers=True)
    outputs = case.outputs(integers=True)
    outputs["total"], outputs["sqnorm"] = outputs["total"].double(), outputs["sqnorm"].double()
    before = copies(outputs)
    case.run(target.backend, outputs)
    assert_equal(case, before, outputs)


@pytest.mark.parametrize("shape", [Shape(0, 5, 7, 11), Shape(3, 0, 7, 11), Shape(3, 5, 0, 11), Shape(3, 5, 7, 0)], ids=str)
@every_target
def test_empty(target, shape):
    if target.op == "embedding_sq_" and shape.O == 0:
        shape = Shape(3, 0, 7, 0)  # an embedding without rows takes no ids
    case = problem(target, shape, integers=True)
    assert_exact(case, target.backend)


@every_target
def test_empty_ragged(target):
    case = problem(target, Shape(2, 5, 7, 11), integers=True)
    case = replace(
        case, first=case.first[0, :0], g=case.g[0, :0], offsets=torch.zeros(3, dtype=torch.int64, device=target.device)
    )
    assert_exact(case, target.backend)


@targets_of("scale_sq_")
def test_x_may_be_absent(target):
    case = replace(problem(target, integers=True), first=None)
    assert_exact(case, target.backend)


@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize("row", [0, 10])
@targets_of("embedding_sq_")
def test_padding_row_is_left_out(target, row, ragged):
    case = replace(problem(target, integers=True, ragged=ragged), padding_idx=row)
    case.first[..., 1] = row
    case.g[case.first == row] = float("nan")  # and not even read into a result
    outputs = case.outputs(integers=True)
    before = copies(outputs)
    case.run(target.backend, outputs)
    assert_equal(replace(case, g=case.g.nan_to_num()), before, outputs)


# ---- how Triton divides the work


@pytest.fixture
def emulated(monkeypatch):
    """The Triton kernels under its interpreter, and a way to give an op another configuration."""
    if not any(target.emulated for target in TARGETS):
        pytest.skip("Triton's interpreter is off: there is a GPU, or no Triton")

    def configure(op: str, name: str, value) -> Target:
        module = importlib.import_module(f"fisherfast.kernels.{op.rstrip('_')}")
        monkeypatch.setattr(module, name, value)
        return Target(op, "triton", "cpu")

    return configure


@pytest.mark.parametrize("T", [1, 5], ids=["T1", "T5"])
@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize(("share", "chain"), [(3, 2), (4, 1)])
def test_shares_of_samples_and_chains_of_sums(emulated, share, chain, T, ragged):
    """In shares, each with a workspace that holds NaN before, and in registers a few samples at a time."""
    blocks = {"BLOCK_O": 16, "BLOCK_I": 16, "BLOCK_T": 16, "num_warps": 4, "num_stages": 3}
    emulated("linear_sq_", "fold_size", lambda steps: chain)
    target = emulated("linear_sq_", "candidates", lambda work, arch: [(blocks, -(-work.N // share))])
    case = problem(
        target, Shape(11 if ragged or T > 1 else 100, T, 17, 35), integers=True, ragged=ragged, weighted=True, scale=2.0
    )
    assert_exact(case, "triton", flag=torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("target", [t for t in TARGETS if (t.op, t.backend) == ("linear_sq_", "triton")], ids=str)
def test_parts_of_a_sample_are_added_before_they_are_squared(target, parts, ragged, dtype, monkeypatch):
    """Also where the rows end before the last part begins; the workspace holds NaN before, and a raised flag keeps all as it was."""
    blocks = {"BLOCK_O": 16, "BLOCK_I": 16, "BLOCK_T": 16, "num_warps": 4, "num_stages": 3}
    module = importlib.import_module("fisherfast.kernels.linear_sq")
    monkeypatch.setattr(module, "candidates", lambda work, arch: [(blocks, parts * work.N)])
    case = problem(target, Shape(3, 77, 17, 35), dtype, integers=True, ragged=ragged, weighted=True, scale=2.0)
    outputs = case.outputs(integers=True)
    before = copies(outputs)
    case.run(target.backend, outputs, flag=torch.zeros(1, dtype=torch.int32, device=target.device))
    assert_equal(case, before, outputs)
    kept = copies(outputs)
    case.run(target.backend, outputs, flag=torch.ones(1, dtype=torch.int32, device=target.device))
    assert all(torch.equal(outputs[name], kept[name]) for name in kept)


@pytest.mark.parametrize("piece", [1, 2, 4])
@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize("rows", [1, 3])
def test_long_runs_of_an_id_are_cut_anywhere(emulated, piece, rows, ragged):
    """Within a sample, between two, and a sample over several pieces."""
    target = emulated("embedding_sq_", "config", lambda M, D, dtype: {"BLOCK_D": 16, "PIECE": piece, "num_warps": 1})
    case = problem(target, Shape(4, 7, 19, rows), integers=True, ragged=ragged, weighted=True, scale=2.0)
    assert_exact(case, "triton", flag=torch.zeros(1, dtype=torch.int32))


# ---- layouts


@pytest.mark.parametrize("shape", [PRIMES, Shape(5, 1, 7, 11), Shape(2, 19, 37, 67)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
@pytest.mark.parametrize("layout", [transposed, sliced, strided, expanded])
@every_target
def test_noncontiguous(target, layout, dtype, shape):
    case = problem(target, shape, dtype, integers=True)
    case = replace(case, first=layout(case.first), g=layout(case.g))
    assert_exact(case, target.backend)


@every_target
def test_writes_stay_inside(target):
    """Outputs inside larger buffers: the cells around them keep their value."""
    case = problem(target, integers=True)
    before = case.outputs(integers=True)
    buffers = {name: torch.full((value.numel() + 64,), 12345.0, device=target.device) for name, value in before.items()}
    outputs = {name: buffers[name][33 : 33 + v.numel()].view(v.shape).copy_(v) for name, v in before.items()}
    case.run(target.backend, outputs)
    assert_equal(case, before, outputs)
    for buffer in buffers.values():
        assert (buffer[:33] == 12345.0).all() and (buffer[-31:] == 12345.0).all()


@every_target
def test_int64_offsets(target):
    """Samples 2^30 elements apart, a step that fits into 32 bits, as two do not; the memory between them is never touched."""
    if target.emulated:
        pytest.skip("Triton's interpreter copies the whole storage, 4 GiB; test_divided_work.py does without")
    case = problem(target, Shape(3, 3, 5, 7), torch.bfloat16, integers=True)
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=target.device).as_strided(
        case.g.shape, (2**30, case.g.shape[-1], 1)
    )
    case = replace(case, g=far.copy_(case.g))
    assert_exact(case, target.backend)


# ---- non-finite inputs


@pytest.mark.parametrize("value", NONFINITE, ids=str)
@pytest.mark.parametrize("where", ["first", "g", "weight"])
@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@every_target
def test_flag_stops_everything(target, ragged, where, value):
    case = problem(target, dtype=torch.bfloat16, ragged=ragged, weighted=True)
    if where == "first" and target.op == "embedding_sq_":
        where = "g"  # ids are integers
    getattr(case, where).view(-1)[-1] = value
    outputs, flag = case.outputs(integers=True), torch.zeros(1, dtype=torch.int32, device=target.device)
    before = copies(outputs)
    case.run(target.backend, outputs, flag=flag)
    assert flag.item() == 1
    assert all(torch.equal(outputs[name], before[name]) for name in outputs)


@pytest.mark.parametrize("T", [1, 5], ids=["T1", "T5"])
@every_target
def test_flag_already_set(target, T):
    case = problem(target, Shape(3, T, 7, 11))
    outputs, flag = case.outputs(integers=True), torch.ones(1, dtype=torch.int32, device=target.device)
    before = copies(outputs)
    case.run(target.backend, outputs, flag=flag)
    assert flag.item() == 1
    assert all(torch.equal(outputs[name], before[name]) for name in outputs)


@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
@every_target
def test_flag_ignores_the_largest_finite_value(target, dtype):
    case = problem(target, dtype=dtype)
    case.g[-1, -1, -1] = torch.finfo(dtype).max
    flag = torch.zeros(1, dtype=torch.int32, device=target.device)
    case.run(target.backend, case.outputs(torch.float64), flag=flag)
    assert flag.item() == 0


@every_target
def test_nonfinite_propagates_without_a_flag(target):
    case = problem(target)
    case.g[0, 0, 0] = float("nan")
    outputs = case.outputs()
    case.run(target.backend, outputs)
    for name, oracle in case.answer(torch.float64).items():
        assert torch.equal(outputs[name].isnan(), oracle.isnan()), name


# ---- the call


@every_target
def test_repeats_bitwise(target):
    case = problem(target, Shape(3, 37, 67, 71), weighted=True)
    results = [case.outputs() for _ in range(3)]
    for outputs in results:
        case.run(target.backend, outputs)
    assert all(torch.equal(results[0][name], again[name]) for again in results[1:] for name in again)


@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@every_target
def test_opcheck(target, ragged):
    args, keywords = call_arguments(problem(target, ragged=ragged, weighted=True))
    args[2].requires_grad_()
    with ff.backend(target.backend):
        torch.library.opcheck(_backend.OPS[target.op].overload, args, keywords)


@every_target
def test_compiles(target):
    case = problem(target, integers=True, weighted=True)
    args, keywords = call_arguments(case)
    compiled = torch.compile(lambda *a, **k: getattr(ff.ops, target.op)(*a, **k), fullgraph=True, backend="aot_eager")
    with ff.backend(target.backend):
        compiled(*args, **keywords)
    done = {"acc": args[0], "total": keywords["total"], "sqnorm": keywords["sqnorm"]}
    assert_equal(replace(case, scale=0.5), case.outputs(), done)


@every_target
def test_inputs_may_require_grad_and_versions_advance(target):
    args, keywords = call_arguments(problem(target))
    written = [args[0], keywords["total"], keywords["sqnorm"], keywords["flag"]]
    versions = [t._version for t in written]
    args[2].requires_grad_()
    with ff.backend(target.backend):
        getattr(ff.ops, target.op)(*args, **keywords)
    assert not args[0].requires_grad
    assert all(t._version > v for t, v in zip(written, versions, strict=True))


REJECTIONS = {
    "g_axes": (lambda a, k: a.__setitem__(2, a[2][0]), ValueError, r"g must be \[N, T, [OD]\]"),
    "positions_differ": (lambda a, k: a.__setitem__(2, a[2][:, 1:].contiguous()), ValueError, r"must (share|have)"),
    "g_dtype": (lambda a, k: a.__setitem__(2, a[2].int()), TypeError, "g must be one of|one dtype"),
    "acc_dtype": (lambda a, k: a.__setitem__(0, a[0].bfloat16()), TypeError, r"acc must be one of \['float32', 'float64'\]"),
    "acc_shape": (
        lambda a, k: a.__setitem__(0, torch.zeros(2, 3)),
        ValueError,
        r"acc must be \[(O, I|D|V, D)\] = .*, got \(2, 3\)",
    ),
    "acc_strides": (lambda a, k: a.__setitem__(0, torch.zeros(*a[0].shape, 2)[..., 0]), ValueError, "acc must be contiguous"),
    "weight_dtype": (lambda a, k: k.update(weight=torch.ones(3).double()), TypeError, "weight must be one of"),
    "weight_shape": (lambda a, k: k.update(weight=torch.ones(4)), ValueError, r"weight must be \[N\] = \(3,\), got \(4,\)"),
    "total_shape": (lambda a, k: k.update(total=torch.zeros(1)), ValueError, "total must be"),
    "sqnorm_shape": (lambda a, k: k.update(sqnorm=torch.zeros(4)), ValueError, r"sqnorm must be \[N\]"),
    "flag_dtype": (lambda a, k: k.update(flag=torch.zeros(1)), TypeError, r"flag must be one of \['int32'\]"),
    "flag_shape": (lambda a, k: k.update(flag=torch.zeros(2, dtype=torch.int32)), ValueError, r"flag must be \[1\]"),
    "offsets_need_rows": (lambda a, k: k.update(offsets=torch.tensor([0, 5])), ValueError, r"with offsets g must be \[M, [OD]\]"),
    "device": (lambda a, k: k.update(weight=torch.ones(3, device="meta")), ValueError, "weight must be on acc's device"),
}


@pytest.mark.parametrize("rule", REJECTIONS)
@pytest.mark.parametrize("op", OP_NAMES)
def test_rejects(op, rule):
    spoil, kind, message = REJECTIONS[rule]
    args, keywords = call_arguments(problem(Target(op, "reference", "cpu")))
    args = list(args)
    spoil(args, keywords)
    with pytest.raises(kind, match=f"{op}: .*(?:{message})|{message}"):
        getattr(ff.ops, op)(*args, **keywords)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [(torch.tensor([0, 9, 5, 9, 15])[::2], "offsets must be contiguous"), (torch.tensor([0]), "offsets must end with M = 15")],
    ids=["strided", "no sample"],
)
@pytest.mark.parametrize("op", OP_NAMES)
def test_rejects_offsets_that_kernels_would_misread(op, offsets, message):
    case = problem(Target(op, "reference", "cpu"))
    case = replace(case, first=case.first.flatten(0, 1), g=case.g.flatten(0, 1), offsets=offsets)
    with pytest.raises(ValueError, match=message):
        case.run("reference", case.outputs())


@pytest.mark.parametrize("bounds", [[0, 9, 5, 15], [1, 5, 9, 15], [0, 5, 9, 14]], ids=["falls", "starts_late", "ends_early"])
@every_target
def test_rejects_offsets_that_do_not_cover_the_rows(target, bounds):
    if target.device == "cuda" and target.backend != "reference":
        pytest.skip("a device assertion, which ends the process' CUDA context: test_device_assertions asks in another process")
    case = problem(target)
    case = replace(case, first=case.first.flatten(0, 1), g=case.g.flatten(0, 1), offsets=torch.tensor(bounds))
    with pytest.raises((ValueError, RuntimeError), match="offsets"):
        case.run(target.backend, case.outputs())


@pytest.mark.parametrize("bad", [-1, 11])
@targets_of("embedding_sq_")
def test_rejects_ids_out_of_range(target, bad):
    if target.device == "cuda" and target.backend != "reference":
        pytest.skip("a device assertion, which ends the process' CUDA context: test_device_assertions asks in another process")
    case = problem(target)
    case.first[1, 2] = bad
    with pytest.raises((ValueError, RuntimeError), match="ids must lie in"):
        case.run(target.backend, case.outputs())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bad", ["ids", "offsets"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_device_assertions(backend, bad):
    if backend not in _backend.OPS["embedding_sq_"].usable("cuda"):
        pytest.skip(_backend.OPS["embedding_sq_"].unavailable(backend, "cuda"))
    code = f"""
import torch, fisherfast as ff
ids, offsets = torch.zeros(6, dtype=torch.int64, device="cuda"), torch.tensor([0, 3, 6], device="cuda")
{bad}[1] = 1000
with ff.backend({backend!r}):
    ff.ops.embedding_sq_(torch.zeros(5, 7, device="cuda"), ids, torch.ones(6, 7, device="cuda"), offsets=offsets)
torch.cuda.synchronize()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0 and "device-side assert" in run.stderr, run.stderr


# ---- any shape


@every_target
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.builds(Shape, st.integers(0, 6), st.integers(0, 9), st.integers(0, 40), st.integers(1, 40)),
    ragged=st.booleans(),
    weighted=st.booleans(),
    dtype=st.sampled_from(list(SHORT)),
    seed=st.integers(0, 2**31),
)
def test_any_shape_is_exact(target, shape, ragged, weighted, dtype, seed):
    torch.manual_seed(seed)
    case = problem(target, shape, dtype, integers=True, ragged=ragged, weighted=weighted, scale=2.0)
    assert_exact(case, target.backend)
