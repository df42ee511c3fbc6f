# SPDX-License-Identifier: Apache-2.0
"""``python bench/gpu/in_place.py``: compile inside the checkout, for a machine whose pip installs nothing.

Packages are then found by ``PYTHONPATH`` alone, which ``gpu_check.py`` sets where it sees the link made here.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "fisherfast" / "kernels"  # where an installed fisherfast has them

if __name__ == "__main__":
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, check=True)
    KERNELS.unlink(missing_ok=True)
    KERNELS.symlink_to(Path("..") / "kernels")
