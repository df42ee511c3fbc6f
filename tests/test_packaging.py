# SPDX-License-Identifier: Apache-2.0
"""What is built and installed: a wheel without a compiler still works and says once that it is slow."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fisherfast", "kernels", "csrc")

USED = """
import warnings, torch, fisherfast as ff
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    acc = torch.zeros(2, 3)
    for _ in range(3):
        ff.ops.linear_sq_(acc, torch.ones(5, 1, 3), torch.ones(5, 1, 2))
assert (acc == 15).all() and ff.__file__.startswith(TARGET), ff.__file__
messages = [str(w.message) for w in caught]
assert len(messages) == 1 and "fisherfast._C is not built" in messages[0] and "FISHERFAST_NATIVE" in messages[0], messages
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources with FISHERFAST_NATIVE=none."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", out, source]
    subprocess.run(command, check=True, env={**os.environ, "FISHERFAST_NATIVE": "none"})
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_kernels_inside_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "fisherfast/kernels/linear_sq.py",
        "fisherfast/report/page.py",
        "fisherfast/templates/report.html.jinja",
        "fisherfast/py.typed",
    } <= set(names)
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"fisherfast"}


def test_without_native_code_it_works_and_warns_once(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    # A site folder in front of the editable install, and no path hooks of it.
    code = f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; TARGET = {str(tmp_path)!r}\n{USED}"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
