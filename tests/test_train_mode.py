# SPDX-License-Identifier: Apache-2.0
"""Dropout, random slopes and batch statistics are refused by every function that runs a model, in each spelling torch has for them."""

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
    "probability 0": lambda m, h: torch.dropout(h, 0.0, True),
    "torch.rrelu": lambda m, h: torch.rrelu(h),
    "torch.batch_norm": lambda m, h: torch.batch_norm(h, None, None, torch.zeros(C), torch.ones(C), False, 0.1, 1e-5, False),
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
