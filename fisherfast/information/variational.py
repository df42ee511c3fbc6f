# SPDX-License-Identifier: Apache-2.0
"""A posterior found by training it: Gaussian noise on every weight, as strong as the loss and the price of a nat leave it.

It needs no Fisher and no minimum. What it is right about is the loss under noise itself, not its second order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fisherfast import _checks
from fisherfast._error import NonFiniteError
from fisherfast._warning import warn
from fisherfast.data.batches import Batch, Output
from fisherfast.data.readings import check_rereadable
from fisherfast.information import _arguments, _prior
from fisherfast.information._diagonal_gaussian import DiagonalGaussian
from fisherfast.information._local_noise import LocalNoise
from fisherfast.information._losses import SampleLosses
from fisherfast.information._network import Weights
from fisherfast.information._prior import PriorScale
from fisherfast.information.posterior import GaussianPosterior
from fisherfast.likelihood import Likelihood, stored_name

NOISES = ("local", "weight")
# Gradients by log sigma are of order 1 at the optimum. Before it they are s = sigma^2 h / beta, which may be anything: all that they
# say is which way to go, and Adam's second moments, of 20 steps first, must forget them.
_LARGEST = 1e4
_BETAS = ((0.9, 0.95), (0.9, 0.999))  # of the first half of the epochs, and of the second
_MOVING = 0.5  # of all that Adam's steps can move log sigma: noise alone does less, a way that is not over does more
_CALLER = "variational_posterior"


@dataclass(frozen=True, eq=False)
class VariationalPosterior(GaussianPosterior):
    """``Q = N(mean, diag(std^2))``; made by ``variational_posterior``, which says how.

    ``center_norm`` is ``||c||``; ``history`` is the Lagrangian ``E_Q loss + beta KL`` of each epoch, as it was estimated on the way;
    ``frozen`` names the parameters that ask for no gradient, which are not in the nats.
    """

    mean: Mapping[str, Tensor] = field(repr=False)
    std: Mapping[str, Tensor] = field(repr=False)
    nats: float
    price: float
    prior_scale: PriorScale
    prior_scales: Mapping[str, float] = field(repr=False)
    centered: bool
    center_norm: float
    num_samples: int
    likelihood_name: str
    history: tuple[float, ...] = field(repr=False)
    settings: str
    frozen: tuple[str, ...] = field(default=(), repr=False)

    @property
    def kl(self) -> float:
        """``KL(Q || P)`` in nats."""
        return self.nats

    @property
    def beta(self) -> float:
        """The price of a nat, in units of the mean loss."""
        return self.price

    @property
    def likelihood(self) -> str:
        """The name of the likelihood that it was trained by, with the settings of its loss."""
        return self.likelihood_name

    def variance(self) -> dict[str, Tensor]:
        """``std^2`` in float64, shaped like the parameters."""
        return {name: std.double().square() for name, std in self.std.items()}

    def curvature(self) -> dict[str, Tensor]:
        """``h = beta (1 / sigma^2 - 1 / lambda^2)``: the curvature of the mean loss that this noise is the optimum for.

        Where the loss is quadratic it is the diagonal of the Hessian. Zero for a parameter without noise.

        Shapes:   like the parameters.
        Numerics: float64; where the prior decides the weight a difference of equal numbers, and possibly below 0.
        Source:   the optimum of the Lagrangian in sigma; Task2Vec (Achille et al. 2019) reads out ``1 / sigma^2``.
        """
        return {
            name: self.beta * (1 / v - 1 / self.prior_scales[name] ** 2) if self.prior_scales[name] else torch.zeros_like(v)
            for name, v in self.variance().items()
        }

    def conditions(self) -> str:
        """Everything Q depends on, in one line."""
        return (
            f"beta = {self.beta:.3g}, prior scale {_prior.in_words(self.prior_scale, self.centered)}, diagonal Sigma trained by "
            f"{self.settings}, k = {sum(m.numel() for m in self.mean.values()):,} weights, N = {self.num_samples:,} samples"
        )

    def _noise(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        def normal(std: Tensor) -> Tensor:
            device = std.device if generator is None else generator.device
            return torch.randn(std.shape, dtype=std.dtype, device=device, generator=generator).to(std.device)

        return {name: normal(std) * std for name, std in self.std.items()}


def variational_posterior(
    model: nn.Module,
    data: Iterable[Any],
    *,
    beta: float,
    prior_scale: PriorScale,
    center: Weights | None = None,
    likelihood: str | Likelihood = "categorical",
    epochs: int = 20,
    lr: float = 0.05,
    train_mean: bool = False,
    mean_lr: float = 1e-3,
    noise: str = "local",
    seed: int = 0,
    output: Output = None,
) -> VariationalPosterior:
    """``min over sigma of E_Q L + beta KL(Q || P)``, ``Q = N(w, diag(sigma^2))``, by stochastic gradients of the loss under noise.

    For a quadratic loss the optimum is ``sigma^2 = beta / (h + beta / lambda^2)``, h the Hessian's diagonal. It covers every
    parameter that asks for a gradient.

    ``prior_scale``  lambda: a number, {layer or parameter name: number}, or ``"fit"``, ``lambda^2 = (|w - c|^2 + sum sigma^2) / k``
                     of every layer at every step. A layer that is at the center has no noise then (lambda = 0).
    ``noise``        ``"local"``: linear layers and convolutions get it at their output, with the variance ``conv(x^2, sigma^2)``
                     and every position its own draw (Task2Vec's form). For one position per sample that is the weight noise
                     exactly; where positions share a weight it leaves out what their common noise does together.
                     ``"weight"``: one draw of all weights for every batch. It is exact throughout, and takes more epochs.
    ``epochs``       readings of ``data``; Adam's step on log sigma falls from ``lr`` to 0 over them. Starting from ``0.1 |w|``
                     (``0.1 lambda`` where that is smaller), log sigma needs about ``log(0.1 |w| / sigma) / lr`` steps to reach the
                     optimum and twice that to settle, so large batches need more epochs. A FisherWarning says when sigma is
                     clearly still moving; with noisy gradients or few weights it cannot be detected.
    ``train_mean``   train the means, too, with steps from ``mean_lr``; by default they stay at the model's weights.

    Parameters of other layers, and of layers that are tied or called several times, have weight noise in either case. The
    model itself is left as it is, and so is torch's global generator. Gradient checkpointing must be off: it would run parts of
    the model again without the noise.

    Shapes:   as for ``ff.fisher``, with labels.
    Scale:    a mean loss over samples, and beta goes with it; a batch counts as an estimate of that mean.
    Errors:   ValueError for settings out of range, for data as ``expected_loss``, and for a model without a parameter that asks
              for a gradient; NonFiniteError for a loss that is not finite.
    Numerics: log sigma in float32 (float64 for such weights), and noise below the rounding of the weights is lost on the loss: a beta
              that asks for less needs them in float64. The KL of the result in float64. The result is as noisy as its last epochs are: ``.history`` shows whether more would help.
    Source:   Definition 2.1 of arXiv:1905.12213; Kingma, Salimans & Welling 2015 for noise at the output; Task2Vec (Achille et
              al. 2019), whose divergence lacks the factor 1/2, so that its beta is half of this one.
    """
    beta = _arguments.beta(_CALLER, beta)
    prior_scale = _prior.checked(_CALLER, prior_scale)
    lr = _checks.positive(_CALLER, "lr", lr, "it is Adam's step on log sigma")
    mean_lr = _checks.positive(_CALLER, "mean_lr", mean_lr, "it is Adam's step on the means")
    _checks.one_of(_CALLER, "noise", noise, NOISES)
    epochs = _checks.integer(_CALLER, "epochs", epochs, 1)
    check_rereadable(_CALLER, data)
    losses = SampleLosses.of(_CALLER, model, likelihood, None, output)
    q = DiagonalGaussian(_CALLER, losses.model, prior_scale, center, train_mean)
    with _own_generator(seed, q.device):
        local = _local_noise(losses, q, data) if noise == "local" else None
        history, num_samples = _train(losses, q, beta, local, data, epochs, lr, mean_lr)
    around = "trained means" if train_mean else "the model's weights"
    with torch.no_grad():
        stds = q.stds()
        scales = q.scales(stds)
        return VariationalPosterior(
            mean={name: mean.detach() for name, mean in q.means.items()},
            std=stds,
            nats=float(q.kl(stds, scales)),
            price=beta,
            prior_scale=prior_scale,
            prior_scales=scales,
            centered=center is not None,
            center_norm=q.center_norm,
            num_samples=num_samples,
            likelihood_name=stored_name(losses.likelihood, "empirical"),  # its loss is of the data's labels
            history=history,
            settings=f"{losses.likelihood.name}, {noise} noise, {epochs} epochs, lr {lr:g}, seed {seed}, around {around}",
            frozen=tuple(name for name, parameter in losses.model.named_parameters() if not parameter.requires_grad),
        )


@contextmanager
def _own_generator(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generator, seeded, and as before afterwards: a loader that shuffles takes its order from it, too."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _local_noise(losses: SampleLosses, q: DiagonalGaussian, data: Iterable[Any]) -> LocalNoise:
    first = next(losses.batches(data), None)
    if first is None:
        raise ValueError(f"{_CALLER}: data must yield at least one batch, got none")
    with torch.no_grad():
        return LocalNoise(losses.model, set(q.log_stds), lambda: losses.of_batch(first.cut(0, 1), {}))


@torch.enable_grad()
def _train(
    losses: SampleLosses,
    q: DiagonalGaussian,
    beta: float,
    local: LocalNoise | None,
    data: Iterable[Any],
    epochs: int,
    lr: float,
    mean_lr: float,
) -> tuple[tuple[float, ...], int]:
    """Adam on ``E_Q L / beta + KL``; returns the Lagrangian of each epoch and how many samples one has."""
    trained_means = [mean for mean in q.means.values() if mean.requires_grad]
    groups = [{"params": list(q.log_stds.values()), "lr": lr}, {"params": trained_means, "lr": mean_lr}]
    groups = [group for group in groups if group["params"]]
    history, samples, way = [], 0, _Way(q)
    usual = 0.0  # the mean weight of a batch, known after the first epoch: batches count by their samples
    for epoch in range(epochs):
        if epoch in (0, epochs // 2):
            optimizer = torch.optim.Adam([dict(group) for group in groups], betas=_BETAS[epoch >= epochs // 2])
            way = _Way(q)
        for group, step in zip(optimizer.param_groups, (lr, mean_lr), strict=False):
            group["lr"] = step * (1 - epoch / epochs)
        values, samples, weight = [], 0, 0.0
        for number, batch in enumerate(losses.batches(data)):
            optimizer.zero_grad()
            stds = q.stds()
            loss = _noisy_loss(losses, q, local, batch, stds)
            if not bool(loss.detach().isfinite()):
                raise NonFiniteError(f"{_CALLER}: losses must be finite, got {loss.item()} in batch {number} of epoch {epoch}")
            size = batch.total_weight
            weight += size
            share = size / (usual or weight / (number + 1)) if weight else 0.0
            objective = share * loss.double() + beta * q.kl(stds, q.scales(stds))
            with torch.autocast(q.device.type, enabled=False):  # a backward pass has the precisions of its forward pass already
                objective.backward()
            _in_nats(q.log_stds.values(), beta, _LARGEST)
            _in_nats(trained_means, beta, math.inf)
            optimizer.step()
            way.add(optimizer.param_groups[0]["lr"])
            values.append(objective.item())
            samples += batch.N
        if not values:
            raise ValueError(f"{_CALLER}: data must yield at least one batch in every epoch, got none in epoch {epoch}")
        usual = weight / len(values)
        history.append(math.fsum(values) / len(values))
    if way.share() > _MOVING:
        warn(
            f"{_CALLER}: sigma has not converged: it still moves {way.share():.0%} of what lr allows, and the nats are those of a "
            "training that was stopped on its way; pass more epochs, or smaller batches"
        )
    return tuple(history), samples


class _Way:
    """How straight log sigma moves: the distance, over the length of all steps if each were as long as Adam makes them."""

    def __init__(self, q: DiagonalGaussian) -> None:
        self._q, self._length = q, 0.0
        self._start = {name: log_std.detach().clone() for name, log_std in q.log_stds.items()}

    def add(self, step: float) -> None:
        """One step."""
        self._length += step

    def share(self) -> float:
        """Of the mean distance over weights."""
        moved = [(self._q.log_stds[name].detach() - start).abs().double() for name, start in self._start.items()]
        return float(torch.cat([distance.flatten() for distance in moved]).mean()) / self._length if self._length else 0.0


def _in_nats(parameters: Iterable[Tensor], beta: float, largest: float) -> None:
    """Gradients of the loss as of ``loss / beta``, which may not fit float32 before it is cut."""
    for parameter in parameters:
        if parameter.grad is not None:
            most = min(largest, torch.finfo(parameter.dtype).max ** 0.25)  # Adam squares it, and adds up
            parameter.grad.clamp_(-most * beta, most * beta).div_(beta)


def _noisy_loss(
    losses: SampleLosses, q: DiagonalGaussian, local: LocalNoise | None, batch: Batch, stds: Mapping[str, Tensor]
) -> Tensor:
    """The batch's mean loss under one draw of the noise."""
    weights = q.weights(stds, local.names if local else set())
    with local.over(stds) if local else nullcontext():
        each = losses.of_batch(batch, weights)
    if batch.weight is None:
        return each.mean()
    return (batch.weight * each).sum() / batch.weight.sum().clamp_min(torch.finfo(batch.weight.dtype).tiny)  # of no weight: 0
