# SPDX-License-Identifier: Apache-2.0
"""Information against the number of samples: it saturates for real labels and grows linearly for random ones (1706.01350).

For every number of samples a network with noisy weights minimises ``E_Q loss + beta KL(Q || P)``. The price of a nat is given in units
of the summed loss: one low enough that random labels are memorised, and then one ten times as high.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from common import COLOURS, Report, images, options, panels
from noisy import measure, minimise, noisy_mlp

PRICES = (0.01, 0.1)  # beta N
CLASSES, BATCH = 10, 100
COLUMNS = ("nats", "loss", "accuracy")


def run(x: torch.Tensor, y: torch.Tensor, steps: int, seed: int) -> list[list[float]]:
    """The COLUMNS of one network at every price, each from the last one's weights."""
    torch.manual_seed(seed)
    network = noisy_mlp(x.shape[1], 128, CLASSES)
    rows = []
    for price in PRICES:
        minimise(network, x, y, beta=price / len(x), steps=steps, batch=min(BATCH, len(x)), seed=seed)
        rows.append(measure(network, x, y))
    return rows


def main(arguments: Sequence[str] | None = None) -> Report:
    """Train for every number of samples and both kinds of labels, check the growth, draw it."""
    given = options(__doc__ or "", arguments)
    sizes, steps, seeds = given.pick(
        ([20, 40], 10, 1), ([62, 125, 250, 500, 1000], 1800, 3), ([125, 250, 500, 1000, 2000, 4000], 10_000, 5)
    )
    data = images(given.data, sizes[-1])
    x, runs = data.x.flatten(1), []
    for seed in range(seeds):
        random = torch.randint(0, CLASSES, data.y.shape, generator=torch.Generator().manual_seed(seed))
        runs.append([[run(x[:size], y[:size], steps, seed) for size in sizes] for y in (data.y, random)])
    values = np.array(runs).transpose(0, 3, 1, 2, 4)  # [seed, price, real or random, size, column]
    settings = {"data": data.name, "network": f"{x.shape[1]}-128-{CLASSES} ReLU", "beta N": PRICES, "steps": steps}
    report = Report("samples", given, settings | {"seeds": list(range(seeds))})
    report.numbers = {"samples": sizes, "columns": COLUMNS, "real": values[:, :, 0], "random": values[:, :, 1]}
    mean = values.mean(0)
    fit = mean[0, :, :, 2].min()
    report.check(f"beta N = {PRICES[0]}: both kinds of labels are learned (accuracy > 90%)", fit > 0.9, f"lowest {fit:.1%}")
    # Nats ~ samples^exponent: 1 is linear, 0 is saturated.
    exponents = np.polyfit(np.log(sizes), np.log(mean[..., 0].reshape(-1, len(sizes)).T), 1)[0].reshape(2, 2)
    last = np.log(mean[:, :, -1, 0] / mean[:, :, -2, 0]) / np.log(sizes[-1] / sizes[-2])
    report.numbers |= {"exponents": exponents, "last exponents": last}

    def check(price: int, label: int, claim: str, holds: bool) -> None:
        seen = f"nats ~ N^{exponents[price, label]:.2f}, N^{last[price, label]:.2f} at the end"
        report.check(f"beta N = {PRICES[price]}: {claim}", holds, seen)

    check(0, 1, "random labels about linear (exponent > 0.8)", exponents[0, 1] > 0.8)
    check(0, 0, "real labels saturating (exponent < 0.3 at the end)", last[0, 0] < 0.3)
    check(0, 0, "real labels grow more slowly (exponent smaller by 0.2)", exponents[0, 0] < exponents[0, 1] - 0.2)
    check(1, 0, "real labels saturating (exponent < 0.3 at the end)", last[1, 0] < 0.3)
    draw(report, sizes, values)
    return report


def draw(report: Report, sizes: Sequence[int], values: np.ndarray) -> None:
    """Nats, and nats per sample, against the number of samples."""
    figure, (total, each) = panels(2, title="The information that N samples leave in the weights; mean and range of seeds")
    for price, style in enumerate(("o-", "s--")):
        for number, name in enumerate(("real", "random")):
            nats, label = values[:, price, number, :, 0], f"{name} labels, beta N = {PRICES[price]}"
            for axes, of in ((total, nats), (each, nats / np.array(sizes))):
                axes.plot(sizes, of.mean(0), style, color=COLOURS[number], label=label)
                axes.fill_between(sizes, of.min(0), of.max(0), color=COLOURS[number], alpha=0.15, linewidth=0)
    total.set(xlabel="number of samples N", ylabel="KL(Q || P) (nats)", ylim=(0, None))
    each.set(xlabel="number of samples N", ylabel="KL(Q || P) / N (nats)", xscale="log", yscale="log")
    total.legend(frameon=False, fontsize=8)
    report.save(figure)


if __name__ == "__main__":
    main()
