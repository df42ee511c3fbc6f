# SPDX-License-Identifier: Apache-2.0
"""What ops are tested on: devices, dtypes by their short names, the CPU's instruction sets from the least to the most able."""

import pytest
import torch

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
ISAS = ("portable", "avx2", "avx512", "amx")
every_dtype = pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
