# SPDX-License-Identifier: Apache-2.0
"""What a run knows of single samples: the squared norms of their gradients by layer, which are kept, or added up for standard errors."""

from __future__ import annotations

from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from fisherfast.capture.collector import Samples
from fisherfast.fisher.columns import Columns
from fisherfast.fisher.protocol import layer_of
from fisherfast.fisher.spread import Spread

Norms = Literal["whole", "layers"]  # of all parameters, or of those of each layer


class SampleValues:
    """The values of every sample; those of a batch count when it is complete, and may get more draws until the next one.

    ``keeps``: which norms are kept; ``measures_spread``: whether the sums behind the standard errors are.
    """

    def __init__(self, names: list[str], keeps: Norms | None, measures_spread: bool, device: torch.device) -> None:
        self.keeps, self._measures_spread, self._device = keeps, measures_spread, device
        self._spread: Spread | None = None
        self.arrange(names)
        self._kept: Columns | None = None  # [layers or 1, N] of all batches, where they are kept
        self._last: tuple[Tensor, int, Tensor | None] | None = None  # the last batch's sum over draws, draws, weight
        self._again = False
        self._lost = False  # a draw came when its batch was no longer the last one: the values are not known
        self._samples = Samples(0)
        self._norms: dict[float, tuple[Tensor, tuple[Tensor, ...]]] = {}  # by the scale of the pass: [layers, N], its rows

    def arrange(self, names: list[str]) -> None:
        """Give the layer of each parameter its place."""
        self.layers = tuple(dict.fromkeys(layer_of(name) for name in names))
        self._row = {name: self.layers.index(layer_of(name)) for name in names}
        if self._measures_spread and (self._spread is None or not self._spread.sums.any()):  # not that of a checkpoint
            self._spread = Spread.zeros(self.layers, self._device)

    @property
    def wanted(self) -> bool:
        """Whether anybody asks for them."""
        return self._spread is not None or self.keeps is not None

    # -- one batch

    def begin(self, samples: Samples) -> None:
        """Start a batch."""
        self._samples, self._again = samples, False
        self._norms.clear()

    def again(self, follows: bool) -> None:
        """The batch's samples were counted before: these passes are another draw; ``follows``: of the batch just before."""
        self._again = True
        self._lost = self._lost or not follows

    def target(self, name: str, scale: float) -> Tensor | None:
        """Where the batch's norms go: [N] of the parameter's layer, kept apart by scale until it ends."""
        if not self.wanted:
            return None
        if scale not in self._norms:
            norms = torch.zeros(len(self.layers), self._samples.N, dtype=torch.float64, device=self._device)
            self._norms[scale] = (norms, norms.unbind(0))
        return self._norms[scale][1][self._row[name]]

    def totals(self) -> dict[str, float]:
        """For each parameter the sum of the batch's norms of its layer, over samples and passes; nothing where there are none."""
        if not self._norms:
            return {}
        sums = reduce(torch.add, (of_layers.sum(1) for of_layers, _ in self._norms.values())).tolist()
        return {name: sums[row] for name, row in self._row.items()}

    def settle(self) -> None:
        """The batch is complete."""
        if not self.wanted:
            return
        values = torch.zeros(len(self.layers), self._samples.N, dtype=torch.float64, device=self._device)
        for scale, (norms, _) in self._norms.items():
            values.add_(norms, alpha=scale)
        if not self._again:
            self._commit()
            self._last = (values, 1, self._samples.weight)
        elif self._last is not None and self._last[0].shape == values.shape:
            self._last = (self._last[0] + values, self._last[1] + 1, self._last[2])
        else:
            self._lost = True

    def _commit(self) -> None:
        """Count the last batch; until now it could have got more draws."""
        if self._spread is not None and self._last is not None:
            self._spread.add(self._last[0] / self._last[1], self._last[2])
        if self.keeps and self._last is not None:
            self._keep(self._last_kept())
        self._last = None

    def _keep(self, values: Tensor) -> None:
        if self._kept is None:
            self._kept = Columns(len(values), values.device)
        self._kept.add(values)

    def _last_kept(self) -> Tensor:
        assert self._last is not None
        values = self._last[0] / self._last[1]
        return values if self.keeps == "layers" else values.sum(0, keepdim=True)

    # -- what was added

    def spread(self) -> Spread | None:
        """The sums behind the standard errors, on memory of their own; None where they are not known."""
        if self._spread is None or self._lost:
            return None
        spread = self._spread.copy()
        return spread if self._last is None else spread.add(self._last[0] / self._last[1], self._last[2])

    def norms(self) -> Tensor | None:
        """The kept norms, ``[layers, num_samples]``, or ``[1, num_samples]`` of the whole; None where they are not known."""
        if self._lost:
            return None
        rows = len(self.layers) if self.keeps == "layers" else 1
        nothing = torch.zeros(rows, 0, dtype=torch.float64, device=self._device)
        before = nothing if self._kept is None else self._kept.tensor
        return torch.cat([before, nothing if self._last is None else self._last_kept()], dim=1)

    # -- going on from a checkpoint

    def restore_spread(self, before: Spread) -> None:
        """Start from these sums."""
        self._spread = before.copy()

    def restore_norms(self, before: Tensor) -> None:
        """Start from these kept norms."""
        self._kept = None
        self._keep(before)
