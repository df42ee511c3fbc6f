# SPDX-License-Identifier: Apache-2.0
"""The diagonal Fisher: for every parameter the mean over samples of its squared score.

Sums and weights are held per parameter, not means: a run that stopped in the middle of a backward pass has counted
different numbers of samples for different parameters, and each mean is right with its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from fisherfast import _checks
from fisherfast.accumulator import Accumulator
from fisherfast.fisher import arguments, logdet, pooling, serialize
from fisherfast.fisher.counts import Counts
from fisherfast.fisher.engine import Engine
from fisherfast.fisher.inference_mode import outside_inference_mode
from fisherfast.fisher.layers import Layered
from fisherfast.fisher.plots.plot import Plotted
from fisherfast.fisher.protocol import Damping, Provenance, Spectrum, Vector, layer_of
from fisherfast.fisher.request import Needs, Request
from fisherfast.fisher.spread import Spread

_CHUNK = 1 << 16  # entries at a time: temporaries that stay in cache


@dataclass(frozen=True)
class Diagonal(Request["DiagonalFisher"]):
    """Ask for the diagonal: ``ff.collect(model, ff.Diagonal())``. ``stderr=False`` leaves out what ``F.stderr`` needs."""

    stderr: bool = True

    @property
    def needs(self) -> Needs:
        """See ``Request``."""
        return Needs(squares=True, spread=self.stderr)

    def result(self, engine: Engine, counts: Counts) -> DiagonalFisher:
        """See ``Request``."""
        sums = {name: running.snapshot() for name, running in engine.squares.items()}
        return DiagonalFisher._of(sums, counts, engine.values.spread() if self.stderr else None)

    def restore(self, engine: Engine, before: DiagonalFisher) -> None:
        """See ``Request``."""
        engine.restore_squares(before.accumulators())
        if before.spread is not None:
            engine.values.restore_spread(before.spread)


@serialize.storable("diagonal")
class DiagonalFisher(Layered, Plotted):
    """``f_i = (1/N) sum_n E_y[(d/dw_i log p_w(y | x_n))^2]``, the diagonal of the Fisher matrix; all else is taken as zero.

    Built here from means computed elsewhere, by ``fisher`` and ``collect`` from sums.

    Shapes:   diagonal {parameter name: tensor shaped like the parameter}; vectors are the same, or flat in ``names`` order.
    Scale:    a mean over ``num_samples`` samples, never a sum, never a squared batch gradient.
    Errors:   ValueError or TypeError, naming the entry, for values that are negative, not finite or not floating, for
              counts that are not positive and for aliases of nothing.
    Numerics: sums have the digits of float64 and weights are that; tensors shaped like parameters come out in float32 unless asked.
    Source:   Amari 1998; as per-sample second moments, Dangel et al. 2020 (arXiv:1912.10985).
    """

    structure: ClassVar[str]

    def __init__(
        self,
        diagonal: Mapping[str, Tensor],
        num_samples: int,
        *,
        num_positions: int | None = None,
        provenance: Provenance | None = None,
        coverage: Mapping[str, str] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        for name, mean in diagonal.items():
            arguments.check_mean(name, mean)
        shapes = {name: mean.shape for name, mean in diagonal.items()}
        counts = Counts.given("DiagonalFisher", shapes, num_samples, num_positions, provenance, coverage, aliases)
        N = counts.num_samples
        self._hold({name: Accumulator(mean.detach().double() * N, N) for name, mean in diagonal.items()}, counts, None)

    @classmethod
    def _of(cls, sums: Mapping[str, Accumulator], counts: Counts, spread: Spread | None) -> DiagonalFisher:
        """From sums of squared scores, each with its own weight, which are kept, not copied."""
        fisher = cls.__new__(cls)
        fisher._hold(sums, counts, spread)
        return fisher

    def _hold(self, sums: Mapping[str, Accumulator], counts: Counts, spread: Spread | None) -> None:
        if not sums:
            raise ValueError("DiagonalFisher: must hold at least one parameter, got none")
        arguments.check_distinct(sums)
        self._sums, self._counts, self.spread = dict(sums), counts, spread
        self.shapes = {name: accumulator.shape for name, accumulator in sums.items()}

    def accumulators(self) -> dict[str, Accumulator]:
        """The sums and weights themselves, not copies: what a resumed run goes on from."""
        return self._sums

    def _counted(self, name: str) -> Accumulator:
        if self._sums[name].weight == 0:
            raise ValueError(
                f"{name}: must have samples of a weight > 0 for a mean, got none: all sample weights were zero, no batch was completed, or "
                "its sum was dropped with an error; measure more, or pool with what has some"
            )
        return self._sums[name]

    def _mean(self, name: str) -> Tensor:
        return self._counted(name).mean()

    def _regular(self, method: str, name: str, damping: float) -> Tensor:
        return logdet.regular(method, name, self._mean(name) + damping, "entries")

    @outside_inference_mode
    def diagonal(self, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """``{name: f}``, shaped like the parameters."""
        return {name: self._counted(name).mean(dtype) for name in self.names}

    def _traces(self) -> Iterator[tuple[str, float]]:
        return ((name, self._counted(name).mean_sum()) for name in self.names)

    def stderr(self, what: str = "trace") -> Any:
        """The standard error of ``trace()``, or with ``"by_layer"`` of each layer's trace, ``{layer: error}``.

        ``std_n(t_n, ddof=1) / sqrt(N)``, ``t_n = E_y |s_n|^2`` of sample n; for drawn labels ``t_n`` is the mean over draws, so
        the chance in the labels is part of the error. Over the samples of whole batches; weights: see ``fisher.spread``.

        Errors: ValueError below two samples, and where the sums were not recorded: ``Diagonal(stderr=False)``, a Fisher built
        from tensors, or one pooled with such.
        """
        _checks.one_of("stderr", "what", what, ("trace", "by_layer"))
        if self.spread is None:
            raise ValueError(
                "stderr: the trace's sums over samples must have been recorded, got none; measure with ff.fisher or ff.collect(model, "
                "ff.Diagonal()), and pool only such Fishers"
            )
        errors = self.spread.stderr()
        whole = errors.pop(None)
        return whole if what == "trace" else errors

    def logdet(self, damping: Damping = 0.0) -> float:
        """``sum_i log(f_i + damping_i)``; -inf with a FisherWarning that counts the zero entries if there are any."""
        dampings = arguments.damping_by_name("logdet", damping, self.names)
        sums = []
        for name, spectrum in zip(self.names, self.spectra(), strict=True):
            both = torch.zeros(2, dtype=torch.float64, device=spectrum.factors[0].device)
            for values in spectrum.chunks(_CHUNK):
                damped = values.add_(dampings[name])
                both += torch.stack([damped.log().sum(), (damped == 0).sum()])
            sums.append(both.tolist())
        if zeros := int(sum(zeros for _, zeros in sums)):
            return logdet.singular(zeros, self.num_parameters, "entries")
        return math.fsum(log for log, _ in sums)

    def __matmul__(self, v: Vector) -> Vector:
        """``f_i v_i``, in the dtype and on the device of v."""
        parts = arguments.split("F @ v", v, self.shapes)
        return arguments.like(v, {name: (self._mean(name).to(part.device) * part).to(part.dtype) for name, part in parts.items()})

    def solve(self, v: Vector, damping: Damping = 0.0) -> Vector:
        """``v_i / (f_i + damping_i)``, in the dtype and on the device of v. Errors: ValueError if some divisor is zero."""
        dampings = arguments.damping_by_name("solve", damping, self.names)
        parts = arguments.split("solve", v, self.shapes)
        for name, part in parts.items():
            parts[name] = (part / self._regular("solve", name, dampings[name]).to(part.device)).to(part.dtype)
        return arguments.like(v, parts)

    def eigenvalues(self) -> Tensor:
        """All f_i in one float64 tensor, largest first, on the device of the first parameter."""
        device = self._sums[self.names[0]].device
        return torch.cat([self._mean(name).flatten().to(device) for name in self.names]).sort(descending=True).values

    def spectra(self) -> Iterator[Spectrum]:
        """One block with one factor, the sums, for each parameter."""
        for name in self.names:
            counted = self._counted(name)
            yield Spectrum(layer_of(name), (name,), (counted.stored().view(-1),), divisor=counted.weight)

    def sample(
        self, n: int, *, damping: Damping = 0.0, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """``n`` draws from ``N(0, (F + damping I)^-1)``, {name: [n, *shape]}. Errors: ValueError if that is singular."""
        n = _checks.integer("sample", "n", n, 0)
        dampings = arguments.damping_by_name("sample", damping, self.names)
        draws = {}
        for name in self.names:
            scale = self._regular("sample", name, dampings[name]).rsqrt().to(dtype)
            source = scale.device if generator is None else generator.device
            normal = torch.randn((n, *scale.shape), dtype=dtype, device=source, generator=generator)
            draws[name] = normal.to(scale.device).mul_(scale)
        return draws

    def _pooled(self, other: DiagonalFisher) -> DiagonalFisher:
        sums = {name: accumulator + other._sums[name] for name, accumulator in self._sums.items()}
        spread = self.spread + other.spread if self.spread and other.spread else None
        return DiagonalFisher._of(sums, self._counts.pooled(other._counts), spread)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> DiagonalFisher:
        """Pool the data of all ranks of ``group``, in place on every rank; returns self. ``coverage`` stays the rank's own.

        Errors: ValueError on every rank alike, before anything is added, if the ranks measured different things.
        """
        device = self._sums[self.names[0]].device
        pooling.check_ranks(self._identity(), group, device)
        for name in sorted(self.names):  # one order of collectives, whatever the order in which a rank met its parameters
            self._sums[name].all_reduce(group)
        self.spread = pooling.reduced_spread(self.spread, group, device)
        self._counts = self._counts.reduced(group, device)
        return self

    def state(self) -> serialize.State:
        """Sums, and everything else as plain values; see ``serialize.Storable``."""
        fields = {
            **self._counts.state(),
            "weights": {name: accumulator.weight for name, accumulator in self._sums.items()},
            "spread": None if self.spread is None else self.spread.state(),
        }
        return {name: accumulator.stored() for name, accumulator in self._sums.items()}, fields

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> DiagonalFisher:
        """The object whose ``state`` this is; its weights, not its tensors, carry the order of the parameters."""
        sums = {name: Accumulator(tensors[name], weight) for name, weight in fields["weights"].items()}
        spread = fields["spread"]
        if spread is not None:
            spread = Spread.from_state(spread, next(iter(tensors.values())).device)
        return cls._of(sums, Counts.from_state(fields), spread)

    def __repr__(self) -> str:
        excluded = len(self.coverage.missing)
        layers = len({layer_of(name) for name in self.names})
        return (
            f"DiagonalFisher({self.num_parameters:,} parameters in {len(self.names)} tensors and {layers} layers, "
            f"{self.num_samples:,} samples, {self.num_positions:,} positions, {self.provenance}"
            f"{f', {excluded} tensors missing' if excluded else ''})"
        )
