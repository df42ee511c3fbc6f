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
from fisherfast.information import (
    Bound,
    EffectiveDimension,
    EscapeTime,
    FreeEnergy,
    PathStability,
    ShannonInformation,
    StabilityInformation,
    TaskDistances,
    TaskEmbedding,
    effective_dimension,
    embedding_distance,
    escape_time,
    free_energy,
    information_in_weights,
    pac_bayes_bound,
    path_stability,
    shannon_from_stability,
    shannon_information,
    task_distance,
    task_distances,
    task_embedding,
)
from fisherfast.likelihood import Bernoulli, Categorical, CausalLM, Gaussian, LogLikelihood
from fisherfast.passes import NonFiniteError
from fisherfast.rules import rule

__all__ = [
    "EKFAC",
    "KFAC",
    "BackendError",
    "Bernoulli",
    "Bound",
    "Categorical",
    "CausalLM",
    "Coverage",
    "Diagonal",
    "DiagonalFisher",
    "EKFACFisher",
    "EffectiveDimension",
    "EscapeTime",
    "Estimate",
    "FisherFileError",
    "FisherOperator",
    "FisherWarning",
    "FreeEnergy",
    "Gaussian",
    "GradientMoments",
    "Gram",
    "GramFisher",
    "Interrupted",
    "KFACFisher",
    "LogLikelihood",
    "NonFiniteError",
    "PathStability",
    "PerSampleNorm",
    "Plan",
    "Provenance",
    "SampleMoments",
    "SampleNorms",
    "ShannonInformation",
    "SpectralDensity",
    "StabilityInformation",
    "TaskDistances",
    "TaskEmbedding",
    "backend",
    "collect",
    "effective_dimension",
    "embedding_distance",
    "escape_time",
    "fisher",
    "free_energy",
    "information_in_weights",
    "load",
    "ops",
    "pac_bayes_bound",
    "path_stability",
    "plan",
    "rule",
    "rules",
    "shannon_from_stability",
    "shannon_information",
    "spectral_density",
    "task_distance",
    "task_distances",
    "task_embedding",
]
