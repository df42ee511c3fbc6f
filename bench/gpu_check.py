# SPDX-License-Identifier: Apache-2.0
"""Everything that needs an NVIDIA GPU, on a machine without a network: build, test, sanitize, bench.

Each stage runs in processes of its own, ends within eight minutes, and can be run again alone: ``gpu_check.py bench``.
Without a GPU it says so and succeeds. What was printed and the results also go to the folder ``$OUT``, if that is set.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

sys.path.insert(0, str(Path(__file__).parent))

from gpu import cost

ROOT = Path(__file__).parents[1]
STAGE_SECONDS = 480
RESULTS = ROOT / "bench" / "results"


class Command(NamedTuple):
    """One process of a stage."""

    argv: list[str]
    environment: dict[str, str]


def build() -> list[Command]:
    """Compile for this GPU and install the checkout, from what is on the machine alone."""
    pip = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-index", "-e", str(ROOT)]
    architecture = cost.architecture(torch.cuda.get_device_capability())
    return [Command(pip, {"FISHERFAST_NATIVE": "cuda", "TORCH_CUDA_ARCH_LIST": architecture, "MAX_JOBS": str(os.cpu_count())})]


def test() -> list[Command]:
    """The op tests on this GPU (their names end in cuda) and the router's."""
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "", *workers]
    return [
        Command([*pytest, "tests/test_ops.py", "tests/test_gram.py", "-k", "cuda"], {}),
        Command([*pytest, "tests/test_backend.py"], {}),
    ]


def sanitize() -> list[Command]:
    """Out-of-bounds and misaligned accesses, then races in shared memory. The allocator's cache would hide the first."""
    script = [sys.executable, str(ROOT / "bench" / "gpu" / "sanitize.py")]
    watched = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tools = ("memcheck", "racecheck")
    return [Command(["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *script], watched) for tool in tools]


def bench() -> list[Command]:
    """Each op against the ceilings measured in the same run; stops in time, and goes on when run again."""
    seconds = str(STAGE_SECONDS - 60)
    return [Command([sys.executable, str(ROOT / "bench" / "gpu" / "run.py"), "--seconds", seconds], {})]


STAGES = {"build": build, "test": test, "sanitize": sanitize, "bench": bench}


def run(command: Command, seconds: float, log: TextIO) -> bool:
    """Run one process, its output shown and logged; False if it fails or outlasts ``seconds``."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **command.environment}
    try:
        process = subprocess.Popen(
            command.argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except FileNotFoundError as missing:
        say(f"gpu-check: {missing.filename} is not on this machine", log)
        return False
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    for line in process.stdout:
        say(line.rstrip("\n"), log)
    timer.cancel()
    return process.wait() == 0


def say(line: str, log: TextIO) -> None:
    """Print and log."""
    print(line, flush=True)
    log.write(line + "\n")
    log.flush()


def stage(name: str, log: TextIO) -> bool:
    """Run a stage's processes one after the other within its time."""
    say(f"gpu-check: {name}", log)
    start = time.monotonic()
    good = [run(command, STAGE_SECONDS - (time.monotonic() - start), log) for command in STAGES[name]()]
    say(f"gpu-check: {name} {'passed' if all(good) else 'FAILED'} in {time.monotonic() - start:.0f} s", log)
    return all(good)


def export(folder: Path, log: Path) -> None:
    """Copy log and results to where the machine's user collects them."""
    shutil.copy(log, folder / log.name)
    for path in log.parent.glob("*.json"):
        shutil.copy(path, folder / path.name)


def main() -> int:
    """Run the stages asked for; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"any of {', '.join(STAGES)}; all by default")
    stages = parser.parse_args().stages or list(STAGES)
    if unknown := [name for name in stages if name not in STAGES]:
        parser.error(f"stages: must be among {list(STAGES)}, got {unknown}")
    if torch.version.cuda is None or not torch.cuda.is_available():
        print("gpu-check: there is no NVIDIA GPU that torch can use here, so there is nothing to check.")
        return 0
    folder = RESULTS / cost.slug(torch.cuda.get_device_name())
    folder.mkdir(parents=True, exist_ok=True)
    log_path, passed = folder / "gpu-check.log", {}
    with log_path.open("w") as log:
        for name in stages:
            passed[name] = stage(name, log)
            if name == "build" and not passed[name]:
                break  # nothing else can run
        say("gpu-check: " + ", ".join(f"{name} {'passed' if ok else 'FAILED'}" for name, ok in passed.items()), log)
    if "OUT" in os.environ:
        export(Path(os.environ["OUT"]), log_path)
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
