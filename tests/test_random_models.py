# SPDX-License-Identifier: Apache-2.0
"""Random models of random layers, shapes, shared modules and shared weights: whatever is put together is measured exactly."""

import networks
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fisherfast as ff

EXACT = 1e-12
T = 5


class Over(nn.Module):
    """A layer over time, which takes ``[N, D, T]``."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        """[N, T, D] to the same."""
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


class Recurrent(nn.Module):
    """A recurrent layer's outputs."""

    def __init__(self, kind, d, batch_first):
        super().__init__()
        self.layer = kind(d, d, batch_first=batch_first)

    def forward(self, x):
        """[N, T, D] to the same."""
        if self.layer.batch_first:
            return self.layer(x)[0]
        return self.layer(x.transpose(0, 1))[0].transpose(0, 1)


class Attention(nn.Module):
    """Self-attention with one head."""

    def __init__(self, d):
        super().__init__()
        self.layer = nn.MultiheadAttention(d, 1, batch_first=True)

    def forward(self, x):
        """[N, T, D] to the same."""
        return self.layer(x, x, x, need_weights=False)[0]


class Flat(nn.Module):
    """A linear layer on rows without a sample axis of their own, samples outside or inside."""

    def __init__(self, d, inside):
        super().__init__()
        self.layer, self.inside = nn.Linear(d, d), inside

    def forward(self, x):
        """[N, T, D] to the same."""
        if not self.inside:
            return self.layer(x.flatten(0, 1)).view_as(x)
        turned = x.transpose(0, 1)
        return self.layer(turned.flatten(0, 1)).view_as(turned).transpose(0, 1)


class Halves(nn.Module):
    """Two views of one weight, and a slice of a position table."""

    def __init__(self, d):
        super().__init__()
        self.both, self.table = networks.parameter(2 * d, d), networks.parameter(T + 2, d)

    def forward(self, x):
        """[N, T, D] to the same."""
        up, gate = self.both.chunk(2)
        return F.linear(x, up).tanh() * F.linear(x, gate) + self.table[1 : T + 1]


class Positions(nn.Module):
    """A table that never sees the sample axis."""

    def __init__(self, d):
        super().__init__()
        self.table = nn.Embedding(T, d)

    def forward(self, x):
        """[N, T, D] to the same."""
        return x + self.table(torch.arange(T))


class ParallelExperts(nn.Module):
    """Rows gathered by what they hold, each to one of two linear layers."""

    def __init__(self, d):
        super().__init__()
        self.stacked = networks.parameter(2, d, d)

    def forward(self, x):
        """[N, T, D] to the same."""
        rows = x.flatten(0, 1)
        out = torch.zeros_like(rows)
        for e in range(2):
            mine = ((rows[:, 0] > 0) == bool(e)).nonzero().squeeze(1)
            out = out.index_add(0, mine, F.linear(rows[mine], self.stacked[e]))
        return out.view_as(x)


LAYERS = {
    "linear": lambda d: nn.Linear(d, d),
    "no-bias": lambda d: nn.Linear(d, d, bias=False),
    "layer-norm": nn.LayerNorm,
    "rms-norm": networks.LlamaNorm,
    "relu": lambda d: nn.ReLU(inplace=True),
    "prelu": lambda d: nn.PReLU(T),  # the channels are the second axis
    "conv": lambda d: Over(nn.Conv1d(d, d, 3, padding=1)),
    "conv-dilated": lambda d: Over(nn.Conv1d(d, d, 2, padding="same", dilation=2)),
    "conv-depthwise": lambda d: Over(nn.Conv1d(d, d, 3, padding=1, groups=d)),
    "conv-transposed": lambda d: Over(nn.ConvTranspose1d(d, d, 3, padding=1)),
    "group-norm": lambda d: Over(nn.GroupNorm(1, d)),
    "attention": Attention,
    "lstm": lambda d: Recurrent(nn.LSTM, d, True),
    "gru-time-first": lambda d: Recurrent(nn.GRU, d, False),
    "flat": lambda d: Flat(d, inside=False),
    "flat-time-first": lambda d: Flat(d, inside=True),
    "halves": Halves,
    "positions": Positions,
    "experts": ParallelExperts,
    "weight-norm": lambda d: nn.utils.parametrizations.weight_norm(nn.Linear(d, d)),
}


class Stack(nn.Module):
    """Layers one after the other, some of them again, with or without a residual path."""

    def __init__(self, layers, order, residual, tied, d):
        super().__init__()
        self.table, self.layers, self.order, self.residual = nn.Embedding(networks.V, d), nn.ModuleList(layers), order, residual
        self.head = nn.Linear(d, networks.V)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        """Token ids [N, T] to logits."""
        h = self.table(ids).tanh()
        for i, keep in zip(self.order, self.residual, strict=True):
            h = (h if keep else 0) + self.layers[i](h.clone()).tanh()
        return self.head(h)


@st.composite
def stacks(draw):
    """A model and the sizes of its batches."""
    d = draw(st.sampled_from([2, 3, 7]))
    kinds = draw(st.lists(st.sampled_from(list(LAYERS)), min_size=1, max_size=4))
    order = draw(st.lists(st.integers(0, len(kinds) - 1), min_size=len(kinds), max_size=len(kinds) + 2))
    order += [i for i in range(len(kinds)) if i not in order]
    residual = draw(st.lists(st.booleans(), min_size=len(order), max_size=len(order)))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    model = Stack([LAYERS[kind](d) for kind in kinds], order, residual, draw(st.booleans()), d).double()
    return model, draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(stack=stacks(), fisher_type=st.sampled_from(["empirical", "empirical", "mc"]))
def test_whatever_is_put_together_is_exact(stack, fisher_type):
    model, sizes = stack
    batches = [(torch.randint(0, networks.V, (n, T)), torch.randint(0, networks.V, (n, T))) for n in sizes]
    if fisher_type == "mc":  # the split into batches must not matter
        whole = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
        pair = [ff.fisher(model, b, progress=False, seed=3).diagonal(dtype=torch.float64) for b in (batches, whole)]
        assert oracle.error(*pair) < EXACT
        return
    expected = oracle.diagonal(model, batches, oracle.cross_entropy)
    found = ff.fisher(model, batches, fisher_type="empirical", progress=False)
    assert oracle.error(found.diagonal(dtype=torch.float64), expected) < EXACT
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        for ids, y in batches:
            losses = F.cross_entropy(model(ids).flatten(0, 1), y.flatten(), reduction="none")
            stats.backward(losses.view(len(ids), -1).sum(1))
    assert oracle.error(stats.result().diagonal(dtype=torch.float64), expected) < EXACT
