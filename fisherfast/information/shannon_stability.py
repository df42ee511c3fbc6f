# SPDX-License-Identifier: Apache-2.0
"""Shannon's information from the stability of training: how far the trained weights move when the data set does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fisherfast import _checks
from fisherfast._names import listed
from fisherfast.fisher import Fisher
from fisherfast.information import _arguments, _conditions
from fisherfast.information._network import VARIANTS

_CALLER = "shannon_from_stability"
_SINGULAR = 1e-13  # of the largest eigenvalue, at unit diagonal: rounding of a sum of many products in float64


@dataclass(frozen=True, eq=False)
class StabilityInformation:
    """I(w; D) for small beta, from one data set, with what it depends on; made by ``shannon_from_stability``.

    ``stability`` is ``J^T F J``, [d, d], J the sensitivity of the trained weights to the d numbers that make the data set.
    """

    nats: float
    stability: Tensor = field(repr=False)
    entropy: float
    beta: float
    variant: str
    fisher: Fisher = field(repr=False)

    def conditions(self) -> str:
        """Everything it depends on, in one line."""
        return (
            f"beta = {self.beta:.3g}, data sets of d = {len(self.stability):,} numbers with entropy {self.entropy:.4g} nats, "
            f"{self.variant} formula, {_conditions.measured_and_missing(self.fisher)}"
        )

    def __str__(self) -> str:
        return f"I(w; D) = {self.nats:,.4g} nats for small beta: {self.conditions()}"


@torch.no_grad()
def shannon_from_stability(
    F: Fisher, sensitivity: Tensor | Mapping[str, Tensor], *, beta: float, entropy: float, variant: str = "exact"
) -> StabilityInformation:
    """``I(w; D) ~ H(D) - 1/2 log((2 pi e beta)^d / |J^T F J|)``, ``J = d w* / d D``, for ``Q(w|D) = N(w*(D), beta F^-1)``.

    One data set's part of it: the information is the mean of ``.nats`` over data sets. It is for beta so small that w
    determines D up to a small Gaussian error, and can be anything, also negative, where that is not so.

    ``sensitivity``  J: how the weights at the end of training move with each of the d numbers that D is made of. At an exact
                     minimum it is ``-H^-1 d_D grad L``, so that flatter minima move further: flatness alone lowers nothing.
    ``entropy``      H(D), the differential entropy of those numbers in nats.
    ``variant``      ``"exact"``, or ``"paper"`` for Proposition 2.9 as printed, with ``beta (2 pi e)^k`` in place of
                     ``(2 pi e beta)^d``.

    Shapes:   sensitivity [d, k], flat in the order of F's names, or {parameter name: [d, *shape]}; d <= k.
    Scale:    nats; F is a mean over samples, so beta goes with a mean loss.
    Errors:   ValueError for d above k, and where some change of the data moves the weights along zero Fisher only: the
              determinant is 0 and the information would be -inf. For a beta not above zero, an entropy that is not finite, an
              unknown variant, shapes that do not fit.
    Numerics: products and log-determinant in float64.
    Source:   Proposition 2.9 of arXiv:1905.12213, after Brunel and Nadal 1998.
    """
    _arguments.check_fisher(_CALLER, F)
    beta = _arguments.beta(_CALLER, beta)
    entropy = _checks.number(_CALLER, "entropy", entropy, "it is the differential entropy of the numbers that make a data set")
    _checks.one_of(_CALLER, "variant", variant, VARIANTS)
    rows = _rows(F, sensitivity)
    d, k = len(rows), F.num_parameters
    if d > k:
        raise ValueError(
            f"{_CALLER}: a data set must be of at most k = {k} numbers, the number of weights, got d = {d}; the determinant would "
            "be 0: describe the data sets by fewer numbers"
        )
    matrix = _stability(F, rows)
    roots = _roots(matrix, rows)
    scales = torch.where(roots > 0, 1 / roots, 0.0)
    # No unit of the data counts at unit diagonal: of the determinant it is a factor.
    eigenvalues = torch.linalg.eigvalsh(scales[:, None] * matrix * scales)
    if eigenvalues[0] <= _SINGULAR * eigenvalues[-1]:
        raise ValueError(
            f"{_CALLER}: J^T F J must be regular, got eigenvalues from {eigenvalues[0]:.3g} to {eigenvalues[-1]:.3g} at unit diagonal; "
            "leave out changes of the data that the network does not see"
        )
    log_volume = d * math.log(2 * math.pi * math.e * beta)
    if variant == "paper":
        log_volume = math.log(beta) + k * math.log(2 * math.pi * math.e)
    log_determinant = float(eigenvalues.log().sum() + 2 * roots.log().sum())
    nats = entropy - (log_volume - log_determinant) / 2
    return StabilityInformation(nats, matrix, entropy, beta, variant, F)


def _rows(F: Fisher, sensitivity: Tensor | Mapping[str, Tensor]) -> Tensor:
    """The sensitivity as ``[d, k]`` in float64."""
    if isinstance(sensitivity, Mapping):
        if set(sensitivity) != set(F.names):
            raise ValueError(f"{_CALLER}: sensitivity must have the names of F, {listed(F.names)}, got {listed(sensitivity)}")
        if len(counts := {len(sensitivity[name]) for name in F.names}) > 1:
            raise ValueError(f"{_CALLER}: sensitivity must have one number of rows for all parameters, got {sorted(counts)}")
        each = [_checks.float64(_CALLER, f"sensitivity[{name!r}]", sensitivity[name]) for name in F.names]
        rows = torch.cat([rows.unsqueeze(1).flatten(1) for rows in each], 1)
    else:
        rows = _checks.float64(_CALLER, "sensitivity", sensitivity)
    if rows.dim() != 2 or not rows.numel() or not rows.isfinite().all():
        raise ValueError(f"{_CALLER}: sensitivity must be finite and [d, k] with d > 0, got {tuple(rows.shape)}")
    return rows


def _roots(matrix: Tensor, rows: Tensor) -> Tensor:
    """Of the diagonal of ``J^T F J``; 0 for a change of the data that moves the weights where F has rounding only, beside the others."""
    seen = matrix.diagonal().clamp_min(0) / rows.square().sum(1).clamp_min(torch.finfo(rows.dtype).tiny)
    return torch.where(seen > _SINGULAR * seen.max(), matrix.diagonal(), 0.0).sqrt()


def _stability(F: Fisher, rows: Tensor) -> Tensor:
    """``J^T F J`` of the columns of J, given as rows ``[d, k]``: one product with F for each."""
    matrix = rows @ torch.stack([F @ row for row in rows]).T
    return (matrix + matrix.T) / 2
