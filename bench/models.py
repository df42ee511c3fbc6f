# SPDX-License-Identifier: Apache-2.0
"""The whole-model cases: two networks of plain ``torch.nn`` modules, their batches, and their per-sample loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, WIDTH, HEADS, POSITIONS, DEPTH = 4096, 512, 8, 128, 4


class Block(nn.Module):
    """One pre-norm transformer block with causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, T, D] to [N, T, D]."""
        q, k, v = self.qkv(self.norm1(hidden)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + self.out(heads.transpose(1, 2).flatten(2))
        return hidden + self.down(functional.gelu(self.up(self.norm2(hidden))))


class Decoder(nn.Module):
    """A small GPT: learned positions, untied head.

    Position ids are expanded to [N, T], the form in which every library here sees the sample axis.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [N, T] to logits [N, T, V]."""
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(positions))))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def _images(N: int) -> tuple[Tensor, Tensor]:
    return torch.randn(N, 784), torch.randint(10, (N,))


def _text(N: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCABULARY, (N, POSITIONS + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


@dataclass(frozen=True)
class Case:
    """A network and one batch of N samples, the same at every call."""

    summary: str
    network: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    N: int
    seed: int

    def build(self) -> tuple[nn.Module, Tensor, Tensor]:
        """A fresh model with its inputs and targets, from the case's seed."""
        torch.manual_seed(self.seed)
        return self.network(), *self.batch(self.N)


# The MLP's seed keeps every ReLU input further from zero than float32 rounds; at others one flips against the float64 oracle.
CASES = {
    "mlp": Case("MLP 784-1024-1024-10, ReLU, N = 256", _mlp, _images, N=256, seed=31),
    "decoder": Case("Decoder LM, 4 layers, d = 512, 8 heads, vocabulary 4096, T = 128, N = 8", Decoder, _text, N=8, seed=0),
}


def loss_per_sample(logits: Tensor, targets: Tensor) -> Tensor:
    """``-log p(y_n | x_n)`` [N]: for a sequence the sum over its positions."""
    losses = functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(len(targets), -1).sum(1)
