# SPDX-License-Identifier: Apache-2.0
"""Modes of torch that the caller is in: inference, and another default device."""

import networks
import pytest
import torch
from torch import nn

import fisherfast as ff


def _used(model, answer):
    """A result's use in a loss."""
    sum((answer[name] * p.square()).sum() for name, p in model.named_parameters()).backward()


FIRST = {
    "solve": lambda F, v: F.solve(v, damping=0.1),
    "sample": lambda F, v: F.sample(2, damping=0.1),
    "logdet": lambda F, v: F.logdet(damping=0.1),
    "eigenvalues": lambda F, v: F.eigenvalues(),
    "diagonal": lambda F, v: F.diagonal(),
}


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("structure", [*networks.STRUCTURES, ff.KFAC(max_exact_dim=5)], ids=str)
def test_what_is_computed_in_inference_mode_serves_autograd_later(structure, first):
    model = networks.mlp()
    F = networks.measure(model, [networks.double_vectors()], structure)
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    with torch.inference_mode():
        FIRST[first](F, ones)
    v = {name: one.clone().requires_grad_() for name, one in ones.items()}
    for answer in (F.solve(v, damping=0.1), F @ v):
        sum(value.sum() for value in answer.values()).backward()
    assert all(one.grad.isfinite().all() and one.grad.any() for one in v.values())


@pytest.mark.parametrize("structure", networks.STRUCTURES)
def test_a_fisher_of_inference_mode_is_an_ordinary_one(structure, tmp_path):
    model = networks.mlp()
    networks.measure(model, [networks.double_vectors()], structure).save(tmp_path / "F")
    with torch.inference_mode():
        F = ff.load(tmp_path / "F")
        diagonal = F.diagonal()
    _used(model, diagonal)
    _used(model, F.diagonal())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * 2 * diagonal[name] * p.detach(), check_dtype=False)


@pytest.mark.parametrize("fisher_type", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("structure", networks.STRUCTURES)
def test_the_default_device_is_no_matter(structure, fisher_type):
    """A generator of the CPU's serves no other device, and what a batch holds stays where it is."""
    model, data = networks.mlp(), 3 * [networks.double_vectors()]
    expected = ff.fisher(model, data, structure, fisher_type, progress=False).diagonal()
    try:
        torch.set_default_device("meta")
        found = ff.fisher(model, data, structure, fisher_type, progress=False).diagonal()
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_default_device_is_no_matter_to_what_is_made_of_a_fisher():
    model, (x, y) = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (torch.randn(8, 4), torch.arange(8) % 3)
    weight = torch.ones(8)

    def found():
        data = 2 * [(x, y.tolist(), weight)]
        F = ff.fisher(model, data, "kfac", progress=False)
        Q = ff.optimal_posterior(F, model, prior_scale=0.1, beta=1 / 8)
        operator = ff.FisherOperator(model, data)
        density = ff.spectral_density(operator, probes=2, steps=4)
        return F.logdet(0.1), float(ff.expected_loss(Q, model, data, draws=2).value), density.trace().value

    expected = found()
    try:
        torch.set_default_device("meta")
        there = found()
    finally:
        torch.set_default_device(None)
    assert there == pytest.approx(expected)
