# SPDX-License-Identifier: Apache-2.0
"""Products of tiles on the matrix units: how the operands are multiplied, and how long a sum of them stays in registers."""

import math

import torch
import triton
import triton.language as tl

from ._common import interpreted, wide

# For kernels that split a sum of products: about one program per multiprocessor.
PRODUCT_PROGRAMS = 128

# What the choice of tiles reckons with: an H200, seen here or from its data sheet, and the L2 a guess; to rank tiles, not to
# predict.
MULTIPROCESSORS = 132
MATRIX_RATE = {2: 788e12, 4: 788e12 / 6, 8: 67e12}  # FLOP/s by bytes of a number; float32 takes six products of bfloat16
L2_RATE = 7e12  # B/s from the L2 to all multiprocessors
MEMORY_RATE = 4.3e12  # B/s
LAUNCH = 3e-6  # s


def product_seconds(programs: int, rows: int, height: int, width: int, dtype: torch.dtype, workspace: int) -> float:
    """How long so many programs might take, each a tile of ``height`` by ``width`` summed over ``rows``; a pure function.

    A multiprocessor runs its programs one after the other, each as fast as its products or its loads from the L2 let it. The
    bytes of a ``workspace`` are written once and read once, by a launch of their own.
    """
    products = 2 * height * width / MATRIX_RATE[dtype.itemsize]
    loads = (height + width) * dtype.itemsize / L2_RATE
    one_after_the_other = triton.cdiv(programs, MULTIPROCESSORS) * rows * max(products, loads) * MULTIPROCESSORS
    return one_after_the_other + (workspace > 0) * (LAUNCH + 2 * workspace / MEMORY_RATE)


def fold_size(steps: int) -> int:
    """How many steps are added up in one float32 chain before they are added to the chains before; a pure function.

    A chain of L additions rounds like a random walk, ~ sqrt(L). In K chains of steps / K, then K additions of those, the
    variance ~ steps / K^2 + K is least at K = (2 steps)^(1/3).
    """
    return steps if steps <= 16 else math.ceil(steps / (2 * steps) ** (1 / 3))


def precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies: float32 is split into three bfloat16, which keeps all its bits, unless TF32 is allowed."""
    if interpreted():
        return "emulated"
    if dtype != torch.float32:
        return "ieee"
    # The older switch, allow_tf32, is reflected here; reading it instead fails once a program has used this one.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "bf16x6"


@triton.jit
def dot(a, b, c, PRECISION: tl.constexpr):
    """``c + a b`` in the precision of c; PRECISION is what ``precision`` says of the operands' dtype."""
    if PRECISION == "emulated":  # Triton's interpreter would multiply the bit patterns of bfloat16
        return tl.dot(wide(a), wide(b), c, input_precision="ieee", out_dtype=c.dtype)
    else:
        return tl.dot(a, b, c, input_precision=PRECISION, out_dtype=c.dtype)


@triton.jit
def end_chain(total, products, steps, chain):
    """``total + products`` and 0 after every ``chain`` steps, else both as they are; float64 needs no chains."""
    if products.dtype == tl.float32:
        if steps % chain == 0:
            total += products
            products = tl.zeros_like(products)
    return total, products


@triton.jit
def all_chains(total, products):
    """The sum of the chains that have ended and the one that has not."""
    if products.dtype == tl.float32:
        products += total
    return products
