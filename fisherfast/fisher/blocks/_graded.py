# SPDX-License-Identifier: Apache-2.0
"""Eigendecompositions of symmetric matrices whose rows may be of very different sizes.

LAPACK finds small eigenvalues to their own digits only where large rows come first: behind small ones, their rounding covers them.
Moments of unscaled inputs are such matrices, and the 1 of a bias comes last.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sort_by_diagonal(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of ``[..., D, D]`` sorted so that the diagonal falls, and the order ``[..., D]``. Copies."""
    order = matrices.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    rows = matrices.gather(-2, order.unsqueeze(-1).expand_as(matrices))
    return rows.gather(-1, order.unsqueeze(-2).expand_as(matrices)), order


def unsort(vectors: Tensor, order: Tensor) -> Tensor:
    """Columns ``[..., D, r]`` that belong to sorted rows, in the order of the rows as they were."""
    return vectors.gather(-2, order.argsort(dim=-1).unsqueeze(-1).expand_as(vectors))


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors of ``[..., D, D]``."""
    falls, order = sort_by_diagonal(matrices)
    values, vectors = torch.linalg.eigh(falls)
    return values, unsort(vectors, order)


def eigvalsh(matrices: Tensor) -> Tensor:
    """Eigenvalues, rising, of ``[..., D, D]``."""
    return torch.linalg.eigvalsh(sort_by_diagonal(matrices)[0])
