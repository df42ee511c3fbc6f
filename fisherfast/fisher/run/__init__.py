# SPDX-License-Identifier: Apache-2.0
"""A run through the data: what is asked of the model batch by batch, what is found out on the way, and what guards the sums."""
