# SPDX-License-Identifier: Apache-2.0
"""Figure 2: how far SGD's endpoint moves when one sample is left out, and whether it moves where the Fisher is small.

All runs share initialisation and order, and differ in one sample. ``1/2 Delta^T F Delta / beta`` are the nats by which the endpoint
tells of that sample; ``|Delta|^2 tr F / k`` in place of ``Delta^T F Delta`` is what a displacement of that length costs if its
direction has nothing to do with F. The control is the direction of the left-out sample's own gradient at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from common import COLOURS, Report, batches, mlp, moons, options, panels
from torch import Tensor, nn

import fisherfast as ff

SAMPLES, BATCH, LR, LAMBDA = 100, 10, 0.1, 1.0
BETA = 1 / SAMPLES
WIDTHS = (2, 16, 16, 2)


def endpoints(network: nn.Module, x: Tensor, y: Tensor, left_out: Tensor, steps: int, seed: int) -> dict[str, Tensor]:
    """The weights after SGD, ``{name: [run, *shape]}``: the run with all samples, then one without each of ``left_out``; all step together."""
    runs = len(left_out) + 1
    keep = torch.ones(runs, SAMPLES)
    keep[torch.arange(1, runs), left_out] = 0
    weights = {name: p.detach().expand(runs, *p.shape).clone() for name, p in network.named_parameters()}

    def loss(parameters: dict[str, Tensor], rows: Tensor, keep: Tensor) -> Tensor:
        logits = torch.func.functional_call(network, parameters, (x[rows],))
        errors = nn.functional.cross_entropy(logits, y[rows], reduction="none")
        return (errors * keep).sum() / BATCH  # the others weigh what they weigh with it

    gradient = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, 0))
    for rows in batches(SAMPLES, BATCH, steps, seed):
        for name, one in gradient(weights, rows, keep[:, rows]).items():
            weights[name] -= LR * one
    return weights


def main(arguments: Sequence[str] | None = None) -> Report:
    """Train the pairs, measure displacements, check the paper's picture, draw it."""
    given = options(__doc__ or "", arguments)
    steps, pairs, seeds = given.pick((20, 5, 1), (2000, 100, 3), (20_000, 100, 10))
    runs = [run(seed, steps, pairs) for seed in range(seeds)]
    cost, isotropic, gradient = np.concatenate([of_run[0] for of_run in runs], 1)
    fisher, delta = runs[0][1:]
    at, spread = projected(fisher, delta)
    inside = float((np.einsum("ia,ab,ib->i", at, np.linalg.inv(spread), at) < 4).mean())
    ratio = cost / isotropic
    settings = {
        "network": "-".join(map(str, WIDTHS)) + " tanh",
        "data": "two moons",
        "samples": SAMPLES,
        "batch": BATCH,
        "lr": LR,
    }
    settings |= {"steps": steps, "pairs": len(cost), "beta": BETA, "lambda": LAMBDA, "seeds": list(range(seeds))}
    report = Report("figure2_path_stability", given, settings)
    of_plane = {"displacement": at, "covariance": spread, "directions": "stiffest of F; main one of the displacements across it"}
    report.numbers = {
        "Delta F Delta": cost,
        "|Delta|^2 tr F / k": isotropic,
        "gradient's, over tr F / k": gradient,
        "plane": of_plane,
    }
    seen = f"median ratio {np.median(ratio):.3g}, below 1 in {(ratio < 1).mean():.0%} of {len(ratio)} pairs"
    report.check("Delta^T F Delta is below |Delta|^2 tr F / k (median of the pairs)", np.median(ratio) < 1, seen)
    report.check(
        "endpoints lie within two standard deviations of the noise the weights tolerate", inside > 0.9, f"{inside:.0%}, seed 0"
    )
    seen = f"median {np.median(gradient):.3g} times tr F / k, the displacements {np.median(ratio):.3g}"
    report.check(
        "control: the left-out gradients point where F is large, so it is SGD that avoids it", np.median(gradient) > 1, seen
    )
    draw(report, cost, isotropic, gradient, at, spread)
    return report


def run(seed: int, steps: int, pairs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One seed: [Delta^T F Delta, |Delta|^2 tr F / k, g^T F g / |g|^2 / (tr F / k)] of every pair; F; the displacements."""
    x, y = moons(SAMPLES, 0.2, torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    network = mlp(*WIDTHS)
    ends = endpoints(network, x, y, torch.arange(pairs), steps, seed)
    whole = {name: one[0] for name, one in ends.items()}
    network.load_state_dict(whole)
    F = ff.fisher(network.eval(), [(x, None)], "gram", "exact", progress=False)
    at_rest = {name: torch.zeros_like(one) for name, one in whole.items()}
    measured = []
    for i in range(pairs):
        pair = ff.path_stability(F, {name: one[i + 1] for name, one in ends.items()}, whole, beta=BETA)
        gradient = ff.path_stability(F, gradient_of(network, x[i : i + 1], y[i : i + 1]), at_rest, beta=BETA)
        measured.append([pair.quadratic, pair.isotropic, gradient.alignment])
    delta = torch.cat([(one[1:] - one[0]).flatten(1) for one in ends.values()], 1).double()
    fisher = torch.stack([F @ one for one in torch.eye(delta.shape[1], dtype=torch.float64)])
    return np.array(measured).T, fisher.numpy(), delta.numpy()


def projected(fisher: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Displacements, and the covariance ``beta (F + beta / lambda^2)^-1``, in the plane of the stiffest direction of F and the
    main direction of the displacements across it.
    """
    stiff = np.linalg.eigh(fisher)[1][:, -1]
    across = delta - np.outer(delta @ stiff, stiff)
    plane = np.stack([stiff, np.linalg.svd(across, full_matrices=False)[2][0]])
    covariance = BETA * np.linalg.inv(fisher + BETA / LAMBDA**2 * np.eye(len(fisher)))
    return delta @ plane.T, plane @ covariance @ plane.T


def gradient_of(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradient of the loss of one sample."""
    loss = nn.functional.cross_entropy(network(x), y)
    names, parameters = zip(*network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def draw(
    report: Report, cost: np.ndarray, isotropic: np.ndarray, gradient: np.ndarray, at: np.ndarray, spread: np.ndarray
) -> None:
    """The endpoints in the plane, the cost of every pair, and where displacements and gradients point."""
    figure, (plane, pairs, where) = panels(3, title="Two runs of SGD that differ in one sample: where do their endpoints differ?")
    circle = np.linspace(0, 2 * np.pi, 200)
    ellipse = 2 * np.linalg.cholesky(spread) @ np.stack([np.cos(circle), np.sin(circle)])
    plane.plot(*ellipse[::-1], color=COLOURS[0], label="two standard deviations of beta (F + beta/lambda^2)^-1")
    plane.plot(*at.T[::-1], ".", color=COLOURS[1], label="endpoint without one sample (seed 0)")
    plane.set(xlabel="displacement along its main direction", ylabel="along the top eigenvector of F")
    plane.set_ylim(*(1.7 * np.array([-1, 1]) * np.abs(ellipse[0]).max()))
    plane.legend(frameon=False, fontsize=7.5, loc="upper left")
    pairs.loglog(isotropic / BETA / 2, cost / BETA / 2, ".", color=COLOURS[1], markersize=4)
    ends = np.array([isotropic.min(), isotropic.max()]) / BETA / 2
    pairs.loglog(ends, ends, color=COLOURS[6], linewidth=1, label="equal: no preferred direction")
    pairs.set(xlabel="|Delta|^2 tr F / k / (2 beta)  (nats)", ylabel="Delta^T F Delta / (2 beta)  (nats)")
    pairs.legend(frameon=False, fontsize=8)
    both = (cost / isotropic, gradient)
    edges = np.geomspace(min(map(np.min, both)), max(map(np.max, both)), 40)
    for colour, values, label in zip(COLOURS[1:], both, ("displacements", "gradients of the left-out samples"), strict=False):
        where.hist(values, edges, color=colour, alpha=0.7, label=label)
    where.axvline(1, color=COLOURS[6], linewidth=1)
    where.set(xscale="log", xlabel="F along the direction, over tr F / k", ylabel="pairs")
    where.set_ylim(0, 1.25 * where.get_ylim()[1])
    where.legend(frameon=False, fontsize=8)
    report.save(figure)


if __name__ == "__main__":
    main()
