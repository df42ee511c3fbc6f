# SPDX-License-Identifier: Apache-2.0
"""The error that this library adds to Python's."""


class NonFiniteError(ArithmeticError):
    """A NaN or an infinity where a finite number was needed; ``.fisher`` holds the result of the batches before."""
