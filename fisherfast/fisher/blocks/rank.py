# SPDX-License-Identifier: Apache-2.0
"""The numerical rank of Gram matrices: which of their eigenvalues are zero but for rounding, mostly without computing them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fisherfast._precision import dtype_name, noise_of_rows, wide_dtype
from fisherfast.fisher.blocks import _graded

_POWERS = 8  # products with a vector, for the bounds of the largest eigenvalue
GRAM_NOISE = 4  # eps of the products' dtype: what is zero in a Gram matrix came out as 0.65 at most, of 5 to 2,000 columns
_DTYPES = {torch.finfo(dtype).eps: dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


class Rounding(NamedTuple):
    """How coarse the numbers behind a block were, as the eps of dtypes: what tells an eigenvalue from rounding.

    ``products``: in which rows were multiplied; sums may be kept in a wider one. ``rows_of_g``: the coarsest in which rows of g came,
    in 16 bits coarser than that.
    """

    products: float
    rows_of_g: float = torch.finfo(torch.float64).eps

    @classmethod
    def of(cls, parameter: torch.dtype) -> Rounding:
        """Of products for a parameter of this dtype, before any rows came."""
        return cls(torch.finfo(wide_dtype(parameter)).eps)

    def seeing(self, g: torch.dtype) -> Rounding:
        """The same if rows of g come in this dtype, too."""
        return self._replace(rows_of_g=max(self.rows_of_g, torch.finfo(g).eps))

    def coarser(self, other: Rounding) -> Rounding:
        """That of both together."""
        return Rounding(*map(max, self, other))

    @property
    def noise_of_g(self) -> float:
        """The most that the rounding of g makes of an eigenvalue of its moments that is zero, relative to the largest."""
        return noise_of_rows(_DTYPES[self.rows_of_g])

    @property
    def products_of_g(self) -> float:
        """``products`` where these are of moments of g: no less than what its rounding leaves of them."""
        return max(self.products, self.noise_of_g / GRAM_NOISE)

    def state(self) -> list[str]:
        """Plain values."""
        return [dtype_name(_DTYPES[eps]) for eps in self]

    @classmethod
    def from_state(cls, names: list[str]) -> Rounding:
        """The rounding whose ``state`` this is."""
        return cls(*(torch.finfo(getattr(torch, name)).eps for name in names))


def of_full_rank(values: Tensor, gram: Tensor, eps: float) -> Tensor:
    """Eigenvalues ``[..., D]``, rising, of Gram matrices, as many of them positive as the rows have independent columns.

    Scaling columns changes no rank, but rounding is in proportion to them: it is told from small columns at unit diagonals.
    """
    large, roots = _large(values, eps), gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    if bool((large.sum(-1) == (roots > 0).sum(-1)).all()):  # columns of zeros are all that is missing, if any are
        return values.where(large, 0.0)
    scales = torch.where(roots > 0, 1 / roots, 0.0)
    correlations = torch.linalg.eigvalsh(scales.unsqueeze(-1) * gram * scales.unsqueeze(-2))
    return values.clamp_min(0.0).where(_large(correlations, eps), 0.0)  # both rise


def zeros(gram: Tensor, eps: float) -> Tensor:
    """Where the eigenvalues ``[..., D]``, rising, of Gram matrices are zero by ``of_full_rank``; mostly without computing them."""
    if gram.dim() == 2:
        return gram == 0
    roots = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    scales = torch.where(roots > 0, 1 / roots, 0.0)
    number = _number_of_zeros(scales.unsqueeze(-1) * gram * scales.unsqueeze(-2), roots > 0, eps) if roots.shape[-1] else None
    if number is None:
        return of_full_rank(_graded.eigvalsh(gram), gram, eps) == 0
    return torch.arange(roots.shape[-1], device=roots.device) < number.unsqueeze(-1)


def _number_of_zeros(gram: Tensor, columns: Tensor, eps: float) -> Tensor | None:
    """How many eigenvalues are not ``_large`` ``[...]``, by Sylvester's law of inertia: decompositions of the matrix less a threshold, which
    are far cheaper than eigenvalues. None where the bounds of the largest one are too loose to tell. ``columns``: not all zeros.
    """
    above, noise = _largest_is_below(gram), _noise(gram.shape[-1], gram.dtype, eps)
    regular = gram + torch.diag_embed(torch.where(columns, -1.25 * noise * above, above))
    if not bool((torch.linalg.cholesky_ex(regular).info != 0).any()):
        return (~columns).sum(-1)
    thresholds = 0.8 * noise * _largest_is_above(gram), 1.25 * noise * above
    fewest, most = (_negative(gram - torch.diag_embed(one.expand_as(columns))) for one in thresholds)
    return most if torch.equal(fewest, most) else None


def _largest_is_below(gram: Tensor) -> Tensor:
    """A bound of the largest eigenvalue ``[..., 1]``: ``max_i (|G| x)_i / x_i`` of any positive x (Collatz and Wielandt)."""
    sizes = gram.abs()
    x = torch.ones_like(sizes[..., 0])
    for _ in range(_POWERS):
        x = _times_vector(sizes, x)
        x = x / x.amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) + 1e-3  # positive, also where columns are zero
    return (_times_vector(sizes, x) / x).amax(-1, keepdim=True)


def _largest_is_above(gram: Tensor) -> Tensor:
    """Another ``[..., 1]``: the Rayleigh quotient of any vector."""
    v = torch.arange(gram.shape[-1], dtype=gram.dtype, device=gram.device).cos().expand_as(gram[..., 0])  # in no symmetry's way
    for _ in range(_POWERS):
        v = _times_vector(gram, v)
        v = v / v.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
    return (v * _times_vector(gram, v)).sum(-1, keepdim=True)


def _times_vector(matrices: Tensor, v: Tensor) -> Tensor:
    return (matrices @ v.unsqueeze(-1)).squeeze(-1)


def _negative(matrices: Tensor) -> Tensor:
    """How many eigenvalues of symmetric matrices are negative: as many as of D in ``L D L^T``, whose blocks of two have one each."""
    LD, pivots, _ = torch.linalg.ldl_factor_ex(matrices)
    single = (LD.diagonal(dim1=-2, dim2=-1) < 0) & (pivots > 0)
    return single.sum(-1) + (pivots < 0).sum(-1) // 2


def _large(values: Tensor, eps: float) -> Tensor:
    """Which eigenvalues ``[..., D]`` are more than the rounding of the products and of the decomposition, relative to the largest."""
    return values > _noise(values.shape[-1], values.dtype, eps) * values.amax(-1, keepdim=True)


def _noise(D: int, dtype: torch.dtype, eps: float) -> float:
    """Of a Gram matrix with D columns and of its decomposition, relative to the largest eigenvalue."""
    return max(GRAM_NOISE * eps, D * torch.finfo(dtype).eps)
