# SPDX-License-Identifier: Apache-2.0
"""Time on the device, by events, with a cold L2; and the ceilings of this device as torch reaches them."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median, quantiles

import torch

COPY_BYTES = 4 * 2**30
GEMM = 8192
ROUNDS = 30
SECONDS = 1.0  # about this long for one target


def _events(run: Callable[[], object], rounds: int, flush: torch.Tensor) -> list[float]:
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in pairs:
        flush.zero_()  # several times the L2, outside the timed region
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def seconds(run: Callable[[], object]) -> list[float]:
    """The quartiles of the time of ``run``, which is called three times before anything is kept."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(4 * l2, dtype=torch.int8, device="cuda")
    probe = median(_events(run, 3, flush))
    times = _events(run, max(5, min(ROUNDS, int(SECONDS / probe))), flush)
    return quantiles(times, n=4)


def _gemm(dtype: torch.dtype) -> float:
    a, b = (torch.randn(GEMM, GEMM, device="cuda").to(dtype) for _ in range(2))
    return 2 * GEMM**3 / seconds(lambda: a @ b)[1]


def _copy() -> float:
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source))[1]


def ceilings() -> dict[str, float]:
    """Copy bandwidth in B/s, read and written bytes both counted; square GEMM rates in FLOP/s, on random data."""
    found = {"copy": _copy()}
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for name, dtype, tf32 in (("bf16", torch.bfloat16, False), ("tf32", torch.float32, True), ("fp32", torch.float32, False)):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            found[name] = _gemm(dtype)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return found
