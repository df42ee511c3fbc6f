# SPDX-License-Identifier: Apache-2.0
"""An exact block: all second moments of the gradient of one small parameter, ``[D, D]``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherfast.accumulator import Accumulator
from fisherfast.fisher import logdet
from fisherfast.fisher.blocks import _graded
from fisherfast.fisher.blocks.kronecker import Place, finite
from fisherfast.fisher.blocks.rank import Rounding, of_full_rank
from fisherfast.fisher.inference_mode import outside_inference_mode


@dataclass(frozen=True)
class Flat(Place):
    """All numbers of a parameter, of whatever shape, in one row ``[1, 1, D]``."""

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See ``Place``."""
        return tensors[self.weight].reshape(1, 1, -1)

    def write(self, matrix: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """See ``Place``."""
        tensors[self.weight].copy_(matrix.reshape(tensors[self.weight].shape))


@dataclass(eq=False)
class ExactBlock:
    """``sum_n w_n E_y[s s^T] / sum_n w_n`` as sum and weight; see ``block_fisher.Block``. All arithmetic is float64."""

    place: Flat
    moments: Accumulator
    rounding: Rounding

    @functools.cached_property
    @outside_inference_mode
    def _spectral(self) -> tuple[Tensor, Tensor]:
        moments = finite(self.moments.mean(), self.place.weight, "its exact block")
        values, vectors = _graded.eigh(moments)
        return of_full_rank(values, moments, self.rounding.products_of_g), vectors

    def __matmul__(self, v: Tensor) -> Tensor:
        """The block times a matrix ``[1, 1, D]``."""
        return v @ self.moments.mean()

    def spectrally(self, v: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``function`` of the block, by its eigenvalues, times a matrix ``[1, 1, D]``."""
        values, vectors = self._spectral
        return (v @ vectors * function(values)) @ vectors.mT

    def drawn(self, normals: Iterable[Tensor], function: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """See ``block_fisher.Block``."""
        return (self.spectrally(normal.double(), function).to(normal.dtype) for normal in normals)

    def diagonal(self) -> Tensor:
        """As a matrix ``[1, 1, D]``."""
        return self.moments.mean().diagonal().view(1, 1, -1)

    def trace(self) -> float:
        """The sum of the eigenvalues."""
        return float(self.moments.mean().trace())

    def logdet(self, damping: float) -> tuple[float, int]:
        """``sum log(eigenvalue + damping)`` and how many of these are ``log 0``, which are left out."""
        return logdet.of_values(self._spectral[0], 0, damping)

    def spectrum(self) -> tuple[tuple[Tensor, ...], int]:
        """The eigenvalues."""
        return (self._spectral[0],), 0

    def factors(self, dtype: torch.dtype) -> None:
        """It has none."""

    def accumulators(self) -> list[Accumulator]:
        """What samples add to."""
        return [self.moments]

    def changed(self) -> None:
        """The sums have changed: what was computed from them is void."""
        self.__dict__.pop("_spectral", None)

    def pooled(self, other: ExactBlock, made: Mapping[str, Any]) -> ExactBlock:
        """The block of both data sets."""
        return ExactBlock(self.place, self.moments + other.moments, self.rounding.coarser(other.rounding))

    def identity(self) -> list[Any]:
        """What must be equal for pooling to mean anything."""
        return ["exact", *self.moments.shape]

    def factored(self, damping: float) -> ExactBlock:
        """The block plus ``damping I``: there is one factor."""
        unit = torch.eye(self.moments.shape[0], dtype=torch.float64, device=self.moments.device)
        return ExactBlock(self.place, Accumulator(self.moments.mean() + damping * unit, 1.0), self.rounding)

    def describe(self) -> str:
        """For the coverage report."""
        return f"exact {list(self.moments.shape)}"

    def state(self) -> tuple[dict[str, Tensor], list[Any]]:
        """Tensors and plain values."""
        fields = [self.place.state(), self.rounding.state(), self.moments.weight]
        return {f"{self.place.name}.moments": self.moments.stored()}, fields

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], fields: list[Any], made: Mapping[str, Any]) -> ExactBlock:
        """The block whose ``state`` this is."""
        of_place, of_rounding, weight = fields
        place = Flat.from_state(of_place)
        return cls(place, Accumulator(tensors[f"{place.name}.moments"], weight), Rounding.from_state(of_rounding))
