# SPDX-License-Identifier: Apache-2.0
"""Where the samples are. Established by tagging them, never assumed.

A layer may see ``[N, T, D]``, ``[T, N, D]``, ``[N*T, D]``, rows gathered by data (experts) or no sample axis at all (a position
table looked up once and broadcast over the batch). Shapes cannot decide. But g is linear in the gradient at the root: if
sample n's part of that is multiplied by ``2^k_n``, then so is every row of g that belongs to sample n, without any rounding. So
two backward passes, one of them tagged, tell for every row which sample it belongs to; a row that depends on several samples
shows no single factor. Where the rows of a use lie as an axis would have them, that axis is remembered for all batches;
where they do not, every batch is tagged.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfast._pieces import PIECE, pieces
from fisherfast._precision import wide_dtype

PROBED = 4  # samples that a first probe looks at: enough to tell one layout from another
UNKNOWN, MIXED = -1, -2  # of a row: its gradient is zero; it depends on several samples


class Kind(enum.Enum):
    """How samples lie along an axis: one each; N blocks of positions; positions outside, samples inside; or as packed."""

    AXIS = "axis"
    SAMPLE_MAJOR = "sample-major"
    SAMPLE_MINOR = "sample-minor"
    PACKED = "packed"

    @property
    def flat(self) -> bool:
        """Whether samples and their positions share the axis: how many each has is not written anywhere."""
        return self in (Kind.SAMPLE_MAJOR, Kind.SAMPLE_MINOR)


@dataclass(frozen=True)
class Layout:
    """Samples lie along leading axis ``axis`` of the rows, in the way ``kind`` says."""

    axis: int
    kind: Kind

    def fits(self, lead: tuple[int, ...], N: int, offsets: Tensor | None = None) -> bool:
        """Whether rows with leading axes ``lead`` can hold N samples, packed by ``offsets`` or not, in this layout."""
        if self.axis >= len(lead):
            return False
        size = lead[self.axis]
        if self.kind is Kind.PACKED:
            return offsets is not None and size == int(offsets[-1])
        return size == N if self.kind is Kind.AXIS else size % N == 0

    def explains(self, numbers: Tensor, N: int, offsets: Tensor | None = None) -> bool:
        """Whether rows that belong to samples ``numbers`` ``[*lead]``, as far as that is known, lie like this."""
        if not self.fits(tuple(numbers.shape), N, offsets):
            return False
        mine = self.sample_of_row(tuple(numbers.shape), N, numbers.device, offsets)
        return bool(((numbers == mine) | (numbers == UNKNOWN)).all())

    def samples_first(self, rows: Tensor, N: int, features: int = 1) -> Tensor:
        """Rows ``[*lead, *F]`` as ``[N, T, *F]``; a view where strides allow."""
        axis = self.axis
        if self.kind is Kind.SAMPLE_MAJOR:
            rows = rows.unflatten(axis, (N, -1))
        elif self.kind is Kind.SAMPLE_MINOR:
            rows = rows.unflatten(axis, (-1, N))
            axis += 1
        rows = rows.movedim(axis, 0) if axis else rows
        lead = rows.dim() - features
        return rows if lead == 2 else rows.reshape(N, -1, *rows.shape[lead:])

    def packed(self, rows: Tensor, features: int = 1) -> Tensor:
        """Rows ``[*lead, *F]`` of packed samples as ``[M, *F]``, along the axis first."""
        return rows.movedim(self.axis, 0).flatten(0, rows.dim() - features - 1)

    def sample_of_row(self, lead: tuple[int, ...], N: int, device: torch.device, offsets: Tensor | None = None) -> Tensor:
        """The sample number of each row, broadcastable to ``lead``."""
        size = lead[self.axis]
        index = torch.arange(size, device=device)
        if offsets is not None and self.kind is Kind.PACKED:
            index = torch.bucketize(index, offsets[1:], right=True)
        elif self.kind is Kind.SAMPLE_MAJOR:
            index = index // (size // N)
        elif self.kind is Kind.SAMPLE_MINOR:
            index = index % N
        return index.view([-1 if a == self.axis else 1 for a in range(len(lead))])


def candidates(lead: tuple[int, ...], N: int, offsets: Tensor | None = None) -> list[Layout]:
    """All layouts that rows with leading axes ``lead`` allow."""
    every = [Layout(axis, kind) for kind in Kind for axis in range(len(lead))]
    exact = [layout for layout in every if layout.fits(lead, N, offsets)]
    # An axis of size N is also N blocks of one position: keep one name for it.
    return [c for c in exact if c.kind in (Kind.AXIS, Kind.PACKED) or lead[c.axis] != N]


def completed(numbers: Tensor, N: int) -> Tensor:
    """``numbers`` ``[*lead]`` where rows of unknown owners have that of their neighbours along an axis that holds whole samples in any order:
    of each entry all known rows are of one sample, and no two entries are of the same.
    """
    for axis in range(numbers.dim()):
        if numbers.shape[axis] != N or not numbers.numel():
            continue
        entries = numbers.movedim(axis, 0).reshape(N, -1)
        owners = entries.amax(1)
        whole = ((entries == owners.unsqueeze(1)) | (entries == UNKNOWN)).all() & (owners >= 0).all()
        if bool(whole) and len(owners.unique()) == N:
            shape = [N if other == axis else 1 for other in range(numbers.dim())]
            return torch.where(numbers == UNKNOWN, owners.view(shape), numbers)
    return numbers


class Gathered:
    """Rows that belong to the samples ``numbers`` ``[*lead]`` says, in one batch.

    Rows without a gradient are left out or, with ``every``, assigned to the last sample, where it does not matter whose they are.
    """

    def __init__(self, numbers: Tensor, N: int, every: bool = False) -> None:
        flat = numbers.flatten()
        flat = torch.where(flat == UNKNOWN, N - 1, flat) if every else flat
        kept = (flat >= 0).nonzero().squeeze(1)
        self._order = kept[flat[kept].argsort(stable=True)]
        counts = torch.bincount(flat[kept], minlength=N)
        self.offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])  # [N + 1]: where each sample's rows begin

    def packed(self, rows: Tensor, features: int = 1) -> Tensor:
        """Rows ``[*lead, *F]`` as ``[M, *F]``, those of one sample together."""
        return rows.reshape(-1, *rows.shape[rows.dim() - features :])[self._order]


class Tags:
    """Powers of two by which each sample's part of the root gradient is multiplied, so that its rows can be recognised: in pass k,
    ``2^(step * digit_k)`` with digit_k the k-th digit of the sample's number in ``base``.

    ``narrow``: gradients pass through float16, which has little room, so factors are fewer and smaller. ``large``: they are as large there
    as they may be, by a loss scale, so factors are divided by the largest and none exceeds 1.
    """

    def __init__(self, N: int, few: int, narrow: bool = False, large: bool = False) -> None:
        self.N, self.few, self.narrow = N, min(few, N), narrow
        # Far apart when samples are few: a trace of another sample in a row then weighs a lot more than rounding.
        self.base = self.few if self.few <= PROBED else 4 if narrow else 32
        self.step = 2 if narrow else 8 if self.few <= PROBED else 1
        self.largest = 2.0 ** ((self.base - 1) * self.step) if narrow and large else 1.0  # what all factors are divided by
        self.passes = 1 if self.few <= self.base else math.ceil(math.log(self.few, self.base) - 1e-9)

    def factors(self, device: torch.device) -> list[Tensor]:
        """``[N]`` for each pass; 0 for samples that are not looked at."""
        number = torch.arange(self.N, device=device)
        digits = [number // self.base**k % self.base for k in range(self.passes)]
        return [torch.exp2((d * self.step).double()).div(self.largest).where(number < self.few, 0.0) for d in digits]


class Sightings:
    """What tagged passes showed of one use's rows: per pass how large each row is, by its largest entry and by its sum."""

    def __init__(self, tags: Tags) -> None:
        self.tags = tags
        self._seen: list[tuple[Tensor, Tensor]] = []

    def see(self, g: Tensor, features: int) -> None:
        """Note a tagged pass's gradient ``[*lead, *F]``."""
        largest, total = _sizes(g, features)
        self._seen.append((largest * self.tags.largest, total * self.tags.largest))

    def numbers(self, g: Tensor, features: int) -> Tensor:
        """The sample of every row ``[*lead]``, ``UNKNOWN`` or ``MIXED``, from the same pass without tags."""
        largest, total = _sizes(g, features)
        number = torch.zeros(total.shape, dtype=torch.int64, device=g.device)
        clean = torch.ones_like(number, dtype=torch.bool)
        looked_at = torch.zeros_like(clean)
        tolerance = _NARROW_TOLERANCE if self.tags.narrow else _TOLERANCE
        for k, (tagged, tagged_sum) in enumerate(self._seen):
            ratio = tagged / largest
            digit = ratio.log2().div(self.tags.step).round().nan_to_num(0, 0, 0).clamp(0, self.tags.base - 1)
            factor = torch.exp2(digit * self.tags.step)
            clean &= (ratio - factor).abs() <= tolerance * factor
            clean &= (tagged_sum - factor * total).abs() <= tolerance * tagged_sum
            looked_at |= tagged_sum > 0
            number += digit.long() * self.tags.base**k
        number = number.where(clean & (number < self.tags.few), MIXED)
        # Rounded beyond recognition, and next to nothing.
        looked_at &= clean | (largest > (_ROUNDED if self.tags.narrow else 2.0**20 * torch.finfo(g.dtype).tiny))
        return number.where((total > 0) & looked_at, UNKNOWN)


def _sizes(g: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """The largest absolute value of every row of ``[*lead, *F]`` and the sum of all; no rounding tells one tag's from another's."""
    every = g.detach().flatten(g.dim() - features)
    if every.numel() <= PIECE:
        return _sizes_of_piece(every)
    # Allocated first: a small tensor that stays between two pieces would keep the second from the memory of the first.
    sizes = torch.empty(2, every.shape[:-1].numel(), dtype=torch.float64, device=g.device)
    first = 0
    for rows in pieces(every):
        last = first + rows.shape[:-1].numel()
        for of_all, of_rows in zip(sizes, _sizes_of_piece(rows), strict=True):
            of_all[first:last] = of_rows.flatten()
        first = last
    return sizes[0].view(every.shape[:-1]), sizes[1].view(every.shape[:-1])


def _sizes_of_piece(rows: Tensor) -> tuple[Tensor, Tensor]:
    rows = rows.abs()
    largest = rows.amax(-1) if rows.shape[-1] else rows.new_zeros(rows.shape[:-1])
    return largest.double(), rows.sum(-1, dtype=wide_dtype(rows.dtype)).double()


_TOLERANCE = 1e-3  # kernels that add in a changing order may round a tagged pass differently
_NARROW_TOLERANCE = 0.05
_ROUNDED = 100 * torch.finfo(torch.float16).smallest_normal


@dataclass(frozen=True)
class Finding:
    """What is known of one use's rows: the one layout that explains them, if there is one and they are of two samples at least; else who owns
    each row, and all ``possible`` layouts.
    """

    layout: Layout | None
    numbers: Tensor
    had_sample_axis: bool  # some axis is as long as there are samples
    possible: tuple[Layout, ...] = ()

    @classmethod
    def of(cls, numbers: Tensor, N: int, offsets: Tensor | None = None) -> Finding:
        """Compare the rows' samples ``[*lead]`` with all layouts."""
        lead = tuple(numbers.shape)
        possible = [layout for layout in candidates(lead, N, offsets) if layout.explains(numbers, N, offsets)]
        # Samples of one length lie as blocks too; in the next batch they may not.
        possible = [layout for layout in possible if layout.kind is Kind.PACKED] or possible
        # The rows of one sample lie as along an axis by chance: a layer that is called for each sample, whose rows are positions.
        known = len(numbers[numbers >= 0].unique()) > 1
        return cls(possible[0] if known and len(possible) == 1 else None, numbers, N in lead, tuple(possible))

    @property
    def lies_nowhere(self) -> bool:
        """Whether there are rows, and no layout holds the samples in them."""
        return bool(self.numbers.numel()) and not self.possible

    @property
    def owners(self) -> set[int]:
        """The samples that some row is known to be of."""
        return set(self.numbers[self.numbers >= 0].unique().tolist())

    @property
    def mixes_samples(self) -> bool:
        """Whether some row depends on several samples: it has no sample axis, or samples are not independent."""
        return bool((self.numbers == MIXED).any())
