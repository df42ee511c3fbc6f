# SPDX-License-Identifier: Apache-2.0
"""What all tests share: Triton's interpreter without a GPU, one seed each, poisoned new memory, instruction sets, a GPU that answers."""

import os
import sys
import zlib
from collections.abc import Iterator

import pytest
import torch
from targets import ISAS

# Triton decides while a kernel is being defined whether it will be emulated, so this comes before the first import of one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

POISON_INTEGER = -(2**30)


def pytest_report_header() -> list[str]:
    """Say at the top of every run which backends its op tests cover and why not the others."""
    import fisherfast  # noqa: F401
    from fisherfast import _backend

    lines = []
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for op in _backend.OPS.values():
            reasons = {name: op.unavailable(name, device) for name in _backend.BACKENDS}
            missing = "; ".join(f"{name} ({why})" for name, why in reasons.items() if why)
            lines.append(f"{op.name} on {device}: {', '.join(op.usable(device))}" + (f"; not: {missing}" if missing else ""))
    return lines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Compiling every Triton kernel takes one process minutes: at the end of a run the others would wait for it."""
    items.sort(key=lambda item: "test_triton_aot" not in item.nodeid)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """One seed per test, from its name: the same alone, in the suite and in any order."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def answering_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """End this process if the test broke the GPU: nothing runs on it here any more, and every later test would take the blame.

    Of a worker of pytest-xdist the test is then named as crashed, and a new worker runs the rest.
    """
    yield
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError as error:  # what every CUDA error is
        print(f"{request.node.nodeid}: the GPU is lost to this process: {error}", file=sys.__stderr__, flush=True)
        os._exit(1)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the library allocates without initialising: a cell left unwritten fails a comparison."""

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else POISON_INTEGER)

    def poisoning(allocate):
        def call(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return poison(tensor) if caller.partition(".")[0] == "fisherfast" else tensor

        return call

    monkeypatch.setattr(torch, "empty", poisoning(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoning(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force one instruction set for a test; those the processor lacks are skipped."""
    force = torch.ops.fisherfast_cpp.cpu_isa
    best = force(None)
    if ISAS.index(request.param) > ISAS.index(best):
        pytest.skip(f"this processor has {best}, not {request.param}")
    assert force(request.param) == request.param
    yield request.param
    assert force(best) == best
