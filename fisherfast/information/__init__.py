# SPDX-License-Identifier: Apache-2.0
"""The estimators: what a Fisher says about the information a network holds. Each needs only the Fisher protocol."""

from fisherfast.information._network import Weights
from fisherfast.information._prior import checked_scale as checked_prior_scale
from fisherfast.information.activation_noise import ActivationNoise, activation_noise
from fisherfast.information.compare import Comparison, LayerDifference, compare
from fisherfast.information.complexity import Complexity, measured_complexity, task_complexity
from fisherfast.information.effective_dimension import EffectiveDimension, effective_dimension
from fisherfast.information.effective_information import EffectiveInformation, effective_information
from fisherfast.information.embedding_distance import embedding_distance
from fisherfast.information.expected_loss import expected_loss, mean_loss, zero_one
from fisherfast.information.free_energy import EscapeTime, FreeEnergy, escape_time, free_energy
from fisherfast.information.input_fisher import InputFisher, input_fisher
from fisherfast.information.nuisances import image_tangents
from fisherfast.information.pac_bayes import Bound, pac_bayes_bound
from fisherfast.information.path_stability import PathStability, path_stability
from fisherfast.information.posterior import GaussianPosterior, Posterior, optimal_posterior
from fisherfast.information.rate_distortion import RateDistortion, rate_distortion
from fisherfast.information.result import WHOLE, Information, LayerInformation
from fisherfast.information.shannon import ShannonInformation, shannon_information
from fisherfast.information.shannon_stability import StabilityInformation, shannon_from_stability
from fisherfast.information.task2vec import TaskEmbedding, task_embedding
from fisherfast.information.task_distance import TaskDistances, task_distance, task_distances
from fisherfast.information.variational import VariationalPosterior, variational_posterior
from fisherfast.information.weights import information_in_weights

__all__ = [
    "WHOLE",
    "ActivationNoise",
    "Bound",
    "Comparison",
    "Complexity",
    "EffectiveDimension",
    "EffectiveInformation",
    "EscapeTime",
    "FreeEnergy",
    "GaussianPosterior",
    "Information",
    "InputFisher",
    "LayerDifference",
    "LayerInformation",
    "PathStability",
    "Posterior",
    "RateDistortion",
    "ShannonInformation",
    "StabilityInformation",
    "TaskDistances",
    "TaskEmbedding",
    "VariationalPosterior",
    "Weights",
    "activation_noise",
    "checked_prior_scale",
    "compare",
    "effective_dimension",
    "effective_information",
    "embedding_distance",
    "escape_time",
    "expected_loss",
    "free_energy",
    "image_tangents",
    "information_in_weights",
    "input_fisher",
    "mean_loss",
    "measured_complexity",
    "optimal_posterior",
    "pac_bayes_bound",
    "path_stability",
    "rate_distortion",
    "shannon_from_stability",
    "shannon_information",
    "task_complexity",
    "task_distance",
    "task_distances",
    "task_embedding",
    "variational_posterior",
    "zero_one",
]
