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

V, T, U, LABELS = 97, 13, 7, 3
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
GROUPED = {**SMALL, "num_key_value_heads": 1}
SEQ2SEQ = {"vocab_size": V, "d_model": 16, "max_position_embeddings": 32}
BART = {
    f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
}


def text(n: int) -> dict[str, Tensor]:
    """Ragged sequences; the last one has no counted label at all."""
    ids = torch.randint(1, V, (n, T))
    mask = torch.ones_like(ids)
    mask[n // 2, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    if n > 1:
        labels[-1] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def classified_text(n: int) -> dict[str, Tensor]:
    """Ragged sequences with one label each."""
    return {**text(n), "labels": torch.randint(0, LABELS, (n,))}


def translated_text(n: int) -> dict[str, Tensor]:
    """Sequences and what they are turned into."""
    return {**text(n), "decoder_input_ids": torch.randint(1, V, (n, U)), "labels": torch.randint(0, V, (n, U))}


def pictures(n: int) -> dict[str, Tensor]:
    """Images with one label each."""
    return {"pixel_values": torch.randn(n, 3, 32, 32), "labels": torch.randint(0, LABELS, (n,))}


def sounds(n: int) -> dict[str, Tensor]:
    """Waves with one label each."""
    return {"input_values": torch.randn(n, 400), "labels": torch.randint(0, LABELS, (n,))}


def _lora() -> nn.Module:
    import peft

    model = hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, vocab_size=V))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj", "embed_tokens"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:  # zero at first, when the other half has no gradient
            nn.init.normal_(parameter, std=0.1)
    return adapted


@dataclass(frozen=True)
class Architecture:
    """A model, its data, and what is expected of it. ``narrow``: it computes in float32 inside, whatever its parameters are."""

    build: Callable[[], nn.Module]
    data: Callable[[int], dict[str, Tensor]]
    causal: bool = False
    fallback: tuple[str, ...] = ()
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

    def make(self, n: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict[str, Tensor]]:
        """Model in eval mode and one batch."""
        batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in self.data(n).items()}
        return self.build().to(dtype).eval(), batch


def _gpt2(**options: Any) -> nn.Module:
    small = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": V, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**small, **options))


def _t5(**options: Any) -> nn.Module:
    small = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": V, "decoder_start_token_id": 0}
    return hf.T5ForConditionalGeneration(hf.T5Config(**small, **options))


EAGER = {"experts_implementation": "eager"}  # the default, grouped_mm, has no float64
WAVES = {
    "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "mask_time_prob": 0.0,
}  # fmt: skip
RELATIVE = tuple(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for side in ("encoder", "decoder"))

ARCHITECTURES = {
    "GPT-2": Architecture(lambda: _gpt2(tie_word_embeddings=False), text, causal=True),
    "GPT-2, tied head": Architecture(_gpt2, text, causal=True),
    "Llama": Architecture(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, vocab_size=V)), text, causal=True),
    "Llama with LoRA (peft)": Architecture(_lora, text, causal=True),
    "Mixtral": Architecture(
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, vocab_size=V, num_local_experts=4, **EAGER)), text, causal=True
    ),
    "Qwen2": Architecture(lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED, vocab_size=V)), text, causal=True),
    "Qwen3-MoE": Architecture(
        lambda: hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(
                **GROUPED, head_dim=8, vocab_size=V, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, **EAGER
            )
        ),
        text,
        causal=True,
    ),
    "Gemma 2": Architecture(
        lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, head_dim=8, vocab_size=V)), text, causal=True, narrow=True
    ),
    "GPT-NeoX": Architecture(lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, vocab_size=V)), text, causal=True),
    "OPT": Architecture(
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                num_hidden_layers=2, hidden_size=16, num_attention_heads=2, ffn_dim=24, vocab_size=V, word_embed_proj_dim=16,
                max_position_embeddings=64,
            )
        ),
        text,
        causal=True,
    ),
    "BERT, classifier": Architecture(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, vocab_size=V, num_labels=LABELS)), classified_text
    ),
    "BERT, masked tokens (tied)": Architecture(lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL, vocab_size=V)), text),
    "DistilBERT": Architecture(
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(n_layers=2, dim=16, n_heads=2, hidden_dim=24, vocab_size=V, num_labels=LABELS)
        ),
        classified_text,
    ),
    "T5": Architecture(_t5, translated_text, fallback=RELATIVE),
    "T5, gated, untied": Architecture(
        lambda: _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False), translated_text, fallback=RELATIVE
    ),
    "BART": Architecture(lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ, **BART)), translated_text),
    "ViT": Architecture(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=32, patch_size=8, num_labels=LABELS)), pictures
    ),
    "Swin": Architecture(
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=LABELS)
        ),
        pictures,
        fallback=tuple(f"swin.encoder.layers.{i}.blocks.0.attention.relative_position_bias.relative_position_bias_table" for i in (0, 1)),
    ),
    "ResNet": Architecture(
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=LABELS)
        ),
        pictures,
    ),
    "ConvNeXt": Architecture(
        lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(
                hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=LABELS, patch_size=2, layer_scale_init_value=0.5
            )
        ),
        pictures,
    ),
    "wav2vec 2.0": Architecture(
        lambda: hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config(**SMALL, num_labels=LABELS, **WAVES)),
        sounds,
        fallback=tuple(f"wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original{i}" for i in (0, 1)),
    ),
    "Mamba": Architecture(
        lambda: hf.MambaForCausalLM(hf.MambaConfig(num_hidden_layers=2, hidden_size=16, vocab_size=V, state_size=4)),
        text,
        causal=True,
        narrow=True,
        fallback=tuple(f"backbone.layers.{i}.mixer.{name}" for i in (0, 1) for name in ("A_log", "D", "dt_proj.bias")),
    ),
}  # fmt: skip
