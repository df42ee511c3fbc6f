# SPDX-License-Identifier: Apache-2.0
"""KFAC's input factor is that of every position there is, whatever its gradient and wherever its rows come from."""

import networks
import pytest
import torch
import torch.nn.functional as F
from networks import BesideMask, measure
from oracle import close
from torch import nn
from torch.utils.checkpoint import checkpoint

import fisherfast as ff

N, I, D, C, T = 6, 4, 5, 3, 7
EXACT = 1e-12


def factor(x):
    """``sum_m x_m x_m^T / M`` of rows, a 1 appended."""
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    return x.mT @ x / len(x)


def factor_of(model, batches, layer):
    return measure(model, batches, "kfac").factors(dtype=torch.float64)[layer][0]


def cut(x, y, sizes):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


@pytest.mark.parametrize("sizes", [[6], [3, 3], [1] * 6], ids=str)
@pytest.mark.parametrize("order", [1, -1], ids=["dead last", "dead first"])
def test_a_layer_without_a_gradient_has_its_inputs_counted(sizes, order):
    model = nn.Sequential(nn.Linear(I, D), nn.ReLU(), nn.Linear(D, C)).double()
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].bias.zero_()
    x = torch.rand(N, I).double()
    x[3:] *= -1  # no unit is on
    x = x if order > 0 else x.flip(0)
    assert close(factor_of(model, cut(x, torch.randint(C, (N,)), sizes), "0"), factor(x), EXACT)


class Experts(nn.Module):
    """Two experts with ReLU, of which every position asks one."""

    def __init__(self):
        super().__init__()
        self.gate, self.head = nn.Linear(I, 2).requires_grad_(False), nn.Linear(I, C)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(I, 2), nn.ReLU(), nn.Linear(2, I)) for _ in range(2))

    def chosen(self, x):
        return self.gate(x.flatten(0, 1)).argmax(-1)

    def forward(self, x):
        rows, chosen = x.flatten(0, 1), self.chosen(x)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            (mine,) = torch.where(chosen == number)
            out = out.index_add(0, mine, expert(rows[mine]))
        return self.head(out.view_as(x))


@pytest.mark.parametrize("ignored", [0, 3])
@pytest.mark.parametrize("sizes", [[6], [4, 2], [1] * 6], ids=str)
def test_experts_have_every_position_that_asked_them(sizes, ignored):
    model, x, y = Experts().double(), torch.randn(N, T, I).double(), torch.randint(C, (N, T))
    y[:, :ignored] = -100  # without a label, but there
    for number in range(2):
        mine = x.flatten(0, 1)[model.chosen(x) == number]
        assert close(factor_of(model, cut(x, y, sizes), f"experts.{number}.0"), factor(mine), EXACT)


def test_padding_that_experts_see_counts_in_no_batch_size():
    model, x, y = Experts().double(), torch.randn(N, T, I).double(), torch.randint(C, (N, T))
    mask = torch.ones(N, T, dtype=torch.int64)
    mask[:, 4:], y[:, 4:] = 0, -100
    for expert in model.experts:
        expert[0].bias.data.fill_(100.0)  # no unit is off, so what has no gradient is padding

    def batch(n):
        return {"x": x[n], "attention_mask": mask[n], "labels": y[n]}

    found = [
        factor_of(BesideMask(model), batches, "inner.experts.0.0")
        for batches in ([batch(slice(N))], [batch([n]) for n in range(N)])
    ]
    rows = x[:, :4].flatten(0, 1)[model.chosen(x[:, :4].contiguous()) == 0]
    assert close(found[0], factor(rows), EXACT) and close(found[1], factor(rows), EXACT)


def test_a_weight_used_twice_has_the_mask_of_each_use():
    model = networks.Wrapped(
        lambda m, x: m.head(m.square(m.square(x).tanh()).tanh()), square=nn.Linear(I, I), head=nn.Linear(I, C)
    ).double()
    lengths = (5, 2, 4)
    x, y = torch.randn(3, 5, I).double(), torch.randint(C, (3, 5))
    mask = torch.stack([torch.arange(5) < n for n in lengths]).long()
    padded = {"x": x, "attention_mask": mask, "labels": y.masked_fill(mask == 0, -100)}
    alone = [
        {"x": x[n : n + 1, :k], "attention_mask": mask[n : n + 1, :k], "labels": y[n : n + 1, :k]} for n, k in enumerate(lengths)
    ]
    found, expected = (
        measure(BesideMask(model), batches, "kfac").factors(dtype=torch.float64)["inner.square"] for batches in ([padded], alone)
    )
    assert all(close(one, other, EXACT) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("structure", networks.STRUCTURES)
def test_inputs_chosen_by_data_where_one_of_two_weights_has_no_gradient(structure):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.head = nn.Linear(I, D), nn.Linear(I, D), nn.Linear(D, C)
            nn.init.constant_(self.other.bias, -100.0)

        def forward(self, x, index):
            x = x[index]
            return self.head(self.one(x) + self.other(x).relu())

    index = torch.arange(N)
    model, x, y = Branches().double(), torch.randn(N, I).double(), torch.randint(C, (N,))
    found = measure(model, [((x, index), y)], structure)
    if structure == "kfac":
        assert close(found.factors(dtype=torch.float64)["other"][0], factor(x), EXACT)
        return
    assert found.trace() == pytest.approx(measure(model, [((x, index), y)], "diagonal").trace(), rel=1e-9)


@pytest.mark.parametrize("structure", networks.STRUCTURES)
def test_a_table_looked_up_with_time_first(structure):
    model = networks.Wrapped(
        lambda m, ids: m.head(m.table(ids.mT).tanh()).transpose(0, 1), table=nn.Embedding(11, D), head=nn.Linear(D, C)
    ).double()
    ids, y = torch.randint(11, (N, T)), torch.randint(C, (N, T))
    found, usual = (measure(model, [(ids, y)], asked) for asked in (structure, "diagonal"))
    if structure == "kfac":
        counts = torch.bincount(ids.flatten(), minlength=11).double() / ids.numel()
        assert close(found.factors(dtype=torch.float64)["table"][0], counts, EXACT)
    else:
        assert found.trace() == pytest.approx(usual.trace(), rel=1e-9)


@pytest.mark.parametrize("structure", networks.STRUCTURES)
def test_checkpointed_layers_are_told_apart(structure):
    """What a checkpoint has freed gives its place, and must not give its number, to other inputs."""
    blocks = [nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh()) for _ in range(3)]
    plain = nn.Sequential(*blocks, nn.Linear(D, C)).double()
    again = networks.Wrapped(lambda m, x: m.net[-1](_checkpointed(blocks, x)), net=plain)
    x, y = torch.randn(N, D).double(), torch.randint(C, (N,))
    found, expected = measure(again, [(x, y)], structure), measure(plain, [(x, y)], structure)
    assert found.trace() == pytest.approx(expected.trace(), rel=1e-12)


def _checkpointed(blocks, x):
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return x


@pytest.mark.parametrize("structure", networks.STRUCTURES)
def test_a_layer_called_for_one_sample_at_a_time(structure):
    model = networks.Wrapped(
        lambda m, x: m.head(torch.stack([m.norm(m.first(row)).tanh() for row in x])),
        first=nn.Linear(I, D), norm=nn.LayerNorm(D), head=nn.Linear(D, C),
    ).double()  # fmt: skip
    together = networks.Wrapped(lambda m, x: m.head(m.norm(m.first(x)).tanh()), **dict(model.named_children())).double()
    batches = cut(torch.randn(N, I).double(), torch.randint(C, (N,)), [5, 1])
    found, expected = (measure(m, batches, structure) for m in (model, together))
    assert found.trace() == pytest.approx(expected.trace(), rel=1e-11)


def test_ekfac_of_images_in_channels_last():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4 * 4, C)).double()
    x, y = torch.randn(N, 2, 4, 4).double(), torch.randint(C, (N,))
    usual = measure(model, [(x, y)], "ekfac")
    found = measure(model, [(x.to(memory_format=torch.channels_last), y)], "ekfac")
    assert found.trace() == pytest.approx(usual.trace(), rel=1e-12)


def test_a_small_row_that_weighs_much_is_in_the_basis():
    """In float32, two samples: the inputs of the second are 2e-6 of the first's, its gradients make up for it."""
    model = nn.Linear(30, 2, bias=False)
    nn.init.zeros_(model.weight)
    x = torch.zeros(2, 30)
    x[0, 0], x[1, 1] = 1e4, 0.02
    y = torch.tensor([[1e-3, 0.0], [3e3, 4e3]])
    traces = [
        ff.fisher(model, [(x, y)], s, "empirical", likelihood="gaussian", progress=False).trace() for s in ("diagonal", "ekfac")
    ]
    assert traces[1] == pytest.approx(traces[0], rel=1e-5)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_a_singular_block_has_no_log_determinant(structure):
    """A softmax layer's output factor has a null vector: all ones. Rounding gives it either sign."""
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(I, D), nn.Tanh(), nn.Linear(D, C)).double()
        found = measure(model, [(torch.randn(40, I).double(), None)], structure, "exact")
        with pytest.warns(ff.FisherWarning, match=f"logdet: {D + 1} of "):
            assert found.logdet() == -float("inf")
        with pytest.raises(ValueError, match=r"solve: F \+ damping I must be regular"):
            found.solve(torch.ones(found.num_parameters).double())


def test_a_singular_exact_block_has_no_log_determinant():
    found = measure(nn.LayerNorm(3).double(), [(torch.randn(9, 3).double(), None)], "kfac", "exact")
    with pytest.warns(ff.FisherWarning, match="logdet: "):
        assert found.logdet() == -float("inf")


def test_the_loss_is_that_of_the_oracle():
    """Of the experts, so that what is compared above is a Fisher at all."""
    model, x, y = Experts().double(), torch.randn(2, T, I).double(), torch.randint(C, (2, T))
    squares = torch.zeros_like(model.head.weight)
    for one, label in zip(x, y, strict=True):
        loss = F.cross_entropy(model(one[None])[0], label, reduction="sum")
        squares += torch.autograd.grad(loss, model.head.weight)[0].square() / 2
    assert close(measure(model, [(x, y)], "diagonal").diagonal(dtype=torch.float64)["head.weight"], squares, EXACT)
