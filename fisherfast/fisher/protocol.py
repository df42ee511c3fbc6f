# SPDX-License-Identifier: Apache-2.0
"""What every Fisher answers, whatever its structure: the only thing that estimators may rely on.

A structure (diagonal, Kronecker-factored, Gram) is one file beside this one, a class with these methods. Per-layer work on
the eigenvalues goes through ``spectra()``, which never forms the whole spectrum: a block's eigenvalues are all products of
one entry of each of its factors, so a diagonal has one factor and a Kronecker block two.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from fisherfast._warning import FisherWarning as FisherWarning
from fisherfast.fisher.coverage import Coverage

Vector = TypeVar("Vector", Tensor, dict[str, Tensor])  # flat, in F.names order, or {parameter name: tensor}
Damping = float | Mapping[str, float]  # one number, or one per layer or parameter name
WHOLE = "(model)"  # what is shown for the layer named "": the parameters that the model itself holds


def layer_of(parameter: str) -> str:
    """The layer that a parameter name belongs to: ``"a.b"`` for ``"a.b.weight"``, ``""`` for a parameter of the model itself."""
    return parameter.rpartition(".")[0]


def names_by_layer(parameters: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """``{layer: its parameters}``, both in the order in which they come."""
    layers: dict[str, list[str]] = {}
    for name in parameters:
        layers.setdefault(layer_of(name), []).append(name)
    return {layer: tuple(members) for layer, members in layers.items()}


@dataclass(frozen=True)
class Provenance:
    """How a Fisher was measured; None where unknown, or where runs that differ in it were pooled (draws and seed only)."""

    fisher_type: str | None = None
    likelihood: str | None = None
    draws: int | None = None
    seed: int | None = None
    model: str | None = None

    def __str__(self) -> str:
        known = [f"{field.name}={getattr(self, field.name)!r}" for field in fields(self) if getattr(self, field.name) is not None]
        return ", ".join(known)


@dataclass(frozen=True)
class LayerSummary:
    """One layer of a Fisher: its parameters by name, how many numbers they hold, and the trace of their block."""

    name: str
    parameters: tuple[str, ...]
    num_parameters: int
    trace: float


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The eigenvalues of one block, factored: all products of one entry from each factor, over ``divisor``, plus ``zeros`` zeros.

    Shapes:   factors 1-D: ``(f,)`` of a diagonal, ``(b, a)`` of a Kronecker block
              ``B (x) A``; the block has ``prod(len(factor)) + zeros`` eigenvalues, which is ``num_parameters``. ``parameters`` are those that it is over: a
              packed one is in the spectra of all its parts.
    Scale:    for a diagonal the factor is the sum over samples and ``divisor`` their number, so that no copy is made: do not write to
              it. Factors of a short run are float32, which is exact for them; ``eigenvalues`` and ``chunks`` return float64.
    """

    layer: str
    parameters: tuple[str, ...]
    factors: tuple[Tensor, ...]
    zeros: int = 0
    divisor: float = 1.0

    @property
    def num_parameters(self) -> int:
        """The number of eigenvalues."""
        return math.prod(factor.numel() for factor in self.factors) + self.zeros

    def eigenvalues(self) -> Tensor:
        """All of them, in one flat tensor."""
        first, *others = self.factors
        values = first.double()
        for factor in others:
            values = torch.outer(values, factor).flatten()
        return torch.cat([values / self.divisor, values.new_zeros(self.zeros)])

    def chunks(self, size: int) -> Iterator[Tensor]:
        """All but ``zeros``, about ``size`` at a time."""
        first, *others = self.factors
        rest = first.new_ones(1, dtype=torch.float64)
        for factor in others:
            rest = torch.outer(rest, factor).flatten()
        for part in first.split(max(1, size // max(1, rest.numel()))):
            yield torch.outer(part.double(), rest).flatten().div_(self.divisor)


@runtime_checkable
class Fisher(Protocol):
    """``F = (1/N) sum_n E_y[s_n s_n^T]``, ``s_n = grad_w log p_w(y | x_n)``, in some structure.

    Shapes:   a vector is ``{parameter name: tensor}`` over all of ``names``, or one flat tensor in that order; the same
              kind comes back.
    Scale:    a mean over samples, whatever the loss's reduction or the batch size. ``damping`` is Tikhonov, ``F + damping
              I``: a number, or ``{layer or parameter name: number}`` that covers every parameter, its own name first.
    Errors:   ValueError for vectors and dampings that do not fit, for a singular system, and for pooling what was
              measured in different ways.
    Numerics: sums are float64; totals are Python floats.
    """

    @property
    def structure(self) -> str:
        """``"diagonal"``, ``"kfac"``, ``"ekfac"`` or ``"gram"``."""

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in the model's order; a tied tensor once, under its first name."""

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each parameter."""

    @property
    def num_parameters(self) -> int:
        """How many numbers the parameters hold."""

    @property
    def num_samples(self) -> int:
        """How many samples were measured."""

    @property
    def num_positions(self) -> int:
        """How many labels these samples have: their counted tokens or pixels; ``num_samples`` if one each."""

    @property
    def provenance(self) -> Provenance:
        """How it was measured."""

    @property
    def coverage(self) -> Coverage:
        """How each parameter was measured, and why those that are not in ``names`` were not."""

    @property
    def aliases(self) -> dict[str, str]:
        """The other names of tied tensors: {alias: its name in ``names``}."""

    def diagonal(self, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The diagonal, shaped like the parameters."""

    def trace(self) -> float:
        """The sum of the eigenvalues."""

    def logdet(self, damping: Damping = 0.0) -> float:
        """``log det(F + damping I)``; -inf with a FisherWarning if that is singular."""

    def __matmul__(self, v: Vector) -> Vector:
        """``F v``."""

    def solve(self, v: Vector, damping: Damping = 0.0) -> Vector:
        """``(F + damping I)^-1 v``."""

    def eigenvalues(self) -> Tensor:
        """All eigenvalues in one float64 tensor, largest first; ``spectra`` is the form for large models."""

    def spectra(self) -> Iterator[Spectrum]:
        """The eigenvalues block by block, in the order of ``names``; the blocks together hold every parameter once."""

    def sample(
        self, n: int, *, damping: Damping = 0.0, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """``n`` draws from ``N(0, (F + damping I)^-1)``, ``{name: [n, *shape]}``."""

    def by_layer(self) -> dict[str, LayerSummary]:
        """The layers, in the order of ``names``."""

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib figure of the trace by layer and the sorted eigenvalues, written to ``path`` if given."""

    def __add__(self, other: Any) -> Any:
        """The Fisher of both data sets together."""

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Any:
        """Pool the data of all ranks, in place on every rank; returns self."""

    def to(self, device: str | torch.device) -> Any:
        """A copy on another device."""

    def save(self, path: str | os.PathLike[str], *, extra: Mapping[str, str] | None = None) -> None:
        """Write to a safetensors file, whole or not at all."""
