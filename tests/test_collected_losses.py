# SPDX-License-Identifier: Apache-2.0
"""``ff.collect``: which losses are samples, parts of a forward pass, or further draws of its samples."""

from functools import partial

import networks
import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import close
from torch import nn

import fisherfast as ff

EXACT = 1e-11


def test_results_come_in_the_order_asked():
    model, x, y = networks.doubles("layer-norm", 6)
    with ff.collect(model, ff.PerSampleNorm(), ff.GradientMoments(), ff.Diagonal()) as stats:
        for part in (slice(0, 2), slice(2, 6)):
            stats.backward(F.cross_entropy(model(x[part]).mT, y[part], reduction="none").sum(1))
    norms, moments, fisher = stats.results()
    assert isinstance(norms, ff.SampleNorms) and isinstance(moments, ff.SampleMoments) and isinstance(fisher, ff.DiagonalFisher)
    assert close(norms.squared_norms, sum(oracle.layer_norms(oracle.sample_gradients(model, x, y)).values()), EXACT)
    assert fisher.stderr("trace") == pytest.approx(float(norms.squared_norms.std() / 6**0.5), rel=1e-9)


UNEQUAL = partial(pytest.warns, ff.FisherWarning, match="collect: every batch must have as many backward passes as the others")


@pytest.mark.parametrize("draws", [(1, 1), (2, 2), (2, 1), (1, 3)])
def test_batches_of_unequal_draws_are_said(draws, recwarn):
    model, x, y = networks.doubles("mlp-inplace-relu", 6)
    with ff.collect(model, ff.Diagonal(), fisher_type="mc") as stats:
        for batch, number in zip((slice(0, 2), slice(2, 6)), draws, strict=True):
            logits = model(x[batch])
            for _ in range(number):
                stats.backward(F.cross_entropy(logits, y[batch], reduction="none"), retain_graph=True)
    assert stats.result().num_samples == 6
    assert len(recwarn) == (len(set(draws)) > 1)


def collected_tokens(batches, losses_of, by_name=False):
    """Over a small causal model on ``[5, 7]`` ids; ``losses_of``: what becomes of the losses ``[5, 6]``."""
    model, ids = nn.Sequential(nn.Embedding(11, 4), nn.Tanh(), nn.Linear(4, 11)), torch.randint(0, 11, (5, 7))
    with ff.collect(model, ff.Diagonal()) as stats:
        for _ in range(batches):
            logits = model(input=ids) if by_name else model(ids)
            losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
            stats.backward(losses_of(losses))
    return stats.result()


@pytest.mark.parametrize("by_name", [False, True])
def test_losses_of_positions_are_said_once(by_name):
    with pytest.warns(ff.FisherWarning, match=r"got 30 for inputs of 5; .* losses\.view\(5, -1\)\.sum\(1\)") as caught:
        found = collected_tokens(3, torch.flatten, by_name)
    assert len(caught) == 1 and found.num_samples == 90


def test_losses_of_samples_are_taken_as_they_are(recwarn):
    assert collected_tokens(2, lambda losses: losses.sum(1)).num_samples == 10
    model, x, y = nn.Linear(3, 4), torch.randn(6, 3), torch.randint(0, 4, (6,))

    def losses(first, last):
        return F.cross_entropy(model(x[first:last]), y[first:last], reduction="none")

    with ff.collect(model, ff.Diagonal()) as stats:
        stats.backward(torch.cat([losses(0, 2), losses(2, 4), losses(4, 6)]))  # several calls make one batch
    recurrent = nn.LSTM(3, 4)  # time first
    with ff.collect(recurrent, ff.Diagonal()) as stats:
        stats.backward(recurrent(torch.randn(2, 6, 3))[0].square().sum((0, 2)))
    assert not recwarn.list


def test_backwards_through_one_forward_are_draws_of_its_samples():
    model, x, y = networks.doubles("mlp-inplace-relu", 6)
    drawn = [torch.randint(0, 4, (6,)) for _ in range(3)]
    with ff.collect(model, ff.PerSampleNorm(), ff.Diagonal(), fisher_type="mc") as stats:
        stats.backward(F.cross_entropy(model(x[:2]), y[:2], reduction="none"))
        logits = model(x)
        for number, labels in enumerate(drawn):
            stats.backward(F.cross_entropy(logits, labels, reduction="none"), retain_graph=number < 2)
        with UNEQUAL():
            halfway = stats.results()[0]
        stats.backward(F.cross_entropy(model(x[3:]), y[3:], reduction="none"))
    first, last = (
        sum(oracle.layer_norms(oracle.sample_gradients(model, x[s], y[s])).values()) for s in (slice(0, 2), slice(3, 6))
    )
    middle = torch.stack([sum(oracle.layer_norms(oracle.sample_gradients(model, x, labels)).values()) for labels in drawn]).mean(
        0
    )
    with UNEQUAL():
        norms, fisher = stats.results()
    assert close(halfway.squared_norms, torch.cat([first, middle]), EXACT)
    expected = torch.cat([first, middle, last])
    assert close(norms.squared_norms, expected, EXACT) and fisher.num_samples == 11
    assert fisher.stderr("trace") == pytest.approx(float(expected.std() / 11**0.5), rel=1e-9)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "gram"])
def test_the_error_of_a_trace_is_of_the_diagonal_beside_other_structures(structure):
    model, x, y = networks.doubles("mlp-inplace-relu", 6)
    options = {"fisher_type": "empirical", "progress": False}
    D, F_ = ff.fisher(model, [(x, y)], ("diagonal", structure), **options)
    assert D.stderr() == ff.fisher(model, [(x, y)], **options).stderr() > 0
    with pytest.raises(ValueError, match=rf"got a {type(F_).__name__}.* structure=\('diagonal', ...\), and ask the first result"):
        F_.stderr("trace")


def test_draws_of_interleaved_forwards_are_not_guessed():
    model, x, y = networks.doubles("mlp-inplace-relu", 6)
    with ff.collect(model, ff.PerSampleNorm(), ff.Diagonal(), fisher_type="mc") as stats:
        first, second = model(x), model(x)
        for logits in (first, second, first, first):
            stats.backward(F.cross_entropy(logits, y, reduction="none"), retain_graph=True)
    with UNEQUAL():
        norms, fisher = stats.results()
    with pytest.raises(ValueError, match="must follow each other"):
        len(norms.squared_norms)
    with pytest.raises(ValueError, match="must have been recorded, got none"):
        fisher.stderr("trace")
    assert fisher.trace() > 0


@pytest.mark.parametrize(
    "part", [lambda v: v[:2], lambda v: v[torch.tensor([0, 3])], lambda v: v.split(2)[0], lambda v: v[v > -1][:3]]
)
def test_a_part_of_a_forward_passes_losses_is_said_once(part):
    model, x, y = nn.Linear(3, 4), torch.randn(6, 3), torch.randint(4, (6,))
    with ff.collect(model, ff.KFAC(), fisher_type="empirical") as stats:
        with pytest.warns(
            ff.FisherWarning, match=r"should hold all samples of a forward pass, got a part of a vector, [23] of 6"
        ):
            stats.backward(part(F.cross_entropy(model(x), y, reduction="none")))
        stats.backward(part(F.cross_entropy(model(x), y, reduction="none")))  # warnings are errors


@pytest.mark.parametrize(
    "whole",
    [
        lambda v: v,
        lambda v: 2 * v,
        lambda v: v[torch.arange(6).flip(0)],
        lambda v: v.view(3, 2).sum(1),
        lambda v: v.view(3, 2)[:, 0],
    ],
)
def test_all_losses_of_a_forward_pass_are_no_part(whole):
    model, x, y = nn.Linear(3, 4), torch.randn(6, 3), torch.randint(4, (6,))
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        stats.backward(whole(F.cross_entropy(model(x), y, reduction="none")))
    assert stats.result().trace() > 0


def test_one_loss_and_lists_of_inputs_are_no_mistakes():
    model, x = nn.Linear(3, 4), torch.randn(6, 3)
    with ff.collect(model, ff.KFAC(), fisher_type="empirical") as stats:
        stats.backward(model(x[:1]).square()[0].sum(0, keepdim=True))
    listed = networks.Wrapped(lambda m, parts: m.layer(torch.stack(parts)), layer=nn.Linear(3, 4))
    with ff.collect(listed, ff.Diagonal(), fisher_type="empirical") as stats:
        stats.backward(listed(list(x)).square().sum(1))
    assert stats.result().num_samples == 6


def test_parts_of_one_forward_pass_are_said_from_the_second_on():
    model, x = nn.Linear(3, 4), torch.randn(6, 3)
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        first, second = model(x).square().sum(1).split(3)
        stats.backward(first, retain_graph=True)
        with pytest.warns(ff.FisherWarning, match="got a part of a vector, 3 of 6"):
            stats.backward(second)
