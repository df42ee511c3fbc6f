# SPDX-License-Identifier: Apache-2.0
"""Outputs of which some are huge, infinite or far from zero say nothing of the others: neither of rounding nor of dependence."""

import math

import pytest
import torch
from oracle import cross_entropy, diagonal, doubled, error
from torch import nn

import fisherfast as ff

LOWEST = torch.finfo(torch.float32).min


class Positions(nn.Module):
    """Positions are rolled, so expanding their table to the samples would roll the samples."""

    def __init__(self, mask: float, offset: float) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(11, 6), nn.Embedding(5, 6), nn.Linear(6, 5)
        self.mask, self.offset = mask, offset

    def forward(self, ids):
        h = torch.tanh(self.tokens(ids) + self.positions(torch.arange(5)).roll(1, 0))
        return self.head(h).masked_fill(torch.arange(5) == 4, self.mask) + self.offset


class Centred(nn.Module):
    """Takes away a part of the batch's mean."""

    def __init__(self, share: float, mask: float, offset: float) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 5)
        self.share, self.mask, self.offset = share, mask, offset

    def forward(self, x):
        h = self.body(x).tanh()
        h = h - self.share * h.mean(0)
        return self.head(h).masked_fill(torch.arange(5) == 4, self.mask) + self.offset


class Actions(nn.Module):
    """Each sample has classes of its own that cannot be."""

    def __init__(self, mask: float) -> None:
        super().__init__()
        self.body, self.head, self.mask = nn.Linear(6, 6), nn.Linear(6, 5), mask

    def forward(self, x):
        return self.head(self.body(x).tanh()).masked_fill(x[:, :5] > 0.8, self.mask)


@pytest.mark.parametrize("mask", [-1e4, -1e9, LOWEST, -math.inf])
def test_a_table_is_not_expanded_because_a_mask_hides_the_difference(mask):
    model, ids, labels = Positions(mask, 0.0).eval(), torch.randint(11, (8, 5)), torch.randint(4, (8, 5))
    found = ff.fisher(model, [(ids, labels)], fisher_type="empirical", progress=False)
    assert error(found.diagonal(), diagonal(doubled(model), [(ids, labels)], cross_entropy)) < 1e-5


@pytest.mark.parametrize("share", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize(("mask", "offset"), [(0.0, 0.0), (-1e9, 0.0), (-1e30, 0.0), (LOWEST, 0.0), (-math.inf, 0.0)])
def test_samples_that_depend_on_each_other_are_refused_behind_a_mask(share, mask, offset):
    with pytest.raises(ValueError, match="samples must not depend on each other"):
        ff.fisher(Centred(share, mask, offset).eval(), [(torch.randn(8, 6), torch.randint(4, (8,)))], progress=False)


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_samples_that_depend_on_each_other_are_refused_at_an_offset(offset):
    data = [(torch.randn(8, 6), offset + torch.randn(8, 5))]
    with pytest.raises(ValueError, match="samples must not depend on each other"):
        ff.fisher(Centred(1.0, 0.0, offset).eval(), data, likelihood="gaussian", progress=False)


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac", "gram"])
@pytest.mark.parametrize("fisher_type", ["mc", "exact", "empirical"])
def test_classes_that_cannot_be_may_have_any_low_logit(structure, fisher_type):
    x, y = torch.randn(16, 6), torch.zeros(16, dtype=torch.long)
    x[:, 0] = 0
    model = Actions(-1e9).eval()

    def trace(mask):
        model.mask = mask
        return ff.fisher(model, [(x, y)], structure, fisher_type, progress=False).trace()

    assert [trace(LOWEST), trace(-math.inf)] == pytest.approx([trace(-1e9)] * 2, rel=1e-6)


@pytest.mark.parametrize(("likelihood", "value"), [("categorical", math.inf), ("categorical", math.nan), ("gaussian", -math.inf)])
def test_other_infinities_are_refused(likelihood, value):
    y = torch.zeros(4, dtype=torch.long) if likelihood == "categorical" else torch.zeros(4, 5)
    with pytest.raises(ff.NonFiniteError, match="must be finite"):
        ff.fisher(Actions(value).eval(), [(torch.ones(4, 6), y)], likelihood=likelihood, progress=False)


def test_an_operator_looks_at_its_first_samples():
    data = [(torch.randn(8, 6), torch.randint(4, (8,)))]
    with pytest.raises(ValueError, match="samples must not depend on each other"):
        _ = ff.FisherOperator(Centred(1e-3, 0.0, 0.0).eval(), data) @ torch.ones(77)
    assert (ff.FisherOperator(Centred(0.0, -1e9, 0.0).eval(), data) @ torch.ones(77)).isfinite().all()
