# SPDX-License-Identifier: Apache-2.0
"""Opt-in: time a few configurations of a kernel once, and keep the fastest in a file.

Off unless ``FISHERFAST_AUTOTUNE`` is set: to 1 for a file in the user's cache folder, or to a file's path. A choice is kept for
a device's name, Triton's version, the text of all kernels here, the op and its sizes. Processes may share the file: it is
replaced as a whole; of two that write at once one entry may be lost, and is timed again. Another configuration sums in another
order: results repeat bit by bit with one file, not with and without it.
"""

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.testing

Choice = tuple[dict[str, Any], int]  # block sizes and shares, as the op's ``config`` gives them

_known: dict[tuple[Path, str], Choice] = {}


def cache_file() -> Path | None:
    """Where choices are kept, or None where nothing is to be timed."""
    asked = os.environ.get("FISHERFAST_AUTOTUNE", "0")
    if asked in ("", "0"):
        return None
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "fisherfast" / "autotune.json" if asked == "1" else Path(asked)


def best(op: str, sizes: Any, choices: Sequence[Choice], run: Callable[[Choice], object], device: torch.device) -> Choice:
    """The fastest of ``choices``: from the file, or timed now. The first one where nothing is asked for or can be timed.

    ``run`` must write to outputs of its own. A stream that is being captured in a graph cannot be timed.
    """
    file = cache_file()
    if file is None or len(choices) == 1:
        return choices[0]
    key = f"{_where(device)}; {op} {sizes}"
    if (file, key) not in _known:
        stored = _read(file).get(key)
        found = next((choice for choice in choices if list(choice) == stored), None)
        if found is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return choices[0]
            found = min(choices, key=lambda choice: _seconds(lambda: run(choice)))
            _add(file, key, found)
        _known[file, key] = found
    return _known[file, key]


def _seconds(run: Callable[[], object]) -> float:
    """Median time on the device, with a cold L2."""
    return triton.testing.do_bench(run, warmup=10, rep=40, return_mode="median") / 1e3


def _where(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "emulated"
    return f"{name}; triton {triton.__version__}; kernels {_sources_sha256()}"


@functools.cache
def _sources_sha256() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _read(file: Path) -> dict[str, Any]:
    """The stored choices; none where there is no file."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"FISHERFAST_AUTOTUNE: {file} must be a file that autotuning wrote, got {error}; remove it") from error


def _add(file: Path, key: str, choice: Choice) -> None:
    """Put an entry into the file, which a reader always finds whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**_read(file), key: choice}, indent=1)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=file.name, delete=False) as written:
        written.write(text)
    os.replace(written.name, file)
