# SPDX-License-Identifier: Apache-2.0
"""The loss under weight noise: closed forms, weights of samples, other losses, a model that is left alone, and refusals."""

import copy
import math

import pytest
import torch
from torch import nn

import fisherfast as ff
from fisherfast.fisher import DiagonalFisher
from fisherfast.likelihood import Predictions

N = 12


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


def labelled():
    return torch.randn(N, 4), torch.randint(0, 3, (N,))


def posterior_of(net, beta=1e-2, names=None):
    diagonal = {n: torch.rand_like(p) for n, p in net.named_parameters() if names is None or n in names}
    F = DiagonalFisher(diagonal, num_samples=N, provenance=ff.Provenance(likelihood="categorical"))
    weights = {n: p for n, p in net.named_parameters() if n in F.names}
    return ff.optimal_posterior(F, weights, prior_scale=0.5, beta=beta)


@torch.no_grad()
def by_hand(net, posterior, loss, n, seed):
    """The mean loss at each draw and its mirror image, written into a copy of the network."""
    found = []
    for draw in posterior.draws(n, seed=seed):
        for weights in (draw, {name: 2 * posterior.mean[name] - value for name, value in draw.items()}):
            other = copy.deepcopy(net)
            other.load_state_dict(other.state_dict() | weights)
            found.append(float(loss(other)))
    return torch.tensor(found, dtype=torch.float64).view(n, 2).mean(1)


def test_is_the_mean_over_draws_written_into_the_model():
    net, (x, y) = network(), labelled()
    posterior = posterior_of(net)
    values = by_hand(net, posterior, lambda m: nn.functional.cross_entropy(m(x), y), 5, seed=3)
    estimate = ff.expected_loss(posterior, net, [(x[:5], y[:5]), (x[5:], y[5:])], draws=5, seed=3)
    assert estimate.value == pytest.approx(float(values.mean()), rel=1e-6)
    assert estimate.stderr == pytest.approx(float(values.std()) / math.sqrt(5), rel=1e-4)
    assert ff.expected_loss(posterior, net, [(x, y)], draws=5, seed=3).value == pytest.approx(estimate.value, rel=1e-6)
    assert ff.expected_loss(posterior, net, [(x, y)], draws=5, seed=4).value != pytest.approx(estimate.value, rel=1e-6)
    assert math.isnan(ff.expected_loss(posterior, net, [(x, y)], draws=1).stderr)


def test_linear_gaussian_model_matches_the_closed_form():
    # E_Q (y - x w)^2 / 2 = L(w) + 1/2 tr(F Sigma), F = X^T X / N.
    X, net = torch.randn(N, 3, dtype=torch.float64), nn.Linear(3, 1, bias=False).double()
    y = X @ torch.randn(3, 1, dtype=torch.float64) + torch.randn(N, 1, dtype=torch.float64)
    F = ff.fisher(net, [(X, None)], structure="gram", fisher_type="exact", likelihood="gaussian", progress=False)
    posterior = ff.optimal_posterior(F, net, prior_scale=2.0, beta=0.1)
    sigma = 0.1 * torch.linalg.inv(X.mT @ X / N + 0.1 / 4 * torch.eye(3, dtype=torch.float64))
    at_mean = 0.5 * (net(X) - y).square().mean() + 0.5 * math.log(2 * math.pi)
    closed = float(at_mean.detach() + 0.5 * torch.trace(X.mT @ X / N @ sigma))
    estimate = ff.expected_loss(posterior, net, [(X, y)], "gaussian", draws=400)
    assert abs(estimate.value - closed) < 4.5 * estimate.stderr < 0.1 * closed
    assert ff.mean_loss(net, [(X, y)], "gaussian") == pytest.approx(at_mean.item(), rel=1e-12)


def test_the_loss_is_of_the_posterior_s_own_likelihood():
    net, x = network(), labelled()[0]
    data = [(x, torch.randn(N, 3))]
    F = ff.fisher(net, data, likelihood="gaussian", progress=False)
    options = {"beta": 1e-2, "prior_scale": 0.5}
    for q in (
        ff.optimal_posterior(F, net, **options),
        ff.variational_posterior(net, data, likelihood="gaussian", epochs=1, **options),
    ):
        assert q.likelihood == "gaussian"
        assert ff.expected_loss(q, net, data).value == ff.expected_loss(q, net, data, "gaussian").value
        with pytest.warns(
            ff.FisherWarning, match="expected_loss: likelihood should be that of the nats, gaussian, got bernoulli"
        ):
            ff.expected_loss(q, net, [(x, torch.rand(N, 3))], "bernoulli")


class Unnamed(ff.Posterior):
    """As one of the user's own, which says nothing of a likelihood."""

    likelihood = ff.GaussianPosterior.likelihood


def test_a_likelihood_that_cannot_be_made_from_its_name_is_asked_for():
    net, data = network(), [labelled()]
    smooth = ff.Categorical(label_smoothing=0.1)
    trained = ff.variational_posterior(net, data, beta=1e-2, prior_scale=0.5, likelihood=smooth, epochs=1)
    with pytest.raises(ValueError, match=r"must be given beside nats of categorical\(label_smoothing=0.1\), got None"):
        ff.expected_loss(trained, net, data)
    known = posterior_of(net)
    unnamed = Unnamed(known.mean, known.information)
    with pytest.raises(ValueError, match="must be given beside nats of an unknown likelihood, got None; pass likelihood="):
        ff.expected_loss(unnamed, net, data)
    assert ff.expected_loss(unnamed, net, data, "categorical").value == ff.expected_loss(known, net, data).value


def test_gradient_of_the_loss_cancels():
    net, (x, y) = network(), labelled()
    posterior = posterior_of(nn.Sequential(net[0]))
    linear = ff.expected_loss(posterior, nn.Sequential(net[0]), [(x, y)], loss=lambda z, y: z.sum(1))
    assert linear.value == pytest.approx(float(net[0](x).sum(1).mean().detach()), rel=1e-5)
    assert linear.stderr < 1e-5


def test_weights_of_samples_count_them():
    net, (x, y) = network(), labelled()
    posterior, weight = posterior_of(net), torch.tensor([2.0, 0, 1] * 4)
    index = torch.arange(N).repeat_interleave(weight.long())
    weighted = ff.expected_loss(posterior, net, [(x, y, weight)], draws=3)
    assert weighted.value == pytest.approx(ff.expected_loss(posterior, net, [(x[index], y[index])], draws=3).value, rel=1e-6)


@pytest.mark.parametrize(
    ("likelihood", "shape", "targets"),
    [
        (ff.Categorical(), (N, 3), lambda: torch.randint(0, 3, (N,))),
        (
            ff.Categorical(class_weight=torch.tensor([1.0, 2, 3]), label_smoothing=0.2),
            (N, 5, 3),
            lambda: torch.randint(0, 3, (N, 5)),
        ),
        (ff.Categorical(axis=1), (N, 3, 2, 2), lambda: torch.randint(0, 3, (N, 2, 2))),
        (ff.CausalLM(), (N, 5, 3), lambda: torch.randint(0, 3, (N, 5))),
        (ff.Bernoulli(), (N, 4), lambda: torch.rand(N, 4)),
        (ff.Bernoulli(pos_weight=torch.tensor([1.0, 2])), (N, 5, 2), lambda: torch.randint(0, 2, (N, 5, 2)).float()),
        (ff.Gaussian(torch.tensor([0.5, 2])), (N, 5, 2), lambda: torch.randn(N, 5, 2)),
        (ff.LogLikelihood(lambda z, y: -(z - y).abs().sum(-1), name="laplace"), (N, 5, 2), lambda: torch.randn(N, 5, 2)),
    ],
)
def test_score_of_a_likelihood_is_the_gradient_of_its_losses(likelihood, shape, targets):
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, mask = targets(), torch.ones(N, 5)
    mask[:, 3:] = 0
    if not y.is_floating_point() and y.dim() > 1:
        y[0, -1] = -100
    predictions = likelihood.predictions(z, y, mask if len(shape) == 3 else None, torch.arange(N))
    losses = likelihood.losses(predictions)
    assert losses.shape == (N,)
    (gradient,) = torch.autograd.grad(losses.sum(), predictions.values)
    assert torch.allclose(gradient, likelihood.empirical(predictions), atol=1e-12)


def test_losses_are_normalised_log_probabilities():
    z, y = torch.randn(N, 3, dtype=torch.float64), torch.randn(N, 3, dtype=torch.float64)
    normal = -torch.distributions.Normal(z, 0.3).log_prob(y).sum(1)
    likelihood = ff.Gaussian(0.3)
    assert torch.allclose(likelihood.losses(likelihood.predictions(z, y, None, torch.arange(N))), normal)
    binary = torch.randint(0, 2, (N, 3)).double()
    bernoulli = -torch.distributions.Bernoulli(logits=z).log_prob(binary).sum(1)
    likelihood = ff.Bernoulli()
    assert torch.allclose(likelihood.losses(likelihood.predictions(z, binary, None, torch.arange(N))), bernoulli)


def test_zero_one():
    output = torch.tensor([[2.0, 1, 0], [0, 1, 2], [0, 3, 2]])
    assert ff.zero_one(output, torch.tensor([0, 0, 1])).tolist() == [0, 1, 0]
    assert ff.zero_one(output.unsqueeze(0), torch.tensor([[0, 0, -100]])).tolist() == [0.5]
    assert ff.zero_one(output.unsqueeze(0), torch.tensor([[-100] * 3])).tolist() == [0]
    with pytest.raises(ValueError, match=r"zero_one: targets must be \(3,\), the output without its class axis, got \(3, 1\)"):
        ff.zero_one(output, torch.zeros(3, 1))


def test_another_loss_is_measured():
    net, (x, y) = network(), labelled()
    posterior = posterior_of(net, beta=1e-1)
    values = by_hand(net, posterior, lambda m: (m(x).argmax(1) != y).double().mean(), 6, seed=0)
    assert ff.expected_loss(posterior, net, [(x, y)], draws=6, loss=ff.zero_one).value == pytest.approx(float(values.mean()))
    with pytest.raises(ValueError, match=r"loss must return one number per sample, \[N\] = \(12,\), got \(\)"):
        ff.expected_loss(posterior, net, [(x, y)], loss=nn.functional.cross_entropy)


def test_losses_are_added_in_float64():
    data = [(torch.ones(2, 4), torch.zeros(2))]
    assert ff.mean_loss(network(), data, loss=lambda output, y: torch.tensor([2.0**24, 1.0])) == (2**24 + 1) / 2


def test_dict_batches_and_output():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, features):
            return {"scores": self.inner(features)}

    net, (x, y) = Named().eval(), labelled()
    data, posterior = [{"features": x, "labels": y}], posterior_of(net)
    plain = nn.functional.cross_entropy(net.inner(x), y).item()
    assert ff.mean_loss(net, data, output="scores") == pytest.approx(plain, rel=1e-6)
    assert ff.expected_loss(posterior, net, data, draws=2, output="scores").value != pytest.approx(plain, rel=1e-6)


def test_tied_weights_are_moved_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(6, 3)
            self.head = nn.Linear(3, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    net, ids = Tied().eval(), torch.randint(0, 6, (N,))
    posterior = posterior_of(net)
    assert set(posterior.mean) == {"embed.weight"}
    expected = by_hand(net, posterior, lambda m: nn.functional.cross_entropy(m(ids), ids), 1, seed=0)
    assert ff.expected_loss(posterior, net, [(ids, ids)], draws=1).value == pytest.approx(float(expected), rel=1e-6)


def test_parameters_without_noise_keep_their_values():
    net, (x, y) = network(), labelled()
    posterior = posterior_of(net, names=("2.bias",))
    expected = by_hand(net, posterior, lambda m: nn.functional.cross_entropy(m(x), y), 1, seed=0)
    assert ff.expected_loss(posterior, net, [(x, y)], draws=1).value == pytest.approx(float(expected), rel=1e-5)


class Failing(nn.Module):
    """Works for two batches."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("out of order")
        return self.inner(x)


def test_model_is_left_as_it_is_also_on_errors():
    net, (x, y) = Failing(network()), labelled()
    net.eval()
    before = {n: (p, p.detach().clone(), p._version) for n, p in net.named_parameters()}
    with pytest.raises(RuntimeError, match="out of order"):
        ff.expected_loss(posterior_of(net), net, [(x, y)], draws=3)
    for name, p in net.named_parameters():
        same, value, version = before[name]
        assert p is same and torch.equal(p, value) and p._version == version and p.requires_grad and p.grad is None


def test_data_that_a_model_writes_to_are_as_before():
    net, (x, y) = nn.Sequential(nn.ReLU(inplace=True), network()), labelled()
    before = x.clone()
    ff.mean_loss(net, [(x, y)])
    assert torch.equal(x, before)


def test_refuses_losses_that_are_not_finite():
    net, (x, y) = network(), labelled()
    with pytest.raises(ff.NonFiniteError, match=r"losses must be finite, got 12 others in batch 1 of draw 0"):
        ff.expected_loss(posterior_of(net), net, [(x, y), (x * math.inf, y)])


def test_refuses_data():
    net, (x, y) = network(), labelled()
    posterior = posterior_of(net)
    with pytest.raises(ValueError, match="data must hold samples of a weight > 0, got none"):
        ff.expected_loss(posterior, net, [])
    with pytest.raises(ValueError, match="data must hold samples of a weight > 0, got none"):
        ff.expected_loss(posterior, net, [(x, y, torch.zeros(N))])
    with pytest.raises(ValueError, match="data must have labels, got a batch without"):
        ff.expected_loss(posterior, net, [(x, None)])
    with pytest.raises(ValueError, match=r"data must be readable several times, got list_iterator"):
        ff.expected_loss(posterior, net, iter([(x, y)]))
    assert math.isfinite(ff.mean_loss(net, iter([(x, y)])))


def test_refuses_models():
    net, (x, y) = network(), labelled()
    posterior = posterior_of(net)
    with pytest.raises(ValueError, match=r"model must hold every parameter of posterior, got none for \['0.bias'"):
        ff.expected_loss(posterior, nn.Linear(4, 3), [(x, y)])
    with pytest.raises(ValueError, match=r"model\['0.weight'\] must be \(5, 4\) as in posterior, got \(6, 4\)"):
        ff.expected_loss(posterior, nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), [(x, y)])
    with pytest.raises(ValueError, match="dropout and batch statistics must be off"):
        ff.expected_loss(posterior, nn.Sequential(*net, nn.Dropout(0.5)).train(), [(x, y)])
    with pytest.raises(ValueError, match="draws must be >= 1, got 0"):
        ff.expected_loss(posterior, net, [(x, y)], draws=0)
    with pytest.raises(ValueError, match="likelihood: must be one of"):
        ff.expected_loss(posterior, net, [(x, y)], "poisson")


def test_refuses_complex_weights_and_losses():
    net, (x, y) = network(), labelled()
    with pytest.raises(ValueError, match=r"mean_loss: weights\['0.bias'\] must be real, got torch.complex64"):
        ff.mean_loss(net, [(x, y)], weights={"0.bias": torch.ones(5) + 1j})
    with pytest.raises(ValueError, match=r"mean_loss: loss must be real, got torch.complex64"):
        ff.mean_loss(net, [(x, y)], loss=lambda z, y: z.sum(1) + 1j)


def test_refuses_a_likelihood_without_losses():
    class Scores:
        name = "scores"

        def predictions(self, output, targets, mask, sample):
            return Predictions(output, targets, targets == targets, sample)

    net, (x, y) = network(), labelled()
    with pytest.raises(ValueError, match=r"likelihood must have losses\(predictions\), got .*; add it, or pass loss="):
        ff.expected_loss(posterior_of(net), net, [(x, y)], Scores())


def test_logits_that_are_nan_are_not_right():
    logits = torch.tensor([[math.nan, 0.0], [1.0, 0.0]])
    assert str(ff.zero_one(logits, torch.tensor([0, 0])).tolist()) == "[nan, 0.0]"
    several = torch.stack([logits, logits.flip(0)])
    assert str(ff.zero_one(several, torch.tensor([[-100, 0], [0, -100]])).tolist()) == "[0.0, 0.0]"


def test_a_loss_without_noise_is_not_advised_to_have_less():
    net = nn.Linear(2, 2)
    data = [(torch.full((3, 2), math.nan), torch.zeros(3, dtype=torch.long))]
    with pytest.raises(ff.NonFiniteError, match="without noise; look at the data and the weights"):
        ff.mean_loss(net, data)


class Tokens(nn.Module):
    """Scores each position by the token that it reads."""

    def __init__(self, classes):
        super().__init__()
        self.scores = nn.Embedding(7, classes)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.scores(input_ids)


@pytest.mark.parametrize("ignored", [-100, 5])
def test_errors_of_a_causal_model_are_those_of_the_next_token(ignored):
    model = Tokens(7).eval()
    model.scores.weight.data = 20 * torch.eye(7)  # it repeats what it reads: right about a next token that is the same
    ids, mask = torch.randint(0, 2, (4, 6)), torch.ones(4, 6, dtype=torch.long)
    mask[1:, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, ignored)}
    share = [float((ids[n, : L - 1] != ids[n, 1:L]).float().mean()) for n, L in enumerate(mask.sum(1).tolist())]
    found = ff.mean_loss(model, [batch], ff.CausalLM(ignore_index=ignored), loss=ff.zero_one)
    assert found == pytest.approx(sum(share) / 4, rel=1e-6) and 0 < found < 1
    rows = {"input_ids": ids[mask != 0][None], "labels": ids[mask != 0][None], "sample_offsets": [0, 6, 10, 14, 18]}
    assert ff.mean_loss(model, [rows], "causal_lm", loss=ff.zero_one) == pytest.approx(found, rel=1e-6)
    same = torch.tensor([[0, 1, 2, 3, 3]])
    assert ff.mean_loss(model, [{"input_ids": same, "labels": same}], "causal_lm", loss=ff.zero_one) == 0.75


def test_what_a_likelihood_ignores_is_no_error():
    net, (x, y) = network(), labelled()
    right = net(x).argmax(1)
    for ignored in (-100, 255):
        y = right.masked_fill(torch.arange(N) < 5, ignored)
        assert ff.mean_loss(net, [(x, y)], ff.Categorical(ignore_index=ignored), loss=ff.zero_one) == 0


def squared_error(z, y):
    return (z - y).square().flatten(1).sum(1)


def mean_cross_entropy(z, y):
    return nn.functional.cross_entropy(z.mT, y, reduction="none").mean(1)


@pytest.mark.parametrize("kind", ["real", "classes"])
def test_another_loss_of_packed_samples_is_that_of_each_alone(kind):
    model, lengths = Tokens(3).eval(), [3, 2, 1]
    offsets = [0, 3, 5, 6]
    ids = torch.randint(0, 7, (1, 6))
    if kind == "real":
        targets, likelihood, loss = torch.randn(1, 6, 3), "gaussian", squared_error
    else:
        targets, likelihood, loss = torch.randint(0, 3, (1, 6)), "categorical", mean_cross_entropy
    packed = {"input_ids": ids, "labels": targets, "sample_offsets": offsets}
    alone = [{"input_ids": i, "labels": y} for i, y in zip(ids.split(lengths, 1), targets.split(lengths, 1), strict=True)]
    found = ff.mean_loss(model, [packed], likelihood, loss=loss)
    assert found == pytest.approx(ff.mean_loss(model, alone, likelihood, loss=loss), rel=1e-6)
    with pytest.raises(ValueError, match=r"loss must return one number per sample, \[N\] = \(1,\), got \(\)"):
        ff.mean_loss(model, [packed], likelihood, loss=lambda z, y: z.sum())


@pytest.mark.parametrize("loss", [None, ff.zero_one])
def test_data_of_ignored_labels_have_no_loss(loss):
    net, (x, y) = network(), labelled()
    none = torch.full_like(y, -100)
    assert ff.mean_loss(net, [(x, none), (x, y)], loss=loss) > 0
    with pytest.raises(ValueError, match="mean_loss: data must have a label that counts, got none: all are ignored"):
        ff.mean_loss(net, [(x, none)], loss=loss)
    ids = torch.full((2, 3), -100)
    ids[:, 0] = 1
    with pytest.raises(ValueError, match="must have a label that counts"):  # no token before the first predicts it
        ff.mean_loss(Tokens(7).eval(), [{"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": ids}], "causal_lm", loss=loss)
