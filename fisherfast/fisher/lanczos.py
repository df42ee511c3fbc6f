# SPDX-License-Identifier: Apache-2.0
"""Spectra from products alone: stochastic Lanczos quadrature of anything that has ``F @ v``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fisherfast import _checks

_NOISE = 16  # eps of the recurrence's dtype, of the largest eigenvalue: what is zero comes out below


class Operator(Protocol):
    """What products are taken with: every Fisher, and ``FisherOperator``."""

    @property
    def num_parameters(self) -> int:
        """The length of a flat vector."""

    def __matmul__(self, v: Tensor) -> Tensor:
        """The product with a flat vector."""


class Estimate(NamedTuple):
    """A mean over random draws, and its standard error (nan of a single draw)."""

    value: float
    stderr: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """The mean of independent draws ``[n]``, and ``std / sqrt(n)``."""
        stderr = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(float(values.mean()), stderr)


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """Where the eigenvalues lie: for each random probe, nodes and the number of eigenvalues that each stands for.

    Any ``sum_j f(lambda_j)`` is estimated by ``sum_k mass_k f(node_k)``, its mean over probes; one run answers for every damping.

    Shapes:   nodes, masses float64 ``[probes, steps]``, masses of a probe sum to ``num_parameters``; where a probe needed fewer
              steps the rest have mass 0.
    Scale:    that of F's eigenvalues, a mean over samples.
    Numerics: the largest nodes are the largest eigenvalues, to the precision of the products. Nodes below 16 eps of the largest are
              rounding and count as zero: eps of the recurrence's dtype, so that a smaller damping than that asks for float64. With
              as many steps as F has distinct eigenvalues a probe's quadrature is exact, and only the probes are random. With fewer,
              a log-determinant at a damping far below the smallest resolved node is too high: take steps until it stays.
              Standard errors are of the probes alone, not of quadrature or rounding.
    Source:   Ubaru, Chen & Saad 2017, "Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature".
    """

    nodes: Tensor
    masses: Tensor

    def __repr__(self) -> str:
        probes, steps = self.nodes.shape
        return f"SpectralDensity({probes} probes of {steps} steps)"

    def sum(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """``sum_j f(lambda_j)``; f must be finite at 0."""
        return Estimate.of((self.masses * function(self.nodes)).sum(1))

    def trace(self) -> Estimate:
        """``tr F``."""
        return self.sum(lambda nodes: nodes)

    def logdet(self, damping: float) -> Estimate:
        """``log det(F + damping I)``. Errors: ValueError unless damping > 0: a quadrature cannot tell zero from small."""
        damping = _checks.positive("SpectralDensity.logdet", "damping", damping)
        return self.sum(lambda nodes: (nodes + damping).log())

    def largest(self) -> float:
        """The largest eigenvalue that any probe found."""
        return float(self.nodes[self.masses > 0].max())


@torch.no_grad()
def spectral_density(
    F: Operator, *, probes: int = 8, steps: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> SpectralDensity:
    """The spectrum of F by ``probes * steps`` products with it: random signs, Lanczos, Gauss quadrature.

    ``dtype``, ``device``: of the vectors, of which one probe keeps ``steps + 1``; all are orthogonalised against all, twice.

    Shapes:   see ``SpectralDensity``.
    Scale:    eigenvalues in F's units; their masses add up to ``F.num_parameters``.
    Errors:   ValueError unless there is at least one probe and one step.
    Numerics: the recurrence in ``dtype``, the quadrature in float64; the same seed gives the same probes on every device.
    Source:   Golub & Meurant 1993 for the quadrature; Hutchinson 1990 for the signs.
    """
    probes, steps = (_checks.integer("spectral_density", name, n, 1) for name, n in (("probes", probes), ("steps", steps)))
    size = F.num_parameters
    generator = torch.Generator().manual_seed(seed)
    nodes, masses = torch.zeros(2, probes, min(steps, size), dtype=torch.float64, device="cpu")
    for probe in range(probes):
        signs = torch.randint(0, 2, (size,), generator=generator, device="cpu").to(device, dtype) * 2 - 1
        tridiagonal = _lanczos(F, signs / math.sqrt(size), min(steps, size))
        values, vectors = torch.linalg.eigh(tridiagonal)
        nodes[probe, : len(values)] = values.masked_fill(values <= _NOISE * torch.finfo(dtype).eps * values[-1], 0.0)
        masses[probe, : len(values)] = size * vectors[0].square()
    return SpectralDensity(nodes, masses)


def _lanczos(F: Operator, start: Tensor, steps: int) -> Tensor:
    """The tridiagonal matrix ``Q^T F Q`` float64, Q an orthonormal basis of the Krylov space; smaller where that ends."""
    basis = start.new_empty(steps, len(start))
    matrix = torch.zeros(steps, steps, dtype=torch.float64, device="cpu")
    basis[0] = start
    scale = 0.0
    for k in range(steps):
        w = F @ basis[k]
        matrix[k, k] = float(w @ basis[k])
        known = basis[: k + 1]
        for _ in range(2):
            w = w - known.mT @ (known @ w)
        rest = float(w.norm())
        scale = max(scale, abs(float(matrix[k, k])), rest)
        if k + 1 == steps or rest <= _NOISE * torch.finfo(w.dtype).eps * scale:
            return matrix[: k + 1, : k + 1]
        matrix[k, k + 1] = matrix[k + 1, k] = rest
        basis[k + 1] = w / rest
    return matrix
