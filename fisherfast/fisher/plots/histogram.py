# SPDX-License-Identifier: Apache-2.0
"""Eigenvalues counted by size: what a picture of the spectrum needs of a network of any size, a chunk at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fisherfast.fisher.protocol import Spectrum

BINS_PER_DECADE = 50
NEGLIGIBLE = 1e-16
_LOWEST, _HIGHEST = -324, 309  # the decades of float64
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Histogram:
    """Counts of eigenvalues in bins of equal width in ``log10``, largest first, those without any left out.

    ``values`` are the middles of the bins; ``negligible`` counts the eigenvalues below ``NEGLIGIBLE`` of the largest, which are
    zero but for rounding where factors are decomposed, or zero itself, and have no bin.
    """

    values: tuple[float, ...]
    counts: tuple[int, ...]
    negligible: int

    def ranked(self) -> tuple[list[int], list[float]]:
        """The curve of the sorted eigenvalues: ranks from 1 on and values, two points for a bin of several, one for a single."""
        ranks: list[int] = []
        values: list[float] = []
        before = 0
        for value, count in zip(self.values, self.counts, strict=True):
            ends = (before + 1, before + count) if count > 1 else (before + 1,)
            ranks += ends
            values += [value] * len(ends)
            before += count
        return ranks, values


def histogram(spectra: Iterable[Spectrum]) -> Histogram:
    """Count the eigenvalues of all blocks, ``BINS_PER_DECADE`` bins to a power of ten.

    Shapes:   what ``F.spectra()`` yields.
    Scale:    a value is off by at most half a bin, 2.4%.
    Errors:   ValueError for eigenvalues that are not finite.
    Numerics: counts are exact.
    Source:   ours.
    """
    bins = (_HIGHEST - _LOWEST) * BINS_PER_DECADE
    found, parameters = torch.zeros(bins, dtype=torch.int64, device="cpu"), 0
    for spectrum in spectra:
        parameters += spectrum.num_parameters
        for values in spectrum.chunks(_CHUNK):
            if not bool(values.isfinite().all()):
                raise ValueError(f"histogram: eigenvalues must be finite, got others in {list(spectrum.parameters)}")
            positive = values[values > 0].double()
            at = (positive.log10() * BINS_PER_DECADE).floor().long() - _LOWEST * BINS_PER_DECADE
            found += torch.bincount(at, minlength=bins).cpu()
    filled = found.nonzero().flatten().flip(0)
    filled = filled[filled >= filled[:1] + round(math.log10(NEGLIGIBLE) * BINS_PER_DECADE)]
    middles = (math.pow(10, (at + 0.5) / BINS_PER_DECADE + _LOWEST) for at in filled.tolist())
    counts = found[filled].tolist()
    return Histogram(tuple(middles), tuple(counts), parameters - sum(counts))
