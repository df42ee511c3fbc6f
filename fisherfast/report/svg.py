# SPDX-License-Identifier: Apache-2.0
"""A matplotlib figure as SVG inside a page: its colours and letters are the page's, and it has a text alternative."""

from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

from fisherfast.fisher.plots import chart

# What figures are drawn with; letters stay letters, which the page's own font is used for.
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "fisherfast", "font.size": 9.5}
# The page chooses the colours, light or dark.
_COLORS = {
    "#000000": "currentColor",
    chart.BLUE.lower(): "var(--blue)",
    chart.VERMILLION.lower(): "var(--vermillion)",
    chart.GRID.lower(): "var(--line)",
}
_COLOR = re.compile("|".join(_COLORS))
_LEFT_OUT = ("metadata", "style")  # an address of a vocabulary; rules that would hold in the whole page


def inline(figure: Any, name: str, alternative: str) -> Markup:
    """The figure as an ``<svg>`` element for HTML; ``name`` keeps its ids apart from those of other figures."""
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True)
    root = ElementTree.fromstring(written.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in _LEFT_OUT:
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): _within_page(_local(key), value, name) for key, value in element.attrib.items()}
    # Its size is the page's business, its shape the view box's.
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": alternative}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    """A name without its XML namespace, which HTML does without."""
    return name.rpartition("}")[2]


def _within_page(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "style":
        value = _COLOR.sub(lambda found: _COLORS[found[0]], value)
    return value.replace("url(#", f"url(#{name}-") if key != "href" else value.replace("#", f"#{name}-", 1)
