# SPDX-License-Identifier: Apache-2.0
"""The contract of ghost_norm_, asked of every backend that can run here, and where norms go by it.

The oracle is the gradient of each sample formed in float64 and squared; plain torch's float32, which sets the gate, is the same in
float32. With small integers every answer must be equal to the last bit.
"""

from __future__ import annotations

import importlib
import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from conv_cases import LAYOUTS, Geometry
from gate import passes
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import NONFINITE, Target, error
from targets import DEVICES, ISAS, SHORT, every_dtype
from torch import nn

import fisherfast as ff
from fisherfast import _backend
from fisherfast.rules import Convolution, MatMul, Rows

OP = "ghost_norm_"
ghost = importlib.import_module("fisherfast.fisher.ghost")


TARGETS = [Target(OP, backend, device) for device in DEVICES for backend in _backend.OPS[OP].usable(device)]
every_target = pytest.mark.parametrize("target", TARGETS, ids=str)


@dataclass(frozen=True)
class Case:
    x: torch.Tensor
    g: torch.Tensor
    geometry: Geometry

    @property
    def options(self) -> dict:
        shape = self.geometry
        return {"kernel": shape.K, "stride": shape.stride, "padding": shape.before, "dilation": shape.dilation}

    def patches(self, dtype: torch.dtype) -> torch.Tensor:
        """[N, C K, P], offset by offset with slices."""
        shape, x = self.geometry, self.x.to(dtype)
        if 0 in shape.P:
            return x.new_zeros(len(x), shape.C * math.prod(shape.K), 0)
        x = F.pad(F.pad(x, [max(side, 0) for side in shape.frame]), [min(side, 0) for side in shape.frame])
        u = x.new_empty(len(x), shape.C, math.prod(shape.K), math.prod(shape.P))
        for k, offsets in enumerate(itertools.product(*map(range, shape.K))):
            looks = zip(offsets, shape.axes, shape.P, strict=True)
            u[:, :, k] = x[:, :, *(slice(o * a[5], o * a[5] + (p - 1) * a[2] + 1, a[2]) for o, a, p in looks)].flatten(2)
        return u.flatten(1, 2)

    def answer(self, dtype: torch.dtype) -> torch.Tensor:
        """The squared norms [N], by the gradients; computed in ``dtype``."""
        u = self.patches(dtype)
        return (self.g.to(dtype).flatten(2) @ u.mT).square().flatten(1).sum(1)

    def size(self) -> torch.Tensor:
        u, g = self.patches(torch.float64), self.g.double().flatten(2)
        of_offset = u.unflatten(1, (self.geometry.C, math.prod(self.geometry.K))).transpose(1, 2)
        return ((of_offset.mT @ of_offset) * (g.mT @ g)[:, None]).abs().flatten(1).sum(1)

    def outputs(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Integers to add to."""
        return tuple(torch.randint(-9, 10, (len(self.x),), device=self.x.device).to(dtype) for _ in range(2))

    def run(self, target: Target, sqnorm: torch.Tensor, **more) -> torch.Tensor:
        with ff.backend(target.backend):
            ff.ops.ghost_norm_(sqnorm, self.x, self.g, **{**self.options, **more})
        return sqnorm


def case(target: Target, shape: Geometry, dtype=torch.float32, integers=False) -> Case:
    sizes = (shape.N, shape.C, *shape.S), (shape.N, shape.O, *shape.P)
    x, g = (torch.randint(-2, 3, size) if integers else torch.randn(size) for size in sizes)
    return Case(x.to(target.device, dtype), g.to(target.device, dtype), shape)


def assert_exact(target: Target, problem: Case, dtype: torch.dtype = torch.float32, **more) -> None:
    sqnorm, size = problem.outputs(dtype)
    expected = sqnorm + problem.answer(torch.float64).to(dtype), size + problem.size().to(dtype)
    problem.run(target, sqnorm, size=size, **more)
    assert torch.equal(sqnorm, expected[0]) and torch.equal(size, expected[1])


def assert_gate(target: Target, problems: list[Case], dtype: torch.dtype = torch.float32) -> None:
    """The largest error over several draws: of one draw, plain torch's may be zero by luck."""
    mine, plain = 0.0, 0.0
    for problem in problems:
        oracle = problem.answer(torch.float64)
        mine = max(mine, error(problem.run(target, torch.zeros_like(oracle, dtype=dtype)), oracle))
        plain = max(plain, error(problem.answer(torch.float32), oracle))
    assert passes(mine, plain), f"error {mine:.2e}, plain torch {plain:.2e}"


BASIC = Geometry(3, 4, 6, (5, 7), (3, 2), (1, 2), (1, 0), (1, 0))
SAME = Geometry(2, 17, 13, (11, 7), (3, 3), before=(1, 1), after=(1, 1))
SHAPES = [
    BASIC,
    SAME,
    Geometry(2, 37, 29, (19,), (1,)),  # a linear layer
    Geometry(2, 3, 2, (1,), (1,)),
    Geometry(2, 50, 20, (4, 5), (1, 1)),
    Geometry(13, 7, 5, (2, 2), (2, 2)),
    Geometry(2, 19, 3, (9, 8), (3, 3), (2, 2), (1, 1), (1, 1)),
    Geometry(3, 2, 7, (157,), (5,), (1,), (4,), (4,)),
    Geometry(2, 3, 4, (4, 3, 5), (2, 3, 2), before=(1, 1, 0), after=(1, 1, 0)),
    Geometry(2, 12, 4, (5, 5), (3, 3), dilation=(2, 1), before=(2, 1), after=(2, 1)),
    Geometry(2, 5, 5, (6, 6), (4, 4), before=(1, 1), after=(2, 2)),  # padding="same" of an even kernel
    Geometry(2, 5, 5, (9, 9), (5, 5), before=(-2, -1), after=(-2, -1)),
    Geometry(2, 6, 5, (5, 6), (1, 3), (3, 1), (0, 1), (0, 1)),
]


# ---- values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_dtype
@every_target
def test_matches_float64(target, dtype, shape):
    assert_gate(target, [case(target, shape, dtype) for _ in range(1 if target.emulated else 4)])


@every_dtype
@every_target
def test_matches_float64_with_float64_outputs(target, dtype):
    assert_gate(target, [case(target, SAME, dtype) for _ in range(1 if target.emulated else 4)], torch.float64)


@every_target
def test_float64_is_float64(target):
    problem = case(target, SAME, torch.float64)
    sqnorm = problem.run(target, torch.zeros(2, dtype=torch.float64, device=target.device))
    assert error(sqnorm, problem.answer(torch.float64)) < 1e-14


@pytest.mark.parametrize("shape", [Geometry(2, 4096, 24, (16,), (1,)), Geometry(2, 3, 700, (37,), (1,))], ids=str)
@every_target
def test_many_channels_lose_nothing(target, shape):
    assert_gate(target, [case(target, shape) for _ in range(1 if target.emulated else 4)])


# ---- exact in integers


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_target
def test_layers_are_exact(target, shape):
    flag = torch.zeros(1, dtype=torch.int32, device=target.device)
    assert_exact(target, case(target, shape, integers=True), torch.float64, flag=flag)
    assert flag.item() == 0


@every_dtype
@every_target
def test_accumulates(target, dtype):
    assert_exact(target, case(target, BASIC._replace(C=2), dtype, integers=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [BASIC, SHAPES[2], SHAPES[8]], ids=str)
@every_target
def test_noncontiguous(target, layout, shape):
    problem = case(target, shape, torch.bfloat16, integers=True)
    assert_exact(target, replace(problem, x=layout(problem.x), g=layout(problem.g)), torch.float64)


@pytest.mark.parametrize(
    "shape",
    [
        Geometry(0, 4, 3, (5, 7), (3, 2)),
        Geometry(3, 0, 3, (5, 7), (3, 2)),
        Geometry(3, 4, 0, (5, 7), (3, 2)),
        Geometry(3, 4, 3, (2, 7), (3, 2)),  # no position
        Geometry(3, 4, 3, (0, 7), (3, 2), before=(2, 0), after=(2, 0)),  # no pixel, but positions
    ],
    ids=str,
)
@every_target
def test_empty(target, shape):
    assert_exact(target, case(target, shape, integers=True))


@every_target
def test_absent_options(target):
    """A kernel of ones, and 1, 0, 1."""
    problem = case(target, Geometry(3, 6, 4, (5, 7), (1, 1)), integers=True)
    assert_exact(target, problem, torch.float64, kernel=(), stride=(), padding=(), dilation=())


@pytest.mark.parametrize("target", [t for t in TARGETS if not t.emulated], ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_geometry_is_exact(target, data):
    axes = data.draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes)))

    N, C, O = (data.draw(st.integers(0, 4)) for _ in range(3))
    S, K, stride, before, dilation = each(1, 8), each(1, 4), each(1, 3), each(-2, 3), each(1, 3)
    shape = Geometry(N, C, O, S, K, stride, before, before, dilation)
    assert_exact(target, case(target, shape, integers=True), torch.float64)


# ---- non-finite inputs


@pytest.mark.parametrize("value", NONFINITE, ids=str)
@pytest.mark.parametrize("where", ["x", "g"])
@every_target
def test_flag_stops_everything(target, where, value):
    problem = case(target, BASIC, torch.bfloat16)
    getattr(problem, where)[-1, -1, -1, -1] = value
    flag = torch.zeros(1, dtype=torch.int32, device=target.device)
    sqnorm, size = problem.outputs()
    before = sqnorm.clone(), size.clone()
    problem.run(target, sqnorm, size=size, flag=flag)
    assert flag.item() == 1 and torch.equal(sqnorm, before[0]) and torch.equal(size, before[1])


@every_target
def test_flag_already_set(target):
    problem = case(target, BASIC)
    sqnorm, _ = problem.outputs()
    before = sqnorm.clone()
    problem.run(target, sqnorm, flag=torch.ones(1, dtype=torch.int32, device=target.device))
    assert torch.equal(sqnorm, before)


@every_target
def test_nonfinite_propagates_without_a_flag(target):
    problem = case(target, SHAPES[2])
    problem.g[1, 3, 5] = math.nan
    assert problem.run(target, torch.zeros(2, device=target.device)).isnan().tolist() == [False, True]


# ---- the call


@every_target
def test_repeats_bitwise(target):
    problem = case(target, SAME._replace(N=5))
    first, *again = (problem.run(target, torch.zeros(5, device=target.device)) for _ in range(3))
    assert all(torch.equal(first, other) for other in again)


@pytest.mark.parametrize("isa", ISAS)
@every_dtype
def test_every_instruction_set_is_exact_for_any_number_of_threads(isa, dtype):
    target = Target(OP, "cpu", "cpu")
    if target not in TARGETS:
        pytest.skip("fisherfast._C is not built")
    force = torch.ops.fisherfast_cpp.cpu_isa
    best, threads = force(None), torch.get_num_threads()
    if ISAS.index(isa) > ISAS.index(best):
        pytest.skip(f"this processor has {best}, not {isa}")
    shape = Geometry(2, 37, 41, (29, 31), (3, 3), before=(1, 1), after=(1, 1))
    problem, random = case(target, shape, dtype, integers=True), case(target, shape, dtype)
    results = []
    try:
        force(isa)
        for number in (1, 3):
            torch.set_num_threads(number)
            assert_exact(target, problem, torch.float64)
            results.append(random.run(target, torch.zeros(2)))
    finally:
        torch.set_num_threads(threads)
        force(best)
    assert torch.equal(*results)


def call_arguments(problem: Case) -> tuple[tuple, dict]:
    sqnorm, size = problem.outputs()
    flag = torch.zeros(1, dtype=torch.int32, device=problem.x.device)
    return (sqnorm, problem.x, problem.g), {**problem.options, "size": size, "flag": flag}


@every_target
def test_opcheck(target):
    args, keywords = call_arguments(case(target, BASIC))
    args[1].requires_grad_()
    with ff.backend(target.backend):
        torch.library.opcheck(_backend.OPS[OP].overload, args, keywords)


@every_target
def test_compiles(target):
    problem = case(target, BASIC, integers=True)
    (sqnorm, *args), keywords = call_arguments(problem)
    expected = sqnorm + problem.answer(torch.float64).float()
    compiled = torch.compile(lambda *a, **k: ff.ops.ghost_norm_(*a, **k), fullgraph=True, backend="aot_eager")
    with ff.backend(target.backend):
        compiled(sqnorm, *args, **keywords)
    assert torch.equal(sqnorm, expected)


X, G = torch.zeros(2, 3, 5), torch.zeros(2, 4, 5)
REJECTED = {
    "g must be [N, O, *P] with 1 to 3 axes of positions, got (2, 4)": ((torch.zeros(2), X, G[..., 0]), {}, ValueError),
    "x must be [N, C, *S] with N = 2 and 1 axes, got (1, 3, 5)": ((torch.zeros(2), X[:1], G), {}, ValueError),
    "x must have g's dtype torch.float32, got torch.float64": ((torch.zeros(2), X.double(), G), {}, TypeError),
    "g must be one of ['float32', 'bfloat16', 'float16', 'float64'], got torch.int64": (
        (torch.zeros(2), X.long(), G.long()),
        {},
        TypeError,
    ),
    "sqnorm must be [N] = (2,), got (3,)": ((torch.zeros(3), X, G), {}, ValueError),
    "sqnorm must be one of ['float32', 'float64'], got torch.bfloat16": ((torch.zeros(2).bfloat16(), X, G), {}, TypeError),
    "size must be [N] = (2,), got (3,)": ((torch.zeros(2), X, G), {"size": torch.zeros(3)}, ValueError),
    "kernel, stride, padding and dilation must be empty or one integer per axis (1)": (
        (torch.zeros(2), X, G),
        {"kernel": (1, 1)},
        ValueError,
    ),
    "kernel, stride and dilation >= 1": ((torch.zeros(2), X, G), {"stride": (0,)}, ValueError),
    "stride, padding and dilation must be below 2^31": ((torch.zeros(2), X, G), {"padding": (2**31,)}, ValueError),
}


@pytest.mark.parametrize("message", REJECTED)
def test_rejects(message):
    args, keywords, kind = REJECTED[message]
    with pytest.raises(kind) as caught:
        ff.ops.ghost_norm_(*args, **keywords)
    assert str(caught.value).startswith("ghost_norm_: ") and message in str(caught.value)


# ---- of one position

ONE = torch.randn(5, 1, 37), torch.randn(5, 1, 41)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=SHORT.get)
def test_outer_products(dtype):
    rows, flag = Rows(*(one.to(dtype) for one in ONE)), torch.zeros(1, dtype=torch.int32)
    assert ghost.is_outer(MatMul(), rows) and ghost.applies(MatMul(), rows, (41, 37))
    expected = (rows.g.double().mT @ rows.inputs.double()).square().sum((1, 2))
    norms = torch.zeros(5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    ghost.add_norms(norms, MatMul(), rows, (41, 37), flag, nothing)
    assert (norms.double() / expected - 1).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-6) and flag.item() == 0


def nothing() -> torch.Tensor:
    raise AssertionError("squares are not needed")


def test_what_ghosts_do_not_take():
    T9, packed = torch.randn(2, 9, 4), torch.randn(9, 4)
    assert not ghost.applies(MatMul(), Rows(T9, T9), (4, 4))  # 81 pairs, 16 weights
    assert not ghost.applies(MatMul(), Rows(packed, packed, torch.tensor([0, 9])), (4, 4))
    images = torch.randn(2, 8, 3, 3)
    convolution = Convolution(stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    assert ghost.applies(convolution, Rows(images, images), (8, 8, 3, 3))
    assert not ghost.applies(replace(convolution, groups=2), Rows(images, images), (8, 4, 3, 3))
    assert not ghost.applies(convolution, Rows(images[:0], images[:0]), (8, 8, 3, 3))


# ---- where norms go by pairs of positions


class Layers(nn.Module):
    """Of each kind one that has fewer pairs than weights, and others that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.few = nn.Conv2d(16, 24, 3, padding=1)  # 6 x 6 positions
        self.apart = nn.Conv2d(24, 40, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(40, 40, 3, padding=1, groups=4)
        self.linear = nn.Linear(40, 48)
        self.head = nn.Linear(48, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.apart(self.few(x).tanh()).tanh())
        return self.head(self.linear(x.flatten(2).mT).tanh()).mean(1)


def counted(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of g in every call of the op."""
    calls, op = [], ghost.ghost_norm_
    monkeypatch.setattr(
        ghost, "ghost_norm_", lambda sqnorm, x, g, **more: (calls.append(tuple(g.shape)), op(sqnorm, x, g, **more))
    )
    return calls


def norms_by_autograd(model: nn.Module, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    model = model.double()
    losses = [F.cross_entropy(model(x[n : n + 1].double()), targets[n : n + 1]) for n in range(len(x))]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    return torch.stack([sum(one.square().sum() for one in gradient) for gradient in gradients])


def test_norms_of_a_model_go_by_pairs_where_these_are_fewer(monkeypatch):
    calls, model = counted(monkeypatch), Layers().eval()
    x, targets = torch.randn(5, 16, 6, 6), torch.randint(3, (5,))
    with ff.collect(model, ff.PerSampleNorm(), fisher_type="empirical") as stats:
        stats.backward(F.cross_entropy(model(x), targets, reduction="none"))
    assert set(calls) == {(5, 24, 6, 6), (5, 40, 3, 3), (5, 48, 9)}  # the head has three outputs
    torch.testing.assert_close(stats.result().squared_norms.double(), norms_by_autograd(model, x, targets), rtol=1e-6, atol=0)


class Parts(nn.Module):
    """Weights used in parts, and one stored by heads: each part has its own form."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(32, 16, 3, 3) / 12)
        self.packed = nn.Parameter(torch.randn(80, 48) / 7)
        self.heads = nn.Parameter(torch.randn(4, 40, 12) / 7)
        self.kernel2 = nn.Parameter(torch.randn(16, 24, 3, 3) / 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        few, more = F.conv2d(x, self.kernel[:24], padding=1), F.conv2d(x, self.kernel[24:, :, 1:, :2], padding=1)
        x = F.conv_transpose2d(F.conv2d(few.tanh(), self.kernel2).tanh(), self.kernel2)
        rows = torch.cat([x, few], 1).flatten(2).mT
        one, two = rows @ self.packed[:40].mT, rows @ self.packed[40:].mT
        heads = torch.einsum("ntd,hdk->nthk", one.tanh() * two, self.heads)
        return torch.stack([heads.flatten(1).mean(1), more.flatten(1).mean(1), two.flatten(1).mean(1)], 1)


def test_parts_of_weights_and_transposed_uses(monkeypatch):
    calls, model = counted(monkeypatch), Parts().eval()
    x, targets = torch.randn(4, 16, 6, 6), torch.randint(3, (4,))
    with ff.collect(model, ff.PerSampleNorm(), fisher_type="empirical") as stats:
        stats.backward(F.cross_entropy(model(x), targets, reduction="none"))
    assert len(calls) >= 4, calls
    torch.testing.assert_close(stats.result().squared_norms.double(), norms_by_autograd(model, x, targets), rtol=1e-6, atol=0)


@pytest.mark.parametrize("length", [1, 9])
def test_of_padded_samples_whatever_takes_fewer_operations(monkeypatch, length):
    """Pairs of all 12 positions, or the squares of the rows that have a gradient: one of 12, or nine."""
    calls, model = counted(monkeypatch), nn.Linear(40, 48)
    x, targets = torch.randn(4, 12, 40), torch.randint(48, (4, 12))
    targets[:, length:] = -100
    norms = ff.fisher(model, [(x, targets)], ff.PerSampleNorm(), fisher_type="empirical", progress=False).squared_norms
    assert bool(calls) == (length == 9)
    model = model.double()
    for n in range(4):
        loss = F.cross_entropy(model(x[n].double()), targets[n], reduction="sum")
        expected = sum(g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters())))
        torch.testing.assert_close(norms[n], expected, rtol=1e-6, atol=0)


def test_squares_do_not(monkeypatch):
    calls, model = counted(monkeypatch), Layers().eval()
    data = [(torch.randn(5, 16, 6, 6), torch.randint(3, (5,)))]
    ff.fisher(model, data, likelihood="categorical", fisher_type="empirical")
    assert calls == []


@pytest.mark.parametrize("cancelled", [1, 3])
def test_samples_whose_terms_cancel_are_squared_after_all(monkeypatch, cancelled):
    """Positions with one input, whose output gradients add up to next to nothing: float32 pairs would lose all digits."""
    layer = nn.Linear(64, 48, bias=False)
    x, g = torch.randn(3, 16, 64), torch.randn(3, 16, 48)
    x[:cancelled] = x[:cancelled, :1]
    g[:cancelled] -= g[:cancelled].mean(1, keepdim=True) * (1 - 1e-4)
    with ff.collect(layer, ff.PerSampleNorm(), fisher_type="empirical") as stats:
        stats.backward((layer(x) * g).flatten(1).sum(1))
    mine = stats.result().squared_norms.double()
    oracle, plain = ((g.to(t).mT @ x.to(t)).square().sum((1, 2)) for t in (torch.float64, torch.float32))
    for n in range(3):
        assert passes(error(mine[n], oracle[n]), error(plain[n], oracle[n]))
    assert error(pairs(x, g)[:cancelled], oracle[:cancelled]) > 1e-4  # what would have come out


@pytest.mark.parametrize("left", [0.3, 0.5, 0.8])
@pytest.mark.parametrize(("T", "I", "O"), [(16, 64, 48), (64, 512, 256), (8, 30, 30), (36, 192, 192)])
def test_whatever_cancels_norms_are_as_exact_as_squares(T, I, O, left):
    """Inputs that are nearly one, whose output gradients cancel to a part: on both sides of where gradients are formed."""
    layer, mine, plain = nn.Linear(I, O, bias=False), 0.0, 0.0
    for _ in range(6):
        x, g = 0.05 * torch.randn(8, T, I) + torch.randn(8, 1, I), torch.randn(8, T, O)
        g -= (1 - left) * g.mean(1, keepdim=True)
        with ff.collect(layer, ff.PerSampleNorm(), fisher_type="empirical") as stats:
            stats.backward((layer(x) * g).flatten(1).sum(1))
        oracle, float32 = ((g.to(t).mT @ x.to(t)).square().sum((1, 2)) for t in (torch.float64, torch.float32))
        mine = max(mine, float((stats.result().squared_norms / oracle - 1).abs().max()))
        plain = max(plain, float((float32 / oracle - 1).abs().max()))
    assert passes(mine, plain), f"error {mine:.2e}, plain torch {plain:.2e}"


def pairs(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    sqnorm = torch.zeros(len(x))
    ff.ops.ghost_norm_(sqnorm, x.mT, g.mT)
    return sqnorm


def test_nothing_is_counted_of_a_batch_that_is_not_finite():
    model = Layers().eval()
    x, targets = torch.randn(5, 16, 6, 6), torch.randint(3, (5,))
    stats = ff.collect(model, ff.PerSampleNorm(), fisher_type="empirical")
    with stats:
        stats.backward(F.cross_entropy(model(x), targets, reduction="none"))
    bad = x.clone()
    bad[2, 3] = math.inf
    with pytest.raises(ArithmeticError, match="Nothing of this batch was added"), stats:
        stats.backward(F.cross_entropy(model(bad), targets, reduction="none"))
    assert len(stats.result().squared_norms) == 5
