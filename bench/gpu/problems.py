# SPDX-License-Identifier: Apache-2.0
"""The cases of the GPU benchmark: inputs, float64 oracle, what plain torch does instead, and what the op costs at least."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from gpu import cost
from torch import Tensor

import fisherfast as ff

Run = Callable[[Tensor], object]  # adds the result to the accumulator it is given

LINEAR = {  # N, T, I, O
    "llama8b-qkv": (4, 1024, 4096, 6144),
    "llama8b-up": (4, 1024, 4096, 14336),
    "llama1b-up": (8, 512, 2048, 8192),
    "llama1b-short": (32, 128, 2048, 2048),
    "gpt2-up": (32, 128, 768, 3072),
    "gpt2-square": (32, 128, 768, 768),
    "vit-up": (64, 197, 768, 3072),
    "mlp-hidden": (1024, 1, 1024, 1024),
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
GRAM = {  # M, I
    "llama8b-up": (8192, 4096),
    "llama1b-up": (8192, 2048),
    "gpt2-up": (32768, 768),
    "head-query": (65536, 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Problem(NamedTuple):
    """One case in one dtype."""

    op: str
    shape: dict[str, int]
    acc: tuple[int, ...]
    ours: Run
    oracle: Callable[[], Tensor]  # float64
    plain: Callable[[], Tensor]  # the float32 einsum whose error sets the gate
    peers: dict[str, Run]  # how it is done without us: timed, and their error reported
    cost: cost.Cost


def per_sample(acc: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """A loop of matrix products, squared in the accumulator's dtype."""
    for x_n, g_n in zip(x, g, strict=True):
        gradient = torch.mm(g_n.mT, x_n).to(acc.dtype)
        acc.addcmul_(gradient, gradient)
    return acc


def linear(dtype: torch.dtype, N: int, T: int, I: int, O: int) -> Problem:
    """``linear_sq_`` against materialising, a loop over samples, and the weight gradient's GEMM alone (another result)."""
    x, g = torch.randn(N, T, I, device="cuda").to(dtype), torch.randn(N, T, O, device="cuda").to(dtype)

    def materialised(x: Tensor = x, g: Tensor = g) -> Tensor:
        return torch.einsum("nto,nti->noi", g, x).float().square().sum(0)

    return Problem(
        op="linear_sq_",
        shape={"N": N, "T": T, "I": I, "O": O},
        acc=(O, I),
        ours=lambda acc: ff.ops.linear_sq_(acc, x, g),
        oracle=lambda: per_sample(torch.zeros(O, I, dtype=torch.float64, device="cuda"), x.double(), g.double()),
        plain=lambda: materialised(x.float(), g.float()),
        peers={
            "einsum, materialised": lambda acc: acc.add_(materialised()),
            "mm per sample": lambda acc: per_sample(acc, x, g),
            "dW GEMM alone": lambda acc: torch.mm(g.flatten(0, 1).mT, x.flatten(0, 1)),
        },
        cost=cost.linear(N, T, I, O, x.element_size()),
    )


def scale(dtype: torch.dtype, N: int, T: int, D: int, has_x: bool) -> Problem:
    """``scale_sq_`` against the product, sum and square of torch."""
    g = torch.randn(N, T, D, device="cuda").to(dtype)
    x = torch.randn(N, T, D, device="cuda").to(dtype) if has_x else None

    def summed(wide: torch.dtype) -> Tensor:
        return (g.to(wide) if x is None else g.to(wide) * x.to(wide)).sum(1).square().sum(0)

    return Problem(
        op="scale_sq_",
        shape={"N": N, "T": T, "D": D, "x": int(has_x)},
        acc=(D,),
        ours=lambda acc: ff.ops.scale_sq_(acc, x, g),
        oracle=lambda: summed(torch.float64),
        plain=lambda: summed(torch.float32),
        peers={"product, sum, square": lambda acc: acc.add_((g if x is None else g * x).sum(1).float().square().sum(0))},
        cost=cost.scale(N, T, D, g.element_size(), has_x),
    )


def embedding(dtype: torch.dtype, N: int, T: int, V: int, D: int) -> Problem:
    """``embedding_sq_`` against a loop of dense table gradients; token ids by Zipf's law, as text repeats them."""
    ids = (V ** torch.rand(N, T, device="cuda", dtype=torch.float64)).long().clamp_(max=V) - 1
    g = torch.randn(N, T, D, device="cuda").to(dtype)

    def loop(acc: Tensor, g: Tensor = g) -> Tensor:
        for ids_n, g_n in zip(ids, g, strict=True):
            gradient = torch.zeros(V, D, dtype=acc.dtype, device="cuda").index_add_(0, ids_n, g_n.to(acc.dtype))
            acc.addcmul_(gradient, gradient)
        return acc

    return Problem(
        op="embedding_sq_",
        shape={"N": N, "T": T, "V": V, "D": D},
        acc=(V, D),
        ours=lambda acc: ff.ops.embedding_sq_(acc, ids, g),
        oracle=lambda: loop(torch.zeros(V, D, dtype=torch.float64, device="cuda")),
        plain=lambda: loop(torch.zeros(V, D, device="cuda")),
        peers={"index_add per sample": loop},
        cost=cost.embedding(N, T, D, g.element_size(), len(ids.unique())),
    )


def gram(dtype: torch.dtype, M: int, I: int) -> Problem:
    """``gram_`` against the whole product (another result), in the input's dtype and in float32."""
    x = torch.randn(M, I, device="cuda").to(dtype)

    def product(wide: torch.dtype) -> Tensor:
        return (x.to(wide).mT @ x.to(wide)).triu()

    return Problem(
        op="gram_",
        shape={"M": M, "I": I},
        acc=(I, I),
        ours=lambda acc: ff.ops.gram_(acc, x),
        oracle=lambda: product(torch.float64),
        plain=lambda: product(torch.float32),
        peers={"x.T @ x": lambda acc: x.mT @ x, "x.T @ x, float32": lambda acc: x.float().mT @ x.float()},
        cost=cost.gram(M, I, x.element_size()),
    )


CASES = {
    "linear_sq_": (linear, LINEAR),
    "scale_sq_": (scale, SCALE),
    "embedding_sq_": (embedding, EMBEDDING),
    "gram_": (gram, GRAM),
}
