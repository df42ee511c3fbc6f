# SPDX-License-Identifier: Apache-2.0
"""Everything that needs an NVIDIA GPU, on a machine without a network: build, smoke, bench, models, test, sanitize.

Each stage runs in processes of its own, ends within eight minutes (``--seconds`` for less), and goes on where it stopped when it is
run again, alone if one likes: ``gpu_check.py bench``. Without a GPU it says so and succeeds. What was printed and the results also
go to the folder ``$OUT``, if that is set, every ten seconds; on a fresh machine, put them back into ``bench/results/`` and it goes on, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

sys.path.insert(0, str(Path(__file__).parent))

import origin
from gpu import cost, in_place, record

ROOT = Path(__file__).parents[1]
STAGE_SECONDS = 480
EXPORT_SECONDS = 10
SPARE = 30  # seconds in which a bench ends what it has begun
GRACE = 5  # seconds in which what is asked to end takes its record back, unless it hangs
TRIES = 6  # processes of a bench: one that hangs, crashes or breaks the device is followed by another
TAIL = 30  # lines of a process that failed are kept
RESULTS = ROOT / "bench" / "results"
GPU_TESTS = ("float64", "not float64 and not on_the_cpu", "on_the_cpu")  # the gate, the ops' own rules, models and what they need
FIRST_SHARE = 0.75  # of the time, for what there is something instead of
BUILDS = ROOT / "build" / "gpu-check-builds.json"  # how builds ended on this machine, and of which sources


class Command(NamedTuple):
    """One process of a stage.

    ``lasting``: once it has passed, it need not run again while the sources are the same. ``resuming``: a bench, which takes
    ``--seconds``, goes on behind what hung or crashed when it is run again, and says by ``ENDED`` that this is of no use.
    ``building``: once it has passed, or failed by itself, it need not run again on this machine while the sources are the same.
    """

    argv: list[str]
    environment: dict[str, str] = {}
    lasting: bool = False
    resuming: bool = False
    building: bool = False
    instead: Command | None = None  # what the others can do with, where this one fails

    @property
    def name(self) -> str:
        """What the record of commands calls it, on any machine."""
        settings = [f"{key}={value}" for key, value in self.environment.items()]
        return " ".join([*settings, *(part.removeprefix(f"{ROOT}/") for part in self.argv if part != sys.executable)])


class Ended(NamedTuple):
    """How a process ended, and the last lines that it printed."""

    status: int
    tail: list[str]


def build() -> list[Command]:
    """Compile for this GPU and install the checkout, from what is on the machine alone.

    Without CUDA C++ there is still Triton; and where even that cannot be installed, it is pip that fails, and nothing is.
    """
    pip = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-index", "-e", str(ROOT)]
    architecture = cost.architecture(torch.cuda.get_device_capability())
    whole = {"FISHERFAST_NATIVE": "cuda", "TORCH_CUDA_ARCH_LIST": architecture}
    inside = Command([sys.executable, str(ROOT / "bench" / "gpu" / "in_place.py")], whole, building=True)
    without = Command(pip, {"FISHERFAST_NATIVE": "cpu"}, building=True, instead=inside)
    return [Command(pip, whole, building=True, instead=without)]


def test() -> list[Command]:
    """What only a GPU can show, then the tests of every op whose names end in cuda, then the router's; one process a file.

    The property tests are left out: of their any sizes nearly each is another Triton kernel to compile. A CPU's emulator runs them.
    """
    workers = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadgroup"] if importlib.util.find_spec("xdist") else []
    # By a thread: a test that waits for a kernel which hangs cannot be interrupted, only its process ended.
    limits = ["--timeout", "120", "--timeout-method", "thread"] if importlib.util.find_spec("pytest_timeout") else []
    # Test by test in the log: one that is ended at its limit has said what passed.
    pytest = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-m", "not hypothesis", *workers, *limits]
    ops = ("ops", "gram", "conv_sq", "conv_gram", "ghost_norm", "categorical_score", "log1p_sum")
    return [
        *(Command([*pytest, "tests/test_gpu.py", "-k", some], lasting=True) for some in GPU_TESTS),
        *(Command([*pytest, f"tests/test_{name}.py", "-k", "cuda"], lasting=True) for name in ops),
        Command([*pytest, "tests/test_backend.py"], lasting=True),
    ]


def sanitize() -> list[Command]:
    """Out-of-bounds and misaligned accesses, then races in shared memory. The allocator's cache would hide the first.

    Calls of the driver that fail are no errors here: libraries ask what is there by such calls, and torch and our launches check theirs.
    """
    script = [sys.executable, str(ROOT / "bench" / "gpu" / "sanitize.py")]
    watched = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Command(["compute-sanitizer", "--tool", tool, *options, "--error-exitcode", "1", *script, group], watched, lasting=True)
        for tool, options in (("memcheck", ["--report-api-errors", "no"]), ("racecheck", []))
        for group in ("products", "others")
    ]


def smoke() -> list[Command]:
    """Small calls of every op: what fails or hangs there is left out of the bench."""
    return [_bench("smoke.py")]


def bench() -> list[Command]:
    """Each op against the ceilings measured in the same run."""
    return [_bench("run.py")]


def models() -> list[Command]:
    """Whole models beside a plain step and the peers' ways."""
    return [_bench("models.py")]


def _bench(script: str) -> Command:
    return Command([sys.executable, str(ROOT / "bench" / "gpu" / script)], resuming=True)


# What tells most comes first: a short lease ends somewhere behind it.
STAGES = {"build": build, "smoke": smoke, "bench": bench, "models": models, "test": test, "sanitize": sanitize}


class Progress:
    """What has passed and what failed with the sources as they are; a file, so that a later run on another machine knows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        folders = ("csrc", "kernels", "fisherfast", "tests", "bench/gpu")
        self.sources = f"torch {torch.__version__} " + " ".join(origin.sources_sha256(ROOT / folder)[:16] for folder in folders)
        found = json.loads(path.read_text()) if path.exists() else {}
        known = found if found.get("sources") == self.sources else {}
        self.passed: list[str] = known.get("passed", [])
        self.failed: dict[str, list[str]] = known.get("failed", {})  # with the last lines
        builds = json.loads(BUILDS.read_text()) if BUILDS.exists() else {}
        # Exit statuses; only one of them is 0, as what it built has taken the place of what was there.
        self.builds: dict[str, int] = builds["status"] if builds.get("sources") == self.sources else {}

    def knows(self, command: Command) -> bool:
        """Whether it need not run again: it has passed, or what it builds is here."""
        return self.builds.get(command.name) == 0 or command.name in self.passed

    def refuses(self, command: Command) -> bool:
        """Whether it would fail here again: a build that was not ended from outside, for want of time or memory, but ended itself."""
        return self.builds.get(command.name, 0) > 0

    def add(self, command: Command, ended: Ended) -> None:
        """Note how a command ended."""
        self.failed.pop(command.name, None)
        if ended.status != 0:
            self.failed[command.name] = ended.tail
        elif command.lasting:
            self.passed.append(command.name)
        if command.building:
            refused = {name: status for name, status in self.builds.items() if status > 0}
            self.builds = {**refused, command.name: ended.status}
            BUILDS.parent.mkdir(exist_ok=True)
            BUILDS.write_text(json.dumps({"sources": self.sources, "status": self.builds}, indent=1) + "\n")
        known = {"sources": self.sources, "passed": self.passed, "failed": self.failed}
        self.path.write_text(json.dumps(known, indent=1) + "\n")


def run(command: Command, seconds: float, log: TextIO) -> Ended:
    """Run one process, its output shown and logged; one that outlasts ``seconds`` is ended. A bench begins nothing in the last of them."""
    timed = ["--seconds", str(int(seconds - SPARE))] if command.resuming else []
    found_here = {"PYTHONPATH": str(ROOT)} if in_place.KERNELS.is_symlink() else {}
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **found_here, **command.environment}
    try:
        process = subprocess.Popen(
            [*command.argv, *timed],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,  # its own workers end with it
        )
    except FileNotFoundError as missing:
        problem = f"{missing.filename} is not on this machine"
        say(f"gpu-check: {problem}", log)
        return Ended(127, [problem])
    timers = [
        threading.Timer(seconds + wait, os.killpg, (process.pid, end))
        for wait, end in ((0, signal.SIGTERM), (GRACE, signal.SIGKILL))
    ]
    for timer in timers:
        timer.start()
    tail: deque[str] = deque(maxlen=TAIL)
    for line in process.stdout:
        tail.append(line.rstrip("\n"))
        say(tail[-1], log)
    for timer in timers:
        timer.cancel()
    return Ended(process.wait(), list(tail))


def say(line: str, log: TextIO) -> None:
    """Print and log."""
    print(line, flush=True)
    log.write(line + "\n")
    log.flush()


def passes(command: Command, deadline: float, progress: Progress, log: TextIO) -> bool:
    """Run a process, unless it has passed before, and what there is instead if it fails; whether one of them passed."""
    if progress.knows(command):
        say(f"gpu-check: passed before: {command.name}", log)
        return True
    if progress.refuses(command):
        say(f"gpu-check: failed before: {command.name}", log)
        return command.instead is not None and passes(command.instead, deadline, progress, log)
    for _ in range(TRIES):
        remaining = deadline - time.monotonic()
        if remaining <= (SPARE if command.resuming else 0):
            say(f"gpu-check: no time left: {command.name}", log)
            return False
        ended = run(command, remaining if command.instead is None else FIRST_SHARE * remaining, log)
        progress.add(command, ended)
        if ended.status == 0:
            return True
        if not command.resuming or ended.status == record.ENDED:
            break
        say(f"gpu-check: ended with status {ended.status}: {command.name}", log)
    say(f"gpu-check: failed: {command.name}", log)
    return command.instead is not None and passes(command.instead, deadline, progress, log)


def stage(name: str, seconds: int, progress: Progress, log: TextIO) -> bool:
    """Run a stage's processes one after the other within its time, but those that have passed before."""
    say(f"gpu-check: {name}", log)
    start, good = time.monotonic(), True
    for command in STAGES[name]():
        good &= passes(command, start + seconds, progress, log)
    say(f"gpu-check: {name} {'passed' if good else 'FAILED'} in {time.monotonic() - start:.0f} s", log)
    return good


def export(results: Path, folder: Path) -> None:
    """Copy log, results and what has passed to where the machine's user collects them, each file whole or not at all."""
    for path in (found for pattern in ("*.log", "*.json", "*.txt") for found in results.glob(pattern)):
        waiting = folder / f"{path.name}.part"
        shutil.copy(path, waiting)
        waiting.replace(folder / path.name)


@contextmanager
def exporting(results: Path, seconds: float = EXPORT_SECONDS) -> Iterator[None]:
    """Export to ``$OUT``, if that is set, every few seconds and at the end: whoever lent the machine may end everything at any time."""
    if "OUT" not in os.environ:
        yield
        return
    folder, over = Path(os.environ["OUT"]), threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            export(results, folder)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        export(results, folder)


def main() -> int:
    """Run the stages asked for; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"any of {', '.join(STAGES)}; all by default")
    parser.add_argument("--seconds", type=int, default=STAGE_SECONDS, help=f"of a stage at most; {STAGE_SECONDS} by default")
    given = parser.parse_args()
    stages = given.stages or list(STAGES)
    if unknown := [name for name in stages if name not in STAGES]:
        parser.error(f"stages: must be among {list(STAGES)}, got {unknown}")
    if torch.version.cuda is None or not torch.cuda.is_available():
        print("gpu-check: there is no NVIDIA GPU that torch can use here, so there is nothing to check.")
        return 0
    folder = RESULTS / origin.slug(torch.cuda.get_device_name())
    folder.mkdir(parents=True, exist_ok=True)
    log_path, passed, progress = folder / "gpu-check.log", {}, Progress(folder / "gpu-check-progress.txt")
    with log_path.open("a") as log, exporting(folder):
        for name in stages:
            passed[name] = stage(name, given.seconds, progress, log)
            if name == "build" and not passed[name]:
                break  # nothing else can run
        say("gpu-check: " + ", ".join(f"{name} {'passed' if ok else 'FAILED'}" for name, ok in passed.items()), log)
        for name in progress.failed:
            say(f"gpu-check: failed, see {progress.path.name}: {name}", log)
    return 0 if all(passed.values()) and not progress.failed else 1


if __name__ == "__main__":
    sys.exit(main())
