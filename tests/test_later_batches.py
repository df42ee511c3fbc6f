# SPDX-License-Identifier: Apache-2.0
"""What a later batch does in another way than the first: tables with and without a sample axis, uses left out, inputs written to."""

import gc
import resource
import weakref
from collections import OrderedDict

import networks
import oracle
import pytest
import torch
import torch.nn.functional as F
from networks import Wrapped
from torch import nn

import fisherfast as ff

V, D, C = 13, 11, 4


class Positions(nn.Module):
    """A position table, looked up by ``places``, of ids ``[N, T]``; mean over positions unless ``each``."""

    def __init__(self, places, each=False):
        super().__init__()
        self.places, self.each = places, each
        self.tokens, self.positions, self.head = nn.Embedding(V, D), nn.Embedding(20, D), nn.Linear(D, C)

    def forward(self, ids):
        h = (self.tokens(ids) + self.positions(self.places(ids))).tanh()
        return self.head(h if self.each else h.mean(1))


def by_padding(ids):
    """As many models do: only a padded batch needs positions of its own."""
    mask = ids != 0
    return torch.arange(ids.shape[1]) if bool(mask.all()) else (mask.cumsum(1) - 1).clamp_min(0)


def whole(N, T):
    return torch.randint(1, V, (N, T))


def padded(N, T):
    ids = whole(N, T)
    ids[0, T // 2 :] = 0
    return ids


def by_batch_and_by_sample(model, batches, **options):
    likelihood = ff.Categorical(axis=-1)
    alone = [tuple(t[n : n + 1] for t in batch) for batch in batches for n in range(len(batch[0]))]
    return (ff.fisher(model, data, likelihood=likelihood, progress=False, **options) for data in (batches, alone))


def same(one, other):
    assert (one.num_samples, one.num_positions) == (other.num_samples, other.num_positions)
    for name, expected in other.diagonal(dtype=torch.float64).items():
        assert torch.allclose(one.diagonal(dtype=torch.float64)[name], expected, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("fisher_type", ["exact", "empirical", "mc"])
def test_a_table_that_a_later_batch_looks_up_for_every_sample(fisher_type):
    model = Positions(by_padding).double()
    batches = [(ids, torch.randint(0, C, (4,))) for ids in (whole(4, 5), whole(4, 5), padded(4, 5), whole(4, 3), padded(4, 6))]
    same(*by_batch_and_by_sample(model, batches, fisher_type=fisher_type))


@pytest.mark.parametrize("lengths", [(5, 3, 1), (5, 1), (4, 1, 4), (1, 5), (1, 4)], ids=str)
@pytest.mark.parametrize("each", [False, True])
def test_sequences_of_length_one_are_sequences(lengths, each):
    model = Positions(lambda ids: torch.arange(ids.shape[1]), each).double()
    batches = [(whole(4, T), torch.randint(0, C, (4, T) if each else (4,))) for T in lengths]
    same(*by_batch_and_by_sample(model, batches, fisher_type="exact"))


def test_an_axis_as_long_as_the_batch_that_holds_its_samples_is_found_out():
    """A first batch looks up ``[T, D]``, a later one ``[N, D]``: by its shape alone the one is the other."""

    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(9, D), nn.Linear(D, C)

        def forward(self, x, pick):
            rows = self.table(pick)
            return self.head((x + rows).tanh() if len(pick) == len(x) else (x.unsqueeze(1) + rows).tanh().mean(1))

    first = ((torch.randn(4, D).double(), torch.arange(3)), torch.randint(0, C, (4,)))
    later = ((torch.randn(5, D).double(), torch.randint(0, 9, (5,))), torch.randint(0, C, (5,)))
    with pytest.raises(
        ValueError, match=r"must not have one in another, got a batch of as many positions as samples|must belong to one sample"
    ):
        ff.fisher(Picks().double(), [first, later], fisher_type="empirical", progress=False)


class Encoder(nn.Module):
    """Autograd or not, torch's encoder runs other kernels; a mask and a table of positions are inputs without samples."""

    def __init__(self, dtype):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, 16), nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 3), nn.Linear(16, C)
        self.to(dtype)

    def forward(self, ids, places):
        h = self.tokens(ids) + self.positions(places)
        return self.head(self.encoder(h, src_key_padding_mask=ids == 0)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_many_positions_as_samples_are_no_doubt_for_long(dtype):
    batches = [((padded(N, T), torch.arange(T)), torch.randint(0, C, (N, T))) for N, T in ((4, 6), (6, 6), (5, 5))]
    F = ff.fisher(Encoder(dtype).eval(), batches, fisher_type="empirical", progress=False)
    assert F.num_positions == 24 + 36 + 25


class Skips(nn.Module):
    """A weight is used sample by sample, and position by position; short inputs are not worth the first."""

    def __init__(self):
        super().__init__()
        self.w, self.head = nn.Linear(3, D), nn.Linear(D, C)

    def forward(self, x):
        N, T = x.shape[:2]
        h = self.w(x.reshape(-1, 3)).tanh().view(N, T, D) if T > 3 else 0
        return self.head(h + self.w(x.transpose(0, 1).reshape(-1, 3)).sin().view(T, N, D).transpose(0, 1))


@pytest.mark.parametrize("lengths", [(5, 5, 3), (5, 3, 5, 3), (3, 5, 5, 5, 3)], ids=str)
def test_a_use_that_a_later_batch_leaves_out_lends_its_layout_to_no_other(lengths):
    batches = [(torch.randn(5, T, 3).double(), torch.randint(0, C, (5, T))) for T in lengths]
    same(*by_batch_and_by_sample(Skips().double(), batches, fisher_type="empirical"))


class Joined(nn.Module):
    """Sequences of their own lengths, cut and put one after the other by ``join``."""

    def __init__(self, join):
        super().__init__()
        self.join, self.inner, self.head = join, nn.Linear(3, D), nn.Linear(D, C)

    def forward(self, x, lengths):
        parts = [one[:length] for one, length in zip(x, lengths.tolist(), strict=True)]
        rows = self.inner(self.join(parts)).tanh().view(-1, D)
        return self.head(torch.stack([own.sum(0) for own in rows.split(lengths.tolist())]))


JOINS = {
    "cat": torch.cat,
    "vstack": torch.vstack,
    "along the second axis": lambda parts: torch.cat([part[None] for part in parts], 1),
    "along the last": lambda parts: torch.cat([part.T for part in parts], dim=-1).T,
}


UNEVEN = {2: [1, 3], 3: [1, 2, 3], 5: [1, 3, 2, 1, 3]}  # of as many rows in all as two for each sample


@pytest.mark.parametrize("N", UNEVEN)
@pytest.mark.parametrize("name", JOINS)
def test_lengths_that_differ_only_where_no_look_is_due(name, N):
    lengths = [[2] * N] * 4 + [UNEVEN[N], UNEVEN[N][::-1]]
    batches = [((torch.randn(N, 4, 3).double(), torch.tensor(one)), torch.randint(0, C, (N,))) for one in lengths]
    alone = [((x[n : n + 1], own[n : n + 1]), y[n : n + 1]) for (x, own), y in batches for n in range(N)]
    model = Joined(JOINS[name]).double()
    same(*(ff.fisher(model, data, fisher_type="empirical", progress=False) for data in (batches, alone)))


WRITERS = {
    "an activation": lambda m, x: m.layer(F.elu(x, inplace=True)),
    "a norm": lambda m, x: m.layer(x.sub_(0.5).div_(0.25)),
    "a parameter": lambda m, x: m.layer(x.mul_(m.scale)),
    "in the fallback": lambda m, x: m.layer(F.elu(x, inplace=True)).clamp(min=m.low),
}


@pytest.mark.parametrize("structure", ["diagonal", "ekfac"])
@pytest.mark.parametrize("name", WRITERS)
def test_inputs_that_the_model_writes_to_are_read_as_they_were(name, structure):
    if name == "in the fallback" and structure == "ekfac":
        structure = "kfac"
    parts = {"layer": nn.Linear(3, C), "scale": nn.Parameter(torch.tensor([0.5, 1.0, 2.0])), "low": nn.Parameter(torch.zeros(C))}
    used = ("layer", "scale") if name == "a parameter" else ("layer", "low") if name == "in the fallback" else ("layer",)
    model = Wrapped(WRITERS[name], **{part: parts[part] for part in used}).double()
    plain = Wrapped(
        lambda m, x: WRITERS[name](m, x.clone()), **dict(model.named_children()), **dict(model.named_parameters(recurse=False))
    )
    x, y = torch.randn(7, 3).double(), torch.randint(0, C, (7,))
    data = [(x[:4].clone(), y[:4]), (x[4:].clone(), y[4:])]
    one, other = (ff.fisher(m, data, structure, "empirical", progress=False) for m in (model, plain))
    assert one.trace() == pytest.approx(other.trace(), rel=1e-12)
    assert torch.equal(torch.cat([data[0][0], data[1][0]]), x)  # and stay the caller's


SPELLINGS = {
    "expand": (lambda m, h: h * m.p.expand(size=(len(h), C)), lambda m, h: h * m.p),
    "repeat": (lambda m, h: h * m.p.repeat(repeats=(len(h), 1)), lambda m, h: h * m.p),
    "mul": (lambda m, h: torch.mul(h, m.p, out=None), lambda m, h: h * m.p),
    "add": (lambda m, h: torch.add(h, m.p, out=None), lambda m, h: h + m.p),
    "add of a tensor by name": (lambda m, h: torch.add(m.p, other=h, alpha=2), lambda m, h: m.p + 2 * h),
    "linear of a vector": (lambda m, h: h + F.linear(h, m.p).unsqueeze(1), lambda m, h: h + (h @ m.p).unsqueeze(1)),
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("size", [1, 6])
def test_calls_that_no_rule_is_written_for_are_right_too(name, size):
    p, layer = nn.Parameter(torch.randn(C)), nn.Linear(3, C)
    data = [(torch.randn(n, 3).double(), torch.randint(0, C, (n,))) for n in (size, 6)]
    one, other = (
        ff.fisher(
            Wrapped(lambda m, x, f=f: f(m, m.layer(x)), p=p, layer=layer).double(), data, "diagonal", "empirical", progress=False
        )
        for f in SPELLINGS[name]
    )
    same(one, other)


def test_memory_does_not_grow_with_the_batches():
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, C))
    asked = (ff.Diagonal(), ff.PerSampleNorm(by_layer=True))

    def grown(batches):
        before = _resident()
        data = ((torch.randn(16, 20, 64), torch.randint(0, C, (16, 20))) for _ in range(batches))
        ff.fisher(model, data, asked, "empirical", progress=False)
        gc.collect()
        return _resident() - before

    grown(100)
    assert grown(600) < 60 * 2**20  # 96 MiB were left where each batch kept a tensor of its own


def test_a_measured_model_is_let_go_without_garbage_collection():
    model, data = nn.Linear(5, 3), [(torch.randn(4, 5), torch.randint(3, (4,)))]
    there = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        ff.fisher(model, data, ("diagonal", "kfac"), progress=False)
        del model
        assert there() is None
    finally:
        gc.enable()


def _resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_gradients_too_small_to_scale_are_nobodys():
    """Where a float32 model is all but certain some rows' gradients are subnormal: tags are powers of two, and rounded."""
    found = []
    for seed in range(20):
        torch.manual_seed(seed)
        model = Wrapped(lambda m, x: 600 * m.last(m.first(x).tanh()), first=nn.Linear(4, 6), last=nn.Linear(6, 5))
        x = torch.randn(8, 7, 4)
        y = model(x).argmax(-1)
        with ff.collect(model, "diagonal") as stats:
            stats.backward(F.cross_entropy(model(x).transpose(1, 2), y, reduction="none").sum(1))
        alone = ff.fisher(model, [(x[n : n + 1], y[n : n + 1]) for n in range(8)], fisher_type="empirical", progress=False)
        found.append((stats.result().trace(), alone.trace()))
    # 600 times the rounding of a matrix product, which differs with the batch, is in the exponent.
    assert found == [(one, pytest.approx(one, rel=1e-2, abs=1e-6)) for one, _ in found]


def test_a_model_that_begins_late_to_write_into_its_inputs():
    def forward(m, x):
        h = m.layer(x.mul_(0.5) if len(x) > 3 else x * 0.5)
        return h.clamp(min=m.low)  # of which no rule knows: the fallback runs the model again

    model = Wrapped(forward, layer=nn.Linear(3, C), low=nn.Parameter(torch.zeros(C)))
    data = [(torch.randn(n, 3), torch.randint(0, C, (n,))) for n in (3, 5)]
    with pytest.raises(ValueError, match="must not write into its inputs, got a later batch in which it does"):
        ff.fisher(model, data, fisher_type="empirical", progress=False)


class Several(nn.Module):
    """Of a list of inputs, and distances from a table, which no rule is written for."""

    def __init__(self):
        super().__init__()
        self.first, self.table = nn.Linear(3, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, pair, q):
        return torch.cdist(self.first(pair[0]) * self.first(pair[1]).tanh() + q, self.table)


@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
def test_inputs_in_lists(structure):
    model, N = Several().double(), 7
    pair, q, y = [torch.randn(N, 3).double() for _ in range(2)], torch.randn(N, 4).double(), torch.randint(0, 3, (N,))
    whole = ff.fisher(model, [((pair, q), y)], structure, "empirical", progress=False)
    single = [(([one[n : n + 1] for one in pair], q[n : n + 1]), y[n : n + 1]) for n in range(N)]
    alone = ff.fisher(model, single, structure, "empirical", progress=False)
    assert whole.coverage["table"].startswith("loop: ")
    for name, f in whole.diagonal(dtype=torch.float64).items():
        torch.testing.assert_close(f, alone.diagonal(dtype=torch.float64)[name], rtol=1e-6, atol=1e-12)


class Named(OrderedDict):
    """As Hugging Face's outputs: with its keys as attributes."""

    def __getattr__(self, name):
        return self[name]


def test_inputs_that_are_no_plain_dictionaries_stay_what_they_are():
    model = Wrapped(lambda m, constant, x, named: m.layer(x + named.h + constant[0].sum()), layer=nn.Linear(3, 2)).double()
    x, y = torch.randn(4, 3).double(), torch.randint(0, 2, (4,))
    inputs = [torch.ones(5).double()], x, Named(h=torch.ones(3).double())
    found = ff.fisher(model, [(inputs, y)], "diagonal", "empirical", progress=False)
    plain = Wrapped(lambda m, x: m.layer(x + 6), layer=model.layer)
    expected = ff.fisher(plain, [(x, y)], "diagonal", "empirical", progress=False)
    assert found.num_samples == 4 and found.trace() == pytest.approx(expected.trace(), rel=1e-9)


def test_sparse_inputs_have_a_checkpoint(tmp_path):
    model = Wrapped(lambda m, x, a: m.layer(x) + torch.sparse.sum(a), layer=nn.Linear(3, 2)).double()
    data = [((torch.randn(4, 3).double(), torch.eye(6).double().to_sparse()), torch.randint(0, 2, (4,))) for _ in range(2)]
    once = ff.fisher(model, data, "diagonal", "empirical", progress=False)
    again = ff.fisher(model, data, "diagonal", "empirical", progress=False, checkpoint=tmp_path / "checkpoint")
    assert again.trace() == pytest.approx(once.trace(), rel=1e-6)


MERGED = {  # how weights without a sample axis are made of parameters
    "product": lambda m: m.a @ m.b,
    "chosen rows": lambda m: m.a.index_select(0, torch.tensor([0, 2])),
}


@pytest.mark.parametrize("made", MERGED)
@pytest.mark.parametrize("structure", networks.STRUCTURES)
def test_a_first_batch_of_one_sample_decides_as_larger_ones(structure, made):
    parameters = {"a": networks.parameter(4, 2), "b": networks.parameter(2, 2)}
    model = networks.Wrapped(lambda m, x: F.linear(x, MERGED[made](m)), **parameters).double()
    x, y = torch.randn(6, 2).double(), torch.randint(2, (6,))
    whole, *others = (
        networks.measure(model, list(zip(x.split(cut), y.split(cut), strict=True)), structure, allow_missing=True)
        for cut in ([6], [1] * 6, [1, 5])
    )
    for other in others:
        assert other.coverage == whole.coverage or structure in ("diagonal", "gram")  # whose number is the same either way
        assert [other.trace(), other.logdet(0.1)] == pytest.approx([whole.trace(), whole.logdet(0.1)])


def test_a_model_that_takes_one_sample_at_a_time():
    model = networks.Wrapped(lambda m, x: m.head(x.view(3)).tanh().unsqueeze(0), head=nn.Linear(3, 2)).double()
    x, y = torch.randn(4, 1, 3).double(), torch.randint(2, (4, 1))
    found = networks.measure(model, list(zip(x, y, strict=True)), "diagonal").diagonal(dtype=torch.float64)
    assert oracle.error(found, oracle.diagonal(model, list(zip(x, y, strict=True)), oracle.cross_entropy)) < 1e-9


def test_a_model_that_keeps_something_keeps_nothing_of_the_second_look():
    class Recurrent(nn.Module):
        """Time first; its state goes on from call to call."""

        def __init__(self):
            super().__init__()
            self.cell, self.state, self.a, self.b = nn.RNNCell(3, 4), None, networks.parameter(2, 2), networks.parameter(2, 4)

        def forward(self, x):
            for row in x.transpose(0, 1):
                self.state = self.cell(row, self.state)
            self.state = self.state.detach()
            return F.linear(self.state, self.a @ self.b)

    model, data = Recurrent(), [(torch.randn(1, 2, 3), torch.tensor([n % 2])) for n in range(3)]
    found = networks.measure(model, data, "kfac", allow_missing=True)
    assert model.state.shape == (1, 4) and found.num_samples == 3


class Relative(nn.Module):
    """Attention with a bias for every distance, which says nothing where there is one key."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(6, 1), nn.Linear(3, 3)

    def forward(self, x):
        at = torch.arange(x.shape[1])
        return self.head((x @ x.mT + self.table(at[:, None] - at + 3).squeeze(-1)).softmax(-1) @ x)


@pytest.mark.parametrize("first", ["short", "long", "one sample"])
@pytest.mark.parametrize("structure", networks.STRUCTURES)
def test_a_table_may_show_no_gradient_at_first(structure, first):
    def batch(n, t):
        return torch.randn(n, t, 3).double(), torch.randint(3, (n, t))

    model, short, long = Relative().double(), batch(4, 1), batch(4, 3)
    data = {"short": [short, long], "long": [long, short], "one sample": [batch(1, 1), long]}[first]
    found = networks.measure(model, data, structure)
    assert found.num_samples == sum(len(x) for x, _ in data)
    if structure != "kfac":
        expected = oracle.diagonal(model, data, oracle.cross_entropy)
        assert found.trace() == pytest.approx(float(sum(v.sum() for v in expected.values())))


class Attending(nn.Module):
    """A layer of the samples and of a table ``[T, D]`` that gets a first axis of one, as one sample has."""

    def __init__(self):
        super().__init__()
        self.table, self.layer, self.head = nn.Parameter(torch.randn(5, D)), nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x):
        keys, queries = self.layer(self.table[None].repeat(1, 1, 1)), self.layer(x[:, None])
        return self.head(((queries @ keys.mT).softmax(-1) @ self.table + queries).tanh()[:, 0])


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
def test_a_first_sample_by_itself_does_not_hide_a_table(structure):
    model, x, y = Attending().double(), torch.randn(7, D).double(), torch.randint(0, C, (7,))
    alone, together = (
        ff.fisher(model, list(zip(x.split(sizes), y.split(sizes), strict=True)), structure, "empirical", progress=False)
        for sizes in ([1, 6], [3, 4])
    )
    assert alone.trace() == pytest.approx(together.trace(), rel=1e-9)
    for name, expected in together.diagonal(dtype=torch.float64).items():
        torch.testing.assert_close(alone.diagonal(dtype=torch.float64)[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_a_bias_that_a_later_batch_leaves_out_does_not_count_there(structure):
    """Its column of ones is in the weight's factor, which the rows of such a batch do not have."""
    model = Wrapped(
        lambda m, x, flag: F.linear(x, m.layer.weight, m.layer.bias if flag[0] else None), layer=nn.Linear(3, C)
    ).double()
    x, y = torch.randn(8, 3).double(), torch.randint(C, (8,))
    data = [((x[:4], torch.ones(4)), y[:4]), ((x[4:], torch.zeros(4)), y[4:])]
    with pytest.raises(
        ValueError, match=r"layer\.weight: must be used with its bias as in the first batch, got a use without it"
    ):
        ff.fisher(model, data, structure, fisher_type="empirical", progress=False)
    options = {"fisher_type": "empirical", "allow_missing": True, "progress": False}
    both, *each = (ff.fisher(model, part, **options) for part in (data, data[:1], data[1:]))
    assert both.trace() == pytest.approx(sum(F.trace() for F in each) / 2)
    for part, diagonal in zip((data[:1], data[1:]), each, strict=True):
        found = ff.fisher(model, part, (ff.KFAC if structure == "kfac" else ff.EKFAC)(max_exact_dim=0), **options)
        assert structure == "kfac" or found.trace() == pytest.approx(diagonal.trace())


class EachByItself(nn.Module):
    """A layer that is called for every sample, on rows that are its positions."""

    def __init__(self):
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)

    def forward(self, ids):
        return self.head(torch.stack([self.layer(one).tanh() for one in self.table(ids)]))


@pytest.mark.parametrize("N", [2, 3])
def test_as_many_positions_as_samples_are_no_axis_of_a_layer_called_for_each(N):
    """Of sample n only position n has a label, until the third batch, at which nobody looks."""
    batches = [(torch.randint(11, (N, N)), torch.randint(11, (N, N))) for _ in range(3)]
    for _, labels in batches[:2]:
        labels[~torch.eye(N, dtype=torch.bool)] = -100
    same(*by_batch_and_by_sample(EachByItself().double(), batches, fisher_type="empirical"))
