# SPDX-License-Identifier: Apache-2.0
"""Functions taken apart: written in terms of functions that have rules, so that their parameters' uses are seen one by one.

Each computes what the function does, in eval mode, up to rounding. Recurrent layers are unrolled in time, which is also what lets
them be differentiated on a GPU, where cuDNN refuses a backward pass in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}


def decomposes(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as another way to compute ``functions``."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        DECOMPOSITIONS.update((f, function) for f in functions)
        return function

    return register


def opened(function: Any) -> Callable[..., Any]:
    """A copy of a Python function of torch that does not hand itself to the modes around it, so that its parts are seen."""
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


decomposes(F.multi_head_attention_forward)(opened(F.multi_head_attention_forward))


@decomposes(torch.bilinear)
def _bilinear(input1, input2, weight, bias=None):
    pairs = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)
    return F.linear(pairs, weight.flatten(1), bias)


@decomposes(torch.bmm, Tensor.bmm)
def _bmm(input, mat2):
    if not len(input):
        return NotImplemented
    return torch.stack([torch.mm(x, w) for x, w in zip(input.unbind(0), mat2.unbind(0), strict=True)])


@decomposes(torch._grouped_mm, F.grouped_mm)
def _grouped_mm(input, mat2, *, offs=None, bias=None, out_dtype=None):
    if input.dim() != 2 or mat2.dim() != 3 or bias is not None or out_dtype not in (None, input.dtype):
        return NotImplemented
    ends = offs.tolist()
    groups = input[: ends[-1]].split([end - start for start, end in pairwise([0, *ends])])
    products = torch.cat([torch.mm(x, w) for x, w in zip(groups, mat2.unbind(0), strict=True)])
    return F.pad(products, (0, 0, 0, len(input) - ends[-1]))


@decomposes(torch.baddbmm, Tensor.baddbmm)
def _baddbmm(input, batch1, batch2, *, beta=1, alpha=1):
    product = torch.bmm(batch1, batch2)
    sums = torch.add(input if beta == 1 else beta * input, product if alpha == 1 else alpha * product)
    return sums.to(product.dtype)  # that of autocast, where it is on


@decomposes(torch.addcmul, Tensor.addcmul)
def _addcmul(input, tensor1, tensor2, *third, value=1):
    if third:  # the old order, a value first
        return NotImplemented
    product = tensor1 * tensor2
    return torch.add(input, product if value == 1 else value * product)


@decomposes(torch.lerp, Tensor.lerp)
def _lerp(input, end, weight):
    return torch.add(input, weight * torch.sub(end, input))


def _in_place(function):
    def written(input, other, **options):
        return input.copy_(function(input.clone(), other, **options))  # the backward pass needs what was there

    return written


decomposes(Tensor.mul_, Tensor.__imul__)(_in_place(torch.mul))
decomposes(Tensor.sub_, Tensor.__isub__)(_in_place(torch.sub))
decomposes(Tensor.div_, Tensor.__itruediv__)(_in_place(torch.div))


@decomposes(F.scaled_dot_product_attention)
def _attention(query, key, value, attn_mask=None, *arguments, **options):
    """A bias of the scores gets every sample's axis where it is used."""
    scores = (*query.shape[:-1], key.shape[-2])
    if attn_mask is None or attn_mask.shape == scores or attn_mask.dtype == torch.bool:
        return NotImplemented
    return F.scaled_dot_product_attention(query, key, value, attn_mask.expand(scores), *arguments, **options)


@decomposes(F.embedding_bag)
def _embedding_bag(
    input, weight, offsets=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, mode="mean", sparse=False,
    per_sample_weights=None, include_last_offset=False, padding_idx=None,
):  # fmt: skip
    if mode == "max" or max_norm is not None:  # scale_grad_by_freq: see the rule of F.embedding
        return NotImplemented
    padding_idx = None if padding_idx is None else padding_idx % weight.shape[0]
    rows = F.embedding(input, weight, padding_idx)
    counted = torch.ones_like(input, dtype=rows.dtype) if padding_idx is None else (input != padding_idx).to(rows.dtype)
    weights = counted if per_sample_weights is None else counted * per_sample_weights
    if input.dim() == 2:
        bags, sizes = (rows * weights.unsqueeze(-1)).sum(1), counted.sum(1)
    else:
        starts = offsets[:-1] if include_last_offset else offsets
        bag = torch.bucketize(torch.arange(len(input), device=input.device), starts, right=True) - 1
        bags = rows.new_zeros(len(starts), rows.shape[-1]).index_add(0, bag, rows * weights.unsqueeze(-1))
        sizes = counted.new_zeros(len(starts)).index_add(0, bag, counted)
    return bags / sizes.clamp_min(1).unsqueeze(-1) if mode == "mean" else bags


# -- recurrence


def _lstm_step(gates_x: Tensor, state: tuple[Tensor, ...], w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None):
    h, c = state
    i, f, g, o = (gates_x + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if w_hr is None else F.linear(h, w_hr)), c


def _gru_step(gates_x: Tensor, state: tuple[Tensor, ...], w_hh: Tensor, b_hh: Tensor | None, w_hr: None):
    (h,) = state
    r_x, z_x, n_x = gates_x.chunk(3, -1)
    r_h, z_h, n_h = F.linear(h, w_hh, b_hh).chunk(3, -1)
    z = (z_x + z_h).sigmoid()
    n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return (n + z * (h - n),)


def _rnn_step(activation: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def step(gates_x: Tensor, state: tuple[Tensor, ...], w_hh: Tensor, b_hh: Tensor | None, w_hr: None):
        return (activation(gates_x + F.linear(state[0], w_hh, b_hh)),)

    return step


_STEPS = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": _rnn_step(torch.tanh),
    "rnn_relu": _rnn_step(torch.relu),
}


def _cell(step):
    def cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
        state = step(F.linear(input, w_ih, b_ih), tuple(hx) if isinstance(hx, (tuple, list)) else (hx,), w_hh, b_hh, None)
        return state if len(state) > 1 else state[0]

    return cell


class _Steps:
    """The rows of each time step: ``[T, N, D]``, or packed ``[M, D]`` with a number of rows per step, falling with time."""

    def __init__(self, sizes: list[int] | None, length: int) -> None:
        self.sizes = sizes
        self.starts = None if sizes is None else [0, *accumulate(sizes)]
        self.length = length if sizes is None else len(sizes)

    def of(self, rows: Tensor) -> list[Tensor]:
        return list(rows.unbind(0)) if self.sizes is None else list(rows.split(self.sizes))

    def together(self, steps: list[Tensor]) -> Tensor:
        return torch.stack(steps) if self.sizes is None else torch.cat(steps)


def _direction(step, steps: _Steps, x: Tensor, state: tuple[Tensor, ...], weights: list, backward: bool):
    """One layer in one direction: outputs of every step, and the state of every sample at its end."""
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    gates, outputs = steps.of(F.linear(x, w_ih, b_ih)), {}
    initial, final = state, []  # final: states of samples that have ended, the last ones first
    if steps.sizes is not None:
        state = tuple(s[: steps.sizes[-1 if backward else 0]] for s in state)
    for t in reversed(range(steps.length)) if backward else range(steps.length):
        rows = len(state[0]) if steps.sizes is None else steps.sizes[t]
        if rows < len(state[0]):  # shorter samples end here
            final.append(tuple(s[rows:] for s in state))
            state = tuple(s[:rows] for s in state)
        elif rows > len(state[0]):  # walking backwards, they begin here
            state = tuple(torch.cat([s, i[len(s) : rows]]) for s, i in zip(state, initial, strict=True))
        state = step(gates[t], state, w_hh, b_hh, w_hr)
        outputs[t] = state[0]
    ends = [state, *reversed(final)]
    return steps.together([outputs[t] for t in range(steps.length)]), tuple(torch.cat(s) for s in zip(*ends, strict=True))


def _layers(params: list[Tensor], has_biases: bool, projected: bool) -> Iterator[list[Tensor | None]]:
    """The parameters layer by layer and direction by direction: w_ih, w_hh, b_ih, b_hh, w_hr."""
    each = 2 + 2 * has_biases + projected
    for start in range(0, len(params), each):
        w_ih, w_hh, *rest = params[start : start + each]
        w_hr = rest.pop() if projected else None
        yield [w_ih, w_hh, *(rest or (None, None)), w_hr]


def _each(states, change):
    return tuple(map(change, states)) if isinstance(states, (tuple, list)) else change(states)


def _recurrent(name: str, input, second, third, *arguments):
    """``torch.lstm`` and its like, padded ``(input, hx, params, ..., batch_first)`` or packed ``(data, sizes, hx, params, ...)``."""
    if isinstance(second if name == "lstm" else third, Tensor):
        sizes, hx, (params, has_biases, num_layers, dropout, train, bidirectional) = second.tolist(), third, arguments
        batch_first = False
        # The rows of the state are in the order of the packed data, which only shows where they meet: say so.
        hx = _each(hx, lambda state: state.index_select(1, torch.arange(sizes[0], device=state.device)))
    else:
        sizes, hx, params = None, second, third
        has_biases, num_layers, dropout, train, bidirectional, batch_first = arguments
    if dropout > 0 and train:
        raise ValueError(f"model: must not draw dropout, got {name} with dropout {dropout} in train mode; call model.eval()")
    x = input.transpose(0, 1) if batch_first else input
    state = tuple(hx) if name == "lstm" else (hx,)
    steps, finals = _Steps(sizes, len(x)), []
    weights = list(_layers(params, has_biases, name == "lstm" and state[0].shape[-1] != state[1].shape[-1]))
    directions = 1 + bool(bidirectional)
    for layer in range(num_layers):
        outputs = []
        for backward in range(directions):
            index = layer * directions + backward
            out, final = _direction(_STEPS[name], steps, x, tuple(s[index] for s in state), weights[index], bool(backward))
            outputs.append(out)
            finals.append(final)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    ends = [torch.stack(s) for s in zip(*finals, strict=True)]
    return (x.transpose(0, 1) if batch_first else x), *ends


def _register_recurrent() -> None:
    for name, step in _STEPS.items():

        def unrolled(*arguments, name=name):
            return _recurrent(name, *arguments)

        decomposes(getattr(torch, name))(unrolled)
        decomposes(getattr(torch, f"{name}_cell"))(_cell(step))


_register_recurrent()
