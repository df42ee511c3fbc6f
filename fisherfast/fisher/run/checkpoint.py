# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of a run: a result with what it must agree in, from which another run of the same measurement goes on."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import CodeType

import torch
from torch import Tensor, nn

from fisherfast.data.batches import Batch
from fisherfast.fisher import serialize
from fisherfast.fisher.run.run import Run

_SECONDS = 60.0  # between two writes


class Checkpoint:
    """A file that a run goes on from if it exists, and that is written every minute, on any error and at the end; not by a signal that
    ends the process without a Python exception.

    Errors: ValueError if it is of another measurement.
    """

    def __init__(self, path: Path, run: Run, settings: dict[str, str]) -> None:
        self._path, self._run, self._settings = path, run, settings
        self._read: list[str] = []  # digests of the batches up to each that was read
        self._samples = 0  # in those of them that the file holds
        serialize.remove_unfinished(path)
        self._done, self._digest = self._resume() if path.exists() else (0, "")
        self._written = time.monotonic()

    def _resume(self) -> tuple[int, str]:
        """How many batches the file holds, and their digest."""
        try:
            read, extra = serialize.load_with_extra(self._path, device=str(self._run.capture.device))
        except serialize.FisherFileError as error:
            raise serialize.FisherFileError(
                f"fisher: checkpoint must be a file that such a run has written, or none, got another ({error}); remove the file or give another"
            ) from error
        digest_of_batches = extra.pop("batches", "")  # which a result that was saved by hand lacks, as it does the settings
        before = read if isinstance(read, tuple) else (read,)
        there, here = {**asdict(before[0].provenance), **extra}, {**asdict(self._run.provenance), **self._settings}
        others = [name for name in {**here, **there} if there.get(name) != here.get(name)]
        if others:
            raise ValueError(
                f"fisher: {self._path} must be of the same measurement, got "
                f"{', '.join(f'{name} {there.get(name)!r} instead of {here.get(name)!r}' for name in others)}; remove the file or give another"
            )
        self._run.restore(before)
        return before[0].batches, digest_of_batches

    def holds(self, batch: Batch) -> bool:
        """Note that a batch was read; whether it is in the file. Errors: ValueError if the file was made of others."""
        self._read.append(digest(f"{self._read[-1] if self._read else ''} {batch.fingerprint()}"))
        if len(self._read) > self._done:
            return False
        self._samples += batch.N
        if len(self._read) == self._done:
            self._check_batches()
        return True

    def _check_batches(self) -> None:
        if self._samples != self._run.tally.samples:
            raise ValueError(
                f"fisher: data must come in the batches that {self._path} was made of, got {self._samples} samples in the first "
                f"{self._done}, where it holds {self._run.tally.samples}; give the same data, or remove the file"
            )
        if self._digest != self._read[-1]:
            raise ValueError(
                f"fisher: data must be those that {self._path} was made of, got others in the first {self._done} batches; turn off "
                "shuffling and random augmentation, or remove the file"
            )

    def check_all_read(self) -> None:
        """Raise ValueError if the data ended before the batches that the file holds."""
        if len(self._read) < self._done:
            raise ValueError(
                f"fisher: data must yield the {self._done} batches that {self._path} holds, got {len(self._read)}; give the same data, "
                "or remove the file"
            )

    def write_if_due(self) -> None:
        """Write if a minute has passed."""
        if time.monotonic() - self._written > _SECONDS:
            self._write()
            self._written = time.monotonic()

    def end(self, error: BaseException | None = None) -> None:
        """Write what is new, at the end or where an ``error`` ends the run, which nothing that writing meets must hide."""
        if self._run.tally.batches <= self._done:
            return
        try:
            self._write()
        except Exception as problem:
            if error is None:
                raise
            error.add_note(f"fisherfast: {self._path} holds what it held before: {problem}")

    def _write(self) -> None:
        results = self._run.results()
        extra = {**self._settings, "batches": self._read[self._run.tally.batches - 1]}
        serialize.save(results[0] if len(results) == 1 else serialize.Several(results), self._path, extra=extra)


def digest(text: str) -> str:
    """A short one, for a file's fields."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def digest_of_weights(model: nn.Module) -> str:
    """Of the model's numbers, with the buffers that its files lack: a measurement goes on only with the model it began with."""
    state = hashlib.blake2b(digest_size=8)
    for name, value in (model.state_dict() | dict(model.named_buffers())).items():
        if isinstance(value, Tensor):
            state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            for part in _dense_parts(value.detach()):
                state.update(part.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _dense_parts(value: Tensor) -> list[Tensor]:
    if value.is_meta:
        return []
    if value.layout is torch.strided:
        return [value]
    value = value.to_sparse_coo().coalesce()
    return [value.indices(), value.values()]


def digest_of_function(function: Callable[..., object]) -> str:
    """A digest of its name and its code, wherever it is in its file; of a callable object, of its class."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return digest(f"{name} {_computed(getattr(function, '__code__', None))}")


def _computed(code: object) -> object:
    if isinstance(code, frozenset):
        return sorted(map(repr, code))  # in the order of no process's hashes
    if not isinstance(code, CodeType):
        return code
    return code.co_code.hex(), code.co_names, [_computed(value) for value in code.co_consts]
