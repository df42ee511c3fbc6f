# SPDX-License-Identifier: Apache-2.0
"""Small awkward calls of every op with every option, for the sanitizer and for the tests of what only a GPU can show."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import fisherfast as ff

LENGTHS = (3, 0, 37, 1)  # ragged samples
Outputs = dict[str, Tensor]


class Call(NamedTuple):
    """What a call writes, as it is before, and the call; it runs as often as one likes on outputs of one's own."""

    outputs: Outputs
    run: Callable[[Outputs], object]

    def fresh(self) -> Outputs:
        """Outputs of one's own."""
        return {name: value.clone() for name, value in self.outputs.items()}


class Draw(NamedTuple):
    """Where the inputs of a call are drawn, and in which dtype."""

    device: str
    dtype: torch.dtype

    def normal(self, *size: int) -> Tensor:
        """Standard normal values."""
        return torch.randn(*size, device=self.device).to(self.dtype)

    def time_first(self, N: int, T: int, D: int) -> Tensor:
        """Rows [N, T, D] that lie as [T, N, D], as with ``batch_first=False``."""
        return self.normal(T, N, D).transpose(0, 1)

    def zeros(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An accumulator."""
        return torch.zeros(*size, device=self.device, dtype=dtype)

    def uniform(self, *size: int) -> Tensor:
        """Weights."""
        return torch.rand(*size, device=self.device)

    def below(self, end: int, *size: int) -> Tensor:
        """Integers in [0, end)."""
        return torch.randint(end, size, device=self.device)

    def lead(self, N: int, T: int) -> tuple[tuple[int, ...], Tensor | None, int]:
        """The axes before the features, offsets and number of samples: N samples of T rows, or with T = 0 ragged ones."""
        if T:
            return (N, T), None, N
        offsets = torch.tensor([0, *itertools.accumulate(LENGTHS)], device=self.device)
        return (sum(LENGTHS),), offsets, len(LENGTHS)

    def squares(self, parameter: tuple[int, ...], N: int) -> Outputs:
        """The outputs of the squares ops."""
        acc, total, sqnorm = self.zeros(*parameter), self.zeros(*parameter), self.zeros(N)
        return {"acc": acc, "total": total, "sqnorm": sqnorm, "flag": self.zeros(1, dtype=torch.int32)}


def linear(draw: Draw, N: int, T: int, I: int, O: int, time_first: bool = False) -> Call:
    """``linear_sq_``; T = 0: ragged."""
    lead, offsets, samples = draw.lead(N, T)
    rows = draw.time_first if time_first else draw.normal
    x, g, weight = rows(*lead, I), rows(*lead, O), draw.uniform(samples)
    return Call(
        draw.squares((O, I), samples),
        lambda out: ff.ops.linear_sq_(out["acc"], x, g, 0.5, weight=weight, offsets=offsets, **_but_acc(out)),
    )


def scale(draw: Draw, N: int, T: int, D: int) -> Call:
    """``scale_sq_``; T = 0: ragged."""
    lead, offsets, samples = draw.lead(N, T)
    x, g, weight = draw.normal(*lead, D), draw.normal(*lead, D), draw.uniform(samples)
    return Call(
        draw.squares((D,), samples),
        lambda out: ff.ops.scale_sq_(out["acc"], x, g, 0.5, weight=weight, offsets=offsets, **_but_acc(out)),
    )


def embedding(draw: Draw, N: int, T: int, V: int, D: int) -> Call:
    """``embedding_sq_``; T = 0: ragged."""
    lead, offsets, samples = draw.lead(N, T)
    ids, g, weight = draw.below(V, *lead), draw.normal(*lead, D), draw.uniform(samples)
    options = {"weight": weight, "offsets": offsets, "padding_idx": V - 1}
    return Call(
        draw.squares((V, D), samples), lambda out: ff.ops.embedding_sq_(out["acc"], ids, g, 0.5, **options, **_but_acc(out))
    )


def gram(draw: Draw, N: int, T: int, I: int, weighted: bool, time_first: bool = False) -> Call:
    """``gram_``, with the column of ones."""
    x = draw.time_first(N, T, I) if time_first else draw.normal(N, T, I)
    weight = draw.uniform(N, T) if weighted else None
    outputs = {"acc": draw.zeros(I + 1, I + 1), "flag": draw.zeros(1, dtype=torch.int32)}
    return Call(outputs, lambda out: ff.ops.gram_(out["acc"], x, 0.5, weight=weight, bias=True, flag=out["flag"]))


def conv(draw: Draw, N: int, C: int, O: int, size: tuple[int, ...], K: int, step: int, groups: int, packed: bool) -> Call:
    """``conv_sq_`` with stride, padding and dilation ``step``; packed: ragged samples of images."""
    axes, reach = len(size), step * (K - 1)
    images, offsets, samples = draw.lead(N, 0) if packed else ((N,), None, N)
    x = draw.normal(*images, C, *size)
    g = draw.normal(*images, O, *((s + 2 * step - reach - 1) // step + 1 for s in size))
    options = {name: (step,) * axes for name in ("stride", "padding", "dilation")}
    options |= {"weight": draw.uniform(samples), "offsets": offsets, "groups": groups}
    return Call(
        draw.squares((O, C // groups, *(K,) * axes), samples),
        lambda out: ff.ops.conv_sq_(out["acc"], x, g, 0.5, **options, **_but_acc(out)),
    )


def conv_gram(draw: Draw, N: int, C: int, size: tuple[int, ...], K: int, step: int, groups: int, weighted: bool) -> Call:
    """``conv_gram_`` with stride, padding and dilation ``step``, and the column of ones."""
    axes, D = len(size), C // groups * K ** len(size) + 1
    x = draw.normal(N, C, *size)
    options = {name: (step,) * axes for name in ("stride", "padding", "dilation")}
    options |= {"kernel": (K,) * axes, "groups": groups, "bias": True, "weight": draw.uniform(N) if weighted else None}
    outputs = {"acc": draw.zeros(groups, D, D), "flag": draw.zeros(1, dtype=torch.int32)}
    return Call(outputs, lambda out: ff.ops.conv_gram_(out["acc"], x, 0.5, flag=out["flag"], **options))


def ghost(draw: Draw, N: int, C: int, O: int, size: tuple[int, ...], K: int, step: int) -> Call:
    """``ghost_norm_`` with stride, padding and dilation ``step``."""
    axes, reach = len(size), step * (K - 1)
    x, g = draw.normal(N, C, *size), draw.normal(N, O, *((s + 2 * step - reach - 1) // step + 1 for s in size))
    options = {"kernel": (K,) * axes} | {name: (step,) * axes for name in ("stride", "padding", "dilation")}
    outputs = {"sqnorm": draw.zeros(N), "size": draw.zeros(N), "flag": draw.zeros(1, dtype=torch.int32)}
    return Call(outputs, lambda out: ff.ops.ghost_norm_(out["sqnorm"], x, g, size=out["size"], flag=out["flag"], **options))


def score(draw: Draw, R: int, C: int, drawn: bool) -> Call:
    """``categorical_score_``, labels given or drawn; the result is poisoned before."""
    logits, counted = draw.normal(R, C), draw.below(4, R) > 0
    labels = {"uniform": draw.uniform(R).double()} if drawn else {"labels": draw.below(C, R)}
    outputs = {"acc": torch.full_like(logits, float("nan")), "drawn": torch.full((R,), -7, device=draw.device)}
    return Call(outputs, lambda out: ff.ops.categorical_score_(out["acc"], logits, **labels, counted=counted, drawn=out["drawn"]))


def log1p(draw: Draw, size: int) -> Call:
    """``log1p_sum``."""
    f = draw.uniform(size)
    return Call({"acc": draw.zeros(2, dtype=torch.float64)}, lambda out: ff.ops.log1p_sum(out["acc"], f, 3.0))


def kron(draw: Draw, I: int, O: int) -> Call:
    """``kron_log1p_sum``."""
    a, b = draw.uniform(I), draw.uniform(O)
    return Call({"acc": draw.zeros(2, dtype=torch.float64)}, lambda out: ff.ops.kron_log1p_sum(out["acc"], a, b, 3.0))


def _but_acc(outputs: Outputs) -> Outputs:
    return {name: value for name, value in outputs.items() if name != "acc"}


CALLS: dict[str, tuple[Callable[..., Call], list[tuple]]] = {
    "linear_sq_": (
        linear,
        [
            (3, 5, 7, 11),
            (2, 37, 136, 72),
            (2, 70, 400, 264),
            (9, 1, 17, 5),
            (4, 0, 40, 24),
            (1, 4096, 24, 40),
            (3, 70, 136, 264, True),
        ],
    ),
    "gram_": (gram, [(3, 5, 7, False), (2, 37, 136, True), (9, 1, 200, False), (2, 70, 400, False), (3, 70, 136, False, True)]),
    "conv_sq_": (
        conv,
        [
            (3, 4, 6, (7, 5), 3, 1, 2, False),
            (2, 16, 32, (9, 11), 3, 2, 1, False),
            (4, 5, 5, (13,), 3, 1, 5, True),
            (2, 3, 4, (4, 5, 3), 2, 1, 1, False),
            (1, 16, 16, (64, 70), 3, 1, 1, False),
        ],
    ),
    "conv_gram_": (
        conv_gram,
        [(3, 4, (7, 5), 3, 1, 2, True), (2, 16, (9, 11), 3, 2, 1, False), (2, 3, (4, 5, 3), 2, 1, 1, False)],
    ),
    "ghost_norm_": (
        ghost,
        [(3, 4, 6, (7, 5), 3, 1), (2, 16, 32, (9, 11), 3, 2), (2, 136, 72, (70,), 1, 1), (2, 3, 4, (4, 5, 3), 2, 1)],
    ),
    "scale_sq_": (scale, [(3, 5, 7), (2, 37, 136), (9, 1, 17), (4, 0, 40)]),
    "embedding_sq_": (embedding, [(3, 5, 11, 7), (2, 70, 3, 136), (9, 1, 5, 17), (4, 0, 24, 40)]),
    "categorical_score_": (score, [(7, 11, False), (5, 5000, True), (33, 3, True)]),
    "log1p_sum": (log1p, [(7,), (70001,)]),
    "kron_log1p_sum": (kron, [(7, 11), (37, 2500)]),
}


def calls(op: str, device: str, dtype: torch.dtype) -> list[Call]:
    """The calls of an op."""
    build, shapes = CALLS[op]
    return [build(Draw(device, dtype), *shape) for shape in shapes]


def run_all(op: str, backend: str, device: str, dtype: torch.dtype) -> list[str]:
    """Run the calls of an op in one backend, waiting for each: why those failed that did.

    Errors: that of a call after which the device no longer answers.
    """
    failed = []
    with ff.backend(backend):
        for number, call in enumerate(calls(op, device, dtype)):
            try:
                call.run(call.outputs)
                if device == "cuda":
                    torch.cuda.synchronize()
            except Exception as problem:  # one call's business: the others are still to be run
                if not alive(device):
                    raise
                failed.append(f"call {number}: {type(problem).__name__}: {problem}")
    return failed


def alive(device: str) -> bool:
    """Whether the device still answers: after a bad access nothing of this process runs any more."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:  # what every CUDA error is
        return False
    return True
