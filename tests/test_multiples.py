# SPDX-License-Identifier: Apache-2.0
"""Weights that are multiplied by a constant before they are used, as equalized learning rates do: ``(c W) x`` has the
sample gradient ``c g x^T``, so the same op serves it as serves ``W x``.
"""

import math

import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional

import fisherfast as ff

D, WIDTH, C = 7, 11, 3
EXACT = 1e-12
MULTIPLES = {
    "by a number": (0.3, lambda w, c: w * 0.3),
    "a number first": (0.3, lambda w, c: 0.3 * w),
    "torch.mul": (0.3, lambda w, c: torch.mul(w, 0.3)),
    "by a quotient": (0.25, lambda w, c: w / 4),
    "by a buffer": (0.7, lambda w, c: w * c),
    "a buffer first": (0.7, lambda w, c: c * w),
    "by a buffer's inverse": (1 / 0.7, lambda w, c: torch.div(w, c)),
    "by a buffer with axes": (0.7, lambda w, c: w * c.view(1, 1)),
    "negative": (-1.0, lambda w, c: -w),
    "twice": (0.35, lambda w, c: (0.5 * w).clone() * c),
    "shifted": (2.0, lambda w, c: w * 2 + 1e-3),
    "turned before": (2.0, lambda w, c: (w.T * 2).T),
    "cut afterwards": (2.0, lambda w, c: (w * 2)[:]),
    "by nothing": (0.0, lambda w, c: w * 0.0),
}


class Scaled(nn.Module):
    """Two linear layers whose weights, and the first one's bias, are multiplied in the forward pass."""

    def __init__(self, multiply, of_bias=lambda b, c: b):
        super().__init__()
        self.multiply, self.of_bias = multiply, of_bias
        self.first, self.last = nn.Linear(D, WIDTH), nn.Linear(WIDTH, C)
        self.register_buffer("c", torch.tensor(0.7))

    def forward(self, x):
        """Logits ``[N, C]``."""
        bias = self.of_bias(self.first.bias, self.c)
        h = torch.tanh(functional.linear(x, self.multiply(self.first.weight, self.c), bias))
        return functional.linear(h, self.multiply(self.last.weight, self.c), self.last.bias)


def by(factor):
    return lambda w, c: w * factor


def data(*sizes):
    return [(torch.randn(n, D, dtype=torch.float64), torch.randint(C, (n,))) for n in sizes]


def measured(model, batches, **options):
    return ff.fisher(model, batches, fisher_type="empirical", progress=False, **options)


@pytest.mark.parametrize("how", MULTIPLES)
def test_diagonal_is_autograds_and_by_ops_alone(how):
    model, batches = Scaled(MULTIPLES[how][1]).double(), data(5, 3, 1)
    found = measured(model, batches)
    assert oracle.error(found.diagonal(dtype=torch.float64), oracle.diagonal(model, batches, oracle.cross_entropy)) < EXACT
    assert set(found.coverage.ways.values()) == {"linear_sq_", "scale_sq_"}


@pytest.mark.parametrize("how", MULTIPLES)
def test_kronecker_factors_are_those_of_the_product(how):
    """``A`` is of the inputs, and of the outputs' gradients ``B`` takes the square of the factor."""
    factor, multiply = MULTIPLES[how]
    model, batches = Scaled(multiply).double(), data(5, 3)
    plain = Scaled(lambda w, c: w).double()
    with torch.no_grad():
        for name in ("first", "last"):
            getattr(plain, name).weight.copy_(multiply(getattr(model, name).weight, model.c))
            getattr(plain, name).bias.copy_(getattr(model, name).bias)
    found, expected = (measured(one, batches, structure="kfac").factors() for one in (model, plain))
    for layer in ("first", "last"):
        (A, B), (of_weight, of_product) = found[layer], expected[layer]
        assert torch.allclose(A, of_weight[:-1, :-1], rtol=1e-6)  # the bias, which nothing multiplies, is not in the block
        assert torch.allclose(B, factor**2 * of_product, rtol=1e-6)


def test_a_bias_joins_the_weight_of_its_own_factor():
    alike = Scaled(lambda w, c: w * c, lambda b, c: b * c).double()
    batches = data(6)
    found = measured(alike, batches, structure="kfac")
    assert found.factors()["first"][0].shape == (D + 1, D + 1)
    assert found.factors()["last"][0].shape == (WIDTH, WIDTH)
    one = measured(alike, [(batches[0][0][:1], batches[0][1][:1])], structure="kfac")
    expected = oracle.diagonal(alike, [(batches[0][0][:1], batches[0][1][:1])], oracle.cross_entropy)
    assert oracle.error(one.diagonal(dtype=torch.float64), expected) < 1e-9  # of one sample a Kronecker block is exact


def test_ekfac_keeps_the_trace():
    model, batches = Scaled(lambda w, c: w * c).double(), data(5, 4)
    expected = sum(float(v.sum()) for v in oracle.diagonal(model, batches, oracle.cross_entropy).values())
    assert measured(model, batches, structure="ekfac").trace() == pytest.approx(expected, rel=1e-9)


def test_uses_of_one_weight_with_several_factors_add_up():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.last = nn.Parameter(torch.randn(D, D)), nn.Linear(D, C)

        def forward(self, x):
            h = torch.tanh(functional.linear(x, self.weight * 0.5))
            return self.last(functional.linear(h, self.weight) - functional.linear(h, self.weight / 3))

    model, batches = Twice().double(), data(5, 3)
    found = measured(model, batches)
    assert oracle.error(found.diagonal(dtype=torch.float64), oracle.diagonal(model, batches, oracle.cross_entropy)) < EXACT
    assert found.coverage["weight"] == "linear_sq_"


def test_factors_that_change_from_batch_to_batch():
    class Decaying(Scaled):
        def forward(self, x):
            self.c = torch.full_like(self.c, 0.1 * len(x))
            return super().forward(x)

    model, batches = Decaying(lambda w, c: w * c).double(), data(5, 3, 4, 2)
    found, expected = measured(model, batches), dict.fromkeys(dict(model.named_parameters()), 0.0)
    for x, y in batches:
        model.multiply = by(0.1 * len(x))
        for name, mean in oracle.diagonal(model, [(x, y)], oracle.cross_entropy).items():
            expected[name] = expected[name] + mean * len(x) / 14
    assert oracle.error(found.diagonal(dtype=torch.float64), expected) < EXACT


def test_what_is_made_of_a_multiple_goes_by_the_chain_rule():
    model, batches = Scaled(lambda w, c: functional.normalize(w * c + 0.5)).double(), data(5, 3)
    found = measured(model, batches)
    assert oracle.error(found.diagonal(dtype=torch.float64), oracle.diagonal(model, batches, oracle.cross_entropy)) < EXACT
    assert found.coverage["first.weight"].startswith("chain")


def test_a_multiple_that_is_changed_in_place_is_left_to_autograd():
    model, batches = Scaled(lambda w, c: (w * c).clamp_(-0.1, 0.1)).double(), data(5, 3)
    found = measured(model, batches)
    assert oracle.error(found.diagonal(dtype=torch.float64), oracle.diagonal(model, batches, oracle.cross_entropy)) < EXACT


def test_a_factor_that_is_learned_is_a_parameter():
    class Gained(Scaled):
        def __init__(self):
            super().__init__(lambda w, c: w * self.gain)
            self.gain = nn.Parameter(torch.tensor(0.7))

    model, batches = Gained().double(), data(5, 3)
    found = measured(model, batches)
    assert oracle.error(found.diagonal(dtype=torch.float64), oracle.diagonal(model, batches, oracle.cross_entropy)) < EXACT
    assert found.diagonal()["gain"] > 0


class Tied(nn.Module):
    """A table looked up in one multiple, and the head in another."""

    def __init__(self):
        super().__init__()
        self.table, self.middle = nn.Parameter(torch.randn(13, D)), nn.Linear(D, D)

    def forward(self, ids):
        """Logits ``[N, V]``."""
        h = torch.tanh(self.middle(functional.embedding(ids, self.table * math.sqrt(D)))).mean(1)
        return functional.linear(h, self.table * 0.5)


def test_tied_tables_in_several_multiples():
    model = Tied().double()
    batches = [(torch.randint(13, (n, 4)), torch.randint(13, (n,))) for n in (5, 3)]
    found = measured(model, batches)
    assert oracle.error(found.diagonal(dtype=torch.float64), oracle.diagonal(model, batches, oracle.cross_entropy)) < EXACT
    assert not found.coverage["table"].startswith(("chain", "vmap", "loop"))


class Images(nn.Module):
    """An equalized convolution, and a transposed one."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(5, 3, 3, 3)), nn.Parameter(torch.randn(5, C, 2, 2))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x):
        """Logits ``[N, C]``."""
        h = functional.conv2d(x, self.down * (1 / math.sqrt(27)), self.bias * 0.1, padding=1)
        return functional.conv_transpose2d(torch.tanh(h), self.up / 3, stride=2).mean((2, 3))


@pytest.mark.parametrize("structure", ["diagonal", "ekfac"])
def test_convolutions(structure):
    model = Images().double()
    batches = [(torch.randn(n, 3, 5, 4, dtype=torch.float64), torch.randint(C, (n,))) for n in (4, 3)]
    expected = oracle.diagonal(model, batches, oracle.cross_entropy)
    found = measured(model, batches, structure=structure)
    if structure == "diagonal":
        assert oracle.error(found.diagonal(dtype=torch.float64), expected) < EXACT
        assert found.coverage["down"] == found.coverage["up"] == "conv_sq_"
    else:
        assert found.trace() == pytest.approx(sum(float(v.sum()) for v in expected.values()), rel=1e-9)
        assert {"down", "up"} <= set(found.factors())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_a_factor_rounds_nothing(dtype):
    """``W * 0.3`` rounds, and so does its gradient; what is squared is 0.3 times the unrounded one."""
    torch.manual_seed(0)
    model = Scaled(lambda w, c: w * 0.3).to(dtype)
    x, y = torch.randn(6, D).to(dtype), torch.randint(C, (6,))
    plain = Scaled(lambda w, c: w).to(dtype)
    with torch.no_grad():
        for name in ("first", "last"):
            getattr(plain, name).weight.copy_(getattr(model, name).weight * 0.3)
            getattr(plain, name).bias.copy_(getattr(model, name).bias)
    found, expected = (measured(one, [(x, y)]).diagonal() for one in (model, plain))
    for name in ("first.weight", "last.weight"):
        assert torch.allclose(found[name], 0.09 * expected[name], rtol=1e-5, atol=0)
