# SPDX-License-Identifier: Apache-2.0
"""Whether two informations are of one architecture and measured alike."""

from __future__ import annotations

from typing import Any

from fisherfast._names import listed
from fisherfast.information.result import Information


def differences(first: Information, second: Information) -> list[str]:
    """What the nats of two mean nothing without, and is not the same."""
    of_first, of_second = _must_agree(first), _must_agree(second)
    settings = [
        f"{what} {_shown(value)} and {_shown(of_second[what])}" for what, value in of_first.items() if value != of_second[what]
    ]
    layers = _layers_differ(first, second)
    return settings if layers is None else [*settings, layers]


def _must_agree(info: Information) -> dict[str, Any]:
    """What the nats mean nothing without."""
    F = info.fisher
    return {
        "beta": info.beta,
        "variant": info.variant,
        "fisher_type": F.provenance.fisher_type,
        "likelihood": F.provenance.likelihood,
        "structure": F.structure,
    }


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def _layers_differ(first: Information, second: Information) -> str | None:
    """The first few layers and parameters that one of the two lacks or has in another shape."""
    shapes, other_shapes = first.fisher.shapes, second.fisher.shapes
    for what, in_first, in_second in (
        ("layers", set(first.layers), set(second.layers)),
        ("parameters", set(shapes), set(other_shapes)),
    ):
        if in_first != in_second:
            only_first, only_second = listed(in_first - in_second), listed(in_second - in_first)
            return f"{what} {only_first} only in the first and {only_second} only in the second"
    different = [
        f"{name} {tuple(shape)} and {tuple(other_shapes[name])}" for name, shape in shapes.items() if shape != other_shapes[name]
    ]
    return f"shapes of {listed(different)}" if different else None
