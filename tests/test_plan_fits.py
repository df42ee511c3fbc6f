# SPDX-License-Identifier: Apache-2.0
"""Whether a run fits: the plan's answer is the run's, a refusal comes before a sum is allocated, and table and command show it."""

import sys

import networks
import pytest
import torch
from test_plan import MANY, STRUCTURES
from test_report import shown
from torch import nn
from typer.testing import CliRunner

import fisherfast as ff
from fisherfast import cli
from fisherfast.accumulator import RunningSum
from fisherfast.fisher.run import memory

GIB = 2**30


@pytest.fixture
def free(monkeypatch):
    """Sets the memory that is free."""

    def leave(size):
        monkeypatch.setattr(memory, "free_bytes", lambda device: size)

    return leave


@pytest.fixture
def allocated(monkeypatch):
    """The shapes of the sums that were allocated."""
    shapes, made = [], RunningSum._allocated

    def noting(self):
        shapes.append(tuple(self.shape))
        return made(self)

    monkeypatch.setattr(RunningSum, "_allocated", noting)
    return shapes


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_plan_allocates_no_sums(structure, allocated):
    build, data = networks.COVERED["conv-groups-same"]
    ff.plan(build(), data(), structure)
    assert allocated == []


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_run_fits_exactly_what_the_plan_says(structure, free, allocated):
    build, data = networks.COVERED["class-token-and-table"]
    model, batch = build(), data(MANY)
    planned = ff.plan(model, batch, structure)
    assert planned.needed_bytes == planned.peak_bytes + planned.activation_bytes + planned.scratch_bytes
    free(planned.needed_bytes)
    assert ff.plan(model, batch, structure).fits
    free(planned.needed_bytes - 1)
    crowded = ff.plan(model, batch, structure)
    assert not crowded.fits and crowded.free_bytes == planned.needed_bytes - 1
    of_batch = planned.activation_bytes + planned.scratch_bytes
    assert crowded.problem.endswith(f", and {memory.in_words(of_batch)} for a batch beside them; take smaller batches")
    free(planned.peak_bytes - 1)
    refused = ff.plan(model, batch, structure)
    with pytest.raises(MemoryError) as error:
        ff.fisher(model, [batch], structure=structure, progress=False)
    assert str(error.value) == refused.problem.replace(f", and {memory.in_words(of_batch)} for a batch beside them", "")
    assert allocated == [] and not hasattr(error.value, "fisher")
    free(planned.peak_bytes)  # when a run looks, its first batch is there
    ff.fisher(model, [batch], structure=structure, progress=False)


def test_collect_refuses_at_the_first_loss(free, allocated):
    model, loss = nn.Linear(3, 5), nn.CrossEntropyLoss(reduction="none")
    free(100)
    with pytest.raises(
        MemoryError, match=r"must fit what is free on cpu, 100 B, got 328 B.*of which 328 B for 'weight' and 'bias'"
    ):
        with ff.collect(model, ff.KFAC()) as stats:
            stats.backward(loss(model(torch.randn(7, 3)), torch.randint(5, (7,))))
    assert allocated == [] and all(p.grad is None for p in model.parameters())


class Head(nn.Module):
    """A head of 128k classes as the model sees it: a forward pass of a few of them would do."""

    def __init__(self, V=131072):
        super().__init__()
        self.head = nn.Linear(2, V, bias=False)

    def forward(self, x):
        return self.head(x)


def test_a_large_vocabulary_is_refused_with_the_ways_out(free):
    model, batch = Head(), (torch.randn(2, 2), torch.randint(9, (2,)))
    free(64 * GIB)
    planned = ff.plan(model, batch, (ff.KFAC(max_factor_dim=2**20),))
    assert not planned.fits and planned.total_bytes == 8 * (131072**2 + 4)
    for part in (
        "free on cpu, 64.00 GiB, got 128.00 GiB, of which 128.00 GiB for 'head.weight' (B [131072, 131072] (x) A [2, 2])",
        "pass max_factor_dim=131071, which keeps B as its diagonal, or freeze 'head.weight' here (requires_grad_(False))",
    ):
        assert part in planned.problem
    assert ff.plan(model, batch, (ff.KFAC(max_factor_dim=131071),)).fits
    default = ff.plan(model, batch, "kfac")
    assert default.fits and default.rows[0].holds == "B diagonal [131072] (x) A [2, 2]"


def test_an_input_factor_that_is_too_large_is_refused_in_both():
    model, batch = nn.Linear(20000, 2, bias=False), (torch.randn(2, 20000), torch.randint(2, (2,)))
    for ask in (lambda: ff.plan(model, batch, "kfac"), lambda: ff.fisher(model, [batch], "kfac", progress=False)):
        with pytest.raises(ValueError, match=r"at most max_factor_dim = 16384, got 20000 x 20000 \(2.98 GiB\)"):
            ask()


def test_plan_rejects_as_the_call_does():
    model, batch = nn.Linear(3, 5), (torch.randn(7, 3), torch.randint(5, (7,)))
    with pytest.raises(ValueError, match=r"plan: structure must be one of \['diagonal', 'ekfac', 'gram', 'kfac'\]"):
        ff.plan(model, batch, "dense")
    with pytest.raises(ValueError, match="plan: draws must be >= 1"):
        ff.plan(model, batch, draws=0)
    with pytest.raises(ValueError, match=r"at most max_passes = 3 backward passes, got 4.*use fisher_type='mc'"):
        ff.plan(model, batch, fisher_type="exact", max_passes=3)
    with pytest.raises(ValueError, match="dropout and batch statistics must be off"):
        ff.plan(nn.Sequential(nn.Dropout(), model), batch)


def test_what_needs_fewer_passes_is_there_in_the_last():
    two = memory.Held(("a",), "", 1, (10, 100), scratch=(9, 1))
    one = memory.Held(("b",), "", 1, (50,), scratch=(7,))
    assert memory.peak([two, one]) == memory.peak([one, two]) == 100 + 50 + 7  # scratch is of one block at a time


def test_what_fits_exactly_fits():
    held, cpu = [memory.Held(("w",), "", 40, (40,))], torch.device("cpu")
    assert memory.refusal(held, 10, 50, cpu) is None
    for free_bytes in (49, 40):
        assert memory.refusal(held, 10, free_bytes, cpu).endswith("take smaller batches")
    assert memory.refusal(held, 0, 39, cpu).endswith("measure its diagonal in a run of its own")


# ---- free memory


def test_free_memory_of_this_machine_and_of_devices_not_known(tmp_path, monkeypatch):
    room = memory.free_bytes(torch.device("cpu"))
    assert room is None or room > 2**20
    assert memory.free_bytes(torch.device("meta")) is None
    assert memory.refusal([memory.Held(("w",), "", 2**80, (2**80,))], 0, None, torch.device("meta")) is None


def test_free_memory_is_within_the_container(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:       5 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.free_bytes(torch.device("cpu")) == 5 * 1024
    for name, text in (("memory.max", "4096"), ("memory.current", "3000"), ("memory.stat", "anon 1\nfile 904\n")):
        (tmp_path / name).write_text(text)
    assert memory.free_bytes(torch.device("cpu")) == 2000
    (tmp_path / "memory.max").write_text("max")
    assert memory.free_bytes(torch.device("cpu")) == 5 * 1024


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 B"), (1023, "1,023 B"), (1024, "1.00 KiB"), (3 * GIB // 2, "1.50 GiB"), (2**51, "2,048.00 TiB")]
)
def test_bytes_in_words(size, words):
    assert memory.in_words(size) == words


# ---- what people see


def test_the_table_and_the_repr_say_it_all():
    model, batch = nn.Linear(3, 5), (torch.randn(7, 3), torch.randint(5, (7,)))
    planned = ff.plan(model, batch, "kfac")
    text = shown(planned.table(), 200)
    for part in ("weight", "bias", "gram_", "B [5, 5] (x) A [4, 4]", "328 B at most with the result", "fits"):
        assert part in text
    assert repr(planned).startswith("Plan(kfac, 1 row, 328 B of sums; 328 B at most") and "a batch takes 1.1" in repr(planned)


def command(tmp_path, monkeypatch, name, *options, command="plan"):
    (tmp_path / f"{name}.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def model():\n    return nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3))\n"
        "def data():\n    yield torch.randn(11, 5), torch.randint(3, (11,))\n    raise RuntimeError('one batch is enough')\n"
        "def nothing():\n    return []\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    data = "nothing" if "nothing" in options else "data"
    arguments = [command, "--model", f"{name}:model", "--data", f"{name}:{data}", *(o for o in options if o != "nothing")]
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})


def test_command_prints_the_table(tmp_path, monkeypatch):
    result = command(tmp_path, monkeypatch, "planned_module", "--structure", "ekfac", "--draws", "2")
    assert result.exit_code == 0, result.output
    for part in ("0.weight", "2.bias", "eigenvalues", "2 backward passes a batch, the data read twice", "fits"):
        assert part in result.output


def test_command_counts_the_rows_of_all_data(tmp_path, monkeypatch):
    result = command(tmp_path, monkeypatch, "planned_module_gram", "--structure", "gram", "--num-samples", "1024")
    assert result.exit_code == 0, result.output
    assert "36.00 KiB" in result.output  # of 0.bias: 7 numbers and a root for each sample


def test_command_fails_where_it_does_not_fit(tmp_path, monkeypatch, free):
    free(10)
    result = command(tmp_path, monkeypatch, "planned_module_too_large")
    assert result.exit_code == 2
    assert "0.weight" in result.output and "Error: memory: the sums of a run and its result must fit" in result.output


def test_info_shows_the_refusal_alone(tmp_path, monkeypatch, free):
    free(10)
    result = command(tmp_path, monkeypatch, "planned_module_refused", command="info")
    assert result.exit_code == 2 and "Error: memory: " in result.output and "Traceback" not in result.output


def test_command_explains_errors(tmp_path, monkeypatch):
    assert "must yield at least one batch, got none" in command(tmp_path, monkeypatch, "planned_module_empty", "nothing").output
    result = command(tmp_path, monkeypatch, "planned_module_gaussian", "--likelihood", "causal_lm")
    assert result.exit_code == 2 and "Error: " in result.output and "Traceback" not in result.output
