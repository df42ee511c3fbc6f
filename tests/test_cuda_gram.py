# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ kernels of ``gram_``, run on the CPU by the emulator of ``emulated.py``; and how work is cut among blocks."""

import ctypes
import math
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
    integers,
    letter,
    needs_compiler,
    padded,
    pointer,
    shifted,
    time_first,
    transposed,
)
from targets import SHORT, every_dtype

TILES_FILL_IT = 1  # multiprocessors: with this many the rows are not shared out
UNTOUCHED = 12345.0  # below the diagonal
HALF = {torch.bfloat16: "bf16", torch.float16: "fp16"}

pytestmark = needs_compiler
on_hopper = pytest.mark.parametrize("width", [128, 192])


class Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("N", "T", "I", "stride_n", "stride_t", "stride_d", "multiprocessors")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("bias", "acc_is_double", "raised", "timing", "width")),
    )


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    loaded = build("gram", tmp_path_factory.mktemp("emulated"))
    loaded.gram.restype = loaded.blocks.restype = ctypes.c_int64
    return loaded


@dataclass(frozen=True)
class Gram:
    """One call of the emulated op."""

    library: ctypes.CDLL
    scale: float = 1.0
    bias: bool = False
    multiprocessors: int = TILES_FILL_IT
    timing: int = EAGER
    width: int = 0  # of a warpgroup's tile; 0: the kernel of other devices
    raised: int = 0  # the flag: down, UP or raised MEANWHILE

    def __call__(self, acc: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None = None) -> int:
        """Add to ``acc`` as the launch and the fold of csrc/cuda/gram.cu do; the number of shares of the rows."""
        N, T, I = x.shape
        D = I + self.bias
        real = torch.float64 if x.dtype == torch.float64 else torch.float32
        partial = torch.full((4 * self.multiprocessors, D, D + D % 2), float("nan"), dtype=real)
        double = acc.dtype == torch.float64
        options = self.bias, double, self.raised, self.timing, self.width
        call = Call(N, T, I, *x.stride(), self.multiprocessors, self.scale, *options)
        error = ctypes.create_string_buffer(256)
        shares = self.library.gram(letter(x.dtype), ctypes.byref(call), *map(pointer, (acc, x, weight, partial)), error)
        assert shares > 0, error.value.decode()
        if shares > 1:
            upper = torch.ones(D, D, dtype=torch.bool).triu()
            acc[upper] += (self.scale * partial[:shares, :, :D][:, upper].double().sum(0)).to(acc.dtype)
        return shares


def held(D: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An accumulator that holds something, and below the diagonal what must stay as it is."""
    return (torch.randint(-9, 10, (D, D)).triu() + torch.full((D, D), UNTOUCHED).tril(-1)).to(dtype)


def answer(x: torch.Tensor, scale: float, bias: bool, weight: torch.Tensor | None) -> torch.Tensor:
    rows = x.double().flatten(0, -2)
    if bias:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    weighted = rows if weight is None else rows * weight.double().view(-1, 1)
    return (scale * (weighted.T @ rows)).triu()


def assert_exact(gram: Gram, x: torch.Tensor, weight: torch.Tensor | None = None, acc_dtype=torch.float32) -> int:
    """Of integers, so to the last bit."""
    acc = held(x.shape[-1] + gram.bias, acc_dtype)
    expected = acc.double() + answer(x, gram.scale, gram.bias, weight)
    shares = gram(acc, x, weight)
    assert torch.equal(acc.double(), expected), f"differs by {acc - expected}"
    return shares


@pytest.mark.parametrize("acc_dtype", [torch.float32, torch.float64], ids=SHORT.get)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@every_dtype
def test_adds_to_the_upper_triangle_only(library, dtype, bias, weighted, acc_dtype):
    x = integers(1, 37, 61, dtype=dtype)
    weight = torch.randint(-1, 3, (1, 37)).float() if weighted else None
    assert_exact(Gram(library, -0.5, bias), x, weight, acc_dtype)


@pytest.mark.parametrize("I", [0, 1, 8, 64, 127, 128, 129, 136, 256, 264])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
def test_edges_of_tiles(library, dtype, I):
    """One tile, several, with and without a column of ones in a tile's last column; widths of whole vectors and not."""
    assert_exact(Gram(library, bias=True), integers(1, 35, I, dtype=dtype))


@every_timing
@pytest.mark.parametrize("M", [1, 31, 33, 97, 300])
def test_copies_may_arrive_at_any_time(library, M, timing):
    """As soon as they are asked for, over what others still read, or only when they are waited for."""
    assert_exact(Gram(library, bias=True, timing=timing), integers(1, M, 136, dtype=torch.bfloat16))


@pytest.mark.parametrize(("dtype", "shares"), [(torch.float32, 1), (torch.float32, 2), (torch.float16, 1)], ids=str)
def test_sums_are_flushed_to_memory_more_than_once(library, dtype, shares):
    """More rows a share than kFlushRows = 16384: the second flush adds to the first, in acc as in a share's sums."""
    x = integers(1, shares * (16384 + 300), 5, dtype=dtype)
    assert assert_exact(Gram(library, bias=True, multiprocessors=shares), x) == shares


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@every_dtype
def test_rows_are_shared_out_where_tiles_are_few(library, dtype, weighted):
    weight = torch.randint(0, 3, (1, 1000)).float() if weighted else None
    shares = assert_exact(Gram(library, 2.0, True, multiprocessors=16), integers(1, 1000, 13, dtype=dtype), weight)
    assert 1 < shares <= 8


@pytest.mark.parametrize("layout", [transposed, padded, shifted])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
def test_layouts(library, dtype, weighted, layout):
    x = layout(integers(3, 41, 72, dtype=dtype))
    weight = torch.randint(0, 3, (3, 41)).float() if weighted else None
    assert_exact(Gram(library, bias=True), x, weight)


@every_dtype
def test_rounding_is_that_of_short_chains(library, dtype):
    """The gate of every kernel. The emulated products of 16-bit inputs round less than real ones may."""
    mine = plain = 0.0
    for _ in range(3):
        x = torch.randn(1, 700, 29).to(dtype)
        acc, exact = torch.zeros(29, 29), answer(x, 1.0, False, None)
        Gram(library)(acc, x)
        mine = max(mine, gate.error(acc.triu(), exact))
        plain = max(plain, gate.error((x[0].float().T @ x[0].float()).triu(), exact))
    assert gate.passes(mine, plain)


@every_dtype
def test_rows_of_weight_zero_add_nothing(library, dtype):
    x, mask = torch.randn(1, 50, 23).to(dtype), torch.rand(1, 50) < 0.5
    clean, spoiled = torch.zeros(24, 24), torch.zeros(24, 24)
    Gram(library, bias=True)(clean, torch.where(mask.unsqueeze(-1), x, 0), mask.float())
    Gram(library, bias=True)(spoiled, torch.where(mask.unsqueeze(-1), x, torch.finfo(dtype).max), mask.float())
    assert torch.equal(clean, spoiled)


# ---- Hopper's warpgroups


@on_hopper
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", HALF, ids=HALF.get)
def test_warpgroups_add_to_the_upper_triangle_only(library, dtype, bias, width):
    assert_exact(Gram(library, -0.5, bias, width=width), integers(1, 37, 72, dtype=dtype), acc_dtype=torch.float64)


@on_hopper
@pytest.mark.parametrize("I", [8, 128, 136, 192, 264, 400])
def test_edges_of_warpgroup_tiles(library, I, width):
    """One block, a cluster, a cluster that reaches beyond the matrix, tiles across the diagonal, columns of ones in any of them."""
    assert_exact(Gram(library, bias=True, width=width), integers(1, 35, I, dtype=torch.bfloat16))


@on_hopper
@every_timing
@pytest.mark.parametrize("M", [1, 17, 64, 130, 520])
def test_warpgroup_copies_and_products_may_happen_at_any_time(library, M, timing, width):
    """Also over more stages than there are, and over more than one chain."""
    assert_exact(Gram(library, bias=True, timing=timing, width=width), integers(1, M, 136, dtype=torch.bfloat16))


@pytest.mark.parametrize("layout", [padded, time_first])
def test_layouts_that_the_copy_engine_takes(library, layout):
    assert_exact(Gram(library, bias=True, width=192), layout(integers(3, 41, 72, dtype=torch.bfloat16)))


def test_the_step_to_a_second_sample_does_not_matter_where_there_is_none(library):
    x = integers(1, 41, 72, dtype=torch.bfloat16)
    assert_exact(Gram(library, width=128), x.as_strided(x.shape, (12345, *x.stride()[1:])))


@pytest.mark.parametrize(
    ("dtype", "width", "M", "multiprocessors"),
    [
        *((dtype, 0, 35, TILES_FILL_IT) for dtype in (torch.float64, torch.float32, torch.float16)),
        *((torch.bfloat16, width, 35, TILES_FILL_IT) for width in (128, 192)),
        (torch.float32, 0, 300, 32),
        (torch.bfloat16, 128, 2000, 32),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_whole_tiles_are_added_two_neighbours_at_a_time(library, dtype, width, M, multiprocessors, bias):
    """In rows of an even length, and in the workspace; not where rows, or the first of them, begin at odd places."""
    x, D = integers(1, M, 400, dtype=dtype), 400 + bias
    for place in (0, 1):
        acc = torch.empty(D * D + 1)[place : place + D * D].view(D, D).copy_(held(D))
        expected = acc.double() + answer(x, 2.0, bias, None)
        shares = Gram(library, 2.0, bias, multiprocessors, width=width)(acc, x)
        assert (shares > 1) is (multiprocessors > 1)
        assert torch.equal(acc.double(), expected)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 0), (torch.float16, 0), (torch.float16, 128)], ids=str)
@pytest.mark.parametrize("acc_dtype", [torch.float32, torch.float64], ids=SHORT.get)
def test_nothing_is_added_while_the_flag_is_up(library, dtype, width, acc_dtype):
    acc = held(137, acc_dtype)
    before = acc.clone()
    Gram(library, bias=True, width=width, raised=UP)(acc, integers(1, 35, 136, dtype=dtype))
    assert torch.equal(acc, before)


@every_timing
def test_a_flag_that_another_stream_raises_stops_no_cluster(library, timing):
    """One block of two sees it: what it would add is not added, but the other still needs its copies."""
    x, acc = integers(1, 200, 256, dtype=torch.bfloat16), torch.zeros(256, 256)
    Gram(library, width=128, raised=MEANWHILE, timing=timing)(acc, x)
    added = answer(x, 1.0, False, None)
    assert ((acc == 0) | (acc.double() == added)).all()


@on_hopper
def test_warpgroup_shares_and_second_flush(library, width):
    shares = assert_exact(Gram(library, 2.0, True, multiprocessors=16, width=width), integers(1, 1000, 16, dtype=torch.float16))
    assert 1 < shares <= 8
    assert_exact(Gram(library, bias=True, width=width), integers(1, 16384 + 300, 8, dtype=torch.float16))


# ---- how work is cut


def pair(function, *arguments: int, count: int = 2) -> tuple[int, ...]:
    out = (ctypes.c_int64 * count)()
    function(*arguments, out)
    return tuple(out)


def test_tiles_of_the_triangle_are_numbered_column_by_column(library):
    expected = [(row, column) for column in range(60) for row in range(column + 1)]
    assert [pair(library.upper_tile, ctypes.c_int64(k)) for k in range(len(expected))] == expected


@pytest.mark.parametrize("column", [2**11, 2**16 + 1, 2**26 + 3, 2**31 - 2])
def test_tile_numbers_survive_the_square_root(library, column):
    first = column * (column + 1) // 2
    assert pair(library.upper_tile, ctypes.c_int64(first - 1)) == (column - 1, column - 1)
    assert pair(library.upper_tile, ctypes.c_int64(first)) == (0, column)
    assert pair(library.upper_tile, ctypes.c_int64(first + column)) == (column, column)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 30), (2, 13), (3, 5), (32, 22), (7, 75)])
def test_tiles_in_strips_are_all_there_once(library, rows, columns):
    """With a row of clusters that reaches beyond the matrix where the number of rows is odd and not 1."""
    blocks = library.blocks(rows, columns)
    seen = [pair(library.tile_of_block, rows, columns, ctypes.c_int64(block)) for block in range(blocks)]
    below = rows + rows % 2 if rows > 1 else 1
    assert sorted(seen) == [(row, column) for row in range(below) for column in range(columns)]
    if rows > 1:  # the two of a cluster have the right operand in common
        assert all(a[0] + 1 == b[0] and a[0] % 2 == 0 and a[1] == b[1] for a, b in zip(seen[::2], seen[1::2], strict=True))


def test_blocks_that_run_together_share_operands(library):
    """132 of them load 128 rows or 192 columns for every one of theirs: in strips about a tenth of what they would alone."""
    running = [pair(library.tile_of_block, 32, 75, ctypes.c_int64(block)) for block in range(132)]
    loaded = 128 * len({row for row, _ in running}) + 192 * len({column for _, column in running})
    assert loaded <= 132 * (128 + 192) / 10


@pytest.mark.parametrize(
    ("O", "I", "width"), [(4096, 4096, 192), (4096, 14336, 192), (768, 768, 192), (128, 128, 128), (4096, 128, 128)]
)
def test_width_of_warpgroup_tiles(library, O, I, width):
    def tiles(of: int) -> ctypes.c_int64:
        return ctypes.c_int64(library.blocks(math.ceil(O / 128), math.ceil(I / of)))

    assert library.width(tiles(192), tiles(128), ctypes.c_int64(132)) == width


@pytest.mark.parametrize(("N", "T"), [(1, 1), (1, 32), (1, 33), (3, 31), (3, 65), (5, 64)])
def test_stages_hold_every_row_once(library, N, T):
    rows = []
    for index in range(N * math.ceil(T / 32)):
        n, t, count = pair(library.stage, index, T, count=3)
        assert 1 <= count <= 32
        rows += [(n, t + r) for r in range(count)]
    assert rows == [(n, t) for n in range(N) for t in range(T)]


@pytest.mark.parametrize(
    ("tiles", "units", "multiprocessors"), [(1, 1, 132), (1, 1000, 132), (21, 64, 132), (528, 64, 132), (137, 50, 108)]
)
@pytest.mark.parametrize("workspace", [0, 6])
def test_splits_are_the_fewest_within_a_tenth_of_the_best(library, tiles, units, workspace, multiprocessors):
    def time(splits: int) -> int:
        return math.ceil(tiles * splits / multiprocessors) * (math.ceil(units / splits) + workspace * (splits > 1))

    chosen = library.splits(*map(ctypes.c_int64, (tiles, units, workspace, multiprocessors)))
    most = max(1, min(units, 4 * multiprocessors // tiles))
    best = min(map(time, range(1, most + 1)))
    assert 1 <= chosen <= most and 10 * time(chosen) <= 11 * best
    assert all(10 * time(fewer) > 11 * best for fewer in range(1, chosen))
