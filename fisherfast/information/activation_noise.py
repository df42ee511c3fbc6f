# SPDX-License-Identifier: Apache-2.0
"""What the noise in the weights does to an activation: ``z_n | x ~ N(f_w(x), S(x))``, to first order in the noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fisherfast.data.batches import Output
from fisherfast.fisher import Fisher
from fisherfast.information._activation import Activation
from fisherfast.information._channel import Channel
from fisherfast.information._prior import PriorScale


@dataclass(frozen=True, eq=False)
class ActivationNoise:
    """``mean`` ``[N, D]`` and ``covariance`` ``[N, D, D]`` of a noisy activation, float64, and the channel they belong to."""

    mean: Tensor = field(repr=False)
    covariance: Tensor = field(repr=False)
    channel: Channel

    def conditions(self) -> str:
        """Everything the numbers depend on, in one line."""
        return f"{self.mean.shape[1]} units of the {self.channel.conditions()}"

    def __str__(self) -> str:
        variance = float(self.covariance.diagonal(dim1=1, dim2=2).mean())
        return f"mean noise variance {variance:.4g} of a unit, over {len(self.mean):,} inputs: {self.conditions()}"


def activation_noise(
    model: nn.Module,
    x: Tensor,
    F: Fisher,
    *,
    layer: str | None = None,
    beta: float,
    prior_scale: PriorScale | None = None,
    damping: float | None = None,
    units: Sequence[int] | Tensor | None = None,
    output: Output = None,
) -> ActivationNoise:
    """``S(x) = J Sigma J^T``, ``Sigma = beta (F + beta / lambda^2)^-1``, ``J = dz/dw``: the covariance of z when w is noisy.

    Sigma is the weight noise that ``information_in_weights`` finds best, so what S says about z is what the loss is
    insensitive to. Weights that F lacks have no noise. A diagonal Fisher gives ``S_ab = beta sum_k J_ak J_bk / f_k``; a KFAC block ``B (x) A`` of a linear layer gives
    its output ``S = beta (x^T A^-1 x) B^-1``.

    ``layer``        the output of this submodule; None is the model's own output.
    ``prior_scale``  lambda, as in ``information_in_weights``. None is the limit of an uninformative prior: ``beta F^-1``, for a
                     regular F of any structure but "gram", or ``beta (F + damping)^-1`` with ``damping=``.
    ``units``        indices into the flat activation; all if not given.
    ``output``       which part of what the model returns, as for ``ff.fisher``.

    Shapes:   x ``[N, ...]``; mean ``[N, D]``, covariance ``[N, D, D]``, D units.
    Scale:    squared units of z. F is a mean over samples, and beta goes with a mean loss.
    Errors:   ValueError for x, layer, units or beta that do not fit, an F that is singular, or a Gram, without prior and damping, and where units
              times weights exceed 2^28. FisherWarning as from ``information_in_weights``.
    Numerics: Jacobians in the model's precision, one sample at a time; D solves with F for each, in float64.
    Source:   Definition 3.1 and the proof of Proposition 3.2 of Achille, Paolini and Soatto (arXiv:1905.12213).
    """
    z = Activation("activation_noise", model, F, layer, units, output)
    channel = Channel.of("activation_noise", model, F, layer=layer, beta=beta, prior_scale=prior_scale, damping=damping)
    return noise_of(z, channel, z.check_inputs(x))


def noise_of(z: Activation, channel: Channel, x: Tensor) -> ActivationNoise:
    """``activation_noise`` of an activation and a channel that are there already."""
    means, covariances = [], []
    for sample in x:
        local = z.jacobians(sample)
        means.append(local.z)
        covariances.append(covariance(local.by_weights, channel.noise(local.by_weights)))
    return ActivationNoise(torch.stack(means), torch.stack(covariances), channel)


def covariance(by_weights: Tensor, noise: Tensor) -> Tensor:
    """``J (Sigma J^T)``, symmetric to the last bit."""
    S = by_weights @ noise.mT
    return (S + S.mT) / 2
