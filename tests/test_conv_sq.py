# SPDX-License-Identifier: Apache-2.0
"""The contract of conv_sq_, asked of every backend that can run here: the properties of test_ops.py, and any geometry.

The oracle is autograd through ``F.conv*d``, one sample at a time, in float64; plain torch's float32, which sets the gate,
is an einsum of the unfolded input.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conv_cases import (
    BASIC,
    LAYOUTS,
    OP,
    SHAPES,
    TARGETS,
    Geometry,
    channels_last,
    every_target,
    problem,
    same_channels,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    NONFINITE,
    Target,
    assert_equal,
    assert_exact,
    assert_gate,
    call_arguments,
    copies,
    sliced,
    strided,
)
from targets import SHORT

import fisherfast as ff
from fisherfast import _backend

# ---- values


LARGE = [  # few samples of many positions
    Geometry(2, 17, 24, (13, 11), (3, 3), (2, 1), before=(1, 1), after=(1, 1)),
    Geometry(3, 32, 9, (53,), (5,), (1,), (4,), (0,)),
    Geometry(3, 3, 4, (4, 5, 7), (2, 3, 2), before=(1, 1, 0), after=(0, 1, 1)),
    Geometry(2, 24, 32, (7, 9), (3, 3), dilation=(2, 1), before=(2, 1), after=(2, 1), groups=2),
]


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("target", [t for t in TARGETS if t.backend == "triton"], ids=str)
def test_parts_of_the_positions_are_added_before_they_are_squared(target, parts, ragged, shape, monkeypatch):
    """Also where the positions end before the last part begins, and of samples of no or of several images."""
    module = importlib.import_module("fisherfast.kernels.conv_sq")
    tiles = module.candidates

    def in_parts(groups, O, C, K, N, *rest):
        (blocks, _), *_ = tiles(groups, O, C, K, N, *rest)
        return [(blocks, N * parts)]

    monkeypatch.setattr(module, "candidates", in_parts)
    case = problem(target, shape, integers=True, ragged=ragged, weighted=True, scale=2.0)
    assert_exact(case, target.backend, flag=torch.zeros(1, dtype=torch.int32, device=target.device))
    outputs = case.outputs()
    before = copies(outputs)
    case.run(target.backend, outputs, flag=torch.ones(1, dtype=torch.int32, device=target.device))
    assert all(torch.equal(outputs[name], before[name]) for name in before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
@every_target
def test_matches_float64(target, dtype, shape):
    assert_gate(target.backend, [problem(target, shape, dtype, weighted=shape.N > 2, scale=0.3) for _ in range(3)])


@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
@every_target
def test_matches_float64_with_float64_outputs(target, dtype):
    assert_gate(target.backend, [problem(target, dtype=dtype, weighted=True, scale=0.3) for _ in range(3)], torch.float64)


@pytest.mark.parametrize("shape", [BASIC, SHAPES[7]], ids=str)
@every_target
def test_float64_is_float64(target, shape):
    case = problem(target, shape, torch.float64, scale=0.3)
    outputs = case.outputs(torch.float64)
    case.run(target.backend, outputs)
    magnitude = replace(case, first=case.first.abs(), g=case.g.abs()).answer(torch.float64)
    for name, oracle in case.answer(torch.float64).items():
        operations = 2 * math.prod(shape.P) + shape.N + math.prod(shape.parameter)  # the classical forward bound
        bound = operations * torch.finfo(torch.float64).eps * magnitude[name]
        assert ((outputs[name] - oracle).abs() <= bound).all(), name


@pytest.mark.parametrize("size", [1e-4, 300.0])
@every_target
def test_squares_are_not_rounded_to_16_bits(target, size):
    cases = [problem(target, SHAPES[1], torch.float16) for _ in range(4)]
    assert_gate(target.backend, [replace(case, g=case.g * size) for case in cases])


@pytest.mark.parametrize("shape", [Geometry(515, 2, 3, (3,), (2,)), Geometry(515, 3, 3, (3,), (2,), groups=3)], ids=str)
@every_target
def test_many_samples_lose_nothing(target, shape):
    assert_gate(target.backend, [problem(target, shape._replace(N=67) if target.emulated else shape)])


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("target", [t for t in TARGETS if t.backend != "reference"], ids=str)
def test_large_images_lose_nothing(target, groups):
    """Asked of the kernels only: oneDNN, which the reference calls, adds up thousands of positions in one chain."""
    if target.emulated:
        pytest.skip("Triton's interpreter takes minutes")
    assert_gate(target.backend, [problem(target, Geometry(2, 8, 8, (97, 83), (3, 3), groups=groups))])


# ---- options: exact in integers


@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("shape", [BASIC, SHAPES[7]], ids=str)
@every_target
def test_accumulates(target, shape, weighted, ragged, dtype):
    case = problem(target, shape, dtype, integers=True, ragged=ragged, weighted=weighted, scale=-0.5)
    assert_exact(case, target.backend, flag=torch.zeros(1, dtype=torch.int32, device=target.device))


@pytest.mark.parametrize("shape", [BASIC, SHAPES[7]], ids=str)
@pytest.mark.parametrize("asked", [(), ("total",), ("sqnorm",)], ids=["acc", "total", "sqnorm"])
@every_target
def test_outputs_are_independent(target, asked, shape):
    assert_exact(problem(target, shape, integers=True, weighted=True), target.backend, ("acc", *asked))


@pytest.mark.parametrize("shape", [BASIC, SHAPES[7]], ids=str)
@every_target
def test_output_dtypes_are_independent(target, shape):
    case = problem(target, shape, integers=True)
    outputs = case.outputs(integers=True)
    outputs["total"], outputs["sqnorm"] = outputs["total"].double(), outputs["sqnorm"].double()
    before = copies(outputs)
    case.run(target.backend, outputs)
    assert_equal(case, before, outputs)


@pytest.mark.parametrize(
    "shape",
    [
        Geometry(0, 4, 6, (5, 7), (3, 2)),
        Geometry(3, 0, 6, (5, 7), (3, 2)),
        Geometry(3, 4, 0, (5, 7), (3, 2)),
        Geometry(3, 4, 6, (2, 7), (3, 2)),  # no position
        Geometry(3, 4, 6, (0, 7), (3, 2), before=(2, 0), after=(1, 0)),  # no pixel, but positions
        Geometry(0, 4, 4, (5, 7), (3, 2), groups=4),
        Geometry(3, 4, 4, (2, 7), (3, 2), groups=4),
    ],
    ids=str,
)
@every_target
def test_empty(target, shape):
    assert_exact(problem(target, shape, integers=True), target.backend)


@every_target
def test_empty_ragged(target):
    case = problem(target, integers=True)
    offsets = torch.zeros(3, dtype=torch.int64, device=target.device)
    assert_exact(replace(case, first=case.first[:0], g=case.g[:0], offsets=offsets), target.backend)


@pytest.mark.parametrize("shape", [BASIC, SHAPES[7]], ids=str)
@every_target
def test_absent_options_are_one_zero_one(target, shape):
    bare = shape._replace(stride=(), before=(), after=(), dilation=())
    spelled = bare._replace(stride=(1, 1), before=(0, 0), dilation=(1, 1))
    case = problem(target, bare, integers=True)
    assert_exact(case, target.backend)
    assert_exact(replace(case, geometry=spelled), target.backend)


# ---- layouts


@pytest.mark.parametrize("shape", [BASIC, SHAPES[4], SHAPES[7], Geometry(1, 35, 17, (3, 18), (2, 3))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
@pytest.mark.parametrize("layout", LAYOUTS)
@every_target
def test_noncontiguous(target, layout, dtype, shape):
    case = problem(target, shape, dtype, integers=True)
    assert_exact(replace(case, first=layout(case.first), g=layout(case.g)), target.backend)


@pytest.mark.parametrize("shape", [BASIC, SHAPES[7]], ids=str)
@every_target
def test_writes_stay_inside(target, shape):
    case = problem(target, shape, integers=True)
    before = case.outputs(integers=True)
    buffers = {name: torch.full((value.numel() + 64,), 12345.0, device=target.device) for name, value in before.items()}
    outputs = {name: buffers[name][33 : 33 + v.numel()].view(v.shape).copy_(v) for name, v in before.items()}
    case.run(target.backend, outputs)
    assert_equal(case, before, outputs)
    for buffer in buffers.values():
        assert (buffer[:33] == 12345.0).all() and (buffer[-31:] == 12345.0).all()


@pytest.mark.parametrize("shape", [BASIC, SHAPES[7]._replace(N=3)], ids=str)
@every_target
def test_int64_offsets(target, shape):
    """Images 2^30 elements apart, a step that fits into 32 bits, as two do not; the memory between them is never touched."""
    if target.emulated:
        pytest.skip("Triton's interpreter copies the whole storage, 4 GiB; test_divided_work.py does without")
    case = problem(target, shape, torch.bfloat16, integers=True)
    far = torch.empty(2**31 + 2**14, dtype=torch.bfloat16, device=target.device)
    far = far.as_strided(case.g.shape, (2**30, *case.g.stride()[1:]))
    assert_exact(replace(case, g=far.copy_(case.g)), target.backend)


# ---- non-finite inputs


@pytest.mark.parametrize("value", NONFINITE, ids=str)
@pytest.mark.parametrize("where", ["first", "g", "weight"])
@pytest.mark.parametrize("layout", [torch.clone, channels_last, strided, same_channels])
@every_target
def test_flag_stops_everything(target, layout, where, value):
    case = problem(target, dtype=torch.bfloat16, weighted=True)
    getattr(case, where)[-1:].fill_(value)
    case = replace(case, first=layout(case.first), g=layout(case.g))
    outputs, flag = case.outputs(integers=True), torch.zeros(1, dtype=torch.int32, device=target.device)
    before = copies(outputs)
    case.run(target.backend, outputs, flag=flag)
    assert flag.item() == 1
    assert all(torch.equal(outputs[name], before[name]) for name in outputs)


@pytest.mark.parametrize("layout", [torch.clone, channels_last, sliced, strided])
@every_target
def test_flag_sees_every_element_and_no_other(target, layout):
    case = problem(target)
    for index in range(0, case.g.numel(), 1 if not target.emulated else 37):
        g = case.g.clone()
        g.view(-1)[index] = math.nan
        flag = torch.zeros(1, dtype=torch.int32, device=target.device)
        replace(case, g=layout(g)).run(target.backend, case.outputs(), flag=flag)
        assert flag.item() == 1, index
    flag = torch.zeros(1, dtype=torch.int32, device=target.device)
    replace(case, first=layout(case.first), g=layout(case.g)).run(target.backend, case.outputs(), flag=flag)
    assert flag.item() == 0


@every_target
def test_flag_already_set(target):
    case = problem(target)
    outputs, flag = case.outputs(integers=True), torch.ones(1, dtype=torch.int32, device=target.device)
    before = copies(outputs)
    case.run(target.backend, outputs, flag=flag)
    assert flag.item() == 1
    assert all(torch.equal(outputs[name], before[name]) for name in outputs)


@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
@every_target
def test_flag_ignores_the_largest_finite_value(target, dtype):
    case = problem(target, dtype=dtype)
    case.g.view(-1)[-1] = torch.finfo(dtype).max
    flag = torch.zeros(1, dtype=torch.int32, device=target.device)
    case.run(target.backend, case.outputs(torch.float64), flag=flag)
    assert flag.item() == 0


@pytest.mark.parametrize("shape", [Geometry(3, 4, 6, (5, 7), (3, 2)), Geometry(3, 4, 4, (5, 7), (3, 2), groups=4)], ids=str)
@every_target
def test_nonfinite_propagates_without_a_flag(target, shape):
    case = problem(target, shape)
    case.g[0, 0, 0, 0] = float("nan")
    outputs = case.outputs()
    case.run(target.backend, outputs)
    for name, oracle in case.answer(torch.float64).items():
        assert torch.equal(outputs[name].isnan(), oracle.isnan()), name


# ---- the call


@pytest.mark.parametrize("shape", [Geometry(3, 19, 37, (9, 8), (3, 3)), SHAPES[7]], ids=str)
@every_target
def test_repeats_bitwise(target, shape):
    case = problem(target, shape, weighted=True)
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
        torch.library.opcheck(_backend.OPS[OP].overload, args, keywords)


@every_target
def test_compiles(target):
    case = problem(target, integers=True, weighted=True)
    args, keywords = call_arguments(case)
    compiled = torch.compile(lambda *a, **k: ff.ops.conv_sq_(*a, **k), fullgraph=True, backend="aot_eager")
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
        ff.ops.conv_sq_(*args, **keywords)
    assert not args[0].requires_grad
    assert all(t._version > v for t, v in zip(written, versions, strict=True))


REJECTIONS = {
    "acc_axes": (lambda a, k: a.__setitem__(0, a[0][..., 0, 0].contiguous()), ValueError, r"acc must be \[O, C / groups, \*K\]"),
    "x_axes": (lambda a, k: a.__setitem__(1, a[1][0]), ValueError, r"x and g must be \[N, C, \*S\] and \[N, O, \*P\]"),
    "images_differ": (lambda a, k: a.__setitem__(2, a[2][1:]), ValueError, "must hold the same images, got 3 and 2"),
    "x_dtype": (lambda a, k: a.__setitem__(1, a[1].int()), TypeError, "x must be one of"),
    "g_dtype": (lambda a, k: a.__setitem__(2, a[2].double()), TypeError, "must have one dtype"),
    "acc_dtype": (lambda a, k: a.__setitem__(0, a[0].bfloat16()), TypeError, r"acc must be one of \['float32', 'float64'\]"),
    "acc_shape": (lambda a, k: a.__setitem__(0, torch.zeros(6, 3, 3, 2)), ValueError, r"acc must be .* got \(6, 3, 3, 2\)"),
    "acc_strides": (lambda a, k: a.__setitem__(0, torch.zeros(*a[0].shape, 2)[..., 0]), ValueError, "acc must be contiguous"),
    "stride_count": (lambda a, k: k.update(stride=(1,)), ValueError, r"must be empty or one integer per kernel axis \(2\)"),
    "stride_zero": (lambda a, k: k.update(stride=(0, 1)), ValueError, r"stride and dilation >= 1, got \[0, 1\]"),
    "dilation_zero": (lambda a, k: k.update(dilation=(1, 0)), ValueError, "stride and dilation >= 1"),
    "stride_huge": (lambda a, k: k.update(stride=(2**61, 1)), ValueError, r"must be below 2\^31, got \[2305843009213693952, 1\]"),
    "groups": (lambda a, k: k.update(groups=4), ValueError, "groups must divide C = 4 and O = 6, got 4"),
    "groups_zero": (lambda a, k: k.update(groups=0), ValueError, "groups must divide"),
    "weight_dtype": (lambda a, k: k.update(weight=torch.ones(3).double()), TypeError, "weight must be one of"),
    "weight_shape": (lambda a, k: k.update(weight=torch.ones(4)), ValueError, r"weight must be \[N\] = \(3,\), got \(4,\)"),
    "total_shape": (lambda a, k: k.update(total=torch.zeros(1)), ValueError, "total must be"),
    "sqnorm_shape": (lambda a, k: k.update(sqnorm=torch.zeros(4)), ValueError, r"sqnorm must be \[N\]"),
    "flag_dtype": (lambda a, k: k.update(flag=torch.zeros(1)), TypeError, r"flag must be one of \['int32'\]"),
    "flag_shape": (lambda a, k: k.update(flag=torch.zeros(2, dtype=torch.int32)), ValueError, r"flag must be \[1\]"),
    "offsets_axes": (
        lambda a, k: k.update(offsets=torch.zeros(1, 2, dtype=torch.int64)),
        ValueError,
        r"offsets must be \[N\+1\]",
    ),
    "offsets_dtype": (lambda a, k: k.update(offsets=torch.zeros(4)), TypeError, r"offsets must be one of \['int64'\]"),
    "device": (lambda a, k: k.update(weight=torch.ones(3, device="meta")), ValueError, "weight must be on acc's device"),
}


@pytest.mark.parametrize("rule", REJECTIONS)
def test_rejects(rule):
    spoil, kind, message = REJECTIONS[rule]
    args, keywords = call_arguments(problem(Target(OP, "reference", "cpu")))
    args = list(args)
    spoil(args, keywords)
    with pytest.raises(kind, match=f"conv_sq_: .*(?:{message})"):
        ff.ops.conv_sq_(*args, **keywords)


@every_target
def test_rejects_offsets_of_images_without_positions(target):
    if target.device == "cuda" and target.backend != "reference":
        pytest.skip("a device assertion, which ends the process' CUDA context")
    args = (torch.zeros(2, 3, 1, 1), torch.randn(12, 3, 2, 2), torch.randn(12, 2, 0, 2))
    with pytest.raises((ValueError, RuntimeError), match="offsets"), ff.backend(target.backend):
        ff.ops.conv_sq_(*(t.to(target.device) for t in args), offsets=torch.tensor([0, 4, 3, 12], device=target.device))


@pytest.mark.parametrize("bounds", [[0, 2, 1, 3], [1, 2, 2, 3], [0, 1, 2, 2]], ids=["falls", "starts_late", "ends_early"])
@every_target
def test_rejects_offsets_that_do_not_cover_the_images(target, bounds):
    if target.device == "cuda" and target.backend != "reference":
        pytest.skip("a device assertion, which ends the process' CUDA context")
    case = replace(problem(target), offsets=torch.tensor(bounds))
    with pytest.raises((ValueError, RuntimeError), match="offsets"):
        case.run(target.backend, case.outputs())


# ---- any geometry


@st.composite
def geometries(draw, most: int) -> Geometry:
    """Few pixels and channels, everything else free; often depthwise, often with the gradient's roles exchanged."""
    axes = draw(st.integers(1, 3))
    integers = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(axes))  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 2, 3, most]))
    per_group = st.sampled_from([1, 1, 2, 3, most // 2, most]) if groups < most else st.integers(1, 2)
    C, O = groups * draw(per_group), groups * draw(per_group)
    S, K = integers(1, {1: 40, 2: 9, 3: 4}[axes]), integers(1, 3)
    return Geometry(draw(st.integers(0, 4)), C, O, S, K, integers(1, 3), integers(0, 3), integers(0, 3), integers(1, 2), groups)


def assert_any_geometry(target: Target, shape: Geometry, ragged: bool, weighted: bool, last: bool, dtype, seed: int) -> None:
    torch.manual_seed(seed)
    case = problem(target, shape, dtype, integers=True, ragged=ragged, weighted=weighted, scale=2.0)
    if last:
        case = replace(case, first=channels_last(case.first), g=channels_last(case.g))
    assert_exact(case, target.backend)


OPTIONS = {
    "ragged": st.booleans(),
    "weighted": st.booleans(),
    "last": st.booleans(),
    "dtype": st.sampled_from(list(SHORT)),
    "seed": st.integers(0, 2**31),
}


@pytest.mark.parametrize("target", [t for t in TARGETS if not t.emulated], ids=str)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(shape=geometries(20), **OPTIONS)
def test_any_geometry_is_exact(target, shape, ragged, weighted, last, dtype, seed):
    assert_any_geometry(target, shape, ragged, weighted, last, dtype, seed)


@pytest.mark.parametrize("target", [t for t in TARGETS if t.emulated], ids=str)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(shape=geometries(4), **OPTIONS)
def test_any_small_geometry_is_exact(target, shape, ragged, weighted, last, dtype, seed):
    assert_any_geometry(target, shape, ragged, weighted, last, dtype, seed)


@pytest.mark.parametrize("groups", [1, 2])
@every_target
def test_transposed_convolution_exchanges_x_and_g(target, groups):
    C, O, stride, padding = 4, 6, 2, 1
    x, weight = torch.randint(-2, 3, (3, C, 4, 5)).double(), torch.zeros(C, O // groups, 3, 2, dtype=torch.float64)
    g = torch.randint(-2, 3, F.conv_transpose2d(x, weight, None, stride, padding, 1, groups).shape).double()
    exact = torch.zeros_like(weight)
    for x_n, g_n in zip(x, g, strict=True):
        w = weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.conv_transpose2d(x_n, w, None, stride, padding, 1, groups), w, g_n)
        exact += gradient.square()
    acc = torch.zeros(weight.shape, device=target.device)
    x, g = x.float().to(target.device), g.float().to(target.device)
    with ff.backend(target.backend):
        ff.ops.conv_sq_(acc, g, x, stride=(stride, stride), padding=(padding, padding), groups=groups)
    assert torch.equal(acc.cpu().double(), exact)
