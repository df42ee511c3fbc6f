# SPDX-License-Identifier: Apache-2.0
"""The estimators: what a Fisher says about the information a network holds. Each needs only the Fisher protocol."""

from fisherfast.information.compare import Comparison, LayerDifference, compare
from fisherfast.information.result import WHOLE, Information, LayerInformation
from fisherfast.information.weights import information_in_weights

__all__ = ["WHOLE", "Comparison", "Information", "LayerDifference", "LayerInformation", "compare", "information_in_weights"]
