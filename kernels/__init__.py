# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one file per op; imported as ``fisherfast.kernels``. This file must stay free of side effects."""
