# SPDX-License-Identifier: Apache-2.0
"""Rows whose place the data decide although no index tensor says so: the layout of the first batch is not that of the next."""

import copy

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfast as ff

I, D, C, T, N = 3, 4, 3, 5, 4


class InnerAndHead(nn.Module):
    """Two layers."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(I, D), nn.Linear(D, C)


class Unpadded(InnerAndHead):
    """Sequences cut to their lengths and put one after the other."""

    def forward(self, x, lengths):
        rows = torch.cat([x[n, :length] for n, length in enumerate(lengths.tolist())])
        return self.head(torch.stack([own.mean(0) for own in self.inner(rows).tanh().split(lengths.tolist())]))


class Sorted(InnerAndHead):
    """Samples in the order of their lengths, by a list of numbers, and back."""

    def forward(self, x, lengths):
        order = sorted(range(len(x)), key=lambda n: -int(lengths[n]))
        h = self.inner(x[order]).tanh().mean(1)
        return self.head(h[[order.index(n) for n in range(len(x))]])


class Regulated(nn.Module):
    """Each sample repeated as often as it is long."""

    def __init__(self):
        super().__init__()
        self.outer, self.inner, self.head = nn.Linear(I, D), nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x, lengths):
        rows = torch.repeat_interleave(self.outer(x[:, 0]).tanh(), lengths, dim=0)
        rows = self.inner(rows + torch.arange(len(rows))[:, None] * 0.01).tanh()
        return self.head(torch.stack([own.mean(0) for own in rows.split(lengths.tolist())]))


class Slots(nn.Module):
    """Experts with a slot for every sample, filled by ``fill`` in the order in which the samples come."""

    def __init__(self, fill):
        super().__init__()
        self.fill, self.gate, self.w, self.head = fill, nn.Linear(I, 2), nn.Parameter(torch.randn(2, I, D)), nn.Linear(D, C)

    def forward(self, x, _):
        x = x[:, 0]
        p, chosen = self.gate(x).softmax(-1).max(-1)
        hot = F.one_hot(chosen, 2)
        place = ((hot.cumsum(0) - 1) * hot).sum(1)
        dispatch = (hot[:, :, None] * F.one_hot(place, len(x))[:, None, :]).to(x.dtype)  # [N, experts, slots]
        h = torch.bmm(self.fill(x, chosen, place, dispatch), self.w).tanh()
        return self.head(torch.einsum("nec,eco->no", dispatch, h) * p[:, None])


def by_product(x, chosen, place, dispatch):
    return torch.einsum("nec,ni->eci", dispatch, x)


def by_assignment(x, chosen, place, dispatch):
    slots = x.new_zeros(2, len(x), I)
    slots[chosen, place] = x
    return slots


NETWORKS = {
    "unpadded": Unpadded,
    "sorted": Sorted,
    "regulated": Regulated,
    "slots by product": lambda: Slots(by_product),
    "slots by assignment": lambda: Slots(by_assignment),
}


def sample_gradients(model, batches):
    """``{parameter: [samples, *parameter]}``, by autograd."""
    named, found = dict(model.named_parameters()), []
    for (x, lengths), y in batches:
        losses = F.cross_entropy(model(x, lengths), y, reduction="none")
        found += [torch.autograd.grad(loss, list(named.values()), retain_graph=True) for loss in losses]
    return {name: torch.stack(each) for name, each in zip(named, zip(*found, strict=True), strict=True)}


def batch(lengths):
    n = len(lengths)
    return (torch.randn(n, T, I, dtype=torch.float64), torch.tensor(lengths)), torch.randint(C, (n,)), torch.rand(n)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_batch_has_its_own_rows(name):
    model = NETWORKS[name]().double()
    batches = [batch([T] * N), batch([3, 4, 5, 4]), batch([1, 5, 2, 4, 3, 3]), batch([2, 2])]
    asked = (ff.Diagonal(), ff.PerSampleNorm())
    F_, norms = ff.fisher(model, batches, structure=asked, fisher_type="empirical", progress=False)
    gradients, weight = sample_gradients(model, [pair for *pair, _ in batches]), torch.cat([w for *_, w in batches]).double()
    for parameter, value in F_.diagonal(dtype=torch.float64).items():
        expected = torch.einsum("n,n...->...", weight, gradients[parameter].square()) / weight.sum()
        assert torch.allclose(value, expected, rtol=1e-6, atol=1e-12), parameter
    every = sum(g.square().flatten(1).sum(1) for g in gradients.values())
    assert torch.allclose(norms.squared_norms, every, rtol=1e-6)


@pytest.mark.parametrize("name", ["unpadded", "sorted", "regulated"])
def test_batches_of_which_one_tagged_pass_does_not_tell_all(name):
    """Half of the samples are left out first: what has a gradient all the same lies elsewhere."""
    model = NETWORKS[name]().double()
    batches = [batch([T] * 40), batch(torch.randint(1, T + 1, (40,)).tolist()), batch(torch.randint(1, T + 1, (40,)).tolist())]
    batches = [pair for *pair, _ in batches]
    found = ff.fisher(model, batches, fisher_type="empirical", progress=False).diagonal(dtype=torch.float64)
    for parameter, gradients in sample_gradients(model, batches).items():
        assert torch.allclose(found[parameter], gradients.square().mean(0), rtol=1e-6, atol=1e-12), parameter


class Nodes(InnerAndHead):
    """Graphs one after the other, their nodes summed."""

    def forward(self, x, owner, n):
        return self.head(x.new_zeros(n, D).index_add(0, owner, self.inner(x).tanh()))


def graphs(sizes):
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return torch.randn(sum(sizes), I), owner, torch.randint(C, (len(sizes),))


def measured(model, batches):
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        for x, owner, y in batches:
            stats.backward(F.cross_entropy(model(x, owner, len(y)), y, reduction="none"))
    return stats.result().diagonal()["inner.weight"]


@pytest.mark.parametrize("regular", [1, 3], ids=["second", "fourth"])
@pytest.mark.parametrize("other", [[2, 5, 5], [2, 5, 6]], ids=["as many nodes", "more nodes"])
def test_graphs_of_one_size_in_the_first_batches(other, regular):
    model, batches = Nodes(), [*[graphs([4, 4, 4])] * regular, graphs(other), graphs([1, 1, 7])]
    squares = []
    for x, owner, y in batches:
        for loss in F.cross_entropy(model(x, owner, len(y)), y, reduction="none"):
            squares.append(torch.autograd.grad(loss, model.inner.weight, retain_graph=True)[0].square())
    assert torch.allclose(measured(model, batches), torch.stack(squares).mean(0), rtol=1e-4)


class NodesByProduct(InnerAndHead):
    """Graphs whose nodes a product sums: nothing shows that the data choose rows."""

    def forward(self, x, owner, n):
        return self.head(F.one_hot(owner, n).to(x.dtype).mT @ self.inner(x).tanh())


def test_a_change_that_comes_late_is_an_error_and_not_a_number():
    regular = [graphs([4, 4, 4]) for _ in range(3)]
    with pytest.raises(ValueError, match=r"inner\.weight: rows must lie as in the batches before .* got others in batch 3"):
        measured(NodesByProduct(), [*regular, graphs([2, 5, 5])])
    assert (measured(NodesByProduct(), [*regular, graphs([2, 2, 2])]) > 0).any()


class Flattened(nn.Module):
    """Samples and positions on one axis."""

    def __init__(self):
        super().__init__()
        self.outer, self.norm, self.inner, self.head = nn.Linear(I, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, C)

    def forward(self, x):
        h = self.norm(self.outer(x.flatten(0, 1)).tanh())
        return self.head((h + self.inner(h).relu()).unflatten(0, x.shape[:2]).mean(1))


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**12])
@pytest.mark.parametrize("n", [7, 40], ids=["one tagged pass", "several"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_looking_again_finds_what_was_found_in_every_precision(dtype, n, loss_scale):
    model = Flattened().to(dtype)
    batches = [(torch.randn(n, T, I).to(dtype), torch.randint(C, (n,))) for _ in range(5)]
    options = {"fisher_type": "empirical", "progress": False, "loss_scale": loss_scale}
    whole = ff.fisher(model, batches, **options)
    parts = [ff.fisher(model, [one], **options) for one in batches]
    assert whole.trace() == pytest.approx(sum(part.trace() for part in parts) / len(parts), rel=1e-6)


def test_rows_are_told_apart_under_a_loss_scale():
    """The gradients that are tagged are scaled, too."""
    model = Slots(by_assignment)
    batches = [batch([T] * N)[:2], batch([T] * 7)[:2]]
    batches = [((x.float(), lengths), y) for (x, lengths), y in batches]
    one, scaled = (ff.fisher(model, batches, fisher_type="empirical", progress=False, loss_scale=s) for s in (1.0, 2.0**10))
    assert scaled.trace() == pytest.approx(one.trace(), rel=1e-6)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_an_expert_that_the_first_samples_do_not_ask_has_a_block_too(structure):
    experts = nn.ModuleList([nn.Linear(3, 5), nn.Linear(3, 5)])

    def forward(m, x):
        which = x[:, 0] > 0
        out = x.new_zeros(len(x), 5)
        for k, expert in enumerate(m.experts):
            if bool((which == k).any()):
                out = out.index_put((torch.nonzero(which == k).flatten(),), expert(x[which == k]))
        return m.head(out.tanh())

    model = networks.Wrapped(forward, experts=experts, head=nn.Linear(5, 4)).double()
    x, y = torch.randn(32, 3).double(), torch.randint(4, (32,))
    x = x[x[:, 0].argsort()]
    result = ff.fisher(model, [(x, y)], structure, fisher_type="empirical", progress=False)
    assert {block.place.name for block in result.blocks} == {"experts.0.weight", "experts.1.weight", "head.weight"}


class Routed(nn.Module):
    """Each position goes to one of two experts; without a residual, so that a pass through one position is nothing to the others."""

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.ModuleList([nn.Linear(I, D), nn.Linear(I, D)]), nn.Linear(D, 2)

    def forward(self, input_ids, attention_mask):
        x = input_ids.flatten(0, 1)
        which, out = x[:, 0] > 0, x.new_zeros(len(x), D)
        for k, expert in enumerate(self.experts):
            mine = ((which == k) & (attention_mask.flatten() > 0)).nonzero().flatten()
            out = out.index_put((mine,), expert(x[mine]).tanh())
        return self.head(out).unflatten(0, input_ids.shape[:2])


@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("lengths", [(T,) * 6, (5, 2, 4, 1, 3, 5)], ids=["whole", "padded"])
def test_inputs_are_those_of_all_passes(lengths, weighted, size):
    """A pass of the exact Fisher goes through one position of each sample; factor A is of all that any pass goes through."""
    model, lengths = Routed().double(), torch.tensor(lengths)
    x = torch.randn(6, T, I).double()
    mask = (torch.arange(T) < lengths[:, None]).long()
    weight = torch.rand(6) + 0.5 if weighted else torch.ones(6)
    whole = {"input_ids": x, "attention_mask": mask} | ({"sample_weight": weight} if weighted else {})
    batches = [{k: v[first : first + size] for k, v in whole.items()} for first in range(0, 6, size)]
    K, E, G, R = ff.fisher(model, batches, ("kfac", "ekfac", "gram", ff.KFAC(sharing="reduce")), "exact", progress=False)
    assert E.trace() == pytest.approx(G.trace(), rel=1e-9)
    rows, w = x[mask > 0], weight.double().repeat_interleave(lengths)
    for k in range(2):
        mine = (rows[:, 0] > 0) == k
        ones = torch.cat([rows[mine], torch.ones(int(mine.sum()), 1).double()], 1)
        (block,) = (b for b in K.blocks if b.place.name == f"experts.{k}.weight")
        assert torch.allclose(block.A.sum[0], (ones * w[mine, None]).T @ ones, rtol=1e-6, atol=1e-9)
        (block,) = (b for b in R.blocks if b.place.name == f"experts.{k}.weight")
        sample = torch.arange(6).repeat_interleave(lengths)[mine]
        means = torch.stack([ones[sample == n].mean(0) for n in sample.unique()])
        assert torch.allclose(block.A.sum[0], (means * weight[sample.unique(), None].double()).T @ means, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss_scale", [2.0**15, 2.0**16])
@pytest.mark.parametrize("fisher_type, draws", [("mc", 2), ("exact", 1)])
def test_what_finds_the_rows_of_all_passes_fits_float16_where_the_passes_do(loss_scale, fisher_type, draws):
    model, batches = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), [torch.randn(6, 5) for _ in range(3)]
    half, options = copy.deepcopy(model).half(), {"fisher_type": fisher_type, "draws": draws, "progress": False}
    weight = torch.ones(6)
    narrow = ff.fisher(half, [(x.half(), None, weight) for x in batches], loss_scale=loss_scale, **options)
    exact = ff.fisher(model.double(), [(x.double(), None, weight) for x in batches], **options)
    assert narrow.trace() == pytest.approx(exact.trace(), rel=0.05 if fisher_type == "exact" else 0.5)


@pytest.mark.parametrize("N, T", [(4, 5), (4, 9), (3, 7), (8, 17)])
def test_rows_of_which_few_have_a_gradient_are_all_inputs(N, T):
    """One position a sample has one, so samples as blocks and samples inside positions explain them alike; a mask says which exist."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x, attention_mask=None):
            return self.head(self.inner(x.reshape(-1, 4)).tanh().view(*x.shape[:2], 5)[:, 0])

    model, x, mask = First().double(), torch.randn(N, T, 4).double(), torch.ones(N, T)
    mask[1, -1] = 0
    batch = {"x": x, "labels": torch.randint(3, (N,)), "attention_mask": mask}
    A, _ = ff.fisher(model, [batch], "kfac", "empirical", progress=False).factors(dtype=torch.float64)["inner"]
    rows = torch.cat([x, torch.ones(N, T, 1).double()], -1)[mask.bool()]
    torch.testing.assert_close(A, rows.mT @ rows / len(rows), rtol=1e-5, atol=1e-6)


class Changed(nn.Module):
    """Tokens, of which ``change(h, table, positions)`` makes what the layers read."""

    def __init__(self, change):
        super().__init__()
        self.change, self.tokens, self.inner, self.head = change, nn.Embedding(20, 4), nn.Linear(4, 5), nn.Linear(5, 20)
        self.register_buffer("table", torch.randn(32, 4))

    def forward(self, input_ids, attention_mask=None):
        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return self.head(self.inner(self.change(self.tokens(input_ids), self.table, positions)).tanh())


def turned(h, table, positions):
    """By rows of a table, as a rotary embedding is."""
    return h * table[positions]


def test_positions_that_looked_something_up_are_all_inputs_in_batches_of_one():
    """A table of positions is no choice of rows: a padded sample by itself counts the rows that it counts among others."""
    model, ids = Changed(turned).double(), torch.randint(0, 20, (2, 6))
    mask = (torch.arange(6) < 4).expand(2, 6).long()
    together = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    alone = [{name: tensor[n : n + 1] for name, tensor in together.items()} for n in range(2)]
    factors = [
        ff.fisher(model, data, "kfac", "empirical", ff.CausalLM(), progress=False).factors(dtype=torch.float64)
        for data in ([together], alone)
    ]
    for layer in ("inner", "head"):
        for one, other in zip(factors[0][layer], factors[1][layer], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def shifted(h, table, positions):
    """By rows of a table, in place."""
    h = h * 1.0
    h += table.index_select(0, positions.flatten()).view(h.shape)
    return h


def prompted(h, table, positions):
    """Behind as many rows as there are samples in a batch of two."""
    return torch.cat([table[:3].expand(len(h), 3, -1), h], 1)[:, 3:]


def listed(h, table, positions):
    """Without the last feature, by a list of numbers behind an ellipsis."""
    return h * h[..., [-1]]


@pytest.mark.parametrize("change", [turned, shifted, prompted, listed], ids=lambda change: change.__name__)
def test_a_table_of_positions_a_prompt_and_a_list_of_features_choose_no_rows(change):
    """So A is of every position, whatever the batch size, weights of one, and which labels count."""
    model, ids = Changed(change).double(), torch.randint(0, 20, (6, 5))
    labels = ids.clone()
    labels[:, 3:] = -100
    options = {"structure": "kfac", "fisher_type": "empirical", "likelihood": ff.CausalLM(), "progress": False}
    whole = {"input_ids": ids, "labels": labels}
    cases = {"weighted": [{**whole, "sample_weight": torch.ones(6)}]}
    cases |= {size: [{name: t[n : n + size] for name, t in whole.items()} for n in range(0, 6, size)] for size in (1, 2, 3)}
    expected = ff.fisher(model, [whole], **options).factors(dtype=torch.float64)
    assert float(expected["inner"][0][-1, -1]) == pytest.approx(1.0)  # the 1 of the bias: no row is missing
    for case, batches in cases.items():
        found = ff.fisher(model, batches, **options).factors(dtype=torch.float64)
        for layer, (A, _) in expected.items():
            torch.testing.assert_close(found[layer][0], A, rtol=1e-9, atol=1e-12, msg=lambda text, c=case: f"{c}: {text}")


class PackedWithTable(nn.Module):
    """Rows chosen by a mask, to which others are added that a table has for them: where they lie is still the data's choice."""

    def __init__(self):
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(T, I), nn.Linear(I, D), nn.Linear(D, C)

    def forward(self, x, lengths):
        mask = torch.arange(T) < lengths[:, None]
        place, owner = (t.expand(len(x), T)[mask] for t in (torch.arange(T), torch.arange(len(x))[:, None]))
        rows = self.head(self.inner(x[mask] + self.table(place)).tanh())
        return rows.new_zeros(len(x), C).index_add(0, owner, rows)


class HeadsFirst(InnerAndHead):
    """Sequences of their own lengths put one after the other, behind an axis as long as the batch."""

    def forward(self, x, lengths):
        rows = torch.cat([x[n, :length].expand(N, length, I) for n, length in enumerate(lengths.tolist())], 1)
        return self.head(torch.stack([own.mean((0, 1)) for own in self.inner(rows).tanh().split(lengths.tolist(), 1)]))


class ListBehindEllipsis(InnerAndHead):
    """The rows of all samples in the order of a list, behind an ellipsis that stands for nothing."""

    def forward(self, x, lengths):
        order = sorted(range(len(x) * T), key=lambda row: (row // T * 7 + int(lengths[row // T])) % 5 * 100 + row)
        rows = self.inner(x.flatten(0, 1)[..., order, :]).tanh()
        back = [order.index(row) for row in range(len(order))]
        return self.head(rows[..., back, :].unflatten(0, (len(x), T)).mean(1))


@pytest.mark.parametrize("model", [PackedWithTable, HeadsFirst, ListBehindEllipsis])
def test_rows_that_data_may_have_chosen_are_looked_at_in_every_batch(model):
    """The third batch is the first of another layout, and no look is due in it."""
    model, lengths = model().double(), [[T] * N, [T] * N, [1, 3, 4, 4], [T] * N]
    batches = [((torch.randn(N, T, I).double(), torch.tensor(one)), torch.randint(C, (N,))) for one in lengths]
    found = ff.fisher(model, batches, fisher_type="empirical", progress=False).diagonal(dtype=torch.float64)
    for parameter, gradients in sample_gradients(model, batches).items():
        torch.testing.assert_close(found[parameter], gradients.square().mean(0), rtol=1e-6, atol=1e-12)


def test_chosen_rows_behind_an_axis_of_one_are_no_positions():
    """An expert that gets its rows as a batch of one: those of padding are left out, in a batch of one sample too."""

    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x, attention_mask=None):
            rows = x.flatten(0, 1)
            chosen = (rows[:, 0] > 0).nonzero()[:, 0]
            found = self.inner(rows[chosen].unsqueeze(0))[0]
            return torch.zeros(len(rows), 3, dtype=x.dtype).index_add(0, chosen, found).unflatten(0, x.shape[:2])

    model, x, mask = Expert().double(), torch.randn(1, 6, 4).double(), torch.tensor([[1, 1, 1, 1, 0, 0]])
    x[0, :, 0] = torch.tensor([-1.0, 1, 1, 1, 1, 1])
    batch = {"x": x, "attention_mask": mask, "labels": torch.randint(3, (1, 6)).masked_fill(mask == 0, -100)}
    A, _ = ff.fisher(model, [batch], ff.KFAC(max_exact_dim=0), "empirical", "categorical", progress=False).factors(
        dtype=torch.float64
    )["inner"]
    rows = torch.cat([x[0, 1:4], torch.ones(3, 1).double()], -1)
    torch.testing.assert_close(A, rows.mT @ rows / 3, rtol=1e-5, atol=1e-6)


class Cells(nn.Module):
    """Samples in the order of their lengths, and a first state of ones, made before they meet it: it lies as they do."""

    def __init__(self):
        super().__init__()
        self.first, self.cell, self.head = nn.Linear(D, D), nn.LSTMCell(I, D), nn.Linear(D, C)

    def forward(self, x, lengths):
        lengths, order = lengths.sort(descending=True)
        x, h = x[order], self.first(x.new_ones(len(x), D)).tanh()
        c = torch.zeros_like(h)
        for t in range(x.shape[1]):
            n = int((lengths > t).sum())
            state = self.cell(x[:n, t], (h[:n], c[:n]))
            h, c = (torch.cat([new, old[n:]]) for new, old in zip(state, (h, c), strict=True))
        return self.head(h)[order.argsort()]


class Sequences(nn.Module):
    """Samples in the order of their lengths, and a first state of zeros."""

    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.GRU(I, D, batch_first=True), nn.Linear(D, C)

    def forward(self, x, lengths):
        order = lengths.argsort(descending=True)
        return self.head(self.cells(x[order])[0][:, -1])[order.argsort()]


@pytest.mark.parametrize("sizes", [[12], [4, 4, 4], [1, 1, 1, 1, 8], [1, 3, 8], [1, 11]], ids=str)
@pytest.mark.parametrize("model", [Cells, Sequences])
def test_a_first_state_lies_as_the_samples_that_it_meets(model, sizes):
    """The first four are in order already, and no look is due in a third batch."""
    model, lengths = model().double(), torch.tensor([4, 4, 3, 2, 4, 3, 3, 1, 1, 3, 2, 4])
    x, y = torch.randn(12, T, I).double(), torch.randint(C, (12,))
    cut = zip(x.split(sizes), lengths.split(sizes), y.split(sizes), strict=True)
    batches = [((x, lengths), y) for x, lengths, y in cut]
    expected = {name: g.square().mean(0) for name, g in sample_gradients(model, batches).items()}
    trace = float(sum(value.sum() for value in expected.values()))
    diagonal, corrected = (ff.fisher(model, batches, s, "empirical", progress=False) for s in ("diagonal", "ekfac"))
    torch.testing.assert_close(diagonal.diagonal(dtype=torch.float64), expected, rtol=1e-6, atol=1e-12)
    assert corrected.trace() == pytest.approx(trace, rel=1e-9)
