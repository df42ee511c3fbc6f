# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models straight from dict batches: every parameter covered, exactly, and independent of the batch size."""

import architectures
import oracle
import pytest
import torch

import fisherfast as ff
from fisherfast.capture.tagging import Tagging

N = 5


def expected(architecture, model, batch):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    squares = {name: torch.zeros_like(p) for name, p in named.items()}
    for n in range(N):
        one = {key: value[n : n + 1] for key, value in batch.items()}
        loss = architecture.losses(model, one).sum()
        for name, grad in zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True):
            if grad is not None:
                squares[name] += grad.square() / N
    return squares


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_matches_autograd(name):
    architecture = architectures.ARCHITECTURES[name]
    model, batch = architecture.make(N)
    missing = "masked_spec_embed"  # wav2vec 2.0's, for pretraining
    for parameter_name, parameter in model.named_parameters():
        if missing in parameter_name:
            parameter.requires_grad_(False)
    tolerance = 1e-6 if architecture.narrow else 1e-12
    options = {"likelihood": architecture.likelihood, "progress": False}
    result = ff.fisher(model, [batch], fisher_type="empirical", **options)
    assert oracle.error(result.diagonal(dtype=torch.float64), expected(architecture, model, batch)) < tolerance
    assert not {way for way in result.coverage.ways.values() if way in ("loop", "vmap")}, result.coverage
    assert "missing" not in result.coverage.share_of_parameters()
    parts = [{key: value[i:j] for key, value in batch.items()} for i, j in ((0, 2), (2, 3), (3, 5))]
    drawn = ff.fisher(model, [batch], **options).diagonal(dtype=torch.float64)
    split = ff.fisher(model, parts, **options).diagonal(dtype=torch.float64)
    assert oracle.error(split, drawn) < tolerance


LONGER = [
    name for name, one in architectures.ARCHITECTURES.items() if one.data not in (architectures.pictures, architectures.sounds)
]


@pytest.mark.parametrize("name", LONGER)
def test_batches_of_several_lengths(name):
    """What is made of tables (relative biases) is larger in a longer batch, and still the same part of the model."""
    architecture = architectures.ARCHITECTURES[name]
    model, first = architecture.make(N)
    batches = [first, architecture.data(N, 9), architecture.data(N, 17)]
    tolerance = 1e-6 if architecture.narrow else 1e-12
    options = {"likelihood": architecture.likelihood, "fisher_type": "empirical", "progress": False}
    found = ff.fisher(model, batches, **options).diagonal(dtype=torch.float64)
    each = [expected(architecture, model, batch) for batch in batches]
    assert oracle.error(found, {key: sum(one[key] for one in each) / len(each) for key in each[0]}) < tolerance


def test_grouped_experts_in_float32():
    """The default way to run experts, one grouped product, has no float64: held to autograd in float32."""
    import transformers as hf

    config = hf.MixtralConfig(**architectures.grouped(1), vocab_size=architectures.V, num_local_experts=4)
    architecture = architectures.Architecture(lambda _: hf.MixtralForCausalLM(config), architectures.text, causal=True)
    model, batch = architecture.make(N, torch.float32)
    assert config._experts_implementation == "grouped_mm"
    result = ff.fisher(model, [batch], fisher_type="empirical", likelihood=ff.CausalLM(), progress=False)
    assert oracle.error(result.diagonal(), expected(architecture, model, batch)) < 1e-5
    assert not {way for way in result.coverage.ways.values() if way in ("loop", "vmap")}


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "BERT, classifier", "T5", "BART", "OPT", "Swin"])
def test_rows_of_dense_models_are_not_tagged_in_every_batch(name, monkeypatch):
    """Masks, and tables of positions or segments, are looked up by numbers, which chooses no rows: a backward pass less."""
    batches, sightings = [], Tagging.sightings
    monkeypatch.setattr(Tagging, "sightings", lambda self, *more: batches.append(self._locator.batches) or sightings(self, *more))
    architecture = architectures.ARCHITECTURES[name]
    model, batch = architecture.make(N)
    ff.fisher(model, [batch] * 3, fisher_type="empirical", likelihood=architecture.likelihood, progress=False)
    assert batches and 3 not in batches
