# SPDX-License-Identifier: Apache-2.0
"""The complexity of a task: what is left to pay, in loss and in nats, once the weights are as coarse as they should be."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fisherfast import _checks
from fisherfast.data.batches import Output
from fisherfast.data.readings import check_rereadable
from fisherfast.fisher import Fisher
from fisherfast.information._network import Weights
from fisherfast.information._prior import PriorScale
from fisherfast.information.expected_loss import likelihood_beside, loss_under_noise, mean_loss
from fisherfast.information.posterior import GaussianPosterior, Posterior
from fisherfast.information.result import Information
from fisherfast.information.weights import information_at_betas
from fisherfast.likelihood import Likelihood, beside

METHODS = ("analytic", "monte-carlo")


@dataclass(frozen=True, eq=False)
class Complexity:
    """``C = E_Q loss + beta KL(Q || P)``; made by ``task_complexity`` and ``measured_complexity``.

    ``loss`` is the mean loss at the mean of Q, ``expected_loss`` that under its noise, ``stderr`` the standard error of the latter
    (0 where it is a formula, nan of a single draw); ``how`` says where it is from. ``source`` is what the nats are of.
    """

    loss: float
    expected_loss: float
    stderr: float
    how: str
    source: Information | GaussianPosterior

    @property
    def nats(self) -> float:
        """``KL(Q || P)``, the true divergence in either variant."""
        return self.source.kl

    @property
    def beta(self) -> float:
        """The price of a nat, in units of the mean loss."""
        return self.source.beta

    @property
    def complexity(self) -> float:
        """``expected_loss + beta * nats``, in units of the mean loss."""
        return self.expected_loss + self.beta * self.nats

    def conditions(self) -> str:
        """Everything the numbers depend on, in one line."""
        return f"{self.source.conditions()}; expected loss {self.how}"

    def __str__(self) -> str:
        error = f" (+- {self.stderr:.2g})" if self.stderr else ""
        return (
            f"complexity {self.complexity:.6g} = expected loss {self.expected_loss:.6g}{error} + beta x {self.nats:,.1f} nats; "
            f"loss at the mean {self.loss:.6g}: {self.conditions()}"
        )


@torch.no_grad()
def task_complexity(
    F: Fisher,
    model: Weights,
    *,
    prior_scale: PriorScale,
    beta: float,
    center: Weights | None = None,
    variant: str = "exact",
    loss: float | None = None,
    method: str = "analytic",
    data: Iterable[Any] | None = None,
    likelihood: str | Likelihood | None = None,
    draws: int = 8,
    seed: int = 0,
    output: Output = None,
) -> Complexity:
    """``C_beta = L(w) + beta |w - c|^2 / (2 lambda^2) + beta / 2 log|I + lambda^2 F / beta|``: the least ``E_Q L + beta KL(Q || P)``.

    ``method="analytic"`` takes ``E_Q L = L(w) + 1/2 tr(F Sigma)``, which is exact where the loss is quadratic with the Hessian
    F; ``"monte-carlo"`` measures it on ``data`` by noisy forward passes (``expected_loss``). The KL is the same.
    A trained network's loss is often far from quadratic at the noise that the formula allows: then the two differ, and the
    measured one counts.

    ``loss``        L(w), the mean loss at the trained weights, in nats; measured on ``data`` where not given. It is that of a sample:
                    of a language model the sum over a sequence's tokens, not their mean.
    ``likelihood``  of the measured losses: F's own where not given.

    The other arguments are those of ``information_in_weights`` and ``expected_loss``.

    Shapes:   as there.
    Scale:    the mean loss's units, nats per sample. At beta = 1 / N and for a log-likelihood, N C is what it takes to write
              down labels and weights together.
    Errors:   theirs, and ValueError for an unknown method, a loss that is not finite, neither loss nor data, and
              "monte-carlo" without data or a network to run.
    Numerics: theirs.
    Source:   Definition 2.1 and Proposition 2.5 of Achille, Paolini and Soatto (arXiv:1905.12213).
    """
    source = LossSource("task_complexity", method, data, F.provenance.likelihood, likelihood, draws, seed, output)
    (found,) = source.complexities(F, model, (beta,), loss, prior_scale=prior_scale, center=center, variant=variant)
    return found


@dataclass(frozen=True)
class LossSource:
    """Where the losses of a complexity come from: formulas, or a network run on data."""

    caller: str
    method: str
    data: Iterable[Any] | None
    stored: str | None  # the likelihood that the Fisher says it is of
    given: str | Likelihood | None
    draws: int
    seed: int
    output: Output

    @functools.cached_property
    def likelihood(self) -> Likelihood:
        """Of the measured losses."""
        return beside(self.caller, self.stored, self.given)

    def complexities(
        self,
        F: Fisher,
        model: Weights,
        betas: Sequence[float],
        loss: float | None,
        *,
        prior_scale: PriorScale,
        center: Weights | None,
        variant: str,
    ) -> list[Complexity]:
        """``task_complexity`` at several betas, with the same random numbers."""
        loss = self._loss_of(model, loss)
        infos = information_at_betas(
            self.caller, F, model, betas, prior_scale=prior_scale, center=center, variant=variant, loss=loss
        )
        return [self._complexity(info, loss, model) for info in infos]

    def _loss_of(self, model: Weights, given: float | None) -> float:
        """``L(w)``, given or measured. Errors: ValueError where the arguments do not suffice for the method."""
        _checks.one_of(self.caller, "method", self.method, METHODS)
        if self.method == "monte-carlo":
            self._runnable(model, "method='monte-carlo' must have")
            check_rereadable(self.caller, self.data)
        if given is None:
            data, network = self._runnable(model, "loss must be given (the mean loss at the weights), or measured on")
            return mean_loss(network, data, self.likelihood, output=self.output)
        return _checks.number(self.caller, "loss", given, "it is the mean loss at the weights")

    def _complexity(self, info: Information, loss: float, model: Weights) -> Complexity:
        """At nats that are known."""
        if self.method == "analytic":
            return Complexity(loss, loss + info.loss_rise, 0.0, "by formula", info)
        data, network = self._runnable(model, "method='monte-carlo' must have")
        posterior = Posterior.of(info, model)
        estimate = loss_under_noise(
            self.caller, posterior, network, data, self.likelihood, self.draws, self.seed, None, self.output
        )
        return Complexity(loss, estimate.value, estimate.stderr, _measured(self.likelihood, self.draws, self.seed), info)

    def _runnable(self, model: Weights, rule: str) -> tuple[Iterable[Any], nn.Module]:
        if self.data is None or not isinstance(model, nn.Module):
            got = f"{'no data' if self.data is None else 'data'} and a {type(model).__name__}"
            raise ValueError(f"{self.caller}: {rule} data and a network as model, got {got}; pass data= and the network")
        return self.data, model


@torch.no_grad()
def measured_complexity(
    posterior: GaussianPosterior,
    model: nn.Module,
    data: Iterable[Any],
    likelihood: str | Likelihood | None = None,
    *,
    draws: int = 8,
    seed: int = 0,
    output: Output = None,
) -> Complexity:
    """``C = E_Q loss + beta KL(Q || P)`` of any posterior, its loss measured on ``data``; beta is the posterior's.

    The other arguments are those of ``expected_loss``. ``ff.RateDistortion`` takes several of these.

    Shapes:   as for ``expected_loss``.
    Scale:    the mean loss's units, nats per sample.
    Errors:   those of ``expected_loss``.
    Numerics: the KL is a formula; the standard error is that of the loss.
    Source:   Definition 2.1 of arXiv:1905.12213.
    """
    check_rereadable("measured_complexity", data)
    chosen = likelihood_beside("measured_complexity", posterior, likelihood)
    estimate = loss_under_noise("measured_complexity", posterior, model, data, chosen, draws, seed, None, output)
    loss = mean_loss(model, data, chosen, weights=posterior.mean, output=output)
    source = posterior.information if isinstance(posterior, Posterior) else posterior
    return Complexity(loss, estimate.value, estimate.stderr, _measured(chosen, draws, seed), source)


def _measured(likelihood: Likelihood, draws: int, seed: int) -> str:
    return f"measured by {draws} draws (seed {seed}) and their mirror images, {likelihood.name} likelihood"
