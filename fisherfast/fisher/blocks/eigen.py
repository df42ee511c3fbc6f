# SPDX-License-Identifier: Apache-2.0
"""An eigen block: ``(V (x) U) diag(values) (V (x) U)^T``, the eigenvectors of Kronecker factors with eigenvalues of its own.

A basis may be that of the span of few rows: outside it the block is zero. All arithmetic is float64; ``[O D, O D]`` is never formed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherfast.accumulator import Accumulator
from fisherfast.fisher import logdet
from fisherfast.fisher.blocks import _graded
from fisherfast.fisher.blocks.kronecker import KroneckerBlock, Place, rotated
from fisherfast.fisher.blocks.rank import Rounding

_CHUNK_BYTES = 2**24  # of matrices that are decomposed in one call
# What is next to nothing beside the largest: in a basis of few rows' span a projection of so many eps, and where the basis's factor
# has nothing an eigenvalue of so many, which is how far eigenvectors of small eigenvalues are mixed with each other.
_SPAN_NOISE, _NULL_NOISE = 256, 2


@dataclass(eq=False)
class EigenBlock:
    """U ``[G, D, r]`` of A, V ``[G, O, q]`` of B, None where the factor is diagonal; the values' sums ``[G, q, r]``."""

    kronecker: KroneckerBlock
    U: Tensor | None
    V: Tensor | None
    values: Accumulator

    @property
    def place(self) -> Place:
        """Of the Kronecker block that the basis is of."""
        return self.kronecker.place

    @property
    def rounding(self) -> Rounding:
        """Of the rows behind the values; the basis itself stays what it was."""
        return self.kronecker.rounding

    @rounding.setter
    def rounding(self, rounding: Rounding) -> None:
        self.kronecker = self.kronecker.at(rounding)

    @property
    def _size(self) -> int:
        A, B = self.kronecker.A.shape, self.kronecker.B.shape
        return A[0] * A[1] * B[1]

    def _eigenvalues(self) -> Tensor:
        """Those of the block, ``[G, q, r]``, without those of directions of the inputs or outputs in which there is only rounding."""
        values = self.values.mean()
        of_inputs = self._nothing(values.amax(1), self.U, 0.0, lambda: self.kronecker.zeros_of_A)
        of_outputs = self._nothing(values.amax(2), self.V, self.rounding.noise_of_g, lambda: self.kronecker.zeros_of_B)
        return values.masked_fill(of_inputs.unsqueeze(1) | of_outputs.unsqueeze(2), 0.0)

    def _nothing(self, largest: Tensor, basis: Tensor | None, of_rows: float, of_factor: Callable[[], Tensor]) -> Tensor:
        """The directions ``[G, r]`` in which there is only rounding; ``largest`` is the largest eigenvalue along each, ``of_rows`` what
        the rounding of the rows makes of one.

        Those are the directions along which neither the factor behind the basis nor these data have anything. A basis of the span
        of few rows has no such directions of the factor: there next to nothing in the data is enough.
        """
        if basis is None:
            return torch.zeros_like(largest, dtype=torch.bool)  # nothing was projected
        of_span = basis.shape[1] > basis.shape[2]
        most = max((_SPAN_NOISE * self.rounding.products) ** 2 if of_span else _NULL_NOISE * self.rounding.products, of_rows)
        small = largest <= most * largest.amax(1, keepdim=True)
        return small if of_span or not bool(small.any()) else small & of_factor()

    def _into(self, v: Tensor) -> Tensor:
        """A matrix ``[G, O, D]`` in the basis, ``[G, q, r]``."""
        v = v if self.U is None else v @ self.U.double()
        return v if self.V is None else self.V.double().mT @ v

    def __matmul__(self, v: Tensor) -> Tensor:
        """The block times a matrix ``[G, O, D]``."""
        return rotated(self.values.mean() * self._into(v), self.U, self.V)

    def spectrally(self, v: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``function`` of the block, by its eigenvalues, times a matrix ``[G, O, D]``."""
        values = function(self._eigenvalues())
        if values.numel() == self._size:
            return rotated(values * self._into(v), self.U, self.V)
        outside = function(values.new_zeros(1))
        return outside * v + rotated((values - outside) * self._into(v), self.U, self.V)

    def drawn(self, normals: Iterable[Tensor], function: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """See ``block_fisher.Block``: in a basis of the whole space normal numbers are as good as outside it."""
        values = self._eigenvalues()
        if values.numel() < self._size:
            return (self.spectrally(normal.double(), function).to(normal.dtype) for normal in normals)
        scales = function(values)
        return (rotated(scales.to(normal.dtype) * normal, self.U, self.V) for normal in normals)

    def diagonal(self) -> Tensor:
        """As a matrix ``[G, O, D]``."""
        v = self.values.mean()
        v = v if self.V is None else self.V.double().square() @ v
        return v if self.U is None else v @ self.U.double().square().mT

    def trace(self) -> float:
        """The sum of the eigenvalues."""
        return float(self.values.mean().sum())

    def logdet(self, damping: float) -> tuple[float, int]:
        """``sum log(eigenvalue + damping)`` and how many of these are ``log 0``, which are left out."""
        values = self._eigenvalues()
        return logdet.of_values(values, self._size - values.numel(), damping)

    def spectrum(self) -> tuple[tuple[Tensor, ...], int]:
        """The values, and how many further eigenvalues are zero."""
        values = self._eigenvalues().flatten()
        return (values,), self._size - values.numel()

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B that the basis is of."""
        return self.kronecker.factors(dtype)

    def accumulators(self) -> list[Accumulator]:
        """What samples add to: the basis stays as it is."""
        return [self.values]

    def changed(self) -> None:
        """Nothing is remembered of the values."""

    def pooled(self, other: EigenBlock, made: Mapping[str, Any]) -> EigenBlock:
        """The block of both data sets, in their one basis."""
        kronecker = self.kronecker.at(self.rounding.coarser(other.rounding))
        return EigenBlock(kronecker, self.U, self.V, self.values + other.values)

    def identity(self) -> list[Any]:
        """What must be equal for pooling to mean anything: the basis, by its bits."""
        digest = hashlib.sha256()
        for basis in (self.U, self.V):
            digest.update(b"-" if basis is None else basis.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return [*self.kronecker.identity(), f"eigenbasis {digest.hexdigest()[:16]} of one ff.KFAC, given to ff.EKFAC(basis=...)"]

    def describe(self) -> str:
        """For the coverage report."""
        q, r = self.values.shape[1:]
        return f"{q} x {r} eigenvalues in the basis of {self.kronecker.describe()}"

    def state(self) -> tuple[dict[str, Tensor], list[Any]]:
        """Tensors and plain values."""
        tensors, fields = self.kronecker.state()
        own = {"U": None if self.kronecker.leader else self.U, "V": self.V, "values": self.values.stored()}
        named = {f"{self.place.name}.{name}": tensor.contiguous() for name, tensor in own.items() if tensor is not None}
        return tensors | named, [*fields, self.values.weight]

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], fields: list[Any], made: Mapping[str, Any]) -> EigenBlock:
        """The block whose ``state`` this is."""
        *of_basis, weight = fields
        before = {name: block for name, block in made.items() if isinstance(block, EigenBlock)}
        kronecker = KroneckerBlock.from_state(tensors, of_basis, {name: block.kronecker for name, block in before.items()})
        U, V = (tensors.get(f"{kronecker.place.name}.{name}") for name in "UV")
        if kronecker.place.input_of is not None:
            U = before[kronecker.place.input_of].U
        return cls(kronecker, U, V, Accumulator(tensors[f"{kronecker.place.name}.values"], weight))


def eigenbasis(factor: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Eigenvectors of a factor ``[G, D, D]`` on any scale, or of the span of the rows ``[m, D]`` whose Gram matrix it is: ``[G, D, r]``.

    None for a factor that is diagonal. Computed in ``dtype``, orthonormal to its precision whatever the factor's rank: any
    orthonormal basis gives eigenvalues whose sum is the exact trace. Groups are decomposed many at a time.
    """
    if factor.dim() == 2:
        return None
    if rows is not None:
        return (_of_span(rows) if dtype == torch.float64 else _of_gram(rows)).unsqueeze(0)
    falls, order = _graded.sort_by_diagonal(factor)
    falls /= falls[:, :1, :1].clamp_min(torch.finfo(factor.dtype).tiny)
    scaled = falls.to(dtype)
    del falls
    step = _at_a_time(scaled.shape[1], dtype)
    return torch.cat(
        [_graded.unsort(_eigenvectors(some), by) for some, by in zip(scaled.split(step), order.split(step), strict=True)]
    )


def _at_a_time(D: int, dtype: torch.dtype) -> int:
    return max(1, _CHUNK_BYTES // (dtype.itemsize * D * D))


def workspace(groups: int, D: int, dtype: torch.dtype) -> int:
    """Bytes that ``eigenbasis`` of a factor ``[groups, D, D]`` takes before it has a result.

    The factor scaled, and beside it at first a copy in ``dtype`` of one that is held in another, then of what is decomposed in one
    call the eigenvectors and the 2 D^2 numbers that LAPACK's divide and conquer works in.
    """
    together = min(groups, _at_a_time(D, dtype))
    return (groups + max(groups, 3 * together)) * dtype.itemsize * D * D


def _of_span(rows: Tensor) -> Tensor:
    """Of ``rows^T rows``, to the last bit of float64."""
    Q, R = torch.linalg.qr(rows.double().mT)
    return Q @ _eigenvectors((R @ R.mT).unsqueeze(0))[0]


def _of_gram(rows: Tensor) -> Tensor:
    """The same to float32, in half the time: through ``rows rows^T`` in float64, which holds what float32 can tell of the rows.

    Directions that hold less than 1e-11 of the largest are zero: rounding of the rows, unless a row lies in them, small as it is
    beside others. Angles between the others are off by 2e-16 of the largest over theirs: where that is more than float32 would
    notice, one Newton-Schulz step makes them orthonormal to float32.
    """
    wide = rows.double()
    gram = wide @ wide.mT
    values, vectors = torch.linalg.eigh(gram)
    kept = torch.where(values > 1e-11 * values[-1], values, 0.0)
    if bool((vectors.square() @ kept < (1 - 1e-6) * gram.diagonal()).any()):
        return _of_span(rows).float()
    root = torch.where(kept > 0, kept, torch.inf).rsqrt()
    U = (wide.mT @ (vectors * root)).float()
    return U if bool(values[0] > 1e-8 * values[-1]) else 1.5 * U - 0.5 * (U @ (U.mT @ U))


def _eigenvectors(matrices: Tensor) -> Tensor:
    """Of ``[n, D, D]``, in one call; float32 does not converge on some matrices that float64 has no trouble with."""
    try:
        vectors = torch.linalg.eigh(matrices).eigenvectors
    except torch.linalg.LinAlgError:
        if len(matrices) > 1:  # one of them, and nothing is known of the others
            return torch.cat([_eigenvectors(one) for one in matrices.split(1)])
        vectors = torch.full_like(matrices, math.nan)
    failed = ~vectors.flatten(1).sum(1).isfinite()
    if matrices.dtype != torch.float64 and bool(failed.any()):
        vectors[failed] = torch.linalg.eigh(matrices[failed].double()).eigenvectors.to(matrices.dtype)
    return vectors
