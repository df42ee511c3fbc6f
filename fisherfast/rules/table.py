# SPDX-License-Identifier: Apache-2.0
"""The table *function -> rule*, and how a function is entered into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fisherfast.rules.forms import Form


@dataclass(frozen=True)
class Use:
    """One parameter in one call: its form, and the call's inputs that the form needs in the backward pass."""

    parameter: Tensor
    form: Form
    inputs: tuple[Tensor, ...] = ()


Rule = Callable[..., Iterator[Use]]
RULES: dict[Any, Rule] = {}


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register how ``functions`` use their parameters; also the extension point for third-party functions.

    The decorated generator is called with the function's own arguments and yields a ``Use`` for each argument that may
    be a parameter; those that are not tracked are ignored. Yield nothing for arguments the rule does not cover (an
    unusual option, say): the parameter then goes to the fallback, which is always right.

    Example::

        @ff.rule(my_library.scaled_linear)
        def _(x, weight):
            yield ff.rules.Use(weight, ff.rules.MatMul(), (x,))
    """

    def register(function: Rule) -> Rule:
        RULES.update((f, function) for f in functions)
        return function

    return register
