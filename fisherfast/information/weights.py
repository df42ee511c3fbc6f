# SPDX-License-Identifier: Apache-2.0
"""The information in the weights: the nats a trained network's weights hold, by the Fisher and a Gaussian prior.

The prior is ``P = N(c, lambda^2 I)``, the noise that the weights tolerate ``Q = N(w, Sigma)``, and Sigma minimises
``E_Q loss + beta KL(Q || P)`` to second order. In the eigenbasis of the Fisher everything is a sum over directions, so a
singular Fisher costs nothing where it is flat. The formulas as printed are the same ones at ``t = beta / 2`` instead of
``t = beta``, with a constant k/2 too much subtracted: that is all ``variant="paper"`` changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fisherfast import _checks
from fisherfast._names import listed
from fisherfast._warning import warn
from fisherfast.fisher import Fisher, LayerSummary, Spectrum
from fisherfast.information import _arguments, _prior, _series
from fisherfast.information._network import VARIANTS, Weights, tensors
from fisherfast.information._prior import PriorScale
from fisherfast.information.result import Information, LayerInformation


@torch.no_grad()
def information_in_weights(
    F: Fisher,
    model: Weights,
    *,
    prior_scale: PriorScale,
    beta: float,
    center: Weights | None = None,
    variant: str = "exact",
    loss: float | None = None,
) -> Information:
    """``KL(Q || P) = ||w - c||^2 / (2 lambda^2) + 1/2 sum_j g(s_j)``, s_j = lambda^2 f_j / beta, g(s) = log(1+s) - s/(1+s).

    How many nats it takes to write the trained weights down, given the prior, as coarsely as the loss allows when one nat
    is worth ``beta`` of mean loss. f_j are the eigenvalues of the Fisher.

    ``model``        the weights w: the network F was measured on, or {parameter name: tensor}.
    ``prior_scale``  lambda, the prior's standard deviation: a number; {layer or parameter name: number}; or ``"fit"``, for
                     each layer the value with the smallest Lagrangian, ``lambda^2 = (||w - c||^2 + tr Sigma) / k``
                     (of ``"paper"`` the Lagrangian as printed).
    ``beta``         1 / N is the Bayesian choice for N training samples; larger values keep coarser weights.
    ``center``       c: the initial or pre-trained weights, a network or {name: tensor}; 0 if not given.
    ``variant``      ``"exact"``, or ``"paper"`` for the formulas as printed: then ``.nats`` is the printed eq. 8 and ``.kl``
                     the true divergence at the printed Sigma, k/2 nats above it.
    ``loss``         the mean loss at w, if the whole Lagrangian is wanted in ``.complexity``.

    Shapes:   every tensor of ``model`` and ``center`` has the shape of the same name in F.
    Scale:    F is a mean over samples, so beta goes with a mean loss; for a summed loss, divide beta by N.
    Errors:   ValueError for a beta or prior_scale not above zero, an infinite prior_scale (compare 0.5 * F.logdet instead),
              an unknown variant, names or shapes that differ between F, model and center, tensors that are not floating, a
              Fisher that is negative or not finite. FisherWarning where F lacks parameters; ``.excluded`` lists them.
    Numerics: float64, one layer at a time, in chunks and without copies of F; relative error below 1e-12. A fitted scale
              is right to 1e-11.
    Source:   Proposition 2.5 and eq. 8 of Achille, Paolini and Soatto (arXiv:1905.12213).
    """
    (info,) = information_at_betas(
        "information_in_weights", F, model, (beta,), prior_scale=prior_scale, center=center, variant=variant, loss=loss
    )
    return info


def information_at_betas(
    caller: str,
    F: Fisher,
    model: Weights,
    betas: Sequence[float],
    *,
    prior_scale: PriorScale,
    center: Weights | None = None,
    variant: str = "exact",
    loss: float | None = None,
) -> list[Information]:
    """``information_in_weights`` at several betas: every spectrum is asked for once, and one layer's is in memory at a time."""
    _arguments.check_fisher(caller, F)
    betas = [_arguments.beta(caller, beta) for beta in betas]
    _checks.one_of(caller, "variant", variant, VARIANTS)
    prior_scale = _prior.checked(caller, prior_scale)
    loss = None if loss is None else _checks.number(caller, "loss", loss, "it is the mean loss at the weights")
    summaries = F.by_layer()
    given_scales = (
        {}
        if isinstance(prior_scale, str)
        else _prior.given(caller, prior_scale, {name: layer.parameters for name, layer in summaries.items()})
    )
    weights, centers = tensors(caller, model), None if center is None else tensors(caller, center)
    excluded, frozen = _check_names(caller, F, model, weights)
    _check_center(caller, F, centers)
    for beta in betas:
        _prior.square_over(caller, max(given_scales.values(), default=0.0), beta, "beta")
    at_betas = [_AtBeta(caller, beta, variant, dict(given_scales)) for beta in betas]
    for layer, blocks in _blocks_by_layer(caller, F, summaries, weights, centers):
        for at_beta in at_betas:
            at_beta.measure(layer, summaries[layer], blocks, fit=isinstance(prior_scale, str))
    norm = math.sqrt(math.fsum(_series.squared_distance(centers[name], None) for name in F.names)) if centers else 0.0
    return [
        Information(
            layers=_with_shares(at_beta.layers, summaries),
            beta=at_beta.beta,
            prior_scale=prior_scale,
            prior_scales=at_beta.scales,
            centered=center is not None,
            center_norm=norm,
            variant=variant,
            loss=loss,
            excluded=excluded,
            fisher=F,
            frozen=frozen,
        )
        for at_beta in at_betas
    ]


@dataclass
class _AtBeta:
    """The layers measured so far at one beta, and the prior scale of each parameter."""

    caller: str
    beta: float
    variant: str
    scales: dict[str, float]
    layers: dict[str, LayerInformation] = field(default_factory=dict)

    def measure(self, layer: str, summary: LayerSummary, blocks: Sequence[_Block], fit: bool) -> None:
        """Add one layer, with a prior scale that is fitted first if ``fit`` says so."""
        temperature = self.beta if self.variant == "exact" else self.beta / 2
        if fit:
            self.scales |= dict.fromkeys(summary.parameters, _fitted(self.caller, blocks, temperature))
        self.layers[layer] = _measured(self.caller, summary, blocks, self.scales, temperature, self.variant)
        if not math.isfinite(self.layers[layer].kl):
            largest = max(self.scales[name] for name in summary.parameters)
            raise ValueError(
                f"{self.caller}: prior_scale^2 f / beta must be finite for every eigenvalue f, got others in {[*summary.parameters]} with beta = {self.beta} "
                f"and prior_scale = {largest}"
            )


def _with_shares(layers: Mapping[str, LayerInformation], order: Iterable[str]) -> dict[str, LayerInformation]:
    kl = math.fsum(layer.kl for layer in layers.values())
    return {name: replace(layers[name], share=layers[name].kl / kl if kl else 0.0) for name in order}


@dataclass(frozen=True)
class _Block:
    """A block of the Fisher, and how far its weights are from the prior's center; a packed parameter's are with its first block."""

    spectrum: Spectrum
    squared_distance: float


def _check_names(
    caller: str, F: Fisher, model: Weights, weights: Mapping[str, Tensor]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The parameters F says it lacks, warned of, and the frozen ones; raise ValueError unless F and the model have the same others, as large."""
    excluded = tuple(F.coverage.missing)
    _checks.named(caller, "model", weights, F.names, "F")
    _check_floating(caller, "model", F, weights)
    _checks.shaped(caller, "model", weights, F.shapes, "F")
    covered = {*F.names, *F.aliases, *excluded}
    # A frozen parameter asks for no Fisher; in a mapping there is no such mark, and everything counts.
    wanted = [name for name, tensor in weights.items() if tensor.requires_grad or not isinstance(model, nn.Module)]
    if unknown := [name for name in wanted if name not in covered]:
        raise ValueError(f"{caller}: F must cover every parameter of model, lacks {listed(unknown)}; leave them out")
    if excluded:
        message = f"{caller}: the nats exclude parameters that the Fisher lacks: {listed(excluded)}"
        warn(message)
    return excluded, tuple(name for name in weights if name not in covered)


def _check_floating(caller: str, role: str, F: Fisher, tensors: Mapping[str, Tensor]) -> None:
    for name in F.names:
        if not (dtype := tensors[name].dtype).is_floating_point:
            raise ValueError(f"{caller}: {role}[{name!r}] must be floating, got {dtype}; convert it with .float()")


def _check_center(caller: str, F: Fisher, centers: Mapping[str, Tensor] | None) -> None:
    """Raise ValueError unless the center, if there is one, has every parameter of F in the model's shape."""
    if centers is None:
        return
    _checks.named(caller, "center", centers, F.names, "F")
    _check_floating(caller, "center", F, centers)
    _checks.shaped(caller, "center", centers, F.shapes, "model")


def _blocks_by_layer(
    caller: str,
    F: Fisher,
    summaries: Mapping[str, LayerSummary],
    weights: Mapping[str, Tensor],
    centers: Mapping[str, Tensor] | None,
) -> Iterator[tuple[str, list[_Block]]]:
    """Each layer with its blocks, as soon as F has given the last of them: one layer's spectrum is in memory at a time."""
    waiting = {layer: set(summary.parameters) for layer, summary in summaries.items()}
    numbers = {layer: summary.num_parameters for layer, summary in summaries.items()}
    blocks: dict[str, list[_Block]] = {layer: [] for layer in summaries}
    for spectrum in F.spectra():
        layer = spectrum.layer
        new = waiting[layer] & set(spectrum.parameters)  # a packed parameter is in several, and has one distance
        origins = [None if centers is None else centers[name] for name in new]
        distance = math.fsum(map(_series.squared_distance, (weights[name] for name in new), origins))
        if not math.isfinite(distance):
            raise ValueError(f"{caller}: weights must be finite, got NaN or infinity in {list(spectrum.parameters)}")
        blocks[layer].append(_Block(spectrum, distance))
        waiting[layer] -= new
        numbers[layer] -= spectrum.num_parameters
        if not (waiting[layer] or numbers[layer]):
            yield layer, blocks.pop(layer)


def _fitted(caller: str, blocks: Sequence[_Block], temperature: float) -> float:
    distance = math.fsum(block.squared_distance for block in blocks)
    return _prior.fitted(caller, [block.spectrum for block in blocks], distance, temperature)


def _measured(
    caller: str, summary: LayerSummary, blocks: Sequence[_Block], scales: Mapping[str, float], temperature: float, variant: str
) -> LayerInformation:
    """Everything but the layer's share of the whole network."""
    kl, dimension = 0.0, 0.0
    for block in blocks:
        scale = _prior.of_block(caller, block.spectrum, scales)
        # At a fitted limit (scale 0 or inf) the block is at its center or its Fisher is zero, and the terms below vanish.
        if block.squared_distance:
            kl += block.squared_distance / (2 * scale**2)
        if 0 < scale < math.inf:
            costs, shares = _series.costs_and_shares(block.spectrum, scale**2 / temperature)
            kl += costs / 2
            dimension += shares
    distinct = {scales[name] for name in summary.parameters}
    return LayerInformation(
        num_parameters=summary.num_parameters,
        trace=summary.trace,
        nats=kl if variant == "exact" else kl - summary.num_parameters / 2,
        kl=kl,
        share=0.0,
        effective_dimension=dimension,
        squared_distance=math.fsum(block.squared_distance for block in blocks),
        prior_scale=distinct.pop() if len(distinct) == 1 else None,
    )
