# SPDX-License-Identifier: Apache-2.0
"""Factors whose rows are samples, not positions: ``sharing="reduce"``, by the mean of a sample's inputs and the sum of its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fisherfast._precision import wide
from fisherfast.capture.collector import Samples
from fisherfast.fisher.blocks.block_sums import BatchSum
from fisherfast.fisher.blocks.existing_rows import ExistingRows
from fisherfast.fisher.blocks.kronecker import Place
from fisherfast.fisher.blocks.kronecker_sums import KroneckerSums
from fisherfast.rules import Convolution, Form, Lookup, Rows


class Reduced(NamedTuple):
    """The sums over positions x ``[N, groups * I]`` and g ``[N, groups * O]``, and how many positions there are, ``[N]``."""

    x: Tensor
    g: Tensor
    positions: Tensor


class ReducedSums(KroneckerSums):
    """The sums of one Kronecker block; see ``BlockSums``."""

    def __init__(
        self,
        place: Place,
        form: Form,
        weight: Tensor,
        max_factor_dim: int,
        keep_rows: bool,
        leader: KroneckerSums | None = None,
    ) -> None:
        if isinstance(form, Lookup):
            raise ValueError(
                f"{place.name}: KFAC(sharing='reduce') must have inputs whose mean is a row, got an embedding, whose input factor "
                "would be a matrix over the vocabulary; use sharing='expand', or freeze it"
            )
        super().__init__(replace(place, sharing="reduce"), form, weight, max_factor_dim, keep_rows, leader)

    def _num_rows(self, form: Form, rows: Rows) -> int:
        return rows.num_samples

    def add(self, form: Form, rows: Rows, scale: float, number: int, samples: Samples, staged: bool) -> None:
        """Take the rows of one pass; the inputs are those of all passes, and count once."""
        if isinstance(form, Convolution):
            x, g, positions = _of_images(form, rows, self._kernel)
        else:
            x, g, positions = _of_rows(form, rows, self._existing, samples.exists)
        if number == 0 and self._inputs.new(self.place.name, form.as_used(rows)[0]):
            self._add_means(x / positions.clamp_min(1).unsqueeze(1), samples.weight, positions > 0, self.A.target(staged))
        self._add_by_group(self.B, self.B.target(staged), g, scale, weight=samples.weight)

    def _add_means(self, x: Tensor, weight: Tensor | None, counts: Tensor, A: Tensor) -> None:
        """A sample without positions has no mean."""
        weight = counts.to(torch.float32) if weight is None else weight * counts
        self._add_by_group(self.A, A, x, weight=weight, bias=self.place.bias is not None)
        self.A.visited(weight.sum(dtype=torch.float64))

    def _add_by_group(
        self, one: BatchSum, target: Tensor, rows: Tensor, scale: float = 1.0, *, weight: Tensor | None, bias: bool = False
    ) -> None:
        if self.place.groups > 1:
            one.foresee(rows)
        for k, mine in enumerate(rows.unflatten(1, (self.place.groups, -1)).unbind(1)):
            one.add_outer(target[k], mine, scale, weight=weight, bias=bias)


def _of_rows(form: Form, rows: Rows, existing: ExistingRows, masks: Sequence[Tensor]) -> Reduced:
    x, g = map(wide, form.as_used(rows))
    if rows.offsets is not None:
        return Reduced(_segments(x, rows.offsets), _segments(g, rows.offsets), rows.offsets.diff())
    mask = existing.among(g, masks)
    if mask is None:
        return Reduced(x.sum(1), g.sum(1), torch.full((len(g),), g.shape[1], device=g.device))
    return Reduced((x * mask.unsqueeze(-1)).sum(1), g.sum(1), mask.sum(1))


def _of_images(form: Convolution, rows: Rows, kernel: tuple[int, ...]) -> Reduced:
    each = [_of_images_of_one_size(form, use, kernel) for use in rows.uses or (rows,)]
    return Reduced(*(sum(parts[1:], parts[0]) for parts in zip(*each, strict=True)))


def _of_images_of_one_size(form: Convolution, rows: Rows, kernel: tuple[int, ...]) -> Reduced:
    patches, pixels = form.patch_sums(rows._replace(x=wide(rows.inputs)), kernel), wide(rows.g).flatten(2).sum(2)
    x, g = (pixels, patches) if form.transposed else (patches, pixels)
    positions = math.prod(rows.g.shape[2:])
    if rows.offsets is None:
        return Reduced(x, g, torch.full((len(g),), positions, device=g.device))
    return Reduced(_segments(x, rows.offsets), _segments(g, rows.offsets), rows.offsets.diff() * positions)


def _segments(rows: Tensor, offsets: Tensor) -> Tensor:
    return torch.segment_reduce(rows, "sum", offsets=offsets)
