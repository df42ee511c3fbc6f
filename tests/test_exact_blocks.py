# SPDX-License-Identifier: Apache-2.0
"""Small parameters that are no multiplied weights have all second moments of their gradients in KFAC and EKFAC."""

import math

import networks
import oracle
import pytest
import torch
from networks import EVERY, measure
from oracle import close
from torch import nn

import fisherfast as ff
from fisherfast.fisher.blocks.exact import ExactBlock

EXACT = 1e-11


def moments(model, parameter, x, y, losses=oracle.cross_entropy, weight=None):
    """The mean of ``s s^T`` of one parameter, one sample at a time."""
    weight = torch.ones(len(x)).double() if weight is None else weight
    total = 0
    for n in range(len(x)):
        for share, loss in losses(model, x[n : n + 1], y[n : n + 1]):
            (g,) = torch.autograd.grad(loss, [parameter], retain_graph=True, allow_unused=True)
            s = torch.zeros_like(parameter).flatten() if g is None else g.flatten()
            total = total + float(weight[n]) * share * torch.outer(s, s)
    return total / float(weight.sum())


def exact_blocks(K):
    return {block.place.weight: block for block in K.blocks if isinstance(block, ExactBlock)}


def other_networks():
    """Those that have such parameters."""
    for name in EVERY:
        model, x, y = networks.doubles(name)
        if exact_blocks(measure(model, [(x, y)], "kfac")):
            yield name


OTHERS = list(other_networks())


def test_there_are_many_kinds_of_them():
    assert len(OTHERS) > 25 and {"layer-norm", "chunks-of-one-scale", "overlapping-parts"} < set(OTHERS)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", OTHERS)
def test_they_are_the_second_moments_of_autograd(name, structure):
    model, x, y = networks.doubles(name)
    weight = (torch.rand(len(x)) + 0.1).double()
    parts = [slice(0, 2), slice(2, None)]
    K = measure(model, [(x[p], y[p], weight[p]) for p in parts], structure)
    parameters = dict(model.named_parameters())
    for which, block in exact_blocks(K).items():
        assert close(block.moments.mean(), moments(model, parameters[which], x, y, weight=weight), EXACT)
        assert "exact [" in K.coverage[which]


def normed():
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4)).double()


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_passes_of_all_labels_are_the_expectation(structure):
    model, x, y = normed(), torch.randn(6, 3).double(), torch.randint(0, 4, (6,))
    blocks = exact_blocks(measure(model, [(x[:4], None), (x[4:], None)], structure, "exact"))
    assert blocks.keys() == {"1.weight", "1.bias"}
    for name, block in blocks.items():
        assert close(block.moments.mean(), moments(model, model.get_parameter(name), x, y, oracle.every_label), EXACT)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_they_answer_as_their_matrices_do(structure):
    model, x, y = normed(), torch.randn(40, 3).double(), torch.randint(0, 4, (40,))
    K, delta = measure(model, [(x, y)], structure), 0.01
    v = {n: torch.randn(s).double() for n, s in K.shapes.items()}
    applied, solved, diagonal = K @ v, K.solve(v, delta), K.diagonal(dtype=torch.float64)
    for name, block in exact_blocks(K).items():
        F = block.moments.mean()
        damped = F + delta * torch.eye(5).double()
        assert close(applied[name], F @ v[name], EXACT) and close(diagonal[name], F.diagonal(), EXACT)
        assert close(solved[name], torch.linalg.solve(damped, v[name]), 1e-9)
        assert block.logdet(delta)[0] == pytest.approx(float(torch.linalg.slogdet(damped)[1]), rel=1e-10)
        assert block.trace() == pytest.approx(float(F.trace()))
    assert sum(s.num_parameters for s in K.spectra()) == K.num_parameters == len(K.eigenvalues())
    assert "1" not in K.factors()


def test_they_pool_and_go_to_files(tmp_path):
    model, x, y = normed(), torch.randn(6, 3).double(), torch.randint(0, 4, (6,))
    A, B, whole = (measure(model, [(x[p], y[p])], "kfac") for p in (slice(0, 2), slice(2, 6), slice(0, 6)))
    (A + B).save(tmp_path / "f")
    again = exact_blocks(ff.load(tmp_path / "f"))
    assert all(close(again[n].moments.mean(), block.moments.mean(), EXACT) for n, block in exact_blocks(whole).items())


def test_the_size_up_to_which_they_are_exact_is_chosen():
    model, x, y = normed(), torch.randn(6, 3).double(), torch.randint(0, 4, (6,))
    (none,) = measure(model, [(x, y)], (ff.KFAC(max_exact_dim=4),))
    (some,) = measure(model, [(x, y)], (ff.EKFAC(max_exact_dim=5),))
    assert not exact_blocks(none) and set(none.diagonals) == {"1.weight", "1.bias"}
    assert len(exact_blocks(some)) == 2 and not some.diagonals
    with pytest.raises(ValueError, match="must have the same blocks"):
        none + measure(model, [(x, y)], "kfac")


def test_a_batch_that_is_not_finite_adds_nothing():
    model, x, y = normed(), torch.randn(6, 3).double(), torch.randint(0, 4, (6,))
    bad = x.clone()
    bad[0, 0] = math.nan
    with pytest.raises(ff.NonFiniteError, match=r"the input of '0\.weight' is the first that is not finite") as caught:
        measure(model, [(x, y), (bad, y)], "kfac")
    found, expected = exact_blocks(caught.value.fisher), exact_blocks(measure(model, [(x, y)], "kfac"))
    assert all(close(found[n].moments.mean(), block.moments.mean(), EXACT) for n, block in expected.items())


def test_both_uses_of_a_tied_table_are_summed_in_float32():
    """The rows of its lookup in bfloat16, too: 64 positions added in 8 bits would be off by percents."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 8), nn.Linear(8, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids).cumsum(1).tanh())

    data = [(torch.randint(7, (6, 64)), torch.randint(7, (6, 64)))]
    kfac, diagonal = ff.fisher(
        Tied().to(torch.bfloat16).eval(), data, structure=(ff.KFAC(), ff.Diagonal()), fisher_type="empirical", progress=False
    )
    assert "exact" in kfac.coverage["table.weight"]
    torch.testing.assert_close(kfac.diagonal()["table.weight"], diagonal.diagonal()["table.weight"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", ["fft", "weight-norm"])
def test_the_way_of_gradients_that_no_op_gives_has_its_reason_in_plan_and_coverage(name, structure):
    if name == "fft":
        w, head = nn.Parameter(torch.randn(6)), nn.Linear(6, 3)
        model, way = (
            networks.Wrapped(lambda m, x: m.head(torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(m.w), n=6)), head=head),
            "vmap",
        )
        model.register_parameter("w", w)
        exact = "w"
    else:
        model, way = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Linear(5, 3)), "chain"
        exact = "0.parametrizations.weight.original0"
    batch = (torch.randn(7, 6), torch.randint(3, (7,)))
    reasons = ff.fisher(model, [batch], progress=False).coverage
    covered = measure(model, [batch], structure).coverage
    D = dict(model.named_parameters())[exact].numel()
    assert reasons[exact].startswith(f"{way}: ")
    assert covered[exact] == f"{way}: exact [{D}, {D}];{reasons[exact].removeprefix(f'{way}:')}" and covered.ways[exact] == way
    planned = {name: row.way for row in ff.plan(model, batch, structure).rows for name in row.names}
    assert planned[exact] == reasons[exact]
