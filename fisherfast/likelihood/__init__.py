# SPDX-License-Identifier: Apache-2.0
"""Likelihoods: what ``p_w(y | x)`` is, given the network's output.

The one idea: every kind of Fisher is a set of gradients *at the output*. For a likelihood with natural parameters z, the
score of a label y at z is known in closed form, so no loss is built: labels of the data, labels drawn from the model and
the columns of a square root of the output Hessian all become cotangents of z, and backward passes do the rest.
"""

from fisherfast.likelihood.batch import predictions_of
from fisherfast.likelihood.bernoulli import Bernoulli
from fisherfast.likelihood.categorical import Categorical, CausalLM
from fisherfast.likelihood.doubts import check_model
from fisherfast.likelihood.gaussian import Gaussian
from fisherfast.likelihood.names import LIKELIHOODS, beside, counting, resolve, stored_name
from fisherfast.likelihood.own import Draws, LogLikelihood
from fisherfast.likelihood.protocol import FISHER_TYPES, Likelihood, Predictions

__all__ = [
    "FISHER_TYPES",
    "LIKELIHOODS",
    "Bernoulli",
    "Categorical",
    "CausalLM",
    "Draws",
    "Gaussian",
    "Likelihood",
    "LogLikelihood",
    "Predictions",
    "beside",
    "check_model",
    "counting",
    "predictions_of",
    "resolve",
    "stored_name",
]
