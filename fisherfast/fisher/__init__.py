# SPDX-License-Identifier: Apache-2.0
"""Fisher objects: one file per structure, one protocol that all of them follow."""

from fisherfast.fisher.coverage import Coverage
from fisherfast.fisher.diagonal import DiagonalFisher
from fisherfast.fisher.ekfac import EKFACFisher
from fisherfast.fisher.gram import GramFisher
from fisherfast.fisher.kfac import KFACFisher
from fisherfast.fisher.moments import SampleMoments
from fisherfast.fisher.norms import SampleNorms
from fisherfast.fisher.protocol import Fisher, FisherWarning, LayerSummary, Provenance, Spectrum
from fisherfast.fisher.serialize import FisherFileError, load, load_with_extra

__all__ = [
    "Coverage",
    "DiagonalFisher",
    "EKFACFisher",
    "Fisher",
    "FisherFileError",
    "FisherWarning",
    "GramFisher",
    "KFACFisher",
    "LayerSummary",
    "Provenance",
    "SampleMoments",
    "SampleNorms",
    "Spectrum",
    "load",
    "load_with_extra",
]
