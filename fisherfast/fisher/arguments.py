# SPDX-License-Identifier: Apache-2.0
"""What callers hand to a Fisher: means and sums to build it from; vectors, flat or by name; dampings, one or by name."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fisherfast import _checks
from fisherfast._names import listed
from fisherfast.accumulator import Accumulator
from fisherfast.fisher.protocol import Damping, Vector, layer_of


def split(method: str, v: Tensor | Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """A vector's part for each parameter, shaped like it. Errors: TypeError, ValueError if ``v`` does not fit ``shapes``."""
    if isinstance(v, Tensor):
        return _split_flat(method, v, shapes)
    if not isinstance(v, Mapping):
        raise TypeError(f"{method}: v must be a tensor or {{name: tensor}}, got {type(v).__name__}")
    if unknown := set(v) - set(shapes):
        raise ValueError(f"{method}: v must have the names of F only, got {listed(unknown)}; tied tensors go by F.aliases")
    if missing := set(shapes) - set(v):
        raise ValueError(f"{method}: v must have every name of F, got none for {listed(missing)}; pass zeros there")
    for name, shape in shapes.items():
        if v[name].shape != shape:
            raise ValueError(f"{method}: v[{name!r}] must be {tuple(shape)}, got {tuple(v[name].shape)}")
        _check_floating(method, f"v[{name!r}]", v[name])
    return {name: v[name] for name in shapes}


def _split_flat(method: str, v: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    sizes = [shape.numel() for shape in shapes.values()]
    if v.shape != (sum(sizes),):
        raise ValueError(f"{method}: a flat v must have one axis of all {sum(sizes)} parameters, got {tuple(v.shape)}")
    _check_floating(method, "v", v)
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), v.contiguous().split(sizes), strict=True)}


def _check_floating(method: str, what: str, v: Tensor) -> None:
    if not v.is_floating_point():
        raise TypeError(f"{method}: {what} must be floating, got {v.dtype}")


def like(v: Vector, parts: dict[str, Tensor]) -> Vector:
    """A vector by names, flat if ``v`` was."""
    return torch.cat([part.flatten() for part in parts.values()]) if isinstance(v, Tensor) else parts


def damping_by_name(method: str, damping: Damping, names: Iterable[str]) -> dict[str, float]:
    """The damping of each parameter. Errors: ValueError if negative, not finite, unknown or missing for some parameter."""
    if not isinstance(damping, Mapping):
        return dict.fromkeys(names, _checked_damping(method, "damping", damping))
    names = list(names)
    if unknown := set(damping) - {*names, *map(layer_of, names)}:
        raise ValueError(f"{method}: damping must name layers or parameters of F, got {listed(unknown)}")
    chosen = {name: name if name in damping else layer_of(name) for name in names}
    if missing := {name for name, key in chosen.items() if key not in damping}:
        raise ValueError(f"{method}: damping must cover every parameter, got none for {listed(missing)}; 0.0 is allowed")
    return {name: _checked_damping(method, f"damping[{key!r}]", damping[key]) for name, key in chosen.items()}


def _checked_damping(method: str, what: str, damping: float) -> float:
    if isinstance(damping, Tensor) and damping.requires_grad:
        raise ValueError(
            f"{method}: {what} must be a number, got a tensor that asks for a gradient, which would be lost; pass its .item()"
        )
    try:
        value = float(damping)
    except (TypeError, ValueError, RuntimeError):  # of several numbers, or none
        value = damping
    value = _checks.non_negative(method, what, value)
    if 0 < value < sys.float_info.min:
        raise ValueError(f"{method}: {what} must be 0 or at least {sys.float_info.min:.3g}, whose inverse is finite, got {value}")
    return value


def check_mean(name: str, mean: Tensor, caller: str = "DiagonalFisher") -> None:
    """Raise TypeError or ValueError unless ``mean`` can be a mean of squares."""
    if not (isinstance(mean, Tensor) and mean.is_floating_point()):
        raise TypeError(f"{caller}: {name!r} must be a floating tensor, got {getattr(mean, 'dtype', type(mean).__name__)}")
    if mean.layout != torch.strided:
        raise TypeError(f"{caller}: {name!r} must be a dense tensor, got {mean.layout}; pass its to_dense()")
    if bad := int((~mean.isfinite()).sum()):
        raise ValueError(f"{caller}: {name!r} must be finite, got {bad} entries that are not")
    if negative := int((mean < 0).sum()):
        raise ValueError(f"{caller}: {name!r} must be >= 0, got {negative} negative entries; a mean of squares has none")


def check_distinct(sums: Mapping[str, Accumulator]) -> None:
    """Raise ValueError if two names hold one tensor: pooling in place would count it twice."""
    first: dict[int, str] = {}
    for name, accumulator in sums.items():
        tensor = accumulator.parts[0]
        if tensor.numel() and (other := first.setdefault(tensor.data_ptr(), name)) != name:
            raise ValueError(
                f"Fisher: every name must have a tensor of its own, got one tensor for {other!r} and {name!r}; pass it once, with the other name in aliases"
            )
