# SPDX-License-Identifier: Apache-2.0
"""Tensors that outlive the mode in which they were asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def outside_inference_mode(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Have a function return ordinary tensors without a graph, also in ``torch.inference_mode``: what it made there autograd could never use."""

    @functools.wraps(function)
    def outside(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return outside
