# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of ``embedding_sq_``: ``acc[v,d] += scale * sum_n w_n (sum_{t: ids[n,t] = v} g[n,t,d])^2``.

The rows of g are visited in the order (id, sample), found by a sort on the device. All rows of one id are then a run,
and one program walks it, so each row of ``acc`` is written by one program: no atomics, repeatable, and only the rows that
occur are touched. The contract is in ``fisherfast.ops.embedding_sq``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import add_to, check_offsets, device_problem, long, power_of_two, raise_flag_, rows_and_strides, sample_rows, wide


def why_not(acc: Tensor, ids: Tensor, g: Tensor, scale: float = 1.0, **_: Any) -> str | None:
    """Why this call cannot run under Triton, or None."""
    return device_problem(acc.device)


def config(D: int) -> dict[str, int]:
    """Columns a program; a pure function."""
    BLOCK_D = power_of_two(D, 16, 512)
    return {"BLOCK_D": BLOCK_D, "num_warps": max(1, BLOCK_D // 128)}


def visiting_order(ids: Tensor, g: Tensor, offsets: Tensor | None, padding: int) -> tuple[Tensor, ...]:
    """Rows sorted by (id, sample), rows of the padding id last.

    Returns, each [M]: the rows' ids, samples, numbers, first elements in g, and where the run of their id ends.
    """
    stride_n, stride_t, _ = rows_and_strides(g, offsets)
    T = g.shape[-2]
    row = torch.arange(ids.numel(), device=ids.device)
    sample = row // T if offsets is None else torch.bucketize(row, offsets[1:], right=True)
    id_ = ids.reshape(-1)
    if padding >= 0:
        id_ = id_.masked_fill(id_ == padding, torch.iinfo(torch.int64).max)
    # Samples rise with the rows, so a stable sort by id alone leaves them in order within an id.
    id_, row = torch.sort(id_, stable=True)
    return id_, sample[row], row, row // T * stride_n + row % T * stride_t, torch.searchsorted(id_, id_, right=True)


@triton.jit
def _embedding_sq_kernel(
    acc,
    total,
    norms,
    g,
    weight,
    flag,
    order,
    shape,
    g_stride_d,
    scale: tl.float64,
    BLOCK_D: tl.constexpr,
):
    """``acc[v] += scale * sum_n w_n c^2``, ``total[v] += sum_n w_n c``, ``norms[block of d, row] = sum_d c^2``.

    c is the sum of g over the rows of one (id, sample). ``norms`` is written at the last row of each, 0 before.

    Tile:  the run of rows of one id x BLOCK_D columns; a program whose row does not start a run ends at once.
    FLOPs: N T D. Bytes: g once; the touched rows of acc once.
    """
    if flag is not None:
        if tl.load(flag) != 0:
            return
    ids, samples, rows, starts, ends = order
    M, V, D = shape
    begin = long(tl.program_id(0))
    v = tl.load(ids + begin)
    if begin > 0:
        if tl.load(ids + begin - 1) == v:
            return
    if v >= V:
        return
    d = long(tl.program_id(1)) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    c = tl.zeros([BLOCK_D], tl.float64 if g.dtype.element_ty == tl.float64 else tl.float32)
    # A frequent id occurs in thousands of samples; one float64 addition each costs nothing beside reading g.
    squares = tl.zeros([BLOCK_D], tl.float64)
    sums = squares
    end = tl.load(ends + begin)
    for j in range(begin, end):
        row, n = tl.load(rows + j), tl.load(samples + j)
        c += wide(tl.load(g + tl.load(starts + j) + d * g_stride_d, mask=inside, other=0.0))
        last = (j + 1 == end) | (tl.load(samples + j + 1, mask=j + 1 < M, other=-1) != n)
        w = 1.0
        if weight is not None:
            w = tl.load(weight + n)
        squares += tl.where(last, c * c * w, 0.0)
        if total is not None:
            sums += tl.where(last, c * w, 0.0)
        if norms is not None:
            tl.store(norms + long(tl.program_id(1)) * M + row, tl.where(last, tl.sum(c * c, 0), 0.0))
        c = tl.where(last, 0.0, c)
    add_to(acc, v * D + d, squares, scale, inside)
    if total is not None:
        add_to(total, v * D + d, sums, 1.0, inside)


@triton.jit
def _norms_kernel(sqnorm, norms, offsets, flag, shape, BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr):
    """``sqnorm[n] += sum over blocks of d and rows of sample n of norms[block, row]``. One program: one sample."""
    if flag is not None:
        if tl.load(flag) != 0:
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
    """Sort the rows, launch one program a row and block of columns (those not at the start of a run end at once)."""
    (V, D), M = acc.shape, ids.numel()
    N, T = g.shape[:2] if offsets is None else (len(offsets) - 1, M)
    with torch.cuda.device_of(acc):
        check_offsets(offsets, len(g))
        torch._assert_async(((ids >= 0) & (ids < V)).all(), f"embedding_sq_: ids must lie in [0, V = {V})")
        raise_flag_(flag, g, weight)
        if 0 in (N, M, D):
            return
        order = visiting_order(ids, g, offsets, padding_idx)
        blocks = config(D)
        columns = triton.cdiv(D, blocks["BLOCK_D"])
        norms = None
        if sqnorm is not None:
            norms = torch.zeros(columns, M, device=g.device, dtype=torch.promote_types(g.dtype, torch.float32))
        shape, stride_d = (M, V, D), g.stride(-1)
        _embedding_sq_kernel[(M, columns)](acc, total, norms, g, weight, flag, order, shape, stride_d, scale, **blocks)
        if norms is not None:
            _norms_kernel[(N,)](sqnorm, norms, offsets, flag, (M, T, columns), triton.next_power_of_2(columns), BLOCK_T=64)
