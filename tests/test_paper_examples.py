# SPDX-License-Identifier: Apache-2.0
"""The reproductions in examples/paper run from start to figure, at a size at which their trends mean nothing."""

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples" / "paper"
OWN_VERDICTS = {
    "critical_period": 3,
    "effective_information": 18,
    "figure1_logdet": 4,
    "figure2_path_stability": 3,
    "figure3_toy": 5,
    "figure4_batch_size": 6,
    "figure4_classes": 6,
    "pac_bayes": 4,
    "random_labels": 5,
    "samples": 5,
}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.mark.parametrize("name", OWN_VERDICTS)
def test_writes_numbers_verdicts_and_a_figure(name, script, tmp_path, capsys):
    report = script(name).main(["--quick", "--out", str(tmp_path)])
    (written,) = tmp_path.glob("*.json")
    content = json.loads(written.read_text(encoding="utf-8"))
    assert written.stem == content["name"] == report.name
    assert content["settings"]["seeds"] and set(content["versions"]) == {"fisherfast", "torch", "numpy", "python"}
    assert len(content["criteria"]) == OWN_VERDICTS[name]
    printed = capsys.readouterr().out
    assert all(f"{one['verdict']}  {report.name}: {one['claim']}: {one['seen']}" in printed for one in content["criteria"])
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_an_npz_file_takes_the_place_of_mnist(script, tmp_path):
    random = np.random.default_rng(0)
    arrays = {f"x_{part}": random.integers(0, 256, (80, 3, 16, 16), dtype=np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "noise-16.npz", **arrays, y_train=np.arange(80) % 10, y_test=np.arange(80) % 10)
    arguments = ["--quick", "--out", str(tmp_path), "--data", str(tmp_path / "noise-16.npz")]
    script("figure4_batch_size").main(arguments)
    assert json.loads((tmp_path / "figure4_batch_size_noise.json").read_text(encoding="utf-8"))["settings"]["pixels"] == [8, 8]


def test_committed_results_are_whole():
    for path in (FOLDER / "results").glob("*.json"):
        verdicts = {one["verdict"] for one in json.loads(path.read_text(encoding="utf-8"))["criteria"]}
        assert verdicts <= {"PASS", "FAIL"} and path.with_suffix(".png").exists(), path.name


def test_every_piece_of_the_toy_has_one_minimum_of_its_own_sharpness(script):
    toy = script("figure3_toy")
    assert np.allclose(np.abs(np.diff(toy.VALUES)), 2) and np.allclose(toy.EDGES, -toy.EDGES[::-1])
    slopes = np.abs(toy.SLOPES[toy.PIECES :])
    assert math.isclose(slopes[0], 93.08, abs_tol=0.01) and np.allclose(slopes[:-1] / slopes[1:], toy.GROWTH)
    # The gradient is the loss's: a run without noise stays at its minimum.
    minima = toy.EDGES[:-1] + (0.3 - toy.VALUES[:-1]) / toy.SLOPES
    assert (toy.piece_of(minima) == np.arange(2 * toy.PIECES)).all()


def test_tempered_logits_have_size_one_and_the_same_decisions(script):
    common = script("common")
    torch.manual_seed(0)
    network, x = common.mlp(3, 8, 4), torch.randn(50, 3)
    with torch.no_grad():
        plain, tempered = network(x), common.Tempered(network, x)(x)
    assert torch.equal(plain.argmax(1), tempered.argmax(1))
    centered = tempered - tempered.mean(1, keepdim=True)
    assert math.isclose(centered.square().mean().sqrt().item(), 1, rel_tol=1e-5)


def test_the_noisy_layers_information_is_the_divergence_from_its_best_prior(script):
    noisy = script("noisy")
    torch.manual_seed(0)
    layer = noisy.NoisyLinear(5, 4).double()
    layer.log_variance.data.normal_()
    of_weights = torch.distributions.Normal(layer.mean, (layer.log_variance / 2).exp())
    best = (layer.mean.square() + layer.log_variance.exp()).mean().sqrt()
    divergence = torch.distributions.kl_divergence(of_weights, torch.distributions.Normal(torch.zeros_like(best), best))
    assert torch.allclose(layer.kl(), divergence.sum())


def test_a_run_without_a_sample_follows_sgd_without_it(script):
    stability = script("figure2_path_stability")
    x, y = script("common").moons(stability.SAMPLES, 0.2, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    network = script("common").mlp(*stability.WIDTHS)
    ends = stability.endpoints(network, x, y, torch.tensor([7]), steps=15, seed=3)
    for rows in script("common").batches(stability.SAMPLES, stability.BATCH, 15, 3):
        rows = rows[rows != 7]
        loss = torch.nn.functional.cross_entropy(network(x[rows]), y[rows], reduction="sum") / stability.BATCH
        for parameter, gradient in zip(network.parameters(), torch.autograd.grad(loss, list(network.parameters())), strict=True):
            parameter.data -= stability.LR * gradient
    for name, parameter in network.named_parameters():
        assert torch.allclose(ends[name][1], parameter, atol=1e-6) and not torch.allclose(ends[name][0], parameter, atol=1e-4)
