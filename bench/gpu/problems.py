# SPDX-License-Identifier: Apache-2.0
"""The cases of the GPU benchmark: inputs, float64 oracle, what plain torch does instead, and what the op costs at least.

Every list of cases begins with the most telling one; ``order`` makes one list of them for a run that time may cut short.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from gate import product
from gpu import cost
from torch import Tensor
from torch.nn import functional

import fisherfast as ff

Run = Callable[[Tensor], object]  # adds the result to the accumulator it is given

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
EVERY, WITHOUT_PRODUCTS, ALWAYS_FLOAT = ("bf16", "fp32", "tf32"), ("bf16", "fp32"), ("fp32",)

LINEAR = {  # N, T, I, O
    "llama8b-up": (4, 1024, 4096, 14336),
    "llama1b-short": (32, 128, 2048, 2048),
    "llama8b-o": (4, 512, 4096, 4096),
    "llama8b-short": (8, 128, 4096, 4096),
    "mlp-hidden": (1024, 1, 1024, 1024),
    "llama1b-up": (8, 512, 2048, 8192),
    "gpt2-up": (32, 128, 768, 3072),
    "llama8b-down": (4, 512, 14336, 4096),
    "llama8b-qkv": (4, 1024, 4096, 6144),
    "gpt2-square": (32, 64, 768, 768),
    "vit-up": (64, 197, 768, 3072),
    "llama1b-head": (4, 512, 2048, 128256),
    "one-long-text": (1, 8192, 1024, 1024),
}
GRAM = {  # N, T, I: as KFAC calls it
    "llama8b-in": (8, 1024, 4096),
    "gpt2-in": (32, 1024, 768),
    "llama8b-down": (4, 1024, 14336),
    "head-query": (128, 512, 64),
    "llama1b-in": (16, 512, 2048),
    "resnet-bias": (64, 256, 256),
}
SCALE = {  # N, T, D, with x
    "llama8b-norm": (8, 2048, 4096, True),
    "llama8b-bias": (8, 2048, 4096, False),
    "gpt2-norm": (32, 1024, 768, True),
}
EMBEDDING = {  # N, T, V, D
    "llama8b-tokens": (8, 2048, 128256, 4096),
    "gpt2-tokens": (32, 1024, 50257, 768),
}
CONV = {  # N, C, O, H, K, stride, groups: square images and kernels
    "resnet50-14": (64, 256, 256, 14, 3, 1, 1),
    "resnet50-56": (64, 64, 64, 56, 3, 1, 1),
    "convnext-depthwise": (32, 96, 96, 56, 7, 1, 96),
    "unet-256": (4, 64, 64, 256, 3, 1, 1),
    "resnet50-1x1": (64, 256, 1024, 14, 1, 1, 1),
    "resnet50-stem": (64, 3, 64, 224, 7, 2, 1),
    "vit-patches": (64, 3, 768, 224, 16, 16, 1),
}
CONV_GRAM = {  # N, C, H, K, stride: as above
    "resnet50-14": (64, 256, 14, 3, 1),
    "resnet50-56": (64, 64, 56, 3, 1),
    "resnet50-1x1": (64, 1024, 14, 1, 1),
    "resnet50-stem": (64, 3, 224, 7, 2),
}
GHOST = {  # N, C, O, H, K: fewer pairs of positions than weights
    "decoder-529": (8, 4096, 4096, 23, 1),
    "resnet50-14": (64, 256, 256, 14, 3),
    "resnet50-7": (64, 512, 512, 7, 3),
}
SCORE = {  # R, C
    "llama-vocabulary": (4096, 128256),
    "gpt2-vocabulary": (8192, 50257),
    "imagenet": (65536, 1000),
}
LOG1P = {"llama1b-up": (8192, 2048), "llama8b-head": (128256, 4096)}  # shape of the diagonal
KRON = {"llama8b-up": (4096, 14336), "gpt2-up": (768, 3072)}  # I, O


@dataclass(frozen=True)
class Draw:
    """Where and in which mode the inputs of a case are drawn."""

    device: str
    mode: str

    def normal(self, *size: int) -> Tensor:
        """Standard normal values in the mode's dtype."""
        return torch.randn(*size, device=self.device).to(DTYPES[self.mode])

    def zeros(self, *size: int, wide: bool = False) -> Tensor:
        """An accumulator; ``wide`` in float64."""
        return torch.zeros(*size, device=self.device, dtype=torch.float64 if wide else torch.float32)


class Problem(NamedTuple):
    """One case in one mode."""

    op: str
    mode: str
    shape: dict[str, int]
    acc: Tensor  # what every run starts from
    inputs: tuple[Tensor | None, ...]  # of the op, after the accumulator
    oracle: Callable[[], Tensor]  # float64
    plain: Callable[[], Tensor]  # plain torch with a float32 result, whose error sets the gate
    peers: dict[str, Run]  # how it is done without us: timed, and their error reported where they return the accumulator
    cost: cost.Cost
    options: dict[str, Any] = {}
    compared: Callable[[Tensor], Tensor] = lambda acc: acc  # the part of the accumulator that is the result

    def ours(self, acc: Tensor) -> None:
        """Call the op."""
        getattr(ff.ops, self.op)(acc, *self.inputs, **self.options)


def squared(acc: Tensor, gradient: Tensor) -> None:
    """Add a sample gradient's squares, formed in the accumulator's dtype."""
    gradient = gradient.to(acc.dtype)
    acc.addcmul_(gradient, gradient)


def per_sample(acc: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """A loop of matrix products."""
    for x_n, g_n in zip(x, g, strict=True):
        squared(acc, torch.mm(g_n.mT, x_n))
    return acc


def linear(draw: Draw, N: int, T: int, I: int, O: int) -> Problem:
    """``linear_sq_`` against materialising, a loop over samples, and the weight gradient's GEMM alone (another result)."""
    x, g = draw.normal(N, T, I), draw.normal(N, T, O)

    peers = {
        "einsum, materialised": lambda acc: acc.add_(torch.einsum("nto,nti->noi", g, x).float().square().sum(0)),
        "mm per sample": lambda acc: per_sample(acc, x, g),
        "dW GEMM alone": lambda acc: torch.mm(g.flatten(0, 1).mT, x.flatten(0, 1)),
    }
    if T == 1:
        peers["addmm of squares"] = lambda acc: acc.addmm_(g[:, 0].float().square().mT, x[:, 0].float().square())
    return Problem(
        op="linear_sq_",
        mode=draw.mode,
        shape={"N": N, "T": T, "I": I, "O": O},
        acc=draw.zeros(O, I),
        inputs=(x, g),
        oracle=lambda: per_sample(draw.zeros(O, I, wide=True), x.double(), g.double()),
        plain=lambda: product(g.mT, x).square().sum(0),
        peers=peers,
        cost=cost.linear(N, T, I, O, draw.mode),
    )


def scale(draw: Draw, N: int, T: int, D: int, has_x: bool) -> Problem:
    """``scale_sq_`` against the product, sum and square of torch."""
    g = draw.normal(N, T, D)
    x = draw.normal(N, T, D) if has_x else None

    def summed(wide: torch.dtype) -> Tensor:
        return (g.to(wide) if x is None else g.to(wide) * x.to(wide)).sum(1).square().sum(0)

    return Problem(
        op="scale_sq_",
        mode=draw.mode,
        shape={"N": N, "T": T, "D": D, "x": int(has_x)},
        acc=draw.zeros(D),
        inputs=(x, g),
        oracle=lambda: summed(torch.float64),
        plain=lambda: summed(torch.float32),
        peers={"product, sum, square": lambda acc: acc.add_((g if x is None else g * x).sum(1).float().square().sum(0))},
        cost=cost.scale(N, T, D, draw.mode, has_x),
    )


def embedding(draw: Draw, N: int, T: int, V: int, D: int) -> Problem:
    """``embedding_sq_`` against a loop of dense table gradients; token ids by Zipf's law, as text repeats them."""
    ids = (V ** torch.rand(N, T, device=draw.device, dtype=torch.float64)).long().clamp_(max=V) - 1
    g = draw.normal(N, T, D)

    def loop(acc: Tensor) -> Tensor:
        for ids_n, g_n in zip(ids, g, strict=True):
            squared(acc, torch.zeros_like(acc).index_add_(0, ids_n, g_n.to(acc.dtype)))
        return acc

    return Problem(
        op="embedding_sq_",
        mode=draw.mode,
        shape={"N": N, "T": T, "V": V, "D": D},
        acc=draw.zeros(V, D),
        inputs=(ids, g),
        oracle=lambda: loop(draw.zeros(V, D, wide=True)),
        plain=lambda: loop(draw.zeros(V, D)),
        peers={"index_add per sample": loop},
        cost=cost.embedding(N, T, D, draw.mode, cost.distinct(N * T, V)),
    )


def gram(draw: Draw, N: int, T: int, I: int) -> Problem:
    """``gram_`` against the whole product (another result where it is rounded to 16 bits), and with float32 output."""
    x = draw.normal(N, T, I)
    rows = x.flatten(0, 1)

    return Problem(
        op="gram_",
        mode=draw.mode,
        shape={"N": N, "T": T, "I": I},
        acc=draw.zeros(I, I),
        inputs=(x,),
        oracle=lambda: (rows.double().mT @ rows.double()).triu(),
        plain=lambda: product(rows.mT, rows).triu(),
        peers={"x.T @ x": lambda acc: rows.mT @ rows, "x.T @ x, float32 output": lambda acc: float_output(acc, rows.mT, rows)},
        cost=cost.gram(N * T, I, draw.mode),
        compared=torch.triu,
    )


def float_output(acc: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``acc += a b`` with the accumulator's precision kept."""
    return acc.addmm_(a, b) if a.dtype == acc.dtype else acc.add_(product(a, b))


def border(K: int) -> int:
    """Padding that keeps the size of an image, or none under a kernel that has no middle."""
    return K // 2 if K % 2 else 0


def positions(H: int, K: int, stride: int) -> int:
    """Positions along a side."""
    return (H + 2 * border(K) - K) // stride + 1


def patches(x: Tensor, K: int, stride: int) -> Tensor:
    """What the kernel sees at each position: [N, C K^2, positions]."""
    return functional.unfold(x, K, padding=border(K), stride=stride)


def conv(draw: Draw, N: int, C: int, O: int, H: int, K: int, stride: int, groups: int) -> Problem:
    """``conv_sq_`` against unfolding, a loop over samples, and the weight gradient of the batch alone (another result)."""
    P, weight = positions(H, K, stride), (O, C // groups, K, K)
    x, g = draw.normal(N, C, H, H), draw.normal(N, O, P, P)

    def gradient(x: Tensor, g: Tensor) -> Tensor:
        like, both, flat, mask = x.new_zeros(()).expand(weight), [stride] * 2, [0, 0], [False, True, False]
        backward = torch.ops.aten.convolution_backward
        return backward(g, x, like, None, both, [border(K)] * 2, [1, 1], False, flat, groups, mask)[1]

    def loop(acc: Tensor, x: Tensor, g: Tensor) -> Tensor:
        for x_n, g_n in zip(x.split(1), g.split(1), strict=True):
            squared(acc, gradient(x_n, g_n))
        return acc

    def unfolded(acc: Tensor, x: Tensor, g: Tensor) -> Tensor:
        for x_n, g_n in zip(x.split(1), g, strict=True):
            rows, columns = g_n.view(groups, O // groups, P * P), patches(x_n, K, stride).view(groups, -1, P * P)
            squared(acc, product(rows, columns.mT).reshape(weight))
        return acc

    return Problem(
        op="conv_sq_",
        mode=draw.mode,
        shape={"N": N, "C": C, "O": O, "H": H, "K": K, "stride": stride, "groups": groups},
        acc=draw.zeros(*weight),
        inputs=(x, g),
        oracle=lambda: unfolded(draw.zeros(*weight, wide=True), x.double(), g.double()),
        plain=lambda: unfolded(draw.zeros(*weight), x, g),
        peers={
            "unfold and bmm per sample": lambda acc: unfolded(acc, x, g),
            "dW per sample": lambda acc: loop(acc, x, g),
            "dW of the batch alone": lambda acc: gradient(x, g),
        },
        cost=cost.conv(N, C, O, H, P, K, groups, draw.mode),
        options={"stride": (stride, stride), "padding": (border(K), border(K)), "groups": groups},
    )


def conv_gram(draw: Draw, N: int, C: int, H: int, K: int, stride: int) -> Problem:
    """``conv_gram_`` against unfolding and multiplying all of it."""
    x, D = draw.normal(N, C, H, H), C * K * K

    def unfolded(acc: Tensor, x: Tensor) -> Tensor:
        rows = patches(x, K, stride).mT.flatten(0, 1)
        float_output(acc.squeeze(0), rows.mT, rows)
        return acc

    def image_by_image(acc: Tensor, x: Tensor) -> Tensor:  # all patches at once would not fit
        for x_n in x.split(1):
            unfolded(acc, x_n)
        return acc.triu_()

    return Problem(
        op="conv_gram_",
        mode=draw.mode,
        shape={"N": N, "C": C, "H": H, "K": K, "stride": stride},
        acc=draw.zeros(1, D, D),
        inputs=(x,),
        oracle=lambda: image_by_image(draw.zeros(1, D, D, wide=True), x.double()),
        plain=lambda: image_by_image(draw.zeros(1, D, D), x),
        peers={"unfold and x.T @ x": lambda acc: unfolded(acc, x)},
        cost=cost.conv_gram(N, C, H, positions(H, K, stride), K, draw.mode),
        options={"kernel": (K, K), "stride": (stride, stride), "padding": (border(K), border(K))},
        compared=torch.triu,
    )


def ghost(draw: Draw, N: int, C: int, O: int, H: int, K: int) -> Problem:
    """``ghost_norm_`` at stride 1 and one size against the same by pairs in plain torch, and against gradients formed and squared."""
    x, g = draw.normal(N, C, H, H), draw.normal(N, O, H, H)

    def gradients(acc: Tensor, x: Tensor, g: Tensor) -> Tensor:
        for n in range(N):  # all patches at once would not fit
            gradient = torch.zeros(O, C * K * K, dtype=acc.dtype, device=acc.device)
            float_output(gradient, g[n].flatten(1), patches(x[n : n + 1], K, 1)[0].mT)
            acc[n] += gradient.square().sum()
        return acc

    def pairs(acc: Tensor) -> Tensor:
        u, rows = patches(x, K, 1).mT, g.flatten(2).mT
        return acc.add_(((u @ u.mT).double() * (rows @ rows.mT)).sum((1, 2)))

    return Problem(
        op="ghost_norm_",
        mode=draw.mode,
        shape={"N": N, "C": C, "O": O, "H": H, "K": K},
        acc=draw.zeros(N),
        inputs=(x, g),
        oracle=lambda: gradients(draw.zeros(N, wide=True), x.double(), g.double()),
        plain=lambda: gradients(draw.zeros(N), x, g),
        peers={"unfold and two bmm": pairs, "gradient per sample, squared": lambda acc: gradients(acc, x, g)},
        cost=cost.ghost(N, C, O, H, K, draw.mode),
        options={"kernel": (K, K), "padding": (border(K), border(K))},
    )


def score(draw: Draw, R: int, C: int) -> Problem:
    """``categorical_score_`` with labels given against softmax less one-hot; the result has the dtype of the logits."""
    logits, labels = draw.normal(R, C), torch.randint(C, (R,), device=draw.device)

    def softmax(wide: torch.dtype) -> Tensor:
        probabilities = logits.softmax(1, dtype=wide)
        return probabilities.scatter_add_(1, labels[:, None], probabilities.new_full((R, 1), -1.0))

    def plain_step(out: Tensor) -> Tensor:
        torch.softmax(logits, 1, out=out)
        return out.scatter_add_(1, labels[:, None], out.new_full((R, 1), -1.0))

    return Problem(
        op="categorical_score_",
        mode=draw.mode,
        shape={"R": R, "C": C},
        acc=torch.full_like(logits, math.nan),
        inputs=(logits,),
        oracle=lambda: softmax(torch.float64),
        plain=lambda: softmax(torch.float32).to(logits.dtype),
        peers={"softmax, scatter_add": plain_step},
        cost=cost.score(R, C, draw.mode),
        options={"labels": labels},
    )


def log1p(draw: Draw, *size: int) -> Problem:
    """``log1p_sum`` over positive values of all sizes against both terms in float64, one full-size temporary after another."""
    f = draw.normal(*size).mul_(4).exp_()

    def terms(f: Tensor) -> Tensor:
        return torch.stack([f.log1p().sum(dtype=torch.float64), (f.log1p() - f / (1 + f)).sum(dtype=torch.float64)])

    return Problem(
        op="log1p_sum",
        mode=draw.mode,
        shape={"size": math.prod(size)},
        acc=draw.zeros(2, wide=True),
        inputs=(f,),
        oracle=lambda: terms(f.double()),
        plain=lambda: terms(f),
        peers={"log1p, sum in float64": lambda acc: acc.add_(terms(f.double()))},
        cost=cost.log1p(math.prod(size)),
    )


def kron(draw: Draw, I: int, O: int) -> Problem:
    """``kron_log1p_sum`` against the table of all products in float64."""
    a, b = draw.normal(I).mul_(2).exp_(), draw.normal(O).mul_(2).exp_()

    def terms(a: Tensor, b: Tensor) -> Tensor:
        s = torch.outer(a, b)
        return torch.stack([s.log1p().sum(dtype=torch.float64), (s.log1p() - s / (1 + s)).sum(dtype=torch.float64)])

    return Problem(
        op="kron_log1p_sum",
        mode=draw.mode,
        shape={"I": I, "O": O},
        acc=draw.zeros(2, wide=True),
        inputs=(a, b),
        oracle=lambda: terms(a.double(), b.double()),
        plain=lambda: terms(a, b),
        peers={"outer, log1p, sum in float64": lambda acc: acc.add_(terms(a.double(), b.double()))},
        cost=cost.kron_log1p(I, O),
    )


class Cases(NamedTuple):
    """The cases of an op, the most telling first, and the modes that make a difference to it; ``tiny`` is for a rehearsal."""

    build: Callable[..., Problem]
    cases: dict[str, tuple]
    modes: tuple[str, ...]
    tiny: tuple


CASES = {
    "linear_sq_": Cases(linear, LINEAR, EVERY, (3, 5, 7, 11)),
    "gram_": Cases(gram, GRAM, EVERY, (3, 5, 7)),
    "conv_sq_": Cases(conv, CONV, EVERY, (3, 4, 6, 7, 3, 2, 2)),
    "conv_gram_": Cases(conv_gram, CONV_GRAM, EVERY, (3, 4, 7, 3, 2)),
    "ghost_norm_": Cases(ghost, GHOST, EVERY, (3, 4, 6, 3, 3)),
    "scale_sq_": Cases(scale, SCALE, WITHOUT_PRODUCTS, (3, 5, 7, True)),
    "embedding_sq_": Cases(embedding, EMBEDDING, WITHOUT_PRODUCTS, (3, 5, 11, 7)),
    "categorical_score_": Cases(score, SCORE, WITHOUT_PRODUCTS, (5, 7)),
    "log1p_sum": Cases(log1p, LOG1P, ALWAYS_FLOAT, (5, 7)),
    "kron_log1p_sum": Cases(kron, KRON, ALWAYS_FLOAT, (5, 7)),
}


def order() -> list[tuple[str, str, str]]:
    """Every (op, case, mode), the most telling first: each op's first case in its first mode, then each op's second, and so on."""
    ranked = [
        (place, rank, op, case, mode)
        for op, (_, cases, modes, _) in CASES.items()
        for place, mode in enumerate(modes)
        for rank, case in enumerate(cases)
    ]
    return [(op, case, mode) for _, _, op, case, mode in sorted(ranked, key=lambda one: one[:2])]


def build(device: str, op: str, case: str, mode: str, tiny: bool = False) -> Problem:
    """The problem of a case; ``tiny`` with extents of a few, to rehearse on a CPU."""
    found = CASES[op]
    return found.build(Draw(device, mode), *(found.tiny if tiny else found.cases[case]))
