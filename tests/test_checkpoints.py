# SPDX-License-Identifier: Apache-2.0
"""A run that goes on from a checkpoint knows of its model what the first one found out, and ends as one that was never stopped."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest
import torch
from networks import Wrapped
from safetensors import SafetensorError
from torch import nn

import fisherfast as ff
from fisherfast.fisher import serialize

I, C, N = 5, 3, 4
ROOT = Path(__file__).parents[1]
STRUCTURES = ["diagonal", "kfac", "ekfac", "gram"]


def branching():
    """The second layer works for some batches only, and the third for none."""

    def forward(m, x):
        y = m.a(x)
        return y + m.b(x) if x[0, 0] > 0 else y

    return Wrapped(forward, a=nn.Linear(I, C), b=nn.Linear(I, C), unused=nn.Linear(2, 2)).double()


def merged():
    """Nothing in a batch of one sample tells that a weight is made of two."""
    return Wrapped(lambda m, x: x @ (m.w + m.p @ m.q).T, w=parameter(C, I), p=parameter(C, 2), q=parameter(2, I)).double()


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


def batches(signs):
    inputs = [torch.randn(n, I).double() for n in (N, N, 1)]
    for x, sign in zip(inputs, signs, strict=True):
        x[0, 0] = sign
    return [(x, torch.randint(0, C, (len(x),))) for x in inputs]


def stopping(data, after):
    yield from data[:after]
    raise RuntimeError("stopped")


def asked_for(structure, model, data, **options):
    if structure != "ekfac":
        return structure
    return ff.EKFAC(basis=ff.fisher(model, data, "kfac", "empirical", progress=False, **options))


MODELS = {"branching": (branching, (1, -1, 1), {"allow_missing": True}), "merged": (merged, (1, 1, 1), {})}


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", MODELS)
def test_it_ends_as_if_it_had_not_been_stopped(name, structure, after, tmp_path):
    make, signs, options = MODELS[name]
    model, data = make(), batches(signs)
    asked = asked_for(structure, model, data, **options)

    def run(data, **more):
        return ff.fisher(model, data, asked, "empirical", progress=False, **options, **more)

    whole, path = run(data), tmp_path / "run.safetensors"
    with pytest.raises(RuntimeError, match="stopped"):
        run(stopping(data, after), checkpoint=path)
    for _ in range(2):  # and once more, when there is nothing left to do
        again = run(data, checkpoint=path)
        assert again.names == whole.names and again.num_samples == whole.num_samples == 2 * N + 1
        assert dict(again.coverage) == dict(whole.coverage)
        assert again.trace() == pytest.approx(whole.trace(), rel=1e-12)
        assert again.logdet(0.1) == pytest.approx(whole.logdet(0.1), rel=1e-9)


def test_ekfac_goes_on_in_its_basis_only(tmp_path):
    model, data = nn.Linear(I, C).double(), batches((1, 1, 1))
    own, other = (ff.fisher(model, part, "kfac", "empirical", progress=False) for part in (data, batches((1, 1, 1))))
    whole = ff.fisher(model, data, ff.EKFAC(basis=own), "empirical", progress=False)
    path = tmp_path / "run.safetensors"
    with pytest.raises(RuntimeError, match="stopped"):
        ff.fisher(model, stopping(data, 2), ff.EKFAC(basis=own), "empirical", checkpoint=path, progress=False)
    with pytest.raises(ValueError, match="must go on in the basis it began with"):
        ff.fisher(model, data, ff.EKFAC(basis=other), "empirical", checkpoint=path, progress=False)
    own.save(tmp_path / "basis.safetensors")
    again = ff.EKFAC(basis=ff.load(tmp_path / "basis.safetensors"))
    assert ff.fisher(model, data, again, "empirical", checkpoint=path, progress=False).logdet(0.1) == whole.logdet(0.1)


def test_a_resumed_basis_has_no_part_of_the_rows(tmp_path):
    model, path = nn.Linear(30, C).double(), tmp_path / "run.safetensors"
    data = [(torch.randn(2, 30).double(), torch.randint(0, C, (2,))) for _ in range(2)]
    with pytest.raises(RuntimeError, match="stopped"):
        ff.fisher(model, stopping(data, 1), (ff.KFAC(keep_rows=True),), "empirical", checkpoint=path, progress=False)
    (K,) = ff.fisher(model, data, (ff.KFAC(keep_rows=True),), "empirical", checkpoint=path, progress=False)
    E, D = (ff.fisher(model, data, structure, "empirical", progress=False) for structure in (ff.EKFAC(basis=K), "diagonal"))
    assert E.trace() == pytest.approx(D.trace(), rel=1e-11)


@pytest.mark.parametrize(
    ("basis", "message"),
    [
        (
            lambda: ff.fisher(nn.Linear(I + 1, C), [(torch.randn(4, I + 1), None)], "kfac", progress=False),
            r"of a matrix \[O, D\]",
        ),
        (lambda: ff.fisher(nn.Linear(I, C), [(torch.randn(4, I), None)], progress=False), "must be a KFACFisher"),
    ],
    ids=["another size", "no KFAC"],
)
def test_a_basis_of_something_else(basis, message):
    with pytest.raises(ValueError, match=message):
        ff.fisher(nn.Linear(I, C), [(torch.randn(4, I), None)], ff.EKFAC(basis=basis()), progress=False)


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "gram"])
def test_a_resumed_run_that_fails_at_once_says_why(structure, tmp_path):
    model, data, path = branching(), batches((1, -1, 1)), tmp_path / "run.safetensors"
    options = {"fisher_type": "empirical", "allow_missing": True, "checkpoint": path, "progress": False}
    whole = ff.fisher(model, data, structure, **options)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="stopped") as caught:
        ff.fisher(model, stopping(data, 0), structure, **options)
    assert caught.value.fisher.trace() == whole.trace() and path.read_bytes() == before


@pytest.mark.parametrize("structure", ["diagonal", "gram"])
def test_other_data_of_the_same_sizes_are_refused(structure, tmp_path):
    model, path = nn.Linear(I, C).double(), tmp_path / "checkpoint"
    data = [(torch.randn(N, I).double(), torch.randint(0, C, (N,))) for _ in range(3)]
    with pytest.raises(RuntimeError, match="stopped"):
        ff.fisher(model, stopping(data, 2), structure, "empirical", checkpoint=path, progress=False)
    for others in (data[::-1], [data[0], (data[1][0], data[1][1].flip(0)), data[2]]):
        with pytest.raises(ValueError, match=r"data must be those that .* was made of, got others in the first 2 batches"):
            ff.fisher(model, others, structure, "empirical", checkpoint=path, progress=False)
    resumed = ff.fisher(model, data, structure, "empirical", checkpoint=path, progress=False)
    assert resumed.trace() == pytest.approx(ff.fisher(model, data, structure, "empirical", progress=False).trace(), rel=1e-12)


def test_a_progress_bar_is_no_output(capsys):
    ff.fisher(nn.Linear(I, C).double(), [(torch.randn(N, I).double(), torch.randint(0, C, (N,)))])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "gram", ff.PerSampleNorm()], ids=str)
@pytest.mark.parametrize("freezes", [False, True])
def test_a_checkpoint_is_of_the_same_parameters(structure, freezes, tmp_path):
    model, data, path = nn.Sequential(nn.Linear(I, 4), nn.Linear(4, C)).double(), batches((1, 1, 1)), tmp_path / "c.safetensors"
    model[0].weight.requires_grad_(freezes)
    with pytest.raises(RuntimeError, match="stopped"):
        ff.fisher(model, stopping(data, 2), (structure,), "empirical", checkpoint=path, progress=False)
    model[0].weight.requires_grad_(not freezes)
    with pytest.raises(ValueError, match="must be of the same measurement"):
        ff.fisher(model, data, (structure,), "empirical", checkpoint=path, progress=False)


@pytest.mark.parametrize(("option", "other"), [("output", lambda z: -3 * z), ("sample_offset", 5)])
def test_a_checkpoint_is_of_the_same_options(option, other, tmp_path):
    model, data, path = nn.Linear(I, C).double(), batches((1, 1, 1)), tmp_path / "c.safetensors"
    with pytest.raises(RuntimeError, match="stopped"):
        ff.fisher(model, stopping(data, 2), checkpoint=path, progress=False)
    with pytest.raises(ValueError, match=f"must be of the same measurement, got {option} .* instead of"):
        ff.fisher(model, data, checkpoint=path, progress=False, **{option: other})


def test_a_full_disk_hides_no_other_error(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device")

    model, data, path = nn.Linear(I, C).double(), batches((1, 1, 1)), tmp_path / "c.safetensors"
    monkeypatch.setattr(serialize, "save_file", full)
    with pytest.raises(RuntimeError, match="stopped") as caught:
        ff.fisher(model, stopping(data, 2), "diagonal", "empirical", checkpoint=path, progress=False)
    assert any("holds what it held before" in note and "No space left" in note for note in caught.value.__notes__)
    with pytest.raises(OSError, match="must be written whole, got I/O error: No space left"):
        ff.fisher(model, data, "diagonal", "empirical", checkpoint=path, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", [{"ignore_index": 1}, {"axis": 1}])
def test_a_resumed_run_counts_the_same_labels(tmp_path, other):
    model, x, y = nn.Linear(3, 3), torch.randn(8, 3), torch.tensor([0, 1, 2, 1] * 2)
    batches, file = [(x[:4], y[:4]), (x[4:], y[4:])], tmp_path / "run.safetensors"

    def stopped():
        yield batches[0]
        raise KeyboardInterrupt

    options = {"fisher_type": "empirical", "checkpoint": file, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        ff.fisher(model, stopped(), likelihood=ff.Categorical(), **options)
    with pytest.raises(ValueError, match="must be of the same measurement"):
        ff.fisher(model, batches, likelihood=ff.Categorical(**other), **options)
    assert ff.fisher(model, batches, likelihood=ff.Categorical(), **options).num_samples == 8


class Counting(nn.Module):
    """Counts its own forward passes; ``hidden`` scales the outputs and is in no file of the model."""

    def __init__(self, hidden=2.0, graph=None):
        super().__init__()
        self.layer = nn.Linear(I, C)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("hidden", torch.tensor(hidden), persistent=False)
        self.register_buffer("graph", graph)

    def forward(self, x):
        self.calls += 1
        return self.layer(x) * self.hidden


GRAPHS = {"": None, "sparse": torch.eye(3).to_sparse(), "meta": torch.empty(3, device="meta")}


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_model_goes_on_from_what_it_was_before_the_first_batch(graph, tmp_path):
    """Not from what its forward passes have made of it; and with the buffers that its files lack."""
    model, data, path = Counting(graph=GRAPHS[graph]).double(), batches((1, 1, 1)), tmp_path / "c.safetensors"
    started, other = copy.deepcopy(model), copy.deepcopy(model)
    other.hidden.fill_(3)
    with pytest.raises(RuntimeError, match="stopped"):
        ff.fisher(model, stopping(data, 2), fisher_type="empirical", checkpoint=path, progress=False)
    with pytest.raises(ValueError, match="must be of the same measurement"):
        ff.fisher(other, data, fisher_type="empirical", checkpoint=path, progress=False)
    resumed = ff.fisher(started, data, fisher_type="empirical", checkpoint=path, progress=False)
    whole = ff.fisher(started, data, fisher_type="empirical", progress=False)
    assert resumed.trace() == pytest.approx(whole.trace(), rel=1e-9)


def negated(z):
    return -z if z.dim() in {0, 1, 2} and str(z.device) in {"cpu", "cuda", "other"} else z


def tripled(z):
    return 3 * z


def test_a_checkpoint_is_of_the_same_function(tmp_path):
    """By its name and what it does: another one of the same name is another."""
    model, data, path = nn.Linear(I, C).double(), batches((1, 1, 1)), tmp_path / "c.safetensors"

    def measured(output, data=data):
        return ff.fisher(model, data, output=output, checkpoint=path, progress=False)

    with pytest.raises(RuntimeError, match="stopped"):
        measured(negated, stopping(data, 2))
    renamed = FunctionType(tripled.__code__, globals(), "negated")
    for other in (tripled, renamed, nn.Identity()):
        with pytest.raises(ValueError, match="must be of the same measurement"):
            measured(other)
    assert measured(FunctionType(negated.__code__.replace(co_firstlineno=1), globals(), "negated")).num_samples == 9


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    path, others = (
        tmp_path / "c[1].safetensors",
        [tmp_path / ".d.safetensors.0123abcd.tmp", tmp_path / ".c[1].safetensors.other.tmp"],
    )
    for left in (tmp_path / ".c[1].safetensors.0123abcd.tmp", *others):
        left.touch()
    ff.fisher(nn.Linear(I, C).double(), batches((1, 1, 1)), checkpoint=path, progress=False)
    assert set(tmp_path.iterdir()) == {path, *others}


def test_a_function_is_the_same_in_every_process():
    """Sets of texts come in another order in each."""
    code = "import sys; sys.path.insert(0, 'tests'); import test_checkpoints as t; from fisherfast.fisher.run.checkpoint import digest_of_function as d; print(d(t.negated))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


def test_a_file_that_is_no_checkpoint_is_to_be_removed(tmp_path):
    path = tmp_path / "run.safetensors"
    path.write_bytes(b"half a file")
    with pytest.raises(
        ff.FisherFileError, match=r"checkpoint must be a file that such a run has written.*run\.safetensors.*remove the file"
    ):
        ff.fisher(nn.Linear(4, 3), [(torch.randn(6, 4), None)], checkpoint=path, progress=False)


def test_a_checkpoint_is_of_the_same_modules(tmp_path):
    """Weights do not tell what is between them."""
    data, path = batches((1, 1, 1)), tmp_path / "c.safetensors"
    model = nn.Sequential(nn.Linear(I, I), nn.Tanh(), nn.Linear(I, C)).double()
    with pytest.raises(RuntimeError, match="stopped"):
        ff.fisher(model, stopping(data, 2), checkpoint=path, progress=False)
    model[1] = nn.ReLU()
    with pytest.raises(ValueError, match="must be of the same measurement, got modules"):
        ff.fisher(model, data, checkpoint=path, progress=False)
    model[1] = nn.Tanh()
    assert ff.fisher(model, data, checkpoint=path, progress=False).num_samples == 2 * N + 1
