# SPDX-License-Identifier: Apache-2.0
"""Whether two informations are of one architecture and measured alike."""

from __future__ import annotations

from typing import Any

from fisherfast._names import listed
from fisherfast.information.result import Information


def differences(first: Information, second: Information) -> list[str]:
    """What the nats of two mean nothing without, and is not the same."""
    ours, theirs = _must_agree(first), _must_agree(second)
    found = [f"{what} {_shown(ours[what])} and {_shown(theirs[what])}" for what in ours if ours[what] != theirs[what]]
    problem = _layers_differ(first, second)
    return found if problem is None else [*found, problem]


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
    for what, ours, theirs in (
        ("layers", first.layers, second.layers),
        ("parameters", first.fisher.shapes, second.fisher.shapes),
    ):
        lacking = [set(one) - set(other) for one, other in ((ours, theirs), (theirs, ours))]
        if any(lacking):
            return f"{what} {listed(lacking[0])} only in the first and {listed(lacking[1])} only in the second"
    shapes, others = first.fisher.shapes, second.fisher.shapes
    different = [f"{name} {tuple(shapes[name])} and {tuple(others[name])}" for name in shapes if shapes[name] != others[name]]
    return f"shapes of {listed(different)}" if different else None
