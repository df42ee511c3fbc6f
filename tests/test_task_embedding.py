# SPDX-License-Identifier: Apache-2.0
"""Task embeddings and distances: filters found by autograd, the variational read-out, divergences of Gaussians, refusals."""

import math

import pytest
import torch
from hypothesis import given, strategies
from torch import nn

import fisherfast as ff
from fisherfast.fisher import DiagonalFisher
from fisherfast.information import task2vec

KINDS = ["cosine", "kl", "jensen-shannon", "normalized_cosine"]


class Conv1D(nn.Module):
    """Hugging Face's: the weight is [inputs, outputs]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.weight


LAYERS = {
    "linear": (nn.Linear(5, 3), (4, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3), (2, 4, 7)),
    "conv2d": (nn.Conv2d(3, 5, (2, 3)), (2, 3, 5, 5)),
    "grouped": (nn.Conv2d(4, 6, 2, groups=2), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 2, groups=4), (2, 4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 3, 2), (2, 4, 5, 5)),
    "transposed grouped": (nn.ConvTranspose1d(6, 4, 3, groups=2), (2, 6, 5)),
    "embedding": (nn.Embedding(7, 3), None),
    "hugging face": (Conv1D(5, 3), (4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_filter_is_what_an_output_depends_on(name):
    layer, shape = LAYERS[name]
    x = torch.arange(7)[None] if shape is None else torch.randn(shape)
    out = layer(x)
    # The axis of the outputs is the second of an image or a sequence of a convolution, and the last elsewhere.
    channels = (
        out.transpose(0, 1)
        if "conv" in name or "transposed" in name or "wise" in name or "grouped" in name
        else out.movedim(-1, 0)
    )
    values = torch.rand_like(layer.weight).double()
    expected = []
    for channel in channels:
        (gradient,) = torch.autograd.grad(channel.square().sum(), layer.weight, retain_graph=True)
        expected.append(values[gradient != 0].mean())
    F = DiagonalFisher({"0.weight": values}, num_samples=3)
    got = ff.task_embedding(F, nn.Sequential(layer))
    torch.testing.assert_close(got.vector(), torch.stack(expected), rtol=1e-12, atol=0)


def test_filters_of_a_bag():
    values = torch.rand(7, 3).double()
    got = ff.task_embedding(DiagonalFisher({"weight": values}, num_samples=3), nn.EmbeddingBag(7, 3))
    torch.testing.assert_close(got.filters["weight"], values.mean(0), rtol=1e-12, atol=0)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 2)
    ).double()


def measure(model, structure="diagonal"):
    data = torch.randn(12, 1, 6, 6).double(), torch.randint(0, 2, (12,))
    return ff.fisher(model, [data], structure, "exact", progress=False)


def test_layers_norms_and_the_head():
    model = network()
    F = measure(model)
    diagonal = F.diagonal(dtype=torch.float64)
    every = ff.task_embedding(F, model)
    assert list(every.filters) == ["0.weight", "4.weight", "5.weight"]
    torch.testing.assert_close(every.filters["0.weight"], diagonal["0.weight"].mean((1, 2, 3)))
    assert list(ff.task_embedding(F, model, skip=["5"]).filters) == ["0.weight", "4.weight"]
    assert list(ff.task_embedding(F, model, layers=["4"]).filters) == ["4.weight"]
    norms = ff.task_embedding(F, model, skip=["5"], norms=True)
    assert list(norms.filters) == ["0.weight", "1.weight", "4.weight"]
    torch.testing.assert_close(norms.filters["1.weight"], diagonal["1.weight"])
    assert len(norms.vector()) == 4 + 4 + 5
    assert norms.complexity() == pytest.approx(norms.vector().sum().item(), rel=1e-14)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "gram"])
def test_every_structure_has_a_diagonal(structure):
    model = network()
    F = measure(model, structure)
    got = ff.task_embedding(F, model)
    torch.testing.assert_close(got.filters["4.weight"], F.diagonal(dtype=torch.float64)["4.weight"].mean(1))
    assert structure in str(got)


def test_variances_of_the_optimal_posterior_give_the_fisher_back():
    model = network()
    F = measure(model)
    scales = {"0": 0.3, "1": 0.5, "4": 0.2, "5": 1.0}
    q = ff.optimal_posterior(F, model, beta=1e-2, prior_scale=scales)
    options = {"skip": ["5"], "norms": True}
    back = ff.TaskEmbedding.from_variance(q.variance(), model, beta=q.beta, prior_scale=scales, **options)
    h = ff.task_embedding(F, model, **options).vector()
    torch.testing.assert_close(back.vector(), h, rtol=1e-9, atol=1e-12)
    assert "beta = 0.01, prior scale given by layer" in str(back)


def test_variances_of_task2vecs_own_loss_need_twice_its_beta():
    # Their loss is E_Q L + beta_code (tr(sigma^2) / lambda^2 - log sigma^2 + ...): minimal at h / 2 = beta_code (1 / sigma^2 - 1 / lambda^2).
    model, h, beta_code, scale = nn.Linear(2, 1).double(), torch.tensor([[0.3, 0.7]], dtype=torch.float64), 1e-3, 0.5
    sigma2 = (h / 2 / beta_code + 1 / scale**2).reciprocal().requires_grad_()
    loss = (h * sigma2).sum() / 2 + beta_code * (sigma2 / scale**2 - sigma2.log()).sum()
    assert torch.autograd.grad(loss, sigma2)[0].abs().max() < 1e-12
    got = ff.TaskEmbedding.from_variance({"weight": sigma2.detach()}, model, beta=2 * beta_code, prior_scale=scale)
    assert got.vector().item() == pytest.approx(0.5, rel=1e-10)


def embedding(*values):
    return task2vec.TaskEmbedding({"w": torch.tensor(values, dtype=torch.float64)}, "test")


positive = strategies.lists(strategies.floats(1e-3, 1e3), min_size=3, max_size=3)


@given(a=positive, b=positive)
def test_distances_are_symmetric_not_negative_and_zero_of_one_task(a, b):
    for kind in KINDS:
        one, other = embedding(*a), embedding(*b)
        distance = ff.embedding_distance(one, other, kind=kind, damping=0.1)
        assert distance >= 0
        assert ff.embedding_distance(one, one, kind=kind, damping=0.1) == pytest.approx(0, abs=1e-15)
        assert ff.embedding_distance(other, one, kind=kind, damping=0.1) == pytest.approx(distance, rel=1e-9, abs=1e-15)
        scaled = ff.embedding_distance(embedding(*(7 * x for x in a)), embedding(*(7 * x for x in b)), kind=kind, damping=0.7)
        assert scaled == pytest.approx(distance, rel=1e-9, abs=1e-14)
        if "cosine" in kind:
            assert distance <= 1


@given(a=positive, b=positive)
def test_divergences_are_those_of_the_gaussians(a, b):
    p, q = (torch.distributions.Normal(0, (torch.tensor(h, dtype=torch.float64) + 0.1).rsqrt()) for h in (a, b))
    kl = torch.distributions.kl_divergence
    symmetric = float((kl(p, q) + kl(q, p)).sum())
    assert ff.embedding_distance(embedding(*a), embedding(*b), kind="kl", damping=0.1) == pytest.approx(
        symmetric, rel=1e-9, abs=1e-12
    )
    middle = torch.distributions.Normal(0, ((p.variance + q.variance) / 2).sqrt())
    shannon = float((kl(p, middle) + kl(q, middle)).sum()) / 2
    got = ff.embedding_distance(embedding(*a), embedding(*b), kind="jensen-shannon", damping=0.1)
    assert got == pytest.approx(shannon, rel=1e-9, abs=1e-12)


def test_divergences_of_precisions_far_apart():
    """1 / 4 log(1 + (p - q)^2 / (4 p q)) by logarithms; "kl" has no such form and says so."""
    near, far = embedding(1e-200, 2.0), embedding(1e150, 3.0)
    expected = (math.log(1e150) - math.log(1e-200) - math.log(4) + math.log1p(1 / 24)) / 4
    for one, other in ((near, far), (far, near)):
        assert ff.embedding_distance(one, other, kind="jensen-shannon") == pytest.approx(expected, rel=1e-12)
        with pytest.raises(
            ValueError, match="embedding_distance: the distance must fit float64, got more of kind 'kl': two precisions"
        ):
            ff.embedding_distance(one, other, kind="kl")
    with pytest.raises(ValueError, match="the distance must fit float64"):
        ff.embedding_distance(far, near, kind="kl", damping=1e-200, alpha=1.0)


def test_cosines_by_hand():
    a, b = embedding(1.0, 3.0), embedding(3.0, 1.0)
    u, v = torch.tensor([0.25, 0.75]), torch.tensor([0.75, 0.25])
    assert ff.embedding_distance(a, b) == pytest.approx(1 - (u @ v / (u @ u)).item(), rel=1e-6)
    u, v = torch.tensor([1 / 2, 1 / 4]), torch.tensor([1 / 4, 1 / 2])
    got = ff.embedding_distance(a, b, kind="normalized_cosine", damping=1.0)
    assert got == pytest.approx(1 - (u @ v / (u @ u)).item(), rel=1e-6)
    # By parameter name, the prior's precision may differ: the variances are in its units.
    both = task2vec.TaskEmbedding({"v": torch.ones(1).double(), "w": torch.ones(1).double()}, "test")
    none = task2vec.TaskEmbedding({"v": torch.zeros(1).double(), "w": torch.zeros(1).double()}, "test")
    u = torch.tensor([1 / 2, 3 / 4])
    got = ff.embedding_distance(both, none, kind="normalized_cosine", damping={"v": 1.0, "w": 3.0})
    assert got == pytest.approx(1 - (u.sum() / u.norm() / math.sqrt(2)).item(), rel=1e-6)


def test_filters_that_neither_task_needs_do_not_count_in_the_cosine():
    one, other = (
        ff.embedding_distance(embedding(1, 2), embedding(2, 1)),
        ff.embedding_distance(embedding(1, 2, 0), embedding(2, 1, 0)),
    )
    assert one == other
    assert ff.embedding_distance(embedding(1.0, 0.0), embedding(0.0, 2.0)) == 1
    assert ff.embedding_distance(embedding(1.0, 0.0), embedding(0.0, 0.0)) == 1
    assert ff.embedding_distance(embedding(0.0), embedding(0.0)) == 0


def test_curvature_below_zero_by_noise_is_a_precision_above_zero():
    assert 0 < ff.embedding_distance(embedding(1.0, -0.01), embedding(1.0, 0.01), kind="kl", damping=0.1) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_gives_a_direction(kind):
    big, small, trivial = embedding(1.0, 20.0), embedding(0.1, 0.2), embedding(0.0, 0.0)
    options = {"kind": kind, "damping": 0.1}
    symmetric = ff.embedding_distance(big, small, **options)
    there, back = (ff.embedding_distance(*pair, **options, alpha=0.15) for pair in ((big, small), (small, big)))
    assert there == pytest.approx(symmetric - 0.15 * ff.embedding_distance(big, trivial, **options), rel=1e-12)
    assert there < back < symmetric


def test_states_its_conditions():
    model = network()
    text = str(ff.task_embedding(measure(model), model, skip=["5"]))
    for part in ("9 filters of 2 parameters", "N = 12", "exact", "diagonal"):
        assert part in text


def test_embedding_refuses():
    model = network()
    F = measure(model)
    with pytest.raises(ValueError, match=r"task_embedding: layers and skip must name layers that were measured, got \['9'\]"):
        ff.task_embedding(F, model, skip=["9"])
    with pytest.raises(ValueError, match="at least one parameter must be left"):
        ff.task_embedding(F, model, layers=["1"])
    with pytest.raises(ValueError, match=r"model must have '0.weight' of shape \(4, 1, 3, 3\), got none"):
        ff.task_embedding(F, nn.Sequential())
    with pytest.raises(ValueError, match=r"model must have '0.weight' of shape \(4, 1, 3, 3\), got \(2, 1, 3, 3\)"):
        ff.task_embedding(F, nn.Sequential(nn.Conv2d(1, 2, 3)))
    layer, variance = nn.Linear(2, 1), {"weight": torch.ones(1, 2)}
    from_variance = ff.TaskEmbedding.from_variance
    with pytest.raises(ValueError, match="from_variance: beta must be a finite number > 0"):
        from_variance(variance, layer, beta=0, prior_scale=1.0)
    with pytest.raises(ValueError, match="from_variance: prior_scale must be a finite number > 0"):
        from_variance(variance, layer, beta=1.0, prior_scale=-1.0)
    with pytest.raises(ValueError, match=r"from_variance: variances must be finite and > 0, got others in \['weight'\]"):
        from_variance({"weight": torch.zeros(1, 2)}, layer, beta=1.0, prior_scale=1.0)
    with pytest.raises(ValueError, match=r"from_variance: variance\['weight'\] must be real, got torch.complex64"):
        from_variance({"weight": torch.ones(1, 2) + 1j}, layer, beta=1.0, prior_scale=1.0)


@pytest.mark.parametrize(
    ("other", "options", "message"),
    [
        (embedding(1.0, 2.0), {"kind": "euclid"}, "kind must be one of"),
        (embedding(1.0, 2.0), {"alpha": -1.0}, "alpha must be a finite number >= 0"),
        (embedding(1.0, 2.0), {"damping": -1.0}, "damping must be a finite number >= 0"),
        (embedding(1.0, 2.0), {"alpha": 1.0}, "damping must be > 0 with alpha and for 'normalized_cosine', got 0.0"),
        (embedding(1.0, 2.0), {"kind": "normalized_cosine"}, "damping must be > 0 with alpha and for 'normalized_cosine'"),
        (embedding(1.0), {}, r"both must be of the same filters, differ in \['w'\]"),
        (embedding(0.0, 1.0), {"kind": "kl"}, "precisions must be > 0 for 'kl', got 1 of 2 that are not; pass damping"),
        (embedding(-1.0, 1.0), {}, "precisions must be >= 0 for 'cosine', got 1 of 2 that are not"),
        (embedding(math.nan, 1.0), {}, "precisions must be >= 0 for 'cosine', got 1 of 2 that are not"),
        (embedding(math.inf, 1.0), {"kind": "kl"}, "precisions must be > 0 for 'kl', got 1 of 2 that are not"),
    ],
)
def test_distance_refuses(other, options, message):
    with pytest.raises(ValueError, match="embedding_distance: " + message):
        ff.embedding_distance(embedding(1.0, 2.0), other, **options)


def test_distance_is_of_embeddings():
    with pytest.raises(TypeError, match="both must be results of task_embedding, got TaskEmbedding and Tensor"):
        ff.embedding_distance(embedding(1.0, 2.0), torch.ones(2))


def test_the_asymmetry_of_task_distances_is_the_difference_of_the_complexities():
    joint, alone = torch.rand(6, 6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    got = ff.task_distances((joint + joint.T) / 2, alone)
    torch.testing.assert_close(got.matrix - got.matrix.T, alone[None] - alone[:, None])
    assert got.explained == 1
    assert got.matrix[2, 3].item() == ff.task_distance(got.joint[2, 3].item(), alone[2].item())
    noisy = ff.task_distances(joint, alone)
    asymmetry = noisy.matrix - noisy.matrix.T
    residual = asymmetry - (alone[None] - alone[:, None])
    assert noisy.explained == pytest.approx(1 - (residual.square().sum() / asymmetry.square().sum()).item(), rel=1e-12)
    assert noisy.explained < 1


def test_task_distance_of_informations():
    F = DiagonalFisher({"w": torch.rand(4)}, num_samples=7)
    weights = [{"w": torch.full((4,), scale)} for scale in (2.0, 1.0)]
    both, first = (ff.information_in_weights(F, w, prior_scale=1.0, beta=0.1, variant="paper") for w in weights)
    assert ff.task_distance(both, first) == pytest.approx(6.0, rel=1e-12)
    other = ff.information_in_weights(F, weights[0], prior_scale=1.0, beta=0.2, variant="paper")
    with pytest.raises(ValueError, match=r"task_distance: both must be of one beta, got 0.2 and 0.1"):
        ff.task_distance(other, first)
    wide = ff.information_in_weights(F, weights[0], prior_scale=2.0, beta=0.1, variant="paper")
    with pytest.raises(ValueError, match=r"task_distance: both must be of one prior_scale, got 2.0 and 1.0"):
        ff.task_distance(wide, first)
    exact = ff.information_in_weights(F, weights[0], prior_scale=1.0, beta=0.1)
    with pytest.raises(ValueError, match="task_distance: both must be of one variant, got 'exact' and 'paper'"):
        ff.task_distance(exact, first)


def test_task_distance_refuses():
    with pytest.raises(ValueError, match="task_distance: joint must be a finite number, got nan"):
        ff.task_distance(math.nan, 1.0)
    with pytest.raises(ValueError, match=r"task_distances: must be \[n, n\] and \[n\], got joint \(2, 3\) and alone \(2,\)"):
        ff.task_distances(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match="task_distances: entries must be finite, got NaN or infinity"):
        ff.task_distances(torch.ones(2, 2) / 0, torch.ones(2))
    with pytest.raises(ValueError, match=r"task_distances: alone must be real, got torch.complex64; pass .real"):
        ff.task_distances(torch.ones(2, 2), torch.ones(2) * 1j)


@pytest.mark.parametrize("option", ["layers", "skip"])
def test_one_name_is_no_collection_of_names(option):
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(11)])
    F = ff.fisher(model, [(torch.randn(6, 3), None)], progress=False)
    with pytest.raises(ValueError, match=rf"{option} must be a collection of layer names, got the text '10'"):
        ff.task_embedding(F, model, **{option: "10"})


def test_distances_are_of_one_prior_and_architecture():
    def measured(width, scale):
        net = nn.Linear(3, width)
        net.weight.data.mul_(scale)
        data = [(torch.randn(8, 3), torch.randint(width, (8,)))]
        return ff.information_in_weights(ff.fisher(net, data, progress=False), net, prior_scale=prior, beta=0.1)

    prior = 1.0
    assert math.isfinite(ff.task_distance(measured(2, 1.0), measured(2, 1.0)))
    with pytest.raises(ValueError, match="one architecture and measured alike, got shapes of"):
        ff.task_distance(measured(2, 1.0), measured(3, 1.0))
    F, weights = DiagonalFisher({"w": torch.tensor([1.0, 2.0])}, num_samples=3), {"w": torch.ones(2)}
    one, other = (ff.optimal_posterior(F, weights, prior_scale=scale, beta=0.1) for scale in (1.0, 5.0))
    with pytest.raises(ValueError, match="both must be of one prior"):
        ff.task_distance(one, other)
    prior = "fit"
    with pytest.raises(ValueError, match=r"must be of one prior_scale, got .* of \['bias', 'weight'\]"):
        ff.task_distance(measured(2, 1.0), measured(2, 9.0))


def test_priors_around_other_centers_are_others():
    """And the same prior is the same, however its scales were given."""
    F, w = (
        DiagonalFisher({"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}, num_samples=3),
        {"w": torch.ones(2), "b": torch.ones(1)},
    )
    options = {"prior_scale": 0.3, "beta": 0.1}
    zero, one = ({name: torch.full_like(t, value) for name, t in w.items()} for value in (0.0, 1.0))
    at_zero, at_one = (ff.information_in_weights(F, w, center=center, **options) for center in (zero, one))
    with pytest.raises(ValueError, match=r"must be of one center_norm, got 0\.0 and 1\.73"):
        ff.task_distance(at_zero, at_one)
    assert ff.compare(at_zero, at_one, names=("a", "b")).notes == ("norm of the center: 0 in a, 1.73205 in b",)
    by_name = ff.information_in_weights(F, w, center=zero, prior_scale={"w": 0.3, "b": 0.3}, beta=0.1)
    assert ff.task_distance(at_zero, by_name) == 0


@pytest.mark.parametrize("kind", ["cosine", "normalized_cosine"])
@pytest.mark.parametrize("tiny", [2.0**-500, 2.0**-550])
def test_angles_are_of_directions_however_short(kind, tiny):
    """``d / (p + d)`` of all filters is d times as small with d; ``p / (p + q)`` too, where q is beyond p."""
    first, second = [0.1, 2.0, 3.0], [1.0, 0.2, 5.0]

    def distance(factor):
        a, b = (ff.TaskEmbedding({"w": torch.tensor(v, dtype=torch.float64)}, "test") for v in (first, second))
        if kind == "cosine":
            a = ff.TaskEmbedding({"w": a.vector() * factor}, "test")
            return ff.embedding_distance(a, b, kind=kind)
        return ff.embedding_distance(a, b, kind=kind, damping=factor)

    assert distance(tiny) == pytest.approx(distance(2.0**-100), rel=1e-12)
