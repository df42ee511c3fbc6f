# SPDX-License-Identifier: Apache-2.0
"""Calls of the squares ops of linear maps, scales and tables: targets, shapes, inputs, layouts, answers, and the yardsticks of ``test_ops.py``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pytest
import torch
from gate import passes, product_in
from targets import DEVICES

import fisherfast as ff
from fisherfast import _backend

OP_NAMES = ("linear_sq_", "scale_sq_", "embedding_sq_")
NONFINITE = (float("nan"), float("inf"), -float("inf"))


class Target(NamedTuple):
    """Where an op runs."""

    op: str
    backend: str
    device: str

    @property
    def emulated(self) -> bool:
        return self.backend == "triton" and self.device == "cpu"

    def __str__(self) -> str:
        where = "" if self.emulated or self.backend in ("cpu", self.device) else f"@{self.device}"
        return f"{self.op.rstrip('_')}-{self.backend}{where}"


class Shape(NamedTuple):
    """N samples of T positions; [O, I] is linear_sq_'s parameter, [I] scale_sq_'s, [O, I] = [V, D] embedding_sq_'s."""

    N: int
    T: int
    I: int
    O: int

    def __str__(self) -> str:
        return f"N{self.N}-T{self.T}-I{self.I}-O{self.O}"


TARGETS = [Target(op, b, d) for op in OP_NAMES for d in DEVICES for b in _backend.OPS[op].usable(d)]
PRIMES = Shape(3, 5, 7, 11)
SHAPES = [PRIMES, Shape(1, 1, 1, 1), Shape(13, 1, 7, 11), Shape(2, 32, 64, 128), Shape(3, 37, 131, 67), Shape(71, 2, 17, 5)]


def targets_of(op: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("target", [t for t in TARGETS if t.op == op], ids=str)


every_target = pytest.mark.parametrize("target", TARGETS, ids=str)


@dataclass(frozen=True)
class Problem:
    """The inputs of one call."""

    op: str
    first: torch.Tensor | None  # x, or the ids of an embedding
    g: torch.Tensor
    rows: int  # of the parameter, where g does not say
    scale: float = 1.0
    weight: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    padding_idx: int = -1

    @property
    def N(self) -> int:
        return self.g.shape[0] if self.offsets is None else len(self.offsets) - 1

    @property
    def parameter(self) -> tuple[int, ...]:
        columns = self.first.shape[-1] if self.op == "linear_sq_" else self.g.shape[-1]
        return (columns,) if self.op == "scale_sq_" else (self.rows, columns)

    @property
    def keywords(self) -> dict:
        extra = {"padding_idx": self.padding_idx} if self.op == "embedding_sq_" else {}
        return {"weight": self.weight, "offsets": self.offsets, **extra}

    def sample_gradients(self, dtype: torch.dtype) -> torch.Tensor:
        """[N, parameter], one product a sample."""
        empty = torch.zeros(0, *self.parameter, dtype=dtype, device=self.g.device)
        pieces = range(self.N) if self.offsets is None else map(slice, self.offsets[:-1].tolist(), self.offsets[1:].tolist())
        return torch.stack([self._gradient(p, dtype) for p in pieces]) if self.N else empty

    def _gradient(self, piece, dtype: torch.dtype) -> torch.Tensor:
        if self.op == "linear_sq_":
            return product_in(dtype, self.g[piece].mT, self.first[piece])
        g = self.g[piece].to(dtype)
        if self.op == "scale_sq_":
            return g.sum(0) if self.first is None else torch.einsum("td,td->d", g, self.first[piece].to(dtype))
        belongs = self.first[piece].unsqueeze(-1) == torch.arange(self.rows, device=g.device)  # [T, V]
        if self.padding_idx >= 0:
            belongs[:, self.padding_idx] = False
        return torch.where(belongs.unsqueeze(-1), g.unsqueeze(1), 0.0).sum(0)

    def answer(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """What is to be added to each output, computed in ``dtype`` from the definition."""
        gradients = self.sample_gradients(dtype)
        squares = gradients.square()
        w = 1.0 if self.weight is None else self.weight.to(dtype).view(-1, *[1] * len(self.parameter))
        return {
            "acc": self.scale * (w * squares).sum(0),
            "total": (w * gradients).sum(0),
            "sqnorm": squares.flatten(1).sum(1),
        }

    def outputs(self, dtype: torch.dtype = torch.float32, *, integers: bool = False) -> dict[str, torch.Tensor]:
        """Zeroed outputs, or outputs that already hold something."""
        shapes = {"acc": self.parameter, "total": self.parameter, "sqnorm": (self.N,)}
        make = (lambda s: torch.randint(-9, 10, s).to(dtype)) if integers else (lambda s: torch.zeros(s, dtype=dtype))
        return {name: make(shape).to(self.g.device) for name, shape in shapes.items()}

    def run(self, backend: str, outputs: dict[str, torch.Tensor], **more) -> None:
        extra = {k: v for k, v in outputs.items() if k != "acc"}
        with ff.backend(backend):
            getattr(ff.ops, self.op)(outputs["acc"], self.first, self.g, self.scale, **self.keywords, **extra, **more)


def draw(target: Target, dtype: torch.dtype, reach: int | None, *size: int) -> torch.Tensor:
    """Integers up to ``reach``, or normal numbers."""
    raw = torch.randn(size) if reach is None else torch.randint(-reach, reach + 1, size).float()
    return raw.to(target.device, dtype)


def problem(
    target: Target,
    shape: Shape = PRIMES,
    dtype: torch.dtype = torch.float32,
    *,
    integers=False,
    ragged=False,
    weighted=False,
    **more,
) -> Problem:
    N, T, I, O = shape
    lengths = [0 if n == 1 else T + n for n in range(N)] if ragged else [T] * N
    lead = (sum(lengths),) if ragged else (N, T)
    reach = 3 if T < 16 else 1  # keeps every sum of squares of integers below 2^24
    values = partial(draw, target, dtype, reach if integers else None)
    if target.op == "embedding_sq_":
        first, g = torch.randint(0, max(O, 1), lead), values(*lead, I)
        first[..., -1:] = first[..., :1]  # an id that occurs twice
        first = first.to(target.device)
    else:
        first, g = values(*lead, I), values(*lead, O if target.op == "linear_sq_" else I)
    weight = torch.randint(0, 3, (N,)).float() if integers else torch.rand(N)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(target.device) if ragged else None
    weight = weight.to(target.device) if weighted else None
    return Problem(target.op, first, g, O, weight=weight, offsets=offsets, **more)


def error(value: torch.Tensor, oracle: torch.Tensor) -> float:
    """``max|value - oracle| / max|oracle|``; absolute where the oracle is zero."""
    if oracle.numel() == 0:
        return 0.0
    top = oracle.abs().max().item()
    return (value.double() - oracle).abs().max().item() / (top or 1.0)


def assert_gate(backend: str, cases: list[Problem], dtype: torch.dtype = torch.float32) -> None:
    """The largest error over several draws: of one draw, plain torch's may be zero by luck."""
    mine, plain = {}, {}
    for case in cases:
        outputs, oracle, float32 = case.outputs(dtype), case.answer(torch.float64), case.answer(torch.float32)
        case.run(backend, outputs)
        for name in outputs:
            mine[name] = max(mine.get(name, 0.0), error(outputs[name], oracle[name]))
            plain[name] = max(plain.get(name, 0.0), error(float32[name], oracle[name]))
    for name in mine:
        assert passes(mine[name], plain[name]), f"{name}: error {mine[name]:.2e}, plain torch {plain[name]:.2e}"


def assert_equal(case: Problem, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    oracle = case.answer(torch.float64)
    for name, value in after.items():
        assert torch.equal(value.double(), before[name].double() + oracle[name]), (
            f"{name} differs by {value - before[name] - oracle[name]}"
        )


def copies(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in outputs.items()}


def assert_exact(case: Problem, backend: str, names=("acc", "total", "sqnorm"), **more) -> None:
    """Of small integers every partial result is representable: whatever the order of the sums, the last bit is right."""
    outputs = {k: v for k, v in case.outputs(integers=True).items() if k in names}
    before = copies(outputs)
    case.run(backend, outputs, **more)
    assert_equal(case, before, outputs)


def transposed(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(t: torch.Tensor) -> torch.Tensor:
    """The same values inside a larger buffer whose other cells are NaN (or, for ids, far out of range)."""
    buffer = torch.full(
        [s + 4 for s in t.shape], float("nan") if t.is_floating_point() else 2**40, dtype=t.dtype, device=t.device
    )
    inside = buffer[tuple(slice(2, -2) for _ in t.shape)]
    return inside.copy_(t)


def strided(t: torch.Tensor) -> torch.Tensor:
    buffer = torch.full(
        (*t.shape[:-1], 3 * t.shape[-1]), float("nan") if t.is_floating_point() else 2**40, dtype=t.dtype, device=t.device
    )
    return buffer[..., ::3].copy_(t)


def expanded(t: torch.Tensor) -> torch.Tensor:
    """Stride 0 along the positions."""
    return t[:, :1].expand(t.shape)


def call_arguments(case: Problem) -> tuple[tuple, dict]:
    outputs = case.outputs()
    flag = torch.zeros(1, dtype=torch.int32, device=case.g.device)
    return (outputs.pop("acc"), case.first, case.g, 0.5), {**case.keywords, **outputs, "flag": flag}
