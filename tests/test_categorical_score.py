# SPDX-License-Identifier: Apache-2.0
"""The contract of ``categorical_score_``, asked of every backend that can run here: p - e_y of float64, labels by inverse CDF."""

from __future__ import annotations

import itertools

import pytest
import torch
from gate import passes
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import DEVICES, SHORT, every_dtype

import fisherfast as ff
from fisherfast import _backend

OP = _backend.OPS["categorical_score_"]
TARGETS = [(b, d) for d in DEVICES for b in OP.usable(d)]
SHAPES = [(1, 1), (7, 2), (5, 3), (33, 10), (6, 257), (3, 5000)]
INF = float("inf")

every_target = pytest.mark.parametrize(("backend", "device"), TARGETS, ids=lambda v: v)


def emulated(backend: str, device: str) -> bool:
    return backend == "triton" and device == "cpu"


def run(backend, logits, *, out=None, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The op's result and the labels it used."""
    out = torch.full(logits.shape, float("nan"), dtype=logits.dtype, device=logits.device) if out is None else out
    drawn = torch.full(logits.shape[:1], -7, device=logits.device)
    with ff.backend(backend):
        ff.ops.categorical_score_(out, logits, drawn=drawn, **options)
    return out, drawn


def score(logits: torch.Tensor, y: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """p - e_y from the definition; the entry of y as minus the sum of the others."""
    p = logits.to(dtype).softmax(-1).scatter(1, y.unsqueeze(1), 0.0)
    return p.scatter(1, y.unsqueeze(1), -p.sum(1, keepdim=True))


def assert_gate(backend: str, value: torch.Tensor, logits: torch.Tensor, y: torch.Tensor) -> None:
    """Error against float64 at most twice that of plain torch's float32 softmax, rounded to the same dtype."""
    exact = score(logits, y)
    plain = logits.softmax(-1, dtype=torch.float32) - torch.nn.functional.one_hot(y, logits.shape[1])
    error, allowed = ((v.to(value.dtype).double() - exact).abs().max().item() for v in (value, plain))
    if backend == "triton" and not value.is_cuda and value.dtype == torch.bfloat16:
        allowed = 2.0**-9  # Triton's interpreter cuts bfloat16 off instead of rounding it: of the emulation only
    assert passes(error, allowed)


# ---- values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_dtype
@every_target
def test_given_labels_match_float64(backend, device, dtype, shape):
    R, C = shape
    logits = (3 * torch.randn(shape)).to(device, dtype)
    labels = torch.randint(0, C, (R,), device=device)
    value, drawn = run(backend, logits, labels=labels)
    assert torch.equal(drawn, labels)
    assert_gate(backend, value, logits, labels)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_dtype
@every_target
def test_drawn_labels_are_the_inverse_of_the_cdf(backend, device, dtype, shape):
    """Except where u lies within rounding of a boundary: there the neighbour may be drawn."""
    R, _ = shape
    logits, u = (3 * torch.randn(shape)).to(device, dtype), torch.rand(R, dtype=torch.float64, device=device)
    value, drawn = run(backend, logits, uniform=u)
    assert_gate(backend, value, logits, drawn)
    cdf = logits.double().softmax(-1).cumsum(-1)
    upper, lower = (
        cdf.gather(1, drawn.unsqueeze(1)).squeeze(1),
        torch.nn.functional.pad(cdf, (1, 0)).gather(1, drawn.unsqueeze(1)).squeeze(1),
    )
    slack = 1e-14 if dtype == torch.float64 else 1e-6
    assert ((lower - slack <= u) & (u <= upper + slack)).all()
    far = ((cdf - u.unsqueeze(1)).abs() > slack).all(1)
    assert torch.equal(drawn[far], torch.searchsorted(cdf, u.unsqueeze(1), right=True).squeeze(1)[far])
    assert far.double().mean() >= 0.9


@every_target
def test_float64_is_float64(backend, device):
    logits = 3 * torch.randn(5, 700, dtype=torch.float64, device=device)
    labels = torch.randint(0, 700, (5,), device=device)
    value, _ = run(backend, logits, labels=labels)
    torch.testing.assert_close(value, score(logits, labels), rtol=1e-13, atol=1e-17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=SHORT.get)
@every_target
def test_relative_precision_where_the_network_is_certain(backend, device, dtype):
    """p_y - 1 would cancel: here the label's probability is 1 - 1e-9 and its score must still be right."""
    logits = torch.tensor([[0.0, 21.0, 0.5, -1.0], [30.0, 1.0, 2.0, 3.0]], dtype=dtype, device=device)
    labels = torch.tensor([1, 0], device=device)
    value, _ = run(backend, logits, labels=labels)
    torch.testing.assert_close(value.double(), score(logits, labels), rtol=4e-6, atol=0.0)


@every_dtype
@every_target
def test_large_vocabulary(backend, device, dtype):
    """128 k classes: the sums keep what is small beside them."""
    R, C = (1 if emulated(backend, device) else 4), 128 * 1024 + 3
    logits, u = (2 * torch.randn(R, C)).to(device, dtype), torch.rand(R, dtype=torch.float64, device=device)
    value, drawn = run(backend, logits, uniform=u)
    assert_gate(backend, value, logits, drawn)
    cdf = logits.double().softmax(-1).cumsum(-1)
    assert ((cdf.gather(1, drawn.unsqueeze(1)).squeeze(1) - u).abs() <= logits.double().softmax(-1).max() + 1e-6).all()


@every_dtype
@every_target
def test_uniform_logits_draw_by_counting(backend, device, dtype):
    """With C = 2^k equal logits every partial sum is exact: y = floor(u C), wherever tiles begin."""
    C = 512 if emulated(backend, device) else 8192
    u = torch.rand(64, dtype=torch.float64, device=device)
    u[:4] = torch.tensor([0.5, 0.25, 1 / C, 1 - 2.0**-53], dtype=torch.float64)
    _, drawn = run(backend, torch.zeros(64, C, dtype=dtype, device=device), uniform=u)
    assert torch.equal(drawn, (u * C).long())


@every_target
def test_frequencies_are_the_probabilities(backend, device):
    """Pearson's chi-square over many draws stays below its 1 - 1e-6 quantile (Wilson-Hilferty)."""
    R, C = (3000 if emulated(backend, device) else 20000), 9
    logits = torch.randn(C, device=device)
    _, drawn = run(backend, logits.expand(R, C), uniform=torch.rand(R, dtype=torch.float64, device=device))
    expected = R * logits.double().softmax(-1)
    chi = ((drawn.bincount(minlength=C) - expected).square() / expected).sum().item()
    k = C - 1
    assert chi <= k * (1 - 2 / (9 * k) + 4.75 * (2 / (9 * k)) ** 0.5) ** 3


@every_target
def test_mean_score_over_draws_is_zero(backend, device):
    R, C = (3000 if emulated(backend, device) else 20000), 9
    value, _ = run(backend, torch.randn(C, device=device).expand(R, C), uniform=torch.rand(R, dtype=torch.float64, device=device))
    assert (value.mean(0).abs() <= 5 * value.std(0) / R**0.5).all()


@pytest.mark.parametrize("shape", [(7, 3), (5, 259), (2, 5003)], ids=str)
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@every_dtype
def test_every_instruction_set(isa, dtype, shape):
    if "cpu" not in OP.usable("cpu"):
        pytest.skip(OP.unavailable("cpu", "cpu"))
    force = torch.ops.fisherfast_cpp.cpu_isa
    best = force(None)
    try:
        force(isa)
    except (ValueError, RuntimeError):
        pytest.skip(f"this processor has {best}, not {isa}")
    try:
        logits, u = (3 * torch.randn(shape)).to(dtype), torch.rand(shape[0], dtype=torch.float64)
        value, drawn = run("cpu", logits, uniform=u)
    finally:
        force(best)
    assert_gate("cpu", value, logits, drawn)
    assert torch.equal(drawn, run("reference", logits, uniform=u)[1])


# Halves of the last place, subnormals, zero, one: narrowing rounds as torch does. With two classes p runs over all of [0, 1].
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=SHORT.get)
def test_rounding_to_16_bits_is_torchs(dtype):
    if "cpu" not in OP.usable("cpu"):
        pytest.skip(OP.unavailable("cpu", "cpu"))
    logits = torch.zeros(4001, 2, dtype=dtype)
    logits[:, 1] = torch.linspace(-40, 40, 4001)
    labels = torch.zeros(4001, dtype=torch.int64)
    value, _ = run("cpu", logits, labels=labels)
    wide, _ = run("cpu", logits.float(), labels=labels)
    assert torch.equal(value, wide.to(dtype))


# ---- extremes


@every_dtype
@every_target
def test_saturated_logits(backend, device, dtype):
    logits = torch.tensor([[0.0, 800.0, 0.0, -800.0], [-800.0] * 4, [800.0] * 4, [-800.0, 800.0, 800.0, 0.0]]).to(device, dtype)
    u = torch.full((4,), 0.6, dtype=torch.float64, device=device)
    value, drawn = run(backend, logits, uniform=u)
    assert drawn.tolist() == [1, 2, 2, 2]
    assert_gate(backend, value, logits, drawn)


@pytest.mark.parametrize("u", [1e-17, 0.5, 1 - 2.0**-53], ids=["low", "middle", "high"])
@every_dtype
@every_target
def test_masked_classes_are_never_drawn(backend, device, dtype, u):
    """-inf at both ends and between: probability zero, score zero; every arrangement of four classes."""
    rows = [row for row in itertools.product([-INF, 0.0], repeat=4) if any(v == 0.0 for v in row)]
    logits = torch.tensor(rows).to(device, dtype).repeat(1, 5)
    value, drawn = run(backend, logits, uniform=torch.full((len(rows),), u, dtype=torch.float64, device=device))
    assert (logits.gather(1, drawn.unsqueeze(1)) == 0).all()
    assert_gate(backend, value, logits, drawn)
    assert (value[logits == -INF] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), INF], ids=str)
@every_dtype
@every_target
def test_nonfinite_makes_its_row_nan(backend, device, dtype, value):
    logits = torch.randn(3, 300).to(device, dtype)
    logits[1, 7] = value
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    for options in ({"labels": labels}, {"uniform": torch.full((3,), 0.5, dtype=torch.float64, device=device)}):
        out, drawn = run(backend, logits, **options)
        assert out[1].isnan().all() and torch.isfinite(out[[0, 2]]).all() and drawn[1] == 0


@every_target
def test_a_row_of_nothing_is_nan(backend, device):
    out, drawn = run(
        backend, torch.full((1, 5), -INF, device=device), uniform=torch.full((1,), 0.5, dtype=torch.float64, device=device)
    )
    assert out.isnan().all() and drawn.item() == 0


# ---- layouts


@every_dtype
@every_target
def test_in_place(backend, device, dtype):
    logits, u = torch.randn(9, 600).to(device, dtype), torch.rand(9, dtype=torch.float64, device=device)
    expected, y = run(backend, logits, uniform=u)
    again, drawn = run(backend, logits, out=logits, uniform=u)
    assert again is logits and torch.equal(logits, expected) and torch.equal(drawn, y)


def shifted(z: torch.Tensor) -> torch.Tensor:
    """Rows inside a larger buffer whose other cells are NaN."""
    buffer = torch.full((z.shape[0] + 2, z.shape[1] + 6), float("nan"), dtype=z.dtype, device=z.device)
    return buffer[1:-1, 3:-3].copy_(z)


@pytest.mark.parametrize(
    "layout", [shifted, lambda z: z.mT.contiguous().mT, lambda z: shifted(z.repeat_interleave(3, 1))[:, ::3]]
)
@every_dtype
@every_target
def test_strided_logits(backend, device, dtype, layout):
    logits, u = torch.randn(9, 300).to(device, dtype), torch.rand(9, dtype=torch.float64, device=device)
    expected, y = run(backend, logits, uniform=u)
    value, drawn = run(backend, layout(logits), uniform=u)
    torch.testing.assert_close(value, expected)
    assert torch.equal(drawn, y)


@every_target
def test_rows_further_apart_than_int32(backend, device):
    """Rows 2^30 elements apart, a step that fits into 32 bits, as two do not; the memory between them is never touched."""
    if emulated(backend, device):
        pytest.skip("Triton's interpreter copies the whole storage, 4 GiB; test_divided_work.py does without")
    logits = torch.randn(3, 37, device=device).bfloat16()
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device).as_strided((3, 37), (2**30, 1)).copy_(logits)
    labels = torch.tensor([3, 5, 7], device=device)
    assert torch.equal(run(backend, far, labels=labels)[0], run(backend, logits, labels=labels)[0])


@every_target
def test_rows_that_are_not_counted(backend, device):
    """Zero whatever they hold; their labels and random numbers are not looked at."""
    logits, counted = torch.randn(4, 300, device=device), torch.tensor([True, False, True, False], device=device)
    logits[1], logits[3, 0] = float("nan"), INF
    labels = torch.tensor([3, -100, 299, 10**6], device=device)
    for options in ({"labels": labels}, {"uniform": torch.rand(4, dtype=torch.float64, device=device)}):
        value, drawn = run(backend, logits, counted=counted, **options)
        assert not value[~counted].any() and (drawn[~counted] == -1).all()
        assert_gate(backend, value[counted], logits[counted], drawn[counted])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
@every_target
def test_empty(backend, device, shape):
    _, drawn = run(backend, torch.empty(shape, device=device), uniform=torch.rand(shape[0], dtype=torch.float64, device=device))
    assert (drawn == -1).all()


@every_target
def test_rows_do_not_depend_on_each_other(backend, device):
    logits, u = torch.randn(50, 300, device=device), torch.rand(50, dtype=torch.float64, device=device)
    whole, y = run(backend, logits, uniform=u)
    parts = [run(backend, logits[r : r + 1], uniform=u[r : r + 1]) for r in range(50)]
    assert torch.equal(whole, torch.cat([p for p, _ in parts])) and torch.equal(y, torch.cat([d for _, d in parts]))


@every_target
def test_writes_stay_inside(backend, device):
    logits = torch.randn(3, 37, device=device)
    buffer = torch.full((3 * 37 + 64,), 12345.0, device=device)
    run(backend, logits, out=buffer[33 : 33 + 3 * 37].view(3, 37), labels=torch.tensor([0, 36, 5], device=device))
    assert (buffer[:33] == 12345.0).all() and (buffer[-31:] == 12345.0).all()


# ---- the call


def call(device: str = "cpu") -> tuple[list, dict]:
    logits = torch.randn(3, 5, device=device)
    keywords = {
        "uniform": torch.rand(3, dtype=torch.float64, device=device),
        "counted": torch.tensor([True, False, True], device=device),
        "drawn": torch.zeros(3, dtype=torch.int64, device=device),
    }
    return [torch.zeros_like(logits), logits], keywords


@every_target
def test_opcheck(backend, device):
    args, keywords = call(device)
    args[1].requires_grad_()
    with ff.backend(backend):
        torch.library.opcheck(OP.overload, tuple(args), keywords)


@pytest.mark.parametrize("in_place", [False, True])
@every_target
def test_compiles(backend, device, in_place):
    (out, logits), keywords = call(device)
    expected, y = run(backend, logits, **{k: v for k, v in keywords.items() if k != "drawn"})
    out = logits if in_place else out
    compiled = torch.compile(lambda *a, **k: ff.ops.categorical_score_(*a, **k), fullgraph=True, backend="aot_eager")
    with ff.backend(backend):
        compiled(out, logits, **keywords)
    assert torch.equal(out, expected) and torch.equal(keywords["drawn"], y)


@every_target
def test_logits_may_require_grad_and_versions_advance(backend, device):
    (out, logits), keywords = call(device)
    versions = out._version, keywords["drawn"]._version
    with ff.backend(backend):
        ff.ops.categorical_score_(out, logits.requires_grad_(), **keywords)
    assert not out.requires_grad and out._version > versions[0] and keywords["drawn"]._version > versions[1]


REJECTIONS = {
    "logits_axes": (lambda a, k: a.__setitem__(1, a[1][0]), ValueError, r"logits must be \[R, C\], got \(5,\)"),
    "logits_dtype": (lambda a, k: a.__setitem__(1, a[1].int()), TypeError, "logits must be one of"),
    "out_dtype": (lambda a, k: a.__setitem__(0, a[0].double()), TypeError, "out must have the dtype of logits"),
    "out_shape": (lambda a, k: a.__setitem__(0, torch.zeros(3, 4)), ValueError, r"out must be \[R, C\] = \(3, 5\), got \(3, 4\)"),
    "out_strides": (lambda a, k: a.__setitem__(0, torch.zeros(5, 3).mT), ValueError, "out must be contiguous.*written in place"),
    "counted_strides": (
        lambda a, k: k.update(counted=torch.ones(3, 2).bool()[:, 0]),
        ValueError,
        r"got strides \(2,\); pass counted\.cont",
    ),
    "neither": (lambda a, k: k.update(uniform=None), ValueError, "exactly one of labels and uniform must be given, got neither"),
    "both": (lambda a, k: k.update(labels=torch.zeros(3, dtype=torch.int64)), ValueError, "must be given, got both"),
    "uniform_dtype": (lambda a, k: k.update(uniform=torch.rand(3)), TypeError, r"uniform must be one of \['float64'\]"),
    "uniform_shape": (lambda a, k: k.update(uniform=torch.rand(4).double()), ValueError, r"uniform must be \[R\] = \(3,\)"),
    "counted_dtype": (lambda a, k: k.update(counted=torch.ones(3)), TypeError, r"counted must be one of \['bool'\]"),
    "drawn_dtype": (lambda a, k: k.update(drawn=torch.zeros(3)), TypeError, r"drawn must be one of \['int64'\]"),
    "device": (lambda a, k: k.update(counted=k["counted"].to("meta")), ValueError, "counted must be on out's device"),
}


@pytest.mark.parametrize("rule", REJECTIONS)
def test_rejects(rule):
    spoil, kind, message = REJECTIONS[rule]
    args, keywords = call()
    spoil(args, keywords)
    with pytest.raises(kind, match=f"categorical_score_: .*{message}"):
        ff.ops.categorical_score_(*args, **keywords)


@pytest.mark.parametrize("bad", [-1, 5])
@every_target
def test_rejects_labels_out_of_range(backend, device, bad):
    if device == "cuda" and backend != "reference":
        pytest.skip("a device assertion, which ends the process' CUDA context")
    with pytest.raises((ValueError, RuntimeError), match="labels must lie in"):
        run(backend, torch.randn(2, 5, device=device), labels=torch.tensor([0, bad], device=device))


@every_target
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    R=st.integers(0, 40),
    C=st.integers(1, 700),
    dtype=st.sampled_from(list(SHORT)),
    drawn=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(backend, device, R, C, dtype, drawn, seed):
    torch.manual_seed(seed)
    logits = torch.randn(R, C).to(device, dtype)
    counted = torch.rand(R, device=device) < 0.8
    labels = (
        {"uniform": torch.rand(R, dtype=torch.float64, device=device)}
        if drawn
        else {"labels": torch.randint(0, C, (R,), device=device)}
    )
    value, y = run(backend, logits, counted=counted, **labels)
    assert not value[~counted].any()
    if counted.any():
        assert_gate(backend, value[counted], logits[counted], y[counted])
