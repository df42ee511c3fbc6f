# SPDX-License-Identifier: Apache-2.0
"""Weights that are stored by heads, ``[H, D, K]``, and used as one matrix: what is measured is that matrix's, numbered as it is stored.

And other copies of weights that are turned or cut before they are used.
"""

import itertools
import math

import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional

import fisherfast as ff
from fisherfast.rules import Window

D, H, K, V = 7, 3, 5, 11
EXACT = 1e-12
# How a projection to heads is stored: the axes of its [H, K, D] in the order of the parameter's.
STORED = {"hdk": (0, 2, 1), "dhk": (2, 0, 1), "hkd": (0, 1, 2), "khd": (1, 0, 2), "dkh": (2, 1, 0)}


class Plain(nn.Module):
    """Attention with one matrix for each projection."""

    def __init__(self):
        super().__init__()
        self.table, self.logits = nn.Embedding(V, D), nn.Linear(D, V)
        self.q, self.k, self.v = (nn.Linear(D, H * K) for _ in range(3))
        self.o = nn.Linear(H * K, D)

    def forward(self, ids):
        """Logits ``[N, V]`` after the last position."""
        h = self.table(ids)
        q, k, v = (self.project(h, name).unflatten(-1, (H, K)).transpose(1, 2) for name in "qkv")
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.logits(h + self.mixed(heads))[:, -1]

    def project(self, h, name):
        """``[N, T, H K]``."""
        return getattr(self, name)(h)

    def mixed(self, heads):
        """``[N, T, D]`` of ``[N, T, H, K]``."""
        return self.o(heads.flatten(2))


class ByHeads(Plain):
    """The same network, its projections stored by heads; reshaped to a matrix, or left to einsum."""

    def __init__(self, plain, stored, einsum):
        super().__init__()
        self.load_state_dict(plain.state_dict())
        self.stored, self.einsum = stored, einsum
        for name in "qkv":
            layer = getattr(self, name)
            weight, bias = self.as_stored(layer.weight, stored), layer.bias.view(H, K)
            layer.weight, layer.bias = (
                nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format)),
                nn.Parameter(bias),
            )
        self.o.weight = nn.Parameter(self.o.weight.detach().view(D, H, K).permute(1, 2, 0).contiguous())

    @staticmethod
    def as_stored(matrix, stored):
        """``[H K, D]`` in the order of the parameter."""
        return matrix.view(H, K, -1).permute(STORED[stored])

    def project(self, h, name):
        """See ``Plain``."""
        layer = getattr(self, name)
        if self.einsum:
            return (torch.einsum(f"ntd,{self.stored}->nthk", h, layer.weight) + layer.bias).flatten(2)
        rows_first = layer.weight.permute([self.stored.index(axis) for axis in "hkd"])
        return functional.linear(h, rows_first.reshape(H * K, D), layer.bias.reshape(-1))

    def mixed(self, heads):
        """See ``Plain``."""
        if self.einsum:
            return torch.einsum("nthk,hkd->ntd", heads, self.o.weight) + self.o.bias
        return functional.linear(heads.flatten(2), self.o.weight.permute(2, 0, 1).reshape(D, H * K), self.o.bias)

    def back(self, vectors):
        """Vectors of this network as those of the plain one."""
        found = {**vectors}
        for name in "qkv":
            axes = [self.stored.index(axis) for axis in "hkd"]
            found[f"{name}.weight"] = vectors[f"{name}.weight"].permute(axes).reshape(H * K, D)
            found[f"{name}.bias"] = vectors[f"{name}.bias"].reshape(-1)
        found["o.weight"] = vectors["o.weight"].permute(2, 0, 1).reshape(D, H * K)
        return found


def pair(stored, einsum):
    plain = Plain().double()
    batches = [(torch.randint(V, (n, 4)), torch.randint(V, (n,))) for n in (5, 3)]
    return plain, ByHeads(plain, stored, einsum).double(), batches


def measured(model, batches, **options):
    return ff.fisher(model, batches, fisher_type="empirical", progress=False, **options)


@pytest.mark.parametrize("einsum", [False, True], ids=["reshaped", "einsum"])
@pytest.mark.parametrize("stored", STORED)
def test_diagonal_is_that_of_the_matrix(stored, einsum):
    plain, by_heads, batches = pair(stored, einsum)
    found, expected = (measured(model, batches) for model in (by_heads, plain))
    assert oracle.error(by_heads.back(found.diagonal(dtype=torch.float64)), expected.diagonal(dtype=torch.float64)) < EXACT
    assert set(found.coverage.ways.values()) == set(expected.coverage.ways.values())  # by the same ops, none by the chain rule


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("stored", ["hdk", "dhk", "hkd"])
def test_kronecker_blocks_are_those_of_the_matrix(stored, structure, tmp_path):
    plain, by_heads, batches = pair(stored, einsum=False)
    found, expected = (measured(model, batches, structure=structure) for model in (by_heads, plain))
    found.save(tmp_path / "heads.safetensors")
    found = ff.load(tmp_path / "heads.safetensors")
    for layer, factors in expected.factors().items():
        for mine, theirs in zip(found.factors()[layer], factors, strict=True):
            assert mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=1e-6), layer
    v = {name: torch.randn(shape, dtype=torch.float64) for name, shape in found.shapes.items()}
    for function in (lambda F, v: F @ v, lambda F, v: F.solve(v, 0.1), lambda F, v: F.diagonal(dtype=torch.float64)):
        assert oracle.error(by_heads.back(function(found, v)), function(expected, by_heads.back(v))) < 1e-9
    assert found.logdet(0.1) == pytest.approx(expected.logdet(0.1))
    if structure == "kfac":
        diagonals = {name: found.diagonal(dtype=torch.float64)[name] for name in found.diagonals}
        given = ff.KFACFisher.from_factors(found.factors(dtype=torch.float64), by_heads, num_samples=8, diagonals=diagonals)
        assert oracle.error(given.solve(v, 0.1), found.solve(v, 0.1)) < EXACT


@pytest.mark.parametrize("einsum", [False, True], ids=["reshaped", "einsum"])
def test_sample_gradients_are_those_of_the_matrix(einsum):
    plain, by_heads, batches = pair("hdk", einsum)
    found, expected = (measured(model, batches, structure="gram") for model in (by_heads, plain))
    v = {name: torch.randn(shape, dtype=torch.float64) for name, shape in found.shapes.items()}
    assert oracle.error(by_heads.back(found @ v), expected @ by_heads.back(v)) < EXACT
    norms = []
    for model in (by_heads, plain):
        with ff.collect(model, ff.PerSampleNorm(), fisher_type="empirical") as stats:
            for ids, y in batches:
                stats.backward(functional.cross_entropy(model(ids), y, reduction="none"))
        norms.append(stats.result().squared_norms)
    assert torch.allclose(*norms, rtol=EXACT)


class Turned(nn.Module):
    """One matrix, a copy of the parameter's numbers, that is used as it is and turned."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(D, H, K))

    def forward(self, x):
        """Logits ``[N, H K]``."""
        matrix = self.w.permute(1, 2, 0).reshape(H * K, D).clone()
        return x @ matrix.T + functional.linear(x.sin(), matrix)


def test_what_a_view_is_of_is_no_view_of_the_parameter():
    """Torch asks a view for its base, which is the copy, and not laid out as the parameter."""
    model, x, y = Turned().double(), torch.randn(6, D, dtype=torch.float64), torch.randint(V, (6,))
    gradients = torch.stack([gradient["w"] for [(_, gradient)] in oracle.sample_gradients(model, x, y)])
    found = measured(model, [(x, y)]).diagonal(dtype=torch.float64)
    assert oracle.error(found, {"w": gradients.square().mean(0)}) < EXACT


class Packed(nn.Module):
    """Queries, keys and values in one parameter ``[3, H, D, K]``."""

    def __init__(self):
        super().__init__()
        self.w, self.o = nn.Parameter(torch.randn(3, H, D, K)), nn.Linear(H * K, V)

    def forward(self, x):
        """Logits ``[N, V]``."""
        q, k, v = (functional.linear(x, w.transpose(1, 2).reshape(H * K, D)) for w in self.w)
        return self.o(q.tanh() * k.sigmoid() + v)


def test_parts_by_heads_have_blocks_of_their_own():
    model, x, y = Packed().double(), torch.randn(6, D, dtype=torch.float64), torch.randint(V, (6,))
    F = measured(model, [(x, y)], structure="kfac")
    assert [block.place.name for block in F.blocks][:3] == ["w[0]", "w[1]", "w[2]"]
    for part in range(3):
        block = F.blocks[part]
        assert block.B.shape == (1, H * K, H * K) and block.A.shape == (1, D, D)
    by_sample = torch.stack([gradient["w"] for [(_, gradient)] in oracle.sample_gradients(model, x, y)])
    gradients = by_sample.mT.reshape(6, 3, H * K, D)  # g x^T: of one position each, so that g is told from it
    g = torch.einsum("npod,nd->npo", gradients, x / (x * x).sum(1, keepdim=True))
    for part in range(3):
        _, B = F.blocks[part].factors(torch.float64)
        assert torch.allclose(g[:, part].mT @ g[:, part] / 6, B[0], rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 1, 3), (1, 2, 3), (2, 3, 5, 7), (4, 3)], ids=str)
def test_matrix_finds_the_axes_of_rows(shape):
    whole = torch.arange(math.prod(shape)).view(shape)
    for order in itertools.permutations(range(len(shape))):
        turned = whole.permute(order)
        for split in range(1, len(shape)):
            used = turned.reshape(math.prod(turned.shape[:split]), -1)
            window = Window.of(turned, whole).reshaped(tuple(used.shape))
            assert torch.equal(window.used(whole), used)
            found = window.matrix(shape)
            if found is None:  # columns must be in their order
                assert list(order[split:]) != sorted(order[split:])
                continue
            entries, rows = found
            part = entries.of(whole)
            first = part.permute(*rows, *(axis for axis in range(part.dim()) if axis not in rows))
            assert torch.equal(first.reshape(used.shape), used)


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: x @ w.to(x.dtype).t(),
        lambda x, w: functional.linear(x, w.double().unsqueeze(0).flatten(0, 1)),
        lambda x, w: torch.cat([x @ part.mT for part in w.to(x.dtype).chunk(2)], 1),
    ],
)
def test_views_of_copies_are_parts_of_the_parameter(use):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(V, D))  # a copy in float64 where it is used

        def forward(self, x):
            """Logits ``[N, V]``."""
            return use(x, self.w)

    model, x, y = Model(), torch.randn(6, D, dtype=torch.float64), torch.randint(V, (6,))
    before = model.w.detach().clone()
    found = measured(model, [(x, y)])
    expected = torch.stack([gradient["w"] for [(_, gradient)] in oracle.sample_gradients(model, x, y)]).double()
    assert oracle.error(found.diagonal(), {"w": expected.square().mean(0).float()}) < 1e-6
    assert found.coverage == {"w": "linear_sq_"} and torch.equal(model.w, before)


def test_a_copy_that_is_written_into_leaves_the_parameter_as_it_is():
    model = nn.Linear(D, V, bias=False)
    before = model.weight.detach().clone()

    class Zeroed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            """Logits ``[N, V]``."""
            w = self.inner.weight.clone()
            w.t_().mul_(0.5)
            return x @ w + x @ self.inner.weight.clone().relu_().T

    measured(Zeroed(), [(torch.randn(3, D), torch.randint(V, (3,)))])
    assert torch.equal(model.weight, before)
