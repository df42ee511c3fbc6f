# SPDX-License-Identifier: Apache-2.0
"""Uses of a parameter that a torch function does not show, or shows too late: nothing is lost, and the model stays what it is."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from networks import Wrapped
from torch import nn

import fisherfast as ff

N, I, C = 6, 3, 4


class Rounded(torch.autograd.Function):
    """A node of its own, as quantisers and adapters have."""

    @staticmethod
    def forward(ctx, w):
        return w.round()

    @staticmethod
    def backward(ctx, g):
        return g


@torch.jit.script
def scripted_gelu(b, y):
    z = b + y
    return z * 0.5 * (1.0 + torch.tanh(0.79788456 * z))


class Written(nn.Module):
    """A class token written into a tensor of zeros."""

    def __init__(self):
        super().__init__()
        self.inner, self.token, self.head = nn.Linear(I, C), nn.Parameter(torch.randn(C)), nn.Linear(C, C)

    def forward(self, x):
        h = x.new_zeros(len(x), 2, C)
        h[:, 0] = self.token
        h[:, 1] = self.inner(x)
        return self.head(h.tanh().mean(1))


class Changed(nn.Module):
    """A copy of a weight, changed in place before it is used."""

    def __init__(self, change):
        super().__init__()
        self.change, self.w, self.head = change, nn.Parameter(torch.randn(C, I)), nn.Linear(C, C)

    def forward(self, x):
        return self.head(F.linear(x, self.change(self.w)).tanh())


def masked(w):
    w = w.clone()
    w[:, 0] = 0
    return w


def masked_through_a_view(w):
    w = w.contiguous().clone()
    w[:, 0].zero_()
    return w


def clamped_through_data(w):
    w.data.clamp_(-0.3, 0.3)
    return w


def scaled_through_data_of_a_view(w):
    w = w.clone()
    w[:2].data.mul_(3)
    w.t().data.add_(0.1)
    return w


def given_other_data(w):
    w = w.t().contiguous().t()
    w.data = w.data.round()
    return w


class Hidden(nn.Module):
    """A use that no torch function shows, beside one that is seen, or alone."""

    def __init__(self, use, also_seen):
        super().__init__()
        self.use, self.also_seen = use, also_seen
        self.w, self.head = nn.Parameter(torch.randn(I, I)), nn.Linear(I, C)

    def forward(self, x):
        h = self.use(self.w, x).tanh()
        return self.head(F.linear(h, self.w) if self.also_seen else h)


class MaxNorm(nn.Linear):
    """A constraint that gives the weight other memory in every forward pass."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        return super().forward(x)


class Experts(nn.Module):
    """Experts that are skipped where no row chose them."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts, self.head = nn.Linear(I, 3), nn.ModuleList(nn.Linear(I, C) for _ in range(3)), nn.Linear(C, C)

    def forward(self, x):
        p, chosen = self.gate(x).softmax(-1).max(-1)
        out = x.new_zeros(len(x), C)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * p[rows, None])
        return self.head(out.tanh())


NETWORKS = {
    "written by setitem": Written,
    "clone, then setitem": lambda: Changed(masked),
    "clone, then a view in place": lambda: Changed(masked_through_a_view),
    "clone, then tril_": lambda: Changed(lambda w: w.clone().tril_()),
    "clone, then .data in place": lambda: Changed(lambda w: clamped_through_data(w.clone())),
    "product, then .data in place": lambda: Changed(lambda w: clamped_through_data(w * 2)),
    "clone, then .data of its views": lambda: Changed(scaled_through_data_of_a_view),
    "copy, then other .data": lambda: Changed(given_other_data),
    "clone, unchanged": lambda: Changed(lambda w: w.clone()),
    "own node": lambda: Hidden(lambda w, x: F.linear(x, Rounded.apply(w)), False),
    "own node and linear": lambda: Hidden(lambda w, x: F.linear(x, Rounded.apply(w)), True),
    "scripted and linear": lambda: Hidden(lambda w, x: scripted_gelu(w[0], x), True),
    "scripted": lambda: Hidden(lambda w, x: scripted_gelu(w[1], x), False),
    "other memory": lambda: nn.Sequential(MaxNorm(I, C), nn.Tanh(), nn.Linear(C, C)),
    "experts": Experts,
}


def sample_squares(model, x, y):
    """The mean of squared sample gradients, by autograd."""
    named = dict(model.named_parameters())
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    for n in range(len(x)):
        loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        for name, g in zip(named, torch.autograd.grad(loss, list(named.values()), materialize_grads=True), strict=True):
            sums[name] += g.square() / len(x)
    return sums


@pytest.mark.parametrize("name", NETWORKS)
def test_the_diagonal_is_that_of_autograd(name):
    model = NETWORKS[name]().double()
    x, y = torch.randn(40, I).double(), torch.randint(C, (40,))
    expected = sample_squares(model, x, y)
    found = ff.fisher(model, [(x[:25], y[:25]), (x[25:], y[25:])], fisher_type="empirical", progress=False)
    for parameter, value in found.diagonal(dtype=torch.float64).items():
        assert torch.allclose(value, expected[parameter], rtol=1e-9, atol=1e-14), parameter


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "experts"])
def test_collect_runs_the_model_as_it_is(name):
    model = NETWORKS[name]().double()
    x, y = torch.randn(N, I).double(), torch.randint(C, (N,))
    expected, outside = sample_squares(model, x, y), model(x)
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        for _ in range(2):
            logits = model(x)
            assert torch.equal(logits, outside)
            stats.backward(F.cross_entropy(logits, y, reduction="none"))
    for parameter, value in stats.result().diagonal(dtype=torch.float64).items():
        assert torch.allclose(value, expected[parameter], rtol=1e-9, atol=1e-14), parameter
    assert all(p.grad is None for p in model.parameters())


def test_parameters_that_get_other_memory_between_batches():
    model, x, y = nn.Sequential(nn.Linear(I, C), nn.Tanh(), nn.Linear(C, C)), torch.randn(N, I), torch.randint(C, (N,))
    doubled = 2 * nn.utils.parameters_to_vector(model.parameters()).detach()
    with ff.collect(model, ff.Diagonal()) as stats:
        stats.backward(F.cross_entropy(model(x), y, reduction="none"))
        nn.utils.vector_to_parameters(doubled, model.parameters())
        inside = model(x)
        stats.backward(F.cross_entropy(inside, y, reduction="none"))
    assert torch.equal(inside, model(x))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.LSTM(I, C, 2, dropout=0.5, batch_first=True), torch.randn(N, 5, I)),
        (nn.Sequential(nn.Linear(I, C), nn.RReLU()), torch.randn(N, I)),
    ],
    ids=["dropout between recurrent layers", "rrelu"],
)
def test_chance_in_train_mode_is_refused(model, x):
    def output(result):
        return result[0][:, -1] if isinstance(result, tuple) else result

    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        ff.fisher(model.train(), [(x, torch.randint(C, (N,)))], output=output, progress=False)
    assert ff.fisher(model.eval(), [(x, torch.randint(C, (N,)))], output=output, progress=False).trace() > 0


def test_grad_mode_of_the_caller_does_not_matter():
    model, data = nn.Linear(I, C), [(torch.randn(N, I), torch.randint(C, (N,)))]
    with torch.no_grad():
        inside = ff.fisher(model, data, progress=False)
    assert inside.trace() == ff.fisher(model, data, progress=False).trace()


@pytest.mark.parametrize(
    ("parameter", "kind"),
    [(torch.empty(0), "empty"), (torch.randn(3, dtype=torch.complex64), "complex"), (torch.eye(3).to_sparse(), "sparse")],
    ids=["empty", "complex", "sparse"],
)
def test_parameters_without_real_numbers_are_named(parameter, kind):
    model = nn.Linear(I, C)
    model.extra = nn.Parameter(parameter)
    with pytest.raises(ValueError, match=f"extra: must hold real numbers, got a parameter that is {kind}"):
        ff.fisher(model, [(torch.randn(N, I), None)], progress=False)


def test_a_model_without_numbers_is_refused():
    with pytest.raises(ValueError, match="model: parameters must hold numbers, got meta tensors"):
        ff.fisher(nn.Linear(I, C, device="meta"), [(torch.randn(N, I), None)], progress=False)


def test_a_model_that_differentiates_inside_its_forward_pass_is_refused():
    class Forces(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = nn.Sequential(nn.Linear(I, C), nn.Tanh(), nn.Linear(C, 1))

        def forward(self, x):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]

    with pytest.raises(RuntimeError, match="differentiates inside its own forward pass"):
        ff.fisher(Forces(), [(torch.randn(N, I), None)], likelihood="gaussian", progress=False)


class Prototypes(nn.Module):
    """Another input than the samples, in a use that no rule covers."""

    def __init__(self, use):
        super().__init__()
        self.inner, self.scale, self.use = nn.Linear(I, C), nn.Parameter(torch.randn(C)), use

    def forward(self, x, prototypes):
        return self.use(self.inner(x), self.scale) @ prototypes.mT


@pytest.mark.parametrize(
    "use",
    [torch.maximum, lambda inner, scale: torch.maximum(inner, scale) if float(inner.sum()) else inner],
    ids=["vmap", "loop"],
)
def test_an_input_that_is_as_long_as_the_batch_by_chance_is_not_cut(use):
    """Where the loop or vmap would cut it, samples are told apart by their losses."""
    model, x, prototypes = Prototypes(use).double(), torch.randn(N, I).double(), torch.randn(N, C).double()
    F = ff.fisher(model, [((x, prototypes), None)], fisher_type="exact", progress=False)
    expected = ff.fisher(
        Wrapped(lambda m, x: m.inner(x, prototypes), inner=model), [(x, None)], fisher_type="exact", progress=False
    )
    assert (
        oracle.error(
            F.diagonal(dtype=torch.float64),
            {k.removeprefix("inner."): v for k, v in expected.diagonal(dtype=torch.float64).items()},
        )
        < 1e-12
    )


def test_an_input_that_cannot_be_cut_like_samples_is_explained():
    model = Wrapped(lambda m, x, mask: m.layer((x @ x.mT + mask) @ x).sum(1), layer=nn.Linear(I, C))
    x, mask, y = torch.randn(N, N, I), torch.eye(N), torch.randint(C, (N,))
    with pytest.raises(RuntimeError) as caught:
        ff.fisher(model, [((x, mask), y)], progress=False)
    assert "Inputs that are as long as the batch must hold its samples" in "".join(caught.value.__notes__)
    assert ff.fisher(model, [((x, mask[None]), y)], progress=False).trace() > 0


@pytest.mark.parametrize(
    "structure", [[ff.Diagonal()], (), (ff.KFAC,), "fisher", ("diagonal", 3)], ids=["list", "nothing", "class", "word", "number"]
)
def test_what_is_no_structure_is_refused(structure):
    with pytest.raises(ValueError, match="structure must be one of"):
        ff.fisher(nn.Linear(I, C), [(torch.randn(N, I), None)], structure=structure, progress=False)


def test_data_that_cannot_be_read_are_refused():
    with pytest.raises(TypeError, match="fisher: data must be an iterable of batches, got function; pass a DataLoader or a list"):
        ff.fisher(nn.Linear(I, C), lambda: [(torch.randn(N, I), None)], progress=False)


def test_structures_by_name_and_by_request():
    model, data = nn.Linear(I, C), [(torch.randn(N, I), None)]
    diagonal, kfac = ff.fisher(model, data, structure=("diagonal", ff.KFAC()), progress=False)
    one = ff.fisher(model, data, structure=ff.KFAC(), progress=False)
    assert isinstance(diagonal, ff.DiagonalFisher) and isinstance(kfac, ff.KFACFisher)
    assert one.trace() == kfac.trace()


@pytest.mark.parametrize("what", [nn.Linear, nn.Linear(2, 2), "linear"], ids=["class", "module", "name"])
def test_a_rule_is_of_a_function(what):
    with pytest.raises(TypeError, match="rule: must be given functions, got"):
        ff.rule(what)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=["jagged", "strided"])
def test_a_layer_of_nested_tensors(layout):
    def forward(m, x):
        jagged = torch.nested.nested_tensor([rows[: 1 + int(rows[0, 0] > 0)] for rows in x], layout=layout)
        return m.head(torch.nested.to_padded_tensor(m.layer(jagged), 0.0).sum(1))

    layers = {"layer": nn.Linear(6, 5), "head": nn.Linear(5, 3)}
    model, data = (
        Wrapped(forward, **layers).double(),
        [(torch.randn(n, 2, 6).double(), torch.randint(0, 3, (n,))) for n in (4, 1, 3)],
    )
    found = ff.fisher(model, data, fisher_type="empirical", progress=False)
    assert oracle.error(found.diagonal(dtype=torch.float64), oracle.diagonal(model, data, oracle.cross_entropy)) < 1e-12


def test_a_module_that_is_cast_inside_of_the_model_goes_to_the_loop():
    """As Hugging Face's SwitchTransformers does; torch 2.13 would break down in ``vmap``."""

    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head, self.scale = nn.Linear(I, I), nn.Linear(I, C), nn.Parameter(torch.randn(I))

        def forward(self, x):
            self.inner = self.inner.to(self.scale.dtype)
            hidden = self.inner(x)
            return self.head(hidden.tanh() * torch.hypot(hidden, self.scale))

    model, (x, y) = Cast().double(), (torch.randn(N, I).double(), torch.randint(C, (N,)))
    result = ff.fisher(model, [(x, y)], fisher_type="empirical", progress=False)
    assert "given other memory" in result.coverage["scale"]
    expected = oracle.diagonal(model, [(x, y)], oracle.cross_entropy)
    assert oracle.error(result.diagonal(dtype=torch.float64), expected) < 1e-12
