# SPDX-License-Identifier: Apache-2.0
"""Samples that depend on each other where no gradient shows it: said once, of a measurement's first batch."""

import warnings

import pytest
import torch
from torch import nn

import fisherfast as ff


class Scaled(nn.Module):
    """A network whose hidden state is divided by a number of its own, or of the batch's, that no gradient passes through."""

    def __init__(self, scale):
        super().__init__()
        self.inner, self.head, self.scale = nn.Linear(5, 7), nn.Linear(7, 3), scale

    def forward(self, x):
        hidden = self.inner(x)
        return self.head(hidden / self.scale(hidden.detach()))


ALONE = {
    "a number of each sample": lambda hidden: hidden.std(1, keepdim=True),
    "a constant": lambda hidden: 2.0,
    "no samples": lambda hidden: hidden.new_tensor(3.0),
}
TOGETHER = {
    "standard deviations of the batch": lambda hidden: hidden.std(0) + 1e-3,
    "the maximum of the batch": lambda hidden: hidden.abs().max(),
    "its length": lambda hidden: float(len(hidden)),
}


def data(N=6):
    return [(torch.randn(N, 5), torch.randint(3, (N,))) for _ in range(2)]


@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
@pytest.mark.parametrize("scale", TOGETHER.values(), ids=list(TOGETHER))
def test_what_a_batch_does_to_a_sample_is_said(scale, structure):
    batches = data()
    for x, _ in batches:
        x[2] *= 5  # of which the maximum is
    with pytest.warns(ff.FisherWarning, match=r"samples should not depend on each other, got one, sample [013]") as caught:
        ff.fisher(Scaled(scale), batches, structure, progress=False)
    assert len([one for one in caught if "depend on each other" in str(one.message)]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", ALONE.values(), ids=list(ALONE))
def test_independent_samples_are_passed_in_silence(scale, dtype):
    batches = [(x.to(dtype), y) for x, y in data()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ff.fisher(Scaled(scale).to(dtype), batches, progress=False)


def test_a_model_that_draws_is_not_said_to_mix_its_samples():
    noisy = Scaled(lambda hidden: torch.rand(len(hidden), 1) + 0.1).eval()
    with pytest.warns(ff.FisherWarning) as caught:
        ff.fisher(noisy, data(), progress=False)
    assert ["draw no random numbers" in str(one.message) for one in caught] == [True]


def test_one_sample_has_no_others():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ff.fisher(Scaled(TOGETHER["the maximum of the batch"]), data(1), progress=False)


@pytest.mark.parametrize("make", [lambda losses: losses.mean().view(1), lambda losses: losses.sum()[None]])
def test_a_loss_of_one_number_counts_as_one_sample(make):
    net, (x, y) = nn.Linear(5, 3), data()[0]
    with pytest.warns(ff.FisherWarning, match=r"got one number for inputs of 6, which counts as one sample"):
        with ff.collect(net, "diagonal") as stats:
            stats.backward(make(nn.functional.cross_entropy(net(x), y, reduction="none")))
    assert stats.result().num_samples == 1


def test_one_sample_is_one_loss():
    net, (x, y) = nn.Linear(5, 3), data(1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ff.collect(net, "diagonal") as stats:
            stats.backward(nn.functional.cross_entropy(net(x), y).view(1))


def test_a_list_of_the_losses_of_one_sample_is_no_mean():
    net, (x, y) = nn.Linear(5, 3), data()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ff.collect(net, "diagonal") as stats:
            for n in range(len(x)):
                stats.backward(torch.stack([nn.functional.cross_entropy(net(x[n]), y[n])]))
    assert stats.result().num_samples == len(x)


def test_what_no_label_counts_for_may_change_with_the_batch():
    class Trimmed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 5), nn.Linear(5, 3)

        def forward(self, input_ids, attention_mask):
            longest = int(attention_mask.sum(1).max())
            return nn.functional.pad(self.head(self.table(input_ids[:, :longest])), (0, 0, 0, input_ids.shape[1] - longest))

    mask = (torch.arange(4) < torch.tensor([2, 4, 1, 3])[:, None]).long()
    labels = torch.where(mask == 1, torch.randint(3, (4, 4)), -100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ff.fisher(Trimmed(), [{"input_ids": torch.randint(7, (4, 4)), "attention_mask": mask, "labels": labels}], progress=False)


def test_what_the_model_keeps_of_a_batch_is_of_batches_that_were_given():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(5, 3)
            self.register_buffer("seen", torch.zeros(()))
            self.kept = []

        def forward(self, x):
            self.seen += x.sum()
            self.kept.append(x.clone())
            return super().forward(x)

    net, (given, _) = Counting(), data()
    ff.fisher(net, [given], progress=False)
    assert {tuple(x.shape) for x in net.kept} == {(4, 5), (6, 5)}
    assert all(torch.equal(x, given[0][: len(x)]) for x in net.kept)
    assert torch.allclose(net.seen, sum(x.sum() for x in net.kept))


def test_global_random_numbers_are_left_as_they_were():
    net, before = nn.Linear(5, 3), torch.get_rng_state()
    ff.fisher(net, [(torch.ones(6, 5), torch.zeros(6).long())], progress=False)
    assert torch.equal(torch.get_rng_state(), before)
