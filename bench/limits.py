# SPDX-License-Identifier: Apache-2.0
"""The most memory that ours is meant to take above a plain step: its result in float32 and 64 MiB, from the sizes of each case."""

import functools

import models
from torch import nn

ALLOWANCE = 64 * 2**20
_MAX_EXACT = 256  # numbers of a parameter whose block KFAC keeps whole


def memory(case: str, quantity: str) -> int | None:
    """Bytes; None where there is no limit. EKFAC's result is taken to be the factors; the largest one's decomposition is added."""
    if case not in models.CASES:
        return None
    weights, factors, largest = _sizes(case)
    of_eigh = 12 * largest**2  # the eigenvectors, and twice that for LAPACK
    above = {"diagonal": 4 * weights, "exact": 4 * weights, "kfac": 4 * factors}
    above |= dict.fromkeys(("ekfac", "ekfac correction"), 4 * factors + of_eigh)
    return above[quantity] + ALLOWANCE if quantity in above else None


@functools.cache
def _sizes(case: str) -> tuple[int, int, int]:
    """The numbers of the diagonal and of KFAC, and the columns of its largest factor."""
    model = models.CASES[case].network()
    return sum(p.numel() for p in model.parameters()), *_factors(model)


def _factors(model: nn.Module) -> tuple[int, int]:
    """How many numbers KFAC keeps, and the columns of its largest factor."""
    numbers, widths = 0, [0]
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            sides = len(module.weight), module.weight[0].numel() + (module.bias is not None)
            numbers += sum(side**2 for side in sides)
            widths += sides
        elif isinstance(module, nn.Embedding):
            numbers += module.num_embeddings + module.embedding_dim**2
        else:
            sizes = [p.numel() for p in own.values()]
            numbers += sum(size**2 if size <= _MAX_EXACT else size for size in sizes)
    return numbers, max(widths)
