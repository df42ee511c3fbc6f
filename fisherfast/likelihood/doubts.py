# SPDX-License-Identifier: Apache-2.0
"""What fits by its shapes, and is likely not what was meant: said of a measurement's first batch, or refused for its model."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfast._warning import warn
from fisherfast.data.batches import Batch
from fisherfast.likelihood._tensors import add_up_to_one, symbolic
from fisherfast.likelihood.bernoulli import Bernoulli
from fisherfast.likelihood.categorical import Categorical, CausalLM
from fisherfast.likelihood.protocol import Likelihood, Predictions

_FEW = 64  # outputs of a new network may lie in [0, 1] by chance; so many do not


def check_model(likelihood: Likelihood, model: object) -> None:
    """Raise ValueError for a causal likelihood of an encoder-decoder, whose decoder reads the labels already shifted."""
    if isinstance(likelihood, CausalLM) and getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True:
        raise ValueError(
            f"{likelihood.name}: the model must be a decoder alone, got the encoder-decoder {type(model).__name__}, whose output at position "
            "t is of label t itself; use likelihood='categorical'"
        )


def point_out(likelihood: Likelihood, batch: Batch, output: Tensor, predictions: Predictions) -> None:
    """Warn of what is doubtful in a first batch; ``output`` has the sample axis first."""
    if isinstance(likelihood, CausalLM):
        _of_labels_not_read(likelihood, batch)
    elif type(likelihood) is Categorical:
        _of_labels_read(predictions, batch)
        _of_the_class_axis(likelihood, batch, output)
    _of_probabilities(likelihood, predictions)


def _read(batch: Batch, labels: Tensor | None) -> Tensor | None:
    """The tokens from which the model scores, its decoder's where it has one, if there are as many as labels."""
    given = batch.inputs if isinstance(batch.inputs, dict) else {}
    read = given.get("decoder_input_ids", given.get("input_ids"))
    return read if isinstance(read, Tensor) and labels is not None and read.shape == labels.shape else None


def _of_labels_read(predictions: Predictions, batch: Batch) -> None:
    labels, counted = predictions.targets, predictions.counted
    read = _read(batch, labels)
    if read is None or read.shape[1] < 2 or not bool(((labels == read) | ~counted).all()) or not bool(counted.any()):
        return
    warn(
        "categorical: the labels are the input_ids themselves, position by position, as if the model had to repeat what it reads; if "
        "it is a causal language model, pass likelihood=ff.CausalLM()",
    )


def _of_labels_not_read(likelihood: CausalLM, batch: Batch) -> None:
    labels, mask = batch.targets, batch.output_mask
    read = _read(batch, labels)
    if labels is None or read is None:
        return
    different = (labels != read) & (labels != likelihood.ignore_index)
    if mask is not None and mask.shape == labels.shape:
        different &= mask != 0
    if bool(different[:, 1:].any()):  # the first token is predicted by none
        warn(
            f"{likelihood.name}: some labels are not the input_ids at their position, and ff.CausalLM() shifts labels by one; of a masked "
            "language model, and where the labels are shifted already, pass likelihood='categorical'",
        )


def _of_the_class_axis(likelihood: Categorical, batch: Batch, output: Tensor) -> None:
    square = likelihood.axis == -1 and output.dim() == 3 and output.shape[1] == output.shape[2]
    mask = batch.output_mask
    positions_known = batch.offsets is not None or (mask is not None and mask.shape == output.shape[:2])
    if square and not positions_known:
        warn(
            f"{likelihood.name}: the output {symbolic(output.shape)} was taken as [N, L, C], classes last, and may as well be [N, C, L]; say "
            "which with likelihood=ff.Categorical(axis=2), or ff.Categorical(axis=1) for classes first",
        )


def _of_probabilities(likelihood: Likelihood, predictions: Predictions) -> None:
    if not isinstance(likelihood, Categorical | Bernoulli):
        return
    values, several = predictions.values.detach(), isinstance(likelihood, Categorical)
    if not several:
        values = values[predictions.counted]
    if values.numel() < (1 if several else _FEW):
        return
    low, high = torch.stack(values.aminmax()).tolist()
    if not 0 <= low < high <= 1 or (several and not add_up_to_one(values)):  # all zero: a head that has not learnt yet
        return
    if not several and high - low < 0.5:  # nor has one whose outputs are nearly one number
        return
    what, how = (" and the rows add up to 1", "softmax") if several else ("", "sigmoid")
    warn(
        f"{likelihood.name}: the output looks like probabilities (all lie in [0, 1]{what}) and is taken as logits; leave out the model's "
        f"{how}, or undo it with output=lambda result: result.{'log' if several else 'logit'}()",
    )
