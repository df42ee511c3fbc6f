# SPDX-License-Identifier: Apache-2.0
"""Does an activation say less about its input when the weights hold less information? Proposition 3.2 on real digits.

Small networks are trained on scikit-learn's digits so that their weights hold more or less information, in three ways: how
long they are trained, with how much weight decay, with how much noise on the weights. Of each: the information in the weights,
and the effective information of the last hidden layer and of the logits, by three measures. The claim passes for a measure if
its Spearman correlation with the information in the weights, over all trained networks of a seed, is at least 0.5 in the mean
over seeds and above 0 for every seed. As a control one network is read at several prices beta of a nat: its Jacobians stay as
they are, so that the noise alone differs::

    python examples/paper/effective_information.py --out out/paper

The information in the weights is ``|w|^2 / (2 lambda^2)`` plus a sum over the Fisher's eigenvalues. Proposition 3.2 is about the
Fisher alone, so the correlations with that second part by itself are there too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from common import COLOURS as OKABE_ITO
from common import Options, Report, digits, evaluate, options
from matplotlib.figure import Figure
from torch import Tensor, nn

import fisherfast as ff

LENGTHS = (1, 3, 10, 30, 100)  # epochs
DECAYS = (0.1, 0.3, 1.0, 3.0)
NOISES = (0.05, 0.1, 0.2, 0.3)  # standard deviation on every weight, in every step
EPOCHS = 30  # where it is not the length that varies, and of the network that is read at several prices
STRUCTURE = "ekfac"
PRICES = (1e-4, 1e-3, 1e-2, 1e-1)
PRIOR_SCALE = 0.3
INPUTS = 100
LAYERS = {"hidden": "3", "logits": None}
MEASURES = {
    "spectrum": "mean trace of F(z|x), nats / pixel^2",
    "nuisance": "eq. 10 on shift and rotation, nats",
    "monte-carlo": f"I(which input; z), nats of {math.log(INPUTS):.2f}",
}
NAMES = [f"{layer} {measure}" for layer in LAYERS for measure in MEASURES]
AXES = {"weights": "information in the weights", "fisher part": "Fisher part of the information in the weights"}
NUISANCES = {"shift x": 2.0, "shift y": 2.0, "rotation": 0.5}  # widths of uniform priors: pixels, pixels, radians
SWEEPS = {
    "length": "trained for 1 to 100 epochs",
    "decay": "weight decay 0.1 to 3",
    "noise": "noise on the weights, 0.05 to 0.3",
    "beta": "one network, beta 1e-4 to 0.1",
}
COLOURS = dict(zip(("length", "decay", "noise", "beta"), (*OKABE_ITO[:3], "#999999"), strict=True))
TRAINED = ("length", "decay", "noise")
PASS_MEAN = 0.5


def trained(x: Tensor, y: Tensor, seed: int, epochs: int = EPOCHS, decay: float = 0.0, noise: float = 0.0) -> nn.Module:
    """A 64-64-16-10 tanh network; ``noise`` is added to the weights for each gradient and taken away again."""
    torch.manual_seed(seed)
    layers = (nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    network = nn.Sequential(*layers).double()
    weights = list(network.parameters())
    optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=decay)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            exact = [w.detach().clone() for w in weights]
            with torch.no_grad():
                for w in weights:
                    w.add_(noise * torch.randn_like(w))
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            with torch.no_grad():
                for w, before in zip(weights, exact, strict=True):
                    w.copy_(before)
            optimizer.step()
    return network.eval()


def measured(network: nn.Module, F: Any, inputs: Tensor, beta: float) -> dict[str, Any]:
    """The information in the weights and, by layer and measure, in the activations."""
    info = ff.information_in_weights(F, network, prior_scale=PRIOR_SCALE, beta=beta)
    distance = math.fsum(layer.squared_distance for layer in info.by_layer().values())
    tangents = ff.image_tangents(inputs, tuple(NUISANCES), shape=(1, 8, 8))
    options: dict[str, dict[str, Any]] = {
        "spectrum": {},
        "nuisance": {"along": tangents, "nuisance_scales": NUISANCES},
        "monte-carlo": {"draws": 16},
    }
    found: dict[str, Any] = {
        "weights": info.nats,
        "fisher part": info.nats - distance / (2 * PRIOR_SCALE**2),
        "trace of F": F.trace(),
        "conditions": info.conditions(),
    }
    for name, layer in LAYERS.items():
        for method, more in options.items():
            effective = ff.effective_information(
                network, inputs, F, method=method, layer=layer, beta=beta, prior_scale=PRIOR_SCALE, **more
            )
            value = effective.trace if method == "spectrum" else effective.nats
            found[f"{name} {method}"] = value
            if method == "spectrum":
                found[f"{name} log pseudo-determinant"] = effective.log_pseudo_determinant
            else:
                found[f"{name} {method} standard error"] = effective.stderr
    return found


def runs(seed: int, given: Options) -> list[dict[str, Any]]:
    """Every network of a seed, measured."""
    data = digits()
    x, x_test = data.x.double(), data.x_test.double()
    inputs, read = x_test[: given.pick(6, INPUTS, INPUTS)], given.pick(1, EPOCHS, EPOCHS)
    ways = [("length", epochs, {"epochs": epochs}) for epochs in given.pick((1, 2), LENGTHS, LENGTHS)]
    ways += [("decay", decay, {"decay": decay, "epochs": read}) for decay in given.pick(DECAYS[:2], DECAYS, DECAYS)]
    ways += [("noise", noise, {"noise": noise, "epochs": read}) for noise in given.pick(NOISES[:2], NOISES, NOISES)]
    records = []
    for sweep, value, settings in ways:
        network = trained(x, data.y, seed, **settings)
        F = ff.fisher(network, [(x, None)], STRUCTURE, "exact", progress=False)
        common = {"seed": seed, "accuracy": evaluate(network, x_test, data.y_test)[1]}
        records.append({"sweep": sweep, "value": value, **common, **measured(network, F, inputs, 1 / len(x))})
        if settings == {"epochs": read}:
            records += [
                {"sweep": "beta", "value": beta, **common, **measured(network, F, inputs, beta)}
                for beta in given.pick(PRICES[:2], PRICES, PRICES)
            ]
    return records


def spearman(a: list[float], b: list[float]) -> float:
    """The correlation of the ranks."""
    ranks = [torch.tensor(values, dtype=torch.float64).argsort().argsort().double() for values in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def correlations(records: list[dict[str, Any]], axis: str, measure: str, *sweeps: str) -> list[float]:
    """Spearman's, by seed, over the networks of some sweeps."""
    found = []
    for seed in sorted({record["seed"] for record in records}):
        rows = [record for record in records if record["seed"] == seed and record["sweep"] in sweeps]
        found.append(spearman([row[axis] for row in rows], [row[measure] for row in rows]))
    return found


def judge(report: Report, records: list[dict[str, Any]], axis: str, measure: str) -> None:
    """Whether a measure falls with the information in the weights: correlations over the trained networks of each seed."""
    each = correlations(records, axis, measure, *TRAINED)
    mean = sum(each) / len(each)
    by_sweep = {sweep: sum(correlations(records, axis, measure, sweep)) / len(each) for sweep in TRAINED}
    seen = f"Spearman {mean:+.3f} (" + ", ".join(f"{sweep} {value:+.2f}" for sweep, value in by_sweep.items()) + ")"
    if measure.endswith("monte-carlo"):
        values = [record[measure] for record in records if record["sweep"] in TRAINED]
        seen += f", {sum(value > 0.99 * math.log(INPUTS) for value in values)} of {len(values)} within 1% of the bound"
    report.numbers["spearman by seed"][f"{measure}, {axis}"] = each
    report.check(f"{measure} falls with the {AXES[axis]}", mean >= PASS_MEAN and min(each) > 0, seen)


def judge_control(report: Report, records: list[dict[str, Any]], measure: str) -> None:
    """Whether a measure of one network falls when it is read at a higher price: the same Jacobians, more noise."""
    each = correlations(records, "weights", measure, "beta")
    seen = "Spearman by seed " + ", ".join(f"{value:+.2f}" for value in each)
    if measure.endswith("monte-carlo"):
        read = [record for record in records if record["sweep"] == "beta"]
        values, errors = [r[measure] for r in read], [r[f"{measure} standard error"] for r in read]
        seen += f", values {min(values):.3f} to {max(values):.3f}, standard errors up to {max(errors):.3f}"
    report.check(f"control: {measure} of one network falls as beta rises", min(each) > 0.999, seen)


def drawn(report: Report, records: list[dict[str, Any]]) -> Figure:
    """Every measure against the information in the weights, and against its Fisher part."""
    figure = Figure(figsize=(20, 7), layout="constrained")
    panels = figure.subplots(len(AXES), len(NAMES))
    each = [(axis, name) for axis in AXES for name in NAMES]
    for axes, (axis, name), criterion in zip(panels.flatten(), each, report.criteria, strict=False):
        for sweep, colour in COLOURS.items():
            for seed in report.settings["seeds"]:
                mine = [record for record in records if record["sweep"] == sweep and record["seed"] == seed]
                points = [record[axis] for record in mine], [record[name] for record in mine]
                axes.plot(*points, "o-", color=colour, markersize=4, linewidth=0.6, label=SWEEPS[sweep] if seed == 0 else None)
        axes.set_title(f"{name}\n{criterion['verdict']}: {criterion['seen'].partition(' (')[0]}", fontsize=10)
        axes.set(xlabel=AXES[axis] + ", nats", ylabel=MEASURES[name.partition(" ")[2]])
        axes.xaxis.label.set_fontsize(8)
        if axis != "weights":
            axes.set_xscale("log")
        if name.endswith("spectrum"):
            axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> Report:
    """Train, measure, judge, draw."""
    given = options(__doc__ or "", arguments)
    seeds = list(range(given.pick(1, 3, 10)))
    records = [record for seed in seeds for record in runs(seed, given)]
    settings = {
        "network": "64-64-16-10 tanh",
        "data": "scikit-learn's digits",
        "prior scale": PRIOR_SCALE,
        "inputs": INPUTS,
        "structure": STRUCTURE,
        "nuisance widths": NUISANCES,
        "passes if": f"mean Spearman over seeds >= {PASS_MEAN}, every seed's > 0, over the networks of length, decay and noise",
        "seeds": seeds,
    }
    report = Report("effective_information", given, settings, {"networks": records, "spearman by seed": {}})
    for axis in AXES:
        for name in NAMES:
            judge(report, records, axis, name)
    for name in NAMES:
        judge_control(report, records, name)
    report.save(drawn(report, records))
    return report


if __name__ == "__main__":
    main()
