# SPDX-License-Identifier: Apache-2.0
"""Adapters to other libraries. Nothing in fisherfast imports this package."""
