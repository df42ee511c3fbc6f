# SPDX-License-Identifier: Apache-2.0
"""What a data set yields, made batches of tensors that have been checked, and cut."""
