# SPDX-License-Identifier: Apache-2.0
"""The table *function -> rule*, and how a function is entered into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

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

    The form with these inputs must *be* what the function does with the parameter, scale included: a rule is believed.
    Compare ``ff.fisher`` with and without it once, on a small model.

    Example, of an operator that computes ``scale * x @ weight.T``::

        @ff.rule(torch.ops.my_library.scaled_linear)
        def _(x, weight, scale=1.0):
            yield ff.rules.Use(weight, ff.rules.MatMul(), (scale * x,))

    Errors:   TypeError for what is never called with a parameter: a module, whose class calls functions, or what is not callable.
              A Python function of your own is seen only if it goes through ``__torch_function__``, as torch's functions, methods
              of tensors and ``torch.ops`` do; what it calls is seen in any case.
    """
    for function in functions:
        if (
            not callable(function)
            or isinstance(function, nn.Module)
            or (isinstance(function, type) and issubclass(function, nn.Module))
        ):
            raise TypeError(
                f"rule: must be given functions, got {function!r}; a module's parameters are seen in the functions that its forward calls"
            )

    def register(function: Rule) -> Rule:
        RULES.update((f, function) for f in functions)
        return function

    return register
