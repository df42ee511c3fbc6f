# SPDX-License-Identifier: Apache-2.0
"""``collect``: gather a Fisher around your own forward and backward passes."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fisherfast.capture import refuse_train_mode
from fisherfast.fisher.collectors import Structure
from fisherfast.fisher.protocol import Provenance
from fisherfast.fisher.run import Run, model_name
from fisherfast.likelihood import FISHER_TYPES
from fisherfast.passes import Pass, conclude


class collect:
    """Gather statistics while you run the model: ``with collect(model, Diagonal()) as stats: stats.backward(losses)``.

    Example::

        with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
            for x, y in loader:
                stats.backward(cross_entropy(model(x), y, reduction="none"))
        fisher = stats.result()

    Shapes:   ``stats.backward`` takes the vector ``[N]`` of negative log-likelihoods, one per sample: for a sequence the sum
              over its positions.
    Scale:    the result is a mean over samples; the loss vector must not be averaged over anything.
    Errors:   ValueError for a loss that is not such a vector, for parameters the loss does not depend on (unless
              ``allow_missing=True``), for dropout or batch statistics in train mode; NonFiniteError (``err.fisher`` keeps
              what came before) for NaN or infinity.
    Numerics: as the ops; sums over samples with 48 bits or more (``accumulator.RunningSum``).
    Source:   the empirical Fisher if the labels are the data's; the Fisher if you drew them from the model: say which with
              ``fisher_type``, which is recorded and not checked.

    Inside the block the weights are frozen where they are used: ``.grad``, ``requires_grad``, hooks and modes of the model
    are not touched. A forward pass without a backward pass counts for nothing; several backward passes through one
    forward pass (``retain_graph=True``) are draws: they are averaged, and their samples counted once.
    """

    def __init__(
        self, model: nn.Module, *structures: Structure, fisher_type: str = "empirical", allow_missing: bool = False
    ) -> None:
        if fisher_type not in FISHER_TYPES:
            raise ValueError(f"collect: fisher_type must be one of {list(FISHER_TYPES)}, got {fisher_type!r}")
        if not structures:
            raise ValueError("collect: must be given what to collect, got nothing; for example collect(model, ff.Diagonal())")
        refuse_train_mode(model)
        self._run = Run(model, structures, Provenance(fisher_type=fisher_type, model=model_name(model)), allow_missing)
        self._explored = False  # whether the parameters' forms are known, and samples were told apart at least once
        self._established = False  # whether every use whose gradient was ever seen has a layout
        self._may_loop = True

    def __enter__(self) -> collect:
        self._run.capture.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._run.capture.__exit__(kind, error, trace)
        if error is not None and not hasattr(error, "fisher") and isinstance(error, Exception):
            self._run._attach(error)

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Back-propagate the vector of per-sample losses ``[N]`` and add what its samples contribute."""
        run, capture = self._run, self._run.capture
        with run.rescue():
            self._check(loss)
            N = loss.shape[0]
            run.check_finite(loss, loss, "the loss")
            if not self._established:
                self._establish(loss)
            with run.transaction(N, passes=1):
                # The loop over samples needs the graph after this pass; whether it is needed is known only then.
                calls = run.passes.run(loss, [Pass(torch.ones_like(loss))], 1, keep=True if self._may_loop else retain_graph)
                self._established = self._established and not run.passes.undetermined
                self._loop(loss)
                fresh = run.fresh(calls)
            run.num_samples += N if fresh else 0
            run.num_positions += N if fresh else 0
            run.batches += 1
            capture.begin(exploring=not self._explored)

    def _check(self, loss: Tensor) -> None:
        if loss.dim() != 1:
            raise ValueError(
                f"collect: the loss must be a vector [N], one negative log-likelihood per sample, got shape {tuple(loss.shape)}; "
                "use reduction='none' and sum over the positions of a sample"
            )
        if loss.shape[0] == 0:
            raise ValueError("collect: the loss must hold at least one sample, got an empty vector")
        if loss.grad_fn is None:
            raise ValueError(
                "collect: the loss must depend on the model's parameters, got one without a graph; run the model in the block"
            )

    def _establish(self, loss: Tensor) -> None:
        """First batches: which parameters are reached, in which forms, and where their sample axis is."""
        run, capture = self._run, self._run.capture
        if not self._explored:
            run.check_reached(loss)
            run.note_ops(loss)
            run.passes.route_mixed_forms(loss)
        if loss.shape[0] > 1:
            evidence = run.passes.probe(loss, torch.ones_like(loss))
            for name in sorted(conclude(capture, evidence)):
                self._route_mixing(name, evidence)
            self._explored = True
            settled = {key: bool(e.layout or capture.tracked[key[0]].loop_reason) for key, e in evidence.items()}
            self._established = all(settled[key] or not e.alive for key, e in evidence.items())
            self._may_loop = not all(settled.values()) or bool(run.looped)

    def _route_mixing(self, name: str, evidence: dict) -> None:
        tracked = self._run.capture.tracked[name]
        if tracked.expand:
            tracked.expand, tracked.loop_reason = False, "no sample axis where it is used"
        elif any(e.had_sample_axis for key, e in evidence.items() if key[0] == name and e.mixes_samples):
            raise ValueError(
                f"{name}: a row must belong to one sample, got rows that depend on several; batch statistics and contrastive losses "
                "have no per-sample gradient. If this is a table that has no sample axis but is as long as the batch, use ff.fisher, "
                "which can tell, or another batch size"
            )
        else:
            # The forward pass is the user's and cannot be run again: loop over this batch's samples, expand from the next on.
            tracked.expand = True
            self._run.passes.undetermined.add(name)

    def _loop(self, loss: Tensor) -> None:
        run = self._run
        names = run.looped
        if not names:
            return
        tracked = [run.capture.tracked[name] for name in names]
        for n in range(loss.shape[0]):
            unit = torch.zeros_like(loss)
            unit[n] = 1
            run.passes.loop(loss, tracked, n, [Pass(unit)])

    def results(self) -> tuple[Any, ...]:
        """One result per structure asked for, in that order."""
        if not self._run.num_samples:
            raise ValueError("collect: there must be at least one stats.backward(loss) before results, got none")
        return self._run.results()

    def result(self) -> Any:
        """The only result, where one structure was asked for."""
        (result,) = self.results()
        return result
