# SPDX-License-Identifier: Apache-2.0
"""``fisher``: the Fisher of a model on a data set, in one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, overload

from torch import nn

from fisherfast.capture.eager import uncompiled
from fisherfast.capture.refusals import refuse_train_mode
from fisherfast.data.batches import Output
from fisherfast.data.readings import SameReadings
from fisherfast.fisher.diagonal import DiagonalFisher
from fisherfast.fisher.ekfac import EKFACFisher
from fisherfast.fisher.gram import GramFisher
from fisherfast.fisher.kfac import KFACFisher
from fisherfast.fisher.parse import Requests, factors_first, needs_basis, parse, with_basis
from fisherfast.fisher.request import Request, Result
from fisherfast.fisher.run.labelling import Labelling
from fisherfast.fisher.run.measurement import Measurement
from fisherfast.fisher.run.run import Explored
from fisherfast.fisher.run.settings import Settings
from fisherfast.likelihood import Likelihood


class _Options(TypedDict, total=False):
    fisher_type: str
    likelihood: str | Likelihood
    draws: int
    seed: int
    sample_offset: int
    max_passes: int
    output: Output
    loss_scale: float
    allow_missing: bool
    checkpoint: str | os.PathLike[str] | None
    progress: bool


_Data: TypeAlias = Iterable[Any]


@overload
def fisher(
    model: nn.Module, data: _Data, structure: Literal["diagonal"] = ..., *more: Any, **options: Unpack[_Options]
) -> DiagonalFisher: ...
@overload
def fisher(model: nn.Module, data: _Data, structure: Literal["kfac"], *more: Any, **options: Unpack[_Options]) -> KFACFisher: ...
@overload
def fisher(
    model: nn.Module, data: _Data, structure: Literal["ekfac"], *more: Any, **options: Unpack[_Options]
) -> EKFACFisher: ...
@overload
def fisher(model: nn.Module, data: _Data, structure: Literal["gram"], *more: Any, **options: Unpack[_Options]) -> GramFisher: ...
@overload
def fisher(model: nn.Module, data: _Data, structure: Request[Result], *more: Any, **options: Unpack[_Options]) -> Result: ...
@overload
def fisher(model: nn.Module, data: _Data, structure: Requests, *more: Any, **options: Unpack[_Options]) -> Any: ...
@uncompiled  # type: ignore[misc]  # what is *more above has names here
def fisher(
    model: nn.Module,
    data: Iterable[Any],
    structure: Requests = "diagonal",
    fisher_type: str = "mc",
    likelihood: str | Likelihood = "categorical",
    *,
    draws: int = 1,
    seed: int = 0,
    sample_offset: int = 0,
    max_passes: int = 1000,
    output: Output = None,
    loss_scale: float = 1.0,
    allow_missing: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Any:
    """``F = (1/N) sum_n E_y[s_n s_n^T]``, ``s_n = grad_w log p_w(y | x_n)``, for every parameter that asks for a gradient.

    ``data`` yields ``(inputs, targets)``, ``(inputs, None)`` or dict batches (Hugging Face); weights of samples are a third
    entry, or the dict's ``"sample_weight"``. A tuple of inputs is ``model(*x)``, a dict ``model(**x)``; the output is a tensor,
    has ``.logits``, or is what ``output`` picks (a name or a function). ``fisher_type``: "mc" draws ``draws`` labels per sample
    from the model; "exact" takes the expectation, one backward pass per column of a square root of the output Hessian;
    "empirical" uses the labels of the data, which is *not* the Fisher. ``likelihood``: "categorical", "causal_lm", "bernoulli",
    "gaussian" or an object. ``structure``: "diagonal" gives a ``DiagonalFisher``, "kfac" a ``KFACFisher``, "ekfac" an
    ``EKFACFisher`` (the data are read twice and must be the same both times), "gram" a ``GramFisher``, exact, for small models;
    a tuple of requests, ``(ff.Diagonal(), ff.PerSampleNorm(), ff.GradientMoments())``, gives their results in that order, from
    the same passes.
    ``loss_scale`` multiplies the gradients on their way through a float16 model and is taken out of their squares.
    ``sample_offset`` is the number of the first sample: give each rank its own, so that no two share random numbers.
    ``checkpoint``: a file written every minute, on any error (Ctrl-C and SystemExit included) and at the end; if it exists, the
    run resumes after its batches and ends with the same numbers up to rounding (every batch is then staged, which takes one more
    tensor per parameter). The data must yield the same batches again: without shuffling or random augmentation. SIGTERM and SIGKILL
    write nothing, unless a handler of yours turns SIGTERM into ``SystemExit`` or ``KeyboardInterrupt``.

    Shapes:   the output has the sample axis first; see the likelihoods for the rest.
    Scale:    per sample, mean over samples; independent of loss reduction, batch size and number of devices.
    Errors:   ValueError, TypeError or NonFiniteError for what cannot be measured, naming parameter or batch. Once the data are
              being read, every ``Exception`` and Ctrl-C (``ff.Interrupted``) have ``.fisher``, the result of the batches before.
              Two errors carry none: one that interrupts the counting of a batch, and the MemoryError for sums and a result that do
              not fit, raised before a sum is allocated (``ff.plan`` predicts it).
    Numerics: gradients in the model's precision, squares in float32 or wider, sums over samples with 48 bits or more. Labels are a
              function of (seed, sample number, position, draw) alone.
    Source:   Achille, Paolini, Soatto 2019 (arXiv:1905.12213), Preliminaries; columns of the exact Fisher: docs/semantics.md.
    """
    structures = parse("fisher", structure)
    labelling = Labelling.of("fisher", fisher_type, likelihood, draws, seed, max_passes)
    settings = Settings.of(labelling, sample_offset=sample_offset, output=output, loss_scale=loss_scale)
    refuse_train_mode(model)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"fisher: checkpoint must be a file in a folder that exists, got {path}; make the folder first")
    measurement = partial(Measurement, model, settings=settings, allow_missing=allow_missing, transactional=path is not None)
    if not any(map(needs_basis, structures)):
        once = measurement(structures)
        results = once.over(once.batches(data, progress, "Fisher"), path)
    elif path is None:
        results = _in_two_passes(measurement, structures, data, progress)
    else:
        raise ValueError(
            "fisher: checkpoint must be None for 'ekfac', which reads the data twice, got a path; measure 'kfac' with a "
            "checkpoint, then (ff.EKFAC(basis=kfac),) with another"
        )
    return results if isinstance(structure, tuple) else results[0]


def _in_two_passes(
    measurement: Callable[..., Measurement], structures: tuple[Request, ...], data: Iterable[Any], progress: bool
) -> tuple[Any, ...]:
    """The results of structures some of which need a basis: a first pass over the data finds it."""
    first = {factors_first(asked) for asked in structures if needs_basis(asked)}
    if len(first) > 1:
        raise ValueError(
            "fisher: EKFACs of one run must have one basis, got different max_factor_dim or max_exact_dim; give each a run of its own"
        )
    twice = SameReadings(data, "fisher", "in both passes", "or measure KFAC and then ff.collect(model, ff.EKFAC(basis=kfac))")

    def first_pass() -> tuple[KFACFisher, Explored]:  # whose sums are gone when it returns
        factors = measurement(tuple(first))
        (basis,) = factors.over(twice.read(factors.batches(data, progress, "Factors")), None)
        return basis, factors.run.explored

    basis, known = first_pass()
    corrected = measurement(tuple(with_basis(asked, basis) for asked in structures), known=known)
    try:
        return corrected.over(twice.read(corrected.batches(data, progress, "Fisher")), None)
    except (Exception, KeyboardInterrupt) as error:
        if not corrected.run.tally.samples:
            error.fisher = basis  # type: ignore[union-attr]
            error.add_note("fisherfast: no batch of the second pass counts; .fisher holds the factors of the first")
        raise
