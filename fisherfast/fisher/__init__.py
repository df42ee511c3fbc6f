# SPDX-License-Identifier: Apache-2.0
"""Fisher objects: one file per structure, one protocol that all of them follow."""

from fisherfast.fisher.diagonal import DiagonalFisher
from fisherfast.fisher.protocol import Fisher, FisherWarning, LayerSummary, Provenance, Spectrum
from fisherfast.fisher.serialize import FisherFileError, load, load_with_extra

__all__ = [
    "DiagonalFisher",
    "Fisher",
    "FisherFileError",
    "FisherWarning",
    "LayerSummary",
    "Provenance",
    "Spectrum",
    "load",
    "load_with_extra",
]
