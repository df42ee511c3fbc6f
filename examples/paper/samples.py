# SPDX-License-Identifier: Apache-2.0
"""Information against the number of samples: it saturates for real labels and grows linearly for random ones (1706.01350).

For every number of samples a network with noisy weights minimises ``E_Q loss + beta KL(Q || P)`` at one price of a nat in units of the
summed loss, low enough that random labels are memorised.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from common import COLOURS, Report, images, options, panels
from noisy import measure, minimise, noisy_mlp

PRICE, CLASSES, BATCH = 0.01, 10, 100  # beta N
COLUMNS = ("nats", "loss", "accuracy")


def run(x: torch.Tensor, y: torch.Tensor, steps: int, seed: int) -> list[float]:
    """The COLUMNS of one network."""
    torch.manual_seed(seed)
    network = noisy_mlp(x.shape[1], 128, CLASSES)
    minimise(network, x, y, beta=PRICE / len(x), steps=steps, batch=min(BATCH, len(x)), seed=seed)
    return measure(network, x, y)


def main(arguments: Sequence[str] | None = None) -> Report:
    """Train for every number of samples and both kinds of labels, check the growth, draw it."""
    given = options(__doc__ or "", arguments)
    sizes, steps, seeds = given.pick(
        ([20, 40], 10, 1), ([62, 125, 250, 500, 1000], 1200, 3), ([125, 250, 500, 1000, 2000, 4000], 10_000, 5)
    )
    data = images(given.data, sizes[-1])
    x, runs = data.x.flatten(1), []
    for seed in range(seeds):
        random = torch.randint(0, CLASSES, data.y.shape, generator=torch.Generator().manual_seed(seed))
        runs.append([[run(x[:size], y[:size], steps, seed) for size in sizes] for y in (data.y, random)])
    values = np.array(runs)  # [seed, real or random, size, column]
    settings = {"data": data.name, "network": f"{x.shape[1]}-128-{CLASSES} ReLU", "beta N": PRICE, "steps": steps}
    report = Report("samples", given, settings | {"seeds": list(range(seeds))})
    report.numbers = {"samples": sizes, "columns": COLUMNS, "real": values[:, 0], "random": values[:, 1]}
    mean = values.mean(0)
    fit = mean[:, :, 2].min()
    report.check("both kinds of labels are learned (accuracy > 90%)", fit > 0.9, f"lowest {fit:.1%}")
    # Nats ~ samples^exponent: 1 is linear, 0 is saturated.
    exponents = [np.polyfit(np.log(sizes), np.log(one[:, 0]), 1)[0] for one in mean]
    last = [float(np.log(one[-1, 0] / one[-2, 0]) / np.log(sizes[-1] / sizes[-2])) for one in mean]
    report.numbers |= {"exponents": exponents, "last exponents": last}
    seen = "nats ~ N^{:.2f}, N^{:.2f} at the end"
    report.check("random labels: about linear (exponent > 0.8)", exponents[1] > 0.8, seen.format(exponents[1], last[1]))
    report.check("real labels: saturating (exponent < 0.3 at the end)", last[0] < 0.3, seen.format(exponents[0], last[0]))
    report.check("real labels grow more slowly than random ones", exponents[0] < exponents[1] - 0.2, "exponents as above")
    draw(report, sizes, values)
    return report


def draw(report: Report, sizes: Sequence[int], values: np.ndarray) -> None:
    """Nats, and nats per sample, against the number of samples."""
    figure, (total, each) = panels(
        2, title=f"The information that N samples leave in the weights, beta N = {PRICE}; mean and range of seeds"
    )
    for number, label in enumerate(("real labels", "random labels")):
        nats = values[:, number, :, 0]
        for axes, of in ((total, nats), (each, nats / np.array(sizes))):
            axes.plot(sizes, of.mean(0), "o-", color=COLOURS[number], label=label)
            axes.fill_between(sizes, of.min(0), of.max(0), color=COLOURS[number], alpha=0.15, linewidth=0)
    total.set(xlabel="number of samples N", ylabel="KL(Q || P) (nats)", ylim=(0, None))
    each.set(xlabel="number of samples N", ylabel="KL(Q || P) / N (nats)", xscale="log", yscale="log")
    total.legend(frameon=False)
    report.save(figure)


if __name__ == "__main__":
    main()
