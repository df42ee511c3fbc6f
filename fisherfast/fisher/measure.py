# SPDX-License-Identifier: Apache-2.0
"""``fisher``: the Fisher of a model on a data set, in one call."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from fisherfast.batches import Batch, Output
from fisherfast.calls import Call
from fisherfast.collector import Samples
from fisherfast.dependence import check_first, check_independent, precision, same_but_rounding
from fisherfast.fallback import SampleGradients
from fisherfast.fisher import _arguments
from fisherfast.fisher.block_collector import BlockCollector
from fisherfast.fisher.checkpoint import Checkpoint, digest, digest_of_function, digest_of_weights
from fisherfast.fisher.diagonal import Diagonal
from fisherfast.fisher.kfac import KFACFisher
from fisherfast.fisher.labelling import Labelling
from fisherfast.fisher.parse import Requests, factors_first, needs_basis, parse, with_basis
from fisherfast.fisher.request import Request
from fisherfast.fisher.run import Explored, Run, model_name
from fisherfast.layout import PROBED
from fisherfast.likelihood import Likelihood, Predictions
from fisherfast.locator import NO_AXIS, mixing
from fisherfast.passes import Pass, check_loss_scale
from fisherfast.readings import SameReadings
from fisherfast.tracked import Bare, Tracked
from fisherfast.train_mode import refuse_train_mode, unwrapped


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
    ``checkpoint``: a file written every minute, on any error and at the end; if it exists, the run resumes after its
    batches and ends with the same numbers up to rounding (every batch is then staged, which takes one more tensor per parameter).
    The data must yield the same batches again: without shuffling or random augmentation.

    Shapes:   the output has the sample axis first; see the likelihoods for the rest.
    Scale:    per sample, mean over samples; independent of loss reduction, batch size and number of devices.
    Errors:   ValueError, TypeError or NonFiniteError for what cannot be measured, naming parameter or batch; any error has
              ``.fisher`` with what was accumulated before, and Ctrl-C raises ``ff.Interrupted`` with it. MemoryError, without
              one and before a sum is allocated, if the sums and the result do not fit: ``ff.plan`` tells beforehand.
    Numerics: gradients in the model's precision, squares in float32 or wider, sums over samples with 48 bits or more. Labels are a
              function of (seed, sample number, position, draw) alone.
    Source:   Achille, Paolini, Soatto 2019 (arXiv:1905.12213), Preliminaries; columns of the exact Fisher: docs/semantics.md.
    """
    structures = parse("fisher", structure)
    labelling = Labelling.of("fisher", fisher_type, likelihood, draws, seed, max_passes)
    sample_offset = _arguments.whole("fisher", "sample_offset", sample_offset)
    check_loss_scale("fisher", loss_scale)
    refuse_train_mode(model)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"fisher: checkpoint must be a file in a folder that exists, got {path}; make the folder first")

    def measurement(structures: tuple[Request, ...], known: Explored | None = None) -> Measurement:
        transactional = checkpoint is not None
        return Measurement(model, structures, labelling, sample_offset, output, loss_scale, allow_missing, transactional, known)

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
    corrected = measurement(tuple(with_basis(asked, basis) for asked in structures), known)
    try:
        return corrected.over(twice.read(corrected.batches(data, progress, "Fisher")), None)
    except (Exception, KeyboardInterrupt) as error:
        if not corrected.run.num_samples:
            error.fisher = basis  # type: ignore[union-attr]
            error.add_note("fisherfast: no batch of the second pass counts; .fisher holds the factors of the first")
        raise


class Measurement:
    """One call of ``fisher``: feeds batches, turns the likelihood into passes, and loops over samples where it must."""

    def __init__(
        self,
        model: nn.Module,
        structures: tuple[Request, ...],
        labelling: Labelling,
        sample_offset: int,
        output: Output,
        loss_scale: float,
        allow_missing: bool,
        transactional: bool,
        known: Explored | None = None,
    ) -> None:
        self.model, self.labelling = unwrapped(model), labelling
        labelling.check_model(self.model)
        self.sample_offset, self.output, self.loss_scale = sample_offset, output, loss_scale
        self.run = Run(model, structures, labelling.provenance(model_name(model)), allow_missing, transactional, known)
        self.capture = self.run.capture
        self._sample_gradients = SampleGradients(model, output)
        self.run.vmap_problem = None
        self._explored = self._probed = known is not None

    # -- the data set

    def batches(self, data: Iterable[Any], progress: bool, what: str) -> Iterator[Batch]:
        """What the data set yields, on the model's device. Errors: TypeError."""
        if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
            raise TypeError(
                f"fisher: data must be an iterable of batches, got {type(data).__name__}; pass a DataLoader or a list"
            )
        for item in _shown(data, progress, what):
            yield Batch.of(item, self.capture.device, self.model)

    def over(self, batches: Iterable[Batch], path: Path | None) -> tuple[Any, ...]:
        """Measure all of them; ``path`` is the checkpoint's."""
        checkpoint = None if path is None else Checkpoint(path, self.run, self._settings())
        with self.run.rescue():
            try:
                self._add_all(batches, checkpoint)
            except BaseException as error:
                if checkpoint is not None:
                    checkpoint.end(error)
                raise
            if checkpoint is not None:
                checkpoint.end()
            self.run.warn_of_underflow()
            self.run.warn_of_no_labels()
        return self.run.results()

    def _add_all(self, batches: Iterable[Batch], checkpoint: Checkpoint | None) -> None:
        for batch in batches:
            if checkpoint is not None and checkpoint.holds(batch):
                self._look(batch)  # as the run did before it stopped
                continue
            self.batch(batch)
            if checkpoint is not None:
                checkpoint.write_if_due()
        if checkpoint is not None:
            checkpoint.check_all_read()
        if not self.run.num_samples:
            raise ValueError("fisher: data must yield at least one batch, got none; was the iterator used up?")

    def _settings(self) -> dict[str, str]:
        """What a checkpoint must agree in, besides the provenance."""
        asked = self.run.structures
        return {
            "sample_offset": str(self.sample_offset),
            "weights": digest_of_weights(self.model),
            "parameters": digest(" ".join(sorted(self.capture.tracked))),
            **self.labelling.counting(),
            **(
                {}
                if self.output is None
                else {"output": self.output if isinstance(self.output, str) else digest_of_function(self.output)}
            ),
            **({} if asked == (Diagonal(),) else {"structure": ", ".join(map(repr, asked))}),
        }

    # -- one batch

    def batch(self, batch: Batch) -> None:
        """Add one batch."""
        self.labelling.check(batch)
        self.capture.check_parameters()
        self._look(batch)
        output, predictions = self.forward(batch)
        count = self.labelling.num_passes(predictions)
        if predictions.values.grad_fn is None:
            raise ValueError(
                "model: the output must depend on the parameters through autograd, got one without a graph; is grad disabled?"
            )
        padded = predictions.num_positions < 0.8 * predictions.counted.numel()
        masks = tuple({id(mask): mask for mask in (batch.mask, batch.output_mask) if mask is not None}.values())
        with self.run.transaction(Samples(batch.N, count, batch.weight, padded, masks), predictions.num_positions):
            every = batch.weight is None and all(bool(mask.all()) for mask in masks)
            detached = predictions.detached()
            support = partial(self._support, detached)
            positions = None if batch.mask is None or batch.mask.dim() != 2 else batch.mask.shape[1]
            passes = self._passes(detached)
            self.run.passes.run(predictions.values, passes, count, every=every, positions=positions, support=support)
            self._fall_back(batch, output, predictions)

    def forward(self, batch: Batch, exploring: bool = False, first: int = 0) -> tuple[Tensor, Predictions]:
        """Run the model on a batch whose first sample is number ``first`` of the current one: its output, and what that says."""
        with torch.enable_grad():
            output = self._output_of(batch, exploring)
            if self.capture.doubtful and not exploring:
                self._check_expanded(batch, output)
            predictions = self.labelling.predictions(batch, output, self.sample_offset + self.run.num_samples + first)
        if not self.labelling.says_something(predictions):
            self.run.raise_not_finite(predictions.values, "the model's output")
        return output, predictions

    def _check_expanded(self, batch: Batch, output: Tensor) -> None:
        """A use was given a sample axis whose first axis is as long as the batch, and may hold the samples: compare without."""
        # The same shapes and mode of autograd: the same kernels and rounding.
        alone = batch.copied().feed(self.model, self.output)
        if not same_but_rounding(alone, output, self._precision(output)):
            raise ValueError(
                f"model: what has no sample axis in one batch must not have one in another of as many positions as samples, got {batch.N} "
                "of both; give batches of another size"
            )

    def _precision(self, values: Tensor) -> float:
        return precision(self.model, values)

    def _output_of(self, batch: Batch, exploring: bool) -> Tensor:
        self.capture.begin(exploring, batch.N, batch.offsets)
        fed = batch.copied() if exploring or self.run.writes_inputs else batch  # they are fed again
        before = fed.versions()
        with self.capture, torch.enable_grad():
            output = fed.feed(self.model, self.output)
        if fed.versions() != before:
            self.run.writes_inputs = True
            if fed is batch and self.run.looped:
                raise ValueError(
                    "model: must not begin in a later batch to write into its inputs, which the fallback reads again; have it clone them"
                )
        return output

    def _passes(self, predictions: Predictions) -> Iterator[Pass]:
        for one in self.labelling.passes(predictions):
            yield Pass(one.cotangent * self.loss_scale, one.scale, self.loss_scale) if self.loss_scale != 1 else one

    def _support(self, predictions: Predictions) -> Pass:
        """A pass that gives a gradient to all that any pass of the batch gives one, and is no larger than they."""
        cotangent = _noise(predictions.values)
        largest = cotangent.abs().amax().clamp_min(1e-4) * predictions.values[0].numel() ** 0.5
        return Pass(cotangent / largest * predictions.everywhere() * self.loss_scale, loss_scale=self.loss_scale)

    # -- finding out how the model uses its parameters

    def _look(self, batch: Batch) -> None:
        """Explore the first batch, and the first of several samples."""
        if not self._explored or (not self._probed and batch.N > 1):
            self.explore(batch)

    def explore(self, batch: Batch) -> None:
        """On a few samples: what is reached, in which forms, where the sample axis is; expands or loops where it has to."""
        few = batch.cut(0, min(batch.N, PROBED))
        try:
            values, noted = self._values(few), few
        except Exception as error:
            if few.N < batch.N:
                error.add_note(
                    f"fisherfast: these were the batch's first {few.N} samples. Inputs whose first axis is as long as the batch must hold "
                    "its samples; pass others as [1, ...], or expanded to [N, ...]"
                )
            raise
        if not self._explored:
            self.run.note_uses(values)
            if few.N < batch.N and self.run.passes.reached(values) < self.capture.tracked.keys():
                everything, noted = self._values(batch), batch  # an expert may be none of the few samples'
                self.run.check_reached(everything)
                self.run.note_uses(everything)
            else:
                self.run.check_reached(values)
            calls = [call for call, _ in self.capture.calls(values)]
            self.run.passes.route_mixed_forms(calls)
            self._explored = True
            if few.N == 1 and few.offsets is None and _may_hide_a_table(calls):
                alone = values.detach()
                del values, calls  # with their graph: a sample may be all that fits
                self._look_twice(few, alone)
                return
        if few.N > 1:
            mixing = self._probe(values)
            if mixing:
                self._resolve(few, values, mixing, noted)
            self._probed = True

    def _values(self, few: Batch) -> Tensor:
        return self.forward(few, exploring=True)[1].values

    def _probe(self, values: Tensor) -> set[str]:
        return mixing(self.run.passes.probe(values, _noise(values)), self.capture.tracked, self.capture.chosen(values))

    def _look_twice(self, one: Batch, values: Tensor) -> None:
        """A sample by itself does not show what has no sample axis, which decides about its block: in a batch of two copies it does.

        A copy of the model takes that batch, so that what it may keep of it is lost. A model that takes no such batch is left as it is.
        """
        if not any(isinstance(collector, BlockCollector) for collector in self.run.collectors):
            return
        model, two = self.model, one.repeated(0, 2)
        try:
            self.model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
            twice = self._values(two)
            check_first(values, twice, self._precision(twice))
            if mixing := self._probe(twice):
                self._resolve(two, twice, mixing, one)
        except Exception:  # the model is anybody's, and may say anything to such a batch
            pass
        finally:
            self.model = model

    def _resolve(self, few: Batch, values: Tensor, mixing: set[str], noted: Batch) -> None:
        """Parameters without a sample axis where they are used: expand them there, else follow them to where a sample comes in,
        else the fallback. ``noted``: the samples whose uses the collectors were shown.
        """
        hint = f"; rows that mix samples reach {sorted(mixing)[:3]}"
        check_independent(self._values, few, values, self._precision(values), hint)
        if few.offsets is None:  # packed samples have no axis to expand to
            mixing = self._not_expanded(few, values, mixing)
        further = False
        while mixing and self.capture.follow_further(values, mixing, NO_AXIS):
            values, further = self._values(few), True
            mixing = self._probe(values)
        followed = self.capture.followed(values)
        for name in mixing:
            followed[name].give_up(NO_AXIS)
        if further:  # their uses are others now
            self.run.note_uses(values if noted is few else self._values(noted))

    def _not_expanded(self, few: Batch, values: Tensor, mixing: set[str]) -> set[str]:
        followed = self.capture.followed(values)
        tracked = [followed[name] for name in mixing]
        uses = [(call, use) for call, _ in self.capture.calls(values) for use in call.uses]
        tables = {use.tracked.name for _, use in uses if use.form.op == "embedding_sq_"}  # of which few rows are looked up
        bare = {one.name: {Bare.of(call.shape) for call, use in uses if use.tracked is one} for one in tracked}
        for one in tracked:
            can = not one.in_chain and (one.name in tables or self.capture.only_broadcast(values, one.name))
            one.expand = next(iter(bare[one.name])) if can and len(bare[one.name]) == 1 else None
        try:
            expanded = self._values(few)
            mixing = self._probe(expanded) if same_but_rounding(expanded, values, self._precision(values)) else mixing
        except Exception:  # the model is anybody's, and may say anything to such a shape: this use cannot be expanded
            pass
        for one in tracked:
            one.expand = None if one.name in mixing else one.expand
        return mixing

    # -- the fallback, for what no rule covers. Labels and columns come from the whole batch's output, so that every parameter
    # sees the same ones.

    def _fall_back(self, batch: Batch, output: Tensor, predictions: Predictions) -> None:
        tracked = [self.capture.tracked[name] for name in self.run.looped]
        if tracked and not self._by_vmap(batch, output, predictions, tracked):
            with self.run.timed("loop"):
                self._loop(batch, output, predictions.detached(), tracked)

    def _by_vmap(self, batch: Batch, output: Tensor, predictions: Predictions, tracked: list[Tracked]) -> bool:
        """Hand over several samples' gradients at a time; False, with nothing handed over, if that cannot be done."""
        if batch.offsets is not None:
            self.run.vmap_problem = "vmap cannot take packed samples apart"
            return False
        if batch.nested:
            self.run.vmap_problem = "vmap takes no nested inputs apart"
            return False
        with self.run.timed("vmap"):
            for number, one in enumerate(self._passes(predictions.detached())):
                (cotangent,) = torch.autograd.grad(predictions.values, output, one.cotangent, retain_graph=True)
                chunks = self._sample_gradients(
                    batch, cotangent, tracked, partial(self._first, batch, output, cotangent, tracked)
                )
                if chunks is None:
                    self.run.vmap_problem = self._sample_gradients.problem
                    return False
                for first, gradients in chunks:
                    for which in tracked:
                        unscaled = one.unscaled(gradients[which.name])
                        self.run.passes.hand_over_gradients(which, unscaled, first, one.scale, number)
        return True

    def _first(self, batch: Batch, output: Tensor, cotangent: Tensor, tracked: list[Tracked]) -> dict[str, Tensor]:
        """The first sample's gradients by autograd."""
        alone = self._output_of(batch.cut(0, 1), exploring=True)
        check_first(alone, output, self._precision(output))
        gradients = self.run.passes.gradients(alone, tracked, cotangent[:1])
        return {which.name: gradient for which, gradient in zip(tracked, gradients, strict=True)}

    def _loop(self, batch: Batch, output: Tensor, predictions: Predictions, tracked: list[Tracked]) -> None:
        if batch.offsets is None:
            check_first(self._output_of(batch.cut(0, 1), exploring=False), output, self._precision(output))
        for n in range(batch.N):
            values = self.forward(batch.cut(n, n + 1), exploring=True, first=n)[1].values
            passes = self._passes(predictions.one(n))
            if batch.offsets is not None:  # a packed sample by itself is as long as it is, not as the longest
                passes = (replace(one, cotangent=one.cotangent[:, : values.shape[1]]) for one in passes)
            self.run.passes.loop(values, tracked, n, passes)


def _may_hide_a_table(calls: Sequence[Call]) -> bool:
    """Whether a use in a batch of one sample may be of none: it has no axis of one, or there is another of the same parameter, of samples."""
    uses = Counter((use.tracked.name, use.form.op) for call in calls for use in call.uses)
    return any(call.shape[:1] != (1,) for call in calls) or max(uses.values(), default=0) > 1


def _noise(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape, generator=generator, device="cpu").to(like.device, like.dtype)


def _length(data: Iterable[Any]) -> int | None:
    """Batches, where that is known: a DataLoader has a length that fails for a data set that has none."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:
        return None


def _shown(data: Iterable[Any], progress: bool, what: str) -> Iterator[Any]:
    """The batches, with a progress bar on a terminal."""
    if not progress:
        yield from data
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    total = _length(data)
    console = Console(stderr=True)  # what the caller prints stays as it is
    with Progress(*columns, transient=True, console=console, disable=not (console.is_terminal or console.is_jupyter)) as bar:
        task = bar.add_task(what, total=total)
        for item in data:
            yield item
            bar.advance(task)
