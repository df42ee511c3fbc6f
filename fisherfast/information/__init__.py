# SPDX-License-Identifier: Apache-2.0
"""The estimators: what a Fisher says about the information a network holds. Each needs only the Fisher protocol."""

from fisherfast.information.pac_bayes import Bound, pac_bayes_bound
from fisherfast.information.result import WHOLE, Information, LayerInformation
from fisherfast.information.weights import information_in_weights

__all__ = ["WHOLE", "Bound", "Information", "LayerInformation", "information_in_weights", "pac_bayes_bound"]
