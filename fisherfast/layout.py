# SPDX-License-Identifier: Apache-2.0
"""Where the sample axis is. Established by a probe, never assumed.

A layer may see ``[N, T, D]``, ``[T, N, D]``, ``[N*T, D]`` or no sample axis at all (a position table looked up once and
broadcast over the batch). Shapes cannot decide. So per-sample losses are back-propagated for subsets of the samples: a
row of g that is not zero belongs to a sample of the subset. A subset and its complement for each bit of the sample
number tell them apart, and show a row that depends on two samples for what it is. Four samples are enough to tell one
layout from another, and take four passes.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PROBED = 4  # samples that the probe looks at


class Kind(enum.Enum):
    """How samples lie along an axis: one each; N blocks of positions; or positions outside, samples inside."""

    AXIS = "axis"
    SAMPLE_MAJOR = "sample-major"
    SAMPLE_MINOR = "sample-minor"


@dataclass(frozen=True)
class Layout:
    """Samples lie along leading axis ``axis`` of the rows, in the way ``kind`` says."""

    axis: int
    kind: Kind

    def fits(self, lead: tuple[int, ...], N: int) -> bool:
        """Whether rows with leading axes ``lead`` can hold N samples in this layout."""
        if self.axis >= len(lead):
            return False
        size = lead[self.axis]
        return size == N if self.kind is Kind.AXIS else size % N == 0

    def samples_first(self, rows: Tensor, N: int) -> Tensor:
        """Rows ``[*lead, F]`` as ``[N, T, F]``; a view where strides allow."""
        axis = self.axis
        if self.kind is Kind.SAMPLE_MAJOR:
            rows = rows.unflatten(axis, (N, -1))
        elif self.kind is Kind.SAMPLE_MINOR:
            rows = rows.unflatten(axis, (-1, N))
            axis += 1
        rows = rows.movedim(axis, 0) if axis else rows
        return rows.reshape(N, -1, rows.shape[-1]) if rows.dim() != 3 else rows

    def sample_of_row(self, lead: tuple[int, ...], N: int, device: torch.device) -> Tensor:
        """The sample number of each row, broadcastable to ``lead``."""
        size = lead[self.axis]
        index = torch.arange(size, device=device)
        if self.kind is Kind.SAMPLE_MAJOR:
            index = index // (size // N)
        elif self.kind is Kind.SAMPLE_MINOR:
            index = index % N
        return index.view([-1 if a == self.axis else 1 for a in range(len(lead))])


def candidates(lead: tuple[int, ...], N: int) -> list[Layout]:
    """All layouts that rows with leading axes ``lead`` allow."""
    every = [Layout(axis, kind) for kind in Kind for axis in range(len(lead))]
    exact = [layout for layout in every if layout.fits(lead, N)]
    # An axis of size N is also N blocks of one position: keep one name for it.
    return [c for c in exact if c.kind is Kind.AXIS or lead[c.axis] != N]


def masks(N: int, device: torch.device) -> Iterator[Tensor]:
    """Subsets of the first samples, ``[N]`` of 0.0 and 1.0, that together tell every two of those apart."""
    few = min(N, PROBED)
    index = torch.arange(N, device=device)
    for bit in range(max(few - 1, 1).bit_length()):
        chosen = ((index >> bit) & 1).bool()
        for half in (chosen, ~chosen):
            yield (half & (index < few)).float()


class Evidence:
    """What the probe has seen of one use: the layouts still possible, and whether any gradient arrived."""

    def __init__(self) -> None:
        self.lead: tuple[int, ...] | None = None
        self.possible: list[Layout] = []
        self.alive = False
        self.had_sample_axis = False  # some axis is as long as there are samples

    def see(self, g: Tensor, mask: Tensor) -> None:
        """Strike the layouts under which a non-zero row of g ``[*lead, F]`` belongs to a sample outside ``mask``."""
        N = mask.shape[0]
        nonzero = (g != 0).any(-1)
        lead = tuple(nonzero.shape)
        if self.lead is None:
            self.lead, self.possible = lead, candidates(lead, N)
            self.had_sample_axis = N in lead
        self.alive = self.alive or bool(nonzero.any())
        outside = mask == 0
        self.possible = [
            layout for layout in self.possible if not bool((nonzero & outside[layout.sample_of_row(lead, N, g.device)]).any())
        ]

    @property
    def layout(self) -> Layout | None:
        """The one layout that explains everything seen; None if there is none or more than one."""
        return self.possible[0] if self.alive and len(self.possible) == 1 else None

    @property
    def mixes_samples(self) -> bool:
        """No layout explains what was seen: rows depend on several samples, or are gathered by data."""
        return self.alive and not self.possible
