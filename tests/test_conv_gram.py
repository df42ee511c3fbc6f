# SPDX-License-Identifier: Apache-2.0
"""The contract of conv_gram_, asked of every backend that can run here, of the CPU's twice: once by each of its routes.

The oracle is the unfolded input's product in float64, the unfolding done offset by offset with slices; plain torch's
float32, which sets the gate, is the same in float32. With small integers every answer must be equal to the last bit.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conv_cases import LAYOUTS, Geometry, channels_last, same_channels
from gate import passes, product_in
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import NONFINITE, error, sliced, strided
from targets import DEVICES, ISAS, SHORT

import fisherfast as ff
from fisherfast import _backend

OP = "conv_gram_"
SENTINEL = 12345.0


class Target(NamedTuple):
    """Where the op runs, and by which of the CPU's routes."""

    backend: str
    device: str
    route: str = "cheapest"

    @property
    def emulated(self) -> bool:
        return self.backend == "triton" and self.device == "cpu"

    @property
    def problems(self) -> int:
        """Of which the worst is compared; Triton's interpreter takes seconds for one."""
        return 1 if self.emulated else 3

    def __str__(self) -> str:
        name = self.backend if self.route == "cheapest" else f"{self.backend}-{self.route}"
        return name if self.device == "cpu" else f"{name}@{self.device}"


def targets() -> list[Target]:
    usable = [Target(backend, device) for device in DEVICES for backend in _backend.OPS[OP].usable(device)]
    routes = [Target("cpu", "cpu", route) for route in ("shifted", "unfolded")] if Target("cpu", "cpu") in usable else []
    return [*usable, *routes]


TARGETS = targets()
every_target = pytest.mark.parametrize("target", TARGETS, ids=str)


@dataclass(frozen=True)
class Case:
    x: torch.Tensor
    geometry: Geometry
    scale: float = 1.0
    weight: torch.Tensor | None = None
    bias: bool = False

    @property
    def size(self) -> tuple[int, int, int]:
        D = self.geometry.C // self.geometry.groups * math.prod(self.geometry.K) + self.bias
        return self.geometry.groups, D, D

    @property
    def options(self) -> dict:
        shape = self.geometry
        given = {"kernel": shape.K, "positions": shape.P, "stride": shape.stride, "padding": shape.before}
        return {**given, "dilation": shape.dilation, "groups": shape.groups, "weight": self.weight, "bias": self.bias}

    def answer(self, dtype: torch.dtype) -> torch.Tensor:
        """What is to be added, [G, D, D], its lower triangle included; computed in ``dtype``."""
        shape = self.geometry
        if 0 in shape.P:
            return torch.zeros(self.size, dtype=dtype, device=self.x.device)
        grown = F.pad(self.x, [max(side, 0) for side in shape.frame])
        x = F.pad(grown, [min(side, 0) for side in shape.frame])
        u = x.new_empty(len(x), shape.C, math.prod(shape.K), math.prod(shape.P))
        for k, offsets in enumerate(itertools.product(*map(range, shape.K))):
            look = zip(offsets, shape.axes, shape.P, strict=True)
            u[:, :, k] = x[:, :, *(slice(o * a[5], o * a[5] + (p - 1) * a[2] + 1, a[2]) for o, a, p in look)].flatten(2)
        u = u.unflatten(1, (shape.groups, shape.C // shape.groups)).flatten(2, 3)
        if self.bias:
            u = torch.cat([u, u.new_ones(*u.shape[:2], 1, u.shape[3])], 2)
        left, right = u, u
        if self.weight is not None:
            left, right = u.to(dtype) * self.weight.to(dtype).view(-1, 1, 1, 1), u.to(dtype)
        left, right = (v.permute(1, 2, 0, 3).flatten(2) for v in (left, right))
        return self.scale * product_in(dtype, left, right.mT)

    def acc(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Integers to add to; below the diagonal what nobody may touch."""
        acc = torch.randint(-9, 10, self.size).to(dtype)
        return torch.where(upper(acc), acc, torch.tensor(SENTINEL, dtype=dtype)).to(self.x.device)

    def run(self, target: Target, acc: torch.Tensor, **more) -> torch.Tensor:
        with ff.backend(target.backend):
            if target.backend != "cpu":
                ff.ops.conv_gram_(acc, self.x, self.scale, **{**self.options, **more})
                return acc
            route = torch.ops.fisherfast_cpp.conv_gram_route
            try:
                assert route(target.route) == target.route
                ff.ops.conv_gram_(acc, self.x, self.scale, **{**self.options, **more})
            finally:
                route("cheapest")
        return acc


def upper(acc: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(acc, dtype=torch.bool).triu()


def case(target: Target, shape: Geometry, dtype=torch.float32, *, integers=False, weighted=False, bias=False, scale=1.0) -> Case:
    size = (shape.N, shape.C, *shape.S)
    x = torch.randint(-2, 3, size) if integers else torch.randn(size)
    weight = torch.randint(-1, 3, (shape.N,)).float() if integers else torch.rand(shape.N)
    weight = weight.to(target.device) if weighted else None
    return Case(x.to(target.device, dtype), shape, scale, weight, bias)


def assert_exact(target: Target, problem: Case, dtype: torch.dtype = torch.float32, **more) -> None:
    acc = problem.acc(dtype)
    before = acc.clone()
    problem.run(target, acc, **more)
    expected = torch.where(upper(acc), before + problem.answer(torch.float64).to(dtype), before)
    assert torch.equal(acc, expected), f"differs by {(acc - expected).abs().max()}"


def assert_gate(target: Target, problems: list[Case], dtype: torch.dtype = torch.float32) -> None:
    """The largest error over several draws: of one draw, plain torch's may be zero by luck."""
    mine, plain = 0.0, 0.0
    for problem in problems:
        oracle = problem.answer(torch.float64).triu()
        mine = max(mine, error(problem.run(target, torch.zeros(problem.size, dtype=dtype, device=oracle.device)), oracle))
        plain = max(plain, error(problem.answer(torch.float32).triu(), oracle))
    assert passes(mine, plain), f"error {mine:.2e}, plain torch {plain:.2e}"


BASIC = Geometry(3, 4, 0, (5, 7), (3, 2), (1, 2), (1, 0), (1, 1))
SAME = Geometry(2, 17, 0, (11, 7), (3, 3), before=(1, 1), after=(1, 1))
SHAPES = [
    BASIC,
    SAME,
    Geometry(2, 3, 0, (1,), (1,)),
    Geometry(2, 50, 0, (4, 5), (1, 1)),
    Geometry(13, 7, 0, (2, 2), (2, 2)),
    Geometry(2, 19, 0, (9, 8), (3, 3), (2, 2), (1, 1), (1, 1)),
    Geometry(3, 2, 0, (157,), (5,), (1,), (4,), (0,)),
    Geometry(2, 3, 0, (4, 3, 5), (2, 3, 2), before=(1, 1, 0), after=(0, 1, 1)),
    Geometry(2, 24, 0, (6, 6), (3, 3), before=(1, 1), after=(1, 1), groups=24),
    Geometry(2, 12, 0, (5, 5), (3, 3), dilation=(2, 1), before=(2, 1), after=(2, 1), groups=4),
    Geometry(2, 5, 0, (6, 6), (4, 4), before=(1, 1), after=(2, 2)),  # padding="same" of an even kernel
    Geometry(2, 5, 0, (9, 9), (5, 5), before=(-2, -1), after=(-1, 0)),
]


# ---- values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
@every_target
def test_matches_float64(target, dtype, shape):
    assert_gate(
        target, [case(target, shape, dtype, weighted=shape.N > 2, bias=shape.N > 2, scale=0.3) for _ in range(target.problems)]
    )


@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
@every_target
def test_matches_float64_with_float64_outputs(target, dtype):
    assert_gate(target, [case(target, SAME, dtype, weighted=True, scale=0.3) for _ in range(target.problems)], torch.float64)


@every_target
def test_float64_is_float64(target):
    problem = case(target, SAME, torch.float64, weighted=True, bias=True)
    acc = problem.run(target, torch.zeros(problem.size, dtype=torch.float64, device=target.device))
    assert error(acc, problem.answer(torch.float64).triu()) < 1e-14


@every_target
def test_heavy_borders_lose_nothing(target):
    """A sum of all pixels less that of the border would lose the digits of what is left."""
    problem = case(target, SAME._replace(C=5))
    problem.x[..., 1:-1, 1:-1] *= 1e-3
    assert_gate(target, [problem])
    oracle = problem.answer(torch.float64)[0].view(5, 9, 5, 9)
    acc = problem.run(target, torch.zeros(problem.size, device=target.device))[0].view(5, 9, 5, 9)
    # The last offset sees neither the first row nor the first column, the first offset not the last ones: two corners are left.
    assert error(acc[0, 0, 0, 8], oracle[0, 0, 0, 8]) < 1e-5


@pytest.mark.parametrize(
    "shape", [Geometry(2, 9, 0, (97, 83), (3, 3), before=(1, 1), after=(1, 1)), Geometry(2, 24, 0, (5000,), (1,))], ids=str
)
@pytest.mark.parametrize("target", [t for t in TARGETS if not t.emulated], ids=str)
def test_large_images_lose_nothing(target, shape):
    """Images of more pixels than are brought at a time: bands that see beyond their ends."""
    assert_gate(target, [case(target, shape, bias=True)])


# ---- options: exact in integers


@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("shape", [BASIC, SHAPES[3], SHAPES[9]], ids=str)
@every_target
def test_accumulates(target, shape, weighted, bias, dtype):
    problem = case(target, shape, dtype, integers=True, weighted=weighted, bias=bias, scale=-0.5)
    assert_exact(target, problem, flag=torch.zeros(1, dtype=torch.int32, device=target.device))
    assert_exact(target, problem, torch.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_target
def test_layers_are_exact(target, shape):
    assert_exact(target, case(target, shape, integers=True, bias=True))


@pytest.mark.parametrize(
    "bands",
    [(3, 5, (70, 61), (3, 3)), (2, 3, (2, 4000), (2, 3)), (2, 3, (4000,), (3,)), (1, 2, (40, 11, 10), (3, 1, 2))],
    ids=str,
)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("target", [t for t in TARGETS if not t.emulated], ids=str)
def test_bands_are_exact(target, bands, stride):
    N, C, S, K = bands
    each, steps = len(S) * (1,), len(S) * (stride,)
    assert_exact(target, case(target, Geometry(N, C, 0, S, K, steps, each, each), integers=True, weighted=True, bias=True))


LAID_OUT = [BASIC, SHAPES[3], SHAPES[8], Geometry(1, 35, 0, (3, 18), (2, 3))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", LAID_OUT, ids=str)
@every_target
def test_noncontiguous(target, layout, shape):
    problem = case(target, shape, integers=True)
    assert_exact(target, replace(problem, x=layout(problem.x)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=SHORT.get)
@pytest.mark.parametrize(
    ("target", "shape"), [(t, s) for t in TARGETS for s in (LAID_OUT[:2] if t.emulated else LAID_OUT)], ids=str
)
def test_noncontiguous_in_16_bits(target, layout, dtype, shape):
    problem = case(target, shape, dtype, integers=True)
    assert_exact(target, replace(problem, x=layout(problem.x)))


@pytest.mark.parametrize(
    "shape",
    [
        Geometry(0, 4, 0, (5, 7), (3, 2)),
        Geometry(3, 0, 0, (5, 7), (3, 2)),
        Geometry(3, 4, 0, (2, 7), (3, 2)),  # no position
        Geometry(3, 4, 0, (0, 7), (3, 2), before=(2, 0), after=(1, 0)),  # no pixel, but positions
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@every_target
def test_empty(target, shape, bias):
    assert_exact(target, case(target, shape, integers=True, weighted=True, bias=bias))


@every_target
def test_absent_options(target):
    """A kernel of ones, the standard positions, and 1, 0, 1: the Gram matrix over images and positions."""
    problem = case(target, Geometry(3, 6, 0, (5, 7), (1, 1), groups=2), integers=True)
    absent = dict.fromkeys(("kernel", "positions", "stride", "padding", "dilation"), ())
    assert_exact(target, problem, **absent)
    rows = problem.x.double().unflatten(1, (2, 3)).permute(1, 2, 0, 3, 4).flatten(2)
    assert torch.equal(problem.answer(torch.float64), rows @ rows.mT)
    spelled = case(target, Geometry(2, 3, 0, (8, 9), (3, 2), (2, 3), (1, 1), (1, 1), (2, 1)), integers=True)
    assert_exact(target, spelled, positions=())


@every_target
def test_writes_stay_inside(target):
    problem = case(target, SAME, integers=True, bias=True)
    buffer = torch.full((math.prod(problem.size) + 64,), SENTINEL, device=target.device)
    acc = buffer[33:-31].view(problem.size).zero_()
    problem.run(target, acc)
    assert torch.equal(acc.double(), problem.answer(torch.float64).triu())
    assert (buffer[:33] == SENTINEL).all() and (buffer[-31:] == SENTINEL).all()


@every_target
def test_int64_offsets(target):
    """Images 2^30 elements apart, a step that fits into 32 bits, as two do not; the memory between them is never touched."""
    if target.emulated:
        pytest.skip("Triton's interpreter copies the whole storage, 4 GiB; test_divided_work.py does without")
    problem = case(target, BASIC._replace(N=3), torch.bfloat16, integers=True)
    far = torch.empty(2**31 + 2**14, dtype=torch.bfloat16, device=target.device)
    far = far.as_strided(problem.x.shape, (2**30, *problem.x.stride()[1:]))
    assert_exact(target, replace(problem, x=far.copy_(problem.x)))


# ---- non-finite inputs


@pytest.mark.parametrize("value", NONFINITE, ids=str)
@pytest.mark.parametrize("where", ["x", "weight"])
@pytest.mark.parametrize("layout", [torch.clone, channels_last, sliced, strided, same_channels])
@every_target
def test_flag_stops_everything(target, layout, where, value):
    problem = case(target, BASIC, torch.bfloat16, weighted=True, bias=True)
    getattr(problem, where)[-1:].fill_(value)
    problem = replace(problem, x=layout(problem.x))
    acc, flag = problem.acc(), torch.zeros(1, dtype=torch.int32, device=target.device)
    before = acc.clone()
    problem.run(target, acc, flag=flag)
    assert flag.item() == 1 and torch.equal(acc, before)


@every_target
def test_flag_already_set(target):
    problem = case(target, BASIC, bias=True)
    acc, flag = problem.acc(), torch.ones(1, dtype=torch.int32, device=target.device)
    before = acc.clone()
    problem.run(target, acc, flag=flag)
    assert flag.item() == 1 and torch.equal(acc, before)


@every_target
def test_nonfinite_propagates_without_a_flag(target):
    """To every product of numbers; whether 0 outside of x times NaN is NaN is left open."""
    problem = case(target, BASIC._replace(before=(0, 0), after=(0, 0)))
    problem.x[0, 0, 2, 2] = math.nan
    acc = problem.run(target, torch.zeros(problem.size, device=target.device))
    assert torch.equal(acc.isnan(), problem.answer(torch.float64).isnan() & upper(acc))


# ---- the call


@every_target
def test_repeats_bitwise(target):
    problem = case(target, Geometry(3, 19, 0, (9, 8), (3, 3)), weighted=True)
    first, *again = (problem.run(target, torch.zeros(problem.size, device=target.device)) for _ in range(3))
    assert all(torch.equal(first, other) for other in again)


@pytest.mark.parametrize("route", ["shifted", "unfolded"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=SHORT.get)
def test_every_instruction_set_is_exact_for_any_number_of_threads(isa, route, dtype):
    target = Target("cpu", "cpu", route)
    if target not in TARGETS:
        pytest.skip("fisherfast._C is not built")
    force = torch.ops.fisherfast_cpp.cpu_isa
    best, threads = force(None), torch.get_num_threads()
    if ISAS.index(isa) > ISAS.index(best):
        pytest.skip(f"this processor has {best}, not {isa}")
    problem = case(
        target, Geometry(3, 37, 0, (29, 31), (3, 3), before=(1, 1), after=(1, 1)), dtype, integers=True, weighted=True, bias=True
    )
    random = replace(problem, x=torch.randn_like(problem.x))
    try:
        force(isa)
        results = []
        for number in (1, 3):
            torch.set_num_threads(number)
            assert_exact(target, problem)
            results.append(random.run(target, torch.zeros(random.size)))
    finally:
        torch.set_num_threads(threads)
        force(best)
    assert torch.equal(*results)


def call_arguments(problem: Case) -> tuple[tuple, dict]:
    flag = torch.zeros(1, dtype=torch.int32, device=problem.x.device)
    return (problem.acc(), problem.x, 0.5), {**problem.options, "flag": flag}


@every_target
def test_opcheck(target):
    args, keywords = call_arguments(case(target, BASIC, weighted=True, bias=True))
    args[1].requires_grad_()
    with ff.backend(target.backend):
        torch.library.opcheck(_backend.OPS[OP].overload, args, keywords)


@every_target
def test_compiles(target):
    problem = replace(case(target, BASIC, integers=True, weighted=True), scale=0.5)
    (acc, *args), keywords = call_arguments(problem)
    before = acc.clone()
    compiled = torch.compile(lambda *a, **k: ff.ops.conv_gram_(*a, **k), fullgraph=True, backend="aot_eager")
    with ff.backend(target.backend):
        compiled(acc, *args, **keywords)
    assert torch.equal(acc, torch.where(upper(acc), before + problem.answer(torch.float64).float(), before))


@every_target
def test_inputs_may_require_grad_and_versions_advance(target):
    args, keywords = call_arguments(case(target, BASIC, weighted=True))
    written = [args[0], keywords["flag"]]
    versions = [t._version for t in written]
    args[1].requires_grad_()
    with ff.backend(target.backend):
        ff.ops.conv_gram_(*args, **keywords)
    assert not args[0].requires_grad
    assert all(t._version > v for t, v in zip(written, versions, strict=True))


REJECTIONS = {
    "x_axes": (lambda a, k: a.__setitem__(1, a[1][..., 0, 0]), ValueError, r"x must be \[N, C, \*S\]"),
    "x_dtype": (lambda a, k: a.__setitem__(1, a[1].int()), TypeError, "x must be one of"),
    "acc_dtype": (lambda a, k: a.__setitem__(0, a[0].bfloat16()), TypeError, r"acc must be one of \['float32', 'float64'\]"),
    "acc_shape": (
        lambda a, k: a.__setitem__(0, torch.zeros(24, 24)),
        ValueError,
        r"acc must be \[groups, D, D\] .* got \(24, 24\)",
    ),
    "acc_strides": (lambda a, k: a.__setitem__(0, a[0].mT), ValueError, "acc must be contiguous"),
    "bias_grows_acc": (lambda a, k: k.update(bias=True), ValueError, r"\(1, 25, 25\), got \(1, 24, 24\)"),
    "kernel_count": (lambda a, k: k.update(kernel=(3,)), ValueError, r"must be empty or one integer per axis \(2\)"),
    "kernel_zero": (lambda a, k: k.update(kernel=(3, 0)), ValueError, r"kernel, stride and dilation >= 1.* kernel=\[3, 0\]"),
    "positions_count": (lambda a, k: k.update(positions=(1, 1, 1)), ValueError, r"positions=\[1, 1, 1\]"),
    "positions_negative": (lambda a, k: k.update(positions=(1, -1)), ValueError, "positions >= 0"),
    "stride_zero": (lambda a, k: k.update(stride=(0, 1)), ValueError, r"stride=\[0, 1\]"),
    "dilation_zero": (lambda a, k: k.update(dilation=(1, 0)), ValueError, r"dilation=\[1, 0\]"),
    "padding_huge": (lambda a, k: k.update(padding=(0, -(2**61))), ValueError, r"must be below 2\^31"),
    "groups": (lambda a, k: k.update(groups=3), ValueError, "groups must divide C = 4, got 3"),
    "groups_zero": (lambda a, k: k.update(groups=0), ValueError, "groups must divide"),
    "weight_dtype": (lambda a, k: k.update(weight=torch.ones(3).double()), TypeError, "weight must be one of"),
    "weight_shape": (lambda a, k: k.update(weight=torch.ones(4)), ValueError, r"weight must be \[N\] = \(3,\), got \(4,\)"),
    "flag_dtype": (lambda a, k: k.update(flag=torch.zeros(1)), TypeError, r"flag must be one of \['int32'\]"),
    "flag_shape": (lambda a, k: k.update(flag=torch.zeros(2, dtype=torch.int32)), ValueError, r"flag must be \[1\]"),
    "device": (lambda a, k: k.update(weight=torch.ones(3, device="meta")), ValueError, "weight must be on acc's device"),
}


@pytest.mark.parametrize("rule", REJECTIONS)
def test_rejects(rule):
    spoil, kind, message = REJECTIONS[rule]
    args, keywords = call_arguments(case(Target("reference", "cpu"), BASIC))
    args = list(args)
    spoil(args, keywords)
    with pytest.raises(kind, match=f"conv_gram_: .*{message}"):
        ff.ops.conv_gram_(*args, **keywords)


# ---- the choice between the CPU's routes


def work(C, S, K, stride=1, padding=0) -> tuple[int, int]:
    P = (S + 2 * padding - K) // stride + 1
    return tuple(torch.ops.fisherfast_cpp.conv_gram_work([S, S], C, [K, K], [P, P], [stride] * 2, [padding] * 2, [1, 1]))


@pytest.mark.skipif(Target("cpu", "cpu") not in TARGETS, reason="fisherfast._C is not built")
def test_work_is_what_is_multiplied():
    """Of 48 channels, 6 tiles of 8 rows by 3 vectors; a shift by D leaves S - |D| pixels of an axis, cut where windows end."""
    tile, bring = 8 * 3 + 5, 48 * 16 * 16 * 3
    assert work(48, 16, 1)[0] == bring + 16 * 16 * 6 * tile + 16 * (16 * 6 + 48)
    axis, pieces = {D: 16 - abs(D) for D in (-2, -1, 0, 1, 2)}, {D: 3 if D == 0 else 1 for D in (-2, -1, 0, 1, 2)}
    shifts = [(a, b) for a in axis for b in axis if (a, b) >= (0, 0)]
    runs = sum(axis[a] * pieces[b] for a, b in shifts)
    pixels = sum(axis[a] * axis[b] for a, b in shifts)
    assert work(48, 16, 3, padding=1)[0] == bring + pixels * 6 * tile + runs * (16 * 6 + 48)
    assert work(48, 16, 3, padding=1)[1] == 16 * 16 * (7 * 432 + sum(tile * (6 * j + 6) for j in range(9)))


@pytest.mark.skipif(Target("cpu", "cpu") not in TARGETS, reason="fisherfast._C is not built")
@pytest.mark.parametrize(
    ("layer", "shifted"),
    [
        ((96, 32, 3, 1, 1), True),
        ((512, 4, 3, 1, 1), True),
        ((96, 32, 3, 2, 1), True),
        ((64, 32, 1), True),
        ((64, 32, 1, 2), False),
        ((4, 32, 3, 1, 1), True),
        ((3, 32, 3, 1, 1), False),
        ((3, 224, 7, 2, 3), False),
        ((1, 32, 3, 1, 1), False),
    ],
)
def test_the_cheaper_route_is_shifts_where_channels_fill_a_panel(layer, shifted):
    by_shifts, unfolded = work(*layer)
    assert (by_shifts <= unfolded) == shifted


@pytest.mark.skipif(Target("cpu", "cpu") not in TARGETS, reason="fisherfast._C is not built")
def test_route_rejects_unknown_names():
    with pytest.raises((ValueError, RuntimeError), match="conv_gram_route: force must be"):
        torch.ops.fisherfast_cpp.conv_gram_route("fastest")


# ---- any geometry


@st.composite
def geometries(draw, most: int) -> Geometry:
    """Few pixels and channels, everything else free."""
    axes = draw(st.integers(1, 3))
    integers = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(axes))  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    C = groups * draw(st.sampled_from([1, 2, 3, most // 2, most]))
    S, K = integers(1, {1: 40, 2: 9, 3: 4}[axes]), integers(1, 4)
    return Geometry(draw(st.integers(0, 4)), C, 0, S, K, integers(1, 4), integers(-1, 3), integers(0, 3), integers(1, 3), groups)


def assert_any_geometry(target: Target, shape: Geometry, weighted: bool, bias: bool, last: bool, dtype, seed: int) -> None:
    torch.manual_seed(seed)
    problem = case(target, shape, dtype, integers=True, weighted=weighted, bias=bias, scale=2.0)
    assert_exact(target, replace(problem, x=channels_last(problem.x)) if last else problem)


OPTIONS = {
    "weighted": st.booleans(),
    "bias": st.booleans(),
    "last": st.booleans(),
    "dtype": st.sampled_from(list(SHORT)),
    "seed": st.integers(0, 2**31),
}


@pytest.mark.parametrize("target", [t for t in TARGETS if not t.emulated], ids=str)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(shape=geometries(19), **OPTIONS)
def test_any_geometry_is_exact(target, shape, weighted, bias, last, dtype, seed):
    assert_any_geometry(target, shape, weighted, bias, last, dtype, seed)


@pytest.mark.parametrize("target", [t for t in TARGETS if t.emulated], ids=str)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(shape=geometries(4), **OPTIONS)
def test_any_small_geometry_is_exact(target, shape, weighted, bias, last, dtype, seed):
    assert_any_geometry(target, shape, weighted, bias, last, dtype, seed)


@pytest.mark.parametrize("target", [t for t in TARGETS if not t.emulated], ids=str)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=geometries(19), weighted=st.booleans(), bias=st.booleans(), seed=st.integers(0, 2**31))
def test_any_geometry_passes_the_gate(target, shape, weighted, bias, seed):
    torch.manual_seed(seed)
    assert_gate(target, [case(target, shape, weighted=weighted, bias=bias) for _ in range(4)])
