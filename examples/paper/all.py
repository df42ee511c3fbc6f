# SPDX-License-Identifier: Apache-2.0
"""Run every reproduction in this folder, one process each; the arguments are passed on. Exits with 1 if one of them breaks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SHARED = {"all", "common", "noisy", "sweep"}


def main() -> int:
    """The number of scripts that broke; a trend that is not there is a FAIL in their output, not an error."""
    scripts = [path for path in sorted(Path(__file__).parent.glob("*.py")) if path.stem not in SHARED]
    broken = [path.name for path in scripts if subprocess.run([sys.executable, path, *sys.argv[1:]], check=False).returncode]
    if broken:
        print(f"broken: {', '.join(broken)}")
    return len(broken)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
