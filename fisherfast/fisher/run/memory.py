# SPDX-License-Identifier: Apache-2.0
"""What a run will hold, and whether there is room for it: both known before anything is allocated."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from fisherfast.capture.collector import Held

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def peak(held: Sequence[Held]) -> int:
    """The most bytes that are allocated at a time. Collectors that need fewer passes over the data than others join the last ones."""
    passes = zip_longest(*(reversed(one.peaks) for one in held), fillvalue=0)
    scratch = zip_longest(*(reversed(one.scratch) for one in held), fillvalue=0)
    return max((sum(sums) + max(more) for sums, more in zip(passes, scratch, strict=True)), default=0)


def check(held: Sequence[Held], device: torch.device) -> None:
    """Raise MemoryError, with the sizes and the ways out, unless there is room."""
    problem = refusal(held, 0, free_bytes(device), device)
    if problem is not None:
        raise MemoryError(problem)


def refusal(held: Sequence[Held], of_batch: int, free: int | None, device: torch.device) -> str | None:
    """Why there is no room, or None; ``of_batch``: bytes that a batch will take beside what is held. Room not known is enough."""
    needed = peak(held)
    if free is None or needed + of_batch <= free:
        return None
    largest = max(held, key=lambda one: max(one.peaks))
    if needed <= free:
        ways = ["take smaller batches"]
    else:
        ways = [] if largest.smaller is None else [largest.smaller]
        ways.append(f"freeze {largest.names[0]!r} here (requires_grad_(False)) and measure its diagonal in a run of its own")
    beside = f", and {in_words(of_batch)} for a batch beside them" if of_batch else ""
    return (
        f"memory: the sums of a run and its result must fit what is free on {device}, {in_words(free)}, got {in_words(needed)}, of "
        f"which {in_words(max(largest.peaks))} for {' and '.join(map(repr, largest.names))} ({largest.holds}){beside}; "
        f"{', or '.join(ways)}"
    )


def free_bytes(device: torch.device) -> int | None:
    """The memory that can still be had on a device; None where that is not known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    known = [room for room in (_of_machine(), _of_container()) if room is not None]
    return min(known, default=None)


def _of_machine() -> int | None:
    if _MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # all of it: no more can be had
    return None


def _of_container() -> int | None:
    """What a control group leaves; what it holds of files can be dropped."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # "max" where there is none
        used = int((_CGROUP / "memory.current").read_text())
        fields = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return max(0, limit - used + int(fields["file"]))


@dataclass(eq=False)
class _Saved:
    """A tensor that autograd holds, for as long as it does."""

    tensor: Tensor


class SavedBytes:
    """The bytes that autograd saves of what is computed inside ``noted()``: each storage once, and none of ``given``."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        self._given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self._saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note what is saved."""

        def pack(tensor: Tensor) -> _Saved:
            with torch._C.DisableTorchFunction():  # a tensor itself would hold the graph that holds it
                self._saved.add(saved := _Saved(tensor.detach()))
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            yield

    def with_those_of(self, more: Iterable[Tensor]) -> int:
        """Bytes that are held now, and of these tensors."""
        tensors = (*(saved.tensor for saved in self._saved), *more)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(size for place, size in storages.items() if place not in self._given)


def in_words(size: float) -> str:
    """Bytes as people write them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} B" if unit == "B" else f"{size:,.2f} {unit}"
        size /= 1024
    return f"{size:,.2f} TiB"
