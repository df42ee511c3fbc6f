# SPDX-License-Identifier: Apache-2.0
"""Figure 1: the log-determinant of the Fisher while a small network learns two spirals, and what the temperature makes of it.

Plain gradient descent on a 2-32-32-2 tanh network; every few steps the exact Fisher of all samples. There are more weights than
samples, so log|F| itself is -inf; what is drawn is ``1/2 log|I + (lambda^2 / beta) F|`` and ``1/2 sum g``, the nats that
the weights' precision costs. The control is the same network with its logits divided by their own size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from common import COLOURS, Report, Tempered, arrows, evaluate, mlp, options, panels, spirals, train

import fisherfast as ff

SAMPLES, LAMBDA, LR = 200, 1.0, 0.5
BETA = 1 / SAMPLES
COLUMNS = ("step", "logdet", "nats", "trace", "logdet, fixed T", "nats, fixed T", "trace, fixed T", "loss", "accuracy")


def measure(network: torch.nn.Module, x: torch.Tensor) -> list[float]:
    """``1/2 log|I + (lambda^2 / beta) F|``, ``1/2 sum g`` and the trace, by the exact Fisher."""
    F = ff.fisher(network.eval(), [(x, None)], "gram", "exact", progress=False)
    information = ff.information_in_weights(F, network, prior_scale=LAMBDA, beta=BETA)
    distance = sum(layer.squared_distance for layer in information.layers.values())
    weights = sum(F.diagonal()[name].numel() for name in F.names)
    logdet = 0.5 * (F.logdet(BETA / LAMBDA**2) - weights * np.log(BETA / LAMBDA**2))
    return [logdet, information.nats - distance / (2 * LAMBDA**2), F.trace()]


def run(seed: int, steps: int, marks: int) -> np.ndarray:
    """Train one network; a row of COLUMNS for every mark, the marks evenly spaced on a logarithmic axis."""
    x, y = spirals(SAMPLES, 0.05, torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    network = mlp(2, 32, 32, 2)
    wanted = {0, *np.geomspace(1, steps - 1, marks).astype(int).tolist()}
    rows: list[list[float]] = []

    def each(step: int) -> None:
        if step in wanted:
            rows.append([step, *measure(network, x), *measure(Tempered(network, x), x), *evaluate(network, x, y)])

    train(network, x, y, steps=steps, batch=SAMPLES, lr=LR, momentum=0.0, seed=seed, each=each)
    return np.array(rows)


def main(arguments: Sequence[str] | None = None) -> Report:
    """Train, check the rise, the bumps and the late decline, draw the figure."""
    given = options(__doc__ or "", arguments)
    steps, marks, seeds = given.pick((30, 6, 1), (6_000, 50, 3), (60_000, 90, 5))
    runs = [run(seed, steps, marks) for seed in range(seeds)]
    settings = {"network": "2-32-32-2 tanh", "data": "two spirals", "samples": SAMPLES, "steps": steps, "lr": LR}
    report = Report("figure1_logdet", given, settings | {"lambda": LAMBDA, "beta": BETA, "seeds": list(range(seeds))})
    logdet, fixed, loss = ([rows[:, COLUMNS.index(name)] for rows in runs] for name in ("logdet", "logdet, fixed T", "loss"))
    together = []
    for value, error in zip(logdet, loss, strict=True):
        learning = slice(0, int(np.argmax(error < 0.05)) or None)  # until it is learned
        together.append(float(np.corrcoef(np.diff(value[learning]), -np.diff(error[learning]))[0, 1]))
    report.numbers = {"columns": COLUMNS, "runs": runs, "correlation": together}
    rise = [value.max() / value[0] for value in logdet]
    report.check("the log-determinant rises while the network learns (1.5 times)", min(rise) > 1.5, f"{arrows_of(logdet)}")
    seen = ", ".join(f"{one:.2f}" for one in together)
    report.check("its bumps go with drops of the loss (correlation > 0.3)", min(together) > 0.3, f"correlation {seen}")
    falls = [1 - value[-1] / value.max() for value in logdet]
    report.check("it falls late in training (by 20%)", min(falls) > 0.2, ", ".join(f"{-one:+.0%}" for one in falls))
    falls = [1 - value[-1] / value[np.argmax(peak)] for value, peak in zip(fixed, logdet, strict=True)]
    claim = "control: from that peak on it also falls at a fixed logit temperature (by 20%)"
    report.check(claim, min(falls) > 0.2, ", ".join(f"{-one:+.0%}" for one in falls) + f"; {arrows_of(fixed)}")
    draw(report, runs[0])
    return report


def arrows_of(curves: list[np.ndarray]) -> str:
    """Start, peak and end of each curve."""
    return ", ".join(arrows([curve[0], curve.max(), curve[-1]]) for curve in curves)


def draw(report: Report, rows: np.ndarray) -> None:
    """Log-determinants, traces, loss and accuracy of one run."""
    column = dict(zip(COLUMNS, rows.T, strict=True))
    step = column["step"] + 1  # a logarithmic axis has no 0
    figure, (logdet, trace, loss) = panels(
        3, title="A 2-32-32-2 network learns two spirals: the exact Fisher on the way (seed 0)"
    )
    for axes, name in ((logdet, "logdet"), (logdet, "nats"), (trace, "trace")):
        colour = COLOURS[1] if name == "nats" else COLOURS[0]
        label = {"logdet": "1/2 log|I + (lambda^2/beta) F|", "nats": "1/2 sum g(s)", "trace": "tr F"}[name]
        axes.plot(step, column[name], color=colour, label=label)
        axes.plot(step, column[f"{name}, fixed T"], "--", color=colour, label=f"{label}, fixed temperature")
        axes.set(xscale="log", xlabel="step of gradient descent")
        axes.legend(frameon=False, fontsize=7.5)
    logdet.set(ylabel="nats", ylim=(0, 1.6 * max(column["logdet"].max(), column["logdet, fixed T"].max())))
    trace.set(ylabel="tr F (nats per squared unit of weight)", yscale="log")
    loss.plot(step, column["loss"], color=COLOURS[2], label="training loss (nats)")
    loss.plot(step, column["accuracy"], color=COLOURS[6], linewidth=1, label="training accuracy")
    loss.set(xscale="log", xlabel="step of gradient descent", ylabel="nats; fraction", ylim=(0, 1.05))
    loss.legend(frameon=False, fontsize=8)
    report.save(figure)


if __name__ == "__main__":
    main()
