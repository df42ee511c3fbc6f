# SPDX-License-Identifier: Apache-2.0
"""``gram_``'s contract, asked of every backend that can run here: the gate against float64, and exactness in small integers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from gate import error, passes, product_in
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import sliced, strided, transposed
from targets import DEVICES, SHORT, every_dtype

import fisherfast as ff
from fisherfast import _backend

TARGETS = [(backend, device) for device in DEVICES for backend in _backend.OPS["gram_"].usable(device)]
NONFINITE = (float("nan"), float("inf"), -float("inf"))
UNTOUCHED = 12345.0  # below the diagonal

every_target = pytest.mark.parametrize(("backend", "device"), TARGETS, ids=[f"{b}@{d}" for b, d in TARGETS])


@dataclass(frozen=True)
class Problem:
    """The inputs of one call."""

    x: torch.Tensor
    scale: float = 1.0
    weight: torch.Tensor | None = None
    bias: bool = False

    @property
    def D(self) -> int:
        return self.x.shape[-1] + self.bias

    def answer(self, dtype: torch.dtype) -> torch.Tensor:
        """What is to be added, computed in ``dtype`` as plain torch would."""
        rows = self.x.flatten(0, -2)
        if self.bias:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        left, right = rows, rows
        if self.weight is not None:
            left, right = rows.to(dtype) * self.weight.to(dtype).view(-1, 1), rows.to(dtype)
        return (self.scale * product_in(dtype, left.T, right)).triu()

    def acc(self, dtype: torch.dtype = torch.float32, *, integers: bool = False) -> torch.Tensor:
        """An accumulator that holds something, and elsewhere what must stay as it is."""
        held = torch.randint(-9, 10, (self.D, self.D)) if integers else torch.zeros(self.D, self.D)
        return (held.to(dtype).triu() + torch.full((self.D, self.D), UNTOUCHED, dtype=dtype).tril(-1)).to(self.x.device)

    def run(self, backend: str, acc: torch.Tensor, flag: torch.Tensor | None = None) -> None:
        with ff.backend(backend):
            ff.ops.gram_(acc, self.x, self.scale, weight=self.weight, bias=self.bias, flag=flag)


def problem(device: str, *shape: int, dtype=torch.float32, integers=False, weighted=False, **more: Any) -> Problem:
    reach = 3 if integers else 0
    x = torch.randint(-reach, reach + 1, shape).float() if integers else torch.randn(shape)
    weight = (torch.randint(-1, 3, shape[:-1]).float() if integers else torch.rand(shape[:-1])) if weighted else None
    return Problem(x.to(device, dtype), weight=None if weight is None else weight.to(device), **more)


def assert_exact(case: Problem, backend: str, dtype: torch.dtype = torch.float32, flag: torch.Tensor | None = None) -> None:
    """Integers: the sum is representable whatever its order, so it must be right to the last bit."""
    acc = case.acc(dtype, integers=True)
    expected = acc.double() + case.answer(torch.float64)
    case.run(backend, acc, flag)
    assert torch.equal(acc.double(), expected), f"differs by {acc - expected}"


def assert_gate(cases: list[Problem], backend: str, dtype: torch.dtype = torch.float32) -> None:
    """The largest error over several draws: of one draw, plain torch's may be zero by luck."""
    mine = plain = 0.0
    for case in cases:
        acc, oracle = case.acc(dtype), case.answer(torch.float64)
        case.run(backend, acc)
        mine, plain = max(mine, error(acc.triu(), oracle)), max(plain, error(case.answer(torch.float32).triu(), oracle))
    assert passes(mine, plain), f"error {mine:.2e}, plain torch {plain:.2e}"


# ---- values


SHAPES = [(7, 5), (1, 1), (3, 5, 7), (257, 131), (13, 1, 67), (2, 37, 101), (520, 49)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@every_dtype
@every_target
def test_matches_float64(backend, device, dtype, weighted, shape):
    assert_gate([problem(device, *shape, dtype=dtype, weighted=weighted, bias=weighted, scale=0.3) for _ in range(4)], backend)


@every_dtype
@every_target
def test_matches_float64_with_a_float64_accumulator(backend, device, dtype):
    assert_gate([problem(device, 300, 23, dtype=dtype, weighted=True, bias=True) for _ in range(4)], backend, torch.float64)


@every_target
def test_float64_is_float64(backend, device):
    case = problem(device, 313, 29, dtype=torch.float64, scale=0.3, bias=True)
    acc = case.acc(torch.float64)
    case.run(backend, acc)
    assert error(acc.triu(), case.answer(torch.float64)) < 1e-14


@pytest.mark.parametrize("I", [3, 40])
@every_target
def test_many_rows_lose_nothing(backend, device, I):
    """A single chain of float32 additions would miss the gate: the diagonal only grows."""
    M = 5000 if backend == "triton" and device == "cpu" else 100_003
    assert_gate([problem(device, M, I) for _ in range(3)], backend)


@every_target
def test_products_are_not_rounded_to_16_bits(backend, device):
    """1e-8 underflows and 9e4 overflows in float16."""
    for size in (1e-4, 300.0):
        cases = [problem(device, 13, 11, dtype=torch.float16) for _ in range(4)]
        assert_gate([replace(case, x=case.x * size) for case in cases], backend)


# ---- options: exact in integers


@pytest.mark.parametrize("acc", [torch.float32, torch.float64], ids=SHORT.get)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@every_dtype
@every_target
def test_adds_to_the_upper_triangle_only(backend, device, dtype, weighted, bias, acc):
    case = problem(device, 3, 5, 61, dtype=dtype, integers=True, weighted=weighted, bias=bias, scale=-0.5)
    assert_exact(case, backend, acc, torch.zeros(1, dtype=torch.int32, device=device))


@pytest.mark.parametrize("D", [47, 48, 49, 96, 97, 130])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@every_target
def test_edges_of_tiles(backend, device, bias, D):
    assert_exact(problem(device, 131, D - bias, integers=True, bias=bias), backend)


@every_target
def test_below_the_diagonal_is_not_even_read(backend, device):
    case = problem(device, 19, 53, integers=True)
    acc = case.acc(integers=True)
    lower = torch.ones_like(acc).tril(-1).bool()
    expected = acc.double() + case.answer(torch.float64)
    acc[lower] = float("nan")
    case.run(backend, acc)
    assert acc[lower].isnan().all() and torch.equal(acc[~lower].double(), expected[~lower])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 5), (3, 0, 5), (3, 5, 0)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@every_target
def test_empty(backend, device, bias, shape):
    """With bias and no features, what is left is the number of rows."""
    assert_exact(problem(device, *shape, integers=True, bias=bias), backend)


@every_dtype
@every_target
def test_rows_of_weight_zero_add_nothing(backend, device, dtype):
    case = problem(device, 4, 9, 37, dtype=dtype, weighted=True, bias=True)
    mask = torch.rand(4, 9, device=device) < 0.5
    kept = replace(case, x=case.x * mask.unsqueeze(-1), weight=mask.float())
    spoiled = replace(kept, x=torch.where(mask.unsqueeze(-1), case.x, torch.finfo(dtype).max))
    results = [case.acc(), case.acc()]
    kept.run(backend, results[0])
    spoiled.run(backend, results[1])
    assert torch.equal(*results)


# ---- layouts


def images(t: torch.Tensor) -> torch.Tensor:
    """Positions lie together, as in a convolution's channels-first maps."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def expanded(t: torch.Tensor) -> torch.Tensor:
    """Stride 0 along the rows."""
    return t[..., :1, :].expand(t.shape)


@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 7), (5, 1, 7), (2, 150, 67), (37, 17, 51)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("layout", [transposed, images, sliced, strided, expanded])
@every_target
def test_noncontiguous(backend, device, layout, weighted, dtype, shape):
    case = problem(device, *shape, dtype=dtype, integers=True, weighted=weighted, bias=True)
    assert_exact(replace(case, x=layout(case.x)), backend)


@every_target
def test_int64_offsets(backend, device):
    """Samples 2^30 elements apart, a step that fits into 32 bits, as two do not; the memory between them is never touched."""
    if backend == "triton" and device == "cpu":
        pytest.skip("Triton's interpreter copies the whole storage, 4 GiB; test_divided_work.py does without")
    case = problem(device, 3, 3, 5, dtype=torch.bfloat16, integers=True)
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device).as_strided(case.x.shape, (2**30, 5, 1))
    assert_exact(replace(case, x=far.copy_(case.x)), backend)


@every_target
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.one_of(
        st.tuples(st.integers(0, 150), st.integers(0, 70)),
        st.tuples(st.integers(0, 6), st.integers(0, 40), st.integers(0, 70)),
    ),
    weighted=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from(list(SHORT)),
    acc=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_is_exact(backend, device, shape, weighted, bias, dtype, acc, seed):
    torch.manual_seed(seed)
    case = problem(device, *shape, dtype=dtype, integers=True, weighted=weighted, bias=bias, scale=2.0)
    assert_exact(case, backend, acc)


# ---- non-finite inputs


@pytest.mark.parametrize("value", NONFINITE, ids=str)
@pytest.mark.parametrize("where", ["x", "weight"])
@every_target
def test_flag_stops_everything(backend, device, where, value):
    case = problem(device, 3, 5, 7, dtype=torch.bfloat16, weighted=True, bias=True)
    getattr(case, where).view(-1)[-1] = value
    acc, flag = case.acc(integers=True), torch.zeros(1, dtype=torch.int32, device=device)
    before = acc.clone()
    case.run(backend, acc, flag)
    assert flag.item() == 1 and torch.equal(acc, before)


@every_target
def test_flag_is_raised_by_a_row_of_weight_zero(backend, device):
    case = problem(device, 5, 7, weighted=True)
    case.x[3, 2], case.weight[3] = float("nan"), 0.0
    acc, flag = case.acc(integers=True), torch.zeros(1, dtype=torch.int32, device=device)
    before = acc.clone()
    case.run(backend, acc, flag)
    assert flag.item() == 1 and torch.equal(acc, before)


@every_target
def test_flag_already_set(backend, device):
    case = problem(device, 3000, 7, bias=True)
    acc, flag = case.acc(integers=True), torch.ones(1, dtype=torch.int32, device=device)
    before = acc.clone()
    case.run(backend, acc, flag)
    assert flag.item() == 1 and torch.equal(acc, before)


@every_target
def test_nonfinite_propagates_without_a_flag(backend, device):
    case = problem(device, 5, 7)
    case.x[1, 2] = float("nan")
    acc = case.acc()
    case.run(backend, acc)
    assert torch.equal(acc.isnan(), case.answer(torch.float64).isnan() & torch.ones_like(acc).triu().bool())


# ---- the call


@every_target
def test_repeats_bitwise(backend, device):
    case = problem(device, 1031, 67, weighted=True, bias=True)
    results = [case.acc() for _ in range(2)]
    for acc in results:
        case.run(backend, acc)
    assert all(torch.equal(results[0], again) for again in results[1:])


def call_arguments(case: Problem) -> tuple[list, dict]:
    flag = torch.zeros(1, dtype=torch.int32, device=case.x.device)
    return [case.acc(), case.x, 0.5], {"weight": case.weight, "bias": case.bias, "flag": flag}


@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 7)], ids=str)
@every_target
def test_opcheck(backend, device, shape):
    args, keywords = call_arguments(problem(device, *shape, weighted=True, bias=True))
    args[1].requires_grad_()
    with ff.backend(backend):
        torch.library.opcheck(_backend.OPS["gram_"].overload, tuple(args), keywords)


@every_target
def test_compiles_to_one_node(backend, device):
    case = problem(device, 3, 5, 7, integers=True, weighted=True, bias=True, scale=0.5)
    args, keywords = call_arguments(case)
    nodes = []

    def count(module, inputs):
        nodes.extend(n for n in module.graph.nodes if n.op == "call_function")
        return module

    compiled = torch.compile(lambda *a, **k: ff.ops.gram_(*a, **k), fullgraph=True, backend=count)
    with ff.backend(backend):
        compiled(*args, **keywords)
    assert len(nodes) == 1
    assert torch.equal(args[0].double(), case.acc().double() + case.answer(torch.float64))


@every_target
def test_inputs_may_require_grad_and_versions_advance(backend, device):
    args, keywords = call_arguments(problem(device, 3, 5, 7))
    written = [args[0], keywords["flag"]]
    versions = [t._version for t in written]
    args[1].requires_grad_()
    with ff.backend(backend):
        ff.ops.gram_(*args, **keywords)
    assert not args[0].requires_grad
    assert all(t._version > v for t, v in zip(written, versions, strict=True))


REJECTIONS = {
    "x_axes": (lambda a, k: a.__setitem__(1, a[1][0, 0]), ValueError, r"x must be \[M, I\] or \[N, T, I\], got \(7,\)"),
    "x_dtype": (lambda a, k: a.__setitem__(1, a[1].int()), TypeError, "x must be one of"),
    "acc_dtype": (lambda a, k: a.__setitem__(0, a[0].bfloat16()), TypeError, r"acc must be one of \['float32', 'float64'\]"),
    "acc_shape": (lambda a, k: k.update(bias=False), ValueError, r"acc must be \[I, I\] = \(7, 7\), got \(8, 8\)"),
    "acc_bias": (
        lambda a, k: a.__setitem__(0, torch.zeros(7, 7)),
        ValueError,
        r"acc must be \[I \+ 1, I \+ 1\] = \(8, 8\), got \(7, 7\)",
    ),
    "acc_strides": (lambda a, k: a.__setitem__(0, a[0].T), ValueError, "acc must be contiguous"),
    "weight_dtype": (lambda a, k: k.update(weight=k["weight"].double()), TypeError, "weight must be one of"),
    "weight_shape": (lambda a, k: k.update(weight=torch.ones(3)), ValueError, r"weight must be \[N, T\] = \(3, 5\), got \(3,\)"),
    "flag_dtype": (lambda a, k: k.update(flag=torch.zeros(1)), TypeError, r"flag must be one of \['int32'\]"),
    "flag_shape": (lambda a, k: k.update(flag=torch.zeros(2, dtype=torch.int32)), ValueError, r"flag must be \[1\]"),
    "device": (lambda a, k: k.update(weight=torch.ones(3, 5, device="meta")), ValueError, "weight must be on acc's device"),
}


@pytest.mark.parametrize("rule", REJECTIONS)
def test_rejects(rule):
    spoil, kind, message = REJECTIONS[rule]
    args, keywords = call_arguments(problem("cpu", 3, 5, 7, weighted=True, bias=True))
    spoil(args, keywords)
    with pytest.raises(kind, match=f"gram_: {message}"):
        ff.ops.gram_(*args, **keywords)
