# SPDX-License-Identifier: Apache-2.0
"""The Fisher information that an activation of a network with noisy weights holds about its input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fisherfast import _checks
from fisherfast._precision import wide_dtype
from fisherfast.data.batches import Output
from fisherfast.fisher import Fisher
from fisherfast.information import nuisances
from fisherfast.information._activation import Activation, Jacobians
from fisherfast.information._channel import Channel, Whitening
from fisherfast.information._network import VARIANTS
from fisherfast.information._prior import PriorScale
from fisherfast.information.activation_noise import covariance

TERMS = ("mean", "both")
MAX_MATRIX = 1024
_NOISE = 16  # eps^2, of the largest eigenvalue: what is zero came out as 0.6 at most


@dataclass(frozen=True, eq=False)
class InputFisher:
    """``F_{z|x}`` of every input, as ``R^T R``; made by ``input_fisher``, which says what the numbers mean.

    ``factor`` is R ``[N, rows, dim]`` float64, dim that of x, or the number of nuisances if ``along`` names some; ``sizes`` ``[N, dim]``
    what its columns are before anything in them cancels; ``precision`` the model's, which its entries are good to.
    """

    factor: Tensor = field(repr=False)
    sizes: Tensor = field(repr=False)
    num_units: int
    variant: str
    terms: str
    along: tuple[str, ...] | None
    precision: torch.dtype
    channel: Channel

    @property
    def dim(self) -> int:
        """How many numbers the information is about: dim x, or the nuisances."""
        return self.factor.shape[2]

    def trace(self) -> Tensor:
        """``tr F_{z|x}`` of each input, ``[N]``."""
        return self.factor.square().sum((1, 2))

    @property
    def mean_trace(self) -> float:
        """The mean of ``trace()`` over the inputs."""
        return float(self.trace().mean())

    @property
    def max_rank(self) -> int:
        """How many eigenvalues may differ from zero: those of the mean of dim z numbers, with "both" of their covariance, too."""
        D = self.num_units
        return min(D if self.terms == "mean" else D * (D + 3) // 2, self.dim)

    def eigenvalues(self) -> Tensor:
        """The top ``min(dim z, dim)`` of each input, largest first, ``[N, min(dim z, dim)]``: the mean term has no others. ``max_rank`` with "both".

        Numerics: squared singular values of R, so dim x squared numbers are never formed.
        """
        return self._values(self.factor)

    def rank(self) -> Tensor:
        """How many of ``eigenvalues()`` are not zero but for rounding, ``[N]``, whatever the units of what they are about."""
        return self._positive(self._values(self._scaled())).sum(1)

    def logdet(self) -> Tensor:
        """The log pseudo-determinant of each input, ``[N]``: the sum of the logarithms of ``eigenvalues()`` that are not zero."""
        scaled = self._values(self._scaled())
        rank, values = self._positive(scaled).sum(1), self.eigenvalues()
        kept = torch.arange(values.shape[1], device=values.device) < rank[:, None]
        of_kept = torch.where(kept, values, 1.0).log().sum(1)
        # A determinant has the units as factors, so that none of its eigenvalues is lost beside another.
        whole = scaled.log().sum(1) + 2 * self.sizes.log().sum(1)
        return torch.where(rank == self.dim, whole, of_kept)

    def _values(self, factor: Tensor) -> Tensor:
        return torch.linalg.svdvals(factor).square()[:, : self.max_rank]

    def _scaled(self) -> Tensor:
        return self.factor / torch.where(self.sizes > 0, self.sizes, 1.0)[:, None]

    def _positive(self, values: Tensor) -> Tensor:
        # Products in 16 bits are summed in float32: what grows with their number is of that.
        of_sums = max(self.factor.shape[1:]) * torch.finfo(wide_dtype(self.precision)).eps
        rounding = max(_NOISE * torch.finfo(self.precision).eps ** 2, of_sums**2)
        return values > rounding * values[:, :1]

    def matrix(self) -> Tensor:
        """``F_{z|x}`` itself, ``[N, dim, dim]``. Errors: ValueError where dim is above 1024: use the other methods."""
        if self.dim > MAX_MATRIX:
            raise ValueError(
                f"InputFisher.matrix: dim must be <= {MAX_MATRIX}, got {self.dim}; trace(), eigenvalues() and logdet() do not form it"
            )
        return self.factor.mT @ self.factor

    def conditions(self) -> str:
        """Everything the numbers depend on, in one line."""
        about = "x" if self.along is None else ", ".join(self.along)
        return f"{self.num_units} units about {about}, {self.variant} formulas, terms {self.terms}, {self.channel.conditions()}"

    def __str__(self) -> str:
        return f"mean trace {self.mean_trace:.4g} over {len(self.factor):,} inputs: {self.conditions()}"


def input_fisher(
    model: nn.Module,
    x: Tensor,
    F: Fisher,
    *,
    layer: str | None = None,
    beta: float,
    prior_scale: PriorScale | None = None,
    damping: float | None = None,
    variant: str = "exact",
    terms: str = "mean",
    units: Sequence[int] | Tensor | None = None,
    along: Mapping[str, nuisances.Nuisance] | None = None,
    output: Output = None,
) -> InputFisher:
    """``F_{z|x} = G^T S^-1 G + 1/2 tr(S^-1 d_a S S^-1 d_b S)``, ``G = dz/dx``, S as in ``activation_noise``.

    How well the input can be told from an activation when the weights hold only the information that
    ``information_in_weights`` counts: the smaller the Fisher of the weights, the more noise they tolerate, and the less z says.

    ``layer``, ``prior_scale``, ``damping``, ``units``, ``output``: as in ``activation_noise``.
    ``variant``      ``"paper"`` is Proposition 3.2 (i) as printed, ``(1 / beta) G^T J F J^T G``: another quantity, of another
                     unit (doubling the input of a linear layer multiplies it by 4, the exact one by 1/4). It has no prior.
    ``terms``        ``"mean"``: the first term, of order 1 / beta. ``"both"``: the second too, of order 1.
    ``along``        nuisances theta instead of x: ``{name: dx/dtheta}`` tensors like x (``image_tangents`` makes some), or functions
                     ``(x, amount) -> x`` that move nothing at amount 0. Gives ``F_{z|theta} = (dx/dtheta)^T F_{z|x} (dx/dtheta)``.

    Shapes:   x ``[N, ...]``; see ``InputFisher``.
    Scale:    nats per squared unit of x (or of theta).
    Errors:   ValueError for arguments that do not fit, an F that is singular, or a Gram, without prior and damping, too many units, and where z moves
              with x in a direction without noise: there the information is infinite (a layer with more units than weights
              before it; choose fewer with ``units``). A unit that neither moves nor has noise (a dead ReLU) counts as nothing.
    Numerics: Jacobians in the model's precision, all else float64. The second term takes dim z^2 backward passes through a
              backward pass for each input: for few units and small inputs.
    Source:   Proposition 3.2 (i) of Achille, Paolini and Soatto (arXiv:1905.12213), corrected; the Fisher of a Gaussian:
              Kay 1993, "Fundamentals of Statistical Signal Processing", eq. 3.31.
    """
    _checks.one_of("input_fisher", "variant", variant, VARIANTS)
    if terms not in TERMS or (terms == "both" and variant == "paper"):
        raise ValueError(f"input_fisher: terms must be one of {list(TERMS)}, 'mean' as printed, got {terms!r} for {variant!r}")
    if variant == "paper" and (prior_scale is not None or damping is not None):
        raise ValueError(f"input_fisher: prior_scale and damping must be None as printed, got {prior_scale!r} and {damping!r}")
    z = Activation("input_fisher", model, F, layer, units, output)
    x = z.check_inputs(x)
    directions = [None] * len(x) if along is None else nuisances.tangents("input_fisher", x, along)
    channel = Channel.of(
        "input_fisher", model, F, layer=layer, beta=beta, prior_scale=prior_scale, damping=damping, inverted=variant == "exact"
    )
    factors, sizes, num_units = [], [], 0
    for sample, tangent in zip(x, directions, strict=True):
        local = z.jacobians(sample)
        num_units = len(local.z)
        factor, size = (
            _printed(local, channel, tangent) if variant == "paper" else _exact(z, sample, local, channel, terms, tangent)
        )
        factors.append(factor)
        sizes.append(size)
    return InputFisher(
        factor=torch.stack(factors),
        sizes=torch.stack(sizes),
        num_units=num_units,
        variant=variant,
        terms=terms,
        along=None if along is None else tuple(along),
        precision=z.dtype,
        channel=channel,
    )


def _along(slopes: Tensor, tangent: Tensor | None) -> Tensor:
    """Derivatives about x, in the last axis, as derivatives about theta."""
    return slopes if tangent is None else slopes @ tangent.mT


def _sizes(left: Tensor, slopes: Tensor, tangent: Tensor | None) -> Tensor:
    """Of the columns of ``left @ _along(slopes, tangent)``, with every product counted as it is large."""
    each = left.abs() @ slopes.abs()
    return (each if tangent is None else each @ tangent.abs().mT).norm(dim=0)


def _printed(local: Jacobians, channel: Channel, tangent: Tensor | None) -> tuple[Tensor, Tensor]:
    """R with ``R^T R = (1 / beta) G^T (J F J^T) G``, and the sizes of its columns."""
    middle = covariance(local.by_weights, channel.metric(local.by_weights))
    values, vectors = torch.linalg.eigh(middle)
    root = (values.clamp_min(0) / channel.beta).sqrt()[:, None] * vectors.mT
    return root @ _along(local.by_input, tangent), _sizes(root, local.by_input, tangent)


def _exact(
    z: Activation, x: Tensor, local: Jacobians, channel: Channel, terms: str, tangent: Tensor | None
) -> tuple[Tensor, Tensor]:
    """R with ``R^T R = F_{z|x}``, whitened slopes of the mean, below them those of the covariance; and the sizes of its columns."""
    noise = channel.noise(local.by_weights)
    white = Whitening.of(covariance(local.by_weights, noise), z.dtype)
    slopes = _along(local.by_input, tangent)
    _check_noise(white, slopes)
    rows, sizes = [white.matrix @ slopes], _sizes(white.matrix, local.by_input, tangent)
    if terms == "both":
        # S = J Sigma J^T, so its slope is that of J (Sigma J^T) with the bracket held, and the transpose of that.
        half = _along(z.slopes_of_products(x, noise), tangent)
        of_covariance = half + half.transpose(0, 1)
        _check_noise(white, of_covariance.flatten(1))
        whitened = torch.einsum("ij,jka,lk->ila", white.matrix, of_covariance, white.matrix)
        rows.append(whitened.flatten(0, 1) / math.sqrt(2))
        sizes = torch.hypot(sizes, rows[1].norm(dim=0))
    return torch.cat(rows), sizes


def _check_noise(white: Whitening, slopes: Tensor) -> None:
    if not white.carries(slopes):
        raise ValueError(
            "input_fisher: z must be noisy in every direction in which x moves it, got "
            f"{len(white.matrix)} units and noise of rank {white.rank}: the information is infinite; choose fewer units with units=, "
            "a layer with more weights before it, or an F of more parameters"
        )
