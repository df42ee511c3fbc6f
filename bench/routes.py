# SPDX-License-Identifier: Apache-2.0
"""The op cases, and for each op the routes to its result: our backends, plain torch, and yardsticks that compute less."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import fisherfast as ff

OURS = ("cpu", "reference")

_LINEAR = {  # N, T, I, O; float32 unless they say more
    "mlp-in": (256, 1, 784, 1024),
    "mlp-hidden": (256, 1, 1024, 1024),
    "decoder-qkv": (8, 128, 512, 1536),
    "decoder-up": (8, 128, 512, 2048),
    "decoder-down": (8, 128, 2048, 512),
    "decoder-square": (8, 128, 512, 512),
    "decoder-head": (8, 128, 512, 4096),
    "bert-out": (32, 64, 768, 768),
    "decoder-qkv, bf16": (8, 128, 512, 1536, torch.bfloat16),
    "decoder-down, bf16": (8, 128, 2048, 512, torch.bfloat16),
    "llama-in, bf16": (4, 512, 2048, 2048, torch.bfloat16),
    "llama-in, fp16": (4, 512, 2048, 2048, torch.float16),
}
_SCALE = {  # N, T, D, with x
    "decoder-norm": (8, 128, 512, True),
    "decoder-bias": (8, 128, 2048, False),
    "llama-norm": (8, 1024, 4096, True),
    "llama-bias": (8, 1024, 4096, False),
}
_EMBEDDING = {  # N, T, V, D
    "decoder-tokens": (8, 128, 4096, 512),
    "decoder-positions": (8, 128, 128, 512),
    "gpt2-tokens": (8, 1024, 50257, 768),
}


_GRAM = {  # M, D
    "mlp-hidden": (256, 1024),
    "decoder-norm": (1024, 512),
    "decoder-qkv": (1024, 1536),
    "decoder-down": (1024, 2048),
    "bert-out": (2048, 768),
    "llama-in": (4096, 2048),
    "decoder-down, bf16": (1024, 2048, torch.bfloat16),
    "llama-in, bf16": (4096, 2048, torch.bfloat16),
    "llama-in, fp16": (4096, 2048, torch.float16),
}
_CONV_GRAM = {  # N, C, H, K, stride: square maps and kernels, padding K // 2
    "allcnn-32": (32, 96, 32, 3, 1),
    "allcnn-16": (32, 192, 16, 3, 1),
    "allcnn-8": (32, 192, 8, 3, 1),
    "allcnn-down": (32, 96, 32, 3, 2),
    "allcnn-1x1": (32, 192, 8, 1, 1),
    "vgg-32": (32, 64, 32, 3, 1),
    "resnet-16": (16, 128, 16, 3, 1),
    "resnet-4": (16, 512, 4, 3, 1),
    "resnet-stem": (16, 3, 64, 7, 2),
}
_GHOST = {  # N, C, O, H, W, K: maps and square kernels, padding K // 2; K = 1 is a linear layer at H W positions
    "allcnn-16": (32, 192, 192, 16, 16, 3),
    "allcnn-widen": (32, 96, 192, 16, 16, 3),
    "allcnn-8": (32, 192, 192, 8, 8, 3),
    "decoder-out": (8, 512, 512, 128, 1, 1),
    "decoder-up": (8, 512, 2048, 128, 1, 1),
    "decoder-head": (8, 512, 4096, 128, 1, 1),
    "few-weights": (8, 64, 64, 256, 1, 1),  # where the gradient is formed faster
}
_CONV = {  # N, C, O, H, K, stride, groups: square maps and kernels, padding K // 2
    "allcnn-in": (32, 3, 96, 32, 3, 1, 1),
    "allcnn-32": (32, 96, 96, 32, 3, 1, 1),
    "allcnn-down": (32, 96, 96, 32, 3, 2, 1),
    "allcnn-widen": (32, 96, 192, 16, 3, 1, 1),
    "allcnn-16": (32, 192, 192, 16, 3, 1, 1),
    "allcnn-8": (32, 192, 192, 8, 3, 1, 1),
    "allcnn-1x1": (32, 192, 192, 8, 1, 1, 1),
    "resnet-32": (16, 64, 64, 32, 3, 1, 1),
    "resnet-16": (16, 128, 128, 16, 3, 1, 1),
    "resnet-8": (16, 256, 256, 8, 3, 1, 1),
    "resnet-4": (16, 512, 512, 4, 3, 1, 1),
    "resnet-1x1-down": (16, 256, 512, 8, 1, 2, 1),
    "convnext-depthwise": (16, 96, 96, 56, 7, 1, 96),
}


class Problem(NamedTuple):
    """One case of one op: how to reach its result, what that costs at least, and the oracle."""

    shape: dict[str, int]
    routes: dict[str, Callable[[Tensor], object]]  # each adds to the accumulator it is given
    plain: str  # the plain torch route whose float32 error sets the gate for our kernels
    yardstick: tuple[str, Callable[[Tensor], object]]  # computes less than the op: timed, not gated
    acc: tuple[int, ...]
    oracle: Callable[[], Tensor]  # in float64
    flops: int
    bytes: int
    compared: Callable[[Tensor], Tensor] = lambda acc: acc  # the part of the accumulator that is the result


def _by_backend(call: Callable[..., object]) -> dict[str, Callable[[Tensor], object]]:
    def run(name: str, acc: Tensor) -> None:
        with ff.backend(name):
            call(acc)

    return {name: partial(run, name) for name in OURS}


def _product(acc: Tensor, left: Tensor, right: Tensor) -> Tensor:
    # In the operands' own precision, which is that of the result too.
    return torch.mm(left, right, out=acc) if acc.dtype == left.dtype else torch.mm(left, right)


def _linear(N: int, T: int, I: int, O: int, dtype: torch.dtype = torch.float32) -> Problem:
    x, g = torch.randn(N, T, I).to(dtype), torch.randn(N, T, O).to(dtype)

    def per_sample(acc: Tensor, x: Tensor = x, g: Tensor = g) -> Tensor:
        for x_n, g_n in zip(x.to(acc.dtype), g.to(acc.dtype), strict=True):
            gradient = g_n.mT @ x_n
            acc.addcmul_(gradient, gradient)
        return acc

    routes = {
        **_by_backend(lambda acc: ff.ops.linear_sq_(acc, x, g)),
        "mm per sample": per_sample,
        "einsum, materialised": lambda acc: acc.add_(torch.einsum("nto,nti->noi", g.float(), x.float()).square_().sum(0)),
    }
    if T == 1:
        routes["addmm of squares"] = lambda acc: acc.addmm_(g[:, 0].square().mT, x[:, 0].square())
    return Problem(
        shape={"N": N, "T": T, "I": I, "O": O},
        routes=routes,
        plain="einsum, materialised",
        yardstick=("dW GEMM alone", lambda acc: _product(acc, g.flatten(0, 1).mT, x.flatten(0, 1))),
        acc=(O, I),
        oracle=lambda: per_sample(torch.zeros(O, I, dtype=torch.float64)),
        flops=2 * N * T * I * O,
        bytes=dtype.itemsize * N * T * (I + O) + 8 * O * I,
    )


def _copy(size: int) -> tuple[str, Callable[[Tensor], object]]:
    # A copy reads and writes: half the bytes each way. The same footprint, so it enjoys the caches as the op does.
    source, target = torch.ones(size // 8), torch.zeros(size // 8)
    return "copy of as many bytes", lambda acc: target.copy_(source)


def _scale(N: int, T: int, D: int, has_x: bool) -> Problem:
    g = torch.randn(N, T, D)
    x = torch.randn(N, T, D) if has_x else None

    def sum_and_square(acc: Tensor, x: Tensor | None = x, g: Tensor = g) -> Tensor:
        return acc.add_((g if x is None else g * x).sum(1).square_().sum(0))

    size = 4 * N * T * D * (1 + has_x)
    return Problem(
        shape={"N": N, "T": T, "D": D},
        routes={**_by_backend(lambda acc: ff.ops.scale_sq_(acc, x, g)), "sum and square": sum_and_square},
        plain="sum and square",
        yardstick=_copy(size),
        acc=(D,),
        oracle=lambda: sum_and_square(torch.zeros(D, dtype=torch.float64), None if x is None else x.double(), g.double()),
        flops=N * T * D * (1 + has_x),
        bytes=size,
    )


def _embedding(N: int, T: int, V: int, D: int) -> Problem:
    # Token ids by Zipf's law, so that samples repeat tokens as text does; positions as they are.
    ids = torch.arange(T).expand(N, T).contiguous() if V == T else (V ** torch.rand(N, T)).long() - 1
    g = torch.randn(N, T, D)

    def index_add(acc: Tensor, g: Tensor = g) -> Tensor:
        for ids_n, g_n in zip(ids, g, strict=True):
            gradient = torch.zeros_like(acc).index_add_(0, ids_n, g_n)
            acc.addcmul_(gradient, gradient)
        return acc

    size = 8 * N * T + 4 * N * T * D + 8 * len(ids.unique()) * D
    return Problem(
        shape={"N": N, "T": T, "V": V, "D": D},
        routes={**_by_backend(lambda acc: ff.ops.embedding_sq_(acc, ids, g)), "index_add per sample": index_add},
        plain="index_add per sample",
        yardstick=_copy(size),
        acc=(V, D),
        oracle=lambda: index_add(torch.zeros(V, D, dtype=torch.float64), g.double()),
        flops=N * T * D,
        bytes=size,
    )


def _conv(N: int, C: int, O: int, H: int, K: int, stride: int, groups: int) -> Problem:
    padding, acc = K // 2, (O, C // groups, K, K)
    x, P = torch.randn(N, C, H, H), (H + 2 * padding - K) // stride + 1
    g = torch.randn(N, O, P, P)

    def gradient(x: Tensor, g: Tensor) -> Tensor:
        weight, axes = x.new_zeros(()).expand(acc), [0, 0]
        mask = [False, True, False]
        return torch.ops.aten.convolution_backward(
            g, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, axes, groups, mask
        )[1]

    def per_sample(acc: Tensor, x: Tensor = x, g: Tensor = g) -> Tensor:
        for x_n, g_n in zip(x.split(1), g.split(1), strict=True):
            dw = gradient(x_n, g_n)
            acc.addcmul_(dw, dw)
        return acc

    def unfolded(acc: Tensor) -> Tensor:
        for x_n, g_n in zip(x.split(1), g, strict=True):
            patches = torch.nn.functional.unfold(x_n, K, padding=padding, stride=stride).view(groups, -1, P * P)
            dw = torch.einsum("gop,gip->goi", g_n.view(groups, O // groups, P * P), patches).view_as(acc)
            acc.addcmul_(dw, dw)
        return acc

    options = {"stride": (stride, stride), "padding": (padding, padding), "groups": groups}
    return Problem(
        shape={"N": N, "C": C, "O": O, "H": H, "K": K, "stride": stride, "groups": groups},
        routes={
            **_by_backend(lambda acc: ff.ops.conv_sq_(acc, x, g, **options)),
            "dW per sample": per_sample,
            "unfold and einsum": unfolded,
        },
        plain="unfold and einsum",
        yardstick=("dW of the batch alone", lambda acc: gradient(x, g)),
        acc=acc,
        oracle=lambda: per_sample(torch.zeros(acc, dtype=torch.float64), x.double(), g.double()),
        flops=2 * N * P * P * O * (C // groups) * K * K,
        bytes=4 * (x.numel() + g.numel() + 2 * O * (C // groups) * K * K),
    )


def _gram(M: int, D: int, dtype: torch.dtype = torch.float32) -> Problem:
    x = torch.randn(M, D).to(dtype)
    return Problem(
        shape={"M": M, "D": D},
        routes={
            **_by_backend(lambda acc: ff.ops.gram_(acc, x)),
            "addmm of all of it": lambda acc: acc.addmm_(x.float().mT, x.float()),
        },
        plain="addmm of all of it",
        yardstick=("mm alone", lambda acc: _product(acc, x.mT, x)),
        acc=(D, D),
        oracle=lambda: (x.double().mT @ x.double()).triu(),
        flops=M * D * (D + 1),
        bytes=dtype.itemsize * M * D + 4 * D * (D + 1),
        compared=torch.triu,
    )


def _conv_gram(N: int, C: int, H: int, K: int, stride: int) -> Problem:
    x, D, padding = torch.randn(N, C, H, H), C * K * K, K // 2
    P = (H + 2 * padding - K) // stride + 1

    def rows(x: Tensor) -> Tensor:
        return torch.nn.functional.unfold(x, K, padding=padding, stride=stride).mT.flatten(0, 1)

    def unfolded(acc: Tensor) -> Tensor:
        patches = rows(x)
        return acc.addmm_(patches.mT, patches)

    options = {"kernel": (K, K), "stride": (stride, stride), "padding": (padding, padding)}
    patches = rows(x)
    return Problem(
        shape={"N": N, "C": C, "H": H, "K": K, "stride": stride},
        routes={**_by_backend(lambda acc: ff.ops.conv_gram_(acc.unsqueeze(0), x, **options)), "unfold and addmm": unfolded},
        plain="unfold and addmm",
        yardstick=("mm of patches that are there", lambda acc: torch.mm(patches.mT, patches, out=acc)),
        acc=(D, D),
        oracle=lambda: (patches.double().mT @ patches.double()).triu(),
        flops=N * P * P * D * (D + 1),
        bytes=4 * (x.numel() + D * (D + 1)),
        compared=torch.triu,
    )


def _ghost(N: int, C: int, O: int, H: int, W: int, K: int) -> Problem:
    x, g, padding = torch.randn(N, H * W, C), torch.randn(N, H * W, O), K // 2
    x, g = (rows.mT if K == 1 else rows.mT.contiguous() for rows in (x, g))  # of images pixels lie side by side
    x, g = x.unflatten(2, (H, W)), g.unflatten(2, (H, W))
    scratch = torch.zeros(O, C, K, K)

    def gradient(_: Tensor) -> Tensor:
        mask = [False, True, False]
        return torch.ops.aten.convolution_backward(g, x, scratch, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, mask)[1]

    def patches(x: Tensor) -> Tensor:
        return torch.nn.functional.unfold(x, K, padding=padding) if K > 1 else x.flatten(2)

    def formed(acc: Tensor, x: Tensor, g: Tensor) -> Tensor:
        return acc.add_(torch.bmm(g.flatten(2), patches(x).mT).square_().sum((1, 2)))

    def pairs(acc: Tensor) -> Tensor:
        u, rows = patches(x).mT, g.flatten(2).mT
        return acc.add_(((u @ u.mT).double() * (rows @ rows.mT)).sum((1, 2)))

    def squared(acc: Tensor) -> None:
        if K > 1:
            return ff.ops.conv_sq_(scratch, x, g, sqnorm=acc, padding=(padding, padding))
        return ff.ops.linear_sq_(scratch.view(O, C), x.flatten(2).mT, g.flatten(2).mT, sqnorm=acc)

    options = {"kernel": (K, K), "padding": (padding, padding)}
    P = H * W
    return Problem(
        shape={"N": N, "C": C, "O": O, "H": H, "W": W, "K": K},
        routes={
            **_by_backend(lambda acc: ff.ops.ghost_norm_(acc, x, g, **options)),
            "by squares": squared,
            "form the gradients": lambda acc: formed(acc, x, g),
            "unfold and two bmm": pairs,
        },
        plain="form the gradients",
        yardstick=("dW of the batch", gradient),
        acc=(N,),
        oracle=lambda: formed(torch.zeros(N, dtype=torch.float64), x.double(), g.double()),
        flops=N * P * (P + 1) * (O + C),
        bytes=4 * (x.numel() + g.numel() + 2 * N),
    )


CASES = {
    "linear_sq_": _LINEAR,
    "conv_sq_": _CONV,
    "gram_": _GRAM,
    "conv_gram_": _CONV_GRAM,
    "ghost_norm_": _GHOST,
    "scale_sq_": _SCALE,
    "embedding_sq_": _EMBEDDING,
}
PROBLEMS: dict[str, Callable[..., Problem]] = {
    "linear_sq_": _linear,
    "conv_sq_": _conv,
    "gram_": _gram,
    "conv_gram_": _conv_gram,
    "ghost_norm_": _ghost,
    "scale_sq_": _scale,
    "embedding_sq_": _embedding,
}
