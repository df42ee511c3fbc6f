# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ kernels compiled as C++ and run on the CPU: index maps, edges, barriers and copy pipelines, not speed.

``cuda_on_cpu/`` emulates a cluster of blocks by fibers, and the instructions by what the PTX ISA says of them. What it cannot show:
the rounding of real tensor cores, races that fibers never lose, orderings that only real memory breaks, and anything of time.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
# When asynchronous copies and products happen, and whether threads take turns by chance instead of in order.
TIMINGS = {"eager": 3, "late": 0, "late copies": 2, "late products": 1, "eager, by chance": 7, "late, by chance": 4}
EAGER = TIMINGS["eager"]
UP, MEANWHILE = 1, 2  # the flag: up from the start, or raised while the second block of a cluster begins

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the PATH: the emulator cannot be compiled")
every_timing = pytest.mark.parametrize("timing", TIMINGS.values(), ids=TIMINGS)


def build(name: str, folder: Path) -> ctypes.CDLL:
    """Compile ``cuda_on_cpu/<name>.cpp`` and load it."""
    target, here = folder / f"{name}.so", ROOT / "tests" / "cuda_on_cpu"
    includes = [f"-I{path}" for path in (here, ROOT / "csrc", *include_paths("cpu"))]
    # Shared memory is thread_local and needs no constructor: gcc's check for one calls a weak symbol that is not there.
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-fno-extern-tls-init", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    subprocess.run(["g++", *flags, *includes, here / f"{name}.cpp", "-o", target], check=True)
    return ctypes.CDLL(str(target))


def letter(dtype: torch.dtype) -> ctypes.c_char:
    """A dtype as the emulated ops name it."""
    return ctypes.c_char({torch.float32: b"f", torch.float64: b"d", torch.bfloat16: b"b", torch.float16: b"h"}[dtype])


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def integers(*shape: int, dtype: torch.dtype) -> Tensor:
    """Small integers: every order of their sums gives the same, so results must be right to the last bit."""
    return torch.randint(-3, 4, shape).to(dtype)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def padded(x: Tensor) -> Tensor:
    """The same values inside a larger buffer whose other cells are NaN; rows stay whole vectors apart."""
    N, T, D = x.shape
    buffer = torch.full((N, T + 3, D + 8 + -D % 8), float("nan"), dtype=x.dtype)
    return buffer[:, 1:-2, :D].copy_(x)


def shifted(x: Tensor) -> Tensor:
    """Inside NaN too, and no row begins at a vector's address."""
    buffer = torch.full((*x.shape[:2], x.shape[2] + 5), float("nan"), dtype=x.dtype)
    return buffer[..., 3:-2].copy_(x)


def time_first(x: Tensor) -> Tensor:
    """The rows of a sample lie further apart than the samples, as with ``batch_first=False``."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)
