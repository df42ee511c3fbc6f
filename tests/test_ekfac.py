# SPDX-License-Identifier: Apache-2.0
"""EKFAC: its trace is that of the exact diagonal, its values are sample gradients in the basis, squared; and two passes are one data set."""

import copy
import importlib
import math

import networks
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from networks import double_vectors, measure, mlp
from oracle import close
from torch import nn

import fisherfast as ff
from fisherfast.fisher.blocks.exact import ExactBlock

eigen_sums = importlib.import_module("fisherfast.fisher.blocks.eigen_sums")
EXACT = 1e-11


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("name", networks.COVERED)
def test_the_trace_of_every_layer_is_that_of_the_diagonal(name, weighted):
    model, x, y = networks.doubles(name)
    batch = (x, y, torch.rand(len(x))) if weighted else (x, y)
    E, D = measure(model, [batch], "ekfac"), measure(model, [batch], "diagonal")
    assert E.trace() == pytest.approx(D.trace(), rel=EXACT)
    within = D.diagonal(dtype=torch.float64)
    for block in E.blocks:
        expected = float(block.place.matrix(within).sum())
        assert block.trace() == pytest.approx(expected, rel=EXACT, abs=EXACT * D.trace())


@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
def test_both_passes_see_the_same_labels(fisher_type):
    model, (x, _) = mlp().float(), double_vectors()
    data = [(x[:4].float(), None), (x[4:].float(), None)]
    E, D = (measure(model, data, s, fisher_type, seed=3) for s in ("ekfac", "diagonal"))
    assert E.trace() == pytest.approx(D.trace(), rel=1e-5)


def sample_gradients(model, x, y):
    """Each sample's ``{name: gradient}``, by autograd."""
    named = dict(model.named_parameters())
    for n in range(len(x)):
        ((_, loss),) = oracle.cross_entropy(model, x[n : n + 1], y[n : n + 1])
        yield dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def dense(model, x, y, block):
    """The mean of ``s s^T`` over one block's numbers, ``[groups * O * D] * 2``, and the sample gradients ``[N, G, O, D]``."""
    matrices = torch.stack([block.place.matrix(gradients) for gradients in sample_gradients(model, x, y)])
    flat = matrices.flatten(1)
    return flat.mT @ flat / len(x), matrices


ORDERS = [pytest.param(order, id=order.name.lower()) for order in eigen_sums.Order]


def go(order, monkeypatch):
    """Every layer in this order, but for those that have only one."""
    monkeypatch.setattr(eigen_sums, "_cheapest", lambda products: order if order in products else next(iter(products)))


NETWORKS = [
    "mlp-inplace-relu", "linear-sequence", "time-first", "conv1d-addmm", "embedding-padding", "experts", "weight-used-twice",
    "conv-groups-same", "conv-one-and-three-axes", "conv-frames", "attention-cross", "attention-same-width", "bilinear",
]  # fmt: skip


@pytest.mark.parametrize("wide", [1, 10**9], ids=["padded", "dense"])  # as rows are of large factors, and of small ones
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_values_are_the_second_moments_along_the_basis_in_every_order(name, order, wide, monkeypatch):
    go(order, monkeypatch)
    monkeypatch.setattr(eigen_sums, "_WIDE", wide)
    model, x, y = networks.doubles(name)
    E = measure(model, [(x[:2], y[:2]), (x[2:], y[2:])], "ekfac")
    assert E.blocks
    for block in E.blocks:
        moments, G = dense(model, x, y, block)
        if isinstance(block, ExactBlock):
            assert close(block.moments.mean(), moments, EXACT)
            continue
        rotated = G if block.U is None else G @ block.U
        rotated = rotated if block.V is None else block.V.mT @ rotated
        assert close(block.values.mean(), rotated.square().mean(0), EXACT)


@pytest.mark.parametrize("order", ORDERS)
def test_a_large_output_factor_has_no_basis_of_its_own(order, monkeypatch):
    go(order, monkeypatch)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 11)).double()
    x, y = torch.randn(6, 2, 3).double(), torch.randint(0, 11, (6, 2))
    (E,) = measure(model, [(x, y)], (ff.EKFAC(max_factor_dim=8),))
    block = E.blocks[1]
    _, G = dense(model, x, y, block)
    assert block.V is None and close(block.values.mean(), (G @ block.U).square().mean(0), EXACT)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("chunk", [1, 10**9])
@pytest.mark.parametrize("name", ["mlp-inplace-relu", "experts"])
def test_chunks_change_nothing(name, chunk, weighted, monkeypatch):
    model, x, y = networks.doubles(name, 7)
    batch = (x, y, torch.rand(7).double()) if weighted else (x, y)
    expected = measure(model, [batch], "ekfac").diagonal(dtype=torch.float64)
    monkeypatch.setattr(eigen_sums, "_CHUNK_BYTES", chunk)
    found = measure(model, [batch], "ekfac").diagonal(dtype=torch.float64)
    assert all(close(found[n], expected[n], EXACT) for n in expected)


@pytest.mark.parametrize("N", [2, 40], ids=["few rows", "many rows"])
def test_the_algebra_is_that_of_the_dense_blocks(N):
    model = nn.Sequential(nn.Linear(11, 9), nn.Tanh(), nn.Linear(9, 13)).double()
    x, y = torch.randn(N, 11).double(), torch.randint(0, 13, (N,))
    E, delta = measure(model, [(x, y)], "ekfac"), 0.05
    v = {n: torch.randn(shape).double() for n, shape in E.shapes.items()}
    applied, solved, diagonal, logdet = E @ v, E.solve(v, delta), E.diagonal(dtype=torch.float64), []
    for block in E.blocks:
        assert block.U.shape[2] == (2 if N == 2 else block.U.shape[1])
        Q = torch.kron(block.V[0], block.U[0])
        matrix = Q @ torch.diag(block.values.mean().flatten()) @ Q.mT
        damped = matrix + delta * torch.eye(len(matrix)).double()

        def flat(tensors, block=block):
            return block.place.matrix(tensors).flatten()

        assert close(flat(applied), matrix @ flat(v), EXACT) and close(flat(diagonal), matrix.diagonal(), EXACT)
        assert close(flat(solved), torch.linalg.solve(damped, flat(v)), 1e-9)
        logdet.append(float(torch.linalg.slogdet(damped)[1]))
    assert E.logdet(delta) == pytest.approx(math.fsum(logdet), rel=1e-9)
    assert len(E.eigenvalues()) == E.num_parameters == sum(s.num_parameters for s in E.spectra())
    assert float(E.eigenvalues().sum()) == pytest.approx(E.trace(), rel=1e-12)
    if N == 2:
        with pytest.raises(ValueError, match="must be regular"):
            E.solve(v)
        with pytest.warns(ff.FisherWarning, match="eigenvalues"):
            assert E.logdet() == -math.inf


def test_the_span_of_few_rows_gives_the_same_operator_as_the_whole_basis():
    model, (x, y) = mlp(), double_vectors(1)
    E = measure(model, [(x, y)], "ekfac")
    K = measure(model, [(x, y)], "kfac")
    (whole,) = measure(model, [(x, y)], (ff.EKFAC(basis=K),))
    assert E.blocks[1].U.shape[2] < whole.blocks[1].U.shape[2]
    v = torch.randn(E.num_parameters).double()
    assert close(E.solve(v, 0.1), whole.solve(v, 0.1), 1e-9) and E.logdet(0.1) == pytest.approx(whole.logdet(0.1), rel=1e-12)
    assert close(E @ v, K @ v, 1e-9)  # one sample of one position: KFAC is exact


def test_no_diagonal_in_the_basis_is_nearer_to_the_fisher_than_its_own():
    model, (x, y) = mlp(), double_vectors(9)
    E, K = measure(model, [(x, y)], "ekfac"), measure(model, [(x, y)], "kfac")
    for ours, theirs in zip(E.blocks, K.blocks, strict=True):
        exact, _ = dense(model, x, y, ours)
        Q = torch.kron(ours.V[0], ours.U[0])
        corrected = Q @ torch.diag(ours.values.mean().flatten()) @ Q.mT
        factored = torch.kron(theirs.B.mean()[0], theirs.A.mean()[0])
        assert float((exact - corrected).norm()) <= float((exact - factored).norm())
        others = Q @ torch.diag(ours.values.mean().flatten() * (1 + 0.1 * torch.randn(len(Q)).double())) @ Q.mT
        assert float((exact - corrected).norm()) < float((exact - others).norm())


def test_collect_takes_the_basis_of_other_data():
    model, (x, y), (other, labels) = mlp(), double_vectors(), double_vectors(5)
    K = measure(model, [(other, labels)], "kfac")
    with ff.collect(model, ff.EKFAC(basis=K), ff.Diagonal(), fisher_type="empirical") as stats:
        for part in (slice(0, 2), slice(2, 6)):
            stats.backward(F.cross_entropy(model(x[part]), y[part], reduction="none"))
    E, D = stats.results()
    assert E.trace() == pytest.approx(D.trace(), rel=EXACT)
    assert torch.equal(E.factors()["0"][0], K.factors()["0"][0])
    with pytest.raises(ValueError, match="basis must be a KFACFisher where the data pass once"):
        ff.collect(model, ff.EKFAC())
    with pytest.raises(ValueError, match="basis must be a KFACFisher, got DiagonalFisher"):
        ff.EKFAC(basis=D)


def test_it_stands_beside_others_in_one_call():
    model, batch = mlp(), double_vectors()
    D, E = measure(model, [batch], (ff.Diagonal(), ff.EKFAC()))
    assert type(D) is ff.DiagonalFisher and E.trace() == pytest.approx(D.trace(), rel=EXACT)
    assert all(how.startswith("linear_sq_: ") and "eigenvalues in the basis of B" in how for how in E.coverage.values())


def test_float32_eigenvectors_are_orthonormal_whatever_the_rank():
    for matrix in (torch.zeros(7, 7), torch.eye(7), torch.outer(torch.arange(7.0), torch.arange(7.0)), 1e-30 * torch.eye(7)):
        for dtype in (torch.float32, torch.float64):
            U = eigen_sums.eigenbasis(matrix.double().unsqueeze(0), None, dtype)
            assert U.dtype == dtype and close(U[0].mT @ U[0], torch.eye(7, dtype=dtype), 1e-6)
    assert eigen_sums.eigenbasis(torch.ones(1, 7).double(), None, torch.float32) is None


def test_eigenvectors_come_in_float64_where_float32_does_not_converge(monkeypatch):
    eigh = torch.linalg.eigh

    def stubborn(matrix):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    A = torch.randn(5, 5).double()
    U = eigen_sums.eigenbasis((A @ A.mT).unsqueeze(0), None, torch.float32)
    assert U.dtype == torch.float32 and close(U[0] @ U[0].mT, torch.eye(5), 1e-6)


# -- two passes over one data set


def test_a_one_shot_iterator_is_refused_before_anything_is_read():
    read = []

    def once():
        read.append(1)
        yield double_vectors()

    with pytest.raises(ValueError, match="data must be readable several times, got generator"):
        measure(mlp(), once(), "ekfac")
    assert not read


class Changing:
    """A data set whose passes are given."""

    def __init__(self, *passes):
        self.passes = list(passes)

    def __iter__(self):
        return iter(self.passes.pop(0))


def test_another_second_pass_is_detected_and_what_was_added_is_kept():
    a, b = double_vectors(), double_vectors()
    order = torch.arange(5, -1, -1)
    for second, what in (
        ([a, (b[0][order], b[1][order])], "another batch 1"), ([a], r"2 batches and then 1"), ([a, b, b], "another batch 2"),
        ([a, (b[0], (b[1] + 1) % 4)], "another batch 1"), ([], "2 batches and then 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=what) as error:
            measure(mlp(), Changing([a, b], second), "ekfac")
        counted = 6 * min(len(second), 2 if "batch 2" in what else 1)
        assert error.value.fisher.num_samples == (counted or 12)  # where none was, the factors of the first pass
        assert error.value.fisher.structure == ("ekfac" if counted else "kfac")


@pytest.mark.parametrize("change", ["value", "order", "dtype", "conjugate", "array", "text"])
def test_a_batch_has_another_fingerprint_if_anything_changes(change):
    batches = importlib.import_module("fisherfast.data.batches")
    x, y = torch.randn(5, 3), torch.randint(0, 4, (5,))
    z, array = torch.view_as_complex(torch.randn(5, 3, 2)), np.arange(4.0)[::2]
    first, other = {
        "value": (x, x + torch.eye(5, 3) * 1e-6),
        "order": (x, x[[1, 0, 2, 3, 4]]),
        "dtype": (x, x.double()),
        "conjugate": (z, z.conj()),
        "array": ((x, array), (x, array + 1)),
        "text": ((x, np.array(["one", "two"])), (x, np.array(["one", "three"]))),
    }[change]
    prints = [batches.Batch.of((t, y), torch.device("cpu")).fingerprint() for t in (first, copy.deepcopy(first), other)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("other", [{"scale": [1.0, 3.0]}, {"scale": 1.0}, {"bias": [1.0, 2.0]}, {"scale": [["a"], [1.0]]}])
def test_numbers_and_text_in_a_batch_are_in_its_fingerprint(other):
    batches = importlib.import_module("fisherfast.data.batches")
    x, y = torch.randn(2, 3), torch.zeros(2, dtype=torch.long)
    same = {"scale": [1.0, 2.0], "names": {"b": "one", "a": None}}
    again = {"names": {"a": None, "b": "one"}, "scale": [1.0, 2.0]}
    given = (same, again, {"names": same["names"], **other})
    prints = [batches.Batch.of({"x": x, **more, "labels": y}, torch.device("cpu")).fingerprint() for more in given]
    assert prints[0] == prints[1] != prints[2]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x, scale):
        return self.last((self.first(x) * torch.tensor(scale)[:, None]).tanh())


def test_lists_that_change_between_the_passes_are_detected():
    x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    first, second = ([{"x": x, "scale": [factor, 1.0, 2.0, 0.5], "labels": y}] for factor in (1.0, 2.0))
    with pytest.raises(ValueError, match="another batch 0 than in the first"):
        measure(Scaled(), Changing(first, second), "ekfac")


def test_a_checkpoint_is_for_a_basis_that_is_given(tmp_path):
    model, batch = mlp(), double_vectors()
    with pytest.raises(ValueError, match="checkpoint must be None for 'ekfac'"):
        measure(model, [batch], "ekfac", checkpoint=tmp_path / "e")
    K = measure(model, [batch], "kfac")
    asked, path = (ff.EKFAC(basis=K),), tmp_path / "f"
    measure(model, [batch], asked, checkpoint=path)
    (resumed,) = measure(model, [batch, double_vectors()[:2], batch], asked, checkpoint=path)
    assert resumed.num_samples == 18 and resumed.batches == 3
    measure(model, [batch], "kfac", checkpoint=tmp_path / "k")
    went_on = measure(model, [batch, batch], "kfac", checkpoint=tmp_path / "k")
    assert went_on.num_samples == 12 and went_on.trace() == pytest.approx(K.trace(), rel=EXACT)


# -- pooling, files, bad input


def test_it_pools_in_one_basis_only_and_files_are_bit_exact(tmp_path):
    model, (x, y) = mlp(), double_vectors()
    K = measure(model, [(x, y)], "kfac")
    ((one,), (two,), (whole,)) = (
        measure(model, [(x[part], y[part])], (ff.EKFAC(basis=K),)) for part in (slice(0, 2), slice(2, 6), slice(0, 6))
    )
    pooled = one + two
    assert pooled.num_samples == 6 and close(pooled.eigenvalues(), whole.eigenvalues(), EXACT)
    with pytest.raises(ValueError, match=r"one ff\.KFAC, given to ff\.EKFAC"):
        one + measure(model, [double_vectors()], "ekfac")
    whole.save(tmp_path / "e.safetensors")
    again = ff.load(tmp_path / "e.safetensors")
    assert type(again) is ff.EKFACFisher and again.coverage == whole.coverage and again.provenance == whole.provenance
    assert torch.equal(again.eigenvalues(), whole.eigenvalues()) and again.logdet(0.1) == whole.logdet(0.1)
    few = measure(model, [(x[:1], y[:1])], "ekfac")
    few.save(tmp_path / "few.safetensors")
    assert ff.load(tmp_path / "few.safetensors").logdet(0.1) == few.logdet(0.1)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_bases_that_differ_on_one_side_do_not_pool(side):
    """Other inputs change A, and drawn labels B; of Gaussian outputs B is the identity whatever the inputs are."""
    model, x = nn.Linear(5, 3).double(), torch.randn(2, 9, 5).double()
    kind = {"inputs": ("exact", "gaussian"), "outputs": ("mc", "categorical")}[side]
    which = {"inputs": ((x[0], 0), (x[1], 0)), "outputs": ((x[0], 0), (x[0], 1))}[side]
    bases = [ff.fisher(model, [(inputs, None)], "kfac", *kind, seed=seed, progress=False) for inputs, seed in which]
    one, other = (ff.fisher(model, [(x[0], None)], ff.EKFAC(basis=basis), *kind, progress=False) for basis in bases)
    assert torch.equal(one.blocks[0].U, other.blocks[0].U) == (side == "outputs")
    assert torch.equal(one.blocks[0].V, other.blocks[0].V) == (side == "inputs")
    with pytest.raises(ValueError, match=r"one ff\.KFAC, given to ff\.EKFAC"):
        one + other


def test_the_basis_of_another_model_is_refused():
    K = measure(mlp(), [double_vectors()], "kfac")
    other = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 4)).double()
    with pytest.raises(ValueError, match="EKFAC's basis must be of this model"):
        measure(other, [double_vectors()], (ff.EKFAC(basis=K),))


class Poisoned(torch.autograd.Function):
    """The identity, with NaN for one sample's gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return torch.cat([g[:-1], g[-1:] * float("nan")])


@pytest.mark.parametrize("order", ORDERS)
def test_a_batch_that_is_not_finite_adds_nothing(order, monkeypatch):
    go(order, monkeypatch)
    model, x, y = networks.doubles("linear-sequence")
    K = measure(model, [(x, y)], "kfac")

    def loss(logits):
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(len(y), -1).sum(1)

    with ff.collect(model, ff.EKFAC(basis=K), fisher_type="empirical") as stats:
        stats.backward(loss(model(x)))
        before = stats.result().eigenvalues()
        with pytest.raises(ff.NonFiniteError, match="gradients must be finite") as error:
            stats.backward(loss(Poisoned.apply(model(x))))
    assert torch.equal(error.value.fisher.eigenvalues(), before) and stats.result().num_samples == len(x)


def test_information_in_the_weights_reads_it():
    model, batch = mlp(), double_vectors()
    E = measure(model, [batch], "ekfac")
    info = ff.information_in_weights(E, model, prior_scale=0.7, beta=0.01)
    s = 0.7**2 * E.eigenvalues() / 0.01
    distance = sum(float(p.detach().square().sum()) for p in model.parameters()) / (2 * 0.7**2)
    assert info.nats == pytest.approx(distance + 0.5 * float((s.log1p() - s / (1 + s)).sum()), rel=1e-9)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_the_basis_of_few_images_is_that_of_their_patches(weighted):
    """A convolution on small maps has seen fewer patches than a third of their length."""
    model = nn.Sequential(nn.Conv2d(7, 11, 3, padding=1, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(11 * 4, 4)).double()
    x, y = torch.randn(5, 7, 4, 4).double(), torch.randint(0, 4, (5,))
    weight = [(torch.rand(5) + 0.1).double()] if weighted else []
    batches = [(x[p], y[p], *(w[p] for w in weight)) for p in (slice(0, 2), slice(2, 5))]
    E, D = measure(model, batches, "ekfac"), measure(model, batches, "diagonal")
    block = E.blocks[0]
    U, A = block.U[0], block.kronecker.A.mean()[0]
    assert U.shape == (7 * 9 + 1, 5 * 4) and close(U.mT @ U, torch.eye(20).double(), EXACT)
    rotated = U.mT @ A @ U
    assert close(rotated, rotated.diagonal().diag(), 1e-9) and close(U @ rotated @ U.mT, A, EXACT)
    assert E.trace() == pytest.approx(D.trace(), rel=EXACT)


@pytest.mark.parametrize("rank", [5, 20])
def test_the_basis_of_few_float32_rows_is_orthonormal_whatever_their_rank(rank):
    """Eigenvalues that span ten decades, and rows that repeat each other."""
    eigen = importlib.import_module("fisherfast.fisher.blocks.eigen")
    left, right = (torch.linalg.qr(torch.randn(n, rank).double())[0] for n in (20, 101))
    rows = (left * torch.logspace(0, -4, rank).double()) @ right.mT
    U = eigen.eigenbasis(torch.empty(1, 101, 101), rows.float(), torch.float32)[0].double()
    norms = U.square().sum(0)
    kept = U[:, norms > 0.5]
    assert U.shape == (101, 20) and float(norms[norms <= 0.5].sum()) < 1e-9
    assert float((kept.mT @ kept - torch.eye(kept.shape[1]).double()).abs().max()) < 1e-5
    assert float((rows - rows @ kept @ kept.mT).norm() / rows.norm()) < 1e-5


def test_few_rows_of_a_float32_model_keep_the_trace():
    model, x, y = nn.Sequential(nn.Linear(101, 97), nn.Tanh(), nn.Linear(97, 83)), torch.randn(9, 101), torch.randint(0, 83, (9,))
    E, D = (measure(model, [(x, y)], s) for s in ("ekfac", "diagonal"))
    assert E.blocks[0].U.shape[2] == 9 and E.trace() == pytest.approx(D.trace(), rel=1e-5)


def test_the_trace_of_a_model_in_bfloat16_is_that_of_its_diagonal():
    model, (x, y) = mlp().bfloat16(), double_vectors(7)
    E, D = (measure(model, [(x.bfloat16(), y)], s) for s in ("ekfac", "diagonal"))
    assert E.trace() == pytest.approx(D.trace(), rel=1e-3)


def test_ekfacs_of_one_run_have_one_basis():
    with pytest.raises(ValueError, match="EKFACs of one run must have one basis"):
        ff.fisher(
            networks.mlp(),
            [networks.double_vectors()],
            (ff.EKFAC(), ff.EKFAC(max_factor_dim=8)),
            fisher_type="empirical",
            progress=False,
        )


@pytest.mark.parametrize("form", ["scaled", "prompt", "bias"])
def test_tables_after_a_first_batch_of_one_sample(form):
    """Where few rows are looked up, the table is expanded to the samples, and has the block that was planned before."""

    def forward(m, x):
        if form == "scaled":
            return m.head((x + 2 * m.p(torch.arange(6))).mean(1).tanh())
        if form == "prompt":
            return m.head(torch.cat([m.p(torch.arange(2)).expand(len(x), 2, 4), x], 1).mean(1).tanh())
        return m.head(((x @ x.mT + m.b(torch.arange(36).view(6, 6) % 6)[..., 0]).softmax(-1) @ x).mean(1))

    parts = {"p": nn.Embedding(6, 4)} if form != "bias" else {"b": nn.Embedding(6, 1)}
    model = networks.Wrapped(forward, **parts, head=nn.Linear(4, 3)).double()
    batches = [(torch.randn(n, 6, 4).double(), torch.randint(3, (n,))) for n in (1, 3, 5, 2)]
    expected = ff.fisher(model, batches, fisher_type="empirical", progress=False)
    result = ff.fisher(model, batches, "ekfac", fisher_type="empirical", progress=False)
    assert result.trace() == pytest.approx(expected.trace(), rel=1e-12)
