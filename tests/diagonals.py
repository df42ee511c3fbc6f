# SPDX-License-Identifier: Apache-2.0
"""A diagonal Fisher of a few parameters, for tests of what is done with one."""

import torch

from fisherfast.fisher import DiagonalFisher, Provenance
from fisherfast.fisher.counts import Counts
from fisherfast.fisher.coverage import Coverage

SHAPES = {"body.0.weight": (5, 3), "body.0.bias": (5,), "head.weight": (2, 5), "scale": (7,)}


def example(seed=0, dtype=torch.float64, **kwargs):
    """Of 1000 samples, entries from 0.1 to 1.1."""
    generator = torch.Generator().manual_seed(seed)
    return DiagonalFisher(
        {name: torch.rand(shape, dtype=dtype, generator=generator) + 0.1 for name, shape in SHAPES.items()}, 1000, **kwargs
    )


def of_sums(sums, num_samples, num_positions=None, batches=0, provenance=None, coverage=None, aliases=None):
    """Of accumulators, each with its own weight, as a run makes one."""
    positions = num_samples if num_positions is None else num_positions
    counts = Counts(num_samples, positions, batches, provenance or Provenance(), Coverage(coverage), aliases or {})
    return DiagonalFisher._of(sums, counts, None)
