# SPDX-License-Identifier: Apache-2.0
"""The router, and the layout it relies on: one op is one name in four places, imports go down only, importing is cheap."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest
import torch

import fisherfast as ff
from fisherfast import _backend

ROOT = Path(__file__).parents[1]
OPS = sorted(_backend.OPS.values(), key=lambda op: op.name)
BY_NAME = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def arguments(op: _backend.Op) -> tuple[torch.Tensor, ...]:
    """A small valid call: acc and the inputs; together with ``keywords``."""
    g = torch.ones(2, 3, 5)
    if op.name == "linear_sq_":
        return torch.zeros(5, 4), torch.ones(2, 3, 4), g
    if op.name == "gram_":
        return torch.zeros(4, 4), torch.ones(2, 3, 4)
    if op.name == "scale_sq_":
        return torch.zeros(5), g, g
    if op.name == "categorical_score_":
        return torch.zeros(2, 3), torch.ones(2, 3)
    if op.name == "log1p_sum":
        return torch.zeros(2, dtype=torch.float64), g
    if op.name == "kron_log1p_sum":
        return torch.zeros(2, dtype=torch.float64), torch.ones(3), torch.ones(5)
    if op.name == "conv_sq_":
        return torch.zeros(5, 4, 3), torch.ones(2, 4, 6), torch.ones(2, 5, 4)
    if op.name == "ghost_norm_":
        return torch.zeros(2), torch.ones(2, 4, 3), torch.ones(2, 5, 3)
    if op.name == "conv_gram_":
        return torch.zeros(1, 4, 4), torch.ones(2, 4, 6)
    return torch.zeros(7, 5), torch.zeros(2, 3, dtype=torch.int64), g


def keywords(op: _backend.Op) -> dict[str, torch.Tensor]:
    """What a small valid call needs besides ``arguments``."""
    return {"labels": torch.tensor([0, 2])} if op.name == "categorical_score_" else {}


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, in the repository's root, without this process' choice of backend."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("FISHERFAST_BACKEND", "TRITON_INTERPRET")}
    env = {**inherited, "PYTHONSAFEPATH": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)


ONE_CALL = (
    "import torch, fisherfast as ff; acc = torch.zeros(5); ff.ops.scale_sq_(acc, None, torch.ones(2, 3, 5)); print(acc.sum())"
)


# ---- choosing


@BY_NAME
def test_forced_backend_that_cannot_run_says_why_and_what_can(op):
    usable = str(op.usable("cpu")).replace("[", r"\[").replace("]", r"\]")
    message = (
        rf"{op.name}: backend 'cuda' was asked for but cannot run here: needs cuda tensors, got cpu. Usable on cpu: {usable}"
    )
    with ff.backend("cuda"), pytest.raises(ff.BackendError, match=message):
        op.overload(*arguments(op), **keywords(op))


def test_forced_backend_ends_with_its_block():
    op = _backend.OPS["scale_sq_"]
    with ff.backend("cuda"):
        with ff.backend("reference"):
            op.overload(*arguments(op), **keywords(op))
        with pytest.raises(ff.BackendError, match="'cuda' was asked for but cannot run here"):
            op.overload(*arguments(op), **keywords(op))
    op.overload(*arguments(op), **keywords(op))


def test_forced_backend_holds_in_other_threads():
    """On a GPU autograd calls the ops from threads of its own."""
    op, caught = _backend.OPS["scale_sq_"], []

    def call() -> None:
        try:
            op.overload(*arguments(op), **keywords(op))
        except ff.BackendError as error:
            caught.append(error)

    with ff.backend("cuda"):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert len(caught) == 1


def test_unknown_backend_lists_the_choices():
    with (
        pytest.raises(ValueError, match=r"name must be one of \['reference', 'cpu', 'triton', 'cuda'\], got 'cudnn'"),
        ff.backend("cudnn"),
    ):
        pass


def test_environment_variable_forces_a_backend():
    assert "tensor(90.)" in python(ONE_CALL, FISHERFAST_BACKEND="reference").stdout
    refused = python(ONE_CALL, FISHERFAST_BACKEND="cuda")
    assert refused.returncode != 0 and "BackendError: scale_sq_: backend 'cuda' was asked for" in refused.stderr
    unknown = python(ONE_CALL, FISHERFAST_BACKEND="gpu")
    assert unknown.returncode != 0 and "ValueError: backend: name must be one of" in unknown.stderr


def test_block_takes_precedence_over_the_environment_variable():
    code = f"import fisherfast as ff\nwith ff.backend('reference'):\n    exec({ONE_CALL!r})"
    assert "tensor(90.)" in python(code, FISHERFAST_BACKEND="cuda").stdout


def test_triton_without_a_gpu_or_its_interpreter_is_refused():
    refused = python(ONE_CALL, FISHERFAST_BACKEND="triton")
    assert refused.returncode != 0 and "needs cuda tensors, got cpu (or TRITON_INTERPRET=1 to emulate)" in refused.stderr


@BY_NAME
def test_triton_on_a_gpu_too_old_is_refused(op, monkeypatch):
    kernels = pytest.importorskip("fisherfast.kernels._common", reason="triton is not installed", exc_type=ImportError)
    monkeypatch.setattr(kernels, "architecture", lambda device: 75)
    monkeypatch.setattr(op, "unavailable", lambda name, device: None)
    message = f"{op.name}: backend 'triton' was asked for .* compute capability 8.0 or newer, got 75"
    with ff.backend("triton"), pytest.raises(ff.BackendError, match=message):
        op.overload(*arguments(op), **keywords(op))


def test_triton_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(_backend, "_triton_problem", lambda: "triton is not installed; pip install triton")
    op = _backend.OPS["linear_sq_"]
    assert "triton" not in op.usable("cpu") and "triton" not in op.usable("cuda")
    with ff.backend("triton"), pytest.raises(ff.BackendError, match="triton is not installed; pip install triton"):
        op.overload(*arguments(op), **keywords(op))


@BY_NAME
def test_missing_native_code_warns_once_and_runs_the_reference(op, monkeypatch):
    monkeypatch.setattr(_backend, "native_problem", lambda: "fisherfast._C is not built; reinstall")
    monkeypatch.setattr(op, "_warned", set())
    monkeypatch.setattr(op, "_settled", {})
    args, more = arguments(op), keywords(op)
    with pytest.warns(
        UserWarning, match=f"{op.name}: backend 'cpu' is not used: fisherfast._C is not built; reinstall. Running a slower"
    ):
        op.overload(*args, **more)
    expected = args[0].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op.overload(*args, **more)
    times = 1 if op.name == "categorical_score_" else 2  # which writes; the others add
    assert expected.any() and torch.equal(args[0], times * expected)


@BY_NAME
def test_reference_runs_everywhere(op):
    for device in ("cpu", "cuda", "xpu", "meta"):
        assert "reference" in op.usable(device)
        assert op.unavailable("reference", device) is None


@BY_NAME
def test_fake_tensors_take_the_check_only(op):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        args = [mode.from_tensor(t) for t in arguments(op)]
        more = {name: mode.from_tensor(t) for name, t in keywords(op).items()}
        assert op.overload(*args, **more) is None
        with pytest.raises((ValueError, TypeError), match=op.name):
            op.overload(args[0].bfloat16(), *args[1:], **more)


# ---- one op, one name, four places


@BY_NAME
def test_native_schema_is_the_public_one(op):
    problem = _backend.native_problem()
    if problem is not None:
        pytest.skip(problem)
    assert op._native_has("cpu"), f"csrc/cpu/{op.module}.cpp is not in the build; rebuild"
    public, native = str(op.overload._schema), str(getattr(torch.ops.fisherfast_cpp, op.name).default._schema)
    assert native.removeprefix("fisherfast_cpp::") == public.removeprefix("fisherfast::")


def test_every_op_has_its_file_in_every_backend():
    modules = {op.module for op in OPS}
    assert modules == {f.stem for f in (ROOT / "fisherfast/ops").glob("[!_]*.py")}
    assert modules == {f.stem for f in (ROOT / "kernels").glob("[!_]*.py")}
    assert modules <= {f.stem for f in (ROOT / "csrc/cpu").glob("*.cpp")}
    # Where one read of memory is the bound, Triton reaches what CUDA C++ would; convolutions have no CUDA C++.
    triton_only = {"scale_sq", "categorical_score", "log1p_sum", "conv_sq", "conv_gram", "ghost_norm"}
    assert modules - triton_only <= {f.stem for f in (ROOT / "csrc/cuda").glob("*.cu")}


@BY_NAME
def test_triton_launcher_takes_the_arguments_of_the_op(op):
    import importlib
    import inspect

    kernels = importlib.import_module(f"fisherfast.kernels.{op.module}")
    assert inspect.signature(getattr(kernels, op.name)).parameters.keys() == inspect.signature(op.reference).parameters.keys()
    assert op._triton_call_problem(arguments(op), keywords(op)) is None


# ---- floors

FLOORS = {
    "kernels": 0,
    "_backend": 1,
    "_checks": 1,
    "_choice": 1,
    "_error": 1,
    "_names": 1,
    "_version": 1,
    "_nested": 1,
    "_functional": 1,
    "_pieces": 1,
    "_precision": 1,
    "_random": 1,
    "_warning": 1,
    "ops": 2,
    "rules": 3,
    "capture": 4,
    "likelihood": 4,
    "accumulator": 4,
    "data": 4,
    "fisher": 5,
    "information": 6,
    "cli": 7,
    "__main__": 8,
    "demo": 7,
    "environment": 7,
    "loading": 7,
    "report": 7,
    "timing": 7,
}
PUBLIC = 7  # fisherfast itself gathers every floor, so only the top may import it
FILES = sorted([*(ROOT / "fisherfast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])


def module_name(file: Path) -> str:
    """kernels/x.py is installed as fisherfast.kernels.x."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    dotted = ".".join(parts if parts[0] == "fisherfast" else ("fisherfast", *parts))
    return dotted.removesuffix(".__init__")


def imported(file: Path) -> Iterator[str]:
    """Dotted names of what a file imports, wherever in it."""
    package = module_name(file) if file.name == "__init__.py" else module_name(file).rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            yield from (f"{base}.{alias.name}" for alias in node.names)


def floor_of(name: str) -> int:
    """The floor of a dotted name inside fisherfast; a public name without a module of its own belongs to the package."""
    parts = name.split(".")
    return FLOORS.get(parts[1], PUBLIC) if len(parts) > 1 else PUBLIC


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_go_down_only(file):
    name = module_name(file)
    if name == "fisherfast":
        return  # the public names, free to gather from every floor
    assert name.split(".")[1] in FLOORS, f"{name} has no floor; give it one here and in CONTRIBUTING.md"
    inside = [i for i in imported(file) if i.split(".")[0] == "fisherfast"]
    assert [i for i in inside if floor_of(i) > floor_of(name)] == []


@pytest.mark.parametrize("file", sorted((ROOT / "kernels").glob("*.py")), ids=module_name)
def test_kernels_know_only_torch_and_triton(file):
    foreign = {i.split(".")[0] for i in imported(file) if not i.startswith("fisherfast.kernels.")} - {"torch", "triton"}
    assert foreign <= set(sys.stdlib_module_names)


def test_importing_is_lean():
    """Neither Triton nor a CUDA context: a CPU user pays for neither, and a later fork stays possible."""
    code = (
        "import sys, torch\n"
        "before = 'triton' in sys.modules\n"
        "import fisherfast\n"
        "print(('triton' in sys.modules) == before, torch.cuda.is_initialized())"
    )
    run = python(code)
    assert run.stdout.split() == ["True", "False"], run.stderr


def test_kernels_folder_does_not_shadow_the_package_of_that_name():
    run = python(
        "import importlib.util as u; s = u.find_spec('kernels'); print(s and (s.origin or list(s.submodule_search_locations)))"
    )
    assert run.returncode == 0 and str(ROOT) not in run.stdout, run.stdout + run.stderr
