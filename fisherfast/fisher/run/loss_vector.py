# SPDX-License-Identifier: Apache-2.0
"""The vector of per-sample losses that ``collect`` is given: what it must be, and what is rarely meant."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fisherfast._names import listed
from fisherfast._warning import warn
from fisherfast.capture.calls import graph
from fisherfast.capture.tracked import Tracked

_CHOOSING = {"Slice", "Split", "SplitWithSizes", "Index", "IndexSelect", "MaskedSelect", "Topk"}  # torch's nodes


def check(loss: Tensor) -> None:
    """Errors: TypeError, ValueError for what is no vector ``[N]`` with a graph."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"collect: the loss must be a vector [N], got {type(loss).__name__}")
    if loss.dim() != 1:
        raise ValueError(
            f"collect: the loss must be a vector [N], one negative log-likelihood per sample, got shape {tuple(loss.shape)}; "
            "use reduction='none' and sum over the positions of a sample"
        )
    if loss.shape[0] == 0:
        raise ValueError("collect: the loss must hold at least one sample, got an empty vector")
    if loss.grad_fn is None:
        raise ValueError(
            "collect: the loss must depend on the model's parameters, got one without a graph; run the model in the block"
        )


def warn_of_length(loss: Tensor, inputs: list[list[torch.Size]]) -> None:
    """A vector of the losses of all samples' positions makes each of these a sample, and a number one sample of all: both rarely meant.

    ``inputs``: the shapes of the tensors that each call of the model was given.
    """
    N, firsts = len(loss), [shapes[0][0] if shapes else 0 for shapes in inputs]
    if N == 1 < min(firsts, default=0) and _was_a_number(loss):
        warn(
            f"collect: the loss should have one entry for each sample, got one number for inputs of {sum(firsts)}, which counts as one "
            "sample; use reduction='none', and sum over the positions of a sample"
        )
    known = min(firsts, default=0) > 1 and not any(N in shape for shapes in inputs for shape in shapes)
    if known and N > (samples := sum(firsts)) and N % samples == 0:
        warn(
            f"collect: the loss should have one entry for each sample, got {N} for inputs of {samples}; each entry counts as a sample. "
            f"Sum the losses of a sample's positions: losses.view({samples}, -1).sum(1)"
        )


def warn_of_part(loss: Tensor) -> bool:
    """Some of the losses of a forward pass: rows of the other samples are inputs in KFAC's A, and the next part is another draw.

    Returns whether it did.
    """
    chosen = type(loss.grad_fn).__name__.removesuffix("Backward0") in _CHOOSING
    whole: tuple[int, ...] = getattr(loss.grad_fn, "_saved_self_sym_sizes", ()) if chosen else ()
    if len(whole) != 1 or whole[0] <= len(loss):
        return False
    warn(
        f"collect: the loss should hold all samples of a forward pass, got a part of a vector, {len(loss)} of {whole[0]}; the others "
        "are inputs in KFAC's factors, and several parts count as several draws of one. Call the model with each part"
    )
    return True


def warn_of_others(loss: Tensor, tracked: dict[str, Tracked]) -> None:
    """``.grad`` is filled for the model's parameters; a head outside of it would never be trained, and nobody know."""
    own = {id(one.parameter) for one in tracked.values()}
    leaves = (getattr(node, "variable", None) for node in graph(loss, closed=True))
    others = {id(leaf): tuple(leaf.shape) for leaf in leaves if isinstance(leaf, nn.Parameter) and id(leaf) not in own}
    if others:
        warn(
            "collect: gradients=True fills the .grad of the model's own parameters, but the loss depends on others, "
            f"of shapes {listed(map(str, others.values()))}, which get none; collect over all that is trained, nn.ModuleList([...]) say"
        )


def _was_a_number(loss: Tensor) -> bool:
    """Whether a vector of one entry was made of a number, as a mean over a batch is; a list of losses is one of samples."""
    if type(loss.grad_fn).__name__ == "StackBackward0":
        return False
    parents = [parent for parent, _ in getattr(loss.grad_fn, "next_functions", ()) if parent is not None]
    return len(parents) == 1 and len(parents[0]._input_metadata[0].shape) == 0
