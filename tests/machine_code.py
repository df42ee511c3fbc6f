# SPDX-License-Identifier: Apache-2.0
"""NVIDIA machine code, read with the disassemblers that Triton's package carries: which instructions, and how often each.

Shared by the tests of the compiled kernels and by the static report (``bench/gpu/static.py``).
"""

import re
import subprocess
from collections import Counter
from pathlib import Path

# As they are called in machine code: Blackwell's, Hopper's, Ampere's for float64, Ampere's.
MATRIX = ("UTCHMMA", "HGMMA", "DMMA", "HMMA")
ASYNCHRONOUS = ("UTMALDG", "UBLKCP", "LDGSTS")  # the copy engine: tiles, lines; a thread's copies
ATOMIC = ("ATOM", "ATOMG", "RED", "REDG")  # on memory; those on shared memory are also how tensor memory is dealt out
SHARED_ATOMIC = ("ATOMS",)
LOCAL = ("LDL", "STL")

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]+)", re.MULTILINE)


def tools() -> Path:
    """Where ptxas, cuobjdump and nvdisasm are."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def tool(name: str, *arguments: object) -> str:
    """What one of them prints."""
    return subprocess.run([tools() / name, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def opcodes(listing: str) -> Counter[str]:
    """How often each instruction occurs, with its modifiers: ``HGMMA.64x128x16.F32.BF16``."""
    return Counter(_INSTRUCTION.findall(listing))


def base(opcode: str) -> str:
    """An instruction without its modifiers."""
    return opcode.partition(".")[0]


def of(found: Counter[str], names: tuple[str, ...]) -> dict[str, int]:
    """Those of ``found`` that are one of ``names``."""
    return {code: count for code, count in sorted(found.items()) if base(code) in names}


def summary(found: Counter[str]) -> dict:
    """What tests and report ask of a kernel's instructions; each with how often it occurs."""
    return {
        "matrix": of(found, MATRIX),
        "copies": of(found, ASYNCHRONOUS),
        "loads": of(found, ("LDG",)),
        "local_accesses": sum(of(found, LOCAL).values()),
        "atomics": sum(of(found, ATOMIC).values()),
        "instructions": sum(found.values()),
    }
