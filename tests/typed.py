# SPDX-License-Identifier: Apache-2.0
"""What a type checker knows of results: read by mypy, never run."""

from collections.abc import Iterable
from typing import Any, assert_type

from torch import nn

import fisherfast as ff


def results(model: nn.Module, data: Iterable[Any]) -> None:
    """A structure's name, or a request, says what comes back."""
    assert_type(ff.fisher(model, data), ff.DiagonalFisher)
    assert_type(ff.fisher(model, data, "kfac", "exact"), ff.KFACFisher)
    assert_type(ff.fisher(model, data, structure="ekfac", draws=2), ff.EKFACFisher)
    assert_type(ff.fisher(model, data, "gram", fisher_type="exact", progress=False), ff.GramFisher)
    assert_type(ff.fisher(model, data, ff.KFAC(sharing="reduce")), ff.KFACFisher)
    assert_type(ff.fisher(model, data, ff.PerSampleNorm()), ff.SampleNorms)
    assert_type(ff.fisher(model, data, ff.GradientMoments()), ff.SampleMoments)
    ff.fisher(model, data, drawz=2)  # type: ignore[call-overload]
