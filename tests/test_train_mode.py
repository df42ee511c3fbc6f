# SPDX-License-Identifier: Apache-2.0
"""Dropout, random slopes, other draws and batch statistics are refused by every function that runs a model, in each spelling torch
has for them; draws in eval mode are what the model is, and said.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from networks import Wrapped
from torch import nn

import fisherfast as ff

N, I, C = 6, 4, 3


def attention(m, h):
    w = torch.eye(C * 3, C, dtype=h.dtype)
    q = h.unsqueeze(1)
    return F.multi_head_attention_forward(q, q, q, C, 1, w, None, None, None, False, 0.5, torch.eye(C, dtype=h.dtype), None)[
        0
    ].squeeze(1)


CALLS = {
    "F.dropout": lambda m, h: F.dropout(h, 0.5),
    "F.alpha_dropout": lambda m, h: F.alpha_dropout(h, 0.5, training=True),
    "torch.dropout": lambda m, h: torch.dropout(h, 0.5, True),
    "torch.dropout by name": lambda m, h: torch.dropout(h, p=0.5, train=True),
    "torch.dropout_": lambda m, h: torch.dropout_(h * 1, 0.5, True),
    "torch.alpha_dropout": lambda m, h: torch.alpha_dropout(h, 0.5, True),
    "torch.feature_dropout": lambda m, h: torch.feature_dropout(h.unsqueeze(-1), 0.5, True).squeeze(-1),
    "torch.native_dropout": lambda m, h: torch.native_dropout(h, 0.5, True)[0],
    "torch.native_dropout of None": lambda m, h: torch.native_dropout(h, 0.5, None)[0],
    "F.gumbel_softmax": lambda m, h: F.gumbel_softmax(h),
    "attention": attention,
    "torch.rrelu": lambda m, h: torch.rrelu(h, training=True),
    "torch.rrelu_": lambda m, h: torch.rrelu_(h * 1, training=True),
    "F.batch_norm": lambda m, h: F.batch_norm(h, None, None, training=True),
    "torch.batch_norm": lambda m, h: torch.batch_norm(h, None, None, None, None, True, 0.1, 1e-5, False),
}
QUIET = {
    "torch.dropout": lambda m, h: torch.dropout(h, 0.5, False),
    "a number on the host": lambda m, h: h if torch.rand([]) < 2 else -h,
    "a number on the host as [1]": lambda m, h: h if torch.rand(1).item() < 2 else -h,
    "pooling at given places": lambda m, h: (
        h + F.fractional_max_pool2d(torch.ones(1, C, 4, 4), 2, 1, _random_samples=torch.zeros(1, C, 2)).flatten()
    ),
    "probability 0": lambda m, h: torch.dropout(h, 0.0, True),
    "torch.rrelu": lambda m, h: torch.rrelu(h),
    "torch.batch_norm": lambda m, h: torch.batch_norm(h, None, None, torch.zeros(C), torch.ones(C), False, 0.1, 1e-5, False),
}


DRAWS = {
    "stochastic depth": lambda m, h: h * (torch.rand(len(h), 1) > 0.5),
    "timm's drop path": lambda m, h: h * h.new_empty(len(h), 1).bernoulli_(0.5),
    "torch.bernoulli": lambda m, h: h * torch.bernoulli(torch.full_like(h, 0.5)),
    "torch.randn_like": lambda m, h: h + torch.randn_like(h),
    "torch.randint": lambda m, h: h + torch.randint(2, h.shape),
    "torch.normal": lambda m, h: h + torch.normal(torch.zeros_like(h), 1.0),
    "torch.randperm": lambda m, h: h[:, torch.randperm(C)],
    "torch.multinomial": lambda m, h: h * torch.multinomial(torch.ones_like(h), 1),
    "Tensor.exponential_": lambda m, h: h - torch.empty_like(h).exponential_().log(),
    "Tensor.normal_": lambda m, h: h + torch.empty_like(h).normal_(),
    "noise of the weights": lambda m, h: h + F.linear(torch.ones(I), torch.randn_like(m.layer.weight)),
    "torch.distributions": lambda m, h: h + torch.distributions.Gamma(torch.ones(C), 1.0).sample(),
    "fractional pooling": lambda m, h: h + F.fractional_max_pool2d(torch.ones(1, C, 4, 4), 2, 1).flatten(),
}


def model_of(call):
    return Wrapped(lambda m, x: call(m, m.layer(x)), layer=nn.Linear(I, C))


def users(model):
    x, y = torch.randn(N, I), torch.randint(0, C, (N,))
    known = ff.fisher(model_of(lambda m, h: h), [(x, y)], progress=False)

    def collected():
        with ff.collect(model, ff.Diagonal()) as stats:
            stats.backward(F.cross_entropy(model(x), y, reduction="none"))

    operator = ff.FisherOperator(model, [(x, y)])
    return {
        "fisher": lambda: ff.fisher(model, [(x, y)], progress=False),
        "collect": collected,
        "operator": lambda: operator @ torch.ones(operator.num_parameters),
        "mean_loss": lambda: ff.mean_loss(model, [(x, y)]),
        "input_fisher": lambda: ff.input_fisher(model, x[:2], known, beta=0.1, prior_scale=1.0),
    }


@pytest.mark.parametrize("user", ["fisher", "collect", "operator", "mean_loss", "input_fisher"])
@pytest.mark.parametrize("name", CALLS)
def test_refused(name, user):
    with pytest.raises(ValueError, match=r"model: must not (draw|use)"):
        users(model_of(CALLS[name]))[user]()


@pytest.mark.parametrize("user", ["fisher", "collect", "operator", "mean_loss", "input_fisher"])
@pytest.mark.parametrize("name", QUIET)
def test_taken_where_nothing_is_drawn(name, user):
    users(model_of(QUIET[name]))[user]()


@pytest.mark.parametrize("user", ["fisher", "collect", "operator", "mean_loss", "input_fisher"])
@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_refused_in_train_mode(name, user):
    with pytest.raises(
        ValueError, match=r"model: must not draw random numbers in train mode, got .*in Wrapped; call model\.eval\(\)"
    ):
        users(model_of(DRAWS[name]))[user]()


def test_draws_of_a_batch_of_one_sample_are_refused():
    model = model_of(lambda m, h: h * (torch.rand(len(h), 1) > 2))
    with pytest.raises(ValueError, match="model: must not draw random numbers in train mode, got rand"):
        ff.fisher(model, [(torch.randn(1, I), torch.zeros(1, dtype=torch.long))], progress=False)


def test_one_layer_in_train_mode_is_enough():
    noise = Wrapped(lambda m, h: h + torch.randn_like(h))
    model = nn.Sequential(nn.Linear(I, C), noise).eval()
    noise.train()
    with pytest.raises(ValueError, match="got randn_like in Wrapped; call"):
        ff.fisher(model, [(torch.randn(N, I), None)], progress=False)


@pytest.mark.parametrize("user", ["fisher", "collect", "mean_loss"])
def test_draws_in_eval_mode_are_said_once(user):
    model = model_of(lambda m, h: h + torch.randn_like(h)).eval()
    batches = [(torch.randn(N, I), torch.randint(0, C, (N,))) for _ in range(3)]

    def collected():
        with ff.collect(model, ff.Diagonal()) as stats:
            for x, y in batches:
                stats.backward(F.cross_entropy(model(x), y, reduction="none"))

    runs = {
        "fisher": lambda: ff.fisher(model, batches, progress=False),
        "collect": collected,
        "mean_loss": lambda: ff.mean_loss(model, batches),
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runs[user]()
    (one,) = [warning for warning in caught if issubclass(warning.category, ff.FisherWarning)]
    assert "should draw no random numbers in its forward pass, got randn_like in Wrapped" in str(one.message)


def test_draws_outside_of_the_model_are_the_users(recwarn):
    """Labels from the model, noise on the inputs by another module, and a loader that shuffles."""
    model, noise = nn.Linear(I, C), Wrapped(lambda m, x: x + torch.randn_like(x))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(N, I)), 3, shuffle=True)
    with ff.collect(model, ff.Diagonal(), fisher_type="mc") as stats:
        for (x,) in loader:
            logits = model(noise(x))
            labels = torch.multinomial(logits.detach().softmax(1), 1).squeeze(1)
            stats.backward(F.cross_entropy(logits, labels, reduction="none"))
    assert stats.result().num_samples == N and not recwarn.list


def test_a_model_that_draws_is_no_fixed_operator():
    operator = ff.FisherOperator(model_of(lambda m, h: h + torch.randn_like(h)).eval(), [(torch.randn(N, I), None)])
    with (
        pytest.warns(ff.FisherWarning, match="should draw no"),
        pytest.raises(ValueError, match="the same output for the same batch"),
    ):
        _ = operator @ torch.ones(operator.num_parameters)


def test_numbers_of_a_generator_of_its_own_are_no_draws():
    def forward(m, x):
        return m.layer(x) + torch.randn(len(x), 4, generator=torch.Generator().manual_seed(0))

    model = Wrapped(forward, layer=nn.Linear(3, 4)).train()
    assert ff.fisher(model, [(torch.randn(6, 3), None)], progress=False).num_samples == 6
