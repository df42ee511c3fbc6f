# SPDX-License-Identifier: Apache-2.0
"""``python -m fisherfast``."""

from fisherfast.cli import app

app()
