# SPDX-License-Identifier: Apache-2.0
"""Critical periods (1711.08856): the Fisher's trace over the epochs, and what a blur that is later removed costs in the end.

Images are blurred to a quarter of their resolution for the first epochs, or for a window of epochs that starts later; then as
many epochs on the sharp images follow in every run. In the paper the early blur does lasting harm, while the Fisher is high.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from common import COLOURS, Data, Report, arrows, cnn, evaluate, images, options, panels, trace, train
from torch import Tensor, nn

BATCH, LR = 50, 0.05


def blurred(x: Tensor) -> Tensor:
    """A quarter of the resolution, at the same size."""
    small = nn.functional.interpolate(x, size=[side // 4 for side in x.shape[2:]], mode="area")
    return nn.functional.interpolate(small, size=x.shape[2:], mode="bilinear")


def run(data: Data, phases: Sequence[tuple[bool, int]], seed: int, measured: int = 0) -> tuple[float, list[float]]:
    """Train through (blurred or not, epochs); the test accuracy, and the trace before every epoch on ``measured`` images."""
    torch.manual_seed(seed)
    network = cnn(data.x.shape[1], 10)
    traces: list[float] = []
    per_epoch = len(data.x) // BATCH
    for number, (blur, epochs) in enumerate(phases):
        x = blurred(data.x) if blur else data.x

        def each(step: int, x: Tensor = x) -> None:
            if measured and step % per_epoch == 0:
                traces.append(trace(network, x[:measured]))

        if epochs:
            train(network, x, data.y, steps=epochs * per_epoch, batch=BATCH, lr=LR, seed=100 * seed + number, each=each)
    return evaluate(network, data.x_test, data.y_test)[1], traces


def main(arguments: Sequence[str] | None = None) -> Report:
    """Train with every deficit, check what the paper saw, draw it."""
    given = options(__doc__ or "", arguments)
    samples, seeds, sharp, ends, window, onsets, measured = given.pick(
        (50, 1, 2, [0, 1], 1, [0, 1], 10),
        (1000, 3, 25, [0, 4, 8, 16, 32], 8, [0, 2, 4, 8, 16], 200),
        (4000, 5, 60, [0, 5, 10, 20, 40, 60], 20, [0, 5, 10, 20, 40], 500),
    )
    data = images(given.data, samples)
    everyone = range(seeds)
    traces = {
        "sharp from the start": [run(data, [(False, ends[-1] + sharp)], seed, measured)[1] for seed in everyone],
        f"blurred for {ends[-2]} epochs": [run(data, [(True, ends[-2]), (False, sharp)], seed, measured)[1] for seed in everyone],
    }
    by_end = np.array([[run(data, [(True, end), (False, sharp)], seed)[0] for seed in everyone] for end in ends])
    windows = [[(False, onset), (True, window), (False, sharp)] for onset in onsets]
    by_onset = np.array([[run(data, phases, seed)[0] for seed in everyone] for phases in windows])
    settings = {
        "data": data.name,
        "samples": samples,
        "batch": BATCH,
        "lr": LR,
        "sharp epochs at the end": sharp,
        "window": window,
    }
    report = Report(f"critical_period_{data.name.split('-')[0].lower()}", given, settings | {"seeds": list(everyone)})
    report.numbers = {"trace": traces, "ends": ends, "accuracy by end": by_end, "onsets": onsets, "accuracy by onset": by_onset}
    mean = np.mean(traces["sharp from the start"], 0)
    peak = int(mean.argmax())
    report.check(
        "tr F rises (twice) and then falls (by half)",
        mean[peak] > 2 * mean[0] and mean[-1] < mean[peak] / 2,
        f"{arrows([mean[0], mean[peak], mean[-1]])}, the peak after epoch {peak}",
    )
    lost = by_end[0].mean() - by_end[-1].mean()
    noise = (by_end[0].var(ddof=1) / seeds + by_end[-1].var(ddof=1) / seeds) ** 0.5 if seeds > 1 else 0.0
    accuracies = arrows(by_end.mean(1).tolist())
    report.check("a longer blur at the start costs test accuracy (two standard errors)", lost > 2 * noise, accuracies)
    lost_late = by_onset[-1].mean() - by_onset[0].mean()
    noise = (by_onset[0].var(ddof=1) / seeds + by_onset[-1].var(ddof=1) / seeds) ** 0.5 if seeds > 1 else 0.0
    accuracies = arrows(by_onset.mean(1).tolist())
    report.check("the same window costs more early than late (two standard errors)", lost_late > 2 * noise, accuracies)
    draw(report, data, traces, (ends, by_end), (onsets, by_onset), window)
    return report


def draw(report: Report, data: Data, traces: dict, ends: tuple, onsets: tuple, window: int) -> None:
    """The trace over the epochs, and the final accuracy by the blur's end and onset."""
    figure, (over, by_end, by_onset) = panels(
        3, title=f"{data.name}: the Fisher over training, and a blur that is removed; mean and range of seeds"
    )
    for colour, (label, runs) in zip(COLOURS, traces.items(), strict=False):
        values = np.array(runs)
        over.plot(values.mean(0), color=colour, label=label)
        over.fill_between(range(values.shape[1]), values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    over.set(yscale="log", xlabel="epoch", ylabel="tr F (nats per squared unit of weight)")
    over.legend(frameon=False, fontsize=8)
    labels = ("epoch at which the blur from the start ends", f"epoch at which a blur of {window} epochs starts")
    for axes, label, (ticks, values) in zip((by_end, by_onset), labels, (ends, onsets), strict=True):
        axes.plot(ticks, 100 * values.mean(1), "o-", color=COLOURS[2])
        axes.fill_between(ticks, 100 * values.min(1), 100 * values.max(1), color=COLOURS[2], alpha=0.15, linewidth=0)
        axes.set(xlabel=label, ylabel="test accuracy at the end (%)")
    report.save(figure)


if __name__ == "__main__":
    main()
