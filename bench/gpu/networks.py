# SPDX-License-Identifier: Apache-2.0
"""The shapes of known networks with random weights, in plain torch: what they cost, not what they know. Heads are untied."""

from __future__ import annotations

import torch
from models import Block
from torch import Tensor, nn
from torch.nn import functional


class LlamaBlock(nn.Module):
    """Grouped-query attention with rotary positions, and a gated linear unit; root-mean-square norms before each."""

    def __init__(self, width: int, heads: int, groups: int, inner: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        head = width // heads
        self.norm1 = nn.RMSNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, n * head, bias=False) for n in (heads, groups, groups))
        self.o = nn.Linear(width, width, bias=False)
        self.norm2 = nn.RMSNorm(width)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, T, D] to [N, T, D]."""
        x = self.norm1(hidden)
        q, k, v = (
            project(x).unflatten(-1, (n, -1)).transpose(1, 2)
            for project, n in ((self.q, self.heads), (self.k, self.groups), (self.v, self.groups))
        )
        k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (rotated(k), v))
        attended = functional.scaled_dot_product_attention(rotated(q), k, v, is_causal=True)
        hidden = hidden + self.o(attended.transpose(1, 2).flatten(2))
        x = self.norm2(hidden)
        return hidden + self.down(functional.silu(self.gate(x)) * self.up(x))


def rotated(x: Tensor) -> Tensor:
    """Pairs (i, i + half) of the last axis turned by angles that grow with the position, [N, heads, T, head]."""
    T, half = x.shape[-2], x.shape[-1] // 2
    speed = 500000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(T, device=x.device)[:, None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Llama(nn.Module):
    """A decoder of Llama's shape."""

    def __init__(self, width: int, depth: int, heads: int, groups: int, inner: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(LlamaBlock(width, heads, groups, inner) for _ in range(depth)))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [N, T] to logits [N, T, V]."""
        return self.head(self.norm(self.blocks(self.tokens(ids))))


class Transformer(nn.Module):
    """Learned positions and pre-norm blocks over tokens: GPT-2's shape if causal, else BERT's with a head for every token."""

    def __init__(self, width: int, depth: int, heads: int, vocabulary: int, positions: int, causal: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [N, T] to logits [N, T, V]."""
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(positions))))


class ViT(nn.Module):
    """A vision transformer's shape: square patches, a class token, learned positions."""

    def __init__(self, width: int, depth: int, heads: int, size: int, patch: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, H] to logits [N, C]."""
        patches = self.patches(images).flatten(2).mT
        hidden = torch.cat([self.token.expand(len(images), -1, -1), patches], 1) + self.positions
        return self.head(self.norm(self.blocks(hidden))[:, 0])


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut."""

    def __init__(self, C: int, inner: int, stride: int) -> None:
        super().__init__()
        O = 4 * inner
        self.conv1, self.norm1 = nn.Conv2d(C, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.norm2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.norm3 = nn.Conv2d(inner, O, 1, bias=False), nn.BatchNorm2d(O)
        self.shortcut = nn.Identity()
        if stride != 1 or C != O:
            self.shortcut = nn.Sequential(nn.Conv2d(C, O, 1, stride, bias=False), nn.BatchNorm2d(O))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, H] to [N, 4 inner, H / stride, H / stride]."""
        out = self.norm1(self.conv1(x)).relu()
        out = self.norm2(self.conv2(out)).relu()
        return (self.norm3(self.conv3(out)) + self.shortcut(x)).relu()


def resnet(inner: int, blocks: tuple[int, ...], classes: int) -> nn.Module:
    """A bottleneck ResNet's shape; ResNet-50 is (64, (3, 4, 6, 3), 1000). BatchNorm is in eval mode."""
    stem = [nn.Conv2d(3, inner, 7, 2, 3, bias=False), nn.BatchNorm2d(inner), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    layers: list[nn.Module] = []
    C = inner
    for stage, count in enumerate(blocks):
        for place in range(count):
            layers.append(Bottleneck(C, inner * 2**stage, 2 if stage and not place else 1))
            C = 4 * inner * 2**stage
    return nn.Sequential(*stem, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, classes)).eval()
