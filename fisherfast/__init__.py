# SPDX-License-Identifier: Apache-2.0
"""fisherfast: the Fisher information of large networks at the cost of a training step, and the information in their weights."""

from fisherfast import ops, rules
from fisherfast._backend import BackendError, backend
from fisherfast.fisher import (
    Coverage,
    DiagonalFisher,
    EKFACFisher,
    FisherFileError,
    FisherWarning,
    GramFisher,
    KFACFisher,
    Provenance,
    SampleMoments,
    SampleNorms,
    load,
)
from fisherfast.fisher.collect import collect
from fisherfast.fisher.collectors import Diagonal, GradientMoments, PerSampleNorm
from fisherfast.fisher.ekfac import EKFAC
from fisherfast.fisher.gram import Gram
from fisherfast.fisher.kfac import KFAC
from fisherfast.fisher.lanczos import Estimate, SpectralDensity, spectral_density
from fisherfast.fisher.measure import fisher
from fisherfast.fisher.operator import FisherOperator
from fisherfast.fisher.plan import Plan, plan
from fisherfast.fisher.run import Interrupted
from fisherfast.information import Comparison, compare, information_in_weights
from fisherfast.likelihood import Bernoulli, Categorical, CausalLM, Gaussian, LogLikelihood
from fisherfast.passes import NonFiniteError
from fisherfast.rules import rule

__all__ = [
    "EKFAC",
    "KFAC",
    "BackendError",
    "Bernoulli",
    "Categorical",
    "CausalLM",
    "Comparison",
    "Coverage",
    "Diagonal",
    "DiagonalFisher",
    "EKFACFisher",
    "Estimate",
    "FisherFileError",
    "FisherOperator",
    "FisherWarning",
    "Gaussian",
    "GradientMoments",
    "Gram",
    "GramFisher",
    "Interrupted",
    "KFACFisher",
    "LogLikelihood",
    "NonFiniteError",
    "PerSampleNorm",
    "Plan",
    "Provenance",
    "SampleMoments",
    "SampleNorms",
    "SpectralDensity",
    "backend",
    "collect",
    "compare",
    "fisher",
    "information_in_weights",
    "load",
    "ops",
    "plan",
    "rule",
    "rules",
    "spectral_density",
]
