# SPDX-License-Identifier: Apache-2.0
"""The squares of sample gradients: the steps of a share's samples, and what a gradient adds once it is complete.

That is in registers, or in a workspace where samples were too few to fill the chip and their rows were split into parts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import add_both, fold_, is_raised, long, power_of_two, sample_rows

MOST_PARTS = 16
PART_ROWS = 256  # the fewest rows that are worth a part


class Outputs(NamedTuple):
    """What a call adds to, and the flag that it reads."""

    acc: Tensor
    total: Tensor | None
    sqnorm: Tensor | None
    flag: Tensor | None

    def zeros(self) -> "Outputs":
        """Others of the same sizes, for a trial."""
        total, sqnorm, flag = (None if out is None else torch.zeros_like(out) for out in self[1:])
        return Outputs(torch.zeros_like(self.acc), total, sqnorm, flag)


def tiles_held(acc: Tensor, total: Tensor | None) -> int:
    """Tiles in registers: the sample's (or the squared operands), the squares, and what the other outputs add."""
    return 2 + (total is not None) + (acc.dtype == torch.float64)


@triton.jit
def steps_of(offsets, begin, end, T, BLOCK_T: tl.constexpr):
    """How many steps of BLOCK_T rows samples ``begin`` to ``end`` take; one without rows takes one, too."""
    if offsets is None:
        return (end - begin) * tl.cdiv(T, BLOCK_T)
    else:
        steps = tl.zeros([128], tl.int32)
        for start in range(begin, end, 128):
            n = start + tl.arange(0, 128)
            _, rows = sample_rows(offsets, tl.minimum(n, end - 1), T)
            steps += tl.where(n < end, tl.maximum(tl.cdiv(rows, BLOCK_T), 1), 0).to(tl.int32)
        return tl.sum(steps, 0)


@triton.jit
def add_sample(squares, sums, c, n, N, weight, total, norms):
    """``squares + w_n c^2``, ``sums + w_n c`` where there is a total, ``norms[tile, n] = sum c^2``; c is sample n's gradient."""
    if norms is not None:
        tl.store(norms + long(tl.program_id(0)) * N + n, tl.sum(c * c))
    w = 1.0
    if weight is not None:
        w = tl.load(weight + n)
    squares += c * c * w
    if total is not None:
        sums += c * w
    return squares, sums


@triton.jit(do_not_specialize=["N", "C", "parts"])
def _square_parts_kernel(
    acc,
    total,
    norms,
    products,
    weight,
    flag,
    N,
    C,
    parts,
    scale: tl.float64,
    KNOWN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``acc += scale * sum_n w_n c_n^2``, ``total += sum_n w_n c_n``, ``norms[block, n] = sum c_n^2``; ``c_n = sum_p products[n, p]``.

    One program: BLOCK_C of the C elements. Bytes: products once, acc and total read and written.
    """
    if is_raised(flag):
        return
    index = long(tl.program_id(0)) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    inside = (p < parts)[:, None] & (index < C)[None, :]
    squares = tl.zeros([BLOCK_C], products.dtype.element_ty)
    sums = tl.zeros([BLOCK_C], products.dtype.element_ty)
    for n in range(N):
        place = (long(n) * parts + p)[:, None] * C + index[None, :]
        c = tl.sum(tl.load(products + place, mask=inside, other=0.0), 0)
        squares, sums = add_sample(squares, sums, c, n, N, weight, total, norms)
    add_both(acc, total, index, squares, sums, scale, index < C, KNOWN)


def square_parts_(
    acc: Tensor,
    total: Tensor | None,
    sqnorm: Tensor | None,
    products: Tensor,
    weight: Tensor | None,
    scale: float,
    flag: Tensor | None,
    known: bool = True,
) -> None:
    """``acc += scale * sum_n w_n (sum_p products[n, p])^2``, and likewise total and sqnorm; nothing while the flag is set.

    products: [N, parts, elements of acc]. Where they are not ``known``, the contents of acc and total count as 0.
    """
    N, parts, C = products.shape
    BLOCK_P, BLOCK_C = power_of_two(parts, 1, MOST_PARTS), 256
    programs = triton.cdiv(C, BLOCK_C)
    norms = None if sqnorm is None else products.new_empty(programs, N)
    outputs, arguments = (acc, total, norms), (products, weight, flag, N, C, parts, scale)
    _square_parts_kernel[(programs,)](*outputs, *arguments, known, BLOCK_P, BLOCK_C)
    fold_(sqnorm, norms, 1.0, flag)
