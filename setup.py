# SPDX-License-Identifier: Apache-2.0
"""Build fisherfast: Python from fisherfast/ and kernels/, native code from csrc/. Metadata is in pyproject.toml."""

import os
import re
from pathlib import Path

import torch
from setuptools import find_packages, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
NATIVE = os.getenv("FISHERFAST_NATIVE", "auto")  # auto | cuda | cpu | none
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # libtorch's stable ABI as of torch 2.10
CXX = ["-O3", "-std=c++17", "-ffp-contract=fast", "-Wall", STABLE_ABI]
NVCC = ["-O3", "-std=c++17", "-DUSE_CUDA", STABLE_ABI]
SM90A = "-DFISHERFAST_SM90A"  # the build holds the kernels that need Hopper's own instructions


def architectures() -> str:
    """What to compile for: what is asked for, else the GPUs of this machine, else all that are supported; Hopper always as sm_90a."""
    here = {"{}.{}".format(*torch.cuda.get_device_capability(device)) for device in range(torch.cuda.device_count())}
    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    every = "8.0;9.0;10.0" if version >= (12, 8) else "8.0;9.0"  # older nvcc do not know Blackwell
    asked = os.getenv("TORCH_CUDA_ARCH_LIST") or ";".join(sorted(here)) or every
    return re.sub(r"\b9\.0(?!a)", "9.0a", asked)


def extensions() -> list:
    if NATIVE not in ("auto", "cuda", "cpu", "none"):
        raise SystemExit(f"FISHERFAST_NATIVE: must be auto, cuda, cpu or none, got {NATIVE!r}")
    if NATIVE == "none":
        return []
    cuda = NATIVE == "cuda" or (NATIVE == "auto" and CUDA_HOME is not None and torch.version.cuda is not None)
    patterns = ["csrc/*.cpp", "csrc/cpu/*.cpp", *(["csrc/cuda/*.cu"] if cuda else [])]
    sources = sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))
    headers = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.*h"))
    kind = CUDAExtension if cuda else CppExtension
    nvcc = NVCC
    if cuda:
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
        nvcc = [*NVCC, *([SM90A] if "9.0a" in architectures() else [])]
    return [
        kind(
            "fisherfast._C",
            sources,
            depends=headers,
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": CXX, "nvcc": nvcc},
            py_limited_api=True,
        )
    ]


setup(
    packages=["fisherfast", *(f"fisherfast.{p}" for p in find_packages("fisherfast")), "fisherfast.kernels"],
    package_dir={"fisherfast": "fisherfast", "fisherfast.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
