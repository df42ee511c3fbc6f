# SPDX-License-Identifier: Apache-2.0
"""What may be asked of a run that the engine's sums are enough for: the diagonal, norms of sample gradients, their moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fisherfast.fisher.counts import Counts
from fisherfast.fisher.diagonal import DiagonalFisher
from fisherfast.fisher.engine import Engine
from fisherfast.fisher.moments import SampleMoments
from fisherfast.fisher.norms import SampleNorms
from fisherfast.fisher.structure import Structure


@dataclass(frozen=True)
class Diagonal(Structure):
    """Ask for the diagonal: ``ff.collect(model, ff.Diagonal())``. ``stderr=False`` leaves out what ``F.stderr`` needs."""

    stderr: bool = True
    squares = True

    @property
    def spread(self) -> bool:
        """See ``Structure``."""
        return self.stderr

    def result(self, engine: Engine, counts: Counts) -> DiagonalFisher:
        """See ``Structure``."""
        sums = {name: running.snapshot() for name, running in engine.squares.items()}
        return DiagonalFisher.from_accumulators(sums, spread=engine.values.spread() if self.stderr else None, **vars(counts))

    def restore(self, engine: Engine, before: DiagonalFisher) -> None:
        """See ``Structure``."""
        engine.restore_squares(before.accumulators())
        if self.stderr:
            engine.values.restore_spread(before.spread)


@dataclass(frozen=True)
class PerSampleNorm(Structure):
    """Ask for the squared norm of every sample's gradient, of the whole model and, ``by_layer=True``, of each layer.

    Asked for alone it needs no sums shaped like the parameters: a weight that sees one position per sample needs the norms of
    x and g only, and what other kernels add up goes to one scratch tensor.

    Shapes:   the result's ``squared_norms`` [num_samples], in the order in which the samples came.
    Scale:    ``E_y |s_n|^2``, per sample and unweighted; with drawn labels the mean over draws.
    Errors:   NonFiniteError as every run; a batch that does not complete adds no sample.
    Numerics: float32 within a sample's layer (float64 for float64 models), float64 from there on.
    Source:   Goodfellow 2015 (arXiv:1510.01799).
    """

    by_layer: bool = False

    @property
    def keeps(self) -> str:
        """See ``Structure``."""
        return "layers" if self.by_layer else "whole"

    def result(self, engine: Engine, counts: Counts) -> SampleNorms:
        """See ``Structure``."""
        values = engine.values.norms()
        return SampleNorms(
            None if values is None else values.sum(0) if engine.values.keeps == "layers" else values[0],
            dict(zip(engine.values.layers, values, strict=True)) if self.by_layer and values is not None else None,
            counts,
        )

    def restore(self, engine: Engine, before: SampleNorms) -> None:
        """See ``Structure``."""
        if self.by_layer:
            engine.values.restore_norms(torch.stack(list(before.by_layer().values())))
        elif engine.values.keeps == "whole":
            engine.values.restore_norms(before.squared_norms.unsqueeze(0))


@dataclass(frozen=True)
class Gradients(Structure):
    """What ``ff.collect(..., gradients=True)`` adds to what is asked for: the parameters' ``.grad``, and no result."""

    fills: str = "sum"


@dataclass(frozen=True)
class GradientMoments(Structure):
    """Ask for mean and variance of the sample gradients, and the gradient noise scale; see the result, ``SampleMoments``.

    Labels of the data or drawn ones. The exact Fisher has no sample gradients: its passes are columns of a square root of
    the output Hessian, whose squares mean something and whose sum does not.
    """

    squares, totals = True, True

    def check(self, fisher_type: str | None) -> None:
        """See ``Structure``."""
        if fisher_type == "exact":
            raise ValueError(
                "GradientMoments: fisher_type must be 'empirical' or 'mc', got 'exact'; its backward passes are columns of a square "
                "root, not gradients of labels. Over all labels the mean is zero and the second moment is ff.Diagonal()"
            )

    def result(self, engine: Engine, counts: Counts) -> SampleMoments:
        """See ``Structure``."""
        return SampleMoments(
            {name: running.snapshot() for name, running in engine.totals.items()},
            {name: running.snapshot() for name, running in engine.squares.items()},
            engine.squared_weights,
            counts,
        )

    def restore(self, engine: Engine, before: SampleMoments) -> None:
        """See ``Structure``."""
        engine.restore_squares(before.squares)
        engine.restore_totals(before.totals, before.squared_weights)
