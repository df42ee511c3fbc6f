# SPDX-License-Identifier: Apache-2.0
"""The examples of the README run as they are printed, and are what it says they are."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fisherfast as ff

README = Path(__file__).parents[1] / "README.md"
N, I, O = 8, 20, 5  # of the first example


def test_the_list_of_public_names_is_what_they_are():
    """``python docs/make_api.py`` writes it."""
    make_api = runpy.run_path(str(README.parent / "docs" / "make_api.py"))
    assert make_api["PAGE"].read_text() == make_api["page"]()


@pytest.fixture(scope="module")
def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture
def names():
    """What the examples take for granted."""
    model = nn.Sequential(nn.Linear(I, 64), nn.ReLU(), nn.Linear(64, O)).eval()
    x, y = torch.randn(N, I), torch.randint(O, (N,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {
        **{"torch": torch, "ff": ff, "cross_entropy": cross_entropy, "model": model, "tuned": model, "base": base},
        **{"loader": loader, "x": x, "y": y, "N": N, "betas": [0.1, 0.01]},
    }


def test_every_example_runs(blocks, names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(blocks):
        mine = dict(names) if "linear_sq_" in block else names  # its x is no input of the model
        exec(compile(block, f"README.md, block {number}", "exec"), mine)
    assert (tmp_path / "run.safetensors").exists() and "nats" in capsys.readouterr().out


def test_the_first_examples_run_as_pasted(blocks, tmp_path, monkeypatch):
    """One after the other."""
    monkeypatch.chdir(tmp_path)
    mine = {}
    for block in blocks[:4]:
        exec(block, mine)
    assert mine["acc"].shape == (3, 4)


def test_what_one_parameter_s_squares_are(blocks, names):
    (block,) = (block for block in blocks if "\nsum(" in block)
    lines, line = block[: block.index("sum(")], block[block.index("sum(") :]
    (same,) = re.findall(r"`(ff\.fisher\(.*\[name\])` equals the following", README.read_text())
    exec(lines, names)
    torch.testing.assert_close(eval(same, names), eval(line, names))


def test_what_the_op_adds(blocks, names):
    (block,) = (block for block in blocks if "linear_sq_" in block)
    exec(block, names)
    torch.testing.assert_close(names["acc"], ((names["g"].mT @ names["x"]) ** 2).sum(0))
