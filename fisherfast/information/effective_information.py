# SPDX-License-Identifier: Apache-2.0
"""The effective information in an activation: how many nats about the input survive the noise that the weights tolerate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fisherfast import _checks
from fisherfast._warning import warn
from fisherfast.data.batches import Output
from fisherfast.fisher import Fisher
from fisherfast.fisher.lanczos import Estimate
from fisherfast.information import _conditions, nuisances
from fisherfast.information._activation import Activation
from fisherfast.information._channel import Channel, Whitening
from fisherfast.information._prior import PriorScale
from fisherfast.information.activation_noise import ActivationNoise, noise_of
from fisherfast.information.input_fisher import InputFisher, input_fisher

METHODS = ("spectrum", "nuisance", "monte-carlo")
PRIORS: Mapping[str, Callable[[float], float]] = {
    "uniform": math.log,  # of a width
    "gaussian": lambda deviation: math.log(2 * math.pi * math.e * deviation**2) / 2,
}


@dataclass(frozen=True, eq=False)
class EffectiveInformation:
    """``I(x; z_n)`` in nats, with what it depends on; made by ``effective_information``, which says what the numbers mean.

    ``each`` ``[N]`` are the nats of every input, whose mean is ``nats``. ``entropy`` is the H(x) or H(theta) in them; without one
    they are ``I - H``, of which only differences between networks on the same inputs mean something. ``bound`` is what nats
    cannot exceed (``log N`` for "monte-carlo"). ``source`` is the ``ActivationNoise`` or the ``InputFisher`` that they come from.
    """

    nats: float
    stderr: float
    method: str
    entropy: float | None
    bound: float | None
    each: Tensor = field(repr=False)
    source: ActivationNoise | InputFisher = field(repr=False)

    @property
    def bits(self) -> float:
        """``nats / log 2``."""
        return self.nats / math.log(2)

    @property
    def trace(self) -> float | None:
        """The mean trace of ``F_{z|x}`` or ``F_{z|theta}``; None for "monte-carlo", which has none."""
        return self.source.mean_trace if isinstance(self.source, InputFisher) else None

    @property
    def log_pseudo_determinant(self) -> float | None:
        """The mean over inputs of ``F_{z|x}``'s log pseudo-determinant; None for "monte-carlo"."""
        return float(self.source.logdet().mean()) if isinstance(self.source, InputFisher) else None

    def conditions(self) -> str:
        """Everything the nats depend on, in one line."""
        entropy = "" if self.entropy is None else f", entropy {self.entropy:.4g} nats"
        rank = f", rank {_ranks(self.source)}" if isinstance(self.source, InputFisher) else ""
        return f"method {self.method}, {len(self.each):,} inputs{entropy}{rank}, {self.source.conditions()}"

    def __str__(self) -> str:
        relative = " less the entropy of the input" if self.entropy is None and self.bound is None else ""
        return f"{self.nats:.4g} +- {self.stderr:.2g} nats{relative}: {self.conditions()}"


def effective_information(
    model: nn.Module,
    x: Tensor,
    F: Fisher,
    *,
    method: str,
    layer: str | None = None,
    beta: float,
    prior_scale: PriorScale | None = None,
    damping: float | None = None,
    variant: str = "exact",
    terms: str = "mean",
    units: Sequence[int] | Tensor | None = None,
    entropy: float | None = None,
    along: Mapping[str, nuisances.Nuisance] | None = None,
    nuisance_prior: str = "uniform",
    nuisance_scales: Mapping[str, float] | None = None,
    draws: int = 16,
    seed: int = 0,
    output: Output = None,
) -> EffectiveInformation:
    """``I_eff(x; z) = I(x; z_n)``, ``z_n = f_{w + n}(x)``, n the weight noise of ``activation_noise``; by one of three methods.

    ``"spectrum"``     ``H(x) - E_x 1/2 log((2 pi e)^r / |F_{z|x}|)`` over the r top eigenvalues that are not zero. With dim z >= dim x
                       (r = dim x) and ``entropy`` H(x) it is eq. 10; with dim z < dim x, where the determinant is 0, a measure
                       for comparisons at equal rank r: see ``.trace`` and ``.log_pseudo_determinant``, and give no entropy. A direction z
                       loses completely contributes 0 nats, one it barely resolves contributes negative nats, so dead units can look
                       informative.
    ``"nuisance"``     eq. 10 on nuisances theta, ``H(theta) - E_x 1/2 log((2 pi e)^q / |F_{z|theta}|)``: ``along`` them (as in
                       ``input_fisher``), each by itself ``nuisance_prior`` "uniform" over a width or "gaussian" with a standard
                       deviation, ``nuisance_scales={name: number}``.
    ``"monte-carlo"``  ``E_x KL(N(f(x), S(x)) || mixture of these over the data set)``, by ``draws`` draws for each input (from
                       ``seed``): the information about which input it was, at most log N.

    ``layer``, ``prior_scale``, ``damping``, ``units``, ``output``: as in ``activation_noise``; ``variant``, ``terms``: as in
    ``input_fisher``. Eq. 10 holds where z tells x well; where it does not, it may be negative, and means little.

    Shapes:   x ``[N, ...]``; z has as few units as ``units`` say, better few: cost grows as dim z^2 N^2 ("monte-carlo").
    Scale:    nats. ``.stderr``: of the mean over inputs; for "monte-carlo" of the draws alone, the inputs being the data set.
    Errors:   ValueError for arguments that do not fit or belong to another method, for more nuisances than z can tell apart,
              for a noise of z without full rank ("monte-carlo": a dead unit; name the layer before its activation), and as in
              ``input_fisher``.
    Numerics: float64; mixtures by log-sum-exp.
    Source:   Definition 3.1 and eq. 10 of Achille, Paolini and Soatto (arXiv:1905.12213).
    """
    _check_arguments(method, variant, terms, entropy, along, nuisance_scales, draws)
    if method == "monte-carlo":
        z = Activation("effective_information", model, F, layer, units, output)
        channel = Channel.of("effective_information", model, F, layer=layer, beta=beta, prior_scale=prior_scale, damping=damping)
        return _by_draws(noise_of(z, channel, z.check_inputs(x)), z.dtype, draws, seed)
    if along is not None:
        entropy = _entropy(nuisance_prior, along, nuisance_scales)
    about_input = input_fisher(
        model,
        x,
        F,
        layer=layer,
        beta=beta,
        prior_scale=prior_scale,
        damping=damping,
        variant=variant,
        terms=terms,
        units=units,
        along=along,
        output=output,
    )
    return _by_determinant(method, about_input, entropy)


def _check_arguments(
    method: str,
    variant: str,
    terms: str,
    entropy: float | None,
    along: Mapping[str, nuisances.Nuisance] | None,
    scales: Mapping[str, float] | None,
    draws: int,
) -> None:
    """Raise ValueError for an unknown method, and for arguments of another one."""
    caller = "effective_information"
    _checks.one_of(caller, "method", method, METHODS)
    if (method == "nuisance") != (along is not None) or (along is None) != (scales is None):
        raise ValueError(
            f"{caller}: along and nuisance_scales must be given for 'nuisance' and for no other method, got {method!r}"
        )
    if entropy is not None and (method != "spectrum" or not math.isfinite(entropy)):
        raise ValueError(
            f"{caller}: entropy must be a finite number of nats, for 'spectrum' only, got {entropy!r} for {method!r}"
        )
    if method == "monte-carlo":
        if (variant, terms) != ("exact", "mean"):
            raise ValueError(f"{caller}: variant and terms must be left out for 'monte-carlo', got {variant!r} and {terms!r}")
        _checks.integer(caller, "draws", draws, 2, "a standard error is of two")


def _entropy(prior: str, along: Mapping[str, nuisances.Nuisance], scales: Mapping[str, float] | None) -> float:
    """H(theta) of independent nuisances."""
    _checks.one_of("effective_information", "nuisance_prior", prior, tuple(PRIORS))
    if not scales or set(scales) != set(along):
        raise ValueError(f"effective_information: nuisance_scales must have a number for each of {list(along)}, got {scales}")
    caller, advice = "effective_information", "it is the width or the standard deviation of the nuisance"
    checked = (_checks.positive(caller, f"nuisance_scales[{name!r}]", scale, advice) for name, scale in scales.items())
    return math.fsum(map(PRIORS[prior], checked))


def _by_determinant(method: str, source: InputFisher, entropy: float | None) -> EffectiveInformation:
    rank = source.rank()
    if entropy is not None and int(rank.min()) < source.dim:
        raise ValueError(
            f"effective_information: z must tell all {source.dim} numbers of the input apart for eq. 10, got a Fisher of rank "
            f"{int(rank.min())} from {source.num_units} units; "
            + ("leave entropy out" if method == "spectrum" else "give fewer or other nuisances, or a layer with more units")
        )
    if entropy is None and int(rank.min()) < source.max_rank:
        warn(
            f"effective_information: F_{{z|x}} should have rank {source.max_rank} at every input, got {_ranks(source)}: a "
            "lost direction counts 0 nats, a barely resolved one negative nats; compare by .trace, or at equal rank"
        )
    each = (entropy or 0.0) + (source.logdet() - rank.double() * math.log(2 * math.pi * math.e)) / 2
    return EffectiveInformation(*Estimate.of(each), method, entropy, None, each, source)


def _ranks(source: InputFisher) -> str:
    return _conditions.span(source.rank().tolist(), "d")


def _by_draws(noise: ActivationNoise, dtype: torch.dtype, draws: int, seed: int) -> EffectiveInformation:
    """The mean over inputs and draws of ``log N(z; f(x), S(x)) - log mixture(z)``."""
    N, D = noise.mean.shape
    whites = [Whitening.of(S, dtype) for S in noise.covariance]
    if lacking := [n for n, white in enumerate(whites) if white.rank < D]:
        raise ValueError(
            f"effective_information: every unit of z must be noisy for 'monte-carlo', got {D} units and noise of rank "
            f"{whites[lacking[0]].rank} for input {lacking[0]}; choose fewer units with units=, or name the layer before its activation"
        )
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(N, draws, D, dtype=torch.float64, device="cpu", generator=generator).to(noise.mean.device)
    # W S W^T = 1, so z = f + W^-1 e has covariance S.
    matrices = torch.stack([white.matrix for white in whites])
    z = noise.mean[:, None] + torch.linalg.solve(matrices, normal.mT).mT
    densities = torch.stack(
        [
            -((z - mean) @ white.matrix.mT).square().sum(2) / 2 - white.logdet / 2
            for mean, white in zip(noise.mean, whites, strict=True)
        ]
    )  # [component, input, draw], but for a constant
    own = densities.diagonal(dim1=0, dim2=1).mT
    samples = own - densities.logsumexp(0) + math.log(N)
    stderr = float(samples.var(1).mean() / draws / N) ** 0.5
    each = samples.mean(1)
    return EffectiveInformation(float(each.mean()), stderr, "monte-carlo", None, math.log(N), each, noise)
