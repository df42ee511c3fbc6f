# SPDX-License-Identifier: Apache-2.0
"""Every op in every GPU backend on small awkward shapes, for compute-sanitizer to watch; results are the tests' business."""

import itertools

import torch

import fisherfast as ff
from fisherfast import _backend

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


def main() -> None:
    """Run all of it; the sanitizer's exit status is the answer."""
    offsets = torch.tensor([0, *itertools.accumulate(LENGTHS)], device="cuda")
    for op, name, dtype in itertools.product(_backend.OPS, ("triton", "cuda"), (torch.float32, torch.bfloat16)):
        if _backend.OPS[op].unavailable(name, "cuda") is not None:
            print(f"{op} has no {name} backend here: {_backend.OPS[op].unavailable(name, 'cuda')}")
            continue
        with ff.backend(name):
            for N, T, I, O in SHAPES:
                call(op, (N, T), I, O, dtype, None)
            call(op, (sum(LENGTHS),), 40, 24, dtype, offsets)
        torch.cuda.synchronize()
        print(f"ran {op} {name} {dtype}")


if __name__ == "__main__":
    main()
