# SPDX-License-Identifier: Apache-2.0
"""The whole models of the GPU benchmark: known shapes, their batches, what is measured of each; the most telling first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import ways
from gpu import capacity, networks, problems
from models import images, text
from torch import Tensor, nn


class Case(NamedTuple):
    """A network, its batch of N samples, what is measured of it; ``tiny`` widths and ``few`` samples are for a rehearsal."""

    summary: str
    network: Callable[..., nn.Module]
    full: dict[str, Any]
    tiny: dict[str, Any]
    batch: Callable[..., tuple[Tensor, Tensor]]
    N: int
    extent: int  # positions of a sequence, or pixels of an image's side
    few: int
    quantities: tuple[str, ...]

    def build(self, device: str, mode: str, tiny: bool) -> ways.Problem:
        """A fresh model with its inputs and targets."""
        torch.manual_seed(0)
        sizes, dtype = (self.tiny if tiny else self.full), problems.DTYPES[mode]
        with torch.device(device):
            model = self.network(**sizes).to(dtype).eval()
            classes = sizes.get("vocabulary") or sizes["classes"]
            x, y = self.batch(2 if tiny else self.N, self.few if tiny else self.extent, classes)
        return model, x.to(dtype) if x.is_floating_point() else x, y

    def parameters(self, tiny: bool) -> int:
        """How many the network has, without making any."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.network(**(self.tiny if tiny else self.full)).parameters())


def llama(depth: int, decoder: capacity.Decoder) -> dict[str, Any]:
    """The arguments of ``networks.Llama``."""
    return {"depth": depth, **decoder._asdict()}


LLAMA_1B = capacity.Decoder(2048, 32, 8, 8192, 128256)
TINY_LLAMA = llama(2, capacity.Decoder(16, 4, 2, 24, 31))
TINY_TEXT = {"width": 16, "depth": 2, "heads": 2, "vocabulary": 31, "positions": 8}
ALL = ("diagonal", "kfac", "ekfac")
CASES = {
    "llama-1b": Case(
        "Llama 3.2 1B's shape with an untied head, T = 512, N = 8",
        networks.Llama, llama(16, LLAMA_1B), TINY_LLAMA, text, 8, 512, 5, ("diagonal", "kfac"),
    ),
    "resnet50": Case(
        "ResNet-50's shape, images 224 x 224, BatchNorm in eval mode, N = 64",
        networks.resnet, {"inner": 64, "blocks": (3, 4, 6, 3), "classes": 1000},
        {"inner": 4, "blocks": (1, 1), "classes": 5}, images, 64, 224, 16, ALL,
    ),
    "gpt2": Case(
        "GPT-2's shape with an untied head, T = 1024, N = 8",
        networks.Transformer,
        {"width": 768, "depth": 12, "heads": 12, "vocabulary": 50257, "positions": 1024, "causal": True},
        TINY_TEXT | {"causal": True}, text, 8, 1024, 5, ALL,
    ),
    "llama-8b-layers": Case(
        "4 layers of Llama 3 8B's widths, vocabulary 8192, T = 1024, N = 4",
        networks.Llama, llama(4, capacity.LLAMA_8B._replace(vocabulary=8192)), TINY_LLAMA, text, 4, 1024, 5, ("diagonal", "kfac"),
    ),
    "vit-b16": Case(
        "ViT-B/16's shape, images 224 x 224, N = 64",
        networks.ViT, {"width": 768, "depth": 12, "heads": 12, "size": 224, "patch": 16, "classes": 1000},
        {"width": 16, "depth": 2, "heads": 2, "size": 8, "patch": 4, "classes": 5}, images, 64, 224, 8, ALL,
    ),
    "bert-base": Case(
        "BERT-base's widths, a head for every token, T = 128, N = 32",
        networks.Transformer,
        {"width": 768, "depth": 12, "heads": 12, "vocabulary": 30522, "positions": 512, "causal": False},
        TINY_TEXT | {"causal": False}, text, 32, 128, 5, ALL,
    ),
    "llama-1b-two-layers": Case(
        "2 layers of Llama 3.2 1B's widths, vocabulary 8192, T = 512, N = 8",
        networks.Llama, llama(2, LLAMA_1B._replace(vocabulary=8192)), TINY_LLAMA, text, 8, 512, 5, ("ekfac",),
    ),
}  # fmt: skip
