# SPDX-License-Identifier: Apache-2.0
"""A large tensor piece by piece: what is computed of one, as a large vocabulary's logits, takes no copy of all of it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

PIECE = 2**22  # numbers


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most ``PIECE`` numbers that are the tensor in order; its last axis stays whole."""
    if tensor.numel() <= PIECE or tensor.dim() < 2:
        yield tensor
        return
    step = len(tensor) * PIECE // tensor.numel()
    for part in tensor.split(max(1, step)):
        if step:
            yield part
        else:
            yield from pieces(part[0])
