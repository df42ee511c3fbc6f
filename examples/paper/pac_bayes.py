# SPDX-License-Identifier: Apache-2.0
"""A PAC-Bayes bound on digits that says something: Theorem 2.2 with the prior around the initial weights.

A small network learns scikit-learn's digits. Around it a Gaussian posterior is trained on ``E_Q loss + beta KL(Q || P)``, P around the
initial weights with one of three scales (delta is shared among them), at several prices beta. Of each: the error under the noise,
the nats, and the bound on the error for new digits, beside the error on digits that were held out. The control is the paper's
Gaussian code, the optimal posterior of the Fisher around the weights as ordinary training left them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from common import COLOURS, Data, Report, digits, evaluate, mlp, options, panels, train
from torch import nn

import fisherfast as ff

PRIOR_SCALES = (0.1, 0.3, 1.0)
DELTA, SAMPLE_DELTA = 0.04, 0.01  # of the data, of the draws; both shared among the priors
COLUMNS = {
    "kl": ("bound (kl)", COLOURS[0]),
    "mcallester": ("bound (McAllester)", COLOURS[5]),
    "error held out": ("error held out", COLOURS[1]),
    "error": ("error seen", COLOURS[2]),
}


def bounded(posterior: Any, scale: float, network: nn.Module, data: Data, draws: int) -> dict[str, float]:
    """Errors under the noise of Q, seen and held out, its nats, and both bounds on the error for new digits."""
    errors = [
        ff.expected_loss(posterior, network, [batch], draws=draws, loss=ff.zero_one)
        for batch in ((data.x, data.y), (data.x_test, data.y_test))
    ]
    found = {"prior scale": scale, "beta": posterior.beta, "nats": posterior.kl}
    found |= {"error": errors[0].value, "error held out": errors[1].value}
    deltas = {"delta": DELTA / len(PRIOR_SCALES), "sample_delta": SAMPLE_DELTA / len(PRIOR_SCALES)}
    for method in ("kl", "mcallester"):
        bound = ff.pac_bayes_bound(errors[0], posterior.kl, len(data.x), method=method, draws=draws, **deltas)
        found[method] = bound.value
    return found


def main(arguments: Sequence[str] | None = None) -> Report:
    """Train, bound, check, draw."""
    given = options(__doc__ or "", arguments)
    data, epochs, draws = digits(), given.pick(1, 200, 1000), given.pick(4, 1000, 5000)
    prices = given.pick((0.01,), (1e-4, 3e-4, 1e-3, 2e-3, 4e-3), (1e-4, 2e-4, 4e-4, 7e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3))
    scales = given.pick(PRIOR_SCALES[:1], PRIOR_SCALES, PRIOR_SCALES)
    torch.manual_seed(0)
    network = mlp(64, 16, 10)
    start = copy.deepcopy(network)
    train(network, data.x, data.y, steps=given.pick(5, 300, 300), batch=64, lr=0.05, seed=0)
    _, accuracy = evaluate(network, data.x_test, data.y_test)
    settings = {
        "network": "64-16-10 tanh",
        "data": "scikit-learn's digits",
        "samples": len(data.x),
        "epochs": epochs,
        "seeds": [0],
    }
    settings |= {"priors": f"around the initial weights, scales {list(PRIOR_SCALES)}, fixed before the data", "draws": draws}
    report = Report("pac_bayes", given, settings | {"delta": DELTA + SAMPLE_DELTA, "held-out accuracy without noise": accuracy})

    batches = list(zip(data.x.split(128), data.y.split(128), strict=True))
    F = ff.fisher(network, batches, "ekfac", "exact", progress=False)
    trained, coded = [], []
    how: dict[str, Any] = {"center": start, "epochs": epochs, "lr": 0.05, "train_mean": True, "mean_lr": 0.01}
    for scale in scales:
        for beta in prices:
            q = ff.variational_posterior(network, batches, beta=beta, prior_scale=scale, **how)
            trained.append(bounded(q, scale, network, data, draws))
            of_fisher = ff.optimal_posterior(F, network, prior_scale=scale, beta=beta, center=start)
            coded.append(bounded(of_fisher, scale, network, data, given.pick(4, 50, 200)))
    report.numbers = {"trained posterior": trained, "Fisher's posterior": coded}

    best = min(trained, key=lambda point: point["kl"])
    report.check(
        "the bound says something (below 1, and below 9 errors in 10 of a guess)",
        best["kl"] < 0.9,
        f"error at most {best['kl']:.1%} on new digits, with probability {1 - DELTA - SAMPLE_DELTA:.0%}; {best['error held out']:.1%} held "
        f"out, {best['error']:.1%} seen, {best['nats']:.0f} nats at beta = {best['beta']:g}, prior scale {best['prior scale']:g}",
    )
    every = trained + coded
    report.check(
        "no bound is below the error held out",
        all(point[method] >= point["error held out"] for point in every for method in ("kl", "mcallester")),
        f"{len(every)} posteriors, two bounds each",
    )
    report.check(
        "the kl bound is at most McAllester's",
        all(point["kl"] <= point["mcallester"] for point in every),
        f"best {best['kl']:.3f} against {min(point['mcallester'] for point in trained):.3f}",
    )
    least = min(coded, key=lambda point: point["kl"])
    report.check(
        "control: the Fisher's Gaussian code around ordinary weights bounds worse",
        least["kl"] > best["kl"],
        f"{least['kl']:.1%} at best, with {least['nats']:.0f} nats (beta = {least['beta']:g})",
    )
    figure, (left, right) = panels(2, title=f"PAC-Bayes on {len(data.x):,} digits, {1 - DELTA - SAMPLE_DELTA:.0%} confidence")
    for axes, points, name in ((left, trained, "trained posterior"), (right, coded, "Fisher's posterior around SGD's weights")):
        for key, (label, colour) in COLUMNS.items():
            for scale in scales:
                mine = [p for p in points if p["prior scale"] == scale]
                numbers = [p["nats"] for p in mine], [min(p[key], 1.2) for p in mine]
                axes.plot(*numbers, "o-", color=colour, markersize=4, label=label if scale == scales[0] else None)
        axes.set(xscale="log", xlim=(10, 20_000))
        axes.axhline(0.9, color="0.4", linewidth=0.9, linestyle="--")
        axes.annotate("guessing", (1, 0.9), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        axes.set(
            title=name,
            xlabel="KL(Q || P), nats (logarithmic); a line for each prior scale",
            ylabel="share of wrong digits (bounds cut at 1.2)",
            ylim=(0, 1.25),
        )
    left.legend(fontsize=8, frameon=False)
    report.settings["entropy of the labels, nats"] = round(len(data.y) * math.log(10), 1)
    report.save(figure)
    return report


if __name__ == "__main__":
    main()
