# SPDX-License-Identifier: Apache-2.0
"""Autotuning: off unless asked for, the fastest by the clock kept in a file, and the same result whatever was chosen."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from fisherfast.kernels import _autotune, conv_gram, conv_sq, gram, linear_sq

CHOICES = [({"BLOCK": size}, 3) for size in (128, 64, 32)]
DEVICE = torch.device("cpu")


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("FISHERFAST_AUTOTUNE", str(tmp_path / "folder" / "choices.json"))
    monkeypatch.setattr(_autotune, "_known", {})
    return tmp_path / "folder" / "choices.json"


@pytest.fixture
def clock(monkeypatch):
    """A clock that says smaller blocks are faster; the calls it has seen."""
    seen = []

    def seconds(run):
        run()
        return seen[-1][0]["BLOCK"]

    monkeypatch.setattr(_autotune, "_seconds", seconds)
    return seen


def best(seen, sizes="sizes", choices=CHOICES):
    return _autotune.best("op_", sizes, choices, seen.append, DEVICE)


@pytest.mark.parametrize("value", [None, "", "0"])
def test_off_by_default(monkeypatch, clock, value):
    monkeypatch.delenv("FISHERFAST_AUTOTUNE", raising=False)
    if value is not None:
        monkeypatch.setenv("FISHERFAST_AUTOTUNE", value)
    assert best(clock) == CHOICES[0] and clock == [] and _autotune.cache_file() is None


def test_one_means_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FISHERFAST_AUTOTUNE", "1")
    assert _autotune.cache_file() == tmp_path / "fisherfast" / "autotune.json"


def test_the_fastest_is_timed_once_and_found_again_by_another_process(file, clock, monkeypatch):
    assert best(clock) == CHOICES[2] and len(clock) == 3
    assert best(clock) == CHOICES[2] and len(clock) == 3
    monkeypatch.setattr(_autotune, "_known", {})  # what another process knows
    assert best(clock) == CHOICES[2] and len(clock) == 3
    ((key, value),) = json.loads(file.read_text()).items()
    assert value == [{"BLOCK": 32}, 3]
    assert all(part in key for part in ("emulated", "triton ", "kernels ", "op_ sizes"))
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_other_sizes_and_other_choices_are_timed_again(file, clock, monkeypatch):
    best(clock)
    assert best(clock, "other") == CHOICES[2] and len(clock) == 6
    monkeypatch.setattr(_autotune, "_known", {})
    assert best(clock, choices=CHOICES[:2]) == CHOICES[1] and len(clock) == 8
    assert len(json.loads(file.read_text())) == 2


def test_what_another_process_wrote_meanwhile_stays(file, clock):
    best(clock)
    file.write_text(json.dumps({**json.loads(file.read_text()), "theirs": 1}))
    best(clock, "other")
    assert len(json.loads(file.read_text())) == 3


def test_a_file_that_is_not_ours_is_named(file, clock):
    file.parent.mkdir()
    file.write_text("not json")
    with pytest.raises(
        ValueError, match=r"FISHERFAST_AUTOTUNE: .*choices.json must be a file that autotuning wrote, .*; remove it"
    ):
        best(clock)


def times(monkeypatch):
    """A clock by which the second candidate is the fastest; how many it has seen."""
    if not _autotune.triton.knobs.runtime.interpret:
        pytest.skip("on a GPU: the tensors here are the CPU's")
    seconds = iter([2.0, 1.0, 3.0, 4.0])
    ran = []
    monkeypatch.setattr(_autotune, "_seconds", lambda run: (run(), ran.append(1), next(seconds))[-1])
    return ran


@pytest.mark.parametrize("op", [linear_sq.linear_sq_, conv_sq.conv_sq_], ids=["linear_sq_", "conv_sq_"])
def test_trials_of_squares_leave_the_outputs_alone(op, file, monkeypatch):
    """Every candidate is run before the call, on outputs of its own; the result is exact whichever was chosen."""
    ran = times(monkeypatch)
    x, g = (torch.randint(-2, 3, (2, 3, size)).float() for size in (70, 33))
    gradients = torch.einsum("nto,nti->noi", g, x)
    x, g = x.to(torch.bfloat16), g.to(torch.bfloat16)  # which has more than one candidate at these sizes
    acc, total, sqnorm = torch.ones(33, 70), torch.ones(33, 70), torch.ones(2)
    monkeypatch.setattr(conv_sq, "PRODUCT_PROGRAMS", 1)  # else few programs take the smallest tile, and that alone
    if op is conv_sq.conv_sq_:  # of kernels 1 wide, which read the same products from channels in front of the positions
        x, g, acc, total = x.mT, g.mT, acc.unsqueeze(2), total.unsqueeze(2)
    op(acc, x, g, 2.0, total=total, sqnorm=sqnorm, flag=torch.zeros(1, dtype=torch.int32))
    assert len(ran) > 1
    assert torch.equal(acc.view(33, 70), 1 + 2 * gradients.square().sum(0))
    assert torch.equal(total.view(33, 70), 1 + gradients.sum(0))
    assert torch.equal(sqnorm, 1 + gradients.square().sum((1, 2)))


@pytest.mark.parametrize(("op", "weighted"), [("gram_", False), ("conv_gram_", False), ("conv_gram_", True)])
def test_trials_of_gram_matrices_leave_the_output_alone(op, weighted, file, monkeypatch):
    ran = times(monkeypatch)
    monkeypatch.setattr(conv_gram, "PRODUCT_PROGRAMS", 1)  # as above
    x, weight = torch.randint(-2, 3, (50, 100)).to(torch.bfloat16), torch.randint(0, 3, (50,)).float() if weighted else None
    acc = torch.ones(101, 101)
    if op == "gram_":
        gram.gram_(acc, x, 2.0, weight=weight, bias=True)
    else:
        conv_gram.conv_gram_(acc.unsqueeze(0), x.unsqueeze(2), 2.0, weight=weight, bias=True, kernel=(1,), positions=(1,))
    rows = torch.cat([x.float(), torch.ones(50, 1)], 1)
    expected = 1 + 2 * (rows * (1 if weight is None else weight[:, None])).T @ rows
    assert len(ran) > 1 and torch.equal(acc.triu(), expected.triu())
