# SPDX-License-Identifier: Apache-2.0
"""Functions with rules, called in unusual ways: the model computes what it would, and the squares are autograd's."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from networks import Wrapped, parameter

import fisherfast as ff

D, C, V = 4, 3, 6
EXACT = 1e-12


def changed_in_place(w, x):
    made = w.exp() * 1.0
    y = x - made
    made.mul_(2)
    return y


def added_through_a_view(w, x):
    y = x * 1.0
    y[:, 1:].add_(w[1:])
    return y * w


def of_rows(w, x):
    return torch.stack([torch.einsum("i,ij,j->", r, w.diag(), r) for r in x]).unsqueeze(1) * x


CALLS = {
    "uint8 by a weight": lambda w, x: (x.abs() * 50).to(torch.uint8) / w.exp(),
    "bool by a weight": lambda w, x: (x > 0) / w.exp(),
    "a weight by integers": lambda w, x: w / (x.abs() * 5 + 1).long(),
    "a weight by float32": lambda w, x: w / (x.float().abs() + 1),
    "a weight by a table": lambda w, x: x * (w / torch.tensor([1, 3, 7, 11])),
    "quotients beyond the square's range": lambda w, x: x * 1e180 / (w.exp() * 1e180) + (x.relu() * 1e-180) / (w.exp() * 1e-180),
    "a quotient by names": lambda w, x: torch.div(input=x, other=w.exp()),
    "a rounded quotient": lambda w, x: x * w + torch.div(x, 2 + w.exp(), rounding_mode="floor"),
    "a difference with a factor": lambda w, x: torch.sub(x, w, alpha=2),
    "a reversed difference": lambda w, x: torch.rsub(w, x, alpha=3),
    "a product of numbers": lambda w, x: x * torch.einsum("d,d->", w, w),
    "a product of numbers by tensordot": lambda w, x: x * torch.tensordot(w, w, 1),
    "everything summed": lambda w, x: x * torch.tensordot(w.diag(), torch.eye(D, dtype=w.dtype)),
    "numbers on the way": lambda w, x: torch.einsum("d,dc,b,nb->nb", w, w.diag(), w, x),
    "of one row at a time": of_rows,
    "a result that is viewed": lambda w, x: (
        x + torch.einsum("nabc,c->nba", x.view(-1, 2, 1, 2), w[:2]).view(len(x), -1).sum(1, keepdim=True)
    ),
    "a list of operands": lambda w, x: torch.einsum("nd,d->nd", [x, w]),
    "axes as numbers": lambda w, x: torch.einsum(x, [0, 1], w, [1], [0, 1]),
    "a repeated axis": lambda w, x: torch.einsum("nd,dd->nd", x, w.diag()),
    "an axis of one": lambda w, x: torch.einsum("nd,d->nd", x, w[:1]),
    "more matrices than are taken one by one": lambda w, x: (
        x[:, :1].expand(-1, 70).unsqueeze(-1).unsqueeze(-1) @ w[:1].expand(70).view(70, 1, 1)
    ).flatten(1)[:, :D],
    "no matrices": lambda w, x: x * w + torch.matmul(x[:, :0, None, None], w[:0].view(0, 1, 1)).sum(),
    "by the name of the second": lambda w, x: torch.mm(x, mat2=w.diag()),
    "changed in place afterwards": changed_in_place,
    "broadcast together": lambda w, x: torch.sub(*torch.broadcast_tensors(w, x)),
    "mixed together": lambda w, x: torch.lerp(*torch.broadcast_tensors(w, x, x)),
    "sums of numbers": lambda w, x: x * (w.sum() + w.exp().sum()),
    "written through a view": lambda w, x: (x * 1.0)[:, 1:].mul_(w[1:]).sub_(w[:-1]).repeat(1, 2)[:, :D],
    "added through a view": added_through_a_view,
    "a sum with a factor": lambda w, x: torch.add(x, w, alpha=2),
    "a sum with a factor, the parameter first": lambda w, x: torch.add(w, x, alpha=2) * x,
    "a sum in place with a factor": lambda w, x: (x * 1.0).add_(w, alpha=2),
    "a product with a factor": lambda w, x: torch.addmm(w, x, w.exp().diag(), alpha=2),
    "a product of a parameter, with factors": lambda w, x: torch.addmm(w, x, w.view(2, 2).repeat(2, 2), beta=3, alpha=2),
    "a gradient inside": lambda w, x: torch.vmap(torch.func.grad(lambda v: F.linear(v, w.diag()).tanh().sum()))(x),
    "a product with a gradient inside": lambda w, x: torch.func.vjp(lambda v: F.linear(v, w.diag()).tanh(), x)[1](x)[0],
    "repeated": lambda w, x: x * w[:2].repeat(2),
    "repeated along another axis": lambda w, x: x * w.repeat(2, 1).sum(0),
}
LAYERS = {
    "a layer with factors": lambda m, x: torch.addmm(m.b, x, m.w, beta=3, alpha=2),
    "a layer with a factor of its bias": lambda m, x: torch.addmm(m.b, x, m.w, beta=3),
    "a layer with a factor": lambda m, x: torch.addmm(m.b, x, m.w, alpha=2),
}
TABLES = {
    "rows counted from the end": lambda m, ids: m.table[ids - V].sum(1),
    "padding counted from the end": lambda m, ids: F.embedding(ids, m.table, padding_idx=-1).sum(1),
    "bags padded from the end": lambda m, ids: F.embedding_bag(ids, m.table, padding_idx=-1),
    "sums padded from the end": lambda m, ids: F.embedding_bag(ids, m.table, padding_idx=-1, mode="sum"),
    "rows of a length at most": lambda m, ids: F.embedding_bag(ids, m.table.clone(), max_norm=0.5, mode="sum"),
}


def model_of(call):
    return Wrapped(lambda m, x: F.linear(call(m.w, x).to(m.v.dtype).relu(), m.v), w=parameter(D), v=parameter(C, D))


def layer_of(call):
    return Wrapped(lambda m, x: F.linear(call(m, x).relu(), m.v), w=parameter(D, D), b=parameter(D), v=parameter(C, D))


def table_of(call):
    return Wrapped(lambda m, ids: F.linear(call(m, ids), m.v), table=parameter(V, D), v=parameter(C, D))


def vectors(n):
    return torch.randn(n, D, dtype=torch.float64)


def tokens(n):
    return torch.randint(V, (n, 5))


KINDS = [(model_of, vectors, CALLS), (layer_of, vectors, LAYERS), (table_of, tokens, TABLES)]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch.vmap of the lookup that writes its table
@pytest.mark.parametrize(
    ("build", "inputs", "call"),
    [pytest.param(build, inputs, call, id=name) for build, inputs, calls in KINDS for name, call in calls.items()],
)
def test_squares_and_outputs(build, inputs, call):
    model = build(call).double()
    batches = [(inputs(n), torch.randint(C, (n,))) for n in (7, 5, 1, 6)]
    expected = oracle.diagonal(model, batches, oracle.cross_entropy)
    result = ff.fisher(model, batches, fisher_type="empirical", progress=False)
    assert oracle.error(result.diagonal(dtype=torch.float64), expected) < EXACT
    outputs = []
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        for x, y in batches:
            outputs.append(model(x))
            stats.backward(F.cross_entropy(outputs[-1], y, reduction="none"))
    for (x, _), output in zip(batches, outputs, strict=True):
        assert torch.allclose(output, model(x), rtol=1e-13, atol=1e-13)
    assert oracle.error(stats.result().diagonal(dtype=torch.float64), expected) < EXACT


@pytest.mark.parametrize(
    "equation", ["nd,d->nd", "nd,d->dn", "nd,d->n", "nd,c->ndc", "nd,cd->nc", "nd,->nd", "nd,d,d->nd", "nd,de->ne", "ntd,td->nt"]
)
def test_products_have_the_dtype_of_autocast(equation):
    terms = equation.split("->")[0].split(",")
    size = {"n": 7, "d": D, "c": 2, "e": D, "t": 5}
    weights = [parameter(*(size[name] for name in term)) for term in terms[1:]]
    model = Wrapped(
        lambda m, x: m.seen.append(torch.einsum(equation, x, *m.ws)) or F.linear(x.flatten(1)[:, :D] + m.seen[-1].sum(), m.v),
        ws=torch.nn.ParameterList(weights), v=parameter(C, D),
    )  # fmt: skip
    model.seen = []
    x = torch.randn(*(size[name] for name in terms[0]))
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        with ff.collect(model, ff.Diagonal(), fisher_type="empirical"):
            model(x)
    plain, captured = model.seen
    assert (captured.dtype, captured.shape) == (plain.dtype, plain.shape)


def test_baddbmm_has_the_dtype_of_autocast():
    w, x = parameter(1, D, D), torch.randn(1, 7, D)
    model = Wrapped(lambda m, x: torch.baddbmm(x, x, m.w), w=w)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
        with ff.collect(model, ff.Diagonal(), fisher_type="empirical"):
            captured = model(x)
    assert captured.dtype == plain.dtype == torch.bfloat16


@pytest.mark.parametrize("function", [lambda w, x: x * w, lambda w, x: x.abs() ** w], ids=["rule", "fallback"])
def test_hooks_on_parameters_are_not_called(function):
    torch.manual_seed(0)
    x, y = torch.randn(5, D, dtype=torch.float64), torch.arange(5) % C
    plain, hooked = (model_of(function).double() for _ in range(2))
    hooked.load_state_dict(plain.state_dict())
    hooked.w.register_hook(lambda g: pytest.fail("the gradient of a parameter is never formed"))
    expected, got = (ff.fisher(model, [(x, y)], fisher_type="empirical", progress=False).diagonal() for model in (plain, hooked))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", [torch.nn.Embedding, torch.nn.EmbeddingBag])
def test_frequencies_in_a_batch_are_no_part_of_a_gradient(kind):
    """``scale_grad_by_freq`` is for optimizers; what it makes depends on who else is in the batch."""
    ids, y = torch.randint(0, 5, (6, 3)), torch.randint(0, 4, (6,))
    table = kind(5, 8, scale_grad_by_freq=True, **({} if kind is torch.nn.Embedding else {"mode": "sum"}))
    head = torch.nn.Linear(8, 4)

    net = Wrapped(lambda m, x: m.head(h if (h := m.table(x)).dim() == 2 else h.sum(1)), table=table, head=head).double()
    expected = ff.fisher(
        Wrapped(lambda m, x: m.head(F.embedding(x, m.table.weight).sum(1)), table=table, head=head).double(),
        [(ids, y)], fisher_type="empirical", progress=False,
    ).diagonal()["table.weight"]  # fmt: skip
    assert torch.equal(ff.fisher(net, [(ids, y)], fisher_type="empirical", progress=False).diagonal()["table.weight"], expected)
    with ff.collect(net, "diagonal") as stats:
        for part in (slice(0, 2), slice(2, 6)):
            stats.backward(F.cross_entropy(net(ids[part]), y[part], reduction="none"))
    assert torch.allclose(stats.result().diagonal()["table.weight"], expected, rtol=1e-6)


@pytest.mark.parametrize("collects", [False, True])
def test_frequencies_are_no_part_of_a_gradient_in_the_fallback_either(collects):
    """``max_norm`` writes into the table: samples are run one by one."""
    ids, y = torch.randint(0, 5, (6, 3)), torch.randint(0, 4, (6,))
    table, head = torch.nn.Embedding(5, 8, max_norm=100.0, scale_grad_by_freq=True), torch.nn.Linear(8, 4)
    net = Wrapped(lambda m, x: m.head(m.table(x).sum(1)), table=table, head=head).double()

    def measured():
        if not collects:
            return ff.fisher(net, [(ids, y)], fisher_type="empirical", progress=False)
        with ff.collect(net, "diagonal") as stats:
            stats.backward(F.cross_entropy(net(ids), y, reduction="none"))
        return stats.result()

    divided = measured()
    table.scale_grad_by_freq = False
    assert "vmap" in divided.coverage["table.weight"] or "loop" in divided.coverage["table.weight"]
    torch.testing.assert_close(divided.diagonal()["table.weight"], measured().diagonal()["table.weight"], rtol=1e-12, atol=0)
