# SPDX-License-Identifier: Apache-2.0
"""The report: the table shows the numbers it is given, and the files can be read back."""

import io
import json
import math

import pytest
import torch
from rich.console import Console
from torch import nn

import fisherfast as ff
from fisherfast import report
from fisherfast.timing import TimeRatio

RATIO = TimeRatio(fisher_seconds=0.09, plain_seconds=0.1, rounds=5, num_samples=1234)


def measured(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    provenance = ff.Provenance(fisher_type="mc", likelihood="categorical", seed=3)
    F = ff.DiagonalFisher(
        {n: torch.rand_like(p) for n, p in net.named_parameters()}, 1234, num_positions=5678, provenance=provenance
    )
    return F, ff.information_in_weights(F, net, **({"prior_scale": 0.1, "beta": 1e-3} | options))


def shown(renderable, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_table_shows_every_layer_and_the_conditions():
    F, info = measured()
    text = shown(report.render(F, info, RATIO))
    for part in (
        "N = 1,234 samples",
        "5,678 labels",
        "mc labels",
        "categorical",
        "diagonal",
        "0.001",
        "0.1 around 0",
        "exact",
        "0.90x",
    ):
        assert part in text
    for layer in info.by_layer().values():
        assert f"{layer.nats:,.1f}" in text and f"{layer.share:.1%}" in text and f"{layer.num_parameters}" in text
    assert f"{info.nats:,.1f} nats" in text and "66" in text


def test_table_fits_a_narrow_terminal():
    F, info = measured()
    assert all(len(line) <= 80 for line in shown(report.render(F, info), width=80).splitlines())
    assert "…" not in shown(info.table(), width=80)


def test_excluded_parameters_are_shown():
    F, _ = measured()
    part = ff.DiagonalFisher({"0.weight": F.diagonal()["0.weight"]}, 1234, coverage={"0.bias": "missing: no rule"})
    with pytest.warns(ff.FisherWarning, match="exclude parameters that the Fisher lacks"):
        info = ff.information_in_weights(
            part, {"0.weight": torch.ones(7, 5), "0.bias": torch.ones(7)}, prior_scale=0.1, beta=1e-3
        )
    assert "0.bias" in shown(report.render(part, info))


@pytest.mark.parametrize(
    ("name", "layer"), [("scale", "(model)"), ("[red]a.w", "[red]a")], ids=["of the model itself", "looks like markup"]
)
def test_a_parameter_has_the_name_of_its_layer(name, layer):
    F = ff.DiagonalFisher({name: torch.ones(3)}, 7)
    info = ff.information_in_weights(F, {name: torch.ones(3)}, prior_scale=1.0, beta=0.1)
    assert layer in shown(info.table())


def test_files_can_be_read_back(tmp_path):
    F, info = measured()
    folder = tmp_path / "new" / "folder"
    paths = [report.save_alone(folder, F), *report.write_report(folder, F, info, RATIO)]
    assert [path.name for path in paths] == ["fisher.safetensors", "information.png", "report.json", "report.html"]
    assert all(torch.equal(f, F.diagonal()[name]) for name, f in ff.load(paths[0]).diagonal().items())
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    numbers = json.loads(paths[2].read_text())
    assert numbers["information"]["nats"] == info.nats
    assert numbers["layers"]["2"]["trace"] == info.by_layer()["2"].trace
    assert (numbers["fisher"]["num_samples"], numbers["fisher"]["seed"]) == (1234, 3)
    assert numbers["time"]["ratio"] == RATIO.ratio
    assert paths[3].read_text(encoding="utf-8").startswith("<!doctype html>") and str(RATIO) in paths[3].read_text(
        encoding="utf-8"
    )


def test_a_report_that_fails_leaves_none_of_another_fisher(tmp_path, monkeypatch):
    F, info = measured()
    report.save_alone(tmp_path, F)
    report.write_report(tmp_path, F, info)
    monkeypatch.setattr(type(info), "plot", lambda *_: 1 / 0)
    report.save_alone(tmp_path, F)
    with pytest.raises(ZeroDivisionError):
        report.write_report(tmp_path, F, info)
    assert [path.name for path in tmp_path.iterdir()] == ["fisher.safetensors"]


def test_limits_of_a_fitted_prior_can_be_written(tmp_path):
    F = ff.DiagonalFisher({"a.w": torch.zeros(3), "b.w": torch.ones(3)}, 7)
    info = ff.information_in_weights(F, {"a.w": torch.ones(3), "b.w": torch.zeros(3)}, prior_scale="fit", beta=0.1)
    numbers = json.loads(report.write_report(tmp_path, F, info)[1].read_text())
    assert [numbers["layers"][name]["prior_scale"] for name in "ab"] == ["inf", 0.0]
    assert math.isfinite(numbers["information"]["nats"]) and numbers["time"] is None
