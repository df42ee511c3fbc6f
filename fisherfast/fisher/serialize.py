# SPDX-License-Identifier: Apache-2.0
"""Fishers on disk: safetensors with string metadata, written whole or not at all, checked when read, no pickle.

A structure registers itself under its name, gives its state as tensors and plain values, and is rebuilt from them; this
file knows no structure. The checksum covers metadata and tensors, because one flipped bit in a sum is still a number.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import reprlib
import secrets
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fisherfast._version import __version__
from fisherfast.fisher.inference_mode import outside_inference_mode

_ABANDONED = 3600.0  # seconds without a write, after which nobody is writing a file any more
FORMAT, FORMAT_VERSION = "fisherfast", "2"  # the only version that is read; one more for every change of what a structure writes
State = tuple[dict[str, Tensor], dict[str, Any]]  # tensors, and fields of plain values that JSON keeps exactly
_OWN = ("format", "format_version", "fisherfast_version", "structure", "extra", "checksum")


class FisherFileError(ValueError):
    """A file is not a whole, undamaged Fisher that this version can read; the message says which and why."""


class Storable(Protocol):
    """What a structure must offer to be saved and loaded."""

    structure: ClassVar[str]

    def state(self) -> State:
        """Tensors and fields from which ``from_state`` rebuilds the object bit by bit."""

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> Any:
        """The object whose ``state`` this is."""


Stored = TypeVar("Stored", bound=Storable)
_STRUCTURES: dict[str, type[Storable]] = {}
_Class = TypeVar("_Class", bound=type[Storable])


def storable(structure: str) -> Callable[[_Class], _Class]:
    """Class decorator: files of this structure are loaded as the decorated class."""

    def register(cls: _Class) -> _Class:
        cls.structure = structure
        _STRUCTURES[structure] = cls
        return cls

    return register


@storable("several")
class Several:
    """The results of one run, in one file: what a checkpoint of several requests is. ``load`` gives the tuple."""

    structure: ClassVar[str]

    def __init__(self, results: Sequence[Storable]) -> None:
        self.results = tuple(results)

    def state(self) -> State:
        """See ``Storable``."""
        states = [result.state() for result in self.results]
        tensors = {f"{number}.{name}": t for number, (part, _) in enumerate(states) for name, t in part.items()}
        return tensors, {"parts": [[r.structure, fields] for r, (_, fields) in zip(self.results, states, strict=True)]}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Any, ...]:
        """The tuple of results."""
        results = []
        for number, (structure, own) in enumerate(fields["parts"]):
            prefix = f"{number}."
            part = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            results.append(_STRUCTURES[structure].from_state(part, own))
        return tuple(results)


def save(fisher: Storable, path: str | os.PathLike[str], extra: Mapping[str, str] | None = None) -> None:
    """Write ``fisher`` and the caller's own ``extra`` strings to ``path``; a file already there is replaced at the end.

    Shapes:   any.
    Scale:    sums and weights are stored, not means.
    Errors:   OSError if the folder cannot be written; TypeError if ``extra`` holds anything but strings. After an error
              or a killed process ``path`` is what it was before; what a killed one left beside it goes with a later save, after an hour.
    Numerics: bit-exact.
    Source:   the safetensors format.
    """
    path, extra = Path(path).resolve(), dict(extra or {})  # a link stays one
    if not all(isinstance(text, str) for item in extra.items() for text in item):
        raise TypeError(f"save: extra must be {{str: str}}, got {reprlib.repr(extra)}; encode other values as JSON")
    if path.is_dir():
        raise IsADirectoryError(f"save: path must be a file, got the folder {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save: path must be a file in a folder that exists, got {path}; make the folder first")
    tensors, fields = fisher.state()
    if "__metadata__" in tensors:
        raise ValueError(
            "save: names must differ from '__metadata__', which safetensors keeps for itself, got a parameter of that name; rename it"
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fisherfast_version": __version__,
        "structure": fisher.structure,
        "extra": json.dumps(extra),
        **{field: json.dumps(value) for field, value in fields.items()},
    }
    metadata["checksum"] = _checksum(metadata, tensors)
    _write_whole(path, tensors, metadata)


@outside_inference_mode
def moved(fisher: Stored, device: str) -> Stored:
    """What a file of ``fisher`` would give on another device."""
    _check_device("to", device)
    tensors, fields = fisher.state()
    copies = {name: tensor.detach().to(device, copy=True) for name, tensor in tensors.items()}
    again: Stored = type(fisher).from_state(copies, json.loads(json.dumps(fields)))
    return again


def remove_unfinished(path: Path, idle: float = 0.0) -> None:
    """Remove what processes that were killed while they wrote ``path`` have left beside it, if untouched for so many seconds."""
    for left in path.parent.glob(f".{glob.escape(path.name[:200])}.{'[0-9a-f]' * 8}.tmp"):
        with contextlib.suppress(OSError):  # gone by now, or another user's
            if time.time() - left.stat().st_mtime >= idle:
                left.unlink()


def _write_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")
    remove_unfinished(path, idle=_ABANDONED)
    temporary.touch()
    try:
        # safetensors makes its files readable to their owner only; a result should be as readable as any other file.
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # a full disk
            raise OSError(f"save: {path} must be written whole, got {error}; make room") from error
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], device: str = "cpu") -> Any:
    """The Fisher that ``save`` wrote to ``path``, with its tensors on ``device``.

    Shapes:   as saved.
    Scale:    as saved.
    Errors:   FileNotFoundError; FisherFileError (a ValueError) for a damaged, truncated or foreign file, and for one
              of another format version; ValueError for a device that is not here.
    Numerics: bit-exact; a checksum over metadata and tensors is verified.
    Source:   the safetensors format.
    """
    return load_with_extra(path, device)[0]


@outside_inference_mode
def load_with_extra(path: str | os.PathLike[str], device: str = "cpu") -> tuple[Any, dict[str, str]]:
    """``load`` and the ``extra`` strings given to ``save``: what a checkpoint needs to go on. Errors: as ``load``."""
    path = Path(path)
    _check_device("load", device)
    if path.is_dir():
        raise _bad(path, "it is a folder")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_readable(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise _bad(path, f"it is damaged, truncated or not a safetensors file ({error})") from error
    if metadata.get("checksum") != _checksum(metadata, tensors):
        raise _bad(path, "it is damaged: the checksum does not match its contents")
    fields = {field: json.loads(text) for field, text in metadata.items() if field not in _OWN}
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    return _STRUCTURES[metadata["structure"]].from_state(tensors, fields), json.loads(metadata["extra"])


def _check_device(caller: str, device: str) -> None:
    try:
        if torch.empty(0, device=device).is_meta:
            raise ValueError(f"{caller}: device must hold numbers, got 'meta', whose tensors have shapes only; pass 'cpu'")
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{caller}: device must be one of this machine's, got {str(device)!r} ({reason}); pass 'cpu'") from error


def _check_readable(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise _bad(path, f"it is a safetensors file of something else (format {metadata.get('format')!r})")
    writer, version = f"it was written by fisherfast {metadata.get('fisherfast_version')}", metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise _bad(path, f"{writer} in format {version}, this version reads format {FORMAT_VERSION}; load it with that version")
    if metadata.get("structure") not in _STRUCTURES:
        raise _bad(path, f"{writer}, with structure {metadata.get('structure')!r}; known here: {sorted(_STRUCTURES)}")


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    described = {field: text for field, text in metadata.items() if field != "checksum"}
    crc = zlib.crc32(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _bad(path: Path, reason: str) -> FisherFileError:
    return FisherFileError(f"load: {path} cannot be read as a Fisher: {reason}")
