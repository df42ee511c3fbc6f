# SPDX-License-Identifier: Apache-2.0
"""Every number of the report, for another program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fisherfast._version import __version__
from fisherfast.fisher import Fisher
from fisherfast.information import Information
from fisherfast.timing import TimeRatio


def as_dict(F: Fisher, info: Information, ratio: TimeRatio | None = None) -> dict[str, Any]:
    """Every number of the report as JSON can hold it; infinity, a limit a fitted prior scale can take, becomes ``"inf"``."""
    layers = {
        name: {**asdict(layer), "bits": layer.bits, "bits_per_parameter": layer.bits_per_parameter}
        for name, layer in info.by_layer().items()
    }
    fields = (
        "nats",
        "bits",
        "kl",
        "lagrangian_rise",
        "num_parameters",
        "beta",
        "prior_scale",
        "centered",
        "variant",
        "loss",
        "excluded",
    )
    return _plain(
        {
            "fisherfast": __version__,
            "fisher": {
                "structure": F.structure,
                **asdict(F.provenance),
                "num_samples": F.num_samples,
                "num_positions": F.num_positions,
                "trace": info.trace,
                "coverage": F.coverage,
            },
            "information": {field: getattr(info, field) for field in fields},
            "layers": layers,
            "time": None if ratio is None else {"ratio": ratio.ratio, **asdict(ratio)},
        }
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
