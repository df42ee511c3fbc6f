# SPDX-License-Identifier: Apache-2.0
"""Random numbers by counting: a pure function of (seed, sample, position, draw), so that what a sample draws depends
neither on the batch it is in, nor on padding, order or rank. No generator state is read or changed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The constants of the SplitMix64 finaliser, as signed 64-bit integers (torch multiplies them modulo 2^64).
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(z: Tensor) -> Tensor:
    z = z + GOLDEN
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def uniform(seed: int, sample: Tensor, position: Tensor, draw: int, stream: int = 0) -> Tensor:
    """Uniform float64 numbers in (0, 1), of the broadcast shape of ``sample`` and ``position`` (int64)."""
    z = _mixed(torch.full_like(sample, seed))
    z = _mixed(z ^ _mixed(sample))
    z = _mixed(z + _mixed(position ^ (stream << 48)))
    z = _mixed(z ^ _mixed(torch.full_like(sample, draw)))
    return (_shifted(z, 11).double() + 0.5) * 2.0**-53


def normal(seed: int, sample: Tensor, position: Tensor, draw: int) -> Tensor:
    """Standard normal float64 numbers, of the broadcast shape of ``sample`` and ``position``."""
    return box_muller(uniform(seed, sample, position, draw), uniform(seed, sample, position, draw, stream=1))


def box_muller(u: Tensor, v: Tensor) -> Tensor:
    """Standard normal numbers, of the shape of two tensors of independent uniform numbers in (0, 1)."""
    return (-2.0 * u.log()).sqrt() * (2.0 * math.pi * v).cos()
