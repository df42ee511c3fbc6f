# SPDX-License-Identifier: Apache-2.0
"""Blocks of moments that were computed elsewhere: which parameters each is over, and whether it can be a mean of outer products."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from fisherfast import _checks
from fisherfast._names import listed
from fisherfast.accumulator import Accumulator
from fisherfast.capture.parameters import measurable
from fisherfast.fisher import arguments
from fisherfast.fisher.blocks.exact import ExactBlock, Flat
from fisherfast.fisher.blocks.kronecker import KroneckerBlock, Place
from fisherfast.fisher.blocks.rank import Rounding
from fisherfast.fisher.protocol import layer_of
from fisherfast.rules import ALL, Entries

Parameters = Mapping[str, Tensor]
_PART = re.compile(r"(.+)\[(\d+)(?::(\d+))?\]")  # as ``Entries.named`` writes it


def parameters_of(model: nn.Module | Mapping[str, Tensor]) -> Parameters:
    """Those that ask for a gradient, of a module. Errors: TypeError, ValueError."""
    if isinstance(model, nn.Module):
        return measurable(model)
    if not isinstance(model, Mapping):
        raise TypeError(f"from_factors: model must be a module or {{name: tensor}}, got {type(model).__name__}")
    return {name: _floating(f"model[{name!r}]", tensor) for name, tensor in model.items()}


def blocks_and_diagonals(
    parameters: Parameters,
    num_samples: int,
    factors: Mapping[str, Any],
    diagonals: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    rows: Mapping[str, float],
    sharing: str,
    transposed: Collection[str],
) -> tuple[list[KroneckerBlock | ExactBlock], dict[str, Accumulator]]:
    """What ``KFACFisher.from_factors`` is given, as sums. Errors: TypeError, ValueError."""
    _checks.one_of("from_factors", "sharing", sharing, ("expand", "reduce"))
    free = {name: tensor for name, tensor in parameters.items() if name not in diagonals and name not in exact}
    known = {
        "diagonals": (diagonals, parameters),
        "exact": (exact, parameters),
        "rows": (rows, factors),
        "transposed": (transposed, free),
    }
    for argument, (names, allowed) in known.items():
        if unknown := set(names) - set(allowed):
            raise ValueError(f"from_factors: {argument} must name some of {listed(allowed)}, got {listed(unknown)}")
    blocks: list[KroneckerBlock | ExactBlock] = []
    for key, pair in factors.items():
        counts = _checks.positive("from_factors", f"rows[{key!r}]", rows.get(key, num_samples)), num_samples
        blocks.append(_kronecker(key, pair, free, counts, sharing, transposed))
    blocks += [_exact(name, moments, parameters[name], num_samples) for name, moments in exact.items()]
    if missing := set(parameters) - {name for block in blocks for name in block.place.names} - set(diagonals):
        raise ValueError(
            f"from_factors: every parameter must be in factors, exact or diagonals, got none for {listed(missing)}; pass the means of "
            "their squared gradients in diagonals, or as model {name: tensor} without them"
        )
    for name, mean in diagonals.items():
        arguments.check_mean(name, mean, "from_factors")
    _checks.shaped("from_factors", "diagonals", diagonals, {name: parameters[name].shape for name in diagonals}, "model")
    return blocks, {name: Accumulator(mean.detach().double() * num_samples, num_samples) for name, mean in diagonals.items()}


def _kronecker(
    key: str, pair: Any, free: Parameters, counts: tuple[float, float], sharing: str, transposed: Container[str]
) -> KroneckerBlock:
    """Of factors under the name that ``KFACFisher.factors`` gives them. Errors: TypeError, ValueError.

    ``free``: the parameters for which nothing else is given. ``counts``: of how much A and B are means.
    """
    what = f"factors[{key!r}]"
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
        raise TypeError(f"from_factors: {what} must be a pair (A, B), got {type(pair).__name__}")
    A, B = (_floating(f"{what}, {side},", factor) for side, factor in zip("AB", pair, strict=True))
    if A.dim() < 3:  # there is one group
        A, B = A.unsqueeze(0), B.unsqueeze(0)
    place = replace(_place(key, A, B, free, transposed), sharing=sharing)
    rounding = _rounding(free[place.weight], A, B)
    A, B = (_mean(f"{what}, {side},", factor, rounding.products) for side, factor in (("A", A), ("B", B)))
    seen, samples = counts
    return KroneckerBlock(place, Accumulator(A * seen, seen), Accumulator(B * samples, samples), rounding)


def _exact(name: str, moments: Any, parameter: Tensor, num_samples: int) -> ExactBlock:
    """Of all second moments of the gradient of one parameter. Errors: TypeError, ValueError."""
    what, D = f"exact[{name!r}]", parameter.numel()
    moments = _floating(what, moments)
    if moments.shape != (D, D):
        raise ValueError(f"from_factors: {what} must be [{D}, {D}] of its {D} numbers, got {list(moments.shape)}")
    rounding = _rounding(parameter, moments)
    mean = _mean(what, moments.unsqueeze(0), rounding.products)[0]
    return ExactBlock(Flat(name), Accumulator(mean * num_samples, num_samples), rounding)


def _floating(what: str, tensor: Any) -> Tensor:
    if not (isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.layout == torch.strided):
        got = getattr(tensor, "dtype", type(tensor).__name__)
        raise TypeError(f"from_factors: {what} must be a dense floating tensor, got {got}")
    return tensor.detach()


def _rounding(parameter: Tensor, *moments: Tensor) -> Rounding:
    """What was multiplied in float32 may be handed over in float64."""
    products = max(Rounding.of(parameter.dtype).products, *(torch.finfo(one.dtype).eps for one in moments))
    return Rounding(products).seeing(parameter.dtype)


def _place(key: str, A: Tensor, B: Tensor, free: Parameters, transposed: Container[str]) -> Place:
    """The weight that has so many rows and columns, as it is stored, and the bias if A has a column for it."""
    weight, part = _weight(key, free)
    tensor, groups = part.of(free[weight]), len(A)
    if _square(A) and _square(B) and len(B) == groups and tensor.dim() and len(tensor) % groups == 0:
        likely = weight in transposed or A.dim() == 2  # a table, whose rows are the inputs
        by_heads = ((0, 1), (0, 2)) if tensor.dim() == 3 and groups == 1 else ()
        for rows, stored in product((((0,),), by_heads), (likely, not likely)):
            places = [Place(weight, None, groups, stored, weight_part=part, row_axes=axes) for axes in rows]
            fitting = [found for place in places if (found := _fitted(place, key, (B.shape[1], A.shape[1]), free))]
            if len(fitting) == 1:
                return fitting[0]
    raise ValueError(
        f"from_factors: factors[{key!r}] must be A [I, I], or [I + 1, I + 1] with a bias, and B [O, O] of {part.named(weight)!r} "
        f"{list(tensor.shape)}, got {list(A.shape)} and {list(B.shape)}, groups first"
    )


def _fitted(place: Place, key: str, sizes: tuple[int, int], free: Parameters) -> Place | None:
    """The place if its matrix ``[O, D]`` is of these sizes, with a bias if it is so with its column."""
    O, D = place.matrix(free).shape[1:]
    if sizes == (O, D + 1):
        return replace(
            place, bias=_bias(key, place.weight, place.weight_part, place.groups * O, free), bias_part=place.weight_part
        )
    return place if sizes == (O, D) else None


def _square(factor: Tensor) -> bool:
    """Matrices or diagonals ``[G, D]``, of one group or several."""
    return factor.dim() == 2 or (factor.dim() == 3 and factor.shape[1] == factor.shape[2])


def _weight(key: str, free: Parameters) -> tuple[str, Entries]:
    """The parameter, or part of one, of this name; or what may be a weight in the layer of this name."""
    if key in free:
        return key, ALL
    if (found := _PART.fullmatch(key)) and found[1] in free and free[found[1]].dim():
        part = Entries(int(number) for number in found.groups()[1:] if number)
        if part.span(0)[1] <= len(free[found[1]]):
            return found[1], part
    weights = [name for name, tensor in free.items() if layer_of(name) == key and tensor.dim() > 1]
    if (usual := f"{key}.weight" if key else "weight") in weights:
        return usual, ALL
    if len(weights) != 1:
        got = f"several weights: {listed(weights)}; name one of them" if weights else "no weight for which nothing else is given"
        raise ValueError(f"from_factors: factors must be of layers, weights or parts of them ('w[0:7]'), got {key!r} with {got}")
    return weights[0], ALL


def _bias(key: str, weight: str, part: Entries, outputs: int, free: Parameters) -> str:
    """The parameter of the same layer that has a number for each output, in the same entries."""
    beside = [name for name, p in free.items() if name != weight and layer_of(name) == layer_of(weight) and p.dim()]
    if part:
        beside = [name for name in beside if len(free[name]) == len(free[weight])]
    biases = [name for name in beside if part.of(free[name]).numel() == outputs]
    usual = "bias".join(weight.rsplit("weight", 1))  # of several, as those of recurrent layers
    if usual not in biases and len(biases) != 1:
        got = listed(biases) if biases else "none for which nothing else is given"
        raise ValueError(
            f"from_factors: factors[{key!r}] must have a last column of A for each bias of {outputs} numbers beside {weight!r}, got {got}"
        )
    return usual if usual in biases else biases[0]


def _mean(what: str, moments: Tensor, eps: float) -> Tensor:
    """Matrices ``[G, D, D]`` or diagonals ``[G, D]`` in float64, symmetric to the last bit; rounding may have taken half of their digits."""
    mean, half = moments.double(), eps**0.5
    if bad := int((~mean.isfinite()).sum()):
        raise ValueError(f"from_factors: {what} must be finite, got {bad} entries that are not")
    if mean.dim() == 2:
        least = float(mean.min())
    else:
        rounding = (half * mean.abs().amax((1, 2), keepdim=True)).clamp_min(torch.finfo(torch.float64).tiny)
        skew = (mean - mean.mT).abs()
        if bool((skew > rounding).any()):
            raise ValueError(f"from_factors: {what} must be symmetric, got entries that differ by {float(skew.max()):.3g}")
        mean = (mean + mean.mT) / 2
        regular = mean + rounding * torch.eye(mean.shape[1], dtype=mean.dtype, device=mean.device)
        indefinite = bool(torch.linalg.cholesky_ex(regular).info.any())
        least = float(torch.linalg.eigvalsh(mean).min()) if indefinite else 0.0
    if least < 0:
        raise ValueError(
            f"from_factors: {what} must have no negative eigenvalue, got {least:.3g}; a mean of outer products has none"
        )
    return mean
