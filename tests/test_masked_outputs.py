# SPDX-License-Identifier: Apache-2.0
"""Outputs of which some are huge, infinite or far from zero say nothing of the others: neither of rounding nor of dependence."""

import math

import pytest
import torch
from networks import Wrapped
from oracle import cross_entropy, diagonal, doubled, error
from torch import nn

import fisherfast as ff
from fisherfast.fisher.run.dependence import check_alone, precision, same_but_rounding

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


@pytest.mark.parametrize("share", [1.0, 1e-3, 1e-4])
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


BF16 = torch.bfloat16


def ulps(values):
    """One unit in the last place away, in a tenth of the entries."""
    near = torch.nextafter(values.float(), torch.tensor(math.inf)) if values.dtype != BF16 else values
    near = (values.view(torch.int16) + 1).view(BF16) if values.dtype == BF16 else near.to(values.dtype)
    return torch.where((torch.rand(values.shape) < 0.1) & values.isfinite(), near, values)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("C", [10, 1000])
def test_rounding_is_no_difference(dtype, C):
    values = torch.randn(4, C).to(dtype)
    values[:, 0] = -math.inf
    eps = torch.finfo(dtype).eps
    check_alone(ulps(values)[:1], values[:1], eps)
    assert same_but_rounding(ulps(values), values, eps)
    with pytest.raises(ValueError, match="a sample alone has another output"):
        check_alone(values[1:2], values[:1], eps)
    assert not same_but_rounding(values.roll(1, 0), values, eps)


def test_a_mask_of_one_is_no_rounding():
    values, eps = torch.randn(4, 10), torch.finfo(torch.float32).eps
    masked = values.clone()
    masked[0, 3] = -math.inf
    for one, other in ((values, masked), (masked, values)):
        assert not same_but_rounding(one, other, eps)
        with pytest.raises(ValueError, match="a sample alone has another output"):
            check_alone(one[:1], other[:1], eps)


def test_small_outputs_are_told_apart_too():
    values = 1e-7 * torch.randn(4, 5)
    assert not same_but_rounding(values.roll(1, 0), values, torch.finfo(torch.float32).eps)


def test_the_coarsest_precision_counts():
    model, values = nn.Linear(2, 2), torch.randn(3, 2)
    assert precision(model, values) == torch.finfo(torch.float32).eps
    with torch.autocast("cpu", dtype=BF16):
        assert precision(model, values) == torch.finfo(BF16).eps
    assert precision(model.to(BF16), values) == torch.finfo(BF16).eps


@pytest.mark.parametrize("mask", [-1e9, -math.inf])
def test_the_fallback_and_single_samples_behind_a_mask(mask):
    model = Actions(mask).double()
    model.power = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    inner = model.body.forward
    model.body.forward = lambda x: (inner(x).abs() + 1) ** model.power
    x, y = torch.randn(6, 6).double(), torch.zeros(6, dtype=torch.long)
    x[:, 0] = 0
    whole, single = ([(x, y)], list(zip(x.split(1), y.split(1), strict=True)))
    expected = diagonal(model, whole, cross_entropy)
    for data in (whole, single):
        found = ff.fisher(model, data, fisher_type="empirical", progress=False).diagonal(dtype=torch.float64)
        assert error(found, expected) < 1e-9


@pytest.mark.parametrize("fisher_type", ["mc", "exact", "empirical"])
def test_some_class_must_be_possible_and_the_label(fisher_type):
    x, y = torch.randn(4, 6), torch.zeros(4, dtype=torch.long)
    x[:, :5] = 0
    possible = ff.fisher(Actions(-math.inf).eval(), [(x, y)], fisher_type=fisher_type, progress=False)
    assert possible.trace() > 0
    x[2, 0] = 1  # the label's class
    if fisher_type == "empirical":
        with pytest.raises(ff.NonFiniteError, match="must be finite"):
            ff.fisher(Actions(-math.inf).eval(), [(x, y)], fisher_type=fisher_type, progress=False)
    else:
        ff.fisher(Actions(-math.inf).eval(), [(x, y)], fisher_type=fisher_type, progress=False)
    x[2, :5] = 1
    with pytest.raises(ff.NonFiniteError, match="must be finite"):
        ff.fisher(Actions(-math.inf).eval(), [(x, y)], fisher_type=fisher_type, progress=False)


def test_an_operator_takes_what_cannot_be_taken_apart():
    """An input that is as long as the batch and holds no samples, and logits of -inf."""
    model = Wrapped(lambda m, x, shared: m.head((x + shared.sum(0)).tanh()), head=nn.Linear(6, 5)).double()
    x, y = torch.randn(6, 6).double(), torch.randint(5, (6,))
    assert (ff.FisherOperator(model, [((x, torch.randn(6, 6).double()), y)]) @ torch.ones(35).double()).isfinite().all()
    x[:, 0] = 0
    low, lowest = (
        ff.FisherOperator(Wrapped(lambda m, x: m.inner(x), inner=Actions(mask).double()), [(x, 0 * y)], "exact")
        for mask in (-1e9, -math.inf)
    )
    lowest._model.load_state_dict(low._model.state_dict())
    v = torch.randn(low.num_parameters).double()
    torch.testing.assert_close(low @ v, lowest @ v)
