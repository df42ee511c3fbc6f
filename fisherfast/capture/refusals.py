# SPDX-License-Identifier: Apache-2.0
"""What a forward pass must not do: draw at random, or take statistics of the batch. Samples then have no gradient of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fisherfast._names import listed
from fisherfast._nested import tensors
from fisherfast._warning import warn
from fisherfast.capture.parameters import is_parameter, unwrapped
from fisherfast.capture.running import running_modules

_OUT_OF_PLACE = (
    *("rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "randperm", "normal", "bernoulli", "multinomial"),
    *("poisson", "binomial", "_standard_gamma", "_sample_dirichlet"),
)
_IN_PLACE = ("bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_")
RANDOM = {
    *(getattr(torch, name) for name in _OUT_OF_PLACE),
    *(getattr(Tensor, name) for name in ("bernoulli", "multinomial", *_IN_PLACE)),
    F.fractional_max_pool2d,
    F.fractional_max_pool3d,
}


def refuse_train_mode(model: nn.Module) -> None:
    """Raise ValueError naming the modules whose train mode has no per-sample gradient: dropout and batch statistics.

    And TypeError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: must be a torch.nn.Module, got {type(model).__name__}; it comes first, then the data")
    culprits = [
        name
        for name, module in unwrapped(model).named_modules()
        if module.training
        and (
            isinstance(module, nn.modules.batchnorm._BatchNorm)
            or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
            or (isinstance(module, nn.RNNBase) and module.dropout > 0)
        )
    ]
    if culprits:
        raise ValueError(
            f"model: dropout and batch statistics must be off, got {len(culprits)} such modules in train mode, {listed(culprits)}; "
            "call model.eval(). In train mode a sample has no gradient of its own"
        )


# -- calls that draw, or take statistics of the batch, depending on their arguments


class _Arguments:
    """Of a call: by name, or by the position that they have."""

    def __init__(self, args: Any, kwargs: Any) -> None:
        self._args, self._kwargs = args, kwargs

    def get(self, name: str, position: int, default: Any) -> Any:
        return self._kwargs.get(name, self._args[position] if len(self._args) > position else default)


Check = Callable[[Any, _Arguments, Callable[[Tensor], bool]], str | None]


def _dropout(
    func: Any,
    given: _Arguments,
    _: Any,
    p: tuple[str, int, float] = ("p", 1, 0.5),
    training: tuple[str, int, bool] = ("training", 2, True),
) -> str | None:
    probability = given.get(*p)
    if given.get(*training) is False or probability <= 0:  # None, of native_dropout, is True
        return None
    return f"model: must not draw dropout, got {func.__name__}(p={probability}, training=True); call model.eval()"


def _attention(func: Any, given: _Arguments, _: Any) -> str | None:
    probability = given.get("dropout_p", 4, 0.0)
    return (
        f"model: must not draw dropout, got attention with dropout_p={probability}; call model.eval()"
        if probability > 0
        else None
    )


def _gumbel(func: Any, given: _Arguments, _: Any) -> str | None:
    return "model: must not draw, got gumbel_softmax; there is no Fisher of one draw"


def _slopes(func: Any, given: _Arguments, _: Any) -> str | None:
    return "model: must not draw slopes, got rrelu(training=True); call model.eval()" if given.get("training", 3, False) else None


def _statistics(func: Any, given: _Arguments, is_parameter: Callable[[Tensor], bool]) -> str | None:
    if not given.get("training", 5, False) or is_parameter(given.get("input", 0, None)):
        return None
    return (
        "model: must not use batch statistics, got batch_norm(training=True); call model.eval(), and where "
        "a BatchNorm has no running statistics (track_running_stats=False), which it then computes of the batch all the same, use another norm"
    )


_CHECKS: dict[Any, Check] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), _dropout),
    **dict.fromkeys((F.alpha_dropout, F.feature_alpha_dropout), partial(_dropout, training=("training", 2, False))),
    **dict.fromkeys(
        (
            *(torch.dropout, torch.dropout_, torch.feature_dropout, torch.feature_dropout_, torch.native_dropout),
            *(torch.alpha_dropout, torch.alpha_dropout_, torch.feature_alpha_dropout, torch.feature_alpha_dropout_),
        ),
        partial(_dropout, training=("train", 2, True)),
    ),
    F.multi_head_attention_forward: partial(_dropout, p=("dropout_p", 10, 0.0), training=("training", 13, True)),
    F.scaled_dot_product_attention: _attention,
    F.gumbel_softmax: _gumbel,
    **dict.fromkeys((F.rrelu, torch.rrelu, torch.rrelu_), _slopes),
    **dict.fromkeys((F.batch_norm, torch.batch_norm, torch.native_batch_norm), _statistics),
}
CHECKED = _CHECKS.keys()


def refusal(func: Any, args: Any, kwargs: Any, is_parameter: Callable[[Tensor], bool] = is_parameter) -> str | None:
    """Why a call leaves no sample a gradient of its own, as an error says it; None if it does not.

    ``is_parameter``: whether a tensor is one, or a view of one, whose statistics are the model's own.
    """
    check = _CHECKS.get(func)
    return None if check is None else check(func, _Arguments(args, kwargs), is_parameter)


# -- functions that always draw


class RandomDraws:
    """The random numbers that a model draws in its forward pass: an error in train mode, where they regularise it (stochastic depth), and
    one warning in eval mode, where they are part of it (the noise of a variational autoencoder).
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._warned = model, False

    def look(self, func: Any, kwargs: Any, out: Any) -> None:
        """After a call of a function in ``RANDOM``. Errors: ValueError if a module of the model that is in train mode made it."""
        of_model = any(kwargs.get(key) is not None for key in ("_random_samples", "generator"))  # numbers that it brought
        if of_model or not _several(out):
            return
        callers = [running.module for running in running_modules(self._model)]
        if not callers:
            return  # the user drew, outside of the model
        what = f"{func.__name__} in {type(callers[0]).__name__}"
        if any(module.training for module in callers):
            raise ValueError(f"model: must not draw random numbers in train mode, got {what}; call model.eval()")
        if not self._warned:
            self._warned = True
            warn(
                f"model: should draw no random numbers in its forward pass, got {what}; the result is of what was drawn this time, "
                "and will differ in another run"
            )


def _several(drawn: Any) -> bool:
    """Whether it may be a number for each sample, be it the only one: a scalar, as ``torch.rand([])``, decides whether a layer runs."""
    return any(tensor.numel() > 1 or tensor.dim() > 1 for tensor in tensors(drawn))


# -- and what both modes that a model runs under do with a call

DATA = vars(torch._C.TensorBase)["data"]  # the attribute, which is seen when it is read or set
_BY_FREQUENCY = {F.embedding: 5, F.embedding_bag: 5}  # the positions of scale_grad_by_freq


def undivided(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments without ``scale_grad_by_freq``, which divides an embedding's gradient: the quotient is no gradient of log p."""
    at = _BY_FREQUENCY.get(func)
    if at is None:
        return args, kwargs
    args = (*args[:at], False, *args[at + 1 :]) if len(args) > at else args
    return args, {name: False if name == "scale_grad_by_freq" else value for name, value in kwargs.items()}


class Refusals(TorchFunctionMode):
    """For a model that runs without a capture: the calls that a capture refuses are refused here, too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._draws = RandomDraws(model)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``."""
        kwargs = kwargs or {}
        if func in CHECKED and (why := refusal(func, args, kwargs)):
            raise ValueError(why)
        sets_data = getattr(func, "__self__", None) is DATA and func.__name__ == "__set__"
        if sets_data and torch._C._are_functorch_transforms_active():  # torch 2.13 breaks down later, without an error
            raise RuntimeError("a parameter is given other memory inside of the model")
        args, kwargs = undivided(func, args, kwargs)
        out = func(*args, **kwargs)
        if func in RANDOM:
            self._draws.look(func, kwargs, out)
        return out
