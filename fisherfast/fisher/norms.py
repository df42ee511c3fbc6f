# SPDX-License-Identifier: Apache-2.0
"""Per-sample gradient norms: one number a sample, and one a sample and layer where asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from fisherfast.fisher import pooling, serialize
from fisherfast.fisher.counts import Counted, Counts
from fisherfast.fisher.engine import Engine
from fisherfast.fisher.request import Needs, Request


@dataclass(frozen=True)
class PerSampleNorm(Request["SampleNorms"]):
    """Ask for the squared norm of every sample's gradient, of the whole model and, ``by_layer=True``, of each layer.

    Asked for alone it needs no sums shaped like the parameters: a weight that sees one position per sample needs the norms of
    x and g only, on the CPU one that sees few the dot products of pairs of positions (``ff.ops.ghost_norm_``), and what other
    kernels add up goes to one scratch tensor.

    Shapes:   the result's ``squared_norms`` [num_samples], in the order in which the samples came.
    Scale:    ``E_y |s_n|^2``, per sample and unweighted; with drawn labels the mean over draws.
    Errors:   NonFiniteError as every run; a batch that does not complete adds no sample.
    Numerics: float32 within a sample's layer (float64 for float64 models), float64 from there on.
    Source:   Goodfellow 2015 (arXiv:1510.01799), Li et al. 2022 (arXiv:2110.05679).
    """

    by_layer: bool = False

    @property
    def needs(self) -> Needs:
        """See ``Request``."""
        return Needs(norms="layers" if self.by_layer else "whole")

    def result(self, engine: Engine, counts: Counts) -> SampleNorms:
        """See ``Request``."""
        values = engine.values.norms()
        return SampleNorms(
            None if values is None else values.sum(0) if engine.values.keeps == "layers" else values[0],
            dict(zip(engine.values.layers, values, strict=True)) if self.by_layer and values is not None else None,
            counts,
        )

    def restore(self, engine: Engine, before: SampleNorms) -> None:
        """See ``Request``."""
        if self.by_layer:
            engine.values.restore_norms(torch.stack(list(before.by_layer().values())))
        elif engine.values.keeps == "whole":
            engine.values.restore_norms(before.squared_norms.unsqueeze(0))


@serialize.storable("sample-norms")
class SampleNorms(Counted):
    """``E_y |s_n|^2`` of every sample n, ``s_n = grad_w log p_w(y | x_n)``: what ``ff.PerSampleNorm()`` gives.

    Their mean is the trace of the Fisher. With the labels of the data (``"empirical"``) it is ``|s_n|^2`` itself.

    Shapes:   squared_norms [num_samples]; by_layer {layer: [num_samples]}.
    Scale:    per sample, unweighted; with drawn labels the mean over draws.
    Errors:   ValueError for norms by layer that were not asked for, and for norms lost because draws of one forward pass
              (``ff.collect``) did not follow each other.
    Numerics: float64; see ``PerSampleNorm``.
    Source:   Goodfellow 2015 (arXiv:1510.01799).
    """

    structure: ClassVar[str]

    def __init__(self, squared_norms: Tensor | None, by_layer: Mapping[str, Tensor] | None, counts: Counts) -> None:
        self._squared_norms = squared_norms
        self._by_layer = None if by_layer is None else dict(by_layer)
        self._counts = counts

    @property
    def squared_norms(self) -> Tensor:
        """``[num_samples]`` float64, in the order in which the samples came."""
        if self._squared_norms is None:
            raise ValueError(
                "squared_norms: draws of one forward pass must follow each other, got another batch in between; "
                "which sample a draw belongs to is no longer known"
            )
        return self._squared_norms

    def by_layer(self) -> dict[str, Tensor]:
        """``{layer: [num_samples]}``, in the order of the parameters; they add up to ``squared_norms``."""
        if self._by_layer is None:
            raise ValueError(
                "by_layer: the norms of each layer must have been recorded, got the whole's only; ask for ff.PerSampleNorm(by_layer=True)"
            )
        return dict(self._by_layer)

    def _pooled(self, other: SampleNorms) -> SampleNorms:
        """The other's samples come after this one's."""
        device = self.squared_norms.device
        layers = None if self._by_layer is None else other.by_layer()
        return SampleNorms(
            torch.cat([self.squared_norms, other.squared_norms.to(device)]),
            None if layers is None else {k: torch.cat([v, layers[k].to(device)]) for k, v in self.by_layer().items()},
            self._counts.pooled(other._counts),
        )

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> SampleNorms:
        """Pool the data of all ranks of ``group``, in place on every rank; returns self. The samples come in the order of the ranks;
        ``coverage`` stays the rank's own.

        Errors: ValueError on every rank alike, before anything is added, if the ranks measured different things, or if which sample a
        norm belongs to is no longer known on one of them.
        """
        known = "lost" if self._squared_norms is None else "known"
        device = torch.device("cpu") if self._squared_norms is None else self._squared_norms.device
        pooling.check_ranks({**self._identity(), "squared_norms": known}, group, device)
        rows = torch.stack([self.squared_norms, *(self._by_layer or {}).values()])
        self._squared_norms, *layers = pooling.gathered(rows, group)
        if self._by_layer is not None:
            self._by_layer = dict(zip(self._by_layer, layers, strict=True))
        self._counts = self._counts.reduced(group, device)
        return self

    def _identity(self) -> dict[str, Any]:
        measured = sorted(self.coverage.keys() - self.coverage.missing.keys())
        layers = {"layers": None if self._by_layer is None else list(self._by_layer), "parameters": measured}
        return {**layers, **{f: getattr(self.provenance, f) for f in ("fisher_type", "likelihood", "model")}}

    def state(self) -> serialize.State:
        """See ``serialize.Storable``."""
        tensors = {"squared_norms": self.squared_norms}
        if self._by_layer:
            tensors["by_layer"] = torch.stack(list(self._by_layer.values()))
        return tensors, {**self._counts.state(), "layers": None if self._by_layer is None else list(self._by_layer)}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> SampleNorms:
        """The object whose ``state`` this is."""
        norms, layers = tensors["squared_norms"], fields["layers"]
        by_layer = None if layers is None else dict(zip(layers, tensors.get("by_layer", ()), strict=True))
        return cls(norms, by_layer, Counts.from_state(fields))

    def __repr__(self) -> str:
        layers = "" if self._by_layer is None else f", {len(self._by_layer)} layers"
        return f"SampleNorms({self.num_samples:,} samples{layers}, fisher_type={self.provenance.fisher_type!r})"
