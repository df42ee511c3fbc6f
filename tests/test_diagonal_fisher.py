# SPDX-License-Identifier: Apache-2.0
"""The diagonal Fisher is a mean over samples and a diagonal matrix: every method equals the dense one."""

import math

import pytest
import torch
from diagonals import SHAPES, example, of_sums
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherfast.accumulator import Accumulator
from fisherfast.fisher import DiagonalFisher, Fisher, FisherWarning, LayerSummary, Provenance

EPS = torch.finfo(torch.float64).eps


def dense(F):
    return torch.diag(torch.cat([f.flatten() for f in F.diagonal(dtype=torch.float64).values()]))


def vector(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in SHAPES.items()}


def flat(v):
    return torch.cat([part.flatten() for part in v.values()])


def test_is_a_fisher():
    assert isinstance(example(), Fisher)


@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=9), st.integers(1, 2**40))
def test_diagonal_returns_what_was_given(values, num_samples):
    mean = torch.tensor(values)
    F = DiagonalFisher({"w": mean}, num_samples)
    assert torch.equal(F.diagonal()["w"], mean)  # through float64 sums: exact for float32


def test_matches_autograd():
    torch.manual_seed(0)
    layer, N = torch.nn.Linear(3, 5).double(), 7
    x, c = torch.randn(N, 3, dtype=torch.float64), torch.randn(N, 5, dtype=torch.float64)
    totals = {name: Accumulator.zeros(p.shape) for name, p in layer.named_parameters()}
    for n in range(N):
        for (name, _), g in zip(
            layer.named_parameters(), torch.autograd.grad(layer(x[n]) @ c[n], layer.parameters()), strict=True
        ):
            totals[name] += Accumulator(g.square(), 1)
    F = of_sums(totals, num_samples=N)
    expected = {"weight": (c.square().mT @ x.square()) / N, "bias": c.square().mean(0)}
    for name, f in F.diagonal(dtype=torch.float64).items():
        # N + 3 roundings on each side, none of them a cancellation
        assert ((f - expected[name]).abs() <= 2 * (N + 3) * EPS * expected[name]).all()


def test_each_parameter_has_its_own_weight():
    totals = {"a": Accumulator(torch.tensor([12.0]), 4), "b": Accumulator(torch.tensor([12.0]), 3)}
    F = of_sums(totals, num_samples=4)
    assert F.diagonal() == {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert F.trace() == 7.0


def test_diagonal_dtype():
    assert {f.dtype for f in example().diagonal().values()} == {torch.float32}
    assert {f.dtype for f in example().diagonal(dtype=torch.float64).values()} == {torch.float64}
    assert {name: tuple(f.shape) for name, f in example().diagonal().items()} == SHAPES


def test_counts_default_to_one_position_per_sample():
    assert example().num_positions == example().num_samples == 1000
    assert example(num_positions=128_000).num_positions == 128_000


@pytest.mark.parametrize("damping", [0.0, 0.3, {"body.0": 0.5, "body.0.bias": 0.25, "head": 0.0, "scale": 2.0}], ids=str)
def test_matches_dense_matrix(damping):
    F, v = example(), vector()
    # a parameter's own name wins over its layer's
    each = [0.5, 0.25, 0.0, 2.0] if isinstance(damping, dict) else [damping] * 4
    shift = torch.cat(
        [torch.full(shape, d, dtype=torch.float64).flatten() for d, shape in zip(each, SHAPES.values(), strict=True)]
    )
    matrix = dense(F) + torch.diag(shift)
    logs = matrix.diagonal().log()
    assert abs(F.logdet(damping) - torch.linalg.slogdet(matrix).logabsdet.item()) <= len(logs) * EPS * logs.abs().sum().item()
    solved = torch.linalg.solve(matrix, flat(v))
    assert ((F.solve(flat(v), damping) - solved).abs() <= 4 * EPS * solved.abs()).all()
    assert torch.equal(flat(F.solve(v, damping)), F.solve(flat(v), damping))
    assert torch.equal(F @ flat(v), dense(F) @ flat(v))
    assert torch.equal(flat(F @ v), F @ flat(v))
    assert abs(F.trace() - dense(F).trace().item()) <= len(logs) * EPS * F.trace()
    assert torch.equal(F.eigenvalues(), torch.linalg.eigvalsh(dense(F)).flip(0))


POSITIVE = st.floats(1e-60, 1e60)


@given(st.lists(st.tuples(POSITIVE, st.floats(-1e60, 1e60)), min_size=1, max_size=7), POSITIVE)
def test_solve_inverts(entries, damping):
    f, v = (torch.tensor(column, dtype=torch.float64) for column in zip(*entries, strict=True))
    v = torch.where(v.abs() < 1e-60, 1.0, v)  # away from underflow
    F = DiagonalFisher({"w": f}, 3)
    # two products, a sum of equal signs, a sum, a quotient: five roundings
    assert ((F.solve(F @ v + damping * v, damping) - v).abs() <= 5 * EPS * v.abs()).all()


def test_vectors_keep_kind_order_and_dtype():
    F, v = example(dtype=torch.float32), vector()
    reordered = {name: v[name].float() for name in reversed(SHAPES)}
    product = F @ reordered
    assert tuple(product) == F.names and {part.dtype for part in product.values()} == {torch.float32}
    assert (F @ flat(v).float()).dtype == torch.float32
    assert torch.equal(F @ torch.stack([flat(v), flat(v)], dim=1)[:, 0], F @ flat(v))  # strided


def test_product_is_differentiable_in_the_vector():
    F, v = example(), flat(vector()).requires_grad_()
    (v @ (F @ v)).backward()  # a quadratic penalty
    assert torch.equal(v.grad, 2 * (F @ v.detach()))


def test_spectra_hold_every_eigenvalue_once():
    F = example()
    blocks = list(F.spectra())
    assert [(b.layer, b.parameters) for b in blocks] == [(n.rpartition(".")[0], (n,)) for n in F.names]
    assert [b.num_parameters for b in blocks] == [math.prod(shape) for shape in SHAPES.values()]
    assert torch.equal(torch.cat([b.eigenvalues() for b in blocks]), dense(F).diagonal())


def test_spectra_and_traces_copy_nothing():
    F = example()
    for block, accumulator in zip(F.spectra(), F.accumulators().values(), strict=True):
        assert block.factors[0].data_ptr() == accumulator.sum.data_ptr()


N_DRAWS, SIGMAS = 20_000, 6  # chance of a false alarm below 1e-6, and the seed is fixed


@pytest.mark.parametrize("damping", [0.0, 2.0])
def test_sample_has_the_inverse_as_covariance(damping):
    F = example()
    draws = F.sample(N_DRAWS, damping=damping, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert {name: tuple(d.shape) for name, d in draws.items()} == {name: (N_DRAWS, *shape) for name, shape in SHAPES.items()}
    x = torch.cat([d.flatten(1) for d in draws.values()], dim=1)
    white = x * (dense(F).diagonal() + damping).sqrt()
    covariance = white.mT @ white / N_DRAWS
    k = covariance.shape[0]
    # entries of white have variance 1: their squares have variance 2, their products and they themselves variance 1
    bound = SIGMAS * (torch.ones(k, k) + (math.sqrt(2) - 1) * torch.eye(k)) / math.sqrt(N_DRAWS)
    assert ((covariance - torch.eye(k)).abs() <= bound).all()
    assert (white.mean(0).abs() <= SIGMAS / math.sqrt(N_DRAWS)).all()


def test_sample_repeats_with_its_generator():
    a, b = (example().sample(3, damping=0.1, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == torch.float32 for name in a)
    before = torch.get_rng_state()
    example().sample(3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(before, torch.get_rng_state())


def test_singular_is_said():
    F = DiagonalFisher({"a.w": torch.tensor([1.0, 0.0, 0.0]), "b.w": torch.tensor([0.0, math.e])}, 2)
    with pytest.warns(FisherWarning, match="3 of 5 entries of F . damping I are zero"):
        assert F.logdet() == -math.inf
    with pytest.warns(FisherWarning, match="1 of 5 entries"):
        assert F.logdet({"a": 1.0, "b": 0.0}) == -math.inf
    assert math.isclose(F.logdet(1.0), math.log(2) + math.log1p(math.e), rel_tol=1e-7)
    with pytest.raises(ValueError, match=r"solve: .*2 zero entries in 'a\.w'; pass damping > 0"):
        F.solve(torch.ones(5))
    with pytest.raises(ValueError, match=r"sample: .*1 zero entries in 'b\.w'"):
        F.sample(1, damping={"a": 1.0, "b": 0.0})


def test_by_layer_partitions_parameters_and_trace():
    F = example()
    layers = F.by_layer()
    assert list(layers) == ["body.0", "head", ""]
    assert layers["body.0"].parameters == ("body.0.weight", "body.0.bias") and layers["body.0"].num_parameters == 20
    assert all(isinstance(layer, LayerSummary) and layer.name == name for name, layer in layers.items())
    assert sum(layer.num_parameters for layer in layers.values()) == F.num_parameters == 37
    assert abs(math.fsum(layer.trace for layer in layers.values()) - F.trace()) <= 4 * EPS * F.trace()


def test_repr_says_what_was_measured():
    coverage = {"body.0.weight": "linear_sq_", "extra": "missing: no rule"}
    F = example(provenance=Provenance("mc", "categorical", draws=1, seed=0), coverage=coverage, num_positions=5000)
    expected = (
        "37 parameters in 4 tensors and 3 layers, 1,000 samples, 5,000 positions, "
        "fisher_type='mc', likelihood='categorical', draws=1, seed=0, 1 tensors missing"
    )
    assert repr(F) == f"DiagonalFisher({expected})"


@settings(max_examples=20)
@given(st.floats(0, 1e6, allow_subnormal=False), st.floats(0, 1e6, allow_subnormal=False))
def test_logdet_grows_with_damping(a, b):
    F = example()
    low, high = sorted((a, b))
    assert F.logdet(low) <= F.logdet(high)


def test_rejects_means_of_nothing():
    F = of_sums({"a.w": Accumulator.zeros((3,))}, num_samples=0)
    assert "0 samples" in repr(F)
    for ask in (F.diagonal, F.trace, F.logdet, F.by_layer, F.eigenvalues, lambda: F @ torch.ones(3)):
        with pytest.raises(ValueError, match=r"a\.w: must have samples of a weight > 0"):
            ask()


def test_rejects_a_parameter_as_an_alias():
    with pytest.raises(ValueError, match=r"aliases must map other names to .*, got 'scale': 'head\.weight'"):
        example(aliases={"scale": "head.weight"})


def test_rejects_one_tensor_under_two_names():
    """Pooling in place would add to it twice."""
    total = Accumulator.zeros((3,))
    for other in (total, Accumulator(total.sum, 5)):
        with pytest.raises(ValueError, match=r"got one tensor for 'v' and 'w'; pass it once, with the other name in aliases"):
            of_sums({"v": total, "w": other}, num_samples=2)
