# SPDX-License-Identifier: Apache-2.0
"""A KFAC Fisher made of factors from elsewhere is the one that the factors came from; what cannot be factors is refused."""

import curvlinops_factors
import networks
import pytest
import torch
from networks import Conv1D, Wrapped, double_vectors, measure, mlp, parameter
from oracle import close
from torch import nn

import fisherfast as ff

N, I, D, C, V, T = networks.N, networks.I, networks.D, networks.C, networks.V, networks.T
ROUND_TRIP = 1e-12  # a mean is a quotient, and comes back as one of a product


def images(n=N):
    return torch.randn(n, 4, 6, 6), torch.randint(0, C, (n,))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.Tanh(), nn.ConvTranspose2d(6, 4, 2, bias=False), nn.GroupNorm(2, 4),
        nn.Conv2d(4, 4, 1, bias=False), nn.Flatten(), nn.Linear(36, C, bias=False),
    )  # fmt: skip


def attention():
    return Wrapped(
        lambda m, x: m.head(m.attention(*(m.norm(f(x).tanh()) for f in (m.q, m.k, m.v)))[0]),
        q=nn.Linear(I, D), k=nn.Linear(I, D), v=nn.Linear(I, D), norm=nn.LayerNorm(D), attention=nn.MultiheadAttention(D, 1, batch_first=True),
        head=nn.Linear(D, C),
    )  # fmt: skip


def tables():
    return Wrapped(
        lambda m, ids: m.head(m.norm(m.square(m.table(ids)).tanh()) * m.scale),
        table=nn.Embedding(V, D), square=Conv1D(D, D), norm=nn.LayerNorm(D), scale=parameter(D), head=nn.Linear(D, C),
    )  # fmt: skip


def vocabulary():
    return nn.Sequential(nn.Conv2d(4, 12, 1, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())


CASES = {
    "vectors": (mlp, networks.vectors),
    "sequences": (mlp, networks.sequences),
    "convolutions": (convolutions, images),
    "attention": (attention, networks.sequences),
    "tables": (tables, networks.tokens),
    "vocabulary": (vocabulary, images),
}


def again(F, model, **changes):
    """``F`` by what it says of itself."""
    diagonal, blocks = F.diagonal(dtype=torch.float64), {block.place.weight: block for block in F.blocks}
    factors = F.factors(dtype=torch.float64)
    by_key = dict(zip(factors, (block for block in F.blocks if block.factors(torch.float64) is not None), strict=True))
    given = {
        "num_samples": F.num_samples,
        "diagonals": {name: diagonal[name] for name in F.diagonals},
        "exact": {name: block.moments.mean() for name, block in blocks.items() if block.factors(torch.float64) is None},
        "rows": {key: block.A.weight for key, block in by_key.items() if key in changes.get("factors", factors)},
        "transposed": [block.place.weight for block in by_key.values() if block.place.transposed],
        "num_positions": F.num_positions,
        "provenance": F.provenance,
        "aliases": F.aliases,
    }
    return ff.KFACFisher.from_factors(changes.pop("factors", factors), model, **given | changes)


def assert_same(F, G, tolerance=ROUND_TRIP):
    assert F.names == G.names and F.num_positions == G.num_positions and F.provenance == G.provenance
    generator, damping = torch.Generator().manual_seed(1), 1e-3
    v = {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in F.shapes.items()}
    for mine, other in ((G.diagonal(dtype=torch.float64), F.diagonal(dtype=torch.float64)), (G @ v, F @ v)):
        assert all(close(mine[name], other[name], tolerance) for name in F.names)
    assert all(close(G.solve(v, damping)[name], F.solve(v, damping)[name], 1e3 * tolerance) for name in F.names)
    assert G.trace() == pytest.approx(F.trace(), rel=tolerance)
    assert G.logdet(damping) == pytest.approx(F.logdet(damping), rel=tolerance)
    zero = 1e-9 * float(F.eigenvalues()[0])
    assert int((G.eigenvalues() > zero).sum()) == int((F.eigenvalues() > zero).sum())
    assert {name: one.trace for name, one in G.by_layer().items()} == pytest.approx(
        {name: one.trace for name, one in F.by_layer().items()}, rel=tolerance
    )


ASKED = [(case, asked) for case in CASES for asked in (ff.KFAC(), ff.KFAC(max_exact_dim=0))]
ASKED += [(case, ff.KFAC(sharing="reduce")) for case in CASES if case != "tables"] + [("vocabulary", ff.KFAC(max_factor_dim=3))]


@pytest.mark.parametrize(("case", "asked"), ASKED)
def test_round_trip(case, asked, tmp_path):
    build, data = CASES[case]
    model, batches = build().double(), [data(), data()]
    batches = [(x.double() if x.is_floating_point() else x, y) for x, y in batches]
    F, more = (measure(model, [batch], (asked,))[0] for batch in batches)
    G = again(F, model, sharing=asked.sharing)
    assert_same(F, G)
    assert_same(F, again(F, dict(model.named_parameters()), sharing=asked.sharing))
    assert_same(F + more, G + more)
    assert_same(more + F, more + G)
    G.save(tmp_path / "given")
    assert_same(F, ff.load(tmp_path / "given"))
    draws, expected = (one.sample(2, damping=1.0, generator=torch.Generator().manual_seed(3)) for one in (G, F))
    assert all(close(draws[name], expected[name], 1e-5) for name in F.names)
    info, other = (ff.information_in_weights(one, model, prior_scale=0.1, beta=1e-3) for one in (G, F))
    assert info.nats == pytest.approx(other.nats, rel=1e-9)


def test_rank_is_told_in_the_models_precision():
    model = nn.Sequential(nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, C))
    x = torch.randn(4, 3) @ torch.randn(3, 9)
    F = measure(model, [(x, torch.randint(0, C, (4,)))], "kfac")
    G = again(F, model)  # in float64, of float32 products
    zeros = int((F.eigenvalues() == 0).sum())
    assert zeros and int((G.eigenvalues() == 0).sum()) == zeros
    with pytest.warns(ff.FisherWarning):
        assert G.logdet() == -float("inf")


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_factors_of_curvlinops_are_the_fisher_that_we_measure(name):
    (model, _), (tensors, _) = curvlinops_factors.networks()[name], curvlinops_factors.stored()
    mine = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
    model.load_state_dict({key.removeprefix("weights."): t for key, t in mine.items() if key.startswith("weights.")})
    layers = {key[:-2] for key in mine if key.endswith(".A")}
    G = ff.KFACFisher.from_factors(
        {layer: (mine[f"{layer}.A"], mine[f"{layer}.B"]) for layer in layers}, model, num_samples=len(mine["x"])
    )
    F = measure(model, [(mine["x"], mine["y"])], "kfac")
    assert G.logdet(1e-3) == pytest.approx(F.logdet(1e-3), rel=1e-9)
    assert all(close(G.diagonal()[name], F.diagonal()[name], 1e-5) for name in F.names)


def test_ekfac_in_the_basis_of_given_factors():
    model, batch = convolutions().double(), images()
    data = [(batch[0].double(), batch[1])]
    F = measure(model, data, "kfac")
    expected, mine = (measure(model, data, (ff.EKFAC(basis=basis),))[0] for basis in (F, again(F, model)))
    assert mine.trace() == pytest.approx(expected.trace(), rel=1e-12)
    assert mine.logdet(1e-3) == pytest.approx(expected.logdet(1e-3), rel=1e-9)


def spoiled(F, key, side, change):
    factors = F.factors(dtype=torch.float64)
    factors[key] = tuple(change(one) if name == side else one for name, one in zip("AB", factors[key], strict=True))
    return factors


def with_entry(matrix, value):
    matrix[0, 1] = value
    return matrix


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (lambda F: {"factors": spoiled(F, "0", "A", lambda A: A[:, :-1])}, ValueError, r"factors\['0'\] must be A \[I, I\], .* got \[1, 4, 3\]"),
        (lambda F: {"factors": spoiled(F, "0", "A", lambda A: A[:-2, :-2])}, ValueError, r"'0\.weight' \[5, 3\], got \[1, 2, 2\] and \[1, 5, 5\]"),
        (lambda F: {"factors": spoiled(F, "0", "B", lambda B: B[:-1, :-1])}, ValueError, r"got \[1, 4, 4\] and \[1, 4, 4\]"),
        (lambda F: {"factors": spoiled(F, "0", "B", lambda B: B.expand(2, -1, -1))}, ValueError, r"got \[1, 4, 4\] and \[1, 2, 5, 5\]"),
        (lambda F: {"factors": spoiled(F, "0", "A", lambda A: with_entry(A, 9.0))}, ValueError, r"factors\['0'\], A, must be symmetric, got entries that differ by"),
        (lambda F: {"factors": spoiled(F, "0", "B", lambda B: -B)}, ValueError, r"factors\['0'\], B, must have no negative eigenvalue, got -"),
        (lambda F: {"factors": spoiled(F, "0", "B", lambda B: -B.diagonal())}, ValueError, "must have no negative eigenvalue, got -"),
        (lambda F: {"factors": spoiled(F, "0", "A", lambda A: with_entry(A, torch.nan))}, ValueError, "must be finite, got 1 entries"),
        (lambda F: {"factors": spoiled(F, "0", "A", lambda A: A.long())}, TypeError, r"factors\['0'\], A, must be a dense floating tensor, got torch\.int64"),
        (lambda F: {"factors": {"0": F.factors()["0"][0]}}, TypeError, r"factors\['0'\] must be a pair \(A, B\), got Tensor"),
        (lambda F: {"factors": F.factors() | {"9": F.factors()["0"]}}, ValueError, "got '9' with no weight"),
        (lambda F: {"factors": F.factors() | {"0.weight[0:6]": F.factors()["0"]}}, ValueError, r"got '0\.weight\[0:6\]' with no weight"),
        (lambda F: {"factors": F.factors() | {"0.weight": F.factors()["0"]}}, ValueError, "blocks must cover every parameter once"),
        (lambda F: {"factors": {k: v for k, v in F.factors().items() if k != "2"}}, ValueError, r"got none for \['2\.bias', '2\.weight'\]; pass the means"),
        (lambda F: {"factors": spoiled(F, "0", "A", lambda A: A[:-1, :-1])}, ValueError, r"got none for \['0\.bias'\]"),
        (lambda F: {"diagonals": {"0.bias": torch.ones(5)}}, ValueError, r"last column of A for each bias of 5 numbers beside '0\.weight', got none"),
        (lambda F: {"diagonals": {"9": torch.ones(5)}}, ValueError, r"diagonals must name some of .*, got \['9'\]"),
        (lambda F: {"rows": {"9": 3}}, ValueError, r"rows must name some of \['0', '2', '4'\], got \['9'\]"),
        (lambda F: {"rows": {"0": 0}}, ValueError, r"rows\['0'\] must be a finite number > 0, got 0"),
        (lambda F: {"transposed": ["0"]}, ValueError, r"transposed must name some of .*, got \['0'\]"),
        (lambda F: {"sharing": "sum"}, ValueError, "sharing must be one of"),
        (lambda F: {"num_samples": 0}, ValueError, "num_samples must be >= 1, got 0"),
        (lambda F: {"num_positions": -1}, ValueError, "num_positions must be >= 0, got -1"),
        (lambda F: {"aliases": {"tied": "9"}}, ValueError, "aliases must map other names .* got 'tied': '9'"),
    ],
)  # fmt: skip
def test_refusals(change, error, reason):
    model = mlp()
    F = measure(model, [double_vectors()], "kfac")
    with pytest.raises(error, match=f"{reason}"):
        again(F, model, **change(F))


def test_refusals_beside_factors():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).double()
    F = measure(model, [(torch.randn(5, 3).double(), torch.randint(0, 4, (5,)))], "kfac")
    exact = {name: torch.eye(4, dtype=torch.float64) for name in ("1.weight", "1.bias")}
    for changed, reason in (
        ({"exact": exact | {"1.bias": torch.eye(3)}}, r"exact\['1\.bias'\] must be \[4, 4\] of its 4 numbers, got \[3, 3\]"),
        ({"exact": exact | {"1.bias": -torch.eye(4)}}, r"exact\['1\.bias'\] must have no negative eigenvalue, got -1"),
        ({"exact": {}, "diagonals": {"1.bias": torch.ones(4)}}, r"got none for \['1\.weight'\]"),
        (
            {"exact": {}, "diagonals": dict.fromkeys(exact, torch.ones(3))},
            r"diagonals\['1\.weight'\] must be \(4,\) as in model, got \(3,\)",
        ),
        ({"exact": {}, "diagonals": dict.fromkeys(exact, -torch.ones(4))}, "from_factors: '1.weight' must be >= 0"),
        ({"exact": exact, "diagonals": {"1.bias": torch.ones(4)}}, "blocks must cover every parameter once"),
    ):
        with pytest.raises(ValueError, match=reason):
            again(F, model, **changed)
    for wrong, reason in (
        (list(F.names), "model must be a module or .* got list"),
        ({"w": 3}, r"model\['w'\] must be a dense floating tensor, got int"),
    ):
        with pytest.raises(TypeError, match=reason):
            again(F, wrong)


def test_small_parameters_of_a_separate_bias():
    """A library that gives the bias a block of its own says the block B, that of its gradients."""
    model = nn.Linear(3, 4).double()
    A, B = (matrix @ matrix.mT for matrix in (torch.randn(3, 7).double(), torch.randn(4, 7).double()))
    F = ff.KFACFisher.from_factors({"weight": (A, B)}, model, num_samples=7, exact={"bias": B})
    dense = torch.block_diag(torch.kron(B, A), B)
    assert F.logdet(0.1) == pytest.approx(float(torch.logdet(dense + 0.1 * torch.eye(16))), rel=1e-10)


@pytest.mark.parametrize("of_several", [False, True])
def test_gram_of_gradients(of_several, tmp_path):
    model, (x, y) = mlp(), double_vectors()
    F = measure(model, [(x, y)], "gram", "exact" if of_several else "empirical")
    everything = {name: torch.cat([rows for _, rows in F._of(name)]).view(-1, *shape) for name, shape in F.shapes.items()}
    G = ff.GramFisher.from_gradients(everything, num_samples=len(x), provenance=F.provenance)
    v = {name: torch.randn(shape, dtype=torch.float64) for name, shape in F.shapes.items()}
    G.save(tmp_path / "given")
    for mine, other in ((G, F), (G + F, F), (F + G, F), (ff.load(tmp_path / "given"), F)):
        assert mine.trace() == pytest.approx(other.trace(), rel=1e-12)
        assert mine.logdet(1e-3) == pytest.approx(other.logdet(1e-3), rel=1e-12)
        assert all(close(mine.solve(v, 1e-3)[name], other.solve(v, 1e-3)[name], 1e-10) for name in v)
    if not of_several:
        assert ff.GramFisher.from_gradients(everything).num_samples == len(x)


@pytest.mark.parametrize(
    ("gradients", "error", "reason"),
    [
        ({}, ValueError, "gradients must be of one parameter and one sample at least, got none"),
        ({"w": torch.ones(0, 2)}, ValueError, "gradients must be of one parameter and one sample at least, got none"),
        (
            {"w": torch.ones(3, 2), "b": torch.ones(2)},
            ValueError,
            r"'b' must be \[M, \*parameter\], M = 3 as of the first, got \[2\]",
        ),
        ({"w": torch.full((3, 2), torch.nan)}, ValueError, "'w' must be finite, got 6 entries"),
        ({"w": torch.ones(3, 2).long()}, TypeError, r"'w' must be a floating tensor, got torch\.int64"),
    ],
)
def test_refused_gradients(gradients, error, reason):
    with pytest.raises(error, match=f"from_gradients: {reason}"):
        ff.GramFisher.from_gradients(gradients)
