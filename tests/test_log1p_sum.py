# SPDX-License-Identifier: Apache-2.0
"""The contract of ``log1p_sum`` and ``kron_log1p_sum``, asked of every backend that can run here: the sums that mpmath finds."""

from __future__ import annotations

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import DEVICES

import fisherfast as ff
import fisherfast._C
from fisherfast import _backend

DTYPES = {torch.float32: "fp32", torch.float64: "fp64"}
GATE = 1e-12  # relative, of either sum
NAN, INF = float("nan"), float("inf")


def targets(op: str) -> pytest.MarkDecorator:
    found = [(b, d) for d in DEVICES for b in _backend.OPS[op].usable(d)]
    return pytest.mark.parametrize(("backend", "device"), found, ids=lambda v: v)


every_diagonal_target, every_kron_target = targets("log1p_sum"), targets("kron_log1p_sum")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)


def exact(s) -> tuple[mpmath.mpf, mpmath.mpf]:
    """``(sum log(1 + s), sum log(1 + s) - s / (1 + s))``; 90 digits, as s = 1e-30 takes 60 of them."""
    logs, costs = mpmath.mpf(0), mpmath.mpf(0)
    with mpmath.workdps(90):
        for x in s:
            log = mpmath.log(1 + x)
            logs, costs = logs + log, costs + log - x / (1 + x)
        return +logs, +costs


def values(tensor: torch.Tensor) -> list[mpmath.mpf]:
    return [mpmath.mpf(x) for x in tensor.flatten().tolist()]


def products(a: torch.Tensor, b: torch.Tensor, c: float):
    with mpmath.workdps(90):
        return [c * x * y for x in values(a) for y in values(b)]


def scaled(f: torch.Tensor, c: float):
    with mpmath.workdps(90):
        return [c * x for x in values(f)]


def run(op: str, backend: str, *inputs, acc: torch.Tensor | None = None) -> torch.Tensor:
    acc = torch.zeros(2, dtype=torch.float64, device=inputs[0].device) if acc is None else acc
    with ff.backend(backend):
        getattr(ff.ops, op)(acc, *inputs)
    return acc


def assert_close(acc: torch.Tensor, expected, gate: float = GATE) -> None:
    for name, got, right in zip(("log", "cost"), acc.tolist(), expected, strict=True):
        assert abs(got - right) <= gate * abs(right), f"{name}: {got}, not {mpmath.nstr(right, 17)}"


SPREADS = {
    "ordinary": lambda n: torch.rand(n, dtype=torch.float64) * 3,
    "all-1e-12": lambda n: torch.full((n,), 1e-12, dtype=torch.float64),
    "all-1e-30": lambda n: torch.full((n,), 1e-30, dtype=torch.float64),
    "all-1e30": lambda n: torch.full((n,), 1e30, dtype=torch.float64),
    "every-magnitude": lambda n: torch.logspace(-30, 30, n, dtype=torch.float64),
    "tiny-beside-one": lambda n: torch.full((n,), 1e-13, dtype=torch.float64).index_fill_(0, torch.tensor([n // 2]), 1.0),
    "around-sqrt2-1": lambda n: torch.linspace(0.41, 0.42, n, dtype=torch.float64),
    "series-and-closed-form": lambda n: torch.linspace(0.009, 0.011, n, dtype=torch.float64),
}
every_spread = pytest.mark.parametrize("spread", SPREADS)


# ---- values


@every_spread
@every_dtype
@every_diagonal_target
def test_diagonal_matches_mpmath(backend, device, dtype, spread):
    f = SPREADS[spread](1511).to(device, dtype)
    assert_close(run("log1p_sum", backend, f, 0.75), exact(scaled(f, 0.75)))


@every_spread
@every_dtype
@every_kron_target
def test_kron_matches_mpmath(backend, device, dtype, spread):
    """The products have the spread: seven copies of it, each of another size."""
    a = torch.linspace(0.9, 1.1, 7).to(device, dtype)
    b = SPREADS[spread](211).to(device, dtype)
    assert_close(run("kron_log1p_sum", backend, a, b, 0.75), exact(products(a, b, 0.75)))


@pytest.mark.parametrize("op", ["log1p_sum", "kron_log1p_sum"])
@every_spread
def test_every_instruction_set(isa, op, spread):
    f = SPREADS[spread](1511)
    inputs = (f,) if op == "log1p_sum" else (torch.ones(1), f)
    assert_close(run(op, "cpu", *inputs), exact(values(f)))


@every_diagonal_target
def test_long_sums_lose_nothing(backend, device):
    """One value many times: every rounding goes the same way."""
    size = 10**5 if backend == "triton" and device == "cpu" else 3 * 10**6
    for s in (1e-12, 0.1, 0.42, 1e5):
        f = torch.full((size,), s, dtype=torch.float64, device=device)
        assert_close(run("log1p_sum", backend, f), [size * x for x in exact([mpmath.mpf(s)])])


@pytest.mark.parametrize("s", [1e-300, 1e-200, 1e200, 1e300, 5e307])
@every_diagonal_target
def test_ends_of_float64(backend, device, s):
    f = torch.full((9,), s, dtype=torch.float64, device=device)
    with mpmath.workdps(700):
        x = mpmath.mpf(s)
        logs, costs = 9 * mpmath.log(1 + x), 9 * (mpmath.log(1 + x) - x / (1 + x))
    assert_close(run("log1p_sum", backend, f), (logs, costs if s > 1 else 0))  # s^2 / 2 is no float64


@every_dtype
@every_kron_target
def test_factors_may_have_two_dtypes(backend, device, dtype):
    a = torch.rand(13, device=device, dtype=dtype)
    b = torch.rand(101, device=device, dtype=torch.float64 if dtype == torch.float32 else torch.float32)
    assert_close(run("kron_log1p_sum", backend, a, b, 3.0), exact(products(a, b, 3.0)))
    assert_close(run("kron_log1p_sum", backend, b, a, 3.0), exact(products(a, b, 3.0)))


@every_diagonal_target
def test_between_minus_one_and_zero(backend, device):
    """Not what the op is for, but not wrong either; 1 + s is rounded, so near -1 the relative error grows."""
    f = -torch.rand(101, dtype=torch.float64, device=device) * 0.9
    assert_close(run("log1p_sum", backend, f), exact(values(f)))


# ---- the accumulator


@every_diagonal_target
def test_diagonal_adds(backend, device):
    f, acc = torch.rand(101, device=device), torch.tensor([3.0, -5.0], dtype=torch.float64, device=device)
    before, alone = acc.clone(), run("log1p_sum", backend, f, 2.0)
    assert torch.equal(run("log1p_sum", backend, f, 2.0, acc=acc), before + alone)


@every_kron_target
def test_kron_adds(backend, device):
    a, b = torch.rand(17, device=device), torch.rand(101, device=device)
    acc = torch.tensor([3.0, -5.0], dtype=torch.float64, device=device)
    before, alone = acc.clone(), run("kron_log1p_sum", backend, a, b, 2.0)
    assert torch.equal(run("kron_log1p_sum", backend, a, b, 2.0, acc=acc), before + alone)


@every_diagonal_target
def test_nothing_adds_nothing(backend, device):
    acc = torch.tensor([3.0, -5.0], dtype=torch.float64, device=device)
    for f in (torch.empty(0), torch.empty(3, 0, 5), torch.zeros(7)):
        assert run("log1p_sum", backend, f.to(device), acc=acc).tolist() == [3.0, -5.0]
    assert run("log1p_sum", backend, torch.rand(7, device=device), 0.0, acc=acc).tolist() == [3.0, -5.0]


@every_kron_target
def test_nothing_adds_nothing_kron(backend, device):
    acc = torch.tensor([3.0, -5.0], dtype=torch.float64, device=device)
    for sizes in ((0, 5), (5, 0), (0, 0)):
        a, b = (torch.rand(size, device=device) for size in sizes)
        assert run("kron_log1p_sum", backend, a, b, acc=acc).tolist() == [3.0, -5.0]
    a, b = torch.rand(5, device=device), torch.rand(7, device=device)
    assert run("kron_log1p_sum", backend, a, b, 0.0, acc=acc).tolist() == [3.0, -5.0]


# ---- what cannot be summed


# NumPy, which carries Triton's emulation, says what it does to numbers that are none.
no_warnings = pytest.mark.filterwarnings("ignore::RuntimeWarning")
BAD = [NAN, INF, -INF, -1.0, -2.0, -1e300, 1e308]


@no_warnings
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("at", [0, 700, 1999])
@every_diagonal_target
def test_diagonal_becomes_nan(backend, device, bad, at):
    f = torch.rand(2000, dtype=torch.float64, device=device)
    f[at] = bad
    assert run("log1p_sum", backend, f).isnan().all()


@no_warnings
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", [0, 1])
@every_kron_target
def test_kron_becomes_nan(backend, device, bad, which):
    factors = [torch.ones(7, dtype=torch.float64, device=device), torch.ones(601, dtype=torch.float64, device=device)]
    factors[which][-1] = bad
    assert run("kron_log1p_sum", backend, *factors).isnan().all()
    assert run("kron_log1p_sum", backend, *reversed(factors)).isnan().all()


@pytest.mark.parametrize("bad", BAD)
def test_becomes_nan_in_every_instruction_set(isa, bad):
    for at in (0, 5, 1030):
        f = torch.rand(1031, dtype=torch.float64)
        f[at] = bad
        assert run("log1p_sum", "cpu", f).isnan().all()


# ---- layouts


LAYOUTS = {
    "transposed": lambda f: f.mT,
    "strided": lambda f: f[:, ::3],
    "sliced": lambda f: f[2:-2, 3:-3],
    "permuted": lambda f: f.view(5, 7, 61).permute(2, 0, 1),
    "expanded": lambda f: f[:, :7, None].expand(-1, -1, 3),
    "repeated": lambda f: f[:1].expand(9, -1),
    "scalar": lambda f: f[0, 0],
    "every third": lambda f: f.flatten()[::3],
    "column": lambda f: f[:, 1],
    "one value, expanded": lambda f: f[0, 0].expand(9),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@every_dtype
@every_diagonal_target
def test_any_strides(backend, device, dtype, layout):
    f = torch.rand(35, 61).to(device, dtype)
    view = LAYOUTS[layout](f)
    assert_close(run("log1p_sum", backend, view, 2.0), exact(scaled(view, 2.0)))


@pytest.mark.parametrize("layout", [lambda v: v[::3], lambda v: v.view(-1, 3)[:, 1], lambda v: v[:1].expand(41)])
@every_kron_target
def test_any_strides_kron(backend, device, layout):
    a, b = layout(torch.rand(30, device=device)), layout(torch.rand(123, device=device, dtype=torch.float64))
    assert_close(run("kron_log1p_sum", backend, a, b, 2.0), exact(products(a, b, 2.0)))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(I=st.integers(0, 23), O=st.integers(0, 1100), dtype=st.sampled_from(list(DTYPES)), seed=st.integers(0, 2**31))
@every_kron_target
def test_any_size(backend, device, I, O, dtype, seed):
    """And the diagonal of all products, asked of the other op, gives the same sums."""
    torch.manual_seed(seed)
    a, b = (10.0 ** (8 * torch.rand(n, dtype=torch.float64) - 5) for n in (I, O))
    a, b = a.to(device, dtype), b.to(device, dtype)
    s = torch.outer(0.3 * a.double(), b.double())
    u = s / (1 + s)
    # float64 alone would cancel: below 1e-4 the first terms of the series are exact to 1e-13.
    costs = torch.where(s < 1e-4, u * u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u / 5))), torch.log1p(s) - u)
    expected = [torch.log1p(s).sum().item(), costs.sum().item()]
    assert run("kron_log1p_sum", backend, a, b, 0.3).tolist() == pytest.approx(expected, rel=GATE, abs=0)
    assert run("kron_log1p_sum", backend, b, a, 0.3).tolist() == pytest.approx(expected, rel=GATE, abs=0)
    assert run("log1p_sum", backend, s).tolist() == pytest.approx(expected, rel=GATE, abs=0)


# ---- determinism


@pytest.mark.parametrize("op", ["log1p_sum", "kron_log1p_sum"])
def test_does_not_depend_on_the_number_of_threads(isa, op):
    inputs = (torch.rand(7, 30011),) if op == "log1p_sum" else (torch.rand(311), torch.rand(2503))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(op, "cpu", *inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@every_kron_target
def test_repeats_bit_by_bit(backend, device):
    a, b = torch.rand(31, device=device), torch.rand(1303, device=device)
    assert torch.equal(run("kron_log1p_sum", backend, a, b), run("kron_log1p_sum", backend, a, b))


# ---- the call


CALLS = {
    "log1p_sum": lambda: [torch.zeros(2, dtype=torch.float64), torch.rand(3, 5), 2.0],
    "kron_log1p_sum": lambda: [torch.zeros(2, dtype=torch.float64), torch.rand(3), torch.rand(5), 2.0],
}
every_call = pytest.mark.parametrize("op", CALLS)


@every_call
def test_opcheck(op):
    for backend in _backend.OPS[op].usable("cpu"):
        arguments = CALLS[op]()
        arguments[1].requires_grad_()
        with ff.backend(backend):
            torch.library.opcheck(_backend.OPS[op].overload, tuple(arguments))


@every_call
def test_compiles_as_one_node(op):
    acc, *inputs = CALLS[op]()
    expected = run(op, "cpu", *inputs)
    compiled = torch.compile(lambda *arguments: getattr(ff.ops, op)(*arguments), fullgraph=True, backend="aot_eager")
    with ff.backend("cpu"):
        compiled(acc, *inputs)
    assert torch.equal(acc, expected)


@every_call
def test_version_advances(op):
    acc, f, *rest = CALLS[op]()
    version = acc._version
    getattr(ff.ops, op)(acc, f.requires_grad_(), *rest)
    assert not acc.requires_grad and acc._version > version


REJECTIONS = {
    "acc_dtype": (lambda a: a.__setitem__(0, a[0].float()), TypeError, r"acc must be one of \['float64'\], got torch.float32"),
    "acc_shape": (lambda a: a.__setitem__(0, torch.zeros(3, dtype=torch.float64)), ValueError, r"acc must be \[2\] = \(2,\)"),
    "acc_strides": (lambda a: a.__setitem__(0, torch.zeros(4, dtype=torch.float64)[::2]), ValueError, "acc must be contiguous"),
    "dtype": (lambda a: a.__setitem__(1, a[1].half()), TypeError, r"must be one of \['float32', 'float64'\], got torch.float16"),
    "device": (lambda a: a.__setitem__(1, a[1].to("meta")), ValueError, "must be on acc's device cpu, got meta"),
}


@pytest.mark.parametrize("rule", REJECTIONS)
@every_call
def test_rejects(op, rule):
    spoil, kind, message = REJECTIONS[rule]
    arguments = CALLS[op]()
    spoil(arguments)
    with pytest.raises(kind, match=f"{op}: .*{message}"):
        getattr(ff.ops, op)(*arguments)


@pytest.mark.parametrize("which", [1, 2])
def test_kron_rejects_factors_that_are_not_vectors(which):
    arguments = CALLS["kron_log1p_sum"]()
    arguments[which] = torch.rand(2, 3)
    with pytest.raises(ValueError, match=rf"kron_log1p_sum: {'ab'[which - 1]} must be \[{'IO'[which - 1]}\], got \(2, 3\)"):
        ff.ops.kron_log1p_sum(*arguments)
