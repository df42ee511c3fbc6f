# SPDX-License-Identifier: Apache-2.0
"""The whole-model cases: networks of plain ``torch.nn`` modules, their batches, and their per-sample loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, WIDTH, HEADS, POSITIONS, DEPTH = 4096, 512, 8, 128, 4


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, T, D] to [N, T, D]."""
        q, k, v = self.qkv(self.norm1(hidden)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
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


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, as in He et al. 2016."""

    def __init__(self, C: int, O: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C, O, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(O)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(O, O, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(O)
        self.relu2 = nn.ReLU()
        self.shortcut = nn.Identity()
        if stride != 1 or C != O:
            self.shortcut = nn.Sequential(nn.Conv2d(C, O, 1, stride, bias=False), nn.BatchNorm2d(O))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, O, H / stride, W / stride]."""
        out = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(out + self.shortcut(x))


def mlp(I: int = 784, width: int = 1024, C: int = 10) -> nn.Module:
    """Three Linear layers with ReLU."""
    return nn.Sequential(nn.Linear(I, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, C))


def _all_cnn() -> nn.Module:
    # Springenberg et al. 2015, All-CNN-C without dropout: (kernel, stride, padding, channels).
    layers, C = [], 3
    for K, stride, padding, O in (
        (3, 1, 1, 96), (3, 1, 1, 96), (3, 2, 1, 96), (3, 1, 1, 192), (3, 1, 1, 192), (3, 2, 1, 192), (3, 1, 0, 192), (1, 1, 0, 192),
        (1, 1, 0, 10),
    ):  # fmt: skip
        layers += [nn.Conv2d(C, O, K, stride, padding), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")
        C = O
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@torch.no_grad()
def _resnet18() -> nn.Module:
    layers, C = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()], 64
    for O, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [BasicBlock(C, O, stride), BasicBlock(O, O, 1)]
        C = O
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 10))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the statistics of the images below, as a trained network has those of its data
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(std=0.1)
    model(torch.randn(16, 3, 32, 32))
    return model.eval()


def _vectors(N: int) -> tuple[Tensor, Tensor]:
    return torch.randn(N, 784), torch.randint(10, (N,))


def images(N: int, H: int, C: int) -> tuple[Tensor, Tensor]:
    """Random images and classes."""
    return torch.randn(N, 3, H, H), torch.randint(C, (N,))


def text(N: int, T: int, V: int) -> tuple[Tensor, Tensor]:
    """Random tokens and the ones after them."""
    ids = torch.randint(V, (N, T + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


@torch.no_grad()
def clear_of_zero(model: nn.Module, x: Tensor) -> None:
    """Move each channel's bias a little, so that none of the batch's ReLU inputs is as near to zero as float32 rounds.

    Otherwise some of ten million change sign between float32 and the float64 oracle, at every seed, and a right result
    looks wrong: a ReLU's derivative jumps. In float64, layer by layer: of the values nearest to zero, the middle of the
    widest gap becomes zero. The bias moved is that of the last module before the ReLU which has one.
    """
    wide = copy.deepcopy(model).double()
    last: list[Tensor] = []

    def remember(module: nn.Module, *_: object) -> None:
        last[:] = [module.bias] if getattr(module, "bias", None) is not None else last

    def move(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        (z,) = inputs
        channels = z.transpose(0, 1).flatten(1)
        nearest = channels.abs().topk(min(64, channels.shape[1]), largest=False).indices
        values = channels.gather(1, nearest).sort(1).values
        widest = values.diff(dim=1).argmax(1, keepdim=True)
        middle = (values.gather(1, widest) + values.gather(1, widest + 1)).squeeze(1) / 2
        before = last[0].clone()
        last[0].copy_((before - middle).float())
        return z + (last[0] - before).view(-1, *[1] * (z.dim() - 2))

    for module in wide.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(move)
        else:
            module.register_forward_hook(remember)
    wide(x.double() if x.is_floating_point() else x)
    model.load_state_dict(wide.state_dict())


@dataclass(frozen=True)
class Case:
    """A network and one batch of N samples, the same at every call; ``quantities`` are the tables that it is in.

    ``limits``: the most plain steps that ours is meant to take, by quantity.
    """

    summary: str
    network: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    N: int
    quantities: tuple[str, ...]
    limits: dict[str, float] = field(default_factory=dict)

    def build(self, clear: bool = True) -> tuple[nn.Module, Tensor, Tensor]:
        """A fresh model with its inputs and targets; ``clear`` of zero, which only a comparison of results needs."""
        torch.manual_seed(0)
        model, (x, y) = self.network(), self.batch(self.N)
        if clear:
            clear_of_zero(model, x)
        return model, x, y


CASES = {
    "mlp": Case(
        "MLP 784-1024-1024-10, ReLU, N = 256",
        mlp,
        _vectors,
        N=256,
        quantities=("diagonal", "exact", "norms", "kfac", "ekfac", "ekfac bases", "ekfac correction"),
        limits={"diagonal": 0.95, "exact": 3.7, "norms": 1.0, "kfac": 1.2, "ekfac correction": 2.5},
    ),
    "all-cnn": Case(
        "All-CNN, images 32 x 32, N = 32",
        _all_cnn,
        partial(images, H=32, C=10),
        N=32,
        quantities=("diagonal", "exact", "norms", "kfac", "ekfac", "ekfac bases", "ekfac correction"),
        limits={"diagonal": 1.05, "exact": 6.5, "norms": 1.0, "kfac": 1.5, "ekfac correction": 2.5},
    ),
    "resnet18": Case(
        "ResNet-18, images 32 x 32, BatchNorm in eval mode, N = 16",
        _resnet18,
        partial(images, H=32, C=10),
        N=16,
        quantities=("diagonal", "kfac"),
        limits={"diagonal": 1.1, "kfac": 1.7},
    ),
    "decoder": Case(
        "Decoder LM, 4 layers, d = 512, 8 heads, vocabulary 4096, T = 128, N = 8",
        Decoder,
        partial(text, T=POSITIONS, V=VOCABULARY),
        N=8,
        quantities=("diagonal", "norms", "kfac"),
        limits={"diagonal": 0.95, "norms": 1.0, "kfac": 1.3},
    ),
}


def loss_per_sample(logits: Tensor, targets: Tensor) -> Tensor:
    """``-log p(y_n | x_n)`` [N]: for a sequence the sum over its positions."""
    losses = functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(len(targets), -1).sum(1)
