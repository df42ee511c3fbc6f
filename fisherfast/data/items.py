# SPDX-License-Identifier: Apache-2.0
"""Items: what a data set may yield, taken apart and made tensors that have been checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader

from fisherfast import _checks, _nested
from fisherfast.data import packing

_OURS = ("labels", "sample_weight", "sample_offsets")  # keys of a dict batch that are not passed to the model


def parts(item: Any) -> tuple[Any, Any, Any, Any]:
    """What a data set yields, as inputs, targets, weights and offsets; all but the inputs may be None."""
    if isinstance(item, Mapping):
        inputs = {key: value for key, value in item.items() if key not in _OURS}
        return inputs, item.get("labels"), item.get("sample_weight"), packing.offsets(item)
    if isinstance(item, (tuple, list)) and len(item) in (2, 3):
        inputs, targets, weight = (*item, None)[:3]
        if weight is not None and not as_tensor(weight).is_floating_point():  # the samples' indices, say
            raise TypeError(
                "data: the third entry of a batch is the weights of its samples and must be floating, got "
                f"{as_tensor(weight).dtype}; several inputs are one entry, ((x1, x2), y); leave indices out, or pass weights as .float()"
            )
        return inputs, targets, weight, None
    several = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
    if isinstance(item, Tensor):
        way = "data is a list of batches, [(inputs, targets)], and inputs without labels are (inputs, None)"
    elif isinstance(item, DataLoader):
        way = "take one batch of it, next(iter(loader))"
    else:
        way = "several inputs are one entry, ((x1, x2), targets)"
    raise TypeError(
        f"data: a batch must be (inputs, targets), (inputs, targets, weights) or a dict, got {type(item).__name__}{several}; {way}"
    )


def refuse_packed_sequences(inputs: Any) -> None:
    """Raise TypeError for what ``pack_sequence`` gives: a tuple to look at, whose first tensor has a row for every position."""
    given = inputs.values() if isinstance(inputs, Mapping) else inputs if type(inputs) in (tuple, list) else (inputs,)
    if any(isinstance(value, PackedSequence) for value in given):
        raise TypeError(
            "data: inputs must have the sample axis first, got a PackedSequence; pass padded sequences and their lengths, and pack them inside "
            "the model, or use ff.collect around your own forward passes"
        )


def targets(values: Any, device: torch.device) -> Tensor:
    """The labels as a tensor on ``device``. Errors: TypeError for what is no numbers."""
    try:
        tensor = as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:  # of text, of None, of rows of several lengths
        of = f" of {type(values[0]).__name__}" if isinstance(values, (list, tuple)) and values else ""
        raise TypeError(
            f"data: targets must be numbers, got {type(values).__name__}{of} ({error}); number the classes, pad what differs in length"
        ) from error
    return moved(tensor, device)


def weights(weight: Any, N: int, device: torch.device) -> Tensor | None:
    """``[N]`` in float32, or None. Errors: ValueError unless all are finite and not negative, and those above 0 float32's normal numbers."""
    if weight is None:
        return None
    weight = as_tensor(weight).detach()
    _checks.real("data", "sample weights", weight)
    weight = weight.to(device, torch.float32).contiguous()  # as the ops take them
    if weight.shape != (N,):
        raise ValueError(f"data: sample weights must be [N] = ({N},), one number per sample, got {tuple(weight.shape)}")
    if not bool((torch.isfinite(weight) & (weight >= 0)).all()):
        raise ValueError(
            f"data: sample weights must be finite and not negative, got {float(weight.min())} .. {float(weight.max())}"
        )
    if bool(((weight > 0) & (weight < (least := torch.finfo(torch.float32).tiny))).any()):
        raise ValueError(
            f"data: sample weights must be 0 or at least {least:.3g}, where float32 has its digits, got {float(weight[weight > 0].min()):.3g}; "
            "multiply all by one factor: only their ratios count"
        )
    return weight


def as_tensor(values: Any) -> Tensor:
    """As it is, or what lists and arrays hold: torch would move either to its default device."""
    return values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")


def moved(value: Any, device: torch.device) -> Any:
    """Autograd keeps no tensor that was made in inference mode, so of these it is a copy."""
    return _nested.mapped(value, lambda tensor: tensor.to(device, copy=tensor.is_inference()))
