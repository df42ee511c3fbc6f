# SPDX-License-Identifier: Apache-2.0
"""What a Fisher costs: its time as a ratio to plain forward and backward passes over the same data, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fisherfast.data.batches import Batch
from fisherfast.likelihood import Likelihood, predictions_of


@dataclass(frozen=True)
class TimeRatio:
    """The round, of several that time both, whose ratio of Fisher time to plain time is the median."""

    fisher_seconds: float
    plain_seconds: float
    rounds: int
    num_samples: int

    @property
    def ratio(self) -> float:
        """Fisher time by plain time."""
        return self.fisher_seconds / self.plain_seconds

    def __str__(self) -> str:
        return (
            f"the Fisher took {self.ratio:.2f}x one plain forward+backward over the same {self.num_samples:,} samples "
            f"({_duration(self.fisher_seconds)} against {_duration(self.plain_seconds)}, median of {self.rounds} paired runs)"
        )


def against_plain(
    fisher: Callable[[Sequence[Any]], Any], model: nn.Module, batches: Sequence[Any], likelihood: Likelihood, rounds: int
) -> TimeRatio:
    """Time ``fisher(batches)`` against plain passes over the same batches; the model's ``.grad`` are left as they were.

    The plain pass back-propagates the gradient of the log-likelihood, in closed form, to every parameter that asks for it.

    Errors:   ValueError if there are no batches or rounds.
    """
    if not batches or rounds < 1:
        raise ValueError(f"against_plain: batches and rounds must be at least one each, got {len(batches)} and {rounds}")
    device = next(model.parameters()).device
    before = [(p, p.grad) for p in model.parameters()]
    seconds = []
    try:
        for _ in range(rounds + 1):
            seconds.append((_timed(lambda: fisher(batches), device), _timed(lambda: _plain(model, batches, likelihood), device)))
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
    measured = sorted(seconds[1:], key=lambda pair: pair[0] / pair[1])  # the first round warms up
    fisher_seconds, plain_seconds = measured[rounds // 2]
    return TimeRatio(fisher_seconds, plain_seconds, rounds, num_samples=sum(Batch.of(batch, device).N for batch in batches))


def _plain(model: nn.Module, batches: Sequence[Any], likelihood: Likelihood) -> None:
    device, first = next(model.parameters()).device, 0
    for item in batches:
        model.zero_grad(set_to_none=True)
        batch = Batch.of(item, device, model)
        predictions = predictions_of(likelihood, batch, batch.feed(model), first)
        first += batch.N
        labelled = predictions.detached()
        score = likelihood.sampled(labelled, 0, 0) if batch.targets is None else likelihood.empirical(labelled)
        predictions.values.backward(score)


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    # Work on an accelerator is only queued when a call returns.
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None  # noqa: TID251
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"
