# SPDX-License-Identifier: Apache-2.0
"""The exact Fisher of small models and few samples, by its dual: the Gram matrix of the sample gradients has the same eigenvalues."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NoReturn, Self

import torch
import torch.distributed as dist
from torch import Tensor

from fisherfast import _checks
from fisherfast._names import listed
from fisherfast._precision import dtype_name, noise_of_rows, wide_dtype
from fisherfast.capture.capture import Capture
from fisherfast.fisher import arguments, logdet, pooling, serialize, spread
from fisherfast.fisher.counts import Counts, Measured
from fisherfast.fisher.gram_sums import GramCollector, Piece, Pieces
from fisherfast.fisher.inference_mode import outside_inference_mode
from fisherfast.fisher.plots.plot import Plotted
from fisherfast.fisher.protocol import Damping, LayerSummary, Provenance, Spectrum, Vector
from fisherfast.fisher.request import Request
from fisherfast.rules import Elementwise, Rows

_CHUNK_BYTES = 2**27


@dataclass(frozen=True)
class Gram(Request["GramFisher"]):
    """Ask for the exact Fisher: ``ff.fisher(model, data, structure="gram")``, ``ff.collect(model, ff.Gram())``.

    ``max_rows``: at most so many sample gradients, one per sample and backward pass; what is computed of them takes
    ``8 max_rows^2`` bytes and, for eigenvalues, about ``max_rows^3`` operations.
    """

    max_rows: int = 8192

    def __post_init__(self) -> None:
        _checks.integer("Gram", "max_rows", self.max_rows, 1)

    def collector(self, capture: Capture, transactional: bool) -> GramCollector:
        """See ``Request``."""
        return GramCollector(capture, self.max_rows)

    def result(self, source: GramCollector, counts: Counts) -> GramFisher:
        """See ``Request``."""
        counts = counts.saying("sample gradients", {})
        return GramFisher(source.snapshot(), source.num_rows, source.weight, counts, source.shapes)

    def restore(self, source: GramCollector, before: GramFisher) -> None:
        """See ``Request``."""
        source.restore(before.pieces, before.num_rows, before.weight)


@serialize.storable("gram")
class GramFisher(Plotted, Measured):
    """``F = G^T G / W``, the rows of G ``[M, P]`` the sample gradients, times the roots of their weights: all P^2 entries of F.

    The dual ``G G^T / W`` ``[M, M]`` has F's eigenvalues but for zeros. It is added up parameter by parameter, and G is never
    whole: what is kept of a layer are the rows x and g that its gradients are products of, or those where they are smaller.
    With ``fisher_type="exact"`` a sample has a row for every column of the square root of its output Hessian: C - 1 of C classes.

    Shapes:   vectors {parameter name: tensor shaped like the parameter}, or flat in ``names`` order. One block over all
              layers: ``spectra`` and ``by_layer`` have one entry, named ``""``.
    Scale:    a mean over samples, as every Fisher's. ``damping`` is Tikhonov, ``F + damping I``; by layer it is exact too.
    Errors:   ValueError for vectors and dampings that do not fit, for systems that are not damped everywhere, and for
              ``all_reduce``.
    Numerics: float64 from the rows on; eigenvalues below ``min(M, P) 2^-46`` of the largest (2^-52 of float64 rows, and at least
              2^-16 where the backward pass was in bfloat16, 2^-22 in float16) are rounding and count as zero.
    Source:   Amari 1998; the dual: Karakida, Akaho & Amari 2019 (arXiv:1806.01316), section 3.
    """

    structure: ClassVar[str]

    def __init__(self, pieces: Pieces, num_rows: int, weight: float, counts: Counts, shapes: Mapping[str, Sequence[int]]) -> None:
        self.pieces, self.num_rows, self.weight, self._counts = pieces, num_rows, weight, counts
        self.shapes: dict[str, torch.Size] = {name: torch.Size(shape) for name, shape in shapes.items()}
        self._last: tuple[dict[str, float], Tensor] | None = None  # dampings, and the Cholesky factor for them

    @classmethod
    def from_gradients(
        cls,
        gradients: Mapping[str, Tensor],
        *,
        num_samples: int | None = None,
        num_positions: int | None = None,
        provenance: Provenance | None = None,
        coverage: Mapping[str, str] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> Self:
        """From sample gradients computed elsewhere, ``{parameter name: [M, *shape]}``: ``F = sum_m g_m g_m^T / num_samples``.

        ``num_samples`` is M unless said. Of a sample with several rows (draws, labels) each is its gradient times the root of its
        probability. The tensors are kept, not copied.

        Errors:   TypeError or ValueError, naming the entry, for what is not floating or finite, and for several M.
        """
        M = next((len(g) for g in gradients.values()), 0)
        if not M:
            raise ValueError("from_gradients: gradients must be of one parameter and one sample at least, got none")
        for name, g in gradients.items():
            if not (isinstance(g, Tensor) and g.is_floating_point()):
                got = getattr(g, "dtype", type(g).__name__)
                raise TypeError(f"from_gradients: {name!r} must be a floating tensor, got {got}")
            if g.shape[:1] != (M,):
                raise ValueError(
                    f"from_gradients: {name!r} must be [M, *parameter], M = {M} as of the first, got {list(g.shape)}"
                )
            if bad := int((~g.isfinite()).sum()):
                raise ValueError(f"from_gradients: {name!r} must be finite, got {bad} entries that are not")
        shapes = {name: g.shape[1:] for name, g in gradients.items()}
        samples = M if num_samples is None else num_samples
        counts = Counts.given("from_gradients", shapes, samples, num_positions, provenance, coverage, aliases)
        pieces: Pieces = {}
        for name, g in gradients.items():
            root, rows = g.new_ones(M, dtype=torch.float64), Rows(None, g.detach().reshape(M, 1, -1))
            pieces[name] = (Piece(0, Elementwise(tuple(shapes[name])), rows, root, dtype_name(g.dtype)),)
        return cls(pieces, M, counts.num_samples, counts, shapes)

    # -- G, a few rows of one parameter at a time

    def _of(self, name: str, after: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Row numbers and ``[rows, numel]`` of G, from row ``after`` on."""
        if not self.weight:
            raise ValueError("gram: must hold samples of a weight > 0, got none; the run ended before its first backward pass")
        shape = self.shapes[name]
        step = max(1, _CHUNK_BYTES // (8 * max(1, shape.numel())))
        for first in range(after, self.num_rows, step):
            last = min(first + step, self.num_rows)
            rows = torch.zeros(last - first, *shape, dtype=torch.float64, device=self._device)
            for piece in self.pieces[name]:
                a, b = max(first, piece.first), min(last, piece.end)
                if a < b:
                    rows[a - first : b - first] += piece.gradients(a, b, shape)
            yield slice(first, last), rows.view(last - first, -1)

    @property
    def _device(self) -> torch.device:
        return next((piece.root.device for pieces in self.pieces.values() for piece in pieces), torch.device("cpu"))

    def _times(self, columns: Mapping[str, Tensor]) -> Tensor:
        """G times ``{name: [numel, n]}``: ``[M, n]``."""
        n = next(iter(columns.values())).shape[1]
        product = torch.zeros(self.num_rows, n, dtype=torch.float64, device=self._device)
        for name, column in columns.items():
            for rows, G in self._of(name):
                product[rows] += G @ column
        return product

    def _back(self, columns: Tensor) -> dict[str, Tensor]:
        """The transpose of G times ``[M, n]``: ``{name: [numel, n]}``."""
        products = {}
        for name, shape in self.shapes.items():
            products[name] = columns.new_zeros(shape.numel(), columns.shape[1])
            for rows, G in self._of(name):
                products[name] += G.mT @ columns[rows]
        return products

    def dual(self, dampings: Mapping[str, float] | None = None) -> Tensor:
        """``G D^-1 G^T / W``, D the damping of each parameter, or without D: float64 ``[M, M]``."""
        K = torch.zeros(self.num_rows, self.num_rows, dtype=torch.float64, device=self._device)
        for name in self.names:
            scale = 1 / (self.weight * (dampings[name] if dampings else 1.0)) if self.weight else 0.0
            for above, G in self._of(name):
                K[above, above] += scale * (G @ G.mT)
                for below, H in self._of(name, above.stop):
                    K[below, above] += scale * (H @ G.mT)
        return K.tril() + K.tril(-1).mT

    # -- what it answers

    @cached_property
    @outside_inference_mode
    def _values(self) -> Tensor:
        """The eigenvalues that may differ from zero, largest first."""
        values = torch.linalg.eigvalsh(self.dual()).flip(0)[: self.num_parameters]
        dtypes = {getattr(torch, piece.of_g) for pieces in self.pieces.values() for piece in pieces}
        of_products = max([torch.finfo(torch.float64).eps, *(torch.finfo(wide_dtype(dtype)).eps ** 2 for dtype in dtypes)])
        # With rows to spare a direction without any is there for rounding to fill: 0.016 eps^2 at most, all layers in one matrix. With
        # fewer rows than parameters there is none, and small eigenvalues are good to percents far below that.
        of_rows = max(map(noise_of_rows, dtypes), default=0.0) / 8 if self.num_rows > self.num_parameters else 0.0
        return torch.where(values > max(len(values) * of_products, of_rows) * values[:1], values, 0.0)

    @outside_inference_mode
    def diagonal(self, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """``{name: tensor}`` shaped like the parameters."""
        return {name: self._diagonal(name).to(dtype).view(shape) for name, shape in self.shapes.items()}

    def _diagonal(self, name: str) -> Tensor:
        squares = [G.square().sum(0) for _, G in self._of(name)]
        return torch.stack(squares).sum(0) / self.weight

    def trace(self) -> float:
        """The sum of the eigenvalues."""
        return math.fsum(float(self._diagonal(name).sum()) for name in self.names)

    def stderr(self, what: str = "trace") -> NoReturn:
        """Raises ValueError: a run records it for the diagonal, ``structure=("diagonal", ...)``, beside this structure if asked for both."""
        spread.refuse(self)

    def eigenvalues(self) -> Tensor:
        """All P eigenvalues in one float64 tensor, largest first."""
        return torch.cat([self._values, self._values.new_zeros(self.num_parameters - len(self._values))])

    def spectra(self) -> Iterator[Spectrum]:
        """One block."""
        yield Spectrum("", self.names, (self._values,), self.num_parameters - len(self._values))

    def by_layer(self) -> dict[str, LayerSummary]:
        """One block over all layers."""
        return {"": LayerSummary("", self.names, self.num_parameters, self.trace())}

    def logdet(self, damping: Damping = 0.0) -> float:
        """``log det(F + damping I)``; -inf with a FisherWarning if that is singular."""
        dampings = arguments.damping_by_name("logdet", damping, self.names)
        distinct = set(dampings.values())
        if len(distinct) > 1:
            self._check_damped("logdet", dampings)
            eye = torch.eye(self.num_rows, dtype=torch.float64, device=self._device)
            inner = _cholesky(eye + self.dual(dampings), dampings).diagonal().log().sum()
            return 2 * float(inner) + math.fsum(self.shapes[name].numel() * math.log(d) for name, d in dampings.items())
        (delta,) = distinct
        damped = self.eigenvalues() + delta
        if zeros := int((damped == 0).sum()):
            return logdet.singular(zeros, self.num_parameters)
        return float(damped.log().sum())

    @staticmethod
    def _check_damped(method: str, dampings: Mapping[str, float]) -> None:
        if undamped := [name for name, value in dampings.items() if not value]:
            raise ValueError(f"{method}: damping must be > 0 for every parameter, got 0 for {listed(undamped)}")

    def __matmul__(self, v: Vector) -> Vector:
        """``F v``, in the dtype and on the device of v."""
        parts = arguments.split("F @ v", v, self.shapes)
        return self._like(v, parts, self._back(self._times(self._columns(parts)) / self.weight))

    def solve(self, v: Vector, damping: Damping = 0.0) -> Vector:
        """``(F + damping I)^-1 v``, in the dtype and on the device of v, by Woodbury's identity; every damping > 0."""
        dampings = arguments.damping_by_name("solve", damping, self.names)
        self._check_damped("solve", dampings)
        parts = arguments.split("solve", v, self.shapes)
        columns = {name: column / dampings[name] for name, column in self._columns(parts).items()}
        back = self._back(self._inner_solve(self._times(columns), dampings))
        return self._like(v, parts, {name: columns[name] - back[name] / dampings[name] for name in self.names})

    def _inner_solve(self, columns: Tensor, dampings: Mapping[str, float]) -> Tensor:
        """``(W I + G D^-1 G^T)^-1`` times ``[M, n]``."""
        return torch.cholesky_solve(columns, self._factored(dampings)) / self.weight

    @outside_inference_mode
    def _factored(self, dampings: Mapping[str, float]) -> Tensor:
        if self._last is None or self._last[0] != dampings:  # many solves have one damping
            inner = self.dual(dampings)
            inner.diagonal().add_(1.0)
            self._last = dict(dampings), _cholesky(inner, dampings)
        return self._last[1]

    def sample(
        self, n: int, *, damping: Damping = 0.0, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """``n`` draws from ``N(0, (F + damping I)^-1)``, ``{name: [n, *shape]}``; every damping > 0.

        A draw x of ``N(0, D^-1)`` is corrected as if ``G x + noise = 0`` had been observed (Matheron's rule).
        """
        n = _checks.integer("sample", "n", n, 0)
        dampings = arguments.damping_by_name("sample", damping, self.names)
        self._check_damped("sample", dampings)
        source = self._device if generator is None else generator.device

        def normal(size: int) -> Tensor:
            return torch.randn(size, n, dtype=torch.float64, device=source, generator=generator).to(self._device)

        prior = {name: normal(shape.numel()) / dampings[name] ** 0.5 for name, shape in self.shapes.items()}
        observed = self._times(prior) + self.weight**0.5 * normal(self.num_rows)
        back = self._back(self._inner_solve(observed, dampings))
        return {
            name: (prior[name] - back[name] / dampings[name]).mT.reshape(n, *shape).to(dtype)
            for name, shape in self.shapes.items()
        }

    def _columns(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: part.to(self._device, torch.float64).reshape(-1, 1) for name, part in parts.items()}

    def _like(self, v: Vector, parts: dict[str, Tensor], columns: Mapping[str, Tensor]) -> Vector:
        results = {name: columns[name].view(part.shape).to(part.device, part.dtype) for name, part in parts.items()}
        return arguments.like(v, results)

    # -- pooling and files

    def _pooled(self, other: GramFisher) -> GramFisher:
        below = {name: [piece.moved(self.num_rows) for piece in pieces] for name, pieces in other.pieces.items()}
        pieces = {name: (*above, *below[name]) for name, above in self.pieces.items()}
        rows, weight = self.num_rows + other.num_rows, self.weight + other.weight
        return GramFisher(pieces, rows, weight, self._counts.pooled(other._counts), self.shapes)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> GramFisher:
        """Refused, on every rank: the rows of all ranks would have to be on each of them."""
        pooling.check_structure(self.structure, group, self._device)
        raise ValueError(
            "gram: all_reduce must be of sums, got rows, which differ on every rank; save each rank's result and add them with +"
        )

    def state(self) -> serialize.State:
        """See ``serialize.Storable``."""
        tensors: dict[str, Tensor] = {}
        fields: dict[str, Any] = {}
        for name, pieces in self.pieces.items():
            states = [piece.state() for piece in pieces]
            tensors |= {f"{name}.{k}.{part}": t for k, (of_piece, _) in enumerate(states) for part, t in of_piece.items()}
            fields[name] = [plain for _, plain in states]
        counted = {"num_rows": self.num_rows, "weight": self.weight, "shapes": {n: list(s) for n, s in self.shapes.items()}}
        return tensors, {**self._counts.state(), **counted, "pieces": fields}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> GramFisher:
        """The object whose ``state`` this is."""

        def of_piece(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        pieces = {
            name: tuple(Piece.from_state(of_piece(f"{name}.{k}."), plain) for k, plain in enumerate(plains))
            for name, plains in fields["pieces"].items()
        }
        return cls(pieces, fields["num_rows"], fields["weight"], Counts.from_state(fields), fields["shapes"])

    def __repr__(self) -> str:
        return (
            f"GramFisher({self.num_parameters:,} parameters, {self.num_rows:,} sample gradients of {self.num_samples:,} samples, "
            f"{self.provenance})"
        )


def _cholesky(inner: Tensor, dampings: Mapping[str, float]) -> Tensor:
    """The Cholesky factor of ``I + G D^-1 G^T``. Errors: ValueError where the 1 is lost beside the rest."""
    try:
        return torch.linalg.cholesky(inner)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"GramFisher: damping must be above the rounding of F's largest eigenvalue, got {min(dampings.values()):g}; pass a larger one"
        ) from error
