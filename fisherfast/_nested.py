# SPDX-License-Identifier: Apache-2.0
"""The tensors in what a function is given, or gives back, however deep they lie in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


def tensors(*trees: Any) -> list[Tensor]:
    """All tensors of trees of tuples, lists and dictionaries, from left to right."""
    found: list[Tensor] = []
    _collect(trees, found)
    return found


def _collect(trees: Iterable[Any], found: list[Tensor]) -> None:
    for tree in trees:
        if isinstance(tree, Tensor):
            found.append(tree)
        elif isinstance(tree, (tuple, list)):
            _collect(tree, found)
        elif isinstance(tree, dict):
            _collect(tree.values(), found)


def is_tensor(tree: Any) -> bool:
    """Whether a tree is a tensor by itself."""
    return isinstance(tree, Tensor)


def mapped(tree: Any, function: Callable[[Any], Any], is_leaf: Callable[[Any], bool] = is_tensor) -> Any:
    """The tree with ``function(leaf)`` for each tensor, or what else is a leaf, in its plain dictionaries, lists and tuples; all else
    stays as it is.
    """
    if is_leaf(tree):
        return function(tree)
    if type(tree) is dict:
        return {key: mapped(value, function, is_leaf) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(mapped(item, function, is_leaf) for item in tree)
    return tree


def replaced(tree: Any, stand_ins: dict[int, Tensor]) -> Any:
    """The tree with stand-ins for some of its tensors: ``{id of a tensor: what takes its place}``."""
    return mapped(tree, lambda tensor: stand_ins.get(id(tensor), tensor))
