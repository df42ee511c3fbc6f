# SPDX-License-Identifier: Apache-2.0
"""Hugging Face architectures, built small from their configurations, with dict batches for each: for the tests and for the
table in docs/models.md. No module of theirs is known to fisherfast by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import fisherfast as ff

V, T, LABELS = 97, 13, 3


def small(w: int) -> dict[str, int]:
    """What most configurations call their sizes, ``w`` times the smallest."""
    return {"num_hidden_layers": 2, "hidden_size": 16 * w, "num_attention_heads": 2, "intermediate_size": 24 * w}


def grouped(w: int) -> dict[str, int]:
    """The same with one head for keys and values."""
    return {**small(w), "num_key_value_heads": 1}


def _bart(w: int) -> nn.Module:
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))}
    ffn = {f"{side}_ffn_dim": 24 * w for side in ("encoder", "decoder")}
    config = hf.BartConfig(vocab_size=V, d_model=16 * w, max_position_embeddings=128, **sides, **ffn)
    return hf.BartForConditionalGeneration(config)


BART = {
    f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
}


def text(n: int, T: int = T) -> dict[str, Tensor]:
    """Ragged sequences; the last one has no counted label at all."""
    ids = torch.randint(1, V, (n, T))
    mask = torch.ones_like(ids)
    mask[n // 2, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    if n > 1:
        labels[-1] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def classified_text(n: int, T: int = T) -> dict[str, Tensor]:
    """Ragged sequences with one label each."""
    return {**text(n, T), "labels": torch.randint(0, LABELS, (n,))}


def translated_text(n: int, T: int = T) -> dict[str, Tensor]:
    """Sequences and what they are turned into."""
    U = (T + 1) // 2
    return {**text(n, T), "decoder_input_ids": torch.randint(1, V, (n, U)), "labels": torch.randint(0, V, (n, U))}


def pictures(n: int, T: int = 1) -> dict[str, Tensor]:
    """Images with one label each."""
    return {"pixel_values": torch.randn(n, 3, 32, 32), "labels": torch.randint(0, LABELS, (n,))}


def sounds(n: int, T: int = 1) -> dict[str, Tensor]:
    """Waves with one label each."""
    return {"input_values": torch.randn(n, 400), "labels": torch.randint(0, LABELS, (n,))}


def _lora(w: int) -> nn.Module:
    import peft

    model = hf.LlamaForCausalLM(hf.LlamaConfig(**grouped(w), vocab_size=V))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj", "embed_tokens"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:  # zero at first, when the other half has no gradient
            nn.init.normal_(parameter, std=0.1)
    return adapted


@dataclass(frozen=True)
class Architecture:
    """A model, its data, and what is expected of it. ``narrow``: it computes in float32 inside, whatever its parameters are."""

    build: Callable[[int], nn.Module]  # of a width
    data: Callable[..., dict[str, Tensor]]  # of a number of samples, and a length
    causal: bool = False
    narrow: bool = False

    @property
    def likelihood(self) -> Any:
        """What ``ff.fisher`` is told."""
        return ff.CausalLM() if self.causal else "categorical"

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """``-log p`` of each sample ``[N]``."""
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        labels = batch["labels"]
        if self.causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        every = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=-100)
        return every.view(len(labels), -1).sum(1)

    def make(
        self, n: int, dtype: torch.dtype = torch.float64, width: int = 1, length: int = T
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """Model in eval mode and one batch."""
        data = self.data(n, length)
        batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in data.items()}
        return self.build(width).to(dtype).eval(), batch


def _gpt2(w: int, **options: Any) -> nn.Module:
    sizes = {
        "n_layer": 2,
        "n_embd": 16 * w,
        "n_head": 2,
        "vocab_size": V,
        "n_positions": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **options))


def _t5(w: int, **options: Any) -> nn.Module:
    sizes = {
        "d_model": 16 * w,
        "d_kv": 8 * w,
        "d_ff": 24 * w,
        "num_layers": 2,
        "num_heads": 2,
        "vocab_size": V,
        "decoder_start_token_id": 0,
    }
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **options))


EAGER = {"experts_implementation": "eager"}  # the default, grouped_mm, has no float64
WAVES = {
    "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "mask_time_prob": 0.0,
}  # fmt: skip

ARCHITECTURES = {
    "GPT-2": Architecture(lambda w: _gpt2(w, tie_word_embeddings=False), text, causal=True),
    "GPT-2, tied head": Architecture(_gpt2, text, causal=True),
    "Llama": Architecture(lambda w: hf.LlamaForCausalLM(hf.LlamaConfig(**grouped(w), vocab_size=V)), text, causal=True),
    "Llama with LoRA (peft)": Architecture(_lora, text, causal=True),
    "Mixtral": Architecture(
        lambda w: hf.MixtralForCausalLM(hf.MixtralConfig(**grouped(w), vocab_size=V, num_local_experts=4, **EAGER)), text, causal=True
    ),
    "Qwen2": Architecture(lambda w: hf.Qwen2ForCausalLM(hf.Qwen2Config(**grouped(w), vocab_size=V)), text, causal=True),
    "Qwen3-MoE": Architecture(
        lambda w: hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(
                **grouped(w), head_dim=8 * w, vocab_size=V, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8 * w, **EAGER
            )
        ),
        text,
        causal=True,
    ),
    "Gemma 2": Architecture(
        lambda w: hf.Gemma2ForCausalLM(hf.Gemma2Config(**grouped(w), head_dim=8 * w, vocab_size=V)), text, causal=True, narrow=True
    ),
    "GPT-NeoX": Architecture(lambda w: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**small(w), vocab_size=V)), text, causal=True),
    "OPT": Architecture(
        lambda w: hf.OPTForCausalLM(
            hf.OPTConfig(
                num_hidden_layers=2, hidden_size=16 * w, num_attention_heads=2, ffn_dim=24 * w, vocab_size=V, word_embed_proj_dim=16 * w,
                max_position_embeddings=128,
            )
        ),
        text,
        causal=True,
    ),
    "BERT, classifier": Architecture(
        lambda w: hf.BertForSequenceClassification(hf.BertConfig(**small(w), vocab_size=V, num_labels=LABELS)), classified_text
    ),
    "BERT, masked tokens (tied)": Architecture(lambda w: hf.BertForMaskedLM(hf.BertConfig(**small(w), vocab_size=V)), text),
    "DistilBERT": Architecture(
        lambda w: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(n_layers=2, dim=16 * w, n_heads=2, hidden_dim=24 * w, vocab_size=V, num_labels=LABELS)
        ),
        classified_text,
    ),
    "T5": Architecture(_t5, translated_text),
    "T5, gated, untied": Architecture(
        lambda w: _t5(w, feed_forward_proj="gated-gelu", tie_word_embeddings=False), translated_text
    ),
    "BART": Architecture(_bart, translated_text),
    "ViT": Architecture(
        lambda w: hf.ViTForImageClassification(hf.ViTConfig(**small(w), image_size=32, patch_size=8, num_labels=LABELS)), pictures
    ),
    "Swin": Architecture(
        lambda w: hf.SwinForImageClassification(
            hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8 * w, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=LABELS)
        ),
        pictures,
    ),
    "ResNet": Architecture(
        lambda w: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=8 * w, hidden_sizes=[8 * w, 16 * w], depths=[1, 1], num_labels=LABELS)
        ),
        pictures,
    ),
    "ConvNeXt": Architecture(
        lambda w: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(
                hidden_sizes=[8 * w, 16 * w], depths=[1, 1], num_stages=2, num_labels=LABELS, patch_size=2, layer_scale_init_value=0.5
            )
        ),
        pictures,
    ),
    "wav2vec 2.0": Architecture(
        lambda w: hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config(**small(w), num_labels=LABELS, **WAVES)),
        sounds,
    ),
    "Mamba": Architecture(
        lambda w: hf.MambaForCausalLM(hf.MambaConfig(num_hidden_layers=2, hidden_size=16 * w, vocab_size=V, state_size=4)),
        text,
        causal=True,
        narrow=True,
    ),
}  # fmt: skip
