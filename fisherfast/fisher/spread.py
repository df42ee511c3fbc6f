# SPDX-License-Identifier: Apache-2.0
"""How the trace of a Fisher varies from sample to sample: what its standard error needs, as sums that pool exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fisherfast.fisher.columns import Columns


class Spread:
    """Five sums over samples for each layer and for the whole, from which the standard errors of their traces follow.

    With ``t_n = E_y |s_n|^2`` of a layer (for drawn labels the mean over draws), ``W = sum w``, ``m = sum w t / W``::

        stderr^2 = sum_n w_n^2 (t_n - m)^2 / (W^2 - sum w^2)

    Without weights this is ``std(t, ddof=1)^2 / N``. With weights it is the error of the ratio ``sum w t / sum w``: they say
    how much a sample counts, not that it was seen so many times (a copy of a sample brings no news).

    Shapes:   sums [5, layers + 1] float64: ``w, w^2, w t, w^2 t, w^2 t^2``; the last column is the whole.
    Scale:    sums, so that pooling adds them.
    Errors:   ValueError below two samples.
    Numerics: float64. The squares are expanded, so a standard error below about 1e-8 of its trace is rounding.
    Source:   Cochran, Sampling Techniques, 3rd ed., section 6.4 (the ratio estimator's variance).
    """

    _PATIENCE = 1 << 14  # numbers that may wait: an op on few takes longer to start than to run

    def __init__(self, layers: Sequence[str], sums: Tensor) -> None:
        self.layers, self._sums = tuple(layers), sums
        self._waiting = Columns(len(self.layers), sums.device)  # samples without weights that are not in the sums yet

    @property
    def sums(self) -> Tensor:
        """All that was added, ``[5, layers + 1]``."""
        if self._waiting:
            self._take_waiting()
        return self._sums

    def _take_waiting(self) -> None:
        t = _with_whole(self._waiting.tensor)
        self._waiting.clear()
        count, one, two = torch.full_like(t[:, 0], t.shape[1]), t.sum(1), t.square().sum(1)
        self._sums += torch.stack([count, count, one, one, two])

    @classmethod
    def zeros(cls, layers: Sequence[str], device: torch.device) -> Spread:
        """Of no samples."""
        return cls(layers, torch.zeros(5, len(layers) + 1, dtype=torch.float64, device=device))

    def add(self, values: Tensor, weight: Tensor | None) -> Spread:
        """Take samples, in place: ``values [layers, N]`` are their ``t_n``, which stay as they are. Returns self."""
        if weight is None:
            self._waiting.add(values)
            if len(self._waiting) * len(self.layers) > self._PATIENCE:
                self._take_waiting()
        else:
            t, w = _with_whole(values), weight.double()
            wt = w * t
            self._sums += torch.stack([w.expand_as(t), (w * w).expand_as(t), wt, w * wt, wt * wt]).sum(-1)
        return self

    def __add__(self, other: Spread) -> Spread:
        theirs = [other.layers.index(layer) for layer in self.layers] + [len(self.layers)]
        return Spread(self.layers, self.sums + other.sums[:, theirs].to(self.sums.device))

    def copy(self) -> Spread:
        """The same sums on memory of their own."""
        return Spread(self.layers, self.sums.clone())

    def stderr(self) -> dict[str | None, float]:
        """``{layer: standard error of its trace}``; the whole under None."""
        W, W2, wt, w2t, w2t2 = self.sums
        rest = W * W - W2
        if not bool((rest > 0).all()):
            raise ValueError(
                "stderr: at least two samples with a weight > 0 must be counted whole in every layer, got fewer; measure more samples"
            )
        mean = wt / W
        errors = ((w2t2 - 2 * mean * w2t + mean * mean * W2).clamp_min(0) / rest).sqrt().tolist()
        return dict(zip((*self.layers, None), errors, strict=True))

    def state(self) -> dict[str, Any]:
        """Plain values that JSON keeps exactly."""
        return {"layers": list(self.layers), "sums": self.sums.tolist()}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Spread:
        """The object whose ``state`` this is."""
        return cls(state["layers"], torch.tensor(state["sums"], dtype=torch.float64, device=device))


def _with_whole(values: Tensor) -> Tensor:
    """Values of layers ``[layers, N]`` and, behind them, of the whole."""
    return torch.cat([values, values.sum(0, keepdim=True)])


def refuse(F: object) -> NoReturn:
    """Raise ValueError: the run of another structure than the diagonal records nothing of single samples."""
    raise ValueError(
        f"stderr: must be asked of a DiagonalFisher, got a {type(F).__name__}, whose run does not record how the trace varies over samples; "
        "measure both in one run, structure=('diagonal', ...), and ask the first result"
    )
