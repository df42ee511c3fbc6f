# SPDX-License-Identifier: Apache-2.0
"""What is singular is found to be, in float32 as in float64: a classifier's Fisher always is, since its scores sum to zero over classes."""

import itertools
import math

import pytest
import torch
from torch import nn

import fisherfast as ff
from fisherfast.fisher.kronecker import Place

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
STRUCTURES = pytest.mark.parametrize("structure", ["kfac", "ekfac", "gram"])


def measured(structure, dtype, widths=(12, 7), N=64, size=64, fisher_type="mc", **options):
    layers = [module for pair in itertools.pairwise(widths) for module in (nn.Linear(*pair), nn.ReLU())][:-1]
    model, x = nn.Sequential(*layers).to(dtype), torch.randn(N, widths[0], dtype=torch.float64).to(dtype)
    return ff.fisher(model, [(part, None) for part in x.split(size)], structure, fisher_type, progress=False, **options)


@DTYPES
@STRUCTURES
@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
@pytest.mark.parametrize("widths, size", [((12, 7), 64), ((12, 7), 16), ((30, 20, 10), 64), ((5, 3), 64)], ids=str)
def test_a_classifier_is_singular(structure, dtype, widths, size, fisher_type):
    F = measured(structure, dtype, widths, size=size, fisher_type=fisher_type)
    with pytest.warns(ff.FisherWarning, match="are zero: -inf"):
        assert F.logdet() == -math.inf
    for refused in (lambda: F.solve(F.diagonal()), lambda: F.sample(1)):
        with pytest.raises(ValueError, match="damp"):
            refused()


@DTYPES
@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("D", [40, 150, 400])
def test_eigenvalues_that_differ_from_zero_are_as_many_as_the_factors_ranks_allow(structure, dtype, D):
    N, C = 32, 6
    F = measured(structure, dtype, (D, C), N=N, size=16)
    assert int((F.eigenvalues() > 0).sum()) == min(N, D + 1) * (C - 1)


@DTYPES
def test_a_singular_factor_has_no_inverse(dtype):
    for seed in range(8):  # Cholesky alone finds half of them
        torch.manual_seed(seed)
        F = measured("kfac", dtype)
        with pytest.raises(ValueError, match=r"factors must be regular, got a singular one of '0\.weight'"):
            F.inverse(0.0)
        F.inverse(0.1)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_small_inputs_are_no_rounding(structure):
    model, x = nn.Linear(9, 1), torch.randn(200, 9) * torch.logspace(0, -4, 9)
    wide = nn.Linear(9, 1).double()
    wide.load_state_dict(model.state_dict())
    narrow, exact = (
        ff.fisher(m, [(x.to(m.weight.dtype), None)], structure, likelihood="bernoulli", progress=False) for m in (model, wide)
    )
    assert narrow.logdet() == pytest.approx(exact.logdet(), abs=1e-3)
    assert exact.eigenvalues().min() < 1e-7 * exact.eigenvalues().max()


@STRUCTURES
def test_a_file_and_a_sum_know_the_precision_of_what_they_are_of(structure, tmp_path):
    F = measured(structure, torch.float32)
    F.save(tmp_path / "f.safetensors")
    for same in (ff.load(tmp_path / "f.safetensors"), F + F):
        with pytest.warns(ff.FisherWarning, match="are zero: -inf"):
            assert same.logdet() == -math.inf


def test_files_that_say_no_precision_are_of_float32():
    assert Place.from_state(["w", None, 1, False, "gram_", "expand", None]).precision == "float32"
    assert Place("w", precision="float64").eps == torch.finfo(torch.float64).eps
