# SPDX-License-Identifier: Apache-2.0
"""Capture: which parameter is used where in a forward pass, whose each row of its gradient is, and the backward passes that hear them."""
