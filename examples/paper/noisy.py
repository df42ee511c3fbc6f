# SPDX-License-Identifier: Apache-2.0
"""A network with Gaussian noise on its weights, trained on the Information Lagrangian ``E_Q loss + beta KL(Q || P)``.

Q is ``N(w, diag sigma^2)`` and P ``N(0, lambda^2)`` with a lambda for each layer, at its optimum. The noise is drawn at the layer's
output (local reparametrisation), where it is Gaussian too.
"""

from __future__ import annotations

import itertools

import torch
from common import batches
from torch import Tensor, nn


class NoisyLinear(nn.Module):
    """A linear layer whose weights and biases are Gaussian and independent."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.randn(outputs, inputs + 1) / inputs**0.5)
        self.log_variance = nn.Parameter(torch.full((outputs, inputs + 1), -8.0))

    def forward(self, x: Tensor) -> Tensor:
        """The output for weights drawn anew for every sample."""
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        spread = (x.square() @ self.log_variance.exp().T + 1e-12).sqrt()
        return x @ self.mean.T + spread * torch.randn_like(spread)

    def kl(self) -> Tensor:
        """``KL(Q || P)`` at ``lambda^2 = (|w|^2 + tr Sigma) / k``, where all but the logarithms cancels."""
        square = (self.mean.square() + self.log_variance.exp()).mean()
        return 0.5 * (square.log() - self.log_variance).sum()


def noisy_mlp(*widths: int) -> nn.Sequential:
    """Noisy layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [NoisyLinear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def kl(network: nn.Sequential) -> Tensor:
    """The nats in all weights."""
    return torch.stack([layer.kl() for layer in network if isinstance(layer, NoisyLinear)]).sum()


def minimise(network: nn.Sequential, x: Tensor, y: Tensor, *, beta: float, steps: int, batch: int, seed: int) -> None:
    """Adam on ``E_Q loss + beta KL``, the loss a mean over samples; the variances move faster than the means."""
    layers = [layer for layer in network if isinstance(layer, NoisyLinear)]
    groups = [{"params": [layer.mean for layer in layers]}, {"params": [layer.log_variance for layer in layers], "lr": 2e-2}]
    optimizer = torch.optim.Adam(groups, lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for rows in batches(len(x), batch, steps, seed):
        optimizer.zero_grad()
        (nn.functional.cross_entropy(network(x[rows]), y[rows]) + beta * kl(network)).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def measure(network: nn.Sequential, x: Tensor, y: Tensor, draws: int = 10) -> list[float]:
    """The nats in the weights, the mean loss and the accuracy under the noise."""
    logits = network(x.repeat(draws, 1))
    y = y.repeat(draws)
    return [kl(network).item(), nn.functional.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()]
