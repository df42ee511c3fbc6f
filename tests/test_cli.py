# SPDX-License-Identifier: Apache-2.0
"""The command line: the main job from a user's own files, its errors, and what ``env`` says."""

import importlib.metadata
import itertools
import json
import math
import re
import sys

import pytest
import torch
from typer.testing import CliRunner

import fisherfast as ff
from fisherfast import _backend, cli, demo

USER_FILE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3))

def data():
    torch.manual_seed(1)
    for _ in range(3):
        yield torch.randn(11, 5), torch.randint(3, (11,))

def broken_data():
    yield torch.randn(11, 5), torch.randint(3, (11,))
    yield torch.full((11, 5), torch.nan), torch.randint(3, (11,))

def interrupted_data():
    yield torch.randn(11, 5), torch.randint(3, (11,))
    raise KeyboardInterrupt

def no_data():
    return []

def start():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3))

def other():
    return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3))

def number():
    return 3

def raises():
    raise ValueError("from the user's own code")

def narrow():
    class View(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 3)
        def forward(self, x):
            return self.inner(x[:, :4])
    return View()

def late_failure():
    yield torch.randn(11, 5), torch.randint(3, (11,))
    raise OSError("disk is gone")

value = 3
"""
_numbers = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module of the user's in the working folder."""
    name = f"user_module_{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text(USER_FILE)
    (tmp_path / f"{name}_needs.py").write_text("import a_package_that_is_not_there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def info(module, *options, model="model", data="data"):
    return run("info", "--model", f"{module}:{model}", "--data", f"{module}:{data}", "--rounds", 1, *options)


def test_info_measures_the_users_model(module, tmp_path):
    result = info(module, "--out", "here", "--seed", 5, "--draws", 2)
    assert result.exit_code == 0, result.output
    user = sys.modules[module]
    F = ff.fisher(user.model().eval(), user.data(), seed=5, draws=2, progress=False)
    saved = ff.load(tmp_path / "here" / "fisher.safetensors")
    assert all(torch.equal(f, saved.diagonal()[name]) for name, f in F.diagonal().items())
    nats = ff.information_in_weights(F, user.model(), prior_scale="fit", beta=1 / 33).nats
    numbers = json.loads((tmp_path / "here" / "report.json").read_text())
    assert numbers["information"]["nats"] == nats
    assert f"{nats:,.1f} nats" in result.output and "one plain forward+backward over the same 33 samples" in result.output
    assert (tmp_path / "here" / "information.png").exists()
    assert "wrote here/report.html" in result.output
    assert "Rate-distortion curve" in (tmp_path / "here" / "report.html").read_text(encoding="utf-8")


def test_info_options_reach_the_numbers(module, tmp_path):
    result = info(module, "--prior-scale", "0.25", "--beta", "0.01", "--fisher-type", "empirical", "--device", "cpu")
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (numbers["information"]["prior_scale"], numbers["information"]["beta"]) == (0.25, 0.01)
    assert numbers["fisher"]["fisher_type"] == "empirical"
    assert "scale 0.25 around 0" in result.output


def test_info_against_a_base(module, tmp_path):
    result = info(module, "--center", f"{module}:start", "--prior-scale", "0.1")
    assert result.exit_code == 0, result.output
    user = sys.modules[module]
    F = ff.fisher(user.model().eval(), user.data(), progress=False)
    expected = ff.information_in_weights(F, user.model(), center=user.start(), prior_scale=0.1, beta=1 / 33)
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())["information"]
    assert (numbers["nats"], numbers["centered"]) == (expected.nats, True)
    assert "scale 0.1 around the given center" in result.output


def test_info_refuses_a_base_of_another_shape_before_any_work(module):
    result = info(module, "--center", f"{module}:other", data="raises")
    assert result.exit_code == 2 and "must have the network's parameters, got [8, 5] for '0.weight' [7, 5]" in result.output


def test_info_of_kronecker_blocks(module, tmp_path):
    result = info(module, "--structure", "kfac")
    assert result.exit_code == 0, result.output
    saved = ff.load(tmp_path / "out" / "fisher.safetensors")
    F = ff.fisher(sys.modules[module].model().eval(), sys.modules[module].data(), structure="kfac", progress=False)
    assert saved.factors().keys() == {"0", "2"} and saved.trace() == F.trace()
    assert "kfac, mc labels" in result.output


def test_info_without_timing(module):
    result = run("info", "--model", f"{module}:model", "--data", f"{module}:data", "--rounds", 0)
    assert result.exit_code == 0 and "forward+backward" not in result.output


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "on this machine, got 'nowhere'"),
        ("no_such_module:model", "there is no module 'no_such_module' here"),
        ("no_such_module.py:model", "leave out .py: no_such_module:model"),
        ("{module}:modle", "has no 'modle'; its functions: ['broken_data', 'data', 'interrupted_data'"),
        ("{module}:value", "must be a function, got int"),
        ("{module}:number", "must return a torch.nn.Module, got int"),
    ],
)
def test_info_explains_a_wrong_model(module, model, message):
    result = run("info", "--model", model.format(module=module), "--data", f"{module}:data")
    assert result.exit_code == 2
    assert message in result.output and "--model" in result.output


def test_info_explains_wrong_data(module):
    result = info(module, data="number")
    assert result.exit_code == 2
    assert "must return an iterable of (inputs, targets) batches, got int" in result.output and "--data" in result.output


def test_info_shows_fisherfasts_own_errors_alone(module):
    result = info(module, data="no_data")
    assert result.exit_code == 2
    assert "data must yield at least one batch, got none" in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(("data", "code"), [("broken_data", 2), ("interrupted_data", 130)])
def test_info_keeps_what_it_measured(module, tmp_path, data, code):
    result = info(module, data=data)
    assert result.exit_code == code and "Traceback" not in result.output
    assert "kept the 11 samples measured so far" in result.output
    assert ff.load(tmp_path / "out" / "partial.safetensors").num_samples == 11


@pytest.mark.parametrize("spec", ["{module}:raises", "{module}_needs:model"])
def test_info_lets_the_users_own_errors_through(module, spec):
    result = run("info", "--model", spec.format(module=module), "--data", f"{module}:data")
    assert isinstance(result.exception, (ValueError, ModuleNotFoundError)) and result.exit_code == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--beta", "0", "must be a finite number > 0, got 0"),
        ("--prior-scale", "-1", "must be a finite number > 0, got -1"),
        ("--prior-scale", "1e200", "must be above 1e-150 and below 1e+150"),
        ("--prior-scale", "1e-200", "must be above 1e-150 and below 1e+150"),
        ("--prior-scale", "auto", "must be 'fit' or a number > 0, got 'auto'"),
        ("--fisher-type", "true", "Invalid value for '--fisher-type'"),
        ("--draws", "0", "Invalid value for '--draws'"),
    ],
)
def test_info_rejects_options_before_any_work(module, option, value, message):
    result = info(module, option, value, model="raises")
    assert result.exit_code == 2 and message in result.output


def test_installed_packages_win_over_the_working_folder(module, tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('the wrong torch')")
    assert info(module).exit_code == 0
    assert sys.path[-1] == str(tmp_path)


def test_bench_times_structures_against_plain(module):
    result = run(
        "bench",
        "--model",
        f"{module}:model",
        "--data",
        f"{module}:data",
        *("--structure", "kfac", "--structure", "gram", "--rounds", "1"),
    )
    assert result.exit_code == 0, result.output
    rows = [line.split()[1::2] for line in result.output.splitlines() if "kfac" in line or "gram" in line]
    assert [row[0] for row in rows] == ["kfac", "gram"] and all(float(number) > 0 for row in rows for number in row[1:])
    assert "3 batches, median of 1 runs" in result.output


def test_ekfac_of_a_function_that_yields(module, tmp_path):
    """A generator is gone through once; the function behind it is called again."""
    result = info(module, "--structure", "ekfac")
    assert result.exit_code == 0, result.output
    assert isinstance(ff.load(tmp_path / "out" / "fisher.safetensors"), ff.EKFACFisher)


def test_a_folder_of_a_hugging_face_model(module, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 23, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    model.save_pretrained(tmp_path / "gpt2")
    ids = [torch.randint(23, (3, 8)) for _ in range(2)]
    torch.save(ids, tmp_path / "ids.pt")
    (tmp_path / f"{module}_ids.py").write_text(f"""
import torch
def data():
    return [{{"input_ids": ids, "labels": ids}} for ids in torch.load({str(tmp_path / "ids.pt")!r})]
""")
    folder, data = str(tmp_path / "gpt2"), f"{module}_ids:data"
    options = ("--likelihood", "causal_lm", "--fisher-type", "empirical", "--rounds", "0", "--out", tmp_path / "out")
    result = run("info", "--model", folder, "--data", data, *options)
    assert result.exit_code == 0, result.output
    batches = [{"input_ids": one, "labels": one} for one in ids]
    expected = ff.fisher(model.eval(), batches, fisher_type="empirical", likelihood=ff.CausalLM(), progress=False)
    assert ff.load(tmp_path / "out" / "fisher.safetensors").trace() == pytest.approx(expected.trace(), rel=1e-5)


def test_a_folder_without_a_model_is_refused(module, tmp_path):
    result = run("info", "--model", str(tmp_path), "--data", f"{module}:data")
    assert result.exit_code == 2 and "without config.json" in result.output


def test_env_names_each_op_and_why_not():
    result = run("env")
    assert result.exit_code == 0
    assert f"{torch.__version__}" in result.output
    for op in _backend.OPS.values():
        assert op.name in result.output
        for backend in _backend.BACKENDS:
            problem = op.unavailable(backend, "cpu")
            assert problem is None or problem in " ".join(result.output.split())


def test_env_shows_a_forced_backend():
    with ff.backend("reference"):
        output = run("env").output
    row = next(line for line in output.splitlines() if "linear_sq_" in line)
    assert row.split("│")[2].strip() == "runs"
    assert "forced backend  reference" in output


def test_demo_measures_a_network_that_works(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    result = run("info", "--model", "fisherfast.demo:model", "--data", "fisherfast.demo:data", "--rounds", 0, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert sum(len(labels) for _, labels in demo.data()) == 1437
    accuracy = re.search(r"360 test images, accuracy ([\d.]+)%", result.output)
    assert accuracy is not None and float(accuracy[1]) > 90
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert list(numbers["layers"]) == ["input", "hidden", "output"]
    assert 0 < numbers["information"]["nats"] < 1437 * math.log(10)  # less than the labels themselves


def test_what_was_measured_is_kept_whatever_fails_after_it(module, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.timing, "against_plain", interrupted)
    result = info(module, "--out", "here")
    assert result.exit_code == 130 and "the measured Fisher is kept in here/fisher.safetensors" in result.output
    assert ff.load(tmp_path / "here" / "fisher.safetensors").num_samples == 33


def test_a_failed_run_leaves_no_report_of_the_one_before(module, tmp_path, monkeypatch):
    assert info(module, "--out", "here", "--rounds", "0").exit_code == 0
    before = {path.name for path in (tmp_path / "here").iterdir()}
    assert (
        info(module, "--out", "here", data="late_failure").exit_code == 1
    )  # before anything is measured the old one stays whole
    assert {path.name for path in (tmp_path / "here").iterdir()} == before | {"partial.safetensors"}

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.timing, "against_plain", interrupted)
    assert info(module, "--out", "here", "--seed", "5").exit_code == 130
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"fisher.safetensors", "partial.safetensors"}
    assert ff.load(tmp_path / "here" / "fisher.safetensors").provenance.seed == 5


def test_what_was_measured_is_kept_whatever_the_data_raise(module, tmp_path):
    result = info(module, "--out", "here", data="late_failure")
    assert isinstance(result.exception, OSError)
    assert ff.load(tmp_path / "here" / "partial.safetensors").num_samples == 11


def test_a_model_that_fails_shows_where(module):
    result = info(module, model="narrow")
    assert isinstance(result.exception, RuntimeError) and "shapes cannot be multiplied" in str(result.exception)


@pytest.mark.parametrize(
    ("options", "message"), [(("--device", "foo"), "must be a device"), (("--out", "file/x"), "must be a folder")]
)
def test_options_are_checked_before_anything_is_measured(module, tmp_path, options, message):
    (tmp_path / "file").write_text("")
    result = info(module, *options)
    assert result.exit_code == 2 and message in result.output


def test_a_file_is_no_module(module):
    result = run("info", "--model", f"./{module}.py:model", "--data", f"{module}:data")
    assert result.exit_code == 2 and "must be module:function" in result.output


def test_the_version_is_that_of_the_package():
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.exit_code == 0 and result.output.strip() == ff.__version__ == importlib.metadata.version("fisherfast")
