# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models, built from their configurations, straight from dict batches: raw position tables, norms written as
products, Conv1D, class tokens. No module is known by name."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import oracle
import pytest
import torch
import torch.nn.functional as F
import transformers as hf

import fisherfast as ff

V, T, N = 97, 13, 5
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}


def text():
    """Five ragged sequences; one has no counted label at all."""
    ids = torch.randint(0, V, (N, T))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def next_token(model, batch):
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum", ignore_index=-100)


def one_label(model, batch):
    return F.cross_entropy(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"], reduction="sum")


def gpt2(tied):
    config = hf.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=V, n_positions=32, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0
    )
    return hf.GPT2LMHeadModel(config)


MODELS = {
    "gpt2": (lambda: gpt2(False), text, ff.CausalLM(), next_token, set()),
    "gpt2-tied": (lambda: gpt2(True), text, ff.CausalLM(), next_token, {"transformer.wte.weight"}),
    "llama": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=1, vocab_size=V)),
        text,
        ff.CausalLM(),
        next_token,
        set(),
    ),
    "bert": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, vocab_size=V, num_labels=3)),
        lambda: {**text(), "labels": torch.randint(0, 3, (N,))},
        "categorical",
        one_label,
        set(),
    ),
    "vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3)),
        lambda: {"pixel_values": torch.randn(N, 3, 8, 8).double(), "labels": torch.randint(0, 3, (N,))},
        "categorical",
        one_label,
        {"vit.embeddings.patch_embeddings.projection.weight", "vit.embeddings.patch_embeddings.projection.bias"},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_matches_autograd(name):
    build, data, likelihood, loss, looped = MODELS[name]
    model, batch = build().double().eval(), data()
    named = dict(model.named_parameters())
    expected = {n: torch.zeros_like(p) for n, p in named.items()}
    for n in range(N):
        one = {key: value[n : n + 1] for key, value in batch.items()}
        for key, grad in zip(named, torch.autograd.grad(loss(model, one), list(named.values())), strict=True):
            expected[key] += grad.square() / N
    result = ff.fisher(model, [batch], fisher_type="empirical", likelihood=likelihood, progress=False)
    assert oracle.error(result.diagonal(dtype=torch.float64), expected) < 1e-12
    assert {n for n, how in result.coverage.items() if how.startswith("loop")} == looped
    parts = [{key: value[i:j] for key, value in batch.items()} for i, j in ((0, 2), (2, 3), (3, 5))]
    drawn = ff.fisher(model, [batch], likelihood=likelihood, progress=False).diagonal(dtype=torch.float64)
    split = ff.fisher(model, parts, likelihood=likelihood, progress=False).diagonal(dtype=torch.float64)
    assert oracle.error(split, drawn) < 1e-12
