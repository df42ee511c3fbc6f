# SPDX-License-Identifier: Apache-2.0
"""A table in Markdown, as all generated pages have them."""

from __future__ import annotations

from collections.abc import Iterable

NONE = "-"  # of a cell without a value


def table(head: list[str], rows: Iterable[list[str]], left: int = 1) -> str:
    """The first ``left`` columns are words, the others numbers."""
    rules = [":--"] * left + ["--:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rules, *rows)) + "\n"
