# SPDX-License-Identifier: Apache-2.0
"""``F v`` without F is that of the exact Fisher, and what Lanczos makes of products alone is its spectrum."""

import math

import networks
import pytest
import torch
import torch.nn.functional as F
from networks import double_vectors, mlp
from oracle import close
from torch import nn
from torch.utils.checkpoint import checkpoint

import fisherfast as ff

EXACT = 1e-11


def exact(model, data, *arguments, **options):
    return ff.fisher(model, data, "gram", *arguments, progress=False, **options)


NETWORKS = [name for name in networks.EVERY if name != "embedding-bag"]


@pytest.mark.parametrize("name", NETWORKS)
def test_products_are_those_of_the_exact_fisher_for_every_kind_of_network(name):
    model, x, y = networks.doubles(name)
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    G, O = exact(model, batches, "empirical"), ff.FisherOperator(model, batches, "empirical")
    assert O.shapes == G.shapes
    v = torch.randn(G.num_parameters).double()
    assert close(O @ v, G @ v, EXACT)


@pytest.mark.parametrize("fisher_type", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_labels_and_weights_are_those_of_fisher(fisher_type, weighted):
    model, (x, y) = mlp(), double_vectors()
    weight = [torch.rand(6).double()] if weighted else []
    data = [(x[:4], y[:4], *(w[:4] for w in weight)), (x[4:], y[4:], *(w[4:] for w in weight))]
    options = {"draws": 3, "seed": 5, "sample_offset": 11} if fisher_type == "mc" else {}
    G, O = exact(model, data, fisher_type, **options), ff.FisherOperator(model, data, fisher_type, **options)
    v = {name: torch.randn(shape) for name, shape in G.shapes.items()}
    a, b = O @ v, G @ v
    assert all(part.dtype == torch.float32 and close(part, b[name], 1e-6) for name, part in a.items())
    assert O.provenance == G.provenance


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_other_likelihoods(likelihood):
    model, (x, _) = mlp(), double_vectors()
    G, O = (make(model, [(x, None)], "exact", likelihood) for make in (exact, ff.FisherOperator))
    v = torch.randn(G.num_parameters).double()
    assert close(O @ v, G @ v, EXACT)


def test_attention_has_second_derivatives():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 4)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))

    model, x = Attention(), torch.randn(3, 5, 8)
    G, O = exact(model, [(x, None)], "exact"), ff.FisherOperator(model, [(x, None)], "exact")
    v = torch.randn(G.num_parameters)
    assert close(O @ v, G @ v, 1e-4)


def test_a_function_without_second_derivative_is_named():
    build, data = networks.COVERED["embedding-bag"]
    model = build()
    with pytest.raises(NotImplementedError, match="_embedding_bag_backward"):
        ff.FisherOperator(model, [data(3)], "empirical") @ torch.zeros(sum(p.numel() for p in model.parameters()))


def test_as_many_steps_as_parameters_leave_only_the_probes_random():
    """A probe's quadrature is then ``z^T f(F) z`` itself, z its signs."""
    model = nn.Linear(3, 2, bias=False).double()
    x = torch.randn(40, 3).double()
    O = ff.FisherOperator(model, [(x, None)], "exact", "gaussian")
    matrix = torch.stack([O @ row for row in torch.eye(6).double()])
    density = ff.spectral_density(O, probes=3, steps=9, seed=1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    damped = matrix + 0.1 * torch.eye(6).double()
    values, Q = torch.linalg.eigh(damped)
    for probe in range(3):
        z = (torch.randint(0, 2, (6,), generator=generator) * 2 - 1).double()
        expected = float((Q.mT @ z).square() @ values.log())
        found = float(density.masses[probe] @ (density.nodes[probe] + 0.1).log())
        assert found == pytest.approx(expected, rel=1e-9)
    assert density.masses.sum(1).tolist() == pytest.approx([6.0] * 3)
    assert density.largest() == pytest.approx(float(values[-1]) - 0.1, rel=1e-9)


def test_log_determinant_and_trace_are_within_their_errors():
    model, (x, _) = nn.Sequential(nn.Linear(3, 31), nn.Tanh(), nn.Linear(31, 4)).double(), double_vectors(50)
    G, O = exact(model, [(x, None)], "exact"), ff.FisherOperator(model, [(x, None)], "exact")
    density = ff.spectral_density(O, probes=20, steps=30, dtype=torch.float64)
    for (value, stderr), truth in ((density.logdet(0.01), G.logdet(0.01)), (density.trace(), G.trace())):
        assert abs(value - truth) < 4 * stderr < 0.4 * abs(truth)
    assert density.largest() == pytest.approx(float(G.eigenvalues()[0]), rel=1e-9)


def test_a_krylov_space_that_ends_early_ends_the_steps():
    K = ff.DiagonalFisher({"w": torch.tensor([2.0, 2.0, 5.0, 5.0]).double()}, num_samples=1)
    density = ff.spectral_density(K, probes=2, steps=4, dtype=torch.float64)
    assert (density.masses > 1e-12).sum(1).tolist() == [2, 2]
    assert density.logdet(1.0).value == pytest.approx(2 * math.log(3) + 2 * math.log(6))


def test_the_rounding_of_zeros_is_no_eigenvalue():
    values = torch.cat([torch.logspace(-2, 2, 50), torch.zeros(1950)]).double()
    K = ff.DiagonalFisher({"w": values[torch.randperm(2000)]}, num_samples=1)
    density = ff.spectral_density(K, probes=2, steps=64)
    for damping in (1e-4, 1e-6, 1e-8):
        assert density.logdet(damping).value == pytest.approx(K.logdet(damping), rel=1e-3)


def test_any_fisher_has_a_density():
    model, (x, y) = mlp(), double_vectors()
    for structure in ("diagonal", "kfac", "ekfac", "gram"):
        K = ff.fisher(model, [(x, y)], structure, "empirical", progress=False)
        value, stderr = ff.spectral_density(K, probes=20, steps=K.num_parameters, dtype=torch.float64).trace()
        assert abs(value - K.trace()) <= 4 * stderr + 1e-9


def test_what_cannot_be_is_refused():
    model, (x, y) = mlp(), double_vectors()
    with pytest.raises(ValueError, match="data must be readable several times, got"):
        ff.FisherOperator(model, iter([(x, y)]))
    with pytest.raises(ValueError, match=r"FisherOperator: sample_offset must be an integer, got 1\.5"):
        ff.FisherOperator(model, [(x, y)], sample_offset=1.5)
    with pytest.raises(ValueError, match="needs the labels of the data"):
        ff.FisherOperator(model, [(x, None)], "empirical") @ torch.zeros(90).double()
    with pytest.raises(ValueError, match="at most max_passes = 2"):
        ff.FisherOperator(model, [(x, None)], "exact", max_passes=2) @ torch.zeros(90).double()
    with pytest.raises(ValueError, match="a flat v must have one axis of all 90"):
        ff.FisherOperator(model, [(x, y)]) @ torch.zeros(3)
    with pytest.raises(ff.NonFiniteError, match="the model's output must be finite"):
        ff.FisherOperator(model, [(x * math.nan, y)]) @ torch.zeros(90).double()
    with pytest.raises(ValueError, match="samples of a weight > 0"):
        ff.FisherOperator(model, []) @ torch.zeros(90).double()
    density = ff.spectral_density(ff.FisherOperator(model, [(x, y)]), probes=1, steps=2, dtype=torch.float64)
    assert math.isnan(density.trace().stderr)
    with pytest.raises(ValueError, match="damping must be a finite number > 0, got 0"):
        density.logdet(0.0)
    with pytest.raises(ValueError, match=r"(probes|steps) must be >= 1"):
        ff.spectral_density(ff.FisherOperator(model, [(x, y)]), probes=0)


def test_gradients_divided_by_frequency_are_no_gradients_of_the_likelihood():
    """``scale_grad_by_freq`` serves optimizers: the operator's products are those of the Fisher without it, as the diagonal's are."""
    model = torch.nn.Sequential(
        torch.nn.Embedding(5, 3, scale_grad_by_freq=True), torch.nn.Flatten(), torch.nn.Linear(12, 2)
    ).double()
    data = [(torch.randint(0, 3, (6, 4)), None)]
    O, F = ff.FisherOperator(model, data, "exact"), ff.fisher(model, data, "gram", "exact", progress=False)
    v = torch.randn(F.num_parameters).double()
    torch.testing.assert_close(O @ v, F @ v, rtol=1e-9, atol=1e-12)
    model[0].scale_grad_by_freq = False
    torch.testing.assert_close(O @ v, ff.FisherOperator(model, data, "exact") @ v, rtol=1e-12, atol=1e-14)


def test_outputs_without_features():
    model, data = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), [(torch.randn(4, 3), torch.randn(4))]
    own = ff.LogLikelihood(lambda o, y: -((o - y) ** 2) / 2, name="gaussian of numbers")
    v, dense_one = torch.randn(4), ff.fisher(model, data, "gram", "empirical", own, progress=False)
    torch.testing.assert_close(ff.FisherOperator(model, data, "empirical", own) @ v, dense_one @ v, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="got meta tensors; load the weights first"):
        ff.FisherOperator(nn.Linear(3, 2, device="meta"), data)


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x):
        outputs = self.linear(x)
        return outputs - outputs.mean(0)


class Parts(nn.Module):
    """A first layer that autograd may not see, or that the output may not use, and experts that a batch may leave out."""

    def __init__(self, way):
        super().__init__()
        self.way, self.first, self.head = way, nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x):
        if self.way == "no_grad":
            with torch.no_grad():
                hidden = self.first(x)
        elif self.way == "reentrant":
            hidden = checkpoint(self.first, x, use_reentrant=True)
        else:
            hidden = F.pad(x, (0, 2)) if self.way == "unused" or x.sum() < 0 else self.first(x)
        return self.head(hidden)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("way", ["no_grad", "reentrant", "unused"])
def test_parameters_without_a_gradient_are_refused_or_zero(way):
    model = Parts(way).double()
    data, v = [(torch.randn(6, 3).double(), torch.randint(0, 4, (6,)))], torch.randn(44).double()
    for ask in (lambda: exact(model, data, "empirical"), lambda: ff.FisherOperator(model, data, "empirical") @ v):
        with pytest.raises(ValueError, match=r"every parameter with requires_grad must reach.* got 2 of 4 that .*'first.weight'"):
            ask()
    product = ff.FisherOperator(model, data, "empirical", allow_missing=True) @ v
    model.first.requires_grad_(False)
    head = ff.FisherOperator(model, data, "empirical") @ v[20:]
    assert not product[:20].any() and close(product[20:], head, EXACT)


def test_an_expert_may_be_of_a_later_batch():
    x, y, v = torch.rand(4, 3).double(), torch.randint(0, 4, (4,)), torch.randn(44).double()
    model = Parts("expert").double()
    operator = ff.FisherOperator(model, [(-x, y), (x, y)], "empirical")
    assert close(operator @ v, exact(model, [(x, y), (-x, y)], "empirical") @ v, EXACT)
    assert close(operator @ v, exact(model, [(x, y), (-x, y)], "empirical") @ v, EXACT)


@pytest.mark.parametrize("N", [2, 4, 5, 20])
def test_samples_that_depend_on_each_other_have_no_products(N):
    operator = ff.FisherOperator(Centred(), [(torch.randn(N, 3), torch.randint(0, 4, (N,)))], "exact")
    with pytest.raises(ValueError, match="samples must not depend on each other"):
        operator @ torch.ones(16)


@pytest.mark.parametrize("fisher_type", ["mc", "exact", "empirical"])
def test_products_of_data_that_change_are_refused(fisher_type):
    x, y = double_vectors()
    data = [(x[:3], y[:3]), (x[3:], y[3:])]
    model = mlp()
    for others in ([*reversed(data)], data[:1], [*data, data[0]]):
        operator = ff.FisherOperator(model, data, fisher_type)
        v = torch.ones(operator.num_parameters).double()
        first = operator @ v
        operator._data = others
        with pytest.raises(ValueError, match="FisherOperator: data must be the same in every product, got"):
            _ = operator @ v
        operator._data = data
        assert torch.equal(operator @ v, first)
        operator._data = data[:1]  # from the third product on batches are counted only
        with pytest.raises(ValueError, match="got 2 batches and then 1"):
            _ = operator @ v


def test_a_loader_that_shuffles_has_no_spectrum():
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*double_vectors()), 2, shuffle=True)
    with pytest.raises(ValueError, match=r"in every product, got another batch .*turn off shuffling"):
        ff.spectral_density(ff.FisherOperator(mlp(), data), probes=4, steps=4)


def test_a_first_product_that_stops_is_not_what_others_are_held_to():
    x, y = double_vectors()
    operator = ff.FisherOperator(mlp(), [(x[:3], y[:3]), (x[3:], y[3:] + 99)])
    v = torch.ones(operator.num_parameters).double()
    with pytest.raises(ValueError, match="labels must lie in"):
        _ = operator @ v
    operator._data = [(x, y)]
    assert (operator @ v).isfinite().all()


def test_nested_inputs_are_known_again():
    class Padded(nn.Linear):
        def forward(self, x):
            return super().forward(x.to_padded_tensor(0.0)).sum(1)

    class Data:
        """Batches that are made anew for every product."""

        def __iter__(self):
            parts = torch.arange(12.0).view(3, 4).split([1, 2])
            yield torch.nested.nested_tensor(list(parts), layout=torch.jagged), torch.tensor([0, 2])

    operator = ff.FisherOperator(Padded(4, 3), Data(), "empirical")
    v = torch.randn(15)
    assert torch.equal(operator @ v, operator @ v)
