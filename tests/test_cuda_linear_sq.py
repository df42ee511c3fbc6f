# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ kernels of ``linear_sq_``, run on the CPU by the emulator of ``emulated.py``."""

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import gate
import pytest
import torch
from emulated import (
    EAGER,
    MEANWHILE,
    UP,
    build,
    every_timing,
    letter,
    needs_compiler,
    padded,
    pointer,
    shifted,
    time_first,
    transposed,
)
from targets import SHORT, every_dtype
from torch import Tensor

HALF = {torch.bfloat16: "bf16", torch.float16: "fp16"}
NORM_SHARES = 512  # room for the partial sums of a norm

pytestmark = needs_compiler
with_total = pytest.mark.parametrize("total", [False, True], ids=["", "total"])
on_hopper = pytest.mark.parametrize("width", [128, 192])


class Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("N", "T", "M", "O", "I")),
        *((name, ctypes.c_int64 * 3) for name in ("x_strides", "g_strides")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("samples_per_split", "acc_is_double", "raised", "timing", "width")),
    )


class Arrays(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("acc", "total", "x", "g", "weight", "offsets", "norms", "partial"))


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    loaded = build("linear_sq", tmp_path_factory.mktemp("emulated"))
    loaded.linear_sq.restype = ctypes.c_int64
    return loaded


def integers(*shape: int, dtype: torch.dtype) -> Tensor:
    """So small that the squares of their sums are exact too."""
    return torch.randint(-1, 2, shape).to(dtype)


@dataclass(frozen=True)
class LinearSq:
    """One call of the emulated op, checked to the last bit: of integers, every order of the sums gives the same."""

    library: ctypes.CDLL
    scale: float = 1.0
    samples_per_split: int = 10**6
    acc_dtype: torch.dtype = torch.float32
    total: bool = False
    weighted: bool = False
    offsets: tuple[int, ...] | None = None
    timing: int = EAGER
    width: int = 0  # of a warpgroup's tile; 0: the kernel of other devices, -1: the pooled one
    raised: int = 0  # the flag: down, UP or raised MEANWHILE

    def __call__(self, x: Tensor, g: Tensor) -> None:
        """Add to outputs that hold something, as the launch and the folds of csrc/cuda/linear_sq.cu do."""
        bounds = self.offsets or range(0, len(x) * x.shape[1] + 1, x.shape[1])
        N, O, I = len(bounds) - 1, g.shape[-1], x.shape[-1]
        weight = torch.randint(0, 3, (N,)).float() if self.weighted else None
        acc, total = (torch.randint(-9, 10, (O, I)).to(self.acc_dtype) for _ in range(2))
        expected, expected_total, expected_norms = self.answer(x, g, bounds, weight)
        expected, expected_total = expected + acc.double(), expected_total + total.double()
        norms = self.run(x, g, acc, total, weight, N)
        assert torch.equal(acc.double(), expected), f"differs by {acc - expected}"
        assert torch.equal(norms, expected_norms)
        assert torch.equal(total.double(), expected_total) or not self.total

    def answer(self, x: Tensor, g: Tensor, bounds: Sequence[int], weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        rows_x, rows_g = (rows.double().flatten(0, -2) for rows in (x, g))
        slices = [slice(begin, end) for begin, end in itertools.pairwise(bounds)]
        gradients = torch.stack([rows_g[rows].T @ rows_x[rows] for rows in slices])
        w = torch.ones(len(slices)) if weight is None else weight
        squares = torch.einsum("n,noi->oi", w.double(), gradients.square())
        return self.scale * squares, torch.einsum("n,noi->oi", w.double(), gradients), gradients.square().sum((1, 2))

    def run(self, x: Tensor, g: Tensor, acc: Tensor, total: Tensor, weight: Tensor | None, N: int) -> Tensor:
        per_split = min(self.samples_per_split, N)
        splits, real = -(-N // per_split), torch.float64 if x.dtype == torch.float64 else torch.float32
        O, I = acc.shape
        partial = torch.full((splits, 1 + self.total, O, I + I % 2), float("nan"), dtype=real)
        norms = torch.full((N * NORM_SHARES,), float("nan"), dtype=torch.float64)
        if self.offsets or self.width < 0:  # empty samples have none; pooled ones are added to
            norms.zero_()
        if self.offsets:  # a split of empty samples leaves nothing
            partial.zero_()
        offsets = torch.tensor(self.offsets) if self.offsets else None
        T, strides = (0, [(0, *t.stride()) for t in (x, g)]) if self.offsets else (x.shape[1], [t.stride() for t in (x, g)])
        double = acc.dtype == torch.float64
        extents = (N, T, x.shape[0] if self.offsets else N * T, *acc.shape)
        options = per_split, double, self.raised, self.timing, self.width
        call = Call(*extents, *((ctypes.c_int64 * 3)(*s) for s in strides), self.scale, *options)
        arrays = (acc, total if self.total else None, x, g, weight, offsets, norms, partial)
        error = ctypes.create_string_buffer(256)
        shares = self.library.linear_sq(letter(x.dtype), ctypes.byref(call), ctypes.byref(Arrays(*map(pointer, arrays))), error)
        assert shares > 0, error.value.decode()
        assert shares <= NORM_SHARES
        if splits > 1:
            acc += (self.scale * partial[:, 0, :, :I].double().sum(0)).to(acc.dtype)
            total += partial[:, -1, :, :I].double().sum(0).to(acc.dtype)
        return norms[: N * shares].view(N, shares).sum(1)


def rows(N: int, T: int, I: int, O: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return integers(N, T, I, dtype=dtype), integers(N, T, O, dtype=dtype)


# ---- all devices


@pytest.mark.parametrize("acc_dtype", [torch.float32, torch.float64], ids=SHORT.get)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@with_total
@every_dtype
def test_adds_every_output(library, dtype, total, weighted, acc_dtype):
    LinearSq(library, -0.5, total=total, weighted=weighted, acc_dtype=acc_dtype)(*rows(3, 37, 11, 7, dtype))


@pytest.mark.parametrize(("O", "I"), [(1, 1), (8, 64), (64, 128), (127, 129), (136, 136)])
@with_total
@every_dtype
def test_edges_of_tiles(library, dtype, total, O, I):
    LinearSq(library, total=total)(*rows(2, 19, I, O, dtype))


@with_total
@every_dtype
def test_samples_split_over_blocks(library, dtype, total):
    LinearSq(library, 2.0, samples_per_split=3, total=total, weighted=True)(*rows(8, 5, 24, 16, dtype))


@every_dtype
def test_more_samples_than_a_flush(library, dtype):
    LinearSq(library, total=True, weighted=True)(*rows(70, 2, 8, 8, dtype))


@with_total
@every_dtype
def test_ragged_samples(library, dtype, total):
    """Empty ones too, at the ends and between."""
    x, g = (t[0] for t in rows(1, 61, 24, 16, dtype))
    LinearSq(library, total=total, weighted=True, offsets=(0, 0, 3, 40, 40, 41, 61, 61))(x, g)


@every_timing
@pytest.mark.parametrize("T", [1, 31, 33, 97, 130])
def test_copies_may_arrive_at_any_time(library, T, timing):
    LinearSq(library, total=True, timing=timing)(*rows(3, T, 136, 72, torch.bfloat16))


@pytest.mark.parametrize("layout", [transposed, padded, shifted, time_first])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
def test_layouts(library, dtype, layout):
    LinearSq(library)(*map(layout, rows(3, 21, 24, 16, dtype)))


@pytest.mark.parametrize("N", [1, 31, 32, 33, 200])
@with_total
@every_dtype
def test_samples_of_one_row_are_pooled(library, dtype, total, N):
    """One product of squares, and one of values for total; each row has its own weight."""
    LinearSq(library, -0.5, total=total, weighted=True, width=-1)(*rows(N, 1, 24, 136, dtype))


# ---- Hopper's warpgroups


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize(("width", "total"), [(128, False), (128, True), (192, False)])
@pytest.mark.parametrize("dtype", HALF, ids=HALF.get)
def test_warpgroups_add_every_output(library, dtype, width, total, weighted):
    LinearSq(library, -0.5, width=width, total=total, weighted=weighted, acc_dtype=torch.float64)(*rows(3, 37, 16, 8, dtype))


@pytest.mark.parametrize(("O", "I"), [(8, 8), (64, 128), (128, 192), (136, 200), (264, 136), (392, 400)])
@on_hopper
def test_edges_of_warpgroup_tiles(library, width, O, I):
    """One block, a cluster, a cluster that reaches beyond the matrix, several."""
    LinearSq(library, width=width)(*rows(2, 19, I, O, torch.bfloat16))


@every_timing
@pytest.mark.parametrize("T", [1, 17, 48, 64, 130, 450])
@on_hopper
def test_warpgroup_copies_and_products_may_happen_at_any_time(library, width, T, timing):
    """Samples of one stage, with each number of products, and of more stages than there are."""
    LinearSq(library, weighted=True, timing=timing, width=width)(*rows(3, T, 136, 136, torch.float16))


@every_timing
@pytest.mark.parametrize("total", [False, True], ids=["", "total"])
def test_warpgroups_clear_the_rows_of_the_next_ragged_sample(library, total, timing):
    """Whatever is there: the sample behind is not to be seen in this one's norm, finite or not."""
    x, g = (t[0] for t in rows(1, 203, 24, 136, torch.bfloat16))
    offsets = (0, 0, 3, 40, 40, 105, 106, 170, 203, 203)
    LinearSq(library, total=total, weighted=True, offsets=offsets, timing=timing, width=128)(x, g)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_warpgroups_keep_a_spoiled_sample_to_itself(library, bad):
    """``0 * inf`` is no zero: both operands are cleared behind a ragged sample."""
    x, g = (t[0] for t in rows(1, 40, 24, 16, torch.bfloat16))
    x[21], g[21] = bad, bad
    call = LinearSq(library, offsets=(0, 21, 40), width=128)
    norms = call.run(x, g, torch.zeros(16, 24), torch.zeros(16, 24), None, 2)
    assert norms[0] == (g[:21].double().T @ x[:21].double()).square().sum() and not norms[1].isfinite()


@pytest.mark.parametrize("width", [0, 128])
@with_total
def test_splits_of_nothing_but_empty_samples_leave_zeros(library, total, width):
    """Of two blocks in a cluster too, which leave together without having multiplied anything."""
    x, g = (t[0] for t in rows(1, 77, 24, 136, torch.bfloat16))
    LinearSq(library, 2.0, samples_per_split=2, total=total, offsets=(0, 0, 0, 40, 77, 77, 77), width=width)(x, g)


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float64, 0), (torch.float32, 0), (torch.float16, 0), (torch.float16, 128)], ids=str
)
@pytest.mark.parametrize("I", [200, 201])
@pytest.mark.parametrize("samples_per_split", [2, 10])
@with_total
def test_whole_tiles_of_even_and_odd_rows(library, dtype, width, I, samples_per_split, total):
    """Two neighbours at a time in rows of an even length, as those of the workspace always are."""
    layout = padded if width else torch.clone
    call = LinearSq(library, 2.0, samples_per_split=samples_per_split, total=total, width=width)
    call(*map(layout, rows(3, 21, I, 136, dtype)))


@on_hopper
def test_the_step_to_a_second_sample_does_not_matter_where_there_is_none(library, width):
    x, g = (t.as_strided(t.shape, (12345, *t.stride()[1:])) for t in rows(1, 70, 24, 136, torch.bfloat16))
    LinearSq(library, width=width)(x, g)


@with_total
def test_warpgroups_split_samples_and_flush_again(library, total):
    LinearSq(library, 2.0, samples_per_split=3, total=total, weighted=True, width=128)(*rows(8, 5, 24, 16, torch.bfloat16))
    LinearSq(library, total=total, weighted=True, width=128)(*rows(70, 2, 8, 8, torch.bfloat16))


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 0), (torch.float32, -1), (torch.float16, 0), (torch.float16, 128)], ids=str
)
@pytest.mark.parametrize("acc_dtype", [torch.float32, torch.float64], ids=SHORT.get)
def test_nothing_is_added_while_the_flag_is_up(library, dtype, width, acc_dtype):
    x, g = rows(2, 1 if width < 0 else 19, 136, 144, dtype)
    acc, total = (torch.randint(-9, 10, (144, 136)).to(acc_dtype) for _ in range(2))
    before = acc.clone(), total.clone()
    LinearSq(library, total=True, width=width, acc_dtype=acc_dtype, raised=UP).run(x, g, acc, total, None, 2)
    assert torch.equal(acc, before[0]) and torch.equal(total, before[1])


@every_timing
def test_a_flag_that_another_stream_raises_stops_no_cluster(library, timing):
    """One block of two sees it: what it would add is not added, but the other still needs its copies."""
    x, g = rows(3, 70, 128, 256, torch.bfloat16)
    call = LinearSq(library, width=128, raised=MEANWHILE, timing=timing)
    acc, total = torch.zeros(256, 128), torch.zeros(256, 128)
    norms = call.run(x, g, acc, total, None, 3)
    added, _, expected_norms = call.answer(x, g, range(0, 211, 70), None)
    assert ((acc == 0) | (acc.double() == added)).all() and torch.equal(norms, expected_norms)


@pytest.mark.parametrize("layout", [padded, time_first])
@on_hopper
def test_layouts_that_the_copy_engine_takes(library, width, layout):
    LinearSq(library, width=width)(*map(layout, rows(3, 21, 24, 136, torch.bfloat16)))


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, 128), (torch.float16, 192)], ids=str
)
@pytest.mark.parametrize("scale", [1.0, 1 / 3], ids=["", "third"])
def test_rounding_is_that_of_plain_torch(library, dtype, width, scale):
    """The gate of every kernel. The emulated products of 16-bit inputs round less than real ones may."""
    mine = plain = 0.0
    for _ in range(3):
        x, g = (torch.randn(5, 130, D).to(dtype) for D in (24, 16))
        exact = scale * torch.einsum("nto,nti->noi", g.double(), x.double()).square().sum(0)
        acc, unused = torch.zeros(16, 24), torch.zeros(16, 24)
        LinearSq(library, scale, width=width).run(x, g, acc, unused, None, 5)
        mine = max(mine, gate.error(acc, exact))
        fp32 = scale * torch.einsum("nto,nti->noi", g.float(), x.float()).square().sum(0)
        plain = max(plain, gate.error(fp32, exact))
    assert gate.passes(mine, plain)
