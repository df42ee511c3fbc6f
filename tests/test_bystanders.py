# SPDX-License-Identifier: Apache-2.0
"""What else runs beside a measurement: other models, other collects, a compiler, transforms. The numbers are autograd's, or an error says
what to do.
"""

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fisherfast as ff

N, I, H, C = 6, 4, 5, 3
EXACT = 1e-12


def mlp(dtype=torch.float64):
    return nn.Sequential(nn.Linear(I, H), nn.Tanh(), nn.Linear(H, C)).to(dtype).eval()


def batches(dtype=torch.float64):
    return [(torch.randn(n, I, dtype=dtype), torch.randint(C, (n,))) for n in (N, N, N - 1)]


def losses(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def measured(model, data, beside, **options):
    """The diagonal of a collect in which ``beside`` runs before every batch, against autograd's."""
    with ff.collect(model, "diagonal", **options) as stats:
        for x, y in data:
            beside(x, y)
            stats.backward(losses(model, x, y))
    expected = oracle.diagonal(model, data, oracle.cross_entropy)
    return oracle.error(stats.result().diagonal(dtype=torch.float64), expected)


def trained(*layers):
    student = nn.Sequential(nn.Linear(I, H), *layers, nn.Linear(H, C)).double().train()
    return lambda x, y: F.cross_entropy(student(x), y).backward()


def by_reentrant_checkpoint(x, y):
    student = nn.Sequential(nn.Linear(I, H), nn.Dropout(0.5)).double()
    F.dropout(checkpoint(student, x.clone().requires_grad_(), use_reentrant=True), 0.5).sum().backward()


@torch.no_grad()
def monte_carlo(x, y):
    nn.Sequential(nn.Linear(I, H), nn.Dropout(0.5)).double()(x)


BESIDE = {
    "a student with dropout": trained(nn.Dropout(0.5)),
    "a student with batch statistics": trained(nn.BatchNorm1d(H)),
    "a student with a reentrant checkpoint": by_reentrant_checkpoint,
    "dropout of another model without a graph": monte_carlo,
    "dropout of the inputs": lambda x, y: F.dropout(x, 0.1),
    "gumbel_softmax": lambda x, y: F.gumbel_softmax(x),
    "random slopes": lambda x, y: F.rrelu(x, training=True),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_chance_outside_of_the_model_is_nobodys(beside):
    assert measured(mlp(), batches(), BESIDE[beside]) < EXACT


def dropped_weight(model, x):
    return F.linear(x, F.dropout(model[0].weight), model[0].bias) @ model[2].weight.T + model[2].bias


def by_fallback(model, x):
    return F.dropout(model(x) + torch.linalg.det(model[0].weight[:, :H] @ model[0].weight[:, :H].T))


INSIDE = {
    "in the loss": lambda model, x: F.dropout(model(x), 0.5),
    "in a function between layers": lambda model, x: model[2](F.dropout(model[1](model[0](x)), 0.5)),
    "of a function without modules": lambda model, x: F.linear(F.dropout(F.linear(x, model[0].weight)), model[2].weight),
    "of a parameter": dropped_weight,
    "of what no rule covers": by_fallback,
}


@pytest.mark.parametrize("how", INSIDE)
def test_chance_on_the_way_from_a_parameter_is_refused(how):
    model, (x, _) = mlp(), batches()[0]
    with ff.collect(model, "diagonal"), pytest.raises(ValueError, match="model: must not draw dropout"):
        INSIDE[how](model, x)


def test_chance_in_the_model_is_refused_without_a_graph_too():
    model = mlp().append(nn.Dropout(0.5).eval())
    with ff.collect(model, "diagonal"), torch.no_grad(), pytest.raises(ValueError, match="model: must not draw dropout"):
        model.train()(torch.randn(N, I).double())
