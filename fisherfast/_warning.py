# SPDX-License-Identifier: Apache-2.0
"""The library's own warning, below every floor that has something to say."""


class FisherWarning(UserWarning):
    """A number is right but not what it may be taken for; the message says what it leaves out."""
