# SPDX-License-Identifier: Apache-2.0
"""What functions make of parameters alone, around a forward pass that is the user's: batches of every size, in any order."""

import gc

import networks
import oracle
import pytest
import torch
import torch.nn.functional as F
from networks import Wrapped, parameter
from torch import nn
from torch.utils.checkpoint import checkpoint

import fisherfast as ff

T, D, C = 5, 4, 3
EXACT = 1e-12


def batch(n):
    return torch.randn(n, T, D, dtype=torch.float64), torch.randint(C, (n,))


def losses(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def collected(model, batches, *structures):
    with ff.collect(model, *(structures or (ff.Diagonal(),)), fisher_type="empirical") as stats:
        for x, y in batches:
            stats.backward(losses(model, x, y))
    return stats.result()


def is_right(result, model, batches):
    return oracle.error(result.diagonal(dtype=torch.float64), oracle.diagonal(model, batches, oracle.cross_entropy)) < EXACT


def of(f, **parts):
    """A network ``head(f(self, inner(x)))`` in float64."""

    def forward(m, x):
        return m.head(torch.tanh(f(m, m.inner(x))).mean(1))

    return Wrapped(forward, inner=nn.Linear(D, D), head=nn.Linear(D, C), **parts).double()


def masked():
    return of(lambda m, h: h @ (m.w * torch.ones(D, D, dtype=torch.float64).tril()), w=parameter(D, D))


def table():
    return of(lambda m, h: h + m.p * torch.arange(1.0, T + 1, dtype=torch.float64).unsqueeze(1), p=parameter(T, D))


def adapter():
    return of(lambda m, h: F.linear(h, m.w + m.u @ m.v), w=parameter(D, D), u=parameter(D, 2), v=parameter(2, D))


def deep():
    return of(
        lambda m, h: h @ (((m.w * torch.ones(D, D, dtype=torch.float64).tril() + m.u @ m.v) * m.mix.softmax(0)) / m.mix.exp().sum()),
        w=parameter(D, D), u=parameter(D, 2), v=parameter(2, D), mix=parameter(D),
    )  # fmt: skip


def joined_by_another():
    return of(
        lambda m, h: F.linear(h, m.w * torch.full((D, 1), 0.5, dtype=torch.float64) + m.mix), w=parameter(D, D), mix=parameter(D)
    )


MODELS = {f.__name__: f for f in (masked, table, adapter, deep, joined_by_another)}
STARTS = [[3, 3, 3, 3, 3], [1, 6, 2, 7], [7, 1, 5, 3], [6, 4, 3, 5, 2], [2, 2, 9]]


@pytest.mark.parametrize("sizes", STARTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_batches_of_every_size(name, sizes):
    model, batches = MODELS[name](), [batch(n) for n in sizes]
    assert is_right(collected(model, batches), model, batches)


@pytest.mark.parametrize("name", MODELS)
def test_after_a_few_batches_nothing_is_looped(name):
    model, batches = MODELS[name](), [batch(7) for _ in range(6)]
    assert set(collected(model, batches).coverage.ways.values()) <= {"linear_sq_", "scale_sq_", "chain"}
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        stats.backward(losses(model, *batches[0]))
    assert "loop" in stats.result().coverage.ways.values()  # of this batch


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_forward_passes_before_the_backward_passes_of_others(name, order):
    model, batches = MODELS[name](), [batch(n) for n in (7, 6, 6, 2, 7, 5, 6, 3)]
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        for i in range(0, len(batches), 2):
            both = [losses(model, *batches[i]), losses(model, *batches[i + 1])]
            for k in order:
                stats.backward(both[k])
    assert is_right(stats.result(), model, batches)


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_pass_that_was_kept_for_long(name):
    """Its graph is older than what was decided since."""
    model, batches = MODELS[name](), [batch(7) for _ in range(7)]
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        kept = losses(model, *batches[0])
        for one in batches[1:]:
            stats.backward(losses(model, *one))
        stats.backward(kept)
    assert is_right(stats.result(), model, batches)


@pytest.mark.parametrize("name", MODELS)
def test_forward_passes_that_are_never_differentiated(name):
    model, batches = MODELS[name](), [batch(n) for n in (7, 6, 3, 5, 2, 7)]
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        for one in batches:
            model(batch(8)[0])
            model(batch(1)[0])
            stats.backward(losses(model, *one))
    assert is_right(stats.result(), model, batches)


@pytest.mark.parametrize("name", MODELS)
def test_several_backward_passes_through_one_graph(name):
    model, batches = MODELS[name](), [batch(n) for n in (7, 6, 5, 7)]
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        for one in batches:
            loss = losses(model, *one)
            stats.backward(loss, retain_graph=True)
            stats.backward(loss)
    assert stats.result().num_samples == 25 and is_right(stats.result(), model, batches)


@pytest.mark.parametrize("name", MODELS)
def test_inside_a_checkpoint(name):
    model, batches = MODELS[name](), [batch(n) for n in (7, 4, 4, 6, 1, 7)]
    outside = model.f
    model.f = lambda m, x: checkpoint(lambda x: outside(m, x), x, use_reentrant=False)
    assert is_right(collected(model, batches), model, batches)
    for structure in networks.STRUCTURES:
        result = ff.fisher(model, batches, structure, fisher_type="empirical", progress=False)
        if structure in ("diagonal", "gram"):
            assert is_right(result, model, batches)


USES = ["h @ (w - u)", "F.linear(h, w - u)", "h @ (w / u)", "h @ (w / c)", "h @ (w * u)", "(h @ (w - u)).tanh() @ (w - u)"]


@pytest.mark.parametrize("use", USES)
def test_inside_a_checkpoint_with_shapes_that_do_not_tell(use):
    def inner(m, h):
        return eval(use, {"h": h, "w": m.w, "u": m.u, "c": torch.full((D, 1), 2.0, dtype=torch.float64), "F": F})

    def forward(m, x):
        return checkpoint(lambda x: inner(m, x), x, use_reentrant=False) * m.u[0, 0]

    model = Wrapped(forward, w=parameter(D, D), u=parameter(D, D)).double()
    batches = [(torch.randn(n, D, dtype=torch.float64), torch.randint(D, (n,))) for n in (5, D, D, D)]
    model.u.data += 2
    assert is_right(ff.fisher(model, batches, fisher_type="empirical", progress=False), model, batches)
    assert is_right(collected(model, batches), model, batches)


def test_lengths_of_weights_say_nothing_where_only_weights_come_in():
    """The first batch is as long as their axes: what is made of parameters alone holds no sample nonetheless."""
    model, batches = adapter(), [batch(D) for _ in range(4)]
    assert is_right(collected(model, batches), model, batches)


def test_values_that_depend_on_a_shape_are_those_of_the_model():
    """No tensor of the user's gets an axis that it would not have."""
    seen = []

    def forward(m, h):
        t = m.p * torch.ones(T, D, dtype=torch.float64)
        seen.append(tuple(t.shape))
        return (h + t) / len(t) + t.detach().mean(0)

    model, batches = of(forward, p=parameter(T, D)), [batch(n) for n in (7, 6, 3, 7)]
    assert is_right(collected(model, batches), model, batches) and set(seen) == {(T, D)}


@pytest.mark.parametrize("made", [False, True], ids=["weight", "made of a weight"])
def test_contrastive_losses_are_refused(made):
    model = (
        nn.Linear(D, D).double() if not made else Wrapped(lambda m, x: F.linear(x, torch.tanh(m.w)), w=parameter(D, D)).double()
    )
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats, pytest.raises(ValueError, match="contrastive"):
        for n in (6, 5, 7):
            out = model(torch.randn(n, D, dtype=torch.float64))
            stats.backward(F.cross_entropy(out @ out.T, torch.arange(n), reduction="none"))


def test_statistics_of_a_batch_behind_a_normed_weight_are_refused():
    first = nn.utils.parametrizations.weight_norm(nn.Linear(D, 9, bias=False))
    model = nn.Sequential(first, nn.Linear(9, C)).double()
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats, pytest.raises(ValueError, match="batch statistics"):
        for n in (6, 5, 7):
            h = model[0](torch.randn(n, D, dtype=torch.float64))
            out = model[1](((h - h.mean(0)) / (h.std(0) + 1)).relu())
            stats.backward(F.cross_entropy(out, torch.randint(C, (n,)), reduction="none"))


def test_a_parameter_that_a_later_batch_does_not_use():
    experts = {"a": nn.Linear(D, D), "b": nn.Linear(D, D)}
    which = iter([True, False, True, True, False])

    def forward(m, h):
        h = F.linear(h, m.w * torch.full((D, 1), 0.5, dtype=torch.float64))
        return m.a(h) + m.b(h) if next(which) else m.a(h)

    model = of(forward, w=parameter(D, D), **experts)
    result = collected(model, [batch(n) for n in (7, 6, 5, 3, 7)])
    assert result.num_samples == 28 and set(result.names) == set(dict(model.named_parameters()))


def test_gradients_of_float16_are_pulled_back_with_their_factor():
    def forward(m, x):
        return m.head(F.linear(m.inner(x), torch.tanh(m.w) + torch.tanh(m.mix))).mean(1)

    parts = {"inner": nn.Linear(D, D), "w": parameter(D, D), "mix": parameter(D), "head": nn.Linear(D, C)}
    half = Wrapped(forward, **parts).half()
    model, batches = oracle.doubled(half), [batch(7) for _ in range(3)]
    with ff.collect(half, ff.Diagonal(), fisher_type="empirical", loss_scale=2.0**20) as stats:
        for x, y in batches:
            stats.backward(1e-6 * F.cross_entropy(half(x.half()).float(), y, reduction="none"))
    found, expected = stats.result().diagonal(dtype=torch.float64), oracle.diagonal(model, batches, oracle.cross_entropy)
    for name in ("w", "mix"):
        assert oracle.error({name: found[name] * 1e12}, {name: expected[name]}) < 0.05


def test_overlapping_parts_that_a_later_batch_shows():
    """Sums over uses, not two squares."""
    later = iter([False, False, True, True])

    def forward(m, h):
        y = F.linear(h, m.w)
        return y + F.pad(F.linear(h, m.w[:2]), (0, 2)) if next(later) else y

    model, batches = of(forward, w=parameter(D, D)), [batch(7) for _ in range(4)]
    result = collected(model, batches)
    later = iter([False] * 14 + [True] * 14)
    assert is_right(result, model, batches)


@pytest.mark.parametrize("function", [torch.tanh, lambda w: w.softmax(-1), torch.sin], ids=["tanh", "softmax", "sin"])
def test_what_is_made_of_parameters_is_let_go(function):
    """Of a function whose output autograd saves, too: the output must not hold what holds it."""
    model = Wrapped(lambda m, x: m.head(F.linear(x, function(m.w))), w=parameter(37, D), head=nn.Linear(37, C))
    batches = [(torch.randn(5, D), torch.randint(C, (5,))) for _ in range(4)]

    def alive():
        gc.collect()
        return sum(type(one) is torch.Tensor and one.shape == (37, D) for one in gc.get_objects())

    before = alive()
    for structure in networks.STRUCTURES:
        ff.fisher(model, batches, structure, fisher_type="empirical", progress=False)
    collected(model, batches)
    assert alive() == before


def sparse(m):
    places = torch.stack([torch.arange(D) % 3, torch.arange(D) % 5])
    return torch.sparse_coo_tensor(places, m.p, (D, D), check_invariants=True)


SPARSE = {
    "made dense": lambda m, h: h @ sparse(m).to_dense(),
    "in a product": lambda m, h: torch.stack([torch.sparse.mm(sparse(m), one.mT).mT for one in h]),
    "by its operator": lambda m, h: torch.stack([(sparse(m) @ one.mT).mT for one in h]),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_tensors_made_of_a_parameter(name, structure):
    """As learned weights of a graph's edges."""
    model, batches = of(SPARSE[name], p=parameter(D)), [batch(n) for n in (4, 3)]
    expected = oracle.diagonal(model, batches, oracle.cross_entropy)["p"]
    found = ff.fisher(model, batches, structure, "empirical", progress=False).diagonal(dtype=torch.float64)["p"]
    assert oracle.error({"p": found}, {"p": expected}) < EXACT
    assert is_right(collected(model, batches), model, batches)
