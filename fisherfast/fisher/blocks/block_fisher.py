# SPDX-License-Identifier: Apache-2.0
"""What Fishers of blocks have in common: a block for every weight that multiplies, for what is left its diagonal."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Generic, NoReturn, Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fisherfast import _checks
from fisherfast._precision import wide
from fisherfast.accumulator import Accumulator
from fisherfast.fisher import arguments, logdet, pooling, serialize, spread
from fisherfast.fisher.blocks.exact import ExactBlock
from fisherfast.fisher.blocks.kronecker import Place
from fisherfast.fisher.blocks.rank import Rounding
from fisherfast.fisher.counts import Counts
from fisherfast.fisher.inference_mode import outside_inference_mode
from fisherfast.fisher.layers import Layered
from fisherfast.fisher.plots.plot import Plotted
from fisherfast.fisher.protocol import Damping, Spectrum, Vector, layer_of
from fisherfast.rules import ALL


class Block(Protocol):
    """One block: a symmetric operator on matrices ``[groups, O, D]``, of sums and weights that can be pooled."""

    @property
    def place(self) -> Place:
        """Which numbers it is over."""

    rounding: Rounding

    def __matmul__(self, v: Tensor) -> Tensor:
        """The block times a matrix."""

    def spectrally(self, v: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of the block, by its eigenvalues, times a matrix."""

    def drawn(self, normals: Iterable[Tensor], function: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """For each matrix of independent normal numbers one distributed as ``function`` of the block times it, in its dtype."""

    def describe(self) -> str:
        """What is kept, for the coverage report."""

    def diagonal(self) -> Tensor:
        """As a matrix ``[groups, O, D]``."""

    def trace(self) -> float:
        """The sum of the eigenvalues."""

    def logdet(self, damping: float) -> tuple[float, int]:
        """``sum log(eigenvalue + damping)`` and how many of these are ``log 0``, which are left out."""

    def spectrum(self) -> tuple[tuple[Tensor, ...], int]:
        """The eigenvalues as ``Spectrum`` has them: factors, and how many further ones are zero."""

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """A and B, means; None if it is no product of two."""

    def accumulators(self) -> list[Accumulator]:
        """What samples add to."""

    def changed(self) -> None:
        """The sums have changed: what was computed from them is void."""

    def pooled(self, other: Any, made: Mapping[str, Any]) -> Any:
        """The block of both data sets; ``made`` are the pooled blocks before it, by name."""

    def identity(self) -> list[Any]:
        """What must be equal for pooling to mean anything, as plain values."""

    def state(self) -> tuple[dict[str, Tensor], list[Any]]:
        """Tensors and plain values."""


_Block = TypeVar("_Block", bound=Block)


def described(blocks: Mapping[Any, str]) -> dict[str, str]:
    """How each parameter is covered, what is kept of it, and why it needs another way than an op, for the coverage report; ``blocks`` has the
    coverage of each.
    """
    parts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    how = {}
    for block, covered in blocks.items():
        way, _, why = covered.partition(":")
        for name, part in block.place.parts.items():
            parts[name][block.describe()] += bool(part)
            kept = (f"{number} part{'s' * (number > 1)} of {what}" if number else what for what, number in parts[name].items())
            op = "gram_" if isinstance(block, ExactBlock) and way.endswith("_") else way  # that of the block, not of its squares
            how[name] = f"{op}: {', '.join(kept)}" + f";{why}" * bool(why)
    return how


class BlockFisher(Plotted, Layered, Generic[_Block]):
    """Blocks and diagonals that together hold every parameter once; parameters of different blocks are independent.

    See the structures for what the numbers mean, and ``protocol.Fisher`` for the methods.
    """

    structure: ClassVar[str]
    block_types: ClassVar[Mapping[str, Any]]  # by the names under which files have them; their ``from_state`` rebuilds a block

    def __init__(
        self,
        blocks: Sequence[_Block],
        diagonals: Mapping[str, Accumulator],
        counts: Counts,
        shapes: Mapping[str, Sequence[int]],
    ) -> None:
        self.blocks, self.diagonals, self._counts = tuple(blocks), dict(diagonals), counts
        self.shapes: dict[str, torch.Size] = {name: torch.Size(shape) for name, shape in shapes.items()}
        self._check_covered()

    def _check_covered(self) -> None:
        """Raise ValueError unless every parameter is in one block or diagonal, or its parts in one each."""
        parts = [part for block in self.blocks for part in block.place.parts.items()]
        parts += [(name, ALL) for name in self.diagonals]
        extents = {name: shape[0] if shape else 1 for name, shape in self.shapes.items()}
        spans = sorted((name, *entries.span(extents.get(name, 0))) for name, entries in parts)
        ends = dict.fromkeys(self.shapes, 0)
        for name, first, last in spans:
            ends[name] = last if ends.get(name) == first else -1
        if not parts or ends != extents:
            covered = sorted(entries.named(name) for name, entries in parts)
            raise ValueError(
                f"{type(self).__name__}: blocks must cover every parameter once, got {covered} for {sorted(self.shapes)}"
            )

    def factors(self, *, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Tensor, Tensor]]:
        """``{layer: (A, B)}``, without the axis of groups where there is one group; a vector is a diagonal factor.

        A layer with several blocks gives each under the name of its weight, or of the part of it: ``"attention.in_proj_weight[0:7]"``.
        """
        return self._by_layer({block.place: factors for block in self.blocks if (factors := block.factors(dtype)) is not None})

    @staticmethod
    def _by_layer(products: Mapping[Place, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        layers = [layer_of(place.weight) for place in products]
        factors = {}
        for layer, (place, (A, B)) in zip(layers, products.items(), strict=True):
            name = layer if layers.count(layer) == 1 else place.name
            factors[name] = (A, B) if place.groups > 1 else (A[0], B[0])
        return factors

    def _mean(self, name: str) -> Tensor:
        return self.diagonals[name].mean()

    @outside_inference_mode
    def diagonal(self, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """``{name: tensor}`` shaped like the parameters."""
        diagonal = self._vector(dtype, lambda name: self._mean(name).to(dtype))
        for block in self.blocks:
            block.place.write(block.diagonal(), diagonal)
        return diagonal

    def _vector(self, dtype: torch.dtype, of_diagonal: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """A vector by names: these values where there are diagonals, room for those of the blocks."""
        return {
            name: of_diagonal(name) if name in self.diagonals else torch.empty(shape, dtype=dtype, device=self._device)
            for name, shape in self.shapes.items()
        }

    def _traces(self) -> Iterator[tuple[str, float]]:
        yield from ((block.place.weight, block.trace()) for block in self.blocks)
        yield from ((name, self.diagonals[name].mean_sum()) for name in self.diagonals)

    def _counts_to(self) -> dict[str, str]:
        return {name: block.place.weight for block in self.blocks for name in block.place.names}

    def _damping_of(self, method: str, damping: Damping) -> dict[str, float]:
        """The damping of each parameter, one for all of a block."""
        dampings = arguments.damping_by_name(method, damping, self.names)
        for block in self.blocks:
            if len({dampings[name] for name in block.place.names}) > 1:
                raise ValueError(f"{method}: damping must be one number for a block, got several for {list(block.place.names)}")
        return dampings

    def stderr(self, what: str = "trace") -> NoReturn:
        """Raises ValueError: a run records it for the diagonal, ``structure=("diagonal", ...)``, beside this structure if asked for both."""
        spread.refuse(self)

    def logdet(self, damping: Damping = 0.0) -> float:
        """``log det(F + damping I)``, from the factors' eigenvalues alone; -inf with a FisherWarning if that is singular."""
        dampings = self._damping_of("logdet", damping)
        total, zeros = [], 0
        for block in self.blocks:
            value, missing = block.logdet(dampings[block.place.weight])
            total.append(value)
            zeros += missing
        for name in self.diagonals:
            damped = self._mean(name) + dampings[name]
            zeros += int((damped == 0).sum())
            total.append(float(damped.log().sum()))
        if zeros:
            return logdet.singular(zeros, self.num_parameters)
        return math.fsum(total)

    def __matmul__(self, v: Vector) -> Vector:
        """``F v``, in the dtype and on the device of v."""
        parts = arguments.split("F @ v", v, self.shapes)
        return self._applied(v, parts, lambda block, matrix: block @ matrix, lambda name, part: self._mean(name) * part)

    def solve(self, v: Vector, damping: Damping = 0.0) -> Vector:
        """``(F + damping I)^-1 v``, in the dtype and on the device of v. Errors: ValueError if that is singular."""
        inverse = self._damped("solve", damping, torch.reciprocal)
        return self._applied(
            v,
            arguments.split("solve", v, self.shapes),
            lambda block, matrix: block.spectrally(matrix, inverse(block.place.weight)),
            lambda name, part: inverse(name)(self._mean(name)) * part,
        )

    def _damped(
        self, method: str, damping: Damping, function: Callable[[Tensor], Tensor]
    ) -> Callable[[str], Callable[[Tensor], Tensor]]:
        """``function`` of damped eigenvalues, for the parameter that they are of. Errors: ValueError where one is zero."""
        dampings = self._damping_of(method, damping)

        def of(name: str, eigenvalues: Tensor) -> Tensor:
            return function(logdet.regular(method, name, eigenvalues + dampings[name]))

        return lambda name: partial(of, name)

    def _applied(
        self,
        v: Vector,
        parts: dict[str, Tensor],
        of_block: Callable[[_Block, Tensor], Tensor],
        of_diagonal: Callable[[str, Tensor], Tensor],
    ) -> Vector:
        """A function of F times a vector, block by block, in float64 on the factors' device."""
        device = self._device
        results = self._vector(torch.float64, lambda name: of_diagonal(name, parts[name].to(device, torch.float64)))
        for block in self.blocks:
            block.place.write(of_block(block, block.place.matrix(parts).to(device, torch.float64)), results)
        return arguments.like(v, {name: results[name].to(parts[name].device, parts[name].dtype) for name in self.names})

    @property
    def _device(self) -> torch.device:
        accumulators = [factor for block in self.blocks for factor in block.accumulators()] + list(self.diagonals.values())
        return accumulators[0].device

    def sample(
        self, n: int, *, damping: Damping = 0.0, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """``n`` draws from ``N(0, (F + damping I)^-1)``, {name: [n, *shape]}. Errors: ValueError if that is singular."""
        n = _checks.integer("sample", "n", n, 0)
        inverse_root = self._damped("sample", damping, torch.rsqrt)
        draws = {name: torch.empty(n, *shape, dtype=dtype, device=self._device) for name, shape in self.shapes.items()}
        vectors = [{name: values[i] for name, values in draws.items()} for i in range(n)]
        source = self._device if generator is None else generator.device
        for vector in vectors:
            for value in vector.values():
                value.copy_(torch.randn(value.shape, dtype=dtype, device=source, generator=generator))
        for name in self.diagonals:
            draws[name].mul_(inverse_root(name)(self._mean(name)))
        for block in self.blocks:
            normals = (wide(block.place.matrix(vector)) for vector in vectors)
            for vector, drawn in zip(vectors, block.drawn(normals, inverse_root(block.place.weight)), strict=True):
                block.place.write(drawn, vector)
        return draws

    def eigenvalues(self) -> Tensor:
        """All eigenvalues in one float64 tensor, largest first; ``spectra`` is the form for large models."""
        return torch.cat([part.eigenvalues() for part in self.spectra()]).sort(descending=True).values

    def spectra(self) -> Iterator[Spectrum]:
        """The eigenvalues of each block, and of each diagonal."""
        blocks: defaultdict[str, list[_Block]] = defaultdict(list)
        for block in self.blocks:
            blocks[block.place.weight].append(block)
        for name in self.names:
            if name in self.diagonals:
                sums = self.diagonals[name]
                yield Spectrum(layer_of(name), (name,), (sums.stored().view(-1),), divisor=sums.divisor())
            for block in blocks[name]:
                yield Spectrum(layer_of(name), block.place.names, *block.spectrum())

    def _pooled(self, other: Self) -> Self:
        theirs = {block.place.name: block for block in other.blocks}  # which may have come in another order
        blocks: dict[str, Any] = {}
        for block in self.blocks:
            blocks[block.place.name] = block.pooled(theirs[block.place.name], blocks)
        diagonals = {name: sums + other.diagonals[name] for name, sums in self.diagonals.items()}
        return type(self)(tuple(blocks.values()), diagonals, self._counts.pooled(other._counts), self.shapes)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """Pool the data of all ranks of ``group``, in place on every rank; returns self. ``coverage`` stays the rank's own.

        Errors: ValueError on every rank alike, before anything is added, if the ranks measured different things.
        """
        inputs = {block.place.name: block.place.input_of for block in self.blocks}  # whose sums are sent once
        pooling.check_ranks(self._identity() | {"shared inputs": inputs}, group, self._device)
        blocks = sorted(self.blocks, key=lambda block: block.place.name)
        coarsest = pooling.largest([list(block.rounding) for block in blocks], group, self._device)
        for block, eps in zip(blocks, coarsest, strict=True):
            for accumulator in block.accumulators():
                accumulator.all_reduce(group)
            block.rounding = Rounding(*eps)
            block.changed()
        for name in sorted(self.diagonals):
            self.diagonals[name].all_reduce(group)
        self._counts = self._counts.reduced(group, self._device)
        return self

    def _identity(self) -> dict[str, Any]:
        blocks = {block.place.name: block.identity() for block in self.blocks}
        return {**super()._identity(), "blocks": blocks}

    def state(self) -> serialize.State:
        """Sums, and everything else as plain values; see ``serialize.Storable``."""
        states = [block.state() for block in self.blocks]
        tensors = {name: tensor for part, _ in states for name, tensor in part.items()}
        kinds = {kind: name for name, kind in self.block_types.items()}
        fields = {
            **self._counts.state(),
            "blocks": [[kinds[type(block)], *fields] for block, (_, fields) in zip(self.blocks, states, strict=True)],
            "weights": {name: accumulator.weight for name, accumulator in self.diagonals.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }
        return tensors | {name: accumulator.stored() for name, accumulator in self.diagonals.items()}, fields

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> Self:
        """The object whose ``state`` this is."""
        blocks: dict[str, Any] = {}
        for kind, *plain in fields["blocks"]:
            block = cls.block_types[kind].from_state(tensors, plain, blocks)
            blocks[block.place.name] = block
        diagonals = {name: Accumulator(tensors[name], weight) for name, weight in fields["weights"].items()}
        return cls(tuple(blocks.values()), diagonals, Counts.from_state(fields), fields["shapes"])

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.num_parameters:,} parameters in {len(self.blocks)} blocks and {len(self.diagonals)} diagonal tensors, "
            f"{self.num_samples:,} samples, {self.provenance})"
        )
