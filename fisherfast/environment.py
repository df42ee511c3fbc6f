# SPDX-License-Identifier: Apache-2.0
"""What this machine offers: versions, devices, and for each op the backend that will run and why not the others."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

import fisherfast.ops  # noqa: F401  registers the ops
from fisherfast import _backend, _choice

_PACKAGES = ("fisherfast", "torch", "triton", "numpy", "safetensors")


def render() -> Group:
    """Facts and one table of backends per device, for ``rich.console.Console.print``."""
    lines = Table.grid(padding=(0, 2))
    lines.add_column(justify="right", style="bold")
    for line in facts().items():
        lines.add_row(*map(Text, line))
    return Group(lines, *(_backend_table(device, name) for device, name in devices().items()))


def facts() -> dict[str, str]:
    """Versions, and whether the compiled extension loads."""
    versions = {name: _version(name) for name in _PACKAGES}
    native = _backend.native_problem() or "loads"
    isa = getattr(torch.ops.fisherfast_cpp, "cpu_isa", None) if native == "loads" else None
    return {
        "python": platform.python_version(),
        **versions,
        "fisherfast._C": native if isa is None else f"loads, CPU kernels for {isa()}",
        "forced backend": _backend.forced() or "none",
    }


def devices() -> dict[str, str]:
    """The device types that ops can run on here, with the hardware's names."""
    found = {"cpu": f"{_cpu_name()}, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        found["cuda"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _preferred(op: str, device: str) -> set[str]:
    if device != "cuda" or _backend.forced() is not None:
        return set()
    return _choice.preferred(op, _choice.capability(torch.device("cuda", torch.cuda.current_device())))


def _backend_table(device: str, name: str) -> Group:
    table = Table(title=f"\nOps on {device} ({name})", title_justify="left")
    for heading in ("op", *_backend.BACKENDS):
        table.add_column(heading)
    reasons: dict[str, int] = {}
    for op in _backend.OPS.values():
        run = _preferred(op.name, device) or {_backend.forced() or op.usable(device)[0]}
        row = []
        for backend in _backend.BACKENDS:
            problem = op.unavailable(backend, device)
            if problem is None:
                row.append("on request" if backend not in run else "runs" if len(run) == 1 else "runs where faster")
            else:
                row.append(f"no ({reasons.setdefault(problem, len(reasons) + 1)})")
        table.add_row(op.name, *row)
    return Group(table, *(Text(f"  ({number}) {problem}") for problem, number in reasons.items()))
