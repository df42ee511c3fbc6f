# SPDX-License-Identifier: Apache-2.0
"""Batches: what a data set yields as tensors, and how these are cut and fed to a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherfast import _nested
from fisherfast._random import GOLDEN
from fisherfast.data import items

IGNORED = -100  # torch's and Hugging Face's ignore_index, of a likelihood that has none
Output = str | Callable[[Any], Tensor] | None


@dataclass(frozen=True)
class Batch:
    """One batch of N samples: positional or keyword inputs, labels or None, an attention mask or None, weights or None.

    ``offsets`` ``[N + 1]``: the samples are packed, one after the other, in a single row ``[1, M, ...]``.
    """

    inputs: tuple[Any, ...] | dict[str, Any]
    targets: Tensor | None
    mask: Tensor | None
    N: int
    weight: Tensor | None = None  # [N] float32, finite, >= 0
    offsets: Tensor | None = None

    @classmethod
    def of(cls, item: Any, device: torch.device, model: Callable[..., Any] | None = None) -> Batch:
        """From ``(inputs, targets)``, ``(inputs, targets, weights)`` or a dict (Hugging Face); moved to ``device``.

        A tuple of inputs is ``model(*x)``, a dict ``model(**x)``; targets may be None. N is the length of the first input, or of another one
        that is as long as the targets (``(ids, offsets)`` of bags). A dict batch's ``labels`` are its
        targets, its ``sample_weight`` its weights, and neither is passed to the model. A sample of weight 2 counts as
        two: means become ``sum_n w_n (...) / sum_n w_n``. ``"sample_offsets"`` ``[N + 1]``, Hugging Face's ``"cu_seq_lens_q"`` or
        flash-attention's ``"cu_seqlens"`` say where samples packed into one row ``[1, M]`` begin and end; without them
        ``"position_ids"`` that start again do. If an encoder-decoder ``model`` is given labels without decoder inputs,
        these come from its ``prepare_decoder_input_ids_from_labels``, as in its own forward pass.
        """
        inputs, targets, weight, offsets = items.parts(item)
        items.refuse_packed_sequences(inputs)
        if isinstance(inputs, Mapping):
            inputs = {key: items.moved(value, device) for key, value in inputs.items()}
            inputs |= _read_by_the_decoder(model, inputs, targets, device)
            mask = inputs.get("attention_mask")
        else:
            inputs = tuple(items.moved(value, device) for value in (inputs if isinstance(inputs, (tuple, list)) else (inputs,)))
            mask = None
        given = inputs.values() if isinstance(inputs, dict) else inputs
        own = [value for value in given if isinstance(value, Tensor)]
        first = next((tensor for tensor in (*own, *_nested.tensors(inputs)) if tensor.dim()), None)
        if first is None:
            raise ValueError(
                f"data: a batch's inputs must hold a tensor with a sample axis, got {sorted({type(value).__name__ for value in given})}; "
                "arrays become tensors by torch.as_tensor"
            )
        if offsets is not None:
            return cls._of_packed(inputs, targets, weight, items.moved(items.as_tensor(offsets), device), device)
        N = first.shape[0]
        targets = None if targets is None else items.targets(targets, device)
        if targets is not None and any(value.dim() and value.shape[:1] == targets.shape[:1] for value in own):
            N = len(targets)  # as of the offsets behind all samples' tokens
        if N == 0:
            raise ValueError(f"data: a batch must hold at least one sample, got inputs of shape {tuple(first.shape)}")
        if targets is not None and (targets.dim() == 0 or targets.shape[0] != N):
            hint = (
                "is this a Dataset? pass a DataLoader over it"
                if targets.dim() == 0
                else "graphs, and ragged batches of which no input is as long as the targets, can be measured with ff.collect"
            )
            raise ValueError(
                f"data: inputs and targets must hold the same samples, got {N} and targets {tuple(targets.shape)}; {hint}"
            )
        return cls(inputs, targets, mask, N, items.weights(weight, N, device))

    @classmethod
    def _of_packed(cls, inputs: dict[str, Any], targets: Any, weight: Any, offsets: Tensor, device: torch.device) -> Batch:
        bounds = offsets.tolist()
        shapes = {key: tuple(value.shape) for key, value in inputs.items() if isinstance(value, Tensor)}
        rows = {shape[:2] for shape in shapes.values()}
        if len(bounds) < 2 or bounds[0] != 0 or sorted(set(bounds)) != bounds or (1, bounds[-1]) not in rows:
            raise ValueError(
                f"data: the offsets of packed samples must rise from 0 to M, inputs being [1, M], got {bounds[:8]} and inputs {shapes}; flatten "
                "several rows to one, and add a missing first axis with .unsqueeze(0)"
            )
        targets = None if targets is None else items.targets(targets, device)
        if targets is not None and targets.shape[:2] != (1, bounds[-1]):
            raise ValueError(f"data: the targets of packed samples must be [1, {bounds[-1]}], got {tuple(targets.shape)}")
        N = len(bounds) - 1
        return cls(inputs, targets, None, N, items.weights(weight, N, device), offsets.long())

    def has_samples(self, value: Any) -> bool:
        """Whether an input has an entry for each sample: a tensor along its first axis, or a list or tuple of numbers or strings."""
        if self.offsets is not None:
            return False
        if isinstance(value, Tensor):
            return value.dim() > 0 and value.shape[0] == self.N
        return (
            type(value) in (list, tuple) and len(value) == self.N and all(isinstance(entry, int | float | str) for entry in value)
        )

    @property
    def total_weight(self) -> float:
        """Of all samples; N without weights."""
        return float(self.N if self.weight is None else self.weight.sum(dtype=torch.float64))

    @property
    def output_mask(self) -> Tensor | None:
        """Which positions of the output there are: those of the decoder, where there is one, all if it has no mask of its own."""
        if not isinstance(self.inputs, dict) or not any(key.startswith("decoder_") for key in self.inputs):
            return self.mask
        mask, *read = (self.inputs.get(f"decoder_{key}") for key in ("attention_mask", "input_ids", "inputs_embeds"))
        positions = [given.new_ones(given.shape[:2], dtype=torch.long) for given in read if isinstance(given, Tensor)]
        return positions[0] if mask is None and positions else mask

    @property
    def nested(self) -> bool:
        """Whether samples lie deeper in the inputs than a function's own arguments."""
        own = self.inputs.values() if isinstance(self.inputs, dict) else self.inputs
        others = [value for value in own if not isinstance(value, Tensor)]
        return any(map(self.has_samples, [*others, *_nested.tensors(others)]))

    @property
    def ragged(self) -> bool:
        """Whether an input has more rows than there are samples, so that samples cannot be cut out: tokens, of which others say whose they are."""
        own = self.inputs.values() if isinstance(self.inputs, dict) else self.inputs
        return self.offsets is None and any(isinstance(t, Tensor) and t.dim() and len(t) > self.N for t in own)

    def cut(self, start: int, stop: int) -> Batch:
        """Samples ``start:stop``; what has no entry for each sample is kept whole."""
        if self.offsets is not None:
            return self._cut_packed(start, stop, self.offsets)

        def part(value: Any) -> Any:
            return _nested.mapped(value, lambda entries: entries[start:stop], self.has_samples)

        return Batch(part(self.inputs), part(self.targets), part(self.mask), stop - start, part(self.weight))

    def repeated(self, n: int, times: int | None = None) -> Batch:
        """As many samples as there are, or so many, all of them sample n; packed samples cannot be repeated."""
        number = times or self.N

        def copy(entries: Any) -> Any:
            one = entries[n : n + 1]
            return one.repeat_interleave(number, 0) if isinstance(one, Tensor) else one * number

        def copies(value: Any) -> Any:
            return _nested.mapped(value, copy, self.has_samples)

        return Batch(copies(self.inputs), copies(self.targets), copies(self.mask), number, copies(self.weight))

    def copied(self) -> Batch:
        """With inputs of its own, for a model that writes into them."""
        return replace(self, inputs=_nested.mapped(self.inputs, Tensor.clone))

    def _cut_packed(self, start: int, stop: int, offsets: Tensor) -> Batch:
        assert isinstance(self.inputs, dict)
        M, first, last = int(offsets[-1]), int(offsets[start]), int(offsets[stop])
        mine = offsets[start : stop + 1] - first

        def part(key: str, value: Any) -> Any:
            if key.startswith(("cu_seq_lens", "cu_seqlens")):
                return mine.to(value.dtype) if isinstance(value, Tensor) else mine.tolist()
            if not isinstance(value, Tensor):
                return value
            if key == "position_ids" and value.shape == (M,):
                return value[first:last]
            return value[:, first:last] if value.dim() > 1 and value.shape[:2] == (1, M) else value

        inputs = {key: part(key, value) for key, value in self.inputs.items()}
        weight = None if self.weight is None else self.weight[start:stop]
        return Batch(inputs, part("labels", self.targets), None, stop - start, weight, mine)

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return list(_nested.tensors((self.inputs, self.targets, self.weight, self.offsets)))

    def versions(self) -> list[int]:
        """How often each has been written to, where that is counted."""
        return [t._version for t in self.tensors() if not t.is_inference()]

    def fingerprint(self) -> int:
        """A hash of contents and order, the same in every process; two different batches collide with probability 2**-60 at most."""
        described = _described((self.inputs, self.targets, self.weight, self.offsets))
        return int.from_bytes(hashlib.blake2b(described.encode(), digest_size=8).digest(), "big")

    def unpacked(self, output: Tensor, ignore_index: float = IGNORED) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Output, targets and mask with the sample axis first: packed samples are spread to ``[N, L, ...]``, L the longest.

        What is past a sample's end has the label ``ignore_index``.
        """
        if self.offsets is None:
            return output, self.targets, self.output_mask
        lengths = self.offsets.diff()
        position = torch.arange(int(lengths.max()), device=output.device)
        mask = position < lengths.unsqueeze(1)  # [N, L]
        inside = torch.minimum(position, lengths.unsqueeze(1) - 1)  # past a sample's end, its last
        index = self.offsets[:-1].unsqueeze(1) + inside
        targets = None if self.targets is None else self.targets[0][index]
        if targets is not None and not targets.is_floating_point():
            targets = targets.masked_fill(~mask, ignore_index)
        return output[0][index], targets, mask

    def feed(self, model: Callable[..., Any], output: Output = None) -> Tensor:
        """The model's output tensor for this batch: the result itself, its ``.logits``, or what ``output`` picks."""
        try:
            result = model(**self.inputs) if isinstance(self.inputs, dict) else model(*self.inputs)
        except (TypeError, ValueError) as error:
            if isinstance(self.inputs, dict) and self.targets is None:
                error.add_note(f"Of a dict batch the key 'labels' is held back, all others are the model's; got {[*self.inputs]}")
            elif isinstance(self.inputs, dict) and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
                error.add_note(
                    f"The key 'labels' is held back: a model that makes its decoder_input_ids of them needs these, too; got {[*self.inputs]}"
                )
            raise
        picked = _picked(result, output)
        if not isinstance(picked, Tensor):
            raise TypeError(
                f"model: the output must be a tensor or have .logits, got {type(picked).__name__}; say which part with "
                "output='name' or output=lambda result: ..."
            )
        if self.offsets is not None:
            if picked.dim() < 2 or picked.shape[:2] != (1, int(self.offsets[-1])):
                raise ValueError(
                    f"model: the output for packed samples must be [1, {int(self.offsets[-1])}, ...], got {tuple(picked.shape)}; "
                    "where the row is one sample although its positions start again, add 'sample_offsets': None to the batch"
                )
        elif picked.dim() == 0 or picked.shape[0] != self.N:
            raise ValueError(
                f"model: the output must have the sample axis first, {self.N} samples, got shape {tuple(picked.shape)}; "
                "give the log-likelihood's input per sample, or pick it with output="
            )
        return picked


def _read_by_the_decoder(
    model: Callable[..., Any] | None, inputs: Mapping[str, Any], targets: Any, device: torch.device
) -> dict[str, Tensor]:
    """A Hugging Face encoder-decoder's ``decoder_input_ids``, which it makes of labels that are kept from it here."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is None or targets is None or {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
        return {}
    return {"decoder_input_ids": prepare(items.targets(targets, device))}


def _picked(result: Any, output: Output) -> Any:
    if callable(output):
        return output(result)
    if output is not None:
        if not isinstance(output, str):
            raise TypeError(
                f"output: must be a name, or a function of what the model returns, got {output!r}; of a tuple, lambda result: result[0]"
            )
        return _named(result, output)
    return getattr(result, "logits", result)


def _named(result: Any, name: str) -> Any:
    if isinstance(result, Mapping):
        if name in result:
            return result[name]
    elif hasattr(result, name):
        return getattr(result, name)
    there = f"a mapping of {[*result]}" if isinstance(result, Mapping) else f"a {type(result).__name__} without it"
    raise ValueError(
        f"output: must be the name of a part of what the model returns, got {name!r} of {there}; or pass a function of the result"
    )


def _described(tree: Any) -> str:
    """What a batch holds, for its fingerprint: of tensors and arrays a digest, numbers and text as they are, of anything else its type."""
    if isinstance(tree, Tensor):
        return " ".join(f"{tuple(t.shape)} {t.dtype} {_digest(t)}" for t in _flat(tree))
    if isinstance(tree, Mapping):
        return f"{{{', '.join(f'{key!r}: {_described(tree[key])}' for key in sorted(tree, key=str))}}}"
    if isinstance(tree, (tuple, list)):
        return f"({', '.join(map(_described, tree))})"
    if isinstance(tree, np.ndarray):
        if tree.dtype.kind not in "biufc":  # text, objects
            return _described(tree.tolist())
        return f"{tree.shape} {tree.dtype} {_digest(torch.from_numpy(np.array(tree, order='C').reshape(-1).view(np.uint8)))}"
    return repr(tree) if tree is None or isinstance(tree, (Number, str, bytes)) else type(tree).__name__


def _flat(tensor: Any) -> tuple[Tensor, ...]:
    """The tensor, or the two that make up a nested one: its own shape has a symbol in it that no other tensor of the same numbers has."""
    return (tensor.values(), tensor.offsets()) if tensor.is_nested else (tensor,)


def _digest(tensor: Tensor) -> int:
    """The tensor's bytes, eight at a time, times odd numbers that do not repeat: on its device, in one read."""
    if tensor.layout != torch.strided:
        parts = tensor.detach().to_sparse_coo().coalesce()
        return 3 * _digest(parts.indices()) + _digest(parts.values())
    flat = (
        tensor.detach().resolve_conj().resolve_neg().contiguous().as_strided((tensor.numel(),), (1,))
    )  # of one entry contiguous leaves any stride
    raw = flat.view(torch.uint8) if flat.dtype != torch.bool else flat.to(torch.uint8)
    words = torch.nn.functional.pad(raw, (0, -raw.numel() % 8)).view(torch.int64)
    factors = (2 * torch.arange(words.numel(), device=words.device) + 1) * GOLDEN
    return int(((words ^ (words >> 29)) * factors).sum())
