# SPDX-License-Identifier: Apache-2.0
"""The time ratio: what is timed, and that the model is left as it was."""

import pytest
import torch
from torch import nn

from fisherfast import timing
from fisherfast.likelihood import Categorical


def net_and_batches():
    torch.manual_seed(0)
    return nn.Linear(5, 3), [(torch.randn(7, 5), torch.randint(3, (7,))), (torch.randn(2, 5), None)]


def test_plain_pass_is_the_gradient_of_the_loss():
    net, batches = net_and_batches()
    timing._plain(net, batches[:1], Categorical())
    got = net.weight.grad
    net.zero_grad()
    nn.functional.cross_entropy(net(batches[0][0]), batches[0][1], reduction="sum").backward()
    torch.testing.assert_close(got, net.weight.grad)


def test_median_pair_is_reported(monkeypatch):
    net, batches = net_and_batches()
    clock = iter([100, 1, 8, 2, 3, 3, 1, 2])  # Fisher and plain of a first, ignored round, then of three
    monkeypatch.setattr(timing, "_timed", lambda work, device: (work(), float(next(clock)))[1])
    calls = []
    ratio = timing.against_plain(calls.append, net, batches, Categorical(), rounds=3)
    assert (ratio.fisher_seconds, ratio.plain_seconds, ratio.rounds, ratio.num_samples) == (3, 3, 3, 9)
    assert calls == [batches] * 4
    assert "1.00x" in str(ratio) and "9 samples" in str(ratio)


def test_gradients_are_left_as_they_were():
    net, batches = net_and_batches()
    net.weight.grad = before = torch.ones_like(net.weight)
    timing.against_plain(lambda _: None, net, batches, Categorical(), rounds=1)
    assert net.weight.grad is before and net.bias.grad is None


def test_rejects_nothing_to_time():
    net, batches = net_and_batches()
    with pytest.raises(ValueError, match="batches and rounds must be at least one each, got 0 and 1"):
        timing.against_plain(lambda _: None, net, [], Categorical(), rounds=1)
    with pytest.raises(ValueError, match="batches and rounds must be at least one each, got 2 and 0"):
        timing.against_plain(lambda _: None, net, batches, Categorical(), rounds=0)
