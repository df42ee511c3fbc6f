# SPDX-License-Identifier: Apache-2.0
"""The other CUDA C++ kernels, run on the CPU by the emulator of ``emulated.py``: runs of tokens, log-determinants, checks and folds."""

import ctypes
from dataclasses import dataclass

import pytest
import torch
from emulated import build, letter, needs_compiler, pointer
from targets import SHORT, every_dtype
from torch import Tensor

pytestmark = needs_compiler


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    loaded = build("others", tmp_path_factory.mktemp("emulated"))
    for name in ("embedding_keys", "embedding_runs", "kron", "raise_flag", "check_offsets", "add_partials", "add_norms"):
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded


def call(function, *arguments) -> int:
    error = ctypes.create_string_buffer(256)
    result = function(*arguments, error)
    assert result >= 0, error.value.decode()
    return result


def longs(*values: int) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


# ---- embedding_sq_


class EmbeddingCall(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("N", "T", "M", "V", "D")),
        ("ids_strides", ctypes.c_int64 * 2),
        ("g_strides", ctypes.c_int64 * 3),
        ("padding_idx", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("acc_is_double", ctypes.c_int32),
    )


class EmbeddingArrays(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("acc", "total", "ids", "g", "weight", "offsets", "keys", "order", "norms")
    )


@dataclass(frozen=True)
class EmbeddingSq:
    """One call of the emulated op, checked to the last bit: of integers, every order of the sums gives the same."""

    library: ctypes.CDLL
    scale: float = 1.0
    V: int = 7
    padding_idx: int = -1
    acc_dtype: torch.dtype = torch.float32
    offsets: tuple[int, ...] | None = None

    def __call__(self, ids: Tensor, g: Tensor) -> None:
        bounds = self.offsets or range(0, ids.numel() + 1, ids.shape[-1])
        N, D = len(bounds) - 1, g.shape[-1]
        weight = torch.randint(0, 3, (N,)).float()
        acc, total = (torch.randint(-9, 10, (self.V, D)).to(self.acc_dtype) for _ in range(2))
        norms, expected = torch.zeros(N, dtype=torch.float64), [t.double().clone() for t in (acc, total)]
        rows, flat = g.double().flatten(0, -2), ids.flatten()
        for n in range(N):
            mine = slice(bounds[n], bounds[n + 1])
            counted = (flat[mine] != self.padding_idx).double().unsqueeze(1)
            gradient = torch.zeros(self.V, D, dtype=torch.float64).index_add_(0, flat[mine], rows[mine] * counted)
            expected[0] += self.scale * float(weight[n]) * gradient.square()
            expected[1] += float(weight[n]) * gradient
            norms[n] = gradient.square().sum()
        found = self.run(ids, g, acc, total, weight, N)
        assert torch.equal(acc.double(), expected[0]) and torch.equal(total.double(), expected[1])
        assert torch.equal(found, norms)

    def run(self, ids: Tensor, g: Tensor, acc: Tensor, total: Tensor, weight: Tensor, N: int) -> Tensor:
        """As csrc/cuda/embedding_sq.cu launches it, torch's stable sort in the middle."""
        offsets = torch.tensor(self.offsets) if self.offsets else None
        T, M = 0 if self.offsets else ids.shape[1], ids.numel()
        strides = (0, *g.stride()) if self.offsets else g.stride()
        of_ids = longs(ids.stride(0), ids.stride(-1))
        double = acc.dtype == torch.float64
        this = EmbeddingCall(N, T, M, *acc.shape, of_ids, longs(*strides), self.padding_idx, self.scale, double)
        keys = torch.empty(M, dtype=torch.int64)
        given = [acc, total, ids, g, weight, offsets]
        call(self.library.embedding_keys, ctypes.byref(this), ctypes.byref(EmbeddingArrays(*map(pointer, (*given, keys)))))
        keys, order = torch.sort(keys, stable=True)
        room = torch.zeros(M, 64, dtype=torch.float64)
        arrays = EmbeddingArrays(*map(pointer, (*given, keys, order, room)))
        tiles = call(self.library.embedding_runs, letter(g.dtype), ctypes.byref(this), ctypes.byref(arrays))
        shares = room.flatten()[: M * tiles].view(M, tiles).sum(1)
        bounds = self.offsets or range(0, M + 1, T)
        return torch.stack([shares[bounds[n] : bounds[n + 1]].sum() for n in range(N)])


def small_integers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-1, 2, shape).to(dtype)


@pytest.mark.parametrize("acc_dtype", [torch.float32, torch.float64], ids=SHORT.get)
@pytest.mark.parametrize("padding_idx", [-1, 3])
@every_dtype
def test_tokens_of_a_sample_are_summed_before_they_are_squared(library, dtype, padding_idx, acc_dtype):
    op = EmbeddingSq(library, -0.5, padding_idx=padding_idx, acc_dtype=acc_dtype)
    op(torch.randint(0, 7, (3, 5)), small_integers(3, 5, 11, dtype=dtype))


@pytest.mark.parametrize("D", [1, 32, 128, 129, 1025])
def test_tiles_of_features(library, D):
    EmbeddingSq(library)(torch.randint(0, 7, (2, 3)), small_integers(2, 3, D, dtype=torch.float32))


@pytest.mark.parametrize(("N", "T"), [(1, 64), (1, 63), (70, 1), (9, 40)])
def test_long_runs_are_shared_by_the_warps_of_a_block(library, N, T):
    """Of one sample, of many, and of some that begin in one warp's share and end in another's."""
    EmbeddingSq(library, V=3)(torch.randint(0, 2, (N, T)), small_integers(N, T, 5, dtype=torch.bfloat16))


def test_ragged_samples(library):
    ids, g = torch.randint(0, 7, (40,)), small_integers(40, 9, dtype=torch.float32)
    EmbeddingSq(library, offsets=(0, 0, 3, 20, 20, 40, 40))(ids, g)


def test_layouts(library):
    """Neither ids nor gradients contiguous."""
    ids, g = torch.randint(0, 7, (6, 3)).t(), small_integers(6, 5, 3, dtype=torch.float32).permute(2, 0, 1)
    EmbeddingSq(library)(ids, g)


@pytest.mark.parametrize("bad", [-1, 7])
def test_ids_outside_of_the_table_stop_the_kernel(library, bad):
    ids = torch.randint(0, 7, (3, 5))
    ids[1, 2] = bad
    with pytest.raises(AssertionError, match=r"ids must lie in \[0, V\)"):
        EmbeddingSq(library).run(ids, torch.zeros(3, 5, 2), torch.zeros(7, 2), torch.zeros(7, 2), torch.ones(3), 3)


# ---- kron_log1p_sum


@pytest.mark.parametrize("share", [1, 3, 100])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 5), (3, 1024), (5, 1025), (2, 2100)])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=["fp32 fp64", "fp64 fp32"]
)
def test_log_determinants(library, dtypes, rows, columns, share):
    """Over ten decades of products, some of them below 0, against float64's log1p."""
    a, b = (torch.rand(size, dtype=dtype) ** 8 * 3 for size, dtype in zip((rows, 2 * columns), dtypes, strict=True))
    a[0], b = -0.01, b[::2]
    s = 7.0 * a.double().unsqueeze(1) * b.double()
    expected = torch.stack([torch.log1p(s).sum(), (torch.log1p(s) - s / (1 + s)).sum()])
    sums, partial = torch.zeros(2, dtype=torch.float64), torch.full((2 * 4096,), float("nan"), dtype=torch.float64)
    extents, strides = longs(rows, columns), longs(a.stride(0), b.stride(0))
    call(
        library.kron, letter(a.dtype), letter(b.dtype), pointer(a), pointer(b), extents, strides, ctypes.c_int64(share),
        ctypes.c_double(7.0), pointer(partial), pointer(sums),
    )  # fmt: skip
    assert torch.allclose(sums, expected, rtol=1e-13, atol=1e-13)


def test_log_determinant_of_what_has_none_is_nan(library):
    a, b, sums, partial = torch.ones(1), torch.full((3,), -2.0), torch.zeros(2, dtype=torch.float64), torch.empty(64).double()
    call(
        library.kron, letter(a.dtype), letter(b.dtype), pointer(a), pointer(b), longs(1, 3), longs(1, 1), ctypes.c_int64(1),
        ctypes.c_double(1.0), pointer(partial), pointer(sums),
    )  # fmt: skip
    assert sums.isnan().all()


# ---- checks and folds


def read_for_flag(library, x: Tensor, flag: Tensor) -> int:
    """In how many rows it is read."""
    axes = ctypes.c_int64(x.dim())
    return call(library.raise_flag, letter(x.dtype), pointer(x), axes, longs(*x.shape), longs(*x.stride()), pointer(flag))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), None])
@every_dtype
def test_flag_is_raised_by_what_is_not_finite(library, dtype, bad):
    """Wherever it lies, in a view whose gaps are not looked at."""
    buffer = torch.full((3, 5, 2 * 300), float("nan"), dtype=dtype)
    x, flag = buffer[..., ::2], torch.zeros(1, dtype=torch.int32)
    x.fill_(1.0)
    if bad is not None:
        x[tuple(torch.randint(size, ()) for size in x.shape)] = bad
    assert read_for_flag(library, x, flag) == 1  # every other element, all equally far apart
    assert flag.item() == (bad is not None)


@pytest.mark.parametrize("width", [7, 16, 300, 301])
@pytest.mark.parametrize("where", [0, -2, -1, None])
@every_dtype
def test_flag_is_raised_by_rows_that_are_read_16_bytes_at_a_time(library, dtype, where, width):
    """Rows that begin at multiples of 16 bytes, and what is left at their ends."""
    buffer = torch.full((3, 5, 320), float("nan"), dtype=dtype)
    x, flag = buffer[..., :width], torch.zeros(1, dtype=torch.int32)
    x.fill_(1.0)
    if where is not None:
        x[2, 4, where] = float("nan")
    assert read_for_flag(library, x, flag) == 15
    assert flag.item() == (where is not None)


@pytest.mark.parametrize(
    ("view", "rows"),
    [
        (lambda x: x, 1),
        (lambda x: x.permute(2, 0, 1), 1),  # in whatever order its axes are
        (lambda x: x[:, :1], 3),  # an axis of one element separates nothing
        (lambda x: x[:1, :, :37], 5),
        (lambda x: x[:, ::2], 9),
        (lambda x: x[0, 0].expand(4, -1), 1),  # the same row again
        (lambda x: x[1, 2, 3], 1),
    ],
    ids=["contiguous", "permuted", "first", "narrow", "rows", "expanded", "scalar"],
)
@pytest.mark.parametrize("bad", [False, True], ids=["good", "bad"])
def test_flag_is_raised_by_few_long_rows(library, view, rows, bad):
    """Blocks share a row; every element of it is looked at, and nothing else."""
    buffer, flag = torch.full((3, 5, 999), float("nan")), torch.zeros(1, dtype=torch.int32)
    x = view(buffer)
    written = x[0] if 0 in x.stride() else x
    for place in [None] if not bad else torch.randperm(written.numel())[:9].tolist():
        written.fill_(1.0)
        if place is not None:
            written[torch.unravel_index(torch.tensor(place), written.shape)] = float("inf")
        flag.zero_()
        assert read_for_flag(library, x, flag) == rows
        assert flag.item() == bad


@pytest.mark.parametrize(
    ("offsets", "problem"),
    [((0, 2, 2, 9), None), ((0, 3, 2, 9), "must rise"), ((1, 2, 3, 9), "start at 0"), ((0, 2, 3, 8), "end at M")],
)
def test_offsets_are_checked(library, offsets, problem):
    arguments = (library.check_offsets, longs(*offsets), ctypes.c_int64(3), ctypes.c_int64(9))
    if problem is None:
        call(*arguments)
    else:
        with pytest.raises(AssertionError, match=problem):
            call(*arguments)


def add_partials(library, values: Tensor, out: Tensor, *, down: int = 2, upper: bool = False, raised: int = 0) -> Tensor:
    """What is in ``out`` then; nothing but ``values`` is read."""
    splits, rows, columns = values.shape
    partial, out = torch.full((splits, rows, columns + columns % 2), float("nan")), out.clone()
    partial[..., :columns] = values
    counts, flag = map(ctypes.c_int64, (rows, columns, splits, down)), torch.full((1,), raised, dtype=torch.int32)
    call(library.add_partials, pointer(partial), *counts, upper, ctypes.c_double(0.5), pointer(out), pointer(flag))
    return out


SPLITS = (1, 2, 7, 15, 16, 17, 61)  # on both sides of where the threads of a block share the sums of an element


@pytest.mark.parametrize("raised", [0, 1])
@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("splits", SPLITS)
def test_partial_results_are_added(library, upper, splits, raised):
    """Below the diagonal of a square nothing is read or written; nothing at all once the flag is up."""
    values, out = torch.randint(-9, 9, (splits, 31, 31)).float(), torch.randint(-9, 9, (31, 31)).float()
    added = 0.5 * values.sum(0) * (1 - raised)
    expected = out + (added.triu() if upper else added)
    if upper:
        values[:, torch.ones(31, 31).tril(-1).bool()] = float("nan")
    assert torch.equal(add_partials(library, values, out, upper=upper, raised=raised), expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 31), (1, 32), (3, 33), (2, 127), (5, 256), (1, 257), (7, 1), (2, 1009)], ids=str)
@pytest.mark.parametrize("splits", [3, 19])
def test_partial_results_of_any_shape_are_added(library, shape, splits):
    values, out = torch.randint(-9, 9, (splits, *shape)).float(), torch.randint(-9, 9, shape).float()
    assert torch.equal(add_partials(library, values, out), out + 0.5 * values.sum(0))


@pytest.mark.parametrize("splits", SPLITS)
def test_partial_results_are_added_in_a_fixed_order(library, splits):
    """Of numbers whose sum depends on the order: the same bits however many blocks there are, and those of eight chains one after the other."""
    values, out = torch.randn(splits, 5, 67) * 10.0 ** torch.randint(-8, 8, (splits, 5, 67)), torch.randn(5, 67)
    found = [add_partials(library, values, out, down=down) for down in (1, 2, 5)]
    chains, sums = (1 if splits < 16 else 8), torch.zeros(8, 5, 67, dtype=torch.float64)
    for split, value in enumerate(values.double()):
        sums[split % chains] += value
    total = sums[0].clone()
    for chain in sums[1:chains]:
        total += chain
    expected = (out.double() + 0.5 * total).float()
    assert all(torch.equal(one, expected) for one in found)


@pytest.mark.parametrize("offsets", [None, (0, 0, 300, 301)])
def test_norms_are_added(library, offsets):
    lengths = [0, 300, 1] if offsets else [1, 1, 1]
    partial, out = torch.randint(0, 9, (sum(lengths), 3)).double(), torch.ones(3)
    expected = 1 + torch.stack([part.sum() for part in partial.split(lengths)])
    bounds = torch.tensor(offsets) if offsets else None
    call(library.add_norms, pointer(partial), pointer(bounds), ctypes.c_int64(3), ctypes.c_int64(3), pointer(out), None)
    assert torch.equal(out.double(), expected)
