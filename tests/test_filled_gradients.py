# SPDX-License-Identifier: Apache-2.0
"""``ff.collect(..., gradients=True)``: the step's gradients from the products that measure, as autograd has them."""

import copy
import warnings

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfast as ff


def losses(model, x, y):
    """One per sample, of any of the networks."""
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="none").view(len(y), -1).sum(1)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], torch.zeros_like(found[name]) if gradient is None else gradient, **tolerance)


@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
@pytest.mark.parametrize("name", networks.COVERED)
def test_are_those_of_a_backward_pass(name, structure):
    model, x, y = networks.doubles(name)
    plain = copy.deepcopy(model)
    losses(plain, x, y).sum().backward()
    with ff.collect(model, structure, gradients=True) as stats:
        stats.backward(losses(model, x, y))
    same(gradients(model), gradients(plain), rtol=1e-9, atol=1e-12)
    alone = ff.fisher(model, [(x, y)], structure, "empirical", progress=False)
    assert stats.result().trace() == pytest.approx(alone.trace(), rel=1e-10)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_add_to_what_is_there(reduction):
    model, (x, y) = networks.mlp(), networks.double_vectors()
    plain = copy.deepcopy(model)
    with ff.collect(model, "diagonal", ff.GradientMoments(), gradients=True, reduction=reduction) as stats:
        for part in (slice(0, 2), slice(2, 6)):
            getattr(losses(plain, x[part], y[part]), reduction)().backward()
            stats.backward(losses(model, x[part], y[part]))
    same(gradients(model), gradients(plain), rtol=1e-10, atol=1e-13)
    _, moments = stats.results()
    mean = ff.fisher(model, [(x, y)], ff.GradientMoments(), "empirical", progress=False).mean(dtype=torch.float64)
    same(moments.mean(dtype=torch.float64), mean, rtol=1e-10, atol=1e-13)


def test_train_a_model_that_is_measured_on_its_way():
    """Every step's weights are the next one's: the same path as without the measurement."""
    model, (x, y), steps = networks.mlp(), networks.double_vectors(), 4
    plain = copy.deepcopy(model)
    paths = []
    for one in (model, plain):
        optimizer, path = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9), []
        with ff.collect(model, ff.PerSampleNorm(), gradients=True, reduction="mean") as stats:
            for _ in range(steps):
                optimizer.zero_grad()
                loss = losses(one, x, y)
                stats.backward(loss) if one is model else loss.mean().backward()
                optimizer.step()
                path.append(float(loss.mean()))
        paths.append(path)
        if one is model:
            assert stats.result().num_samples == steps * len(x)
    assert paths[0] == pytest.approx(paths[1], rel=1e-11) and paths[0][-1] < paths[0][0]


def test_half_precision_gradients_come_without_the_factor():
    model, x, y = nn.Linear(5, 3).half(), torch.randn(4, 5).half(), torch.randint(0, 3, (4,))
    plain = copy.deepcopy(model)
    F.cross_entropy(plain(x).float(), y, reduction="sum").backward()
    with ff.collect(model, "diagonal", gradients=True, loss_scale=2.0**8) as stats:
        stats.backward(F.cross_entropy(model(x).float(), y, reduction="none"))
    assert model.weight.grad.dtype == torch.float16
    same(gradients(model), gradients(plain), rtol=2e-3, atol=2e-3)


def test_a_batch_that_fails_leaves_them_alone():
    model, (x, y) = networks.mlp(), networks.double_vectors()
    with ff.collect(model, "diagonal", gradients=True) as stats:
        stats.backward(losses(model, x, y))
        before = {name: g.clone() for name, g in gradients(model).items()}
        bad = losses(model, x, y)
        bad.register_hook(lambda g: g * float("nan"))
        with pytest.raises(ff.NonFiniteError, match="gradients must be finite"):
            stats.backward(bad)
        same(gradients(model), before, rtol=0, atol=0)
        stats.backward(losses(model, x, y))
    same(gradients(model), {name: 2 * g for name, g in before.items()}, rtol=1e-12, atol=0)


def test_frozen_parameters_get_none_and_an_error_names_the_reductions():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    with ff.collect(model, "kfac", gradients=True) as stats:
        stats.backward(F.cross_entropy(model(torch.randn(5, 4)), torch.zeros(5).long(), reduction="none"))
    assert model[0].weight.grad is None and model[1].weight.grad is not None
    with pytest.raises(ValueError, match="reduction must be 'sum' or 'mean'"):
        ff.collect(model, "diagonal", gradients=True, reduction="none")


class Sometimes(nn.Module):
    """A weight that is used where one says so."""

    def __init__(self):
        super().__init__()
        self.first, self.scale, self.head = nn.Linear(5, 4), nn.Parameter(torch.rand(4)), nn.Linear(4, 3)
        self.scales = True

    def forward(self, x):
        h = self.first(x).tanh()
        return self.head(h * self.scale if self.scales else h)


def test_what_a_batch_does_not_use_keeps_none():
    """Zeros would let weight decay and momentum move it."""
    model, x, y = Sometimes().double(), torch.randn(6, 5).double(), torch.randint(0, 3, (6,))
    plain = copy.deepcopy(model)
    for one in (model, plain):
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.1)
        with ff.collect(model, "diagonal", gradients=True) as stats:
            for uses in (True, False, True, False):
                one.scales = uses
                optimizer.zero_grad()
                loss = losses(one, x, y)
                stats.backward(loss) if one is model else loss.sum().backward()
                assert (one.scale.grad is None) is not uses
                optimizer.step()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


def test_lie_in_memory_as_their_parameters_do():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).to(memory_format=torch.channels_last)
    with ff.collect(model, "diagonal", gradients=True) as stats:
        loss = F.cross_entropy(model(torch.randn(5, 3, 6, 6)), torch.zeros(5).long(), reduction="none")
        stats.backward(loss)
    assert model[0].weight.stride() != torch.empty(4, 3, 3, 3).stride()
    assert all(p.grad.stride() == p.stride() for p in model.parameters())


@pytest.mark.parametrize("inside", [False, True])
def test_backward_outside_of_autocast_with_a_loss_scale(inside):
    """Where torch recommends it: what was half there is half in the backward pass, too."""
    model, x, y = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(7, 5), torch.randint(0, 3, (7,))
    found = []
    for scale in (1.0, 2.0**10, 2.0**14):
        with ff.collect(model, "diagonal", loss_scale=scale) as stats:
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(x).float(), y, reduction="none")
                if inside:
                    stats.backward(loss)
            if not inside:
                stats.backward(loss)
        found.append(stats.result().trace())
    assert found == pytest.approx(found[:1] * 3, rel=1e-2)


def test_a_reduction_is_of_gradients():
    with pytest.raises(ValueError, match="reduction must come with gradients=True"):
        ff.collect(nn.Linear(2, 2), "diagonal", reduction="mean")


def test_what_is_not_of_the_model_gets_no_gradient_and_a_warning():
    body, head = nn.Linear(4, 4), nn.Linear(4, 3)
    x, y = torch.randn(5, 4), torch.randint(3, (5,))

    def backward(model):
        with ff.collect(model, ff.Diagonal(), gradients=True) as stats:
            for _ in range(2):
                stats.backward(F.cross_entropy(head(body(x).tanh()), y, reduction="none"))

    with pytest.warns(ff.FisherWarning, match=r"depends on others, of shapes .*\(3, 4\).*, which get none") as found:
        backward(body)
    assert len(found) == 1 and body.weight.grad is not None and head.weight.grad is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(nn.ModuleList([body, head]))
    assert head.weight.grad is not None


@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
def test_what_is_frozen_on_the_way_gets_none_from_then_on(structure):
    model, (x, y) = networks.mlp(), networks.double_vectors()
    with ff.collect(model, structure, gradients=True) as stats:
        stats.backward(losses(model, x, y))
        model.zero_grad()
        model[0].requires_grad_(False)
        stats.backward(losses(model, x, y))
    assert all(p.grad is None for p in model[0].parameters())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("loss_scale", [1.0, 64.0])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.filterwarnings("ignore:head1.weight, head1.bias|.*should reach the loss:fisherfast.FisherWarning")
def test_what_the_first_loss_does_not_reach_gets_its_gradient_from_autograd(reduction, loss_scale):
    """Heads that take turns: those that begin later are not measured, and are trained."""
    torch.manual_seed(0)
    body = [nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)]
    model, x, y = nn.ModuleList(body).double(), torch.randn(4, 6, 4).double(), torch.arange(6) % 3
    plain = copy.deepcopy(model)
    kinds = {"gradients": True, "allow_missing": True, "reduction": reduction, "loss_scale": loss_scale}
    with ff.collect(model, "diagonal", **kinds) as stats:
        for number, batch in enumerate(x):
            one = F.cross_entropy(plain[1 + number % 2](plain[0](batch).tanh()), y, reduction=reduction)
            one.backward()
            stats.backward(F.cross_entropy(model[1 + number % 2](model[0](batch).tanh()), y, reduction="none"))
    same(gradients(model), gradients(plain), rtol=1e-10, atol=1e-13)
    assert {"2.weight", "2.bias"} == stats.result().coverage.missing.keys()
