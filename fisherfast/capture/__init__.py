# SPDX-License-Identifier: Apache-2.0
"""Capture: parameter uses in a forward pass, the sample owning each row of their gradients, and the backward passes that read them."""
