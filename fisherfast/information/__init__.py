# SPDX-License-Identifier: Apache-2.0
"""The estimators: what a Fisher says about the information a network holds. Each needs only the Fisher protocol."""

from fisherfast.information.complexity import Complexity, measured_complexity, task_complexity
from fisherfast.information.expected_loss import expected_loss, mean_loss, zero_one
from fisherfast.information.posterior import GaussianPosterior, Posterior, optimal_posterior
from fisherfast.information.rate_distortion import RateDistortion, rate_distortion
from fisherfast.information.result import WHOLE, Information, LayerInformation
from fisherfast.information.variational import VariationalPosterior, variational_posterior
from fisherfast.information.weights import information_in_weights

__all__ = [
    "WHOLE",
    "Complexity",
    "GaussianPosterior",
    "Information",
    "LayerInformation",
    "Posterior",
    "RateDistortion",
    "VariationalPosterior",
    "expected_loss",
    "information_in_weights",
    "mean_loss",
    "measured_complexity",
    "optimal_posterior",
    "rate_distortion",
    "task_complexity",
    "variational_posterior",
    "zero_one",
]
