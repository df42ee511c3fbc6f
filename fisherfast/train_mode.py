# SPDX-License-Identifier: Apache-2.0
"""Train mode: with dropout or batch statistics samples depend on chance or on each other, and none has a gradient of its own."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
CHANCE = {*_DROPOUTS, F.scaled_dot_product_attention, F.batch_norm, F.rrelu}


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside compile and data-parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def refuse_train_mode(model: nn.Module) -> None:
    """Raise ValueError naming the modules whose train mode has no per-sample gradient: dropout and batch statistics."""
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
        shown = ", ".join(repr(name) for name in culprits[:5]) + (", ..." if len(culprits) > 5 else "")
        raise ValueError(
            f"model: dropout and batch statistics must be off, got {len(culprits)} such modules in train mode ({shown}); "
            "call model.eval(). In train mode a sample has no gradient of its own"
        )


def refuse_chance(func: Any, args: Any, kwargs: Any) -> None:
    """Raise ValueError if a call of one of these functions draws, or takes statistics of the batch."""
    if func in _DROPOUTS:
        probability = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        training = kwargs.get("training", args[2] if len(args) > 2 else func not in (F.alpha_dropout, F.feature_alpha_dropout))
        if training and probability > 0:
            raise ValueError(
                f"model: must not draw dropout, got {func.__name__}(p={probability}, training=True); call model.eval()"
            )
    elif func is F.scaled_dot_product_attention:
        probability = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
        if probability > 0:
            raise ValueError(f"model: must not draw dropout, got attention with dropout_p={probability}; call model.eval()")
    elif func is F.rrelu:
        if kwargs.get("training", args[3] if len(args) > 3 else False):
            raise ValueError("model: must not draw slopes, got rrelu(training=True); call model.eval()")
    elif func is F.batch_norm:
        if kwargs.get("training", args[5] if len(args) > 5 else False):
            raise ValueError("model: must not use batch statistics, got batch_norm(training=True); call model.eval()")
