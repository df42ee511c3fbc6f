# SPDX-License-Identifier: Apache-2.0
"""Damping in the factors: a product again, with the inverse, log-determinant and draws of that product; by layer if you like."""

import math

import pytest
import torch
from oracle import close
from torch import nn

import fisherfast as ff
from fisherfast.fisher.blocks.exact import ExactBlock

EXACT = 1e-10


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4, bias=False)
    ).double()  # fmt: skip


def measured(**options):
    model, x, y = network(), torch.randn(9, 2, 5, 5).double(), torch.randint(0, 4, (9,))
    (K,) = ff.fisher(model, [(x, y)], (ff.KFAC(**options),), "empirical", progress=False)
    return K


def damped_matrix(block, damping):
    """By the definition, ``[groups * O * D] * 2``."""
    if isinstance(block, ExactBlock):
        F = block.moments.mean()
        return F + damping * torch.eye(len(F)).double()
    parts = []
    for A, B in zip(block.A.mean(), block.B.mean(), strict=True):
        A, B = (f.diag() if f.dim() == 1 else f for f in (A, B))
        pi = math.sqrt(float(A.trace() / len(A)) / float(B.trace() / len(B)))
        root = math.sqrt(damping)
        parts.append(torch.kron(B + root / pi * torch.eye(len(B)).double(), A + pi * root * torch.eye(len(A)).double()))
    return torch.block_diag(*parts)


BY_LAYER = {"0": 0.3, "3": 0.02, "4.weight": 0.7, "4.bias": 0.1, "6": 1.5}


@pytest.mark.parametrize("damping", [0.05, BY_LAYER], ids=["one", "by layer"])
@pytest.mark.parametrize("options", [{}, {"max_factor_dim": 37, "max_exact_dim": 0}, {"sharing": "reduce"}], ids=str)
def test_it_answers_as_the_damped_matrices_do(damping, options):
    K = measured(**options)
    each = {n: damping if isinstance(damping, float) else damping.get(n, damping.get(n.rpartition(".")[0])) for n in K.names}
    D, v = K.factored(damping), {n: torch.randn(s).double() for n, s in K.shapes.items()}
    solved, applied, logdet = D.solve(v), D @ v, 0.0
    for block in K.blocks:
        matrix = damped_matrix(block, each[block.place.weight])
        flat = block.place.matrix(v).flatten()
        assert close(block.place.matrix(solved).flatten(), torch.linalg.solve(matrix, flat), 1e-8)
        assert close(block.place.matrix(applied).flatten(), matrix @ flat, EXACT)
        logdet += float(torch.linalg.slogdet(matrix)[1])
    for n in K.diagonals:
        damped = K.diagonal(dtype=torch.float64)[n] + each[n]
        assert close(solved[n], v[n] / damped, EXACT)
        logdet += float(damped.log().sum())
    assert D.logdet() == pytest.approx(logdet, rel=1e-9)


def test_a_large_output_factor_is_damped_as_a_diagonal():
    model, x, y = nn.Linear(3, 11).double(), torch.randn(9, 3).double(), torch.randint(0, 11, (9,))
    (K,) = ff.fisher(model, [(x, y)], (ff.KFAC(max_factor_dim=8),), "empirical", progress=False)
    (block,) = K.blocks
    assert K.factored(0.1).logdet() == pytest.approx(float(torch.linalg.slogdet(damped_matrix(block, 0.1))[1]), rel=1e-10)
    A, B = K.inverse(0.1, dtype=torch.float64)[""]
    assert B.shape == (11,) and close(torch.kron(B.diag(), A.contiguous()), torch.linalg.inv(damped_matrix(block, 0.1)), EXACT)


@pytest.mark.parametrize("damping", [0.05, BY_LAYER], ids=["one", "by layer"])
def test_the_inverse_is_a_product_of_inverses(damping):
    K = measured()
    inverses = K.inverse(damping, dtype=torch.float64)
    assert inverses.keys() == K.factors().keys()
    for block in K.blocks:
        if isinstance(block, ExactBlock):
            continue
        name = block.place.weight.rpartition(".")[0]
        A, B = (f if block.place.groups > 1 else f.unsqueeze(0) for f in inverses[name])
        delta = damping if isinstance(damping, float) else damping[name]
        product = torch.block_diag(*(torch.kron(b, a) for a, b in zip(A, B, strict=True)))
        assert close(product @ damped_matrix(block, delta), torch.eye(len(product)).double(), 1e-8)


def test_draws_are_of_the_damped_product():
    model, x, y = nn.Linear(2, 2, bias=False).double(), torch.randn(9, 2).double(), torch.randint(0, 2, (9,))
    K = ff.fisher(model, [(x, y)], "kfac", "empirical", progress=False)
    draws = K.factored(0.1).sample(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)["weight"].flatten(1)
    inverse = torch.linalg.inv(damped_matrix(K.blocks[0], 0.1))
    assert float((draws.T.cov() - inverse).abs().max() / inverse.abs().max()) < 0.05


def test_a_layer_without_gradients_is_damped_alike_on_both_sides():
    model = nn.Linear(3, 2, bias=False).double()
    K = ff.fisher(model, [(torch.zeros(4, 3).double(), torch.randint(0, 2, (4,)))], "kfac", "empirical", progress=False)
    assert K.factored(0.04).logdet() == pytest.approx(float(torch.linalg.slogdet(damped_b(K))[1]))


def damped_b(K):
    (block,) = K.blocks
    return torch.kron(block.B.mean()[0] + 0.2 * torch.eye(2).double(), 0.2 * torch.eye(3).double())


def test_what_is_no_measurement_is_neither_pooled_nor_saved(tmp_path):
    K = measured()
    D = K.factored(0.1)
    for refused in (lambda: D + K, lambda: D.all_reduce(), lambda: D.save(tmp_path / "f")):
        with pytest.raises(ValueError, match="damping in its factors"):
            refused()
    with pytest.raises(ValueError, match="damping must be one number for a block"):
        K.factored({n: 0.1 + k for k, n in enumerate(K.names)})
    with pytest.raises(ValueError, match=r"factors must be regular, got a singular one of '3\.weight'"):
        K.inverse({**BY_LAYER, "3": 0.0})
