# SPDX-License-Identifier: Apache-2.0
"""The recipes run as they are printed, and give what they say."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fisherfast as ff

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"


@pytest.fixture(scope="module")
def run():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), names)
    return names


def test_the_marginal_likelihood_is_the_task_complexity(run):
    assert run["log_marginal_likelihood"] == pytest.approx(-run["N"] * run["information"].complexity, rel=1e-5)
    dense = 64 * run["K"].eigenvalues().double() + 1.0
    assert run["log_determinant"] == pytest.approx(float(dense.log().sum()), rel=1e-6)


def test_the_penalty_has_no_gradient_where_the_weights_are(run):
    model, penalty = run["model"], run["penalty"]
    found = torch.autograd.grad(penalty(1.0), list(model.parameters()))
    assert all(not g.any() for g in found) and penalty(1.0).item() == 0


def test_samples_are_of_the_parameters_shapes(run):
    shapes = {name: p.shape for name, p in run["model"].named_parameters()}
    assert len(run["samples"]) == 5 and all({n: s.shape for n, s in draw.items()} == shapes for draw in run["samples"])


def test_half_of_the_weights_are_kept(run):
    kept = sum(int(mask.sum()) for mask in run["masks"].values())
    total = sum(p.numel() for p in run["model"].parameters())
    assert kept == total - total // 2


def test_parts_are_the_whole(run):
    whole = ff.fisher(run["model"], run["loader"], "kfac", progress=False)
    assert run["whole"].trace() == pytest.approx(whole.trace(), rel=1e-5)
    diagonal = ff.fisher(run["model"], run["loader"], progress=False)
    assert run["ekfac"].trace() == pytest.approx(diagonal.trace(), rel=1e-5)


def test_frozen_parameters_are_left_out(run):
    assert set(run["last"].names) == {"2.bias", "2.weight"}


def test_the_scale_of_float16_is_taken_out(run):
    F = ff.fisher(run["model"], run["loader"], fisher_type="empirical", progress=False)
    assert run["scaled"].result().trace() == pytest.approx(F.trace(), rel=0.02)
    x, y = run["loader"][-1]
    expected = torch.autograd.grad(cross_entropy(run["model"](x), y), run["model"][0].weight)[0]
    assert (run["model"][0].weight.grad - expected).norm() < 0.02 * expected.norm()


def test_the_noise_scale_is_of_the_losses(run):
    assert math.isfinite(run["stats"].result().noise_scale()) and run["stats"].result().num_samples == 64


def test_a_natural_step_solves_its_system_and_influences_are_inner_products(run):
    curvature, step = run["curvature"], run["step"]
    for name, product in (curvature @ step).items():
        torch.testing.assert_close(product + 0.1 * step[name], run["gradient"][name], rtol=1e-4, atol=1e-6)
    assert len(run["influence"]) == run["N"] and any(run["influence"])


def test_merged_weights_lie_between_those_of_the_models(run):
    weights, fishers = ([one["2.bias"] for one in ones] for ones in (run["weights_of_models"], run["fishers"]))
    shares = torch.stack(fishers) / sum(fishers)
    merged = (shares * torch.stack(weights)).sum(0)
    torch.testing.assert_close(run["merged"].get_parameter("2.bias").detach(), merged, rtol=1e-4, atol=1e-6)


def test_an_accumulated_gradient_is_that_of_the_mean(run):
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "as accumulated" in b)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    names = {**run, "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.0)}
    exec(block, names)
    squares = ff.fisher(model, run["loader"], fisher_type="empirical", progress=False)
    expected = torch.autograd.grad(cross_entropy(model(run["x"]), run["y"]), list(model.parameters()))
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)
    assert names["accumulated"].result().trace() == pytest.approx(squares.trace(), rel=1e-5)
