# SPDX-License-Identifier: Apache-2.0
"""The demo: a small network trained on scikit-learn's real digits, for ``fisherfast info`` to measure.

``make demo`` runs ``fisherfast info --model fisherfast.demo:model --data fisherfast.demo:data --out out/digits``. Training
takes seconds and needs no download: the 1,797 images of 8x8 pixels come with scikit-learn.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

_SEED = 0
_EPOCHS = 5
_TRAIN_BATCH, _BATCH = 64, 256


@functools.cache
def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images and labels, pixels scaled to [0, 1]."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.2, random_state=_SEED, stratify=labels)
    x, x_test, y, y_test = (torch.from_numpy(part) for part in parts)
    return x.float(), y, x_test.float(), y_test


def model() -> nn.Module:
    """A 64-512-512-10 network trained on the digits; prints its accuracy."""
    x, y, x_test, y_test = _digits()
    torch.manual_seed(_SEED)
    layers = {
        "input": nn.Linear(64, 512),
        "relu": nn.ReLU(),
        "hidden": nn.Linear(512, 512),
        "relu2": nn.ReLU(),
        "output": nn.Linear(512, 10),
    }
    network = nn.Sequential(OrderedDict(layers))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(_EPOCHS):
        for rows in torch.randperm(len(x)).split(_TRAIN_BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
    network.eval()
    print(
        f"digits: {len(x):,} training images, accuracy {_accuracy(network, x, y):.1%}; "
        f"{len(x_test):,} test images, accuracy {_accuracy(network, x_test, y_test):.1%}"
    )
    print(f"for scale: the training labels by themselves hold N log 10 = {len(y) * math.log(10):,.0f} nats")
    return network


def data() -> list[tuple[Tensor, Tensor]]:
    """The training images in batches of 256."""
    x, y, _, _ = _digits()
    return list(zip(x.split(_BATCH), y.split(_BATCH), strict=True))


@torch.no_grad()
def _accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    return (network(x).argmax(-1) == y).float().mean().item()
