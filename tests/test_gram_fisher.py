# SPDX-License-Identifier: Apache-2.0
"""The Gram Fisher is the matrix of all second moments of the sample gradients, and answers as that matrix does."""

import contextlib
import importlib
import math
import warnings

import networks
import oracle
import pytest
import torch
from networks import breaking_off, double_vectors, measure, mlp
from oracle import close
from torch import nn

import fisherfast as ff

gram = importlib.import_module("fisherfast.fisher.gram")
EXACT = 1e-11


class ScaledGradient(torch.autograd.Function):
    """The identity, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None


def dense(model, x, y, losses=oracle.cross_entropy, weight=None):
    """F itself, ``[P, P]``, by autograd, one sample at a time."""
    named = [p for p in model.parameters() if p.requires_grad]
    weight = torch.ones(len(x)) if weight is None else weight
    F = 0
    for n in range(len(x)):
        for share, loss in losses(model, x[n : n + 1], y[n : n + 1]):
            gradients = torch.autograd.grad(loss, named, retain_graph=True, allow_unused=True)
            s = torch.cat(
                [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(named, gradients, strict=True)]
            )
            F = F + float(weight[n]) * share * torch.outer(s, s)
    return F / float(weight.sum())


def diagonal_of(damping, G):
    """A damping for every parameter, by name, as a vector ``[P]``."""
    return torch.cat([torch.full((s.numel(),), damping[n], dtype=torch.float64) for n, s in G.shapes.items()])


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("name", networks.EVERY)
def test_columns_are_those_of_autograd_for_every_kind_of_network(name, weighted, monkeypatch):
    monkeypatch.setattr(gram, "_CHUNK_BYTES", 8 * 3 * 50)  # a few rows at a time, and rows of one parameter in several chunks
    model, x, y = networks.doubles(name)
    weight = (torch.rand(len(x)) + 0.1).double() if weighted else None
    parts = [slice(0, 2), slice(2, None)]
    G = measure(model, [(x[p], y[p]) if weight is None else (x[p], y[p], weight[p]) for p in parts], "gram")
    expected = dense(model, x, y, weight=weight)
    v = torch.randn(G.num_parameters).double()
    assert close(G @ v, expected @ v, EXACT)
    flat = torch.cat([part.flatten() for part in G.diagonal(dtype=torch.float64).values()])
    assert close(flat, expected.diagonal(), EXACT)
    assert G.trace() == pytest.approx(float(expected.trace()), rel=EXACT)


def test_exact_labels_give_a_row_for_every_column():
    model, (x, y) = mlp(), double_vectors()
    G = measure(model, [(x, None)], "gram", "exact")
    assert G.num_rows == 3 * 6 and close(
        G.eigenvalues(), torch.linalg.eigvalsh(dense(model, x, y, oracle.every_label)).flip(0), 1e-10
    )


@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
def test_the_diagonal_is_that_of_the_diagonal_structure(fisher_type):
    model, (x, _) = mlp(), double_vectors()
    data = [(x[:4], None), (x[4:], None)]
    options = {"draws": 3, "seed": 5} if fisher_type == "mc" else {}
    G, D = (measure(model, data, s, fisher_type, **options) for s in ("gram", "diagonal"))
    assert all(close(G.diagonal(dtype=torch.float64)[n], d, EXACT) for n, d in D.diagonal(dtype=torch.float64).items())


@pytest.mark.parametrize("N", [3, 40], ids=["fewer rows than parameters", "more"])
@pytest.mark.parametrize("damping", [0.05, {"0": 0.05, "2.weight": 0.3, "2.bias": 2.0}], ids=["one", "by parameter"])
def test_the_algebra_is_that_of_the_matrix(N, damping):
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 4)).double()
    x, y = double_vectors(N)
    G, F = measure(model, [(x, y)], "gram"), dense(model, x, y)
    each = (
        {"0.weight": 0.05, "0.bias": 0.05, "2.weight": 0.3, "2.bias": 2.0}
        if isinstance(damping, dict)
        else dict.fromkeys(G.names, 0.05)
    )
    damped = F + diagonal_of(each, G).diag()
    v = torch.randn(G.num_parameters).double()
    assert close(G.solve(v, damping), torch.linalg.solve(damped, v), 1e-9)
    assert G.logdet(damping) == pytest.approx(float(torch.linalg.slogdet(damped)[1]), rel=1e-10)
    values = G.eigenvalues()
    assert len(values) == G.num_parameters == sum(s.num_parameters for s in G.spectra())
    assert float((values - torch.linalg.eigvalsh(F).flip(0)).abs().max()) < 1e-12 * float(values[0])


def test_every_solve_has_its_own_damping():
    G = measure(mlp(), [double_vectors()], "gram")
    v = torch.randn(G.num_parameters).double()
    for damping in (0.1, 0.5, {n: 0.1 + k for k, n in enumerate(G.names)}, 0.1):
        each = damping if isinstance(damping, dict) else dict.fromkeys(G.names, damping)
        solved = G.solve(v, damping)
        assert close(G @ solved + diagonal_of(each, G) * solved, v, 1e-9)


def test_named_vectors_keep_their_dtype():
    G = measure(mlp(), [double_vectors()], "gram")
    v = {name: torch.randn(shape) for name, shape in G.shapes.items()}
    assert all(part.dtype == torch.float32 and part.shape == v[n].shape for n, part in G.solve(v, 0.1).items())


def test_draws_have_the_inverse_as_covariance():
    model = nn.Linear(2, 2, bias=False).double()
    x, y = torch.randn(5, 2).double(), torch.randint(0, 2, (5,))
    G, damping, n = measure(model, [(x, y)], "gram"), 0.3, 200_000
    draws = G.sample(n, damping=damping, generator=torch.Generator().manual_seed(0), dtype=torch.float64)["weight"].flatten(1)
    expected = torch.linalg.inv(dense(model, x, y) + damping * torch.eye(4).double())
    spread = (expected.diagonal().outer(expected.diagonal()) + expected.square()).sqrt() / n**0.5  # of an entry of the covariance
    assert float(((draws.mT @ draws / n - expected) / spread).abs().max()) < 5


def test_a_singular_fisher_says_so():
    G = measure(mlp(), [double_vectors()], "gram")
    with pytest.warns(ff.FisherWarning, match=f"{G.num_parameters - 6} of {G.num_parameters} eigenvalues"):
        assert G.logdet() == -math.inf
    for method in (G.solve, lambda v: G.sample(1)):
        with pytest.raises(ValueError, match="damping must be > 0 for every parameter"):
            method(torch.zeros(G.num_parameters))


def test_a_regular_fisher_has_a_log_determinant_without_damping():
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    x, y = torch.randn(40, 3).double(), torch.randn(40, 1).double()
    G = ff.fisher(model, [(x, y)], "gram", "empirical", "gaussian", progress=False)
    s = [
        torch.cat([g.flatten() for g in torch.autograd.grad((model(x[n]) - y[n]).square().sum() / 2, list(model.parameters()))])
        for n in range(40)
    ]
    F = torch.stack(s).mT @ torch.stack(s) / 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert G.logdet() == pytest.approx(float(torch.linalg.slogdet(F)[1]), rel=1e-8)


FILED = [
    "mlp-inplace-relu",
    "experts",
    "embedding-padding",
    "conv-groups-same",
    "conv-called-twice",
    "chunks-of-one-weight",
    "weight-used-twice",
]
TIED = next(name for name in networks.COVERED if name.startswith("tied"))


@pytest.mark.parametrize("name", [*FILED, TIED, "scale-of-a-weight"])
def test_a_file_gives_the_same_object(name, tmp_path):
    model, x, y = networks.doubles(name)
    G = measure(model, [(x, y)], "gram")
    G.save(tmp_path / "f.safetensors")
    again = ff.load(tmp_path / "f.safetensors")
    assert torch.equal(again.dual(), G.dual()) and again.provenance == G.provenance and again.shapes == G.shapes
    assert again.logdet(0.1) == G.logdet(0.1) and dict(again.coverage) == dict(G.coverage)


@pytest.mark.parametrize("name", [name for name in networks.COVERED if name.startswith("tied")])
def test_weights_and_draws_of_a_tied_table_have_all_their_digits(name):
    """The trace of the diagonal, whose op adds the products of the uses, is that of the sample gradients themselves."""
    model, x, _ = networks.doubles(name)
    weight = torch.rand(len(x), dtype=torch.float64) + 0.1
    G, D = (measure(model, [(x, None, weight)], structure, "mc", draws=3) for structure in ("gram", "diagonal"))
    assert D.trace() == pytest.approx(G.trace(), rel=1e-12)


def test_pooling_is_measuring_together(tmp_path):
    model, (x, y) = mlp(), double_vectors()
    A, B, whole = (
        measure(model, [(x[:2], y[:2])], "gram"),
        measure(model, [(x[2:], y[2:])], "gram"),
        measure(model, [(x, y)], "gram"),
    )
    assert close((A + B).dual(), whole.dual(), EXACT) and (A + B).num_samples == 6
    with pytest.raises(ValueError, match="all_reduce must be of sums"):
        A.all_reduce()
    with pytest.raises(ValueError, match="must have the same fisher_type"):
        A + measure(model, [(x, None)], "gram", "exact")


def test_a_checkpoint_is_gone_on_from(tmp_path):
    model, (x, y) = mlp(), double_vectors()
    with pytest.raises(OSError, match="the data are gone"):
        measure(model, breaking_off(x, y), "gram", checkpoint=tmp_path / "c")
    G = measure(model, [(x[:2], y[:2]), (x[2:], y[2:])], "gram", checkpoint=tmp_path / "c")
    assert torch.equal(G.dual(), measure(model, [(x[:2], y[:2]), (x[2:], y[2:])], "gram").dual())


def test_beside_other_requests():
    model, (x, y) = mlp(), double_vectors()
    G, K, D = measure(model, [(x, y)], (ff.Gram(), ff.KFAC(), ff.Diagonal()))
    assert G.trace() == pytest.approx(D.trace(), rel=EXACT) and K.trace() > 0


def test_a_batch_that_is_not_finite_adds_nothing():
    model, (x, y) = mlp(), double_vectors()
    with ff.collect(model, ff.Gram(), fisher_type="empirical") as stats:
        for bad in (False, True, False):
            factor = torch.ones(6).double()
            factor[2] = math.nan if bad else 1.0
            z = ScaledGradient.apply(model(x), factor.unsqueeze(1))
            with pytest.raises(ff.NonFiniteError) if bad else contextlib.nullcontext():
                stats.backward(torch.nn.functional.cross_entropy(z, y, reduction="none"))
    assert stats.result().num_rows == 12


def test_too_many_rows_are_refused_before_they_are_kept():
    x, _ = double_vectors()
    with pytest.raises(ValueError, match=r"at most max_rows = 17, got 18 \(3 a sample\)"):
        measure(mlp(), [(x, None)], (ff.Gram(max_rows=17),), "exact")


def test_what_was_handed_in_may_change_afterwards():
    model, (x, y) = mlp(), double_vectors()
    expected = measure(model, [(x.clone(), y)], "gram").dual()

    def reusing():
        buffer = x[:3].clone()
        yield buffer, y[:3]
        buffer.copy_(x[3:])
        yield buffer, y[3:]

    assert close(measure(model, reusing(), "gram").dual(), expected, EXACT)


def test_rows_are_kept_where_they_are_smaller():
    model = nn.Sequential(nn.Linear(31, 37, bias=False), nn.Tanh(), nn.Linear(37, 2, bias=False)).double()
    x, y = torch.randn(5, 30, 31).double(), torch.randint(0, 2, (5, 30))
    (hidden,), (head,) = measure(model, [(x[:, :3], y[:, :3])], "gram").pieces.values()
    assert hidden.rows.g.shape == (5, 3, 37) and head.rows.g.shape == (5, 1, 2 * 37)


def test_information_in_the_weights_of_the_whole_model():
    model, (x, y) = mlp(), double_vectors()
    G = measure(model, [(x, y)], "gram")
    found = ff.information_in_weights(G, model, prior_scale=0.5, beta=0.01)
    s = G.eigenvalues() * 0.25 / 0.01
    distance = math.fsum(float(p.detach().square().sum()) for p in model.parameters())
    assert found.nats == pytest.approx(distance / 0.5 + 0.5 * float((s.log1p() - s / (1 + s)).sum()), rel=1e-10)
    with pytest.raises(ValueError, match="prior_scale must be one number for a block"):
        ff.information_in_weights(G, model, prior_scale={n: 1.0 + k for k, n in enumerate(G.names)}, beta=0.01)


def test_the_best_of_kfac_ekfac_and_diagonal_is_no_nearer_than_the_truth():
    """Hadamard: a diagonal of F in any orthonormal basis has the larger log-determinant."""
    model, (x, y) = mlp(), double_vectors(30)
    exact = measure(model, [(x, y)], "gram")
    for structure in ("diagonal", "ekfac"):
        assert measure(model, [(x, y)], structure).logdet(0.1) >= exact.logdet(0.1) - 1e-9


def test_a_damping_that_is_lost_beside_the_fisher_is_refused():
    model = torch.nn.Linear(3, 2).double()
    F = ff.fisher(model, [(torch.randn(40, 3).double(), None)], "gram", progress=False)
    v = torch.ones(F.num_parameters).double()
    with pytest.raises(ValueError, match="damping must be above the rounding of F's largest eigenvalue, got 1e-22"):
        F.solve(v, damping=1e-22)
    assert torch.allclose(F @ F.solve(v, damping=1e-3) + 1e-3 * F.solve(v, damping=1e-3), v)
