# SPDX-License-Identifier: Apache-2.0
"""Every way a parameter is used gives the squares of autograd's per-sample gradients, and leaves the model as it was."""

import copy

import networks
import oracle
import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations
from gate import passes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fisherfast as ff
from fisherfast.fisher.run import fallback

EXACT = 1e-12  # float64 rounding of a few hundred operations


def empirical(model, batches, **options):
    return ff.fisher(model, batches, fisher_type="empirical", progress=False, **options)


def per_sample_loss(model, x, y):
    logits = model(x)
    loss = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none")
    return loss.view(len(x), -1).sum(1)


@pytest.mark.parametrize("name", networks.COVERED)
def test_covered_use_matches_autograd(name):
    build, data = networks.COVERED[name]
    model, (x, y) = build().double(), data()
    x = x.double() if x.is_floating_point() else x
    expected = oracle.diagonal(model, [(x, y)], oracle.cross_entropy)
    result = empirical(model, [(x, y)])
    assert oracle.error(result.diagonal(dtype=torch.float64), expected) < EXACT
    assert not [how for how in result.coverage.values() if how.startswith(("loop", "vmap"))], result.coverage


@pytest.mark.parametrize("name", networks.COVERED)
def test_covered_use_matches_autograd_in_collect(name):
    build, data = networks.COVERED[name]
    model, batches = build().double(), [data(), data(5), data(1), data(2)]
    batches = [(x.double() if x.is_floating_point() else x, y) for x, y in batches]
    expected = oracle.diagonal(model, batches, oracle.cross_entropy)
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        for x, y in batches:
            stats.backward(per_sample_loss(model, x, y))
    assert oracle.error(stats.result().diagonal(dtype=torch.float64), expected) < EXACT
    assert stats.result().num_samples == 15


@pytest.mark.parametrize("name", networks.CHAINED)
def test_the_chain_rule_matches_autograd_and_says_so(name):
    build, data, chained = networks.CHAINED[name]
    model, batches = build().double(), [data(), data(3), data(19), data(1)]
    expected = oracle.diagonal(model, [(x.double(), y) for x, y in batches], oracle.cross_entropy)
    result = empirical(model, [(x.double(), y) for x, y in batches])
    assert oracle.error(result.diagonal(dtype=torch.float64), expected) < EXACT
    assert {n for n, way in result.coverage.ways.items() if way == "chain"} == chained, result.coverage
    assert not {"vmap", "loop"} & set(result.coverage.ways.values())
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        for x, y in batches:
            stats.backward(per_sample_loss(model, x.double(), y))
    assert oracle.error(stats.result().diagonal(dtype=torch.float64), expected) < EXACT


@pytest.mark.parametrize("vmap", [True, False], ids=["vmap", "loop"])
@pytest.mark.parametrize("name", networks.FALLBACK)
def test_uncovered_use_matches_autograd_and_says_so(name, vmap, monkeypatch):
    build, data, uncovered = networks.FALLBACK[name]
    model, batches = build().double(), [data(), data(3), data(19)]
    batches = [(x.double() if x.is_floating_point() else x, y) for x, y in batches]
    expected = oracle.diagonal(model, batches, oracle.cross_entropy)
    if not vmap:
        monkeypatch.setattr(fallback, "vmap", lambda *_, **__: refuse)
    result = empirical(model, batches)
    assert oracle.error(result.diagonal(dtype=torch.float64), expected) < EXACT
    assert {n for n, way in result.coverage.ways.items() if way == ("vmap" if vmap else "loop")} == uncovered, result.coverage
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        for x, y in batches:
            stats.backward(per_sample_loss(model, x, y))
    assert oracle.error(stats.result().diagonal(dtype=torch.float64), expected) < EXACT


def refuse(*_):
    raise RuntimeError("data-dependent control flow")


@pytest.mark.parametrize(
    "name", ["mlp-inplace-relu", "linear-sequence", "layer-norm", "embedding", "conv1d-addmm", "weight-used-twice"]
)
def test_float32_within_numerical_gate(name):
    build, data = networks.COVERED[name]
    model, (x, y) = build(), data(31)
    wide = x.double() if x.is_floating_point() else x
    expected = oracle.diagonal(oracle.doubled(model), [(wide, y)], oracle.cross_entropy)
    plain = oracle.error(oracle.diagonal(model, [(x, y)], oracle.cross_entropy), expected)
    assert passes(oracle.error(empirical(model, [(x, y)]).diagonal(), expected), plain)


@pytest.mark.parametrize("keep", ["weight", "bias"])
def test_only_what_asks_for_a_gradient_is_measured(keep):
    model, (x, y) = networks._mlp().double(), networks.vectors()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(keep))
    expected = oracle.diagonal(model, [(x.double(), y)], oracle.cross_entropy)
    result = empirical(model, [(x.double(), y)])
    assert result.names == tuple(expected) and all(n.endswith(keep) for n in result.names)
    assert oracle.error(result.diagonal(dtype=torch.float64), expected) < EXACT


class Copies(TorchDispatchMode):
    """The shapes of the tensors that are copied."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.clone.default:
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **kwargs or {})


def test_outputs_of_linear_maps_of_sequences_are_not_copied():
    model, (x, y) = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)), (torch.randn(2, 7, 3), torch.randint(4, (2, 7)))
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        for _ in range(2):  # the first batch explores
            with Copies() as copies:
                stats.backward(per_sample_loss(model, x, y))
            assert not {(2, 7, 5), (2, 7, 4)} & set(copies.shapes)


def test_a_linear_map_without_samples_is_followed_from_the_second_batch_on():
    table = torch.randn(1, 7, 2).double()
    model = networks.Wrapped(
        lambda m, x: m.head(torch.tanh(m.first(x) + m.inner(table))),
        first=nn.Linear(3, 5), inner=nn.Linear(2, 5), head=nn.Linear(5, 4),
    ).double()  # fmt: skip
    batches = [(torch.randn(n, 7, 3).double(), torch.randint(4, (n, 7))) for n in (2, 3, 2)]
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        for x, y in batches:
            stats.backward(per_sample_loss(model, x, y))
    result = stats.result()
    assert oracle.error(result.diagonal(dtype=torch.float64), oracle.diagonal(model, batches, oracle.cross_entropy)) < EXACT
    assert result.coverage.ways["inner.weight"] == "chain", result.coverage


def test_a_view_of_an_input_is_copied_before_it_is_written():
    model = networks.Wrapped(lambda m, x: m.head(x + m.table.expand(7, 3)), table=networks.parameter(1, 3), head=nn.Linear(3, 4))
    before, version = model.table.clone(), model.table._version
    empirical(model, [(torch.randn(2, 7, 3), torch.randint(4, (2, 7)))])
    assert torch.equal(model.table, before) and model.table._version == version


def test_two_names_of_one_tensor_are_one_parameter():
    model, (x, y) = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), (torch.randn(7, 3), torch.randint(0, 3, (7,)))
    model[2].weight = model[0].weight
    result = empirical(model.double(), [(x.double(), y)])
    assert result.names == ("0.weight", "0.bias", "2.bias") and result.aliases == {"2.weight": "0.weight"}
    assert (
        oracle.error(result.diagonal(dtype=torch.float64), oracle.diagonal(model, [(x.double(), y)], oracle.cross_entropy))
        < EXACT
    )


class Snapshot:
    """Everything about a model and the process that a measurement must not change."""

    def __init__(self, model):
        self.model = model
        self.values = copy.deepcopy(model.state_dict())
        self.taken = self._take()

    def _take(self):
        m = self.model
        return {
            "grads": {n: p.grad if p.grad is None else (id(p.grad), p.grad.clone()) for n, p in m.named_parameters()},
            "requires_grad": {n: p.requires_grad for n, p in m.named_parameters()},
            "identity": {n: (id(p), p._version, p._backward_hooks) for n, p in m.named_parameters()},
            "training": [k.training for k in m.modules()],
            "hooks": [
                {key: dict(value) for key, value in vars(k).items() if key.endswith("_hooks") and isinstance(value, dict)}
                for k in m.modules()
            ],
            "attributes": [sorted(vars(k)) for k in m.modules()],
            "rng": torch.get_rng_state(),
            "modes": torch.overrides._get_current_function_mode_stack(),
        }

    def check(self):
        now = self._take()
        for key in ("requires_grad", "identity", "training", "hooks", "attributes", "modes"):
            assert now[key] == self.taken[key], key
        assert torch.equal(now["rng"], self.taken["rng"])
        for name, before in self.taken["grads"].items():
            after = now["grads"][name]
            assert (before is None) == (after is None)
            assert before is None or (before[0] == after[0] and torch.equal(before[1], after[1]))
        assert all(torch.equal(v, self.model.state_dict()[k]) for k, v in self.values.items())


class Exploding(nn.Module):
    """Raises on its second call."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        """Count and raise."""
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("a fault in the model")
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_exactly_as_found(fails):
    model = nn.Sequential(nn.Linear(3, 11), nn.ReLU(inplace=True), nn.Conv1d(1, 1, 1), nn.Linear(11, 4))
    model = networks.Wrapped(lambda m, x: m.d(m.c(m.a(x).relu().unsqueeze(1)).squeeze(1)), a=model[0], c=model[2], d=model[3])
    model.e = Exploding() if fails else nn.Identity()
    model.f = lambda m, x: m.e(m.d(m.c(m.a(x).relu().unsqueeze(1)).squeeze(1)))
    model.a.weight.grad = torch.ones_like(model.a.weight)
    model.d.bias.requires_grad_(False)
    model.a.register_forward_hook(lambda *_: None)
    model.train()
    batches = [networks.vectors(), networks.vectors()]
    snapshot = Snapshot(model)
    if fails:
        with pytest.raises(RuntimeError, match="a fault in the model"):
            empirical(model, batches)
    else:
        empirical(model, batches)
        with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
            x, y = batches[0]
            stats.backward(F.cross_entropy(model(x), y, reduction="none"))
    snapshot.check()


def test_forward_without_backward_counts_nothing():
    model, (x, y) = networks._mlp().double(), networks.vectors()
    x = x.double()
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        for _ in range(3):
            model(x)
            stats.backward(per_sample_loss(model, x, y))
    expected = oracle.diagonal(model, [(x, y)], oracle.cross_entropy)
    assert stats.result().num_samples == 21
    assert oracle.error(stats.result().diagonal(dtype=torch.float64), expected) < EXACT


def test_several_backwards_through_one_forward_are_draws():
    model, (x, y) = networks._mlp().double(), networks.vectors()
    x, other = x.double(), torch.randint(0, networks.C, y.shape)
    with ff.collect(model, ff.Diagonal(), fisher_type="mc") as stats:
        logits = model(x)
        stats.backward(F.cross_entropy(logits, y, reduction="none"), retain_graph=True)
        stats.backward(F.cross_entropy(logits, other, reduction="none"))
    pair = [oracle.diagonal(model, [(x, labels)], oracle.cross_entropy) for labels in (y, other)]
    expected = {name: (pair[0][name] + pair[1][name]) / 2 for name in pair[0]}
    assert stats.result().num_samples == len(x)
    assert oracle.error(stats.result().diagonal(dtype=torch.float64), expected) < EXACT


def test_no_weight_gradient_gemm_runs():
    """The weights are frozen where they are used: autograd never forms a tensor of a weight's shape."""
    model, batches = (
        nn.Sequential(nn.Linear(37, 41), nn.Tanh(), nn.Linear(41, 43)),
        [(torch.randn(7, 37), torch.randint(0, 43, (7,)))],
    )
    products = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
                products.append(tuple(out.shape))
            return out

    with ff.backend("cpu"), Watch():
        empirical(model, batches)
    assert products and not {(37, 41), (41, 37), (41, 43), (43, 41)} & set(products)


def test_rows_chosen_by_data_are_told_apart_in_every_batch():
    """In the first batch each sample has one row for the expert, in order: as if the rows lay along the samples' axis."""
    model = nn.Sequential(nn.Identity(), networks.Wrapped(_chosen, w=networks.parameter(4, 3))).double()
    first, second = torch.randn(3, 2, 3).double(), torch.randn(3, 2, 3).double()
    for x, owners in ((first, [0, 1, 2]), (second, [1, 1, 0])):
        x[:, :, 0] = -1
        for k, owner in enumerate(owners):
            x[owner, k % 2 if owner != owners[k - 1] else 1, 0] = 1
    second[1, :, 0] = 1
    batches = [(x, torch.randint(0, 4, (3, 2))) for x in (first, second)]
    expected = oracle.diagonal(model, batches, oracle.cross_entropy)
    result = empirical(model, batches)
    assert result.coverage["1.w"] == "linear_sq_"
    assert oracle.error(result.diagonal(dtype=torch.float64), expected) < EXACT


def _chosen(m, x):
    rows = x.flatten(0, 1)
    mine = (rows[:, 0] > 0).nonzero().squeeze(1)
    out = rows.new_zeros(len(rows), 4).index_add(0, mine, F.linear(rows[mine], m.w))
    return out.view(*x.shape[:2], 4)


@pytest.mark.parametrize("name", ["lstm-packed", "gru-packed"])
@pytest.mark.parametrize("seed", range(8))
def test_packed_recurrence_whatever_the_order_of_lengths(name, seed):
    """The rows of a packed layer's first state are in the order of the lengths, and look like an axis where that is no order."""
    torch.manual_seed(seed)
    build, data = networks.COVERED[name]
    model, batches = build().double(), [(x.double(), y) for x, y in (data(n) for n in (2, 3, 2, 5, 3))]
    expected = oracle.diagonal(model, batches, oracle.cross_entropy)
    assert oracle.error(empirical(model, batches).diagonal(dtype=torch.float64), expected) < EXACT


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("both", [False, True], ids=["", "both ways"])
def test_the_last_states_of_packed_sequences_are_their_own(kind, both):
    def forward(m, x):
        lengths = 1 + (x[:, 0, 0] > 0).long() + 2 * (x[:, 1, 0] > 0).long()
        state = m.r(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[1]
        return m.head((state[0] if kind == "LSTM" else state).transpose(0, 1).flatten(1))

    r, head = getattr(nn, kind)(3, 4, batch_first=True, bidirectional=both), nn.Linear(4 * (1 + both), 3)
    model = networks.Wrapped(forward, r=r, head=head).double()
    batches = [(torch.randn(n, 5, 3).double(), torch.randint(0, 3, (n,))) for n in (7, 6)]
    expected = oracle.diagonal(model, batches, oracle.cross_entropy)
    assert oracle.error(empirical(model, batches).diagonal(dtype=torch.float64), expected) < EXACT


def _of_two_paddings(m, ids):
    h = F.embedding(ids, m.w, padding_idx=1).tanh() + F.embedding(ids, m.w).sigmoid()
    return F.linear(h.sum(1), m.w)


USES = {
    "a tied table of two paddings": _of_two_paddings,
    "a transposed parameter": lambda m, ids: ((1 + F.one_hot(ids, 3).double()) * m.w.t()).sum(1),
}


@pytest.mark.parametrize("name", USES)
def test_use_by_tokens_matches_autograd(name):
    model = networks.Wrapped(USES[name], w=networks.parameter(3, 4)).double()
    batches = [(torch.randint(0, 3, (n, 4)), torch.randint(0, 3, (n,))) for n in (7, 6)]
    expected = oracle.diagonal(model, batches, oracle.cross_entropy)
    assert oracle.error(empirical(model, batches).diagonal(dtype=torch.float64), expected) < EXACT


def test_two_uses_of_a_table_that_cancel_leave_nothing_below_zero():
    """``(H + E)^2`` as ``H^2`` and what the lookup adds to it."""

    def forward(m, ids, given):
        return F.linear(given, m.table.weight).gather(2, ids[..., None])[..., 0] - (m.table(ids) * given).sum(-1)

    model, ids, given = (
        networks.Wrapped(forward, table=nn.Embedding(6, 16)),
        torch.randint(0, 6, (5, 9)),
        3 * torch.randn(5, 9, 16),
    )
    with ff.collect(model, ff.Diagonal(), ff.PerSampleNorm(), fisher_type="empirical") as stats:
        stats.backward(model(ids, given).sum(1))
    fisher, norms = stats.results()
    scale = float(given.square().sum(2).max())
    assert all(float(v.min()) >= 0 and float(v.max()) < 1e-5 * scale for v in fisher.diagonal().values())
    assert float(norms.squared_norms.min()) >= 0


@pytest.mark.parametrize("structure", ["diagonal", ff.KFAC(max_factor_dim=64), ff.EKFAC(max_factor_dim=64)], ids=str)
def test_a_tied_table_is_never_as_large_as_its_sample_gradients(structure):
    """Of 500 rows, looked up and multiplied by: nothing of 8 x 500 x 32 numbers is made."""
    table, inner = nn.Embedding(500, 32), nn.Linear(32, 32)
    model = networks.Wrapped(lambda m, x: F.linear(torch.tanh(m.inner(m.table(x))), m.table.weight), table=table, inner=inner)
    data = [(torch.randint(500, (8, 3)), torch.randint(500, (8, 3)))]
    with Allocations() as made:
        networks.measure(model, data, structure)
    assert 500 * 32 <= made.largest < 8 * 500 * 32
