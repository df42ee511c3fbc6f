# SPDX-License-Identifier: Apache-2.0
"""KFAC's A with sample weights and rows that an index brought: of every position there is, also of those without a gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfast as ff

N, T, D, V, C = 5, 4, 6, 7, 3
IGNORED = -100


class Net(nn.Module):
    """Reads ids or features that some index moves, and has ReLUs that are dead for many rows."""

    def __init__(self, move, table=False):
        super().__init__()
        self.table, self.first, self.head = nn.Embedding(V, D) if table else None, nn.Linear(D, D), nn.Linear(D, C)
        self.move = move
        with torch.no_grad():
            self.first.bias -= 1

    def forward(self, x, *more):
        x = self.move(x, *more)
        x = x if self.table is None else self.table(x)
        return self.head(self.first(x).relu())


FEATURES = torch.tensor([3, 1, 0, 5, 2, 4])
IDS = torch.tensor([4, 0, 6, 1, 5, 2, 3])
MOVES = {
    "features by a tensor": lambda x: x[:, :, FEATURES],
    "features by a list": lambda x: x[:, :, FEATURES.tolist()],
    "features behind an ellipsis": lambda x: x[..., FEATURES],
    "features selected": lambda x: x.index_select(-1, FEATURES),
    "features gathered": lambda x: x.gather(2, FEATURES.expand_as(x)),
    "positions by a tensor": lambda x: x[:, torch.tensor([2, 0, 3, 1])],
    "positions by a list": lambda x: x[:, [2, 0, 3, 1]],
    "a position of each sample": lambda x: x[torch.arange(len(x)), torch.full((len(x),), T - 1)].unsqueeze(1).repeat(1, T, 1),
}


def factor(net, layer, batches):
    """``sum w x x^T / sum w`` over samples and positions, sample by sample."""
    sums, weights = 0.0, 0.0
    for x, _, w in batches:
        for n in range(len(x)):
            seen = []
            handle = getattr(net, layer).register_forward_hook(lambda _m, inputs, _o, seen=seen: seen.append(inputs[0].detach()))
            net(x[n : n + 1])
            handle.remove()
            rows = seen[0].reshape(-1, D)
            rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
            sums, weights = sums + float(w[n]) * rows.mT @ rows, weights + float(w[n]) * len(rows)
    return sums / weights


def labelled(x, weight):
    y = torch.randint(C, x.shape[:2])
    y[:, 2:] = IGNORED
    return x, y, weight


@pytest.mark.parametrize("weigh", [torch.ones, lambda n: torch.rand(n) + 0.5], ids=["weights of one", "any weights"])
@pytest.mark.parametrize("move", MOVES.values(), ids=list(MOVES))
def test_moved_rows_count_with_their_samples_weight(move, weigh):
    net = Net(move).double()
    batches = [labelled(torch.randn(n, T, D).double(), weigh(n)) for n in (N, N - 1)]
    factors = ff.fisher(net, batches, "kfac", "empirical", progress=False).factors(dtype=torch.float64)
    for layer in ("first", "head"):
        assert torch.allclose(factors[layer][0], factor(net, layer, batches), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_weights_of_one_change_nothing_where_ids_are_mapped(structure):
    net = Net(lambda ids: IDS[ids], table=True).double()
    weighted = [labelled(torch.randint(V, (n, T)), torch.ones(n)) for n in (N, N - 1)]
    with_weights, without = (
        ff.fisher(net, batches, structure, "empirical", progress=False) for batches in (weighted, [b[:2] for b in weighted])
    )
    assert with_weights.trace() == pytest.approx(without.trace(), rel=1e-12)
    assert with_weights.logdet(0.01) == pytest.approx(without.logdet(0.01), rel=1e-12)


def test_mapped_ids_count_with_their_samples_weight():
    net = Net(lambda ids: IDS[ids], table=True).double()
    batches = [labelled(torch.randint(V, (n, T)), torch.rand(n) + 0.5) for n in (N, N - 1)]
    factors = ff.fisher(net, batches, "kfac", "empirical", progress=False).factors(dtype=torch.float64)
    assert torch.allclose(factors["first"][0], factor(net, "first", batches), rtol=1e-9, atol=1e-12)


def test_the_last_token_of_each_sample_is_an_input_whatever_is_padded():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.first, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, C)

        def forward(self, input_ids, attention_mask):
            last = attention_mask.sum(1) - 1
            return self.head(self.first(self.table(input_ids)[torch.arange(len(last)), last] - 1).relu())

    net = Pooled().double()
    lengths = torch.tensor([4, 2, 3, 1, 4])
    mask = (torch.arange(T) < lengths[:, None]).long()
    batch = {"input_ids": torch.randint(V, (N, T)), "attention_mask": mask, "labels": torch.randint(C, (N,))}
    rows = net.table(batch["input_ids"])[torch.arange(N), lengths - 1].detach() - 1
    rows = torch.cat([rows, torch.ones(N, 1).double()], 1)
    (A, _) = ff.fisher(net, [batch], "kfac", "empirical", progress=False).factors(dtype=torch.float64)["first"]
    assert torch.allclose(A, rows.mT @ rows / N, rtol=1e-9)
    assert (F.relu(rows[:, :-1] @ net.first.weight.T + net.first.bias) == 0).any()


class Kept(nn.Module):
    """Keeps some positions of each sample, those that exist first."""

    def __init__(self, pick):
        super().__init__()
        self.first, self.head, self.pick = nn.Linear(D, D), nn.Linear(D, C), pick

    def forward(self, x, attention_mask):
        kept = attention_mask.double().add(torch.linspace(0, 0.5, T)).topk(T - 1, 1).indices
        return self.head(self.first(self.pick(x, kept)).tanh())


PICKS = {
    "gathered": lambda x, kept: x.gather(1, kept.unsqueeze(-1).expand(-1, -1, D)),
    "indexed": lambda x, kept: x[torch.arange(len(x))[:, None], kept],
    "indexed behind an ellipsis": lambda x, kept: torch.stack([one[..., which, :] for one, which in zip(x, kept, strict=True)]),
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("pick", PICKS.values(), ids=list(PICKS))
def test_padding_that_is_picked_is_no_input(pick, sharing):
    net, lengths = Kept(pick).double(), torch.tensor([4, 2, 3, 1, 4])
    mask, x = (torch.arange(T) < lengths[:, None]).long(), torch.randn(N, T, D).double()
    exists = lengths.clamp_max(T - 1)  # of the rows that are kept, which come first
    labels = torch.where(torch.arange(T - 1) < exists[:, None], torch.randint(C, (N, T - 1)), IGNORED)
    batch = {"x": x, "attention_mask": mask, "labels": labels}
    kept = mask.double().add(torch.linspace(0, 0.5, T)).topk(T - 1, 1).indices
    each = [PICKS["gathered"](x, kept)[n, : exists[n]] for n in range(N)]
    rows = torch.cat(each) if sharing == "expand" else torch.stack([one.mean(0) for one in each])
    rows = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
    (A, _) = ff.fisher(net, [batch], ff.KFAC(sharing=sharing), "empirical", progress=False).factors(dtype=torch.float64)["first"]
    assert torch.allclose(A, rows.mT @ rows / len(rows), rtol=1e-9)


def test_the_mean_of_a_samples_inputs_is_of_its_own_rows():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(D, D), nn.Linear(D, C)

        def forward(self, x):
            order = x[:, 0, 0].argsort()
            last = self.first(x[order])[:, -1].tanh()
            return self.head(last)[order.argsort()]

    net, x = Sorted().double(), torch.randn(N, T, D).double()
    rows = torch.cat([x.mean(1), torch.ones(N, 1).double()], 1)
    data = [(x, torch.randint(C, (N,)))]
    (A, _) = ff.fisher(net, data, ff.KFAC(sharing="reduce"), "empirical", progress=False).factors(dtype=torch.float64)["first"]
    assert torch.allclose(A, rows.mT @ rows / N, rtol=1e-9)
