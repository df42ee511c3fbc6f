# SPDX-License-Identifier: Apache-2.0
"""The estimators: what a Fisher says about the information a network holds. Each needs only the Fisher protocol."""

from fisherfast.information.activation_noise import ActivationNoise, activation_noise
from fisherfast.information.effective_information import EffectiveInformation, effective_information
from fisherfast.information.input_fisher import InputFisher, input_fisher
from fisherfast.information.nuisances import image_tangents
from fisherfast.information.result import WHOLE, Information, LayerInformation
from fisherfast.information.weights import information_in_weights

__all__ = [
    "WHOLE",
    "ActivationNoise",
    "EffectiveInformation",
    "Information",
    "InputFisher",
    "LayerInformation",
    "activation_noise",
    "effective_information",
    "image_tangents",
    "information_in_weights",
    "input_fisher",
]
