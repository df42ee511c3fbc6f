# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one batch, in a process of its own: ``python bench/memory.py CASE QUANTITY WAY`` prints bytes above the resting state.

The peak is the kernel's own count of resident pages (VmHWM), reset just before the batch. A plain step runs first, so that
thread pools and library caches exist already; what it leaves behind is given back. Linux only.
"""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

MMAP_THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors go back to the system at once: live bytes are counted


def peak_bytes(case: str, quantity: str, way: str) -> int:
    """The peak of one batch of ``case`` done by ``way`` ("plain" for the ordinary step), from a fresh process."""
    command = [sys.executable, __file__, case, quantity, way]
    environment = {**os.environ, **MMAP_THRESHOLD, "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore"}
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1])


def _main(case: str, quantity: str, way: str) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    import ekfac  # noqa: F401  registers its ways, and so on
    import exact  # noqa: F401
    import measure
    import models
    import norms  # noqa: F401
    import torch
    import ways

    torch.set_num_threads(measure.THREADS)
    model, x, y = models.CASES[case].build(clear=False)
    plain = ways.plain(model, x, y)
    plain()
    model.zero_grad()
    trim = ctypes.CDLL(None).malloc_trim
    trim(0)
    before = _resident("VmRSS")
    run = plain if way == "plain" else ways.of(quantity)[way].prepare(model, x, y)
    trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    run()
    print(_resident("VmHWM") - before)


if __name__ == "__main__":
    _main(*sys.argv[1:])
