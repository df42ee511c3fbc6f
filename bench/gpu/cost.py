# SPDX-License-Identifier: Apache-2.0
"""What an op must cost, the ceilings it runs under, and the fraction reached: arithmetic only, tested without a GPU.

A mode is what a case is computed in: ``bf16``, ``fp16``; ``tf32``, float32 inputs of which the matrix units may drop bits; ``fp32``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import gate

ELEMENT = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}  # bytes
ACCUMULATOR_BYTES = 4  # acc is float32 here
ID_BYTES = 8
# Of the square of a product each of four factors loses up to 2^-10: torch may decline TF32 for a shape, and then its error says
# nothing of ours.
TF32_ERROR = 2.0**-8
# Up to here a result that misses the gate is a sum in another order or rounded otherwise: its time is worth knowing. Beyond, it is wrong.
CLOSE = 1e-4
# Of one product and both its log-determinant terms: 35 instructions of float64, of which a division takes eight. Each takes
# the place of a multiply-add.
LOG1P_FLOPS = 2 * 35
# A logit: two exponentials, each a product and a special function; two differences, two sums, the product with 1 / total.
SCORE_FLOPS = 9


# Of an H200, to predict by, not to report against: copy and bf16 as seen on one; tf32 half of bf16, fp32 and its half, fp64, by the data
# sheet. B/s and FLOP/s.
LEADS = {"copy": 4.3e12, "bf16": 7.88e14, "tf32": 3.94e14, "fp32": 6.7e13, "fp64": 3.35e13}


class Cost(NamedTuple):
    """The fewest operations and device memory bytes, and the unit that does the operations."""

    flops: int
    bytes: int
    unit: str  # see ``rate``


class Bound(NamedTuple):
    """The time nothing can beat, and what sets it."""

    seconds: float
    by: str


def product_unit(mode: str, squares: bool = False) -> str:
    """What multiplies matrices; squares have more bits than 16, so those of 16-bit values are products of float32."""
    if ELEMENT[mode] == 2:
        return "fp32 product" if squares else "bf16"  # fp16 has the same rate
    return "tf32" if mode == "tf32" else "fp32 product"


def linear(N: int, T: int, I: int, O: int, mode: str) -> Cost:
    """``2 N T I O``; x and g once, acc read and written. For T = 1 squares are multiplied: see ``linear_sq_``."""
    moved = ELEMENT[mode] * N * T * (I + O) + 2 * ACCUMULATOR_BYTES * O * I
    return Cost(2 * N * T * I * O, moved, product_unit(mode, squares=T == 1))


def scale(N: int, T: int, D: int, mode: str, has_x: bool) -> Cost:
    """One addition, and with x one product, for each element of g."""
    return Cost(N * T * D * (1 + has_x), ELEMENT[mode] * N * T * D * (1 + has_x) + 2 * ACCUMULATOR_BYTES * D, "fp32")


def embedding(N: int, T: int, D: int, mode: str, touched: int) -> Cost:
    """One addition for each element of g; ids and g once, the ``touched`` rows of acc read and written."""
    return Cost(N * T * D, N * T * (ID_BYTES + ELEMENT[mode] * D) + 2 * ACCUMULATOR_BYTES * touched * D, "fp32")


def distinct(draws: int, V: int) -> int:
    """How many different ones are expected among ``draws`` of ``floor(V^u)``, u uniform: Zipf's law, 1 .. V."""
    return round(sum(1 - (1 - math.log1p(1 / v) / math.log(V)) ** draws for v in range(1, V)))


def gram(M: int, I: int, mode: str) -> Cost:
    """``M I (I + 1)``, half a matrix product; x once, the upper half of acc read and written."""
    return Cost(M * I * (I + 1), ELEMENT[mode] * M * I + ACCUMULATOR_BYTES * I * (I + 1), product_unit(mode))


def conv(N: int, C: int, O: int, H: int, P: int, K: int, groups: int, mode: str) -> Cost:
    """``2 N P^2 O (C / G) K^2``, images H x H, maps P x P; x and g once, acc read and written."""
    weight = O * (C // groups) * K * K
    moved = ELEMENT[mode] * N * (C * H * H + O * P * P) + 2 * ACCUMULATOR_BYTES * weight
    return Cost(2 * N * P * P * weight, moved, product_unit(mode))


def conv_gram(N: int, C: int, H: int, P: int, K: int, mode: str) -> Cost:
    """``N P^2 D (D + 1)``, D = C K^2: half of unfolding and multiplying. Sharing shifts would take fewer; no GPU kernel does."""
    D = C * K * K
    return Cost(N * P * P * D * (D + 1), ELEMENT[mode] * N * C * H * H + ACCUMULATOR_BYTES * D * (D + 1), product_unit(mode))


def ghost(N: int, C: int, O: int, H: int, K: int, mode: str) -> Cost:
    """``N H^2 (H^2 + 1) (O + C K^2)``, half of two Gram matrices over positions H x H; x and g once."""
    P = H * H
    return Cost(
        N * P * (P + 1) * (O + C * K * K), ELEMENT[mode] * N * P * (C + O) + 2 * ACCUMULATOR_BYTES * N, product_unit(mode)
    )


def score(R: int, C: int, mode: str) -> Cost:
    """A softmax; logits read once, as where a row stays on the chip, and written once; a label a row."""
    return Cost(SCORE_FLOPS * R * C, 2 * ELEMENT[mode] * R * C + ID_BYTES * R, "fp32")


def log1p(size: int) -> Cost:
    """Both terms of every value; float32 values once."""
    return Cost(LOG1P_FLOPS * size, 4 * size, "fp64")


def kron_log1p(I: int, O: int) -> Cost:
    """Both terms of every product; the float32 factors once."""
    return Cost(LOG1P_FLOPS * I * O, 4 * (I + O), "fp64")


def rate(unit: str, ceilings: dict[str, float]) -> float:
    """FLOP/s of a unit. A product of float32 may run on the multiply-add units, or on tensor cores in three or six parts."""
    if unit == "fp32 product":
        return max(ceilings["fp32"], ceilings["tf32"] / 3, ceilings["bf16"] / 6)
    return ceilings[unit]


def bound(cost: Cost, ceilings: dict[str, float]) -> Bound:
    """The larger of operations over the measured rate (FLOP/s) and bytes over the measured bandwidth (``copy``, B/s)."""
    return max(Bound(cost.flops / rate(cost.unit, ceilings), cost.unit), Bound(cost.bytes / ceilings["copy"], "copy"))


def fraction(cost: Cost, ceilings: dict[str, float], seconds: float) -> float:
    """The share of the binding ceiling that a time reaches."""
    return bound(cost, ceilings).seconds / seconds


def meant(op: str, mode: str, shape: dict[str, int], by: str) -> float | None:
    """The share of its ceiling that a kernel is meant to reach; None where nothing is promised."""
    if by == "copy":
        return 0.85
    return 0.70 if op == "linear_sq_" and mode == "bf16" and shape["T"] >= 512 else None


def passes(error: float, plain: float, mode: str = "fp32") -> bool:
    """The gate of the whole project; where TF32 is asked for, what its operands lose passes, too.

    Plain torch multiplies values of 16 bits with the units that we do: ``gate.product``.
    """
    return gate.passes(error, plain) or (mode == "tf32" and error <= TF32_ERROR)


def architecture(capability: tuple[int, int]) -> str:
    """The entry of TORCH_CUDA_ARCH_LIST; from Hopper on with the instructions of that chip alone."""
    return f"{capability[0]}.{capability[1]}" + ("a" if capability[0] >= 9 else "")
