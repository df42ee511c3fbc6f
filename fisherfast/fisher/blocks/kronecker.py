# SPDX-License-Identifier: Apache-2.0
"""A Kronecker block: ``B (x) A`` over a weight and the bias that goes with it, one pair of factors for each group.

A factor is a matrix, or a vector where it is diagonal: the counts of an embedding, the output factor of a large vocabulary.
All arithmetic is float64, in the eigenbases of the factors; the block itself, ``[O D, O D]``, is never formed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fisherfast.accumulator import Accumulator
from fisherfast.fisher.blocks import _graded
from fisherfast.fisher.blocks.rank import Rounding, of_full_rank, zeros
from fisherfast.fisher.inference_mode import outside_inference_mode
from fisherfast.ops.kron_log1p_sum import kron_log1p_sum
from fisherfast.rules import ALL, Entries


@dataclass(frozen=True)
class Place:
    """Which numbers a block is over, and how they are a matrix ``[groups, O, D]``: the bias is its last column.

    ``transposed``: the weight is stored ``[I, O]``, as an embedding table, a Conv1D of Hugging Face or a transposed convolution.
    ``weight_part``, ``bias_part``: the entries of a packed parameter that the block is over; all, unless said.
    ``row_axes``: the axes of the weight that make the rows of the matrix as it is stored, the others make its columns: (0, 2) of heads
    ``[H, D, K]`` that are used as ``[H K, D]``.
    """

    weight: str
    bias: str | None = None
    groups: int = 1
    transposed: bool = False
    op: str = "gram_"  # that the input factor is from
    sharing: str = "expand"  # what is a row of a factor: a position, or with "reduce" a sample
    input_of: str | None = None  # the block before it, by name, that multiplies the same inputs, whose factor A is this one's too
    weight_part: Entries = ALL
    bias_part: Entries = ALL
    row_axes: tuple[int, ...] = (0,)

    @property
    def name(self) -> str:
        """The block's: that of its weight, or of the part of it."""
        return self.weight_part.named(self.weight)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters."""
        return tuple(self.parts)

    @property
    def parts(self) -> dict[str, Entries]:
        """Which entries of which parameters."""
        return {self.weight: self.weight_part} | ({} if self.bias is None else {self.bias: self.bias_part})

    @property
    def labels(self) -> tuple[str, ...]:
        """What the parameters, or their parts, are called."""
        return tuple(part.named(parameter) for parameter, part in self.parts.items())

    def sizes(self, weight: Tensor) -> tuple[int, int]:
        """O and D, where ``weight`` is the parameter or the part of it."""
        rows, columns = weight.shape[0] // self.groups, math.prod(weight.shape[1:])
        O, D = (columns, rows) if self.transposed else (rows, columns)
        return O, D + (self.bias is not None)

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The matrix of a vector by names."""
        weight = self._rows_first(tensors)
        rows = math.prod(weight.shape[: len(self.row_axes)])
        matrix = weight.reshape(self.groups, rows // self.groups, -1)
        matrix = matrix.mT if self.transposed else matrix
        if self.bias is None:
            return matrix
        return torch.cat([matrix, self.bias_part.of(tensors[self.bias]).reshape(self.groups, -1, 1)], 2)

    def write(self, matrix: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of ``matrix``: put it where it belongs in a vector by names."""
        weight = matrix if self.bias is None else matrix[..., :-1]
        _put(weight.mT if self.transposed else weight, self._rows_first(tensors))
        if self.bias is not None:
            _put(matrix[..., -1], self.bias_part.of(tensors[self.bias]))

    def _rows_first(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight, or the part of it, with the axes of its rows in front: a view."""
        weight = self.weight_part.of(tensors[self.weight])
        return weight.permute(*self.row_axes, *(axis for axis in range(weight.dim()) if axis not in self.row_axes))

    def state(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_state(cls, fields: Mapping[str, Any]) -> Self:
        """The place whose ``state`` this is; JSON has lists only."""
        parts = {name: Entries(fields[name]) for name in ("weight_part", "bias_part")}
        return cls(**{**fields, **parts, "row_axes": tuple(fields["row_axes"])})


def _put(values: Tensor, where: Tensor) -> None:
    where.copy_(values.reshape(where.shape))


@dataclass(eq=False)
class KroneckerBlock:
    """The factors as sums and weights: A ``[G, D, D]`` or ``[G, D]``, B ``[G, O, O]`` or ``[G, O]``.

    ``few_rows``: for A and for B the rows that they are the Gram matrices of, where they were kept; files hold none.
    ``leader``: the block that A is of, where it is shared.
    """

    place: Place
    A: Accumulator
    B: Accumulator
    rounding: Rounding
    few_rows: tuple[Tensor | None, Tensor | None] = (None, None)
    leader: KroneckerBlock | None = None

    def finite(self, factor: Tensor, side: str) -> Tensor:
        """The factor of the inputs or outputs (``side``), to be decomposed. Errors: ValueError, naming the weight, if it is not finite."""
        return finite(factor, self.place.name, f"its {side} factor")

    @functools.cached_property
    @outside_inference_mode
    def values_of_A(self) -> Tensor:
        """The eigenvalues of A ``[G, D]``, rising; where A is diagonal its entries. What is zero but for rounding is zero."""
        if self.leader is not None:
            return self.leader.values_of_A
        return _eigenvalues(self.finite(self.mean_of_A(), "input"), self.rounding.products)

    @functools.cached_property
    @outside_inference_mode
    def values_of_B(self) -> Tensor:
        """Those of B ``[G, O]``."""
        return _eigenvalues(self.finite(self.B.mean(), "output"), self.rounding.products_of_g)

    @functools.cached_property
    @outside_inference_mode
    def zeros_of_A(self) -> Tensor:
        """Which of ``values_of_A`` are zero, for less."""
        if self.leader is not None:
            return self.leader.zeros_of_A
        return zeros(self.finite(self.mean_of_A(), "input"), self.rounding.products)

    @functools.cached_property
    @outside_inference_mode
    def zeros_of_B(self) -> Tensor:
        """Those of B ``[G, O]``."""
        return zeros(self.finite(self.B.mean(), "output"), self.rounding.products_of_g)

    @functools.cached_property
    @outside_inference_mode
    def _eigen_of_A(self) -> tuple[Tensor, Tensor | None]:
        if self.leader is not None:
            return self.leader._eigen_of_A
        return _eigen(self.finite(self.mean_of_A(), "input"), self.rounding.products)

    @functools.cached_property
    @outside_inference_mode
    def _eigen_of_B(self) -> tuple[Tensor, Tensor | None]:
        return _eigen(self.finite(self.B.mean(), "output"), self.rounding.products_of_g)

    def at(self, rounding: Rounding) -> KroneckerBlock:
        """The block, so rounded."""
        return self if rounding == self.rounding else dataclasses.replace(self, rounding=rounding)

    def changed(self) -> None:
        """The sums have changed: what was computed from them is void."""
        for name in ("values_of_A", "values_of_B", "zeros_of_A", "zeros_of_B", "_eigen_of_A", "_eigen_of_B"):
            self.__dict__.pop(name, None)
        self.few_rows = (None, None)

    def __matmul__(self, v: Tensor) -> Tensor:
        """``B v A`` of a matrix ``[G, O, D]``."""
        A, B = self.factors()
        return _times(_times(v, A).mT, B).mT

    def spectrally(self, v: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``function`` of the block, by its eigenvalues ``[G, O, D]``, times a matrix."""
        (a, U), (b, V) = self._eigen_of_A, self._eigen_of_B
        v = v if U is None else v @ U
        v = v if V is None else V.mT @ v
        return rotated(function(b.unsqueeze(2) * a.unsqueeze(1)) * v, U, V)

    def drawn(self, normals: Iterable[Tensor], function: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """See ``block_fisher.Block``: in the eigenbasis normal numbers are as good as outside it, and half the products are spared."""
        (a, U), (b, V) = self._eigen_of_A, self._eigen_of_B
        scales = function(b.unsqueeze(2) * a.unsqueeze(1))
        return (rotated(scales.to(normal.dtype) * normal, U, V) for normal in normals)

    def diagonal(self) -> Tensor:
        """As a matrix ``[G, O, D]``."""
        a, b = map(_diagonal, self.factors())
        return b.unsqueeze(2) * a.unsqueeze(1)

    def trace(self) -> float:
        """``tr A tr B``, over groups."""
        a, b = (_diagonal(factor).sum(1) for factor in self.factors())
        return float((a * b).sum())

    def spectrum(self) -> tuple[tuple[Tensor, ...], int]:
        """The factors' eigenvalues ``(b, a)``; with groups all eigenvalues as one factor."""
        a, b = self.values_of_A, self.values_of_B
        return ((b[0], a[0]) if len(a) == 1 else ((b.unsqueeze(2) * a.unsqueeze(1)).flatten(),)), 0

    def mean_of_A(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Zero where no input ever came: of an expert that no sample chose, or where every gradient was zero."""
        return self.A.mean(dtype) if self.A.weight else self.A.nearest(dtype).clone()

    def factors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """A and B, means. Errors: ValueError, naming the weight, if one is not finite."""
        return self.finite(self.mean_of_A(dtype), "input"), self.finite(self.B.mean(dtype), "output")

    def accumulators(self) -> list[Accumulator]:
        """What samples add to; a shared factor is its leader's."""
        return [self.A, self.B] if self.leader is None else [self.B]

    def pooled(self, other: KroneckerBlock, made: Mapping[str, Any]) -> KroneckerBlock:
        """The block of both data sets; its factor A is its own where only one of them had it from another weight."""
        shared = self.place.input_of == other.place.input_of
        place = self.place if shared else dataclasses.replace(self.place, input_of=None)
        rounding = self.rounding.coarser(other.rounding)
        return KroneckerBlock.following(place, lambda: self.A + other.A, self.B + other.B, rounding, made)

    @classmethod
    def following(
        cls, place: Place, own: Callable[[], Accumulator], B: Accumulator, rounding: Rounding, made: Mapping[str, KroneckerBlock]
    ) -> KroneckerBlock:
        """With the factor A of a block that was made before, if the place says so, else with its own."""
        leader = None if place.input_of is None else made[place.input_of]
        return cls(place, own() if leader is None else leader.A, B, rounding, leader=leader)

    def identity(self) -> list[Any]:
        """What must be equal for pooling to mean anything."""
        return [*self.place.labels, self.place.sharing, list(self.A.shape), list(self.B.shape)]

    def logdet(self, damping: float) -> tuple[float, int]:
        """``sum log(a_i b_j + damping)`` and how many of these are ``log 0``, which are left out."""
        a, b = self.values_of_A, self.values_of_B
        if damping:
            sums = torch.zeros(2, dtype=torch.float64, device=a.device)
            for of_input, of_output in zip(a, b, strict=True):
                kron_log1p_sum(sums, of_input, of_output, 1 / damping)
            return float(sums[0]) + a.numel() * b.shape[1] * math.log(damping), 0
        positive_a, positive_b = (a > 0).sum(1), (b > 0).sum(1)
        logs_a, logs_b = (torch.where(v > 0, v.log(), 0.0).sum(1) for v in (a, b))
        zero = a.numel() * b.shape[1] - int((positive_a * positive_b).sum())
        return float((positive_b * logs_a + positive_a * logs_b).sum()), zero

    def factored(self, damping: float) -> KroneckerBlock:
        """``(B + sqrt(damping) / pi I) (x) (A + pi sqrt(damping) I)``, pi^2 the ratio of the factors' mean eigenvalues."""
        a, b = (_diagonal(factor).mean(1) for factor in self.factors())
        pi = torch.where((a > 0) & (b > 0), a / b, 1.0).sqrt()
        shifts = (pi * damping**0.5, damping**0.5 / pi)
        A, B = (Accumulator(_shifted(f, shift), 1.0) for f, shift in zip(self.factors(), shifts, strict=True))
        # pi is B's too: nothing is shared. A shift is no rounding.
        rounding = Rounding.of(torch.float64) if damping else self.rounding
        return KroneckerBlock(dataclasses.replace(self.place, input_of=None), A, B, rounding)

    def inverse(self, dtype: torch.dtype, damped: bool) -> tuple[Tensor, Tensor]:
        """The inverses of A and B. Errors: torch.linalg.LinAlgError if one is singular, which Cholesky does not see under rounding."""
        if not damped and not all(bool((values > 0).all()) for values in (self.values_of_A, self.values_of_B)):
            raise torch.linalg.LinAlgError("an eigenvalue is zero but for rounding")
        A, B = self.factors()
        return _inverse(A).to(dtype), _inverse(B).to(dtype)

    def describe(self) -> str:
        """For the coverage report."""
        a, b = ("diagonal " * (len(factor.shape) == 2) + str(list(factor.shape[1:])) for factor in (self.A, self.B))
        groups = f" in {self.place.groups} groups" * (self.place.groups > 1)
        shared = "" if self.place.input_of is None else f" of {self.place.input_of}"
        return f"B {b} (x) A {a}" + shared + groups + ", reduced" * (self.place.sharing == "reduce")

    def state(self) -> tuple[dict[str, Tensor], list[Any]]:
        """Tensors and plain values."""
        place = self.place
        fields = [place.state(), self.rounding.state(), self.A.weight, self.B.weight]
        factors = {"B": self.B} if self.leader is not None else {"A": self.A, "B": self.B}
        return {f"{place.name}.{name}": factor.stored() for name, factor in factors.items()}, fields

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], fields: list[Any], made: Mapping[str, KroneckerBlock]) -> KroneckerBlock:
        """The block whose ``state`` this is."""
        of_place, of_rounding, weight_a, weight_b = fields
        place, rounding = Place.from_state(of_place), Rounding.from_state(of_rounding)
        B = Accumulator(tensors[f"{place.name}.B"], weight_b)
        return cls.following(place, lambda: Accumulator(tensors[f"{place.name}.A"], weight_a), B, rounding, made)


def finite(moments: Tensor, weight: str, what: str) -> Tensor:
    """Second moments that can be decomposed. Errors: ValueError, naming the parameter, if they cannot."""
    if not bool(torch.stack(torch.aminmax(moments)).isfinite().all()):
        raise ValueError(
            f"{weight}: {what} must be finite, got NaN or infinity; the squares of what it is of do not fit float32: measure the model "
            "in float64"
        )
    return moments


def rotated(v: Tensor, U: Tensor | None, V: Tensor | None) -> Tensor:
    """A matrix in an eigenbasis as it is outside it, ``V v U^T``, in the matrix's dtype."""
    v = v if V is None else V.to(v.dtype) @ v
    return v if U is None else v @ U.to(v.dtype).mT


def _times(v: Tensor, factor: Tensor) -> Tensor:
    return v * factor.unsqueeze(1) if factor.dim() == 2 else v @ factor


def _diagonal(factor: Tensor) -> Tensor:
    return factor if factor.dim() == 2 else factor.diagonal(dim1=1, dim2=2)


def _shifted(factor: Tensor, shift: Tensor) -> Tensor:
    if factor.dim() == 2:
        return factor + shift.unsqueeze(1)
    return factor + shift.view(-1, 1, 1) * torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)


def _inverse(factor: Tensor) -> Tensor:
    return 1 / factor if factor.dim() == 2 else torch.cholesky_inverse(torch.linalg.cholesky(factor))


def _eigenvalues(factor: Tensor, eps: float) -> Tensor:
    return factor if factor.dim() == 2 else of_full_rank(_graded.eigvalsh(factor), factor, eps)


def _eigen(factor: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    if factor.dim() == 2:
        return factor, None
    values, vectors = _graded.eigh(factor)
    return of_full_rank(values, factor, eps), vectors
