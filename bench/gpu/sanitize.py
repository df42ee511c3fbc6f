# SPDX-License-Identifier: Apache-2.0
"""The squares ops and ``gram_`` in every GPU backend on small awkward shapes, for compute-sanitizer to watch; results are the tests' business."""

import itertools

import torch

import fisherfast as ff
from fisherfast import _backend

SQUARES = ("linear_sq_", "scale_sq_", "embedding_sq_")
LENGTHS = (3, 0, 37, 1)  # ragged samples
SHAPES = ((3, 5, 7, 11), (2, 37, 136, 72), (9, 1, 17, 5))  # N, T, I, O


def inputs(op: str, lead: tuple[int, ...], I: int, O: int, dtype: torch.dtype) -> tuple[tuple[int, ...], list[torch.Tensor]]:
    """The accumulator's shape and the two inputs of an op."""

    def values(width: int) -> torch.Tensor:
        return torch.randn(*lead, width, device="cuda").to(dtype)

    if op == "linear_sq_":
        return (O, I), [values(I), values(O)]
    if op == "embedding_sq_":
        return (O, I), [torch.randint(O, lead, device="cuda"), values(I)]
    return (I,), [values(I), values(I)]


def call(op: str, lead: tuple[int, ...], I: int, O: int, dtype: torch.dtype, offsets: torch.Tensor | None) -> None:
    """One call with every option, and one with none."""
    shape, arguments = inputs(op, lead, I, O, dtype)
    N = lead[0] if offsets is None else len(offsets) - 1
    acc, total, sqnorm = (torch.zeros(s, device="cuda") for s in (shape, shape, (N,)))
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    weight = torch.rand(N, device="cuda")
    run = getattr(ff.ops, op)
    run(acc, *arguments, 0.5, weight=weight, offsets=offsets, total=total, sqnorm=sqnorm, flag=flag)
    run(acc, *arguments, offsets=offsets)


def call_gram(lead: tuple[int, ...], I: int, dtype: torch.dtype) -> None:
    """One call with every option, and one with none."""
    x, weight, flag = (
        torch.randn(*lead, I, device="cuda").to(dtype),
        torch.rand(lead, device="cuda"),
        torch.zeros(1, device="cuda"),
    )
    ff.ops.gram_(torch.zeros(I + 1, I + 1, device="cuda"), x, 0.5, weight=weight, bias=True, flag=flag.int())
    ff.ops.gram_(torch.zeros(I, I, device="cuda"), x)


def main() -> None:
    """Run all of it; the sanitizer's exit status is the answer."""
    offsets = torch.tensor([0, *itertools.accumulate(LENGTHS)], device="cuda")
    for op, name, dtype in itertools.product((*SQUARES, "gram_"), ("triton", "cuda"), (torch.float32, torch.bfloat16)):
        if _backend.OPS[op].unavailable(name, "cuda") is not None:
            print(f"{op} has no {name} backend here: {_backend.OPS[op].unavailable(name, 'cuda')}")
            continue
        with ff.backend(name):
            for N, T, I, O in SHAPES:
                if op == "gram_":
                    call_gram((N, T), I, dtype)
                else:
                    call(op, (N, T), I, O, dtype, None)
            if op in SQUARES:
                call(op, (sum(LENGTHS),), 40, 24, dtype, offsets)
        torch.cuda.synchronize()
        print(f"ran {op} {name} {dtype}")


if __name__ == "__main__":
    main()
