# SPDX-License-Identifier: Apache-2.0
"""Where a number is from: the name of a machine's folder, the digest of the sources, and how every page says versions and digests."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path


def slug(name: str) -> str:
    """A processor's or a device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def sources_sha256(folder: Path) -> str:
    """One digest of the names and contents of a folder's files, whatever the order they are listed in; not of what was compiled."""
    digest = hashlib.sha256()
    compiled = {".so", ".pyc"}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in compiled):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def versions(machine: dict) -> str:
    """The versions that were measured, in words."""
    return ", ".join(f"{name} {version}" for name, version in machine["versions"].items())


def hashes(machine: dict) -> str:
    """The digests of the sources that were measured, as far as one reads them."""
    return ", ".join(f"`{folder}/` {digest[:12]}" for folder, digest in machine["sha256"].items())
