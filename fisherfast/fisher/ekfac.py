# SPDX-License-Identifier: Apache-2.0
"""EKFAC: KFAC's eigenvectors with the eigenvalues that are best for them, the second moments of the gradient along each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fisherfast import _checks
from fisherfast.capture.calls import Call
from fisherfast.capture.capture import Capture
from fisherfast.capture.collector import Cost, Held
from fisherfast.capture.tracked import Tracked
from fisherfast.fisher import serialize
from fisherfast.fisher.blocks.block_fisher import BlockFisher, described
from fisherfast.fisher.blocks.eigen import EigenBlock
from fisherfast.fisher.blocks.eigen_sums import EigenCollector
from fisherfast.fisher.blocks.exact import ExactBlock
from fisherfast.fisher.blocks.kronecker import KroneckerBlock
from fisherfast.fisher.blocks.kronecker_sums import KroneckerSums
from fisherfast.fisher.counts import Counts
from fisherfast.fisher.kfac import KFAC, KFACFisher, KroneckerCollector
from fisherfast.fisher.request import Request
from fisherfast.rules import Form, Rows


@dataclass(frozen=True)
class EKFAC(Request["EKFACFisher"]):
    """Ask for corrected eigenvalues: ``ff.fisher(model, data, structure="ekfac")``, ``ff.collect(model, ff.EKFAC(basis=kfac))``.

    ``basis``: the ``KFACFisher`` whose eigenvectors are taken. ``ff.fisher`` measures it in a first pass over the data if it is
    None, with factors as ``KFAC(max_factor_dim)`` keeps them. ``max_exact_dim``: as KFAC's.
    """

    basis: KFACFisher | None = None
    max_factor_dim: int = 16384
    max_exact_dim: int = 256

    def __post_init__(self) -> None:
        _checks.integer("EKFAC", "max_factor_dim", self.max_factor_dim, 1)
        _checks.integer("EKFAC", "max_exact_dim", self.max_exact_dim, 0)
        if self.basis is not None and not isinstance(self.basis, KFACFisher):
            raise ValueError(f"EKFAC: basis must be a KFACFisher, got {type(self.basis).__name__}; measure ff.KFAC()")

    def collector(self, capture: Capture, transactional: bool) -> EigenCollector:
        """See ``Request``."""
        if self.basis is None:
            raise ValueError(
                "EKFAC: basis must be a KFACFisher where the data pass once, got None; measure ff.KFAC() first, or use "
                "ff.fisher(model, data, structure='ekfac'), which reads the data twice"
            )
        basis = {block.place.name: block for block in self.basis.blocks if isinstance(block, KroneckerBlock)}
        return EigenCollector(capture, basis, transactional, self.max_exact_dim)

    def result(self, source: EigenCollector, counts: Counts) -> EKFACFisher:
        """See ``Request``."""
        blocks, diagonals = source.snapshot()
        how = described({block: counts.coverage[block.place.weight] for block in blocks})
        return EKFACFisher(blocks, diagonals, counts.saying("diagonal", how), source.shapes)

    def restore(self, source: EigenCollector, before: EKFACFisher) -> None:
        """See ``Request``."""
        source.restore(before.blocks, before.diagonals)


@dataclass(frozen=True)
class Factors(KFAC):
    """The request of the first of two passes over the data: the factors behind a basis. What it holds is told for both."""

    keep_rows: bool = True

    def collector(self, capture: Capture, transactional: bool) -> FactorsCollector:
        """See ``Request``."""
        return FactorsCollector(capture, transactional, self)


class FactorsCollector(KroneckerCollector):
    """The sums behind the factors; of those of the eigenvalues that come after, what they will take."""

    def __init__(self, capture: Capture, transactional: bool, asked: Factors) -> None:
        super().__init__(capture, transactional, asked)
        self._basis: dict[str, KroneckerBlock] = {}  # on no memory
        self._second = EigenCollector(capture, self._basis, transactional, asked.max_exact_dim)

    def explore(self, calls: list[Call]) -> None:
        """See ``BlockCollector``."""
        super().explore(calls)
        self._second.explore(calls)

    def holds(self, passes: int) -> list[Held]:
        """See ``BlockCollector``."""
        first = super().holds(passes)
        for name, sums in self._sums.items():
            if isinstance(sums, KroneckerSums):
                self._basis[name] = sums.blank(self._basis)
        return [_in_turn(*both) for both in zip(first, self._second.holds(passes), strict=True)]

    def cost(self, tracked: Tracked, form: Form, rows: Rows) -> Cost:
        """See ``BlockCollector``."""
        return super().cost(tracked, form, rows) + self._second.cost(tracked, form, rows)


def _in_turn(first: Held, second: Held) -> Held:
    """Two passes over the data: the second holds the result of the first, and instead of few rows a basis that is larger."""
    (alone,), (more,) = first.peaks, second.peaks
    peaks, scratch = (alone, first.result + more), first.scratch + second.scratch
    return replace(second, peaks=peaks, scratch=scratch, smaller=first.smaller)


@serialize.storable("ekfac")
class EKFACFisher(BlockFisher[EigenBlock | ExactBlock]):
    """Blocks ``(V (x) U) diag(values) (V (x) U)^T``, exact blocks of small parameters, the diagonal of the rest.

    U and V are the eigenvectors of the factors A and B of a ``KFACFisher``; ``values = sum_n w_n E_y[(V^T G_n U)^2] / sum_n w_n``,
    G_n the sample's gradient as a matrix ``[O, D]``: the diagonal of the Fisher in this basis, and of all diagonals in it the
    nearest to the Fisher in Frobenius norm. On the data of the factors their sum is the trace of the Fisher, exactly.

    Shapes:   vectors {parameter name: tensor shaped like the parameter}, or flat in ``names`` order; ``factors()`` are the
              basis's. Where fewer rows were seen than a third of a factor's columns, the basis is that of their span.
    Scale:    a mean over samples, as every Fisher's. ``damping`` is Tikhonov, ``F + damping I``, one number per block.
    Errors:   as ``KFACFisher``'s; ``+`` and ``all_reduce`` refuse other bases than the same, bit by bit.
    Numerics: eigenvectors in the model's precision, float32 or wider; float64 sums and arithmetic; directions in
              which the basis's factor has nothing, and the data next to nothing, count as zero.
    Source:   George et al. 2018 (arXiv:1806.03884), Proposition 3.1 and Algorithm 1.
    """

    block_types: ClassVar[Mapping[str, Any]] = {"eigen": EigenBlock, "exact": ExactBlock}
