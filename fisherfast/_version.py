# SPDX-License-Identifier: Apache-2.0
"""The version, of which files are told also where the package is imported from its sources and not installed."""

__version__ = "0.1.0"
