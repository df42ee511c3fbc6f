# SPDX-License-Identifier: Apache-2.0
"""What both halves of figure 4 share: one network measured after training, and the verdicts and the picture of a sweep."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from common import COLOURS, Report, Tempered, arrows, evaluate, panels, rising, trace
from torch import Tensor, nn

COLUMNS = ("trace", "trace, fixed T", "loss", "test accuracy")
UNITS = ("tr F (nats per squared unit of weight)", "tr F, fixed temperature (same unit)", "training loss (nats)")


def measured(network: nn.Module, some: Tensor, training: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> list[float]:
    """The COLUMNS of one trained network; the Fishers are of the inputs ``some``."""
    return [
        trace(network, some),
        trace(Tempered(network, some), some),
        evaluate(network, *training)[0],
        evaluate(network, *test)[1],
    ]


def verdicts(report: Report, claim: str, protocols: Sequence[str], values: np.ndarray) -> None:
    """Does the mean over seeds rise in every protocol, as it is and at a fixed temperature; the first one is the paper's."""
    for number, protocol in enumerate(protocols):
        for column in (0, 1):
            seen = values[number, :, :, column].mean(1).tolist()
            control = "control: " if number or column else ""
            report.check(f"{control}{claim}, {protocol}{', fixed T' * column}", rising(seen), arrows(seen))


def draw(report: Report, title: str, label: str, ticks: Sequence[int], protocols: Sequence[str], values: np.ndarray) -> None:
    """Trace, trace at a fixed temperature, and training loss; ``values[protocol, tick, seed, column]``."""
    figure, axes = panels(3, title=f"{title}; mean and range of {values.shape[2]} seeds")
    for column, (one, unit) in enumerate(zip(axes, UNITS, strict=True)):
        for number, protocol in enumerate(protocols):
            of = values[number, :, :, column]
            one.plot(ticks, of.mean(1), "o-", color=COLOURS[number], label=protocol)
            one.fill_between(ticks, of.min(1), of.max(1), color=COLOURS[number], alpha=0.15, linewidth=0)
        one.set(xscale="log" if ticks[-1] > 10 else "linear", yscale="log", xlabel=label, ylabel=unit)
        one.set_xticks(ticks, [str(tick) for tick in ticks])
        one.set_xticks([], minor=True)
    axes[0].legend(frameon=False, fontsize=9)
    report.save(figure)
