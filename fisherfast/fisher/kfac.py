# SPDX-License-Identifier: Apache-2.0
"""KFAC: for every weight that multiplies one Kronecker block, for what is left its diagonal.

The block of a weight with inputs x and output gradients g is ``B (x) A``, ``A = sum_{n,t} w_n x x^T / sum_n w_n T_n`` and
``B = sum_{n,t} w_n g g^T / sum_n w_n``: one symmetric product each, of what the backward pass has at hand.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fisherfast import _checks
from fisherfast.accumulator import Accumulator
from fisherfast.capture.capture import Capture
from fisherfast.fisher import pooling, serialize
from fisherfast.fisher.blocks import given
from fisherfast.fisher.blocks.block_collector import BlockCollector
from fisherfast.fisher.blocks.block_fisher import BlockFisher, described
from fisherfast.fisher.blocks.exact import ExactBlock
from fisherfast.fisher.blocks.kronecker import KroneckerBlock, Place
from fisherfast.fisher.blocks.kronecker_sums import KroneckerSums
from fisherfast.fisher.blocks.reduced_sums import ReducedSums
from fisherfast.fisher.counts import Counts
from fisherfast.fisher.protocol import Damping, Provenance
from fisherfast.fisher.request import Request
from fisherfast.rules import Form


@dataclass(frozen=True)
class KFAC(Request["KFACFisher"]):
    """Ask for Kronecker factors: ``ff.collect(model, ff.KFAC())``, ``ff.fisher(model, data, structure="kfac")``.

    ``max_exact_dim``   Parameters that are not the weight of a product (a norm's scale, a class token) have no Kronecker form. Up to
                        this many entries D their full second-moment matrix ``[D, D]`` is kept, above it the diagonal.
    ``max_factor_dim``  The largest factor that is kept as a matrix. A larger output factor B (a vocabulary) is kept as its diagonal; a
                        larger input factor A is refused.
    ``sharing``         What one row of a factor is where a weight sees several positions of a sample: "expand", each position;
                        "reduce", the sample, with the mean of its inputs and the sum of its output gradients.
    ``keep_rows``       Keep the rows a factor was made of up to a third as many as its columns, so that EKFAC can take
                        eigenvectors from them, which is faster. They are not saved to files.
    """

    max_factor_dim: int = 16384
    max_exact_dim: int = 256
    sharing: str = "expand"
    keep_rows: bool = False

    def __post_init__(self) -> None:
        _checks.one_of("KFAC", "sharing", self.sharing, ("expand", "reduce"))
        _checks.integer("KFAC", "max_factor_dim", self.max_factor_dim, 1)
        _checks.integer("KFAC", "max_exact_dim", self.max_exact_dim, 0)

    def collector(self, capture: Capture, transactional: bool) -> KroneckerCollector:
        """See ``Request``."""
        return KroneckerCollector(capture, transactional, self)

    def result(self, source: KroneckerCollector, counts: Counts) -> KFACFisher:
        """See ``Request``."""
        blocks, diagonals = source.snapshot()
        covered = counts.coverage
        how = described({b: b.place.op if isinstance(b, KroneckerBlock) else covered[b.place.weight] for b in blocks})
        return KFACFisher(blocks, diagonals, counts.saying("diagonal", how), source.shapes)

    def restore(self, source: KroneckerCollector, before: KFACFisher) -> None:
        """See ``Request``."""
        source.restore(before.blocks, before.diagonals)


class KroneckerCollector(BlockCollector):
    """The sums behind a KFAC."""

    def __init__(self, capture: Capture, transactional: bool, asked: KFAC) -> None:
        super().__init__(capture, transactional, asked.max_exact_dim)
        self._asked, self.averages = asked, asked.sharing == "reduce"

    def new_block(self, place: Place, form: Form, weight: Tensor, made: Mapping[str, Any]) -> KroneckerSums:
        """See ``BlockCollector``."""
        kind = ReducedSums if self._asked.sharing == "reduce" else KroneckerSums
        leader = None if place.input_of is None else made[place.input_of]
        return kind(place, form, weight, self._asked.max_factor_dim, self._asked.keep_rows, leader)


@serialize.storable("kfac")
class KFACFisher(BlockFisher[KroneckerBlock | ExactBlock]):
    """Kronecker blocks ``B (x) A``, exact blocks of small parameters, the diagonal of the rest; blocks are independent of each other.

    ``A = sum_{n,t} w_n x x^T / sum_n w_n T_n`` and ``B = sum_{n,t} w_n g g^T / sum_n w_n`` ("expand"): T_n counts the positions
    that exist, w_n are the samples' weights (1 without). With "reduce" the rows are the samples' ``mean_t x`` and ``sum_t g``, and
    both sums are divided by ``sum_n w_n``. A bias joins its weight: A is ``[I + 1, I + 1]``, the bias last.

    Shapes:   vectors {parameter name: tensor shaped like the parameter}, or flat in ``names`` order.
    Scale:    the block is a mean over samples, as every Fisher's; exact for samples of one position of one input, an
              approximation otherwise. ``damping`` is Tikhonov, ``F + damping I``, one number per block.
    Errors:   ValueError, naming the entry, for vectors and dampings that do not fit, singular systems, and pooling of what was
              measured in different ways.
    Numerics: float64 sums and arithmetic; a factor has as many positive eigenvalues as its rows have independent columns, up to
              rounding in the precision they were multiplied in; the others count as zero.
    Source:   Martens & Grosse 2015 (arXiv:1503.05671); Grosse & Martens 2016 (arXiv:1602.01407) for convolutions; "expand":
              Eschenhagen et al. 2023 (arXiv:2311.00636).
    """

    block_types: ClassVar[Mapping[str, Any]] = {"kronecker": KroneckerBlock, "exact": ExactBlock}

    @classmethod
    def from_factors(
        cls,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        model: nn.Module | Mapping[str, Tensor],
        *,
        num_samples: int,
        diagonals: Mapping[str, Tensor] | None = None,
        exact: Mapping[str, Tensor] | None = None,
        rows: Mapping[str, float] | None = None,
        sharing: str = "expand",
        transposed: Collection[str] = (),
        num_positions: int | None = None,
        provenance: Provenance | None = None,
        coverage: Mapping[str, str] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> Self:
        """From factors computed elsewhere, ``{layer: (A, B)}`` as ``factors()`` gives them.

        ``model``, a module or ``{name: tensor}``, says which parameters there are; each must be in factors, ``exact`` or ``diagonals``.

        ``diagonals``   ``{name: mean of squared gradients}``, shaped like the parameter, of parameters that have no factors.
        ``exact``       ``{name: all second moments}`` of small ones, ``[D, D]`` of D numbers.
        ``rows``        Of how many rows x each A is the mean, samples times positions, under its name in ``factors``; if not said,
                        ``num_samples``. Pooling weighs with it.
        ``transposed``  The square weights that are stored ``[I, O]``, as Hugging Face's Conv1D; of others the sizes tell. A square one
                        beside a vector A is a table ``[V, O]``. Of heads ``[H, D, K]`` with D = H K those whose first axis is of the inputs.

        Shapes:   A ``[I, I]``, with a bias ``[I + 1, I + 1]``, its column last; B ``[O, O]``; groups are an axis before these, a vector is
                  a diagonal. A bias without a column in A is a parameter of its own.
        Scale:    A a mean over rows, B over samples, each with the gradient of its summed loss; see the class.
        Errors:   TypeError or ValueError, naming the entry, for what is not finite, symmetric and positive semidefinite up to
                  rounding, or does not fit the parameters, and for parameters of which nothing is given.
        Numerics: eigenvalues count as zero below the rounding of the coarser of the model's dtype and the factor's.
        """
        parameters = given.parameters_of(model)
        shapes = {name: tensor.shape for name, tensor in parameters.items()}
        counts = Counts.given("from_factors", shapes, num_samples, num_positions, provenance, coverage, aliases)
        blocks, sums = given.blocks_and_diagonals(
            parameters, counts.num_samples, factors, diagonals or {}, exact or {}, rows or {}, sharing, transposed
        )
        return cls(blocks, sums, counts, shapes)

    def factored(self, damping: Damping) -> FactoredKFAC:
        """The Fisher with damping in its factors, ``(B + sqrt(d) / pi I) (x) (A + pi sqrt(d) I)``, ``pi^2 = (tr A / dim A) / (tr B / dim B)``.

        What an optimizer inverts: unlike ``F + d I`` it is a product, and so is its inverse. ``F.factored(d).logdet()`` is its
        log-determinant. Exact blocks and diagonals are ``F + d I``.

        Errors:   ValueError for a damping that does not fit.
        Source:   Martens & Grosse 2015 (arXiv:1503.05671), section 6.3.
        """
        dampings = self._damping_of("factored", damping)
        blocks = [block.factored(dampings[block.place.weight]) for block in self.blocks]
        diagonals = {name: Accumulator(self._mean(name) + dampings[name], 1.0) for name in self.diagonals}
        return FactoredKFAC(blocks, diagonals, self._counts, self.shapes)

    def inverse(self, damping: Damping, *, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Tensor, Tensor]]:
        """``{layer: (A^-1, B^-1)}`` of ``factored(damping)``, as ``factors()`` gives A and B; for a vector see ``solve``.

        The keys are layers (``"0"``), not parameters (``"0.weight"``): a bias is in A of its layer, as a last column of ones. Where a layer has
        several blocks, they are the names of the weights or their parts.

        Errors:   ValueError, naming the layer, if a factor is singular.
        """
        products, dampings = {}, self._damping_of("inverse", damping)
        for block in self.factored(damping).blocks:
            if isinstance(block, KroneckerBlock):
                try:
                    products[block.place] = block.inverse(dtype, damped=dampings[block.place.weight] > 0)
                except torch.linalg.LinAlgError as error:
                    raise ValueError(
                        f"inverse: factors must be regular, got a singular one of {block.place.weight!r}; pass a larger damping"
                    ) from error
        return self._by_layer(products)


class FactoredKFAC(KFACFisher):
    """A ``KFACFisher`` whose factors include the damping; all methods answer for the damped matrix.

    It cannot be pooled or saved, because it no longer holds sums over samples.
    """

    def __add__(self, other: Any) -> Any:
        """Refused. Errors: ValueError."""
        raise ValueError("+: both Fishers must be measurements, got one with damping in its factors; pool before F.factored")

    def all_reduce(self, group: Any = None) -> Any:
        """Refused, on every rank. Errors: ValueError."""
        pooling.check_structure("damped factors", group, self._device)
        raise ValueError("all_reduce: F must be a measurement, got one with damping in its factors; pool before F.factored")

    def state(self) -> serialize.State:
        """Refused. Errors: ValueError."""
        raise ValueError(
            "save: F must be a measurement, got one with damping in its factors; save F, and damp it when it is read"
        )
