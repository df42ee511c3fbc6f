# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of ``embedding_sq_``: ``acc[v,d] += scale * sum_n w_n (sum_{t: ids[n,t] = v} g[n,t,d])^2``.

The rows of g are visited in the order (id, sample), found by a sort on the device. All rows of one id are then a run, cut into
pieces of at most PIECE rows: in text the most frequent id has thousands of rows, and one program walking them alone would
take many times as long as all the others. A run of one piece is added to ``acc`` by its program; of a longer one the pieces
leave sums in a workspace, which one program joins in order. No atomics, repeatable, and only the rows that occur are touched.
The contract is in ``fisherfast.ops.embedding_sq``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    PROGRAMS,
    add_both,
    check_offsets,
    is_raised,
    long,
    power_of_two,
    raise_flag_,
    rows_and_strides,
    sample_rows,
    wide,
    zero_sums,
)


def config(M: int, D: int, dtype: torch.dtype) -> dict[str, int]:
    """Columns a program and rows a piece, for M rows of D columns; a pure function.

    At most 512 pieces would be full, so that the workspace stays below 2^12 D numbers.
    """
    BLOCK_D = power_of_two(D, 16, 512 if dtype == torch.float64 else 1024)
    return {
        "BLOCK_D": BLOCK_D,
        "PIECE": power_of_two(triton.cdiv(M, 512), 64, 2**30),
        "num_warps": max(1, BLOCK_D * max(dtype.itemsize, 4) // 1024),
    }


def visiting_order(ids: Tensor, offsets: Tensor | None, padding: int, V: int) -> tuple[Tensor, ...]:
    """Rows sorted by (id, sample), rows of the padding id last, as id V.

    Returns, each [M]: the rows' ids, samples and numbers, and where the run of their id begins and ends.
    """
    row = torch.arange(ids.numel(), device=ids.device)
    sample = row // ids.shape[-1] if offsets is None else torch.bucketize(row, offsets[1:], right=True)
    id_ = ids.reshape(-1)
    if padding >= 0:
        id_ = id_.masked_fill(id_ == padding, V)
    if V < 2**31:
        id_ = id_.to(torch.int32)  # half the passes of a radix sort
    # Samples rise with the rows, so a stable sort by id alone leaves them in order within an id.
    id_, row = torch.sort(id_, stable=True)
    return id_, sample[row], row, torch.searchsorted(id_, id_), torch.searchsorted(id_, id_, right=True)


def pieces_of(begins: Tensor, piece: int) -> tuple[Tensor, Tensor]:
    """The rows at which pieces start, in order, in the first of M places; and how many there are, [1]."""
    row = torch.arange(len(begins), device=begins.device)
    number = ((row - begins) % piece == 0).cumsum(0)
    return torch.searchsorted(number, row + 1), number[-1:]


@triton.jit
def _slot(begin, at, PIECE: tl.constexpr):
    """Where the workspace holds the piece of a long run that starts at row ``at``.

    Starts of later pieces are at least PIECE rows apart, and so are those of first pieces of long runs.
    """
    return at // PIECE * 2 + (at == begin).to(tl.int32)


@triton.jit
def _same_sample(samples, at, begin, end):
    """Whether rows ``at - 1`` and ``at``, both between ``begin`` and ``end``, are of one sample."""
    inside = (at > begin) & (at < end)
    return inside & (tl.load(samples + at - 1, mask=inside, other=0) == tl.load(samples + at, mask=inside, other=0))


@triton.jit
def _embedding_sq_kernel(
    acc,
    total,
    workspace,
    norms,
    g,
    weight,
    flag,
    order,
    pieces,
    shape,
    strides,
    scale: tl.float64,
    BLOCK_D: tl.constexpr,
    PIECE: tl.constexpr,
):
    """``acc[v] += scale * sum_n w_n c^2``, ``total[v] += sum_n w_n c``, ``norms[block of d, row] = sum_d c^2``.

    c is the sum of g over the rows of one (id, sample). ``norms`` is written at one row of each. A piece of a long run leaves
    its sums and the two parts of c that it may share with its neighbours in ``workspace[slot]``: squares, sums, head, tail.

    Tile:  pieces of at most PIECE rows x BLOCK_D columns, dealt out in turn.
    FLOPs: N T D. Bytes: g once; the touched rows of acc read and written once; workspaces 16 D for PIECE rows of long runs.
    """
    if is_raised(flag):
        return
    ids, samples, rows, begins, ends = order
    first_rows, count = pieces
    M, T, V, D = shape
    d = long(tl.program_id(1)) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    zero = zero_sums([BLOCK_D], g)
    for number in range(tl.program_id(0), tl.load(count).to(tl.int32), tl.num_programs(0)):
        at = tl.load(first_rows + number)
        v, begin, end = long(tl.load(ids + at)), tl.load(begins + at), tl.load(ends + at)
        if v < V:
            stop = tl.minimum(at + PIECE, end)
            shared = _same_sample(samples, at, begin, end)  # c began in the piece before
            head = zero
            c = zero
            # A frequent id occurs in thousands of samples; one float64 addition each costs nothing beside reading g.
            squares = tl.zeros([BLOCK_D], tl.float64)
            sums = squares
            for j in tl.range(at, stop, num_stages=6):
                n, row = tl.load(samples + j), tl.load(rows + j)
                start = row // T * strides[0] + row % T * strides[1]
                c += wide(tl.load(g + start + d * strides[2], mask=inside, other=0.0))
                last = (j + 1 == end) | (tl.load(samples + j + 1, mask=j + 1 < M, other=-1) != n)
                w = 1.0
                if weight is not None:
                    w = tl.load(weight + n)  # here, not in the branch: copies of later rows' weights are under way
                if last:
                    if shared:
                        head = c
                    else:
                        squares += c * c * w
                        if total is not None:
                            sums += c * w
                        if norms is not None:
                            tl.store(norms + long(tl.program_id(1)) * M + row, tl.sum(c * c, 0))
                    shared = False
                    c = zero
            whole = end - begin <= PIECE
            if whole:
                add_both(acc, total, v * D + d, squares, sums, scale, inside)
            if workspace is not None:
                if not whole:
                    slot = workspace + _slot(begin, at, PIECE) * 4 * D + d
                    tl.store(slot, squares.to(zero.dtype), mask=inside)
                    tl.store(slot + D, sums.to(zero.dtype), mask=inside)
                    tl.store(slot + 2 * D, head, mask=inside)
                    tl.store(slot + 3 * D, c, mask=inside)


@triton.jit
def _join_kernel(
    acc,
    total,
    workspace,
    norms,
    weight,
    flag,
    order,
    pieces,
    shape,
    scale: tl.float64,
    BLOCK_D: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Add up the pieces of each long run, in order; a sample cut by a border is squared here.

    Tile: a run x BLOCK_D columns, dealt out as the pieces are. Bytes: the workspace once, touched rows of acc once.
    """
    if is_raised(flag):
        return
    ids, samples, rows, begins, ends = order
    first_rows, count = pieces
    M, _, V, D = shape
    d = long(tl.program_id(1)) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    for number in range(tl.program_id(0), tl.load(count).to(tl.int32), tl.num_programs(0)):
        begin = tl.load(first_rows + number)
        v, end = long(tl.load(ids + begin)), tl.load(ends + begin)
        if (v < V) & (tl.load(begins + begin) == begin) & (end - begin > PIECE):
            c = tl.zeros([BLOCK_D], workspace.dtype.element_ty)
            squares = tl.zeros([BLOCK_D], tl.float64)
            sums = squares
            for at in range(begin, end, PIECE):
                slot = workspace + _slot(begin, at, PIECE) * 4 * D + d
                stop = tl.minimum(at + PIECE, end)
                n = tl.load(samples + at)
                shared = _same_sample(samples, at, begin, end)
                goes_on = _same_sample(samples, stop, begin, end)
                # The shared sample ends here unless it fills the piece and goes on.
                closes = shared & ((not goes_on) | (tl.load(samples + stop - 1) != n))
                c += tl.load(slot + 2 * D, mask=inside, other=0.0)
                w = 1.0
                if weight is not None:
                    w = tl.load(weight + n)
                if norms is not None:
                    tl.store(norms + long(tl.program_id(1)) * M + tl.load(rows + at), tl.sum(c * c, 0), mask=closes)
                squares += tl.where(closes, c * c * w, 0.0) + tl.load(slot, mask=inside, other=0.0)
                sums += tl.where(closes, c * w, 0.0) + tl.load(slot + D, mask=inside, other=0.0)
                c = tl.where(closes, 0.0, c) + tl.load(slot + 3 * D, mask=inside, other=0.0)
            add_both(acc, total, v * D + d, squares, sums, scale, inside)


@triton.jit
def _norms_kernel(sqnorm, norms, offsets, flag, shape, BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr):
    """``sqnorm[n] += sum over blocks of d and rows of sample n of norms[block, row]``. One program: one sample."""
    if is_raised(flag):
        return
    M, T, columns = shape
    n = long(tl.program_id(0))
    first, rows = sample_rows(offsets, n, T)
    if offsets is None:
        first = n * T
    block = tl.arange(0, BLOCKS)
    values = tl.zeros([BLOCK_T, BLOCKS], norms.dtype.element_ty)
    for start in range(0, rows, BLOCK_T):
        t = long(start) + tl.arange(0, BLOCK_T)
        inside = (t < rows)[:, None] & (block < columns)[None, :]
        values += tl.load(norms + block[None, :] * M + (first + t)[:, None], mask=inside, other=0.0)
    before = tl.load(sqnorm + n)
    tl.store(sqnorm + n, before + tl.sum(tl.sum(values, 1), 0).to(before.dtype))


def embedding_sq_(
    acc: Tensor,
    ids: Tensor,
    g: Tensor,
    scale: float = 1.0,
    *,
    weight: Tensor | None = None,
    offsets: Tensor | None = None,
    total: Tensor | None = None,
    sqnorm: Tensor | None = None,
    flag: Tensor | None = None,
    padding_idx: int = -1,
) -> None:
    """Sort the rows, cut the runs into pieces, add up each piece, then join those of long runs."""
    (V, D), M = acc.shape, ids.numel()
    N, T = g.shape[:2] if offsets is None else (len(offsets) - 1, M)
    with torch.cuda.device_of(acc):
        check_offsets(offsets, len(g))
        torch._assert_async(((ids >= 0) & (ids < V)).all(), f"embedding_sq_: ids must lie in [0, V = {V})")
        raise_flag_(flag, g, weight)
        if 0 in (N, M, D):
            return
        order = visiting_order(ids, offsets, padding_idx, V)
        blocks = config(M, D, g.dtype)
        piece, columns = blocks["PIECE"], triton.cdiv(D, blocks["BLOCK_D"])
        pieces = pieces_of(order[3], piece)
        computed = torch.promote_types(g.dtype, torch.float32)
        workspace = torch.empty(2 * triton.cdiv(M, piece), 4, D, device=g.device, dtype=computed) if M > piece else None
        norms = None if sqnorm is None else torch.zeros(columns, M, device=g.device, dtype=computed)
        grid, shape = (min(M, PROGRAMS), columns), (M, T, V, D)
        outputs = (acc, total, workspace, norms)
        _embedding_sq_kernel[grid](*outputs, g, weight, flag, order, pieces, shape, rows_and_strides(g, offsets), scale, **blocks)
        if workspace is not None:
            _join_kernel[grid](*outputs, weight, flag, order, pieces, shape, scale, **blocks)
        if norms is not None:
            _norms_kernel[(N,)](sqnorm, norms, offsets, flag, (M, T, columns), triton.next_power_of_2(columns), BLOCK_T=64)
