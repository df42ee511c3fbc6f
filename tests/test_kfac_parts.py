# SPDX-License-Identifier: Apache-2.0
"""Blocks of the parts of packed parameters: those of layers of their own, whose factors are those of the definition."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import Wrapped, breaking_off, measure, parameter
from oracle import close
from safetensors import safe_open
from test_kfac import hooked_factors
from test_shared_inputs import Batches
from torch import nn

import fisherfast as ff

DOUBLE = {"dtype": torch.float64}
EXACT = 1e-11
E, K, C, N, T, S = 4, 3, 5, 6, 3, 2


class Packed(nn.Module):
    """torch's attention, time first: it would transpose each of its inputs; ``of`` makes queries, keys and values of the data."""

    def __init__(self, of, **options):
        super().__init__()
        self.of, self.a, self.head = of, nn.MultiheadAttention(E, 2, **options), nn.Linear(E, C)

    def forward(self, x):
        """[N, T, C]."""
        return self.head(self.a(*self.of(x.transpose(0, 1)), need_weights=False)[0].transpose(0, 1).tanh())


class Apart(nn.Module):
    """The same with layers of their own; ``together``: keys and values in one, as torch has them where they see one tensor."""

    def __init__(self, packed, together):
        super().__init__()
        a, self.of, self.together, self.head = packed.a, packed.of, together, copy.deepcopy(packed.head)
        weights = [a.q_proj_weight, a.k_proj_weight, a.v_proj_weight] if a.in_proj_weight is None else a.in_proj_weight.chunk(3)
        sizes = [E, 2 * E] if together else [E, E, E]
        weights = torch.cat(tuple(weights)).split(sizes) if together else weights
        for name, weight, bias in zip(("q", "k", "v"), weights, a.in_proj_bias.split(sizes), strict=False):
            layer = nn.Linear(weight.shape[1], len(weight)).double()
            layer.weight.data, layer.bias.data = weight.detach().clone(), bias.detach().clone()
            setattr(self, name, layer)
        self.out = copy.deepcopy(a.out_proj)

    def forward(self, x):
        """[N, T, C]."""
        q, k, v = (t.transpose(0, 1) for t in self.of(x.transpose(0, 1)))
        q, k, v = (self.q(q), *self.k(k).chunk(2, -1)) if self.together else (self.q(q), self.k(k), self.v(v))
        heads = (t.unflatten(-1, (2, E // 2)).transpose(1, 2) for t in (q, k, v))
        return self.head(self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)).tanh())


def memory(x):
    """A decoder's: keys and values of one tensor of another length."""
    m = 2 * x[:S].flip(0)
    return x, m, m


def three(x):
    """All of their own."""
    return x, x.flip(0), 2 * x


def queries_and_keys(x):
    """Values of their own."""
    return x, x, 2 * x


def widths(x):
    """Keys and values as wide as neither."""
    m = x[:S, :, :K]
    return x, m, m


# what queries, keys and values are made of, torch's options, whether keys and values are one part, the parts by name
CASES = {
    "memory": (memory, {}, True, {"q": "a.in_proj_weight[0:4]", "k": "a.in_proj_weight[4:12]"}),
    "three": (three, {}, False, {"q": "a.in_proj_weight[0:4]", "k": "a.in_proj_weight[4:8]", "v": "a.in_proj_weight[8:12]"}),
    "queries-and-keys": (
        queries_and_keys,
        {},
        False,
        {"q": "a.in_proj_weight[0:4]", "k": "a.in_proj_weight[4:8]", "v": "a.in_proj_weight[8:12]"},
    ),
    "widths": (
        widths,
        {"kdim": K, "vdim": K},
        False,
        {"q": "a.q_proj_weight", "k": "a.k_proj_weight", "v": "a.v_proj_weight"},
    ),
}


def attention(case):
    torch.manual_seed(3)
    of, options, together, names = CASES[case]
    packed = Packed(of, **options).double().eval()
    packed.a.in_proj_bias.data.normal_()
    apart = Apart(packed, together)
    x, y = torch.randn(N, T, E).double(), torch.randint(0, C, (N, T))
    assert close(packed(x), apart(x), 1e-13)
    return packed, apart, names, (x, y)


def measured(model, batches, structure):
    asked = (ff.KFAC(sharing="reduce"),) if structure == "reduce" else structure
    found = measure(model, batches, asked)
    return found[0] if isinstance(found, tuple) else found


def turned(v, packed):
    """A vector of the packed model's as one of the other's: parts in the order of the layers."""
    a = {n.removeprefix("a."): t for n, t in v.items() if n.startswith("a.")}
    rows = [a[n] for n in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight") if n in a]
    sizes = [len(layer.bias) for layer in (packed.q, packed.k, *([] if packed.together else [packed.v]))]
    weights = rows if len(rows) > 1 else rows[0].split(sizes)
    found = {f"head.{n}": v[f"head.{n}"] for n in ("weight", "bias")}
    found |= {f"out.{n}": a[f"out_proj.{n}"] for n in ("weight", "bias")}
    for name, weight, bias in zip("qkv", weights, a["in_proj_bias"].split(sizes), strict=False):
        found |= {f"{name}.weight": weight, f"{name}.bias": bias}
    return found


@pytest.mark.parametrize("case", CASES)
def test_factors_of_parts_are_those_of_the_definition_in_any_split(case):
    packed, apart, names, (x, y) = attention(case)
    expected = hooked_factors(apart, x, y)
    for batches in ([(x, y)], [(x[:2], y[:2]), (x[2:], y[2:])]):
        fisher = measure(packed, batches, "kfac")
        factors = fisher.factors(**DOUBLE)
        for layer, name in names.items():
            (A, rows, B), found = expected[layer], factors[name]
            assert close(found[0], A / rows, EXACT) and close(found[1], B / N, EXACT)
    assert set(names.values()) < set(factors)
    weight = names["k"].partition("[")[0]
    assert "gram_: " in fisher.coverage[weight] and "of B [" in fisher.coverage["a.in_proj_bias"]
    leaders = {block.place.name: block.place.input_of for block in fisher.blocks}
    shared = {"queries-and-keys": ("k", "q"), "widths": ("v", "k")}.get(case)
    assert shared is None or leaders[names[shared[0]]] == names[shared[1]]


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "reduce"])
@pytest.mark.parametrize("case", CASES)
def test_parts_answer_as_layers_of_their_own(case, structure):
    packed, apart, _, batch = attention(case)
    one, two = (measured(model, [batch], structure) for model in (packed, apart))
    v = {n: torch.randn(s).double() for n, s in one.shapes.items()}
    w = turned(v, apart)
    for mine, its in (
        (one @ v, two @ w),
        (one.solve(v, 0.1), two.solve(w, 0.1)),
        (one.diagonal(**DOUBLE), two.diagonal(**DOUBLE)),
    ):
        mine = turned(mine, apart)  # together: the sum of the keys' gradients is zero, but for rounding
        assert close(torch.cat([mine[n].flatten() for n in its]), torch.cat([its[n].flatten() for n in its]), 1e-9)
    assert one.logdet(0.1) == pytest.approx(two.logdet(0.1), rel=1e-10) and one.trace() == pytest.approx(two.trace(), rel=1e-11)
    assert close(one.eigenvalues(), two.eigenvalues(), 1e-10) and len(one.eigenvalues()) == one.num_parameters
    layers = one.by_layer()
    assert sum(layer.trace for layer in layers.values()) == pytest.approx(one.trace())
    assert sum(layer.num_parameters for layer in layers.values()) == one.num_parameters
    for prior_scale in (0.3, {"a": 0.2, "a.out_proj": 0.3, "head": 0.4}):
        scales = prior_scale
        if isinstance(scales, dict):
            scales = {"q": 0.2, "k": 0.2, "out": 0.3, "head": 0.4} | ({} if apart.together else {"v": 0.2})
        nats = ff.information_in_weights(one, packed, prior_scale=prior_scale, beta=0.1).nats
        assert nats == pytest.approx(ff.information_in_weights(two, apart, prior_scale=scales, beta=0.1).nats, rel=1e-9)


def test_a_fitted_prior_is_one_for_all_parts_of_a_layer():
    packed, _, _, batch = attention("three")
    info = ff.information_in_weights(measure(packed, [batch], "kfac"), packed, prior_scale="fit", beta=0.1)
    again = ff.information_in_weights(info.fisher, packed, prior_scale=info.prior_scales, beta=0.1)
    layer = info.by_layer()["a"]
    assert layer.num_parameters == 3 * E * (E + 1) and again.nats == pytest.approx(info.nats)
    squares = sum(float(p.detach().square().sum()) for p in (packed.a.in_proj_weight, packed.a.in_proj_bias))
    assert layer.squared_distance == pytest.approx(squares)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("case", CASES)
def test_runs_pool_and_files_are_bit_exact(case, structure, tmp_path):
    packed, _, names, (x, y) = attention(case)
    asked = (ff.KFAC(),) if structure == "kfac" else (ff.EKFAC(basis=measure(packed, [(x, y)], "kfac")),)
    (a,), (b,), (whole,) = (measure(packed, [(x[p], y[p])], asked) for p in (slice(0, 2), slice(2, N), slice(0, N)))
    pooled, v = a + b, torch.randn(whole.num_parameters).double()
    pooled.save(tmp_path / "f")
    again = ff.load(tmp_path / "f")
    assert close(pooled @ v, whole @ v, EXACT) and torch.equal(again @ v, pooled @ v)
    assert again.coverage == pooled.coverage and again.factors().keys() == whole.factors().keys()
    with safe_open(tmp_path / "f", "pt") as file:
        keys = set(file.keys())
    shared = {"queries-and-keys": "k", "widths": "v"}.get(case)
    for layer, name in names.items():
        assert f"{name}.B" in keys and (f"{name}.A" in keys) == (layer != shared)


def test_inverses_and_samples_have_the_parts():
    packed, _, names, batch = attention("three")
    fisher = measure(packed, [batch], "kfac")
    damped = fisher.factored(0.1)
    for name in names.values():
        for factor, inverse in zip(damped.factors(**DOUBLE)[name], fisher.inverse(0.1, **DOUBLE)[name], strict=True):
            assert close(factor @ inverse, torch.eye(len(factor)).double(), 1e-9)
    draws = fisher.sample(2000, damping=1.0, generator=torch.Generator().manual_seed(0), **DOUBLE)["a.in_proj_weight"]
    expected = torch.stack([fisher.solve(e, 1.0) for e in torch.eye(fisher.num_parameters).double()]).diagonal()
    expected = dict(zip(fisher.names, expected.split([s.numel() for s in fisher.shapes.values()]), strict=True))
    assert float((draws.var(0).flatten() / expected["a.in_proj_weight"] - 1).abs().max()) < 0.2


def test_the_plan_has_a_row_for_each_part():
    packed, apart, names, batch = attention("memory")
    one, two = (ff.plan(model, batch, "kfac") for model in (packed, apart))
    rows = {row.names[0]: row for row in one.rows}
    others = {row.names[0].removesuffix(".weight"): row for row in two.rows}
    for layer, name in names.items():
        mine, its = rows[name], others[layer]
        assert (mine.bytes, mine.flops, mine.holds, mine.way) == (its.bytes, its.flops, its.holds, its.way)
        assert mine.names[1] == name.replace("weight", "bias")
    assert one.total_bytes == two.total_bytes and one.flops == two.flops


class Mixed(nn.Module):
    """Tables and kernels, two of each: ``packed`` in one tensor."""

    def __init__(self, packed):
        super().__init__()
        torch.manual_seed(5)
        tables, kernels = torch.randn(7 + 5, E), torch.randn(3 + 2, E, 2)
        self.packed, self.head = packed, nn.Linear(5, C)
        self.tables, self.kernels = (
            nn.Parameter(whole) if packed else nn.ParameterList(part.clone() for part in whole.split(sizes))
            for whole, sizes in ((tables, (7, 5)), (kernels, (3, 2)))
        )

    def forward(self, ids):
        """[N, T, C]."""
        (a, b), (k, m) = (self.tables.split((7, 5)), self.kernels.split((3, 2))) if self.packed else (self.tables, self.kernels)
        h = (F.embedding(ids, a) + F.embedding(ids % 5, b)).mT
        return self.head(torch.cat([F.conv1d(h, k, padding=1), F.conv1d(h.tanh(), m, padding=1)], 1)[..., 1:].mT.tanh())


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_tables_and_kernels_have_parts_too(structure):
    batch = torch.randint(0, 7, (N, T)), torch.randint(0, C, (N, T))
    one, two = (measured(Mixed(packed).double(), [batch], structure) for packed in (True, False))
    assert len(one.blocks) == len(two.blocks) == 5
    assert "1 part of " in one.coverage["tables"] and "1 part of " in one.coverage["kernels"]
    a = one.diagonal(**DOUBLE)
    b = two.diagonal(**DOUBLE)
    for name in ("tables", "kernels"):
        assert close(a[name], torch.cat([b[f"{name}.{k}"] for k in range(2)]), EXACT)
    assert one.logdet(0.1) == pytest.approx(two.logdet(0.1), rel=1e-10)


class Branches(nn.Module):
    """Three parts of one weight that see one tensor, or copies of it; one may be left out."""

    def __init__(self, copies):
        super().__init__()
        torch.manual_seed(5)
        self.w, self.b, self.head, self.copies = (
            nn.Parameter(torch.randn(6, 3)),
            nn.Parameter(torch.randn(6)),
            nn.Linear(2, C),
            copies,
        )
        self.left_out = None

    def forward(self, x):
        """[N, T, C]."""
        ways = zip("qkv", self.w.chunk(3), self.b.chunk(3), strict=True)
        return self.head(sum(F.linear(x + 0 if self.copies else x, w, b).tanh() for n, w, b in ways if n != self.left_out))


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "reduce"])
@pytest.mark.parametrize("left_out", ["q", "k", None])
def test_parts_that_share_their_inputs_are_those_that_do_not(left_out, structure):
    x, y = torch.randn(6, 5, 3).double(), torch.randint(0, C, (6, 5))
    results = []
    for copies in (False, True):
        model = Branches(copies).double()
        results.append(measured(model, Batches(model, left_out, x, y), structure))
    shared, apart = results
    leaders = {block.place.name: block.place.input_of for block in shared.blocks}
    followers = {"w[2:4]", "w[4:6]"} if left_out is None else set()
    assert {name for name, leader in leaders.items() if leader == "w[0:2]"} == followers
    v = torch.randn(shared.num_parameters).double()
    assert close(shared @ v, apart @ v, EXACT) and close(shared.solve(v, 0.1), apart.solve(v, 0.1), 1e-9)


class OneBias(nn.Module):
    """Two layers whose biases are in one tensor; ``added``: one of them is added beside its layer."""

    def __init__(self, added):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(E, 3, bias=False), nn.Linear(E, 2, bias=False), nn.Linear(5, C)
        self.b, self.added = nn.Parameter(torch.randn(5)), added

    def forward(self, x):
        """[N, T, C]."""
        second = F.linear(x, self.second.weight) + self.b[3:] if self.added else F.linear(x, self.second.weight, self.b[3:])
        return self.head(torch.cat([F.linear(x, self.first.weight, self.b[:3]), second], -1).tanh())


@pytest.mark.parametrize("added", [False, True])
def test_a_bias_joins_the_weights_of_one_layer_with_all_its_parts_or_none(added):
    model, x, y = OneBias(added).double(), torch.randn(N, T, E).double(), torch.randint(0, C, (N, T))
    fisher, trace = measure(model, [(x, y)], "kfac"), measure(model, [(x, y)], "diagonal").trace()
    assert "exact [5, 5]" in fisher.coverage["b"] and fisher.factors()["first"][0].shape == (E, E)
    assert measure(model, [(x, y)], "ekfac").trace() == pytest.approx(trace, rel=1e-12)
    assert ff.information_in_weights(fisher, model, prior_scale="fit", beta=0.1).num_parameters == fisher.num_parameters


# -- stacks, whose entries the data choose


class Experts(nn.Module):
    """A stack of layers, the sign of the data chooses which; ``apart``: each a layer of its own. The last one nobody chooses."""

    def __init__(self, joined, apart=False):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(3, C, E)), nn.Parameter(torch.randn(3, C))
        self.head, self.joined = nn.Linear(C, C), joined
        if apart:
            self.layers = nn.ModuleList(nn.Linear(E, C, bias=joined) for _ in range(3))
            self.bias = None if joined else nn.Parameter(self.b.detach().clone())
            del self.w, self.b

    def expert(self, x, e):
        """Of rows."""
        if hasattr(self, "layers"):
            return self.layers[e](x) if self.joined else self.layers[e](x) + self.bias[e]
        return F.linear(x, self.w[e], self.b[e]) if self.joined else F.linear(x, self.w[e]) + self.b[e]

    def forward(self, x):
        """[N, T, C]."""
        rows = x.flatten(0, 1)
        out = torch.zeros(len(rows), C, dtype=x.dtype)
        for e, chosen in enumerate((rows[:, 0] > 0, rows[:, 0] <= 0)):
            mine = chosen.nonzero().squeeze(1)
            if len(mine):
                out = out.index_add(0, mine, self.expert(rows[mine], e).tanh())
        return self.head(out.view(*x.shape[:2], C))


def experts(joined):
    stack, apart = Experts(joined).double(), Experts(joined, apart=True).double()
    with torch.no_grad():
        for e, layer in enumerate(apart.layers):
            layer.weight.copy_(stack.w[e])
            if joined:
                layer.bias.copy_(stack.b[e])
        if not joined:
            apart.bias.copy_(stack.b)
    apart.head = copy.deepcopy(stack.head)
    x, y = torch.randn(N, T, E).double(), torch.randint(0, C, (N, T))
    x[:2, :, 0] = x[:2, :, 0].abs()  # the first batch asks the first expert alone
    x[2, 0, 0] = -1.0
    return stack, apart, x, y


@pytest.mark.parametrize("structure", ["kfac", "reduce", "ekfac"])
@pytest.mark.parametrize("joined", [True, False])
def test_experts_that_the_first_batch_does_not_ask_have_blocks(joined, structure):
    stack, apart, x, y = experts(joined)
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    one, whole = (measured(stack, data, structure) for data in (batches, [(x, y)]))
    apart.layers[2].requires_grad_(False)
    two = measured(apart, [(x, y)], structure)
    v = {n: torch.randn(s).double() for n, s in one.shapes.items()}
    w = {f"head.{n}": v[f"head.{n}"] for n in ("weight", "bias")} | {f"layers.{e}.weight": v["w"][e] for e in range(2)}
    w |= {f"layers.{e}.bias": v["b"][e] for e in range(2)} if joined else {"bias": v["b"]}
    a, b, c = one @ v, whole @ v, two @ w
    assert all(close(a[n], b[n], 1e-10) for n in a)
    assert all(close(a["w"][e], c[f"layers.{e}.weight"], 1e-10) for e in range(2)) and not a["w"][2].any()
    assert close(a["b"][:2], torch.stack([c[f"layers.{e}.bias"] for e in range(2)]) if joined else c["bias"][:2], 1e-10)
    assert close(one.solve(v, 0.5)["w"][2], 2 * v["w"][2], EXACT) and one.trace() == pytest.approx(two.trace())
    assert ("b" in one.coverage and "exact" not in one.coverage["b"]) == joined
    assert structure == "ekfac" or torch.equal((one + whole).diagonal()["w"][2], torch.zeros(C, E))


@pytest.mark.parametrize("joined", [True, False])
def test_a_run_goes_on_from_a_checkpoint(joined, tmp_path):
    stack, _, x, y = experts(joined)
    with pytest.raises(OSError, match="the data are gone"):
        measure(stack, breaking_off(x, y), "kfac", checkpoint=tmp_path / "c")
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    resumed, whole = measure(stack, batches, "kfac", checkpoint=tmp_path / "c"), measure(stack, batches, "kfac")
    v = torch.randn(whole.num_parameters).double()
    assert close(resumed @ v, whole @ v, EXACT) and resumed.num_samples == N


class Rows(nn.Module):
    """Uses rows of a weight, which ones may change."""

    def __init__(self, parts):
        super().__init__()
        self.w, self.head, self.parts = nn.Parameter(torch.randn(C, E)), nn.Linear(E, C), parts

    def forward(self, x):
        """[N, T, C]."""
        return self.head(torch.cat([F.linear(x, self.w[a:b]) for a, b in self.parts], -1)[..., :2] @ self.w.new_ones(2, E))


@pytest.mark.parametrize("parts", [[(0, 2)], [(2, 5)], [(0, 2), (3, 5)]], ids=str)
def test_parts_that_do_not_make_a_parameter_up_have_no_blocks(parts):
    model, x, y = Rows(parts).double(), torch.randn(N, T, E).double(), torch.randint(0, C, (N, T))
    fisher, diagonal = measure(model, [(x, y)], "kfac"), measure(model, [(x, y)], "diagonal")
    assert "exact [20, 20]" in fisher.coverage["w"]
    assert close(fisher.diagonal(**DOUBLE)["w"], diagonal.diagonal(**DOUBLE)["w"], EXACT)


@pytest.mark.parametrize("later", [[(0, 3), (3, 5)], [(0, 5)]], ids=str)
def test_other_parts_in_a_later_batch_are_refused(later):
    model, x, y = Rows([(0, 2), (2, 5)]).double(), torch.randn(N, T, E).double(), torch.randint(0, C, (N, T))

    def changing():
        yield x, y
        model.parts = later
        yield x, y

    with pytest.raises(ValueError, match=r"w: must be used as in the first batch, in the parts \['w\[0:2\]', 'w\[2:5\]'\], got"):
        measure(model, changing(), "kfac")


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("elsewhere", ["other positions", "before"])
def test_another_use_of_a_bias_in_a_later_batch_is_refused(structure, elsewhere):
    """Also where it has as many rows as the weight, which the backward pass comes to first."""

    def forward(m, x):
        if len(x) < N:
            return F.linear(x, m.w, m.b)
        return F.linear(x.mean(1, keepdim=True), m.w).expand(-1, T, -1) + m.b if elsewhere != "before" else F.linear(x + m.b, m.w)

    features = C if elsewhere == "before" else E
    model = Wrapped(forward, w=parameter(C, features), b=parameter(C))
    batches = [(torch.randn(n, T, features), torch.randint(0, C, (n, T))) for n in (N - 2, N)]
    with pytest.raises(ValueError, match="b: must be used with 'w' as in the first batch, got another use of it"):
        measure(model, batches, structure)


def test_blocks_must_make_a_parameter_up():
    packed, _, _, batch = attention("three")
    fisher = measure(packed, [batch], "kfac")
    for blocks in (fisher.blocks[1:], (*fisher.blocks, fisher.blocks[0])):
        with pytest.raises(ValueError, match="blocks must cover every parameter once"):
            ff.KFACFisher(blocks, fisher.diagonals, fisher._counts, fisher.shapes)


VIEWED = {
    "another order of the kernel's axes": ((4, 2, 2, 3), (4, 2, 3, 2), F.conv2d, (6, 2, 5, 5)),
    "a matrix as a kernel of one": ((3, 5), (3, 5, 1), F.conv1d, (6, 5, 4)),
    "a matrix as a depthwise kernel": ((3, 3), (3, 1, 3), lambda x, w: F.conv1d(x, w, groups=3), (6, 3, 7)),
    "a matrix as a kernel": ((4, 6), (4, 2, 3), F.conv1d, (6, 2, 7)),
    "one axis more": ((4, 2, 3), (4, 2, 3, 1), F.conv2d, (6, 2, 7, 4)),
    "a kernel of one as a matrix": ((4, 5, 1, 1), (4, 5), F.linear, (6, 5)),
}


@pytest.mark.parametrize("name", VIEWED)
def test_a_view_of_a_weight_has_the_block_of_what_it_is_viewed_as(name):
    shape, view, function, inputs = VIEWED[name]
    weight, data = torch.randn(shape).double(), [(torch.randn(inputs).double(), None)]
    viewed = Wrapped(lambda m, x: function(x, m.w.view(view)).flatten(1), w=nn.Parameter(weight.clone()))
    plain = Wrapped(lambda m, x: function(x, m.w).flatten(1), w=nn.Parameter(weight.view(view).clone()))
    for asked in (ff.KFAC(), ff.KFAC(sharing="reduce"), "ekfac", "gram"):
        one, other = (ff.fisher(m, data, asked, "exact", "gaussian", progress=False) for m in (viewed, plain))
        assert one.trace() == pytest.approx(other.trace(), rel=1e-12)
        assert close(one.diagonal(**DOUBLE)["w"].view(view), other.diagonal(**DOUBLE)["w"], 1e-12)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_a_bias_that_all_outputs_share_has_a_block_of_its_own(structure):
    model = Wrapped(
        lambda m, x: F.linear(x, m.w, m.b), w=nn.Parameter(torch.randn(3, 5).double()), b=nn.Parameter(torch.ones(1).double())
    )
    K, G = ff.fisher(model, [(torch.randn(8, 5).double(), None)], (structure, "gram"), "exact", "gaussian", progress=False)
    assert len(K.eigenvalues()) == K.num_parameters == 16
    assert close(K.diagonal(**DOUBLE)["b"], G.diagonal(**DOUBLE)["b"], 1e-12)
    assert K.solve(torch.ones(16).double(), damping=0.1).shape == (16,)


class Chosen(nn.Module):
    """Experts, each of which sees the rows that the data choose for it; the last of them sees none."""

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.ModuleList(nn.Linear(E, E) for _ in range(3)), nn.Linear(E, C)

    def forward(self, x):
        """[N, C]."""
        out, chosen = torch.zeros_like(x), (x[:, 0] > 0).long()
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, mine, expert(x[mine]).tanh())
        return self.head(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_expert_that_no_sample_chose_is_zero(dtype):
    """In EKFAC, too, which has no row to make its basis of."""
    model, x = Chosen().to(dtype), torch.randn(N, E, dtype=dtype)
    diagonal, ekfac = (measure(model, [(x, None)], structure, "exact") for structure in ("diagonal", "ekfac"))
    assert ekfac.by_layer()["experts.2"].trace == 0 and ekfac.trace() == pytest.approx(diagonal.trace(), rel=1e-5)
    damping, P = 0.1, sum(p.numel() for p in model.experts[2].parameters())
    others = float((ekfac.eigenvalues().double() + damping).log().sum())
    assert ekfac.logdet(damping) == pytest.approx(others, rel=1e-6)
    assert int((ekfac.eigenvalues() == 0).sum()) >= P
