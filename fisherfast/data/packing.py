# SPDX-License-Identifier: Apache-2.0
"""Packing: whether a batch's one row ``[1, M]`` holds several samples, and where each begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fisherfast._warning import warn

_KEYS = ("sample_offsets", "cu_seq_lens_q", "cu_seqlens")  # ours, Hugging Face's, flash-attention's; the first that is there


def offsets(item: Mapping[str, Any]) -> Any:
    """Where samples packed into one row begin and end: as the batch says, else as its positions do; None if they are not packed."""
    if _KEYS[0] in item:
        return item[_KEYS[0]]
    given = next((item[key] for key in _KEYS if item.get(key) is not None), None)
    return _by_position(item) if given is None else given


def _by_position(item: Mapping[str, Any]) -> list[int] | None:
    """Where ``position_ids`` ``[1, M]`` or ``[M]`` start again, as Hugging Face's attention reads them; None where they do not.

    Errors:   ValueError for several rows that hold several samples each.
    """
    positions, mask, labels = (item.get(key) for key in ("position_ids", "attention_mask", "labels"))
    if not _are_positions(positions):
        return None
    if isinstance(mask, Tensor) and mask.dim() == 2 and not bool((mask != 0).all()):  # positions start again at padding, too
        return None
    M = positions.shape[-1]
    rows = max((v.shape[0] for v in item.values() if isinstance(v, Tensor) and v.dim() > 1 and v.shape[1] == M), default=0)
    if positions.dim() == 1 and rows != 1:  # [N]: a position for each sample
        return None
    if labels is not None and torch.as_tensor(labels, device="cpu").shape[:2] != (rows, M):
        return None  # labels of samples, whose parts are numbered
    start, counts = _starts(positions.reshape(-1, M))
    packed = counts & ((start[:, :-1] & ~start[:, 1:]).sum(-1) > 1)  # padding repeats the lowest
    bounds = start[0].nonzero().flatten().tolist()
    if rows == 1 and bool(counts[0]) and len(bounds) > 1 and (bounds[-1] == M - 1 or not bool(packed[0])):
        taken = "each start was taken for a sample" if bool(packed[0]) else "the row was taken for one sample"
        warn(
            f"data: position_ids should tell samples of one token from padding, got a row [1, {M}] in which they start at {bounds[:8]}; "
            f"{taken}. Pass sample_offsets (None: one sample)"
        )
    if not bool(packed.any()):
        return None
    if rows > 1:
        raise ValueError(
            f"data: position_ids must not start again within a row of several, got {rows} rows, some of several samples; flatten them to "
            "one row [1, M], or pad each sample in a row of its own; 'sample_offsets': None in the batch says that each row is one sample"
        )
    return [*bounds, M]


def _are_positions(values: Any) -> TypeGuard[Tensor]:
    """Whether these may be positions of rows: not nested, not three axes of an image's."""
    plain = isinstance(values, Tensor) and values.layout is torch.strided and not values.is_nested and values.dtype != torch.bool
    return plain and values.dim() in (1, 2) and values.numel() > 0


def _starts(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Where rows ``[B, M]`` of positions are at their lowest, and which of the rows count up from each such start."""
    low = positions.amin(-1, keepdim=True)
    start, place = positions == low, torch.arange(positions.shape[-1], device=positions.device)
    begun = torch.where(start, place, 0).cummax(-1).values
    return start, (positions - low == place - begun).all(-1)
