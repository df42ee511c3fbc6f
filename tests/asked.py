# SPDX-License-Identifier: Apache-2.0
"""What tests ask a run for together, and a run without its bar."""

import fisherfast as ff

EVERYTHING = (ff.Diagonal(), ff.PerSampleNorm(by_layer=True), ff.PerSampleNorm())
WITH_MOMENTS = (*EVERYTHING, ff.GradientMoments())


def measure(model, batches, structure="diagonal", **options):
    """``ff.fisher``, quietly."""
    return ff.fisher(model, batches, structure, progress=False, **options)
