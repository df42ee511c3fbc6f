# SPDX-License-Identifier: Apache-2.0
"""The loss under weight noise, measured: the model run on draws of its weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherfast import _checks
from fisherfast.data.batches import IGNORED, Output
from fisherfast.data.readings import check_rereadable
from fisherfast.fisher.lanczos import Estimate
from fisherfast.information._losses import Loss, SampleLosses
from fisherfast.information._network import tensors
from fisherfast.information.posterior import GaussianPosterior
from fisherfast.likelihood import Likelihood, beside


class LogLoss(Estimate):
    """Of ``-log p``, which has no upper limit."""


@torch.no_grad()
def expected_loss(
    posterior: GaussianPosterior,
    model: nn.Module,
    data: Iterable[Any],
    likelihood: str | Likelihood | None = None,
    *,
    draws: int = 8,
    seed: int = 0,
    loss: Loss | None = None,
    output: Output = None,
) -> Estimate:
    """``E_{w ~ Q} (1/N) sum_n loss(w, n)``: the mean over ``draws`` draws of the noise, and its standard error.

    Draws are antithetic (``w + e`` and ``w - e``), which cancels the first-order term that dominates for small noise.

    ``posterior``  Q: an ``optimal_posterior`` or a ``variational_posterior``. Parameters it does not name keep their values.
    ``data``       as for ``ff.fisher``, with labels; it is read twice for every draw.
    ``likelihood`` the loss is ``-log p`` of the data's labels, in nats, every constant included. Class weights and label
                   smoothing count. Where not given it is the posterior's own, that of its Fisher or of its training.
    ``loss``       another loss: ``loss(output, targets)`` gives one number per sample, ``[N]``; ``ff.zero_one`` is the error. What the
                   likelihood ignores has the target -100. For ``"causal_lm"`` targets are shifted: position t has token t + 1,
                   and the last one -100. Other likelihoods do not change what ``loss`` is given; packed samples it is given one
                   by one, ``[1, L, ...]``.
    ``output``     which part of the model's result is the output, as for ``ff.fisher``.

    The model runs with other tensors in its parameters' places: its own weights are never written to.

    Shapes:   as for ``ff.fisher``.
    Scale:    a mean over samples, by their weights; nats per sample for a likelihood.
    Errors:   ValueError for data without samples or labels, also if all are ignored, an iterator and several draws, names or shapes that are not the
              model's, no likelihood beside a posterior whose own is not known by name, train mode with dropout or batch statistics; NonFiniteError for a loss that is not finite.
    Numerics: the forward pass in the model's precision (noise below the rounding of a bfloat16 weight is lost), losses in
              float32 or wider, means in float64. The standard error is over draws (nan of a single one), not over samples.
    Source:   the first term of Definition 2.1 of arXiv:1905.12213.
    """
    chosen = likelihood_beside("expected_loss", posterior, likelihood)
    return loss_under_noise("expected_loss", posterior, model, data, chosen, draws, seed, loss, output)


def likelihood_beside(caller: str, posterior: GaussianPosterior, given: str | Likelihood | None) -> Likelihood:
    """The likelihood of losses under Q: the argument if given, else Q's own. Errors: TypeError for what is no Q, and those of ``beside``."""
    if not isinstance(posterior, GaussianPosterior):
        raise TypeError(
            f"{caller}: posterior must be an optimal_posterior or a variational_posterior, got {type(posterior).__name__}; it comes first"
        )
    return beside(caller, posterior.likelihood, given)


def loss_under_noise(
    caller: str,
    posterior: GaussianPosterior,
    model: nn.Module,
    data: Iterable[Any],
    likelihood: Likelihood,
    draws: int,
    seed: int,
    loss: Loss | None,
    output: Output,
) -> Estimate:
    """``expected_loss`` of a likelihood that is known."""
    draws = _checks.integer(caller, "draws", draws, 1)
    check_rereadable(caller, data)
    _check_model(caller, model, posterior.mean)
    losses = SampleLosses.of(caller, model, likelihood, loss, output)
    each = []
    for n, weights in enumerate(posterior.draws(draws, seed=seed)):
        there = losses.mean(data, weights, f"of draw {n}")
        for name, mean in posterior.mean.items():
            weights[name].neg_().add_(mean, alpha=2)
        each.append((there + losses.mean(data, weights, f"of draw {n}, mirrored")) / 2)
    return (LogLoss if loss is None else Estimate).of(torch.tensor(each, dtype=torch.float64, device="cpu"))


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: str | Likelihood = "categorical",
    *,
    weights: Mapping[str, Tensor] | None = None,
    loss: Loss | None = None,
    output: Output = None,
) -> float:
    """``(1/N) sum_n loss(w, n)`` at the model's own weights, or with those in ``weights`` instead.

    ``loss``: a function of output and targets that gives ``[N]``, instead of the likelihood's ``-log p``; see ``expected_loss``.

    Shapes:   data yields batches with labels, as for ``ff.fisher``; ``weights`` {name: tensor shaped like the parameter}.
    Scale:    a mean over samples, weighted if the batches are; nats for a likelihood. A sequence is one sample: its loss is the sum
              over its counted positions, not their mean.
    Errors:   as ``expected_loss``.
    Numerics: the forward pass in the model's precision, losses in float32 or wider, the mean in float64.
    Source:   the first term of Definition 2.1 of arXiv:1905.12213, without noise.
    """
    replaced = weights or {}
    _check_model("mean_loss", model, replaced)
    return SampleLosses.of("mean_loss", model, likelihood, loss, output).mean(
        data, replaced, "without noise", "look at the data and the weights, or bound the loss (loss=)"
    )


def _check_model(caller: str, model: nn.Module, mean: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the model has every parameter of ``mean``, in its shape."""
    own = tensors(caller, model)
    _checks.named(caller, "model", own, mean, "posterior")
    _checks.shaped(caller, "model", own, {name: value.shape for name, value in mean.items()}, "posterior")
    for name, value in mean.items():
        _checks.real(caller, f"weights[{name!r}]", value)


def zero_one(output: Tensor, targets: Tensor) -> Tensor:
    """``[N]``: 1 where the largest logit is not the label's, 0 where it is; with several labels per sample, the share that is wrong.

    Shapes:   output ``[N, C]`` or ``[N, L, C]``, targets ``[N]`` or ``[N, L]`` integers; -100 is not counted.
    Scale:    between 0 and 1; 0 for a sample without a counted label, NaN for one with logits that are NaN.
    Errors:   ValueError for shapes that do not fit.
    Numerics: exact: a count over a count, in torch's default dtype; of equal logits the first is the largest.
    Source:   the 0-1 loss, which PAC-Bayes bounds are usually stated for.
    """
    if output.dim() < 2 or targets.shape != output.shape[:-1]:
        raise ValueError(
            f"zero_one: targets must be {tuple(output.shape[:-1])}, the output without its class axis, got {tuple(targets.shape)}"
        )
    counted = (targets != IGNORED).flatten(1) if targets.dim() > 1 else (targets != IGNORED).unsqueeze(1)
    wrong = (output.argmax(-1) != targets).reshape(counted.shape) & counted
    unknown = output.isnan().any(-1).reshape(counted.shape) & counted  # argmax takes NaN for the largest
    return (wrong.sum(1) / counted.sum(1).clamp_min(1)).masked_fill(unknown.any(1), math.nan)
