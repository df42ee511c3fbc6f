# SPDX-License-Identifier: Apache-2.0
"""One JSON file a device and day, written record by record: a run that is stopped loses nothing, and goes on when run again.

What hangs or takes the process with it is on record before it runs, so the next process goes on behind it.
"""

from __future__ import annotations

import datetime
import faulthandler
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gate
import origin
import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
# Any commit of the same sources will do; the driver is whatever the machine that was lent has, down to its build.
INCIDENTAL = {"commit": None, "driver": None}
LOST = "hung, crashed or took too long"
ENDED = 3  # the exit status of a bench that ended by itself, with failures or out of time: to run it again at once is of no use


def newest(results: Path = RESULTS) -> list[Path]:
    """The latest results of every GPU that has some."""
    folders = (folder for folder in sorted(results.glob("*")) if folder.is_dir() and not folder.name.startswith("cpu-"))
    runs = [sorted(folder.glob("*.json"), key=lambda path: path.stem) for folder in folders]
    return [found[-1] for found in runs if found]


def _first_line(*command: str) -> str | None:
    """What a tool says, or None where it is not there or has nothing to say (no git in a copied tree)."""
    try:
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()[0].strip()
    except (FileNotFoundError, subprocess.CalledProcessError, IndexError):
        return None


def facts(device: str) -> dict[str, Any]:
    """What a number depends on. The commit is that of ``$COMMIT`` where the tree came without its history."""
    found = {"device": "rehearsal"}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found = {
            "device": torch.cuda.get_device_name(),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found | {
        "versions": {"torch": torch.__version__, "triton": version("triton"), "cuda": torch.version.cuda},
        "commit": os.environ.get("COMMIT") or _first_line("git", "rev-parse", "HEAD"),
        "sha256": {folder: origin.sources_sha256(ROOT / folder) for folder in ("csrc", "kernels")},
    }


class Document:
    """The file of this machine, these sources and today: what it holds so far, and the way to add to it."""

    def __init__(self, machine: dict[str, Any], results: Path = RESULTS) -> None:
        folder = results / origin.slug(machine["device"])
        folder.mkdir(parents=True, exist_ok=True)
        today = datetime.date.today().isoformat()
        names = itertools.chain([today], (f"{today}-{number}" for number in itertools.count(2)))
        self.path, self.content = next(
            (path, content)
            for path in (folder / f"{name}.json" for name in names)
            if (content := _content(path, machine, today)) is not None
        )

    def save(self, **parts: Any) -> None:
        """Replace parts of the content and write the file, whole or not at all."""
        self.content |= parts
        waiting = self.path.with_suffix(".part")
        waiting.write_text(json.dumps(self.content, indent=1) + "\n")
        waiting.replace(self.path)

    def attempt(
        self, records: list[dict[str, Any]], head: dict[str, Any], measure: Callable[[], dict[str, Any]], seconds: float
    ) -> dict[str, Any]:
        """Add ``head`` and what ``measure`` finds, or why it finds nothing, to one of the content's lists.

        Before it runs the record says ``LOST``, which it keeps if the process does not outlive it. After ``seconds`` it does not:
        a thread without Python ends it, for one that waits for a kernel which hangs can no longer be interrupted. One that can
        did not hang, so there is no record of it.
        """
        records.append(head | {"why": LOST})
        self.save()
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
        try:
            found = measure()
        except Exception as raised:  # noqa: BLE001  the others are still to be measured
            found = {"why": gate.reason(raised)}
        except BaseException:
            records.pop()
            self.save()
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
        records[-1] = head | found
        self.save()
        return records[-1]


def _content(path: Path, machine: dict[str, Any], date: str) -> dict[str, Any] | None:
    """What a file holds, or would; None if it is of another machine or other sources; ``INCIDENTAL`` facts may differ."""
    if not path.exists():
        return {"date": date, "machine": machine, "ceilings": None, "smoke": [], "ops": [], "models": [], "largest": []}
    content = json.loads(path.read_text())
    return content if {**content["machine"], **INCIDENTAL} == {**machine, **INCIDENTAL} else None
