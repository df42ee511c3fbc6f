# SPDX-License-Identifier: Apache-2.0
"""Which measurements may be pooled: those of the same parameters, taken in the same way.

A measurement's identity is a dictionary of plain values. Two identities are compared directly, those of many ranks by
their digests, so that no rank has to send names to the others and none is left waiting in a collective that cannot match.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fisherfast.fisher.protocol import Provenance
from fisherfast.fisher.spread import Spread


def identity(shapes: Mapping[str, torch.Size], aliases: Mapping[str, str], provenance: Provenance) -> dict[str, Any]:
    """What must be equal for pooling to mean anything."""
    return {
        "parameters": {name: list(shape) for name, shape in shapes.items()},
        "aliases": dict(aliases),
        "fisher_type": provenance.fisher_type,
        "likelihood": provenance.likelihood,
        "model": provenance.model,
    }


def check_same(mine: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raise ValueError, with the reason, unless the two identities are equal."""
    for field, value in mine.items():
        if value != other[field]:
            raise ValueError(f"+: both Fishers must have the same {field}, got {_difference(value, other[field])}")


def check_kind(mine: Any, other: Any) -> bool:
    """Whether two are results of one kind. Errors: TypeError, with the reason, for results of two."""
    if isinstance(other, type(mine)):
        return True
    if hasattr(other, "provenance"):
        raise TypeError(
            f"+: both results must have one structure, got {type(mine).__name__} and {type(other).__name__}; measure both alike"
        )
    return False


def _difference(a: Any, b: Any) -> str:
    if not isinstance(a, Mapping):
        return f"{a!r} and {b!r}"
    name = next(name for name in {**a, **b} if a.get(name) != b.get(name))
    return f"{a.get(name, 'nothing')} and {b.get(name, 'nothing')} for {name!r}"


def check_ranks(mine: Mapping[str, Any], group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Raise ValueError, on every rank alike, unless the identities of all ranks are equal."""
    if different := differing_fields(mine, group, device):
        here = reprlib.repr(mine.get(different[0], sorted(mine)))
        raise ValueError(
            f"all_reduce: {' and '.join(different)} must be the same on all ranks, got {here} here; measure them alike"
        )


def check_structure(structure: str, group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Before a refusal: let the ranks that have something else to pool know of it, who would wait for this one."""
    if dist.is_initialized():
        check_ranks({"structure": structure}, group, device)


def differing_fields(mine: Mapping[str, Any], group: dist.ProcessGroup | None, device: torch.device) -> list[str]:
    """The fields in which the ranks of ``group`` differ, the same answer on every rank; "structure" if they have other fields."""
    if _differ([_digest(list(mine))], group, device)[0]:
        return ["structure"]
    return [field for field, differs in zip(mine, _differ(map(_digest, mine.values()), group, device), strict=True) if differs]


def largest(mine: list[list[float]], group: dist.ProcessGroup | None, device: torch.device) -> list[list[float]]:
    """The largest of each number over all ranks."""
    numbers = torch.tensor(mine, dtype=torch.float64, device=device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
    found: list[list[float]] = numbers.tolist()
    return found


def _differ(digests: Iterable[int], group: dist.ProcessGroup | None, device: torch.device) -> list[bool]:
    one = torch.tensor(list(digests), device=device)
    extremes = torch.stack([one, -one])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    return (extremes.sum(0) != 0).tolist()


def _digest(value: Any) -> int:
    canonical = json.dumps(value, sort_keys=True).encode()
    return int.from_bytes(hashlib.sha256(canonical).digest()[:7], "big")  # 56 bits: its negative is an int64 too


def pooled_provenance(mine: Provenance, *, different: list[str]) -> Provenance:
    """The provenance of the whole: None for whichever of draws and seed is not one value."""
    return dataclasses.replace(mine, **dict.fromkeys(different))


def gathered(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The columns of all ranks, ``[rows, columns of each]``, one rank after the other."""
    count = torch.tensor(rows.shape[1], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, count, group=group)
    columns = [int(one) for one in counts]
    mine = rows.new_zeros(len(rows), max(columns))
    mine[:, : rows.shape[1]] = rows
    all_of_them = [torch.empty_like(mine) for _ in columns]
    dist.all_gather(all_of_them, mine, group=group)
    return torch.cat([one[:, :n] for one, n in zip(all_of_them, columns, strict=True)], dim=1)


def reduced_spread(mine: Spread | None, group: dist.ProcessGroup | None, device: torch.device) -> Spread | None:
    """The sums of all ranks, or None on every rank if one rank has none."""
    recorded = torch.tensor(int(mine is not None), device=device)
    dist.all_reduce(recorded, op=dist.ReduceOp.MIN, group=group)
    if mine is None or not recorded.item():
        return None
    # Ranks may have met their layers in different orders; the sums travel in one.
    order = [*sorted(range(len(mine.layers)), key=lambda i: mine.layers[i]), len(mine.layers)]
    ordered = mine.sums[:, order].contiguous()
    dist.all_reduce(ordered, group=group)
    sums = torch.empty_like(ordered)
    sums[:, order] = ordered
    return Spread(mine.layers, sums)
