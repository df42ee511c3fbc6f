# SPDX-License-Identifier: Apache-2.0
"""What the two log-determinant kernels share: both terms of a product s, and the sums that a program hands over.

Everything is float64: a program does some 30 operations for each value, which even a GPU with few float64 units does in a
fraction of the time that measuring a Fisher takes; two-float arithmetic would be ten times as many.
"""

import math

import triton
import triton.language as tl

# Values of a program's step; with four warps four of them a thread, which stay in registers.
BLOCK = 512

_LOG2 = tl.constexpr(math.log(2))
_TWICE_BIAS = tl.constexpr(2 * 1023 << 52)  # less the biased exponent of 2^k: that of 2^-k
_EXPONENT = tl.constexpr(-(1 << 52))  # the bits above the mantissa
_ROUND = tl.constexpr((1023 << 52) - 0x3FE6A09E667F3BCD)  # from sqrt(1/2) to 1
_TERMS = tl.constexpr(9)  # the next one is 2e-17 of the sum


@triton.jit
def log1p_terms(s):
    """``(log(1 + s) - k log 2, g(s) - k log 2, k + 1023)``, g(s) = log(1 + s) - s / (1 + s); NaN unless 0 < 1 + s < 6e307.

    With ``1 + s = 2^k (1 + v)``, 1 + v between sqrt(1/2) and sqrt(2), and ``z = v / (2 + v)``: ``log(1 + v) = 2 atanh(z)``, a
    series in z^2. Small s have k = 0 and v = s, and then all terms are positive: nothing cancels. One division.
    """
    bits = (1.0 + s).to(tl.int64, bitcast=True)
    rounded = bits + _ROUND
    power = (-(rounded & _EXPONENT) + _TWICE_BIAS).to(tl.float64, bitcast=True)  # 2^-k
    v = tl.where(bits > 0, s * power + (power - 1.0), float("nan"))
    w = 1.0 / ((1.0 + v) * (2.0 + v))
    z = v * (1.0 + v) * w
    r = (2.0 + v) * w  # 1 / (1 + v)
    square = z * z
    series = square * 0.0 + 2.0 / (2 * _TERMS + 1)
    for n in tl.static_range(1, _TERMS):
        series = series * square + 2.0 / (2 * (_TERMS - n) + 1)
    tail = z * square * series
    return 2.0 * z + tail, (z * v * r + tail) - r * (1.0 - power), rounded >> 52


@triton.jit
def store_sums(partial, program, logs, costs, exponents, terms):
    """``partial[program]`` = the two sums of a program that added up ``terms`` values in each of its lanes."""
    whole = tl.sum(exponents - 1023 * terms, 0).to(tl.float64) * _LOG2
    tl.store(partial + 2 * program, whole + tl.sum(logs, 0))
    tl.store(partial + 2 * program + 1, whole + tl.sum(costs, 0))
