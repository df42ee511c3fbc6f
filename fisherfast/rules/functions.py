# SPDX-License-Identifier: Apache-2.0
"""The rules of torch's own functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfast._precision import wide
from fisherfast.rules.convolution import Convolution
from fisherfast.rules.forms import Elementwise, Lookup, MatMul
from fisherfast.rules.table import Use, rule


@rule(F.linear)
def _linear(input, weight, bias=None):
    if weight.dim() < 2:
        return  # a vector gives one output, without an axis
    yield Use(weight, MatMul(), (input,))
    if bias is not None:
        yield Use(bias, Elementwise(tuple(bias.shape)))


@rule(torch.addmm, Tensor.addmm)
def _addmm(input, mat1, mat2, *, beta=1, alpha=1):
    if beta == 1 and alpha == 1:
        yield Use(mat2, MatMul(transposed=True), (mat1,))
        yield Use(input, Elementwise(tuple(input.shape)))


@rule(torch.mm, Tensor.mm)
def _mm(input, mat2):
    yield from _matmul(input, mat2)


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def _matmul(input, other):
    if other.dim() == 2:
        yield Use(other, MatMul(transposed=True), (input,))
    if input.dim() == 2 and other.dim() >= 2:
        yield Use(input, MatMul(left=True), (other,))


@rule(F.embedding)
def _embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    if max_norm is None:  # scale_grad_by_freq changes what an optimizer is told, not the gradient of log p
        padding_idx = -1 if padding_idx is None else padding_idx % weight.shape[0]
        yield Use(weight, Lookup(padding_idx), (input,))


@rule(Tensor.__getitem__)
def _rows_of(input, index):
    if isinstance(index, Tensor) and index.dtype == torch.int64 and index.dim() and input.dim() == 2:
        yield Use(input, Lookup(), (index % input.shape[0],))


@rule(torch.index_select, Tensor.index_select)
def _selected_rows(input, dim, index):
    if dim in (0, -2) and input.dim() == 2 and isinstance(index, Tensor) and index.dtype == torch.int64:
        yield Use(input, Lookup(), (index,))


# -- convolutions


def _tuple(value, axes: int) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * axes if len(value) == 1 else value


@rule(torch.conv1d, torch.conv2d, torch.conv3d)
def _conv(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    axes = weight.dim() - 2
    if input.dim() == axes + 2:  # an image without a batch axis has no sample axis: left to the fallback
        dilation = _tuple(dilation, axes)
        if padding == "valid":
            padding = 0
        elif padding == "same":
            padding = [d * (k - 1) // 2 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        form = Convolution(_tuple(stride, axes), _tuple(padding, axes), dilation, groups)
        yield Use(weight, form, (input,))
        if bias is not None:
            yield Use(bias, _channels(bias, axes))


@rule(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def _conv_transpose(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    axes = weight.dim() - 2
    if input.dim() == axes + 2:
        form = Convolution(_tuple(stride, axes), _tuple(padding, axes), _tuple(dilation, axes), groups, transposed=True)
        yield Use(weight, form, (input,))
        if bias is not None:
            yield Use(bias, _channels(bias, axes))


def _channels(parameter: Tensor, axes: int, prepare: Callable[[Tensor], Tensor] | None = None) -> Elementwise:
    """One number per channel, the second axis of ``[N, C, *S]``."""
    return Elementwise((parameter.shape[0],) + (1,) * axes, prepare)


# -- norms: x is recomputed from the saved input rather than read off the output, (out - bias) / weight, which breaks where
# the weight is 0


def _widely(norm: Callable[..., Tensor], x: Tensor, *arguments, **options) -> Tensor:
    return norm(wide(x), *arguments, **options)


@rule(F.layer_norm)
def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    shape = tuple(normalized_shape)
    if weight is not None:
        yield Use(weight, Elementwise(shape, partial(_widely, F.layer_norm, normalized_shape=shape, eps=eps)), (input,))
    if bias is not None:
        yield Use(bias, Elementwise(shape))


@rule(F.rms_norm)
def _rms_norm(input, normalized_shape, weight=None, eps=None):
    shape = tuple(normalized_shape)
    if weight is not None:
        yield Use(weight, Elementwise(shape, partial(_widely, F.rms_norm, normalized_shape=shape, eps=eps)), (input,))


@rule(F.group_norm)
def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    yield from _channel_norm(input, weight, bias, partial(_widely, F.group_norm, num_groups=num_groups, eps=eps))


@rule(F.batch_norm)
def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training:  # of a parameter alone, as weight standardisation has it; of samples it was refused already
        return

    def prepare(x: Tensor) -> Tensor:
        x = wide(x)
        mean, rstd = (t.view(-1, *(1,) * (x.dim() - 2)) for t in (running_mean, (running_var + eps).rsqrt()))
        return (x - mean).mul_(rstd)

    yield from _channel_norm(input, weight, bias, prepare)


@rule(F.instance_norm)
def _instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    if use_input_stats:  # the running statistics must not be updated once more
        running_mean = running_var = None
    options = {"running_mean": running_mean, "running_var": running_var, "use_input_stats": use_input_stats, "eps": eps}
    yield from _channel_norm(input, weight, bias, partial(_widely, F.instance_norm, **options))


def _channel_norm(input, weight, bias, prepare):
    if weight is not None:
        yield Use(weight, _channels(weight, input.dim() - 2, prepare), (input,))
    if bias is not None:
        yield Use(bias, _channels(bias, input.dim() - 2))


# -- products, sums, copies


@rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def _mul(input, other):
    if isinstance(input, Tensor) and isinstance(other, Tensor):
        yield Use(input, Elementwise(tuple(input.shape)), (other,))
        yield Use(other, Elementwise(tuple(other.shape)), (input,))


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _add(input, other, *, alpha=1):
    if isinstance(input, Tensor) and isinstance(other, Tensor) and alpha == 1:
        yield Use(input, Elementwise(tuple(input.shape)))
        yield Use(other, Elementwise(tuple(other.shape)))


@rule(torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__)
def _sub(input, other, *, alpha=1):
    if isinstance(input, Tensor) and isinstance(other, Tensor) and alpha == 1:
        yield Use(input, Elementwise(tuple(input.shape)))
        yield Use(other, Elementwise(tuple(other.shape), negative=True))


@rule(torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.true_divide, Tensor.__truediv__)
def _div(input, other, *, rounding_mode=None):
    if isinstance(input, Tensor) and isinstance(other, Tensor) and rounding_mode is None:
        dtype = torch.promote_types(torch.result_type(input, other), torch.float32)
        yield Use(input, Elementwise(tuple(input.shape), partial(_reciprocal, dtype)), (other,))
        yield Use(other, Elementwise(tuple(other.shape), partial(_by_divisor, other.detach().to(dtype))), (input,))


def _reciprocal(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x.to(dtype).reciprocal()


def _by_divisor(divisor: Tensor, x: Tensor) -> Tensor:
    return -(x.to(divisor.dtype) / divisor / divisor)


@rule(torch.rsub)
def _rsub(input, other, *, alpha=1):
    yield from _sub(other, input, alpha=alpha)


@rule(Tensor.add_)
def _add_in_place(input, other, *, alpha=1):
    # Of a view the tap would be on a copy, which nobody who holds the view sees.
    if isinstance(other, Tensor) and alpha == 1 and input._base is None:
        yield Use(other, Elementwise(tuple(other.shape)))


@rule(torch.where)
def _where(condition, input, other):
    if isinstance(input, Tensor):
        yield Use(input, Elementwise(tuple(input.shape)), (condition,))
    if isinstance(other, Tensor):
        yield Use(other, Elementwise(tuple(other.shape), torch.logical_not), (condition,))


@rule(F.prelu, torch.prelu)
def _prelu(input, weight):
    shape = () if weight.numel() == 1 else (weight.shape[0],) + (1,) * max(0, input.dim() - 2)
    yield Use(weight, Elementwise(shape, partial(torch.clamp, max=0)), (input,))


@rule(Tensor.expand, Tensor.expand_as, torch.broadcast_to)
def _expand(input, *sizes):
    yield Use(input, Elementwise(tuple(input.shape)))


@rule(Tensor.repeat)
def _repeat(input, *sizes):
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    shape = (1,) * (len(sizes) - input.dim()) + tuple(input.shape)
    if all(size == 1 or extent == 1 for size, extent in zip(sizes, shape, strict=True)):
        yield Use(input, Elementwise(tuple(input.shape)))
