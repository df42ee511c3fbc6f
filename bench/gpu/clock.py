# SPDX-License-Identifier: Apache-2.0
"""Time on the device, by events, with a cold L2; and the ceilings of this device as torch reaches them.

On a CPU, where the bench is only rehearsed, the host's clock and small sizes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median, quantiles
from typing import NamedTuple

import torch
import triton
import triton.language as tl

ROUNDS = 30
SECONDS = 0.5  # about this long for one target
AHEAD_CYCLES = 2_000_000  # about a millisecond, the least for which the device waits before each run
CLOCK = 2e9  # cycles a second, about


class Sizes(NamedTuple):
    """Of what the ceilings are measured on."""

    copy_bytes: int
    gemm: int
    steps: int


SIZES = {"cuda": Sizes(4 * 2**30, 8192, 4096), "cpu": Sizes(2**20, 64, 2)}


def _events(run: Callable[[], object], rounds: int, flush: torch.Tensor, ahead: int) -> list[float]:
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in pairs:
        flush.amax()  # several times the L2, outside the timed region; read, since what is written would be written back inside it
        # Or the events would be of the host: an op takes it longer to launch than many take to run.
        torch.cuda._sleep(ahead)
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def _host(run: Callable[[], object], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def seconds(run: Callable[[], object], device: str) -> list[float]:
    """The quartiles of the time of ``run``, which is called six times before anything is kept."""
    if device == "cpu":
        return quantiles(_host(run, 3), n=4)
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.zeros(l2, dtype=torch.int32, device="cuda")  # four times its bytes
    run()  # what is compiled or allocated once
    torch.cuda.synchronize()
    ahead = max(AHEAD_CYCLES, int(1.5 * CLOCK * min(_host(run, 2))))  # of a route of many launches, what it takes to launch them
    probe = median(_events(run, 3, flush, ahead))
    return quantiles(_events(run, max(5, min(ROUNDS, int(SECONDS / probe))), flush, ahead), n=4)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products may drop bits, ours and torch's, convolutions included."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


@triton.jit
def _multiply_add_kernel(out, factor, steps, BLOCK: tl.constexpr):
    """Chains of multiply-adds of float64 in registers: eight a thread with four warps."""
    x = tl.arange(0, BLOCK).to(tl.float64)
    m = tl.load(factor)
    for _ in range(steps):
        x = x * m + m
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), x)


def _multiply_add(device: str, steps: int, programs: int = 2048, block: int = 1024) -> float:
    programs = programs if device == "cuda" else 1
    out = torch.empty(programs * block, dtype=torch.float64, device=device)
    factor = torch.full((1,), 0.999, dtype=torch.float64, device=device)

    def run() -> None:
        _multiply_add_kernel[(programs,)](out, factor, steps, block, num_warps=4)

    return 2 * programs * block * steps / seconds(run, device)[1]


def _gemm(device: str, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device)[1]


def _copy(device: str, size: int) -> float:
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)[1]


def ceilings(device: str) -> dict[str, float]:
    """Copy bandwidth in B/s, read and written bytes both counted; square GEMM rates in FLOP/s, on random data; float64 by chains."""
    sizes = SIZES[device]
    found = {"copy": _copy(device, sizes.copy_bytes)}
    for mode, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32), ("fp32", torch.float32)):
        with tf32(mode == "tf32"):
            found[mode] = _gemm(device, dtype, sizes.gemm)
    return found | {"fp64": _multiply_add(device, sizes.steps)}
