# SPDX-License-Identifier: Apache-2.0
"""Train mode: with dropout, other draws or batch statistics samples depend on chance or on each other, and none has a gradient of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fisherfast._names import listed
from fisherfast._nested import tensors
from fisherfast._warning import warn
from fisherfast.capture.under_way import under_way

# By function: the positions of the probability and of the training flag, and their defaults.
_DROPOUTS: dict[Any, tuple[int, int, float, bool]] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), (1, 2, 0.5, True)),
    **dict.fromkeys((F.alpha_dropout, F.feature_alpha_dropout), (1, 2, 0.5, False)),
    **dict.fromkeys((torch.dropout, torch.dropout_, torch.feature_dropout, torch.feature_dropout_), (1, 2, 0.5, True)),
    **dict.fromkeys(
        (torch.alpha_dropout, torch.alpha_dropout_, torch.feature_alpha_dropout, torch.feature_alpha_dropout_), (1, 2, 0.5, True)
    ),
    torch.native_dropout: (1, 2, 0.5, True),
    F.multi_head_attention_forward: (10, 13, 0.0, True),
}
_SLOPES = {F.rrelu: 3, torch.rrelu: 3, torch.rrelu_: 3}
_STATISTICS = {F.batch_norm: 5, torch.batch_norm: 5, torch.native_batch_norm: 5}
_OUT_OF_PLACE = (
    *("rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "randperm", "normal", "bernoulli", "multinomial"),
    *("poisson", "binomial", "_standard_gamma", "_sample_dirichlet"),
)
_IN_PLACE = ("bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_")
DRAWING = {
    *(getattr(torch, name) for name in _OUT_OF_PLACE),
    *(getattr(Tensor, name) for name in ("bernoulli", "multinomial", *_IN_PLACE)),
    F.fractional_max_pool2d,
    F.fractional_max_pool3d,
}
CHANCE = {*_DROPOUTS, F.gumbel_softmax, F.scaled_dot_product_attention, *_SLOPES, *_STATISTICS}


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside compile and data-parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


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


def is_parameter(tensor: Tensor) -> bool:
    """Whether it is one, or a view of one."""
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)


def refused_chance(func: Any, args: Any, kwargs: Any, known: Callable[[Tensor], bool] = is_parameter) -> str | None:
    """Why a call of one of these functions leaves no sample a gradient of its own, because it draws, or takes statistics of the batch; else
    None. ``known``: whether a tensor is a parameter or a view of one, whose statistics are the model's own.
    """

    def given(name: str, place: int, otherwise: Any) -> Any:
        return kwargs.get(name, args[place] if len(args) > place else otherwise)

    if func in _DROPOUTS:
        where, when, usual, trains = _DROPOUTS[func]
        probability = given("dropout_p" if func is F.multi_head_attention_forward else "p", where, usual)
        training = given("train" if "train" in kwargs else "training", when, trains)
        if training is not False and probability > 0:  # None, of native_dropout, is True
            return f"model: must not draw dropout, got {func.__name__}(p={probability}, training=True); call model.eval()"
    elif func is F.gumbel_softmax:
        return "model: must not draw, got gumbel_softmax; there is no Fisher of one draw"
    elif func is F.scaled_dot_product_attention:
        if (probability := given("dropout_p", 4, 0.0)) > 0:
            return f"model: must not draw dropout, got attention with dropout_p={probability}; call model.eval()"
    elif func in _SLOPES:
        if given("training", _SLOPES[func], False):
            return "model: must not draw slopes, got rrelu(training=True); call model.eval()"
    elif func in _STATISTICS and given("training", _STATISTICS[func], False) and not known(given("input", 0, None)):
        return (
            "model: must not use batch statistics, got batch_norm(training=True); call model.eval(), and where "
            "a BatchNorm has no running statistics (track_running_stats=False), which it then computes of the batch all the same, use another norm"
        )
    return None


class Draws:
    """The random numbers that a model draws in its forward pass: refused in train mode, where they are noise to learn by (stochastic
    depth), and warned of once in eval mode, where they are what the model is (the noise of a variational autoencoder).
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._said = model, False

    def look(self, func: Any, kwargs: Any, out: Any) -> None:
        """After a call of a drawing function. Errors: ValueError if a module of the model that is in train mode made it."""
        if not _several(out) or any(
            kwargs.get(key) is not None for key in ("_random_samples", "generator")
        ):  # the model's own numbers
            return
        callers = [one.module for one in under_way(self._model)]
        if not callers:
            return  # the user drew, outside of the model
        what = f"{func.__name__} in {type(callers[0]).__name__}"
        if any(module.training for module in callers):
            raise ValueError(f"model: must not draw random numbers in train mode, got {what}; call model.eval()")
        if not self._said:
            self._said = True
            warn(
                f"model: should draw no random numbers in its forward pass, got {what}; the result is of what was drawn this time, "
                "and another run has another"
            )


def _several(drawn: Any) -> bool:
    """Whether it may be a number for each sample, be it the only one: a scalar, as ``torch.rand([])``, decides whether a layer runs."""
    return any(tensor.numel() > 1 or tensor.dim() > 1 for tensor in tensors(drawn))


DATA = vars(torch._C.TensorBase)["data"]  # the attribute, which is seen when it is read or set
_BY_FREQUENCY = {F.embedding: 5, F.embedding_bag: 5}  # the positions of scale_grad_by_freq


def undivided(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments without ``scale_grad_by_freq``: what it makes is no gradient of log p."""
    at = _BY_FREQUENCY.get(func)
    if at is None:
        return args, kwargs
    args = (*args[:at], False, *args[at + 1 :]) if len(args) > at else args
    return args, {name: False if name == "scale_grad_by_freq" else value for name, value in kwargs.items()}


class WithoutChance(TorchFunctionMode):
    """Where a model runs that no capture looks at: the same calls are refused."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._draws = Draws(model)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``."""
        kwargs = kwargs or {}
        if func in CHANCE and (why := refused_chance(func, args, kwargs)):
            raise ValueError(why)
        if getattr(func, "__self__", None) is DATA and func.__name__ == "__set__" and torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "a parameter is given other memory inside of the model"
            )  # torch 2.13 breaks down later, without an error
        args, kwargs = undivided(func, args, kwargs)
        out = func(*args, **kwargs)
        if func in DRAWING:
            self._draws.look(func, kwargs, out)
        return out
