# SPDX-License-Identifier: Apache-2.0
"""What a person reads after a run: a table by layer, and files for people and programs.

``fisher.safetensors`` is the Fisher itself, ``information.png`` its picture, ``report.json`` every number of the table and
``report.html`` the page that shows and explains them.
"""

from __future__ import annotations

import json
from pathlib import Path

from fisherfast.fisher import Fisher
from fisherfast.information import Information, RateDistortion
from fisherfast.report.curve import rate_distortion
from fisherfast.report.numbers import as_dict
from fisherfast.report.page import page
from fisherfast.report.text import MEANING, render, summary
from fisherfast.timing import TimeRatio

__all__ = ["MEANING", "as_dict", "page", "rate_distortion", "render", "save_alone", "summary", "write_report"]

_FILES = ("fisher.safetensors", "information.png", "report.json", "report.html")


def save_alone(out: str | Path, F: Fisher) -> Path:
    """Save the Fisher into the folder ``out``, without the report of another that lies there; returns its path."""
    Path(out).mkdir(parents=True, exist_ok=True)
    fisher, *others = (Path(out) / name for name in _FILES)
    for path in others:
        path.unlink(missing_ok=True)
    F.save(fisher)
    return fisher


def write_report(
    out: str | Path,
    F: Fisher,
    info: Information,
    ratio: TimeRatio | None = None,
    *,
    curve: RateDistortion | None = None,
    command: str | None = None,
) -> list[Path]:
    """Write the picture, the numbers and the page into the folder ``out``, where ``save_alone`` put the Fisher; returns their paths.

    ``curve`` (``rate_distortion(F, model, info)``) and the ``command`` that was run are shown on the page if given.

    Errors:   OSError where the folder cannot be written; ImportError if matplotlib is not installed.
    """
    _, *paths = (Path(out) / name for name in _FILES)
    picture, numbers, html = paths
    info.plot(picture)
    numbers.write_text(json.dumps(as_dict(F, info, ratio), indent=2, allow_nan=False) + "\n")
    html.write_text(page(F, info, ratio, curve=curve, command=command), encoding="utf-8")
    return paths
