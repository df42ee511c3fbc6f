# SPDX-License-Identifier: Apache-2.0
"""Random against real labels: how dear a nat must be before a network no longer learns them.

A network with noisy weights minimises ``E_Q loss + beta KL(Q || P)`` for one beta after the other, each from the last one's
weights. The price is given as ``beta N``: nats of *summed* loss per nat in the weights. The expectation (1706.01350): random
labels are memorised below a price of about 1 and not at all above it; real labels are worth a higher price.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from common import COLOURS, Report, images, options, panels
from noisy import measure, minimise, noisy_mlp

PRICES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
COLUMNS = ("nats", "loss", "accuracy")
CLASSES, BATCH = 10, 100


def run(x: torch.Tensor, y: torch.Tensor, steps: int, seed: int) -> list[list[float]]:
    """The COLUMNS at every price."""
    torch.manual_seed(seed)
    network = noisy_mlp(x.shape[1], 128, CLASSES)
    rows = []
    for price in PRICES:
        first = 2 if price == PRICES[0] else 1
        minimise(network, x, y, beta=price / len(x), steps=first * steps, batch=min(BATCH, len(x)), seed=seed)
        rows.append(measure(network, x, y))
    return rows


def price_at(loss: np.ndarray, level: float) -> float:
    """The price at which the loss first reaches ``level * log(classes)``, between the prices that were tried."""
    level *= math.log(CLASSES)
    above = int(np.argmax(loss >= level))
    a, b = math.log(PRICES[above - 1]), math.log(PRICES[above])
    return math.exp(a + (b - a) * (level - loss[above - 1]) / (loss[above] - loss[above - 1]))


def main(arguments: Sequence[str] | None = None) -> Report:
    """Sweep the price for both kinds of labels, check the transition, draw it."""
    given = options(__doc__ or "", arguments)
    samples, steps, seeds = given.pick((40, 10, 1), (500, 500, 3), (2000, 4000, 5))
    data = images(given.data, samples)
    x, runs = data.x.flatten(1), []
    for seed in range(seeds):
        labels = torch.randint(0, CLASSES, data.y.shape, generator=torch.Generator().manual_seed(seed))
        runs.append([run(x, y, steps, seed) for y in (data.y, labels)])
    values = np.array(runs)  # [seed, real or random, price, column]
    settings = {"data": data.name, "network": f"{x.shape[1]}-128-{CLASSES} ReLU", "samples": samples, "steps per price": steps}
    report = Report("random_labels", given, settings | {"seeds": list(range(seeds))})
    report.numbers = {"prices beta N": PRICES, "columns": COLUMNS, "real": values[:, 0], "random": values[:, 1]}
    real, random = values.mean(0)
    report.check(
        "nearly free nats fit both (accuracy > 95%)",
        min(real[0, 2], random[0, 2]) > 0.95,
        f"{real[0, 2]:.1%}, {random[0, 2]:.1%}",
    )
    ratio = random[2, 0] / real[2, 0]
    report.check(f"random labels take more nats (twice, at beta N = {PRICES[2]})", ratio > 2, f"{ratio:.2f} times as many")
    half = [price_at(one[:, 1], 0.5) for one in (random, real)]
    report.check(
        "random labels are given up at a lower price (a third)", half[0] < half[1] / 3, f"{half[0]:.2g} against {half[1]:.2g}"
    )
    low, high = (price_at(random[:, 1], level) for level in (0.2, 0.8))
    report.check("the transition is sharp: 20% to 80% of log 10 within a decade", high < 10 * low, f"{low:.2g} to {high:.2g}")
    report.check("it is where a nat costs a nat, beta N = 1 (factor 3)", 1 / 3 < half[0] < 3, f"beta N = {half[0]:.2g}")
    draw(report, values)
    return report


def draw(report: Report, values: np.ndarray) -> None:
    """Loss and nats against the price, and against each other."""
    figure, axes = panels(3, title="Random and real labels under the Information Lagrangian; mean and range of seeds")
    for number, label in enumerate(("real labels", "random labels")):
        nats, loss, _ = np.moveaxis(values[:, number], 2, 0)
        for one, of in zip(axes, (loss, nats), strict=False):
            one.plot(PRICES, of.mean(0), "o-", color=COLOURS[number], label=label)
            one.fill_between(PRICES, of.min(0), of.max(0), color=COLOURS[number], alpha=0.15, linewidth=0)
            one.set(xscale="log", xlabel="beta N (nats of summed loss per nat in the weights)")
        axes[2].plot(nats.mean(0), loss.mean(0), "o-", color=COLOURS[number])
    axes[0].axhline(math.log(CLASSES), color=COLOURS[6], linewidth=1, linestyle=":", label="log 10")
    axes[0].set(ylabel="mean loss under the noise (nats)")
    axes[0].legend(frameon=False)
    axes[1].set(yscale="log", ylabel="KL(Q || P) (nats)")
    axes[2].set(xscale="log", xlim=(50, None), xlabel="KL(Q || P) (nats)", ylabel="mean loss under the noise (nats)")
    report.save(figure)


if __name__ == "__main__":
    main()
