# SPDX-License-Identifier: Apache-2.0
"""How large a model may be whose diagonal fits on one device: arithmetic only, tested without a GPU.

A run holds, of every parameter, its weight (frozen: no gradient of it is stored) and its sum, two float32 tensors once a run is longer
than 64 batches, which the result is made of.
"""

from __future__ import annotations

from typing import NamedTuple

SUM_BYTES = 8
# Activations of a short batch, logits in float32 above all, and what the driver takes.
RESERVE_BYTES = 4 * 10**9


class Decoder(NamedTuple):
    """The widths of a decoder of Llama's shape with an untied head."""

    width: int
    heads: int
    groups: int
    inner: int
    vocabulary: int

    def outside(self) -> int:
        """Parameters of tokens, head and last norm."""
        return 2 * self.vocabulary * self.width + self.width

    def layer(self) -> int:
        """Parameters of a layer."""
        keys = self.width // self.heads * self.groups
        return 2 * self.width * (self.width + keys) + 3 * self.width * self.inner + 2 * self.width

    def layers(self, parameters: int) -> int:
        """The most layers that stay within a number of parameters."""
        return max(0, (parameters - self.outside()) // self.layer())


LLAMA_8B = Decoder(4096, 32, 8, 14336, 128256)


def bytes_per_parameter(weight: int = 2) -> int:
    """Of a diagonal's run at its peak; ``weight`` bytes of the weight itself."""
    return weight + SUM_BYTES


def parameters(memory: int, weight: int = 2) -> int:
    """The most parameters whose diagonal fits in so many bytes."""
    return max(0, memory - RESERVE_BYTES) // bytes_per_parameter(weight)
