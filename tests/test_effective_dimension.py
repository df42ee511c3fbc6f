# SPDX-License-Identifier: Apache-2.0
"""The effective dimension: the hat matrix of ridge regression, the limits, the layers, and what it refuses."""

import math

import pytest
import torch
from networks import STRUCTURES, double_vectors, measure, mlp
from torch import nn

import fisherfast as ff
from fisherfast.fisher import DiagonalFisher


def regression(N=17, features=5, bias=False):
    """A float64 linear regression and its data."""
    return nn.Linear(features, 1, bias=bias).double(), (torch.randn(N, features).double(), torch.randn(N, 1).double())


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "gram"])
def test_is_the_trace_of_the_hat_matrix_of_ridge_regression(structure):
    model, (x, y) = regression()
    F = measure(model, [(x, y)], structure, "exact", likelihood="gaussian")
    # y ~ N(x w, 1), w ~ N(0, lambda^2): the posterior mean is (X^T X + I / lambda^2)^-1 X^T y at beta = 1 / N.
    for scale in (0.01, 0.3, 100.0):
        hat = x @ torch.linalg.solve(x.T @ x + torch.eye(5, dtype=torch.float64) / scale**2, x.T)
        got = ff.effective_dimension(F, beta=1 / len(x), prior_scale=scale)
        assert got.value == pytest.approx(hat.trace().item(), rel=1e-10)


def test_diagonal_is_the_hat_matrix_of_an_orthogonal_design():
    x = torch.linalg.qr(torch.randn(17, 5).double())[0] * torch.tensor([1.0, 2, 3, 5, 7], dtype=torch.float64)
    F = measure(
        nn.Linear(5, 1, bias=False).double(), [(x, torch.zeros(17, 1).double())], "diagonal", "exact", likelihood="gaussian"
    )
    hat = x @ torch.linalg.solve(x.T @ x + torch.eye(5, dtype=torch.float64) / 0.3**2, x.T)
    assert ff.effective_dimension(F, beta=1 / 17, prior_scale=0.3).value == pytest.approx(hat.trace().item(), rel=1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_layers_add_up_to_what_information_in_weights_says(structure):
    model = mlp()
    F = measure(model, [double_vectors(9)], structure, "exact")
    got = ff.effective_dimension(F, beta=1e-2, prior_scale=0.5)
    info = ff.information_in_weights(F, model, beta=1e-2, prior_scale=0.5)
    of_info = {name: layer.effective_dimension for name, layer in info.by_layer().items()}
    assert got.by_layer() == pytest.approx(of_info, rel=1e-12)  # by another kernel
    assert got.value == pytest.approx(sum(got.by_layer().values()), rel=1e-14)
    solved = sum(
        float((F @ F.solve(e, damping=1e-2 / 0.25))[i])  # tr F (F + beta / lambda^2)^-1, column by column
        for i, e in enumerate(torch.eye(info.num_parameters, dtype=torch.float64))
    )
    assert got.value == pytest.approx(solved, rel=1e-8)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_grows_from_zero_to_the_rank(structure):
    model = mlp()
    F = measure(model, [double_vectors(9)], structure, "exact")
    values = [ff.effective_dimension(F, beta=beta, prior_scale=1.0).value for beta in (1e9, 1.0, 1e-3, 1e-6)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(F.trace() / 1e9, rel=1e-6)
    eigenvalues = F.eigenvalues()
    assert values[-1] <= int((eigenvalues > 1e-14 * eigenvalues[0]).sum()) + 1e-3


def test_prior_scale_by_layer():
    F = DiagonalFisher({"a.w": torch.tensor([1.0, 3.0]), "b.w": torch.tensor([2.0])}, num_samples=3)
    got = ff.effective_dimension(F, beta=1.0, prior_scale={"a": 1.0, "b": 2.0})
    assert got.by_layer() == pytest.approx({"a": 1 / 2 + 3 / 4, "b": 8 / 9}, rel=1e-14)
    assert "given by layer" in str(got)


def test_states_its_conditions():
    F = DiagonalFisher({"w": torch.ones(4)}, num_samples=7)
    text = str(ff.effective_dimension(F, beta=0.01, prior_scale=0.1))
    for part in ("2.0 directions", "beta = 0.01", "prior scale 0.1", "k = 4", "N = 7", "diagonal"):
        assert part in text


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, None])
def test_refuses_beta_and_prior_scale(bad):
    F = DiagonalFisher({"w": torch.ones(4)}, num_samples=7)
    with pytest.raises(ValueError, match="effective_dimension: beta must be a finite number > 0"):
        ff.effective_dimension(F, beta=bad, prior_scale=1.0)
    with pytest.raises(ValueError, match=r"effective_dimension: prior_scale must be .*finite"):
        ff.effective_dimension(F, beta=1.0, prior_scale=bad)


def test_refuses_prior_scale_names():
    F = DiagonalFisher({"w": torch.ones(4), "v": torch.ones(2)}, num_samples=7)
    with pytest.raises(ValueError, match=r"effective_dimension: prior_scale must name layers or parameters of F, got \['u'\]"):
        ff.effective_dimension(F, beta=1.0, prior_scale={"u": 1.0})
    with pytest.raises(ValueError, match=r"effective_dimension: prior_scale must cover every parameter, got none for \['v'\]"):
        ff.effective_dimension(F, beta=1.0, prior_scale={"w": 1.0})
    model = mlp()
    gram = measure(model, [double_vectors(9)], "gram", "exact")
    scales = dict.fromkeys(gram.names, 1.0) | {"0.weight": 2.0}
    with pytest.raises(ValueError, match="effective_dimension: prior_scale must be one number for a block of F"):
        ff.effective_dimension(gram, beta=1.0, prior_scale=scales)


@pytest.mark.parametrize(("beta", "scale"), [(1e-300, 1e10), (1e-308, 1.0), (1e-10, 1e149)])
def test_a_ratio_that_no_float_holds_is_refused(beta, scale):
    F = DiagonalFisher({"w": torch.tensor([1.0, 1e20], dtype=torch.float64)}, num_samples=3)
    for measured in (
        lambda: ff.effective_dimension(F, beta=beta, prior_scale=scale),
        lambda: ff.free_energy(F, 1.0, temperature=beta, prior_scale=scale),
    ):
        with pytest.raises(ValueError, match="must be finite"):
            measured()
