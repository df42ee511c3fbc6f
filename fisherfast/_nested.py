# SPDX-License-Identifier: Apache-2.0
"""The tensors in what a function is given, or gives back, however deep they lie in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def tensors(tree: Any) -> Iterator[Tensor]:
    """All of them."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from tensors(branch)
    elif isinstance(tree, dict):
        yield from tensors(tuple(tree.values()))


def mapped(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same with what a function makes of each tensor, in plain dictionaries, lists and tuples; others are left as they are."""
    if isinstance(tree, Tensor):
        return function(tree)
    if type(tree) is dict:
        return {key: mapped(value, function) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(mapped(item, function) for item in tree)
    return tree


def replaced(tree: Any, stand_ins: dict[int, Tensor]) -> Any:
    """The same with others in place of some, which are known by their id."""
    if isinstance(tree, Tensor):
        return stand_ins.get(id(tree), tree)
    if isinstance(tree, dict):
        return {key: replaced(value, stand_ins) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(replaced(item, stand_ins) for item in tree)
    return tree
