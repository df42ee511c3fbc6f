# SPDX-License-Identifier: Apache-2.0
"""Blocks of the Fisher: Kronecker products, their eigenbases, exact matrices; the sums they are made of, and the Fisher of several."""
