# SPDX-License-Identifier: Apache-2.0
"""The parameters of a model that a measurement is of, and whether they can be measured."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside compile and data-parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def is_parameter(tensor: Tensor) -> bool:
    """Whether it is one, or a view of one."""
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)


def measurable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that ask for a gradient, by name; a tied tensor once, under its first name.

    Errors: ValueError if there are none, or one whose gradient is not a number for each entry, on one device.
    """
    if torch._C._are_functorch_transforms_active():
        raise ValueError(
            "model: must be measured outside of torch.func's transforms (grad, vmap, jvp), got a call inside of one; measure it before, and "
            "give the function the result"
        )
    root = unwrapped(model)
    named = {name: p for name, p in root.named_parameters() if p.requires_grad}
    _refuse_shards(root, named)
    for name, p in named.items():
        if problem := _problem(p):
            raise ValueError(f"{name}: must hold real numbers, got a parameter that is {problem}")
    if not named:
        raise ValueError("model: must have a parameter with requires_grad=True, got none; nothing to measure")
    devices = sorted({str(p.device) for p in named.values()})
    if len(devices) > 1:
        raise ValueError(f"model: parameters must be on one device, got {devices}; move the model to one of them")
    if devices == ["meta"]:
        raise ValueError("model: parameters must hold numbers, got meta tensors; load the weights first")
    return named


def _problem(parameter: Tensor) -> str | None:
    """What a parameter is whose gradient is not one number for each of its entries, and what to do."""
    if parameter.is_inference():  # which asks for a gradient, but autograd keeps nothing of it
        return "made in inference mode; build or load the model outside of torch.inference_mode(), or copy.deepcopy it there"
    for kind, found in (
        ("sparse", parameter.layout is not torch.strided),
        ("complex", parameter.is_complex()),
        ("empty", not parameter.numel()),
    ):
        if found:
            return f"{kind}; freeze it (requires_grad_(False))"
    return None


def _refuse_shards(model: nn.Module, named: dict[str, nn.Parameter]) -> None:
    """Raise ValueError where a parameter is a share of one, or made of several tensors: it is not what functions receive."""
    kinds = {type(p).__name__ for p in named.values() if is_traceable_wrapper_subclass(p)}  # DTensor, and those of quantisation
    kinds |= {type(module).__name__ for module in model.modules()} & {"FullyShardedDataParallel"}
    if kinds:
        raise ValueError(
            f"model: parameters must be whole tensors of their own, got {' and '.join(sorted(kinds))}; measure the model before it is "
            "sharded or quantised, with a share of the data on each rank, and pool with all_reduce"
        )
