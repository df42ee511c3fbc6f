# SPDX-License-Identifier: Apache-2.0
"""``collect``: gather a Fisher around your own forward and backward passes."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fisherfast import _checks
from fisherfast._warning import warn
from fisherfast.capture.backward import Pass
from fisherfast.capture.calls import graph
from fisherfast.capture.collector import Samples
from fisherfast.capture.parameters import unwrapped
from fisherfast.capture.refusals import refuse_train_mode
from fisherfast.capture.running import InputShapes
from fisherfast.fisher.parse import parse
from fisherfast.fisher.protocol import Provenance
from fisherfast.fisher.request import Request
from fisherfast.fisher.run import loss_vector
from fisherfast.fisher.run.labelling import known_type
from fisherfast.fisher.run.routing import Routing
from fisherfast.fisher.run.run import Interrupted, Run, model_name
from fisherfast.likelihood import Likelihood, resolve, stored_name


class collect:
    """Gather statistics while you run the model: ``with collect(model, Diagonal()) as stats: stats.backward(losses)``.

    Example::

        with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
            for x, y in loader:
                stats.backward(cross_entropy(model(x), y, reduction="none"))
        fisher = stats.result()

    Shapes:   ``stats.backward`` takes the vector ``[N]`` of negative log-likelihoods, one per sample: for a sequence the sum
              over its positions. A first one that is several times as long as the model's inputs is warned of.
    Scale:    the result is a mean over samples; the loss vector must not be averaged over anything.
    Errors:   ValueError for a loss that is not such a vector (two mistakes cannot be told from one: a mean of shape ``[1]``, and
              losses that were already divided by N), for parameters the loss does not depend on (unless
              ``allow_missing=True``), for dropout or batch statistics in train mode; NonFiniteError (``err.fisher`` keeps
              what came before) for NaN or infinity; MemoryError, at the first loss, if the sums and the result do not fit.
    Numerics: as the ops; sums over samples with 48 bits or more (``accumulator.RunningSum``).
    Source:   the empirical Fisher if the labels are the data's; the Fisher if you drew them from the model: say which with
              ``fisher_type``. It and ``likelihood`` are recorded, not checked; results pool with
              those of ``ff.fisher`` where both are the same, but for KFAC of a table without a sample axis where it is used
              (GPT-2's ``wpe``): ``ff.fisher``, which runs the model itself, expands it and gives it a Kronecker block; here it
              has an exact block or its diagonal.

    Inside the block the weights are frozen where they are used: ``.grad``, ``requires_grad``, hooks and modes of the model
    are not touched. With ``gradients=True`` each ``stats.backward(losses)`` adds to ``.grad`` what ``losses.sum().backward()``
    would to the model's parameters (``reduction="mean"``: ``losses.mean()``), from the same products, once the batch is complete: a
    training step that measures on its way. Where the first loss does not reach a parameter (``allow_missing=True``) later ones do not measure it,
    and its ``.grad`` is autograd's. Hooks of parameters do not run, gradients of ranks are not averaged, those of embeddings are dense and not
    divided by frequency. ``loss_scale`` multiplies the gradients on their way through a float16 model and is taken out of their
    squares; the loss itself is not scaled. A forward pass without a backward pass counts for nothing; several backward passes through one
    forward pass (``retain_graph=True``) are draws: they are averaged, and their samples counted once; every batch must have as many.
    Padded sequences: give ``stats.backward(losses, mask=attention_mask)``, by which KFAC leaves the padding out, as ``ff.fisher`` does.
    ``result()`` may be asked for at any time and takes over the run's buffers; continuing allocates new ones of the same size.
    """

    def __init__(
        self,
        model: nn.Module,
        *structures: str | Request,
        fisher_type: str = "empirical",
        likelihood: str | Likelihood | None = None,
        gradients: bool = False,
        reduction: str = "sum",
        loss_scale: float = 1.0,
        allow_missing: bool = False,
    ) -> None:
        fisher_type = known_type("collect", fisher_type)
        name = None if likelihood is None else stored_name(resolve(likelihood), fisher_type)
        if not structures:
            raise ValueError("collect: must be given what to collect, got nothing; for example collect(model, ff.Diagonal())")
        asked = parse("collect", structures)
        if reduction not in ("sum", "mean"):
            raise ValueError(
                f"collect: reduction must be 'sum' or 'mean', what .grad is filled with the gradient of, got {reduction!r}"
            )
        self._loss_scale = _checks.positive("collect", "loss_scale", loss_scale, "a power of two rounds nothing")
        refuse_train_mode(model)
        if reduction != "sum" and not gradients:
            raise ValueError(
                f"collect: reduction must come with gradients=True, got {reduction!r} without it; pass gradients=True"
            )
        if gradients and isinstance(model, nn.parallel.DistributedDataParallel):
            warn("collect: gradients=True fills .grad with this rank's gradients; all_reduce them before the optimizer's step")
        if isinstance(model, nn.parallel.DistributedDataParallel) and model.static_graph:
            warn(
                "collect: a DistributedDataParallel model with static_graph=True must have taken an ordinary step before, or torch averages no "
                "later gradients; run model.module in the block otherwise"
            )
        self._fills, self._averages = gradients, reduction == "mean"
        provenance = Provenance(fisher_type, name, draws=None, model=model_name(model))
        self._run = Run(model, asked, provenance, allow_missing, fills=reduction if gradients else None)
        self._run.capture.mode.input_shapes = InputShapes(unwrapped(model))  # until the first loss
        self._routing = Routing(self._run)
        self._told_of_a_part = False
        # To the engine's sums samples without a loss add nothing; a factor of all rows counts them.
        self._only_rows_with_loss = all(source is self._run.engine for source in self._run.sources)

    def __enter__(self) -> collect:
        self._run.capture.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._run.capture.__exit__(kind, error, trace)
        if error is None:
            with self._run.rescue():
                self._run.covered.warn_of_underflow()
        elif isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted):
            raise self._run.interrupted(error) from error
        elif isinstance(error, Exception) and not hasattr(error, "fisher"):
            self._run.attach(error)

    def backward(self, loss: Tensor, retain_graph: bool = False, *, mask: Tensor | None = None) -> None:
        """Back-propagate the vector of per-sample losses ``[N]`` and add what its samples contribute.

        ``mask`` ``[N, L]``, as an attention mask: which positions of each sequence exist. KFAC's factors are means over these; all, unless said.
        """
        run, capture = self._run, self._run.capture
        with torch._C.DisableTorchFunction(), run.rescue():  # the capture, still active, would look at each line below
            capture.check_parameters()
            loss_vector.check(loss)
            N = loss.shape[0]
            positions = None if mask is None else self._positions(mask, N)
            exists = () if positions is None else (positions,)
            samples = Samples(N, exists=exists, mask=positions, sparse=positions is not None and not bool(positions.all()))
            if not bool(loss.detach().isfinite().all()):
                run.raise_not_finite(loss, "the loss")
            if capture.mode.input_shapes is not None:
                loss_vector.warn_of_length(loss, capture.mode.input_shapes.shapes)
                capture.mode.input_shapes = None
            uses = capture.read(loss)
            one = self._pass(torch.ones_like(loss))
            self._routing.look(uses, one)
            matters = not self._only_rows_with_loss or any(call.counted for call in uses.calls)
            self._told_of_a_part = self._told_of_a_part or (matters and loss_vector.warn_of_part(loss))
            if self._fills and not run.tally.batches:
                loss_vector.warn_of_others(loss, capture.tracked)
            if self._fills and run.engine is not None:
                sources = {source.name for use in uses.all for source in use.tracked.sources}
                run.engine.reached = run.passes.backward.reached(loss) | sources
            late = self._of_missing(loss) if self._fills and run.covered.missing_parameters else []
            with run.transaction(samples, positions=N):
                looped = bool(run.covered.looped)
                run.passes.run(uses, [one], samples, keep=looped or retain_graph)
                if looped:
                    with run.covered.timed("loop"):
                        self._loop(loss)
                run.note_draw(uses.calls)
            for parameter, gradient in late:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            self._routing.settle()
            capture.begin(exploring=not self._routing.known)

    def _of_missing(self, loss: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The gradients of parameters that the first loss did not depend on, which are not measured, where this one does."""
        missing = {id(p) for p in self._run.covered.missing_parameters}
        found: list[Tensor] = [node.variable for node in graph(loss) if id(getattr(node, "variable", None)) in missing]
        one = self._pass(torch.full_like(loss, 1 / len(loss) if self._averages else 1.0))
        gradients = self._run.passes.backward.gradients_of_leaves(loss, found, one.cotangent) if found else ()
        return [(leaf, one.unscaled(g).to(leaf.dtype)) for leaf, g in zip(found, gradients, strict=True) if g is not None]

    def _pass(self, samples: Tensor) -> Pass:
        return Pass(samples * self._loss_scale, loss_scale=self._loss_scale)

    def _positions(self, mask: Tensor, N: int) -> Tensor:
        if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != N:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"collect: mask must be [N, L], which positions of {N} samples exist, got {shape}")
        return mask.to(self._run.capture.device).bool()

    def _loop(self, loss: Tensor) -> None:
        run = self._run
        tracked = [run.capture.tracked[name] for name in run.covered.looped]
        for n in range(loss.shape[0]):
            unit = torch.zeros_like(loss)
            unit[n] = 1
            run.passes.loop(loss, tracked, n, [self._pass(unit)])

    def results(self) -> tuple[Any, ...]:
        """One result per structure asked for, in that order."""
        if not self._run.tally.samples:
            raise ValueError("collect: there must be at least one stats.backward(loss) before results, got none")
        self._run.tally.warn_of_unequal_draws()
        return self._run.results()

    def result(self) -> Any:
        """The only result, where one structure was asked for."""
        results = self.results()
        if len(results) > 1:
            raise ValueError(f"collect: result() must be used with exactly one structure, got {len(results)}; use results()")
        return results[0]
