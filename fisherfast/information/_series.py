# SPDX-License-Identifier: Apache-2.0
"""Sums over the eigenvalues f_j of a block of a Fisher, in float64, without cancellation and a chunk at a time.

Everything an estimator needs of a direction is a function of ``s = lambda^2 f / beta``: its share ``u = s / (1 + s)``
(0 where the prior decides the weight, 1 where the data do) and its cost ``g(s) = log(1 + s) - s / (1 + s)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fisherfast.fisher import Spectrum
from fisherfast.ops import _log1p
from fisherfast.ops.kron_log1p_sum import kron_log1p_sum
from fisherfast.ops.log1p_sum import log1p_sum

# What a kernel reads in one call, as a float64 copy where it is float32: bounds that copy.
_READ = 1 << 20
# Eigenvalues of a block that a first guess needs: sums over so many are within a percent or so.
_SAMPLE = 1 << 18


def sum_over(spectrum: Spectrum, scale: float, *terms: Callable[[Tensor], Tensor]) -> list[float]:
    """``sum_j term(scale * f_j)`` over the block's eigenvalues, for each term, in float64; a term of 0 is 0."""
    totals = torch.zeros(len(terms), dtype=torch.float64, device=spectrum.factors[0].device)
    for eigenvalues in spectrum.chunks(_log1p.CHUNK):
        s = eigenvalues * scale
        totals += torch.stack([term(s).sum() for term in terms])
    return totals.tolist()


def costs_and_shares(spectrum: Spectrum, scale: float) -> tuple[float, float]:
    """``sum_j g(scale * f_j)`` and ``sum_j u(scale * f_j)``: as ``sum_over``, in one read of the factors by one kernel.

    Numerics: relative error below 1e-12; the shares, a difference of two sums, lose another factor ``log s`` at most.
    """
    first, *others = spectrum.factors
    sums, factor = torch.zeros(2, dtype=torch.float64, device=first.device), scale / spectrum.divisor
    if others:
        kron_log1p_sum(sums, first, functools.reduce(lambda a, b: torch.outer(a, b).flatten(), others), factor)
    else:
        for part in first.split(_READ):
            log1p_sum(sums, part.double(), factor)
    logs, costs = sums.tolist()
    return costs, logs - costs


def thinned(spectrum: Spectrum) -> tuple[Spectrum, float]:
    """The block with evenly spaced entries of its longest factor, some 2^18 eigenvalues, and how many each stands for."""
    longest = max(range(len(spectrum.factors)), key=lambda i: spectrum.factors[i].numel())
    before, factor, after = spectrum.factors[:longest], spectrum.factors[longest], spectrum.factors[longest + 1 :]
    few = factor[:: max(1, spectrum.num_parameters // _SAMPLE)]
    return replace(spectrum, factors=(*before, few, *after)), factor.numel() / max(1, few.numel())


def squared_distance(a: Tensor, b: Tensor | None) -> float:
    """``||a - b||^2`` in float64; ``||a||^2`` without b."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    flat = a.detach().reshape(-1)
    other = None if b is None else b.detach().to(a.device).reshape(-1)
    for start in range(0, flat.numel(), _log1p.CHUNK):
        difference = flat[start : start + _log1p.CHUNK].double()
        if other is not None:
            difference = difference - other[start : start + _log1p.CHUNK].double()
        total += difference.dot(difference)
    return total.item()
