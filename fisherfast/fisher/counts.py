# SPDX-License-Identifier: Apache-2.0
"""What a run knows beside its sums: how many samples, measured how, covered by what. Every result carries it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist

from fisherfast import _checks
from fisherfast.fisher import pooling, serialize
from fisherfast.fisher.coverage import Coverage
from fisherfast.fisher.protocol import Provenance


@dataclass(frozen=True)
class Counts:
    """How many samples were measured, how, and what covered each parameter; a part of every result."""

    num_samples: int
    num_positions: int
    batches: int
    provenance: Provenance
    coverage: Coverage
    aliases: dict[str, str]

    @classmethod
    def given(
        cls,
        caller: str,
        shapes: Mapping[str, torch.Size],
        num_samples: int,
        num_positions: int | None,
        provenance: Provenance | None,
        coverage: Mapping[str, str] | None,
        aliases: Mapping[str, str] | None,
    ) -> Self:
        """Of what was measured elsewhere, as far as the caller says. Errors: ValueError."""
        samples = _checks.integer(caller, "num_samples", num_samples, 1)
        positions = _checks.integer(caller, "num_positions", samples if num_positions is None else num_positions, 0)
        for alias, name in (aliases or {}).items():
            if alias in shapes or name not in shapes:
                raise ValueError(f"{caller}: aliases must map other names to those of parameters, got {alias!r}: {name!r}")
        how = Coverage(coverage, {name: shape.numel() for name, shape in shapes.items()})
        return cls(samples, positions, 0, provenance or Provenance(), how, dict(aliases or {}))

    def pooled(self, other: Counts) -> Counts:
        """Of both data sets."""
        mine, theirs = self.provenance, other.provenance
        different = [field for field in ("draws", "seed") if getattr(mine, field) != getattr(theirs, field)]
        return Counts(
            self.num_samples + other.num_samples,
            self.num_positions + other.num_positions,
            self.batches + other.batches,
            pooling.pooled_provenance(mine, different=different),
            self.coverage + other.coverage,
            self.aliases,
        )

    def reduced(self, group: dist.ProcessGroup | None, device: torch.device) -> Counts:
        """Of the data of all ranks, on every rank alike; the coverage stays the rank's own."""
        draws = {"draws": self.provenance.draws, "seed": self.provenance.seed}
        different = pooling.differing_fields(draws, group, device)
        numbers = torch.tensor([self.num_samples, self.num_positions, self.batches], device=device)
        dist.all_reduce(numbers, group=group)
        provenance = pooling.pooled_provenance(self.provenance, different=different)
        samples, positions, batches = numbers.tolist()
        return Counts(samples, positions, batches, provenance, self.coverage, self.aliases)

    def saying(self, rest: str, blocks: Mapping[str, str]) -> Counts:
        """The same, with what is kept of each parameter added to its coverage: ``blocks`` for those in blocks, ``rest`` for the others."""
        known = self.coverage
        how = {name: way if ":" in way else f"{way}: {rest}" for name, way in known.items()} | dict(blocks)
        return dataclasses.replace(self, coverage=Coverage(how, known.sizes, known.seconds, known.underflow))

    def state(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "provenance": dataclasses.asdict(self.provenance),
            "num_samples": self.num_samples,
            "num_positions": self.num_positions,
            "batches": self.batches,
            "aliases": self.aliases,
            **self.coverage.state(),
        }

    @classmethod
    def from_state(cls, fields: Mapping[str, Any]) -> Self:
        """The counts whose ``state`` is among the fields."""
        samples, positions, batches = (fields[name] for name in ("num_samples", "num_positions", "batches"))
        provenance, coverage = Provenance(**fields["provenance"]), Coverage.from_state(fields)
        return cls(samples, positions, batches, provenance, coverage, fields["aliases"])


class Counted:
    """What every result says of how it was measured, and how it is kept."""

    _counts: Counts

    @property
    def num_samples(self) -> int:
        """How many samples were measured."""
        return self._counts.num_samples

    @property
    def num_positions(self) -> int:
        """How many labels these samples have."""
        return self._counts.num_positions

    @property
    def batches(self) -> int:
        """How many batches were measured."""
        return self._counts.batches

    @property
    def provenance(self) -> Provenance:
        """How it was measured."""
        return self._counts.provenance

    @property
    def coverage(self) -> Coverage:
        """How each parameter was measured."""
        return self._counts.coverage

    @property
    def aliases(self) -> dict[str, str]:
        """The other names of tied tensors."""
        return self._counts.aliases

    def _identity(self) -> dict[str, Any]:
        """What must be equal for pooling to mean anything."""
        raise NotImplementedError

    def _pooled(self, other: Self) -> Self:
        """The result of both data sets together, of results of one identity."""
        raise NotImplementedError

    def __add__(self, other: Self) -> Self:
        """The result of both data sets together. Errors: ValueError if they were measured in different ways.

        Two runs that drew labels with the same seed for the same sample indices used the same random numbers twice; give
        them different seeds or sample offsets.
        """
        if not pooling.check_kind(self, other):
            return NotImplemented
        pooling.check_same(self._identity(), other._identity())
        return self._pooled(other)

    def __radd__(self, other: object) -> Self:
        """``sum([F1, F2])`` begins with 0."""
        return self if other == 0 and isinstance(other, int) else NotImplemented

    def to(self: serialize.Stored, device: str | torch.device) -> serialize.Stored:
        """A copy on another device, as if saved and loaded there. Errors: ValueError for a device that is not available."""
        return serialize.moved(self, str(device))

    def save(self: serialize.Storable, path: str | os.PathLike[str], *, extra: Mapping[str, str] | None = None) -> None:
        """Write to a safetensors file, whole or not at all; ``fisherfast.load`` reads it back bit by bit."""
        serialize.save(self, path, extra)


class Measured(Counted):
    """The part of ``protocol.Fisher`` that is about which parameters were measured, and how."""

    shapes: dict[str, torch.Size]

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in the model's order; a tied tensor once, under its first name."""
        return tuple(self.shapes)

    @property
    def num_parameters(self) -> int:
        """How many numbers the parameters hold."""
        return sum(shape.numel() for shape in self.shapes.values())

    def _identity(self) -> dict[str, Any]:
        """What must be equal for pooling to mean anything."""
        return {"structure": type(self).__name__, **pooling.identity(self.shapes, self.aliases, self.provenance)}
