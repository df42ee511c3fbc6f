# SPDX-License-Identifier: Apache-2.0
"""``NonFiniteError``, and which errors fisherfast raised itself."""

import linecache


class NonFiniteError(ArithmeticError):
    """A NaN or an infinity where a finite number was needed; ``.fisher`` holds the result of the batches before."""


def raised_here(error: BaseException) -> bool:
    """Whether fisherfast itself raised the error, rather than the user's code or a library under it.

    What torch raises inside the model passes through the capture's frames: there nothing is raised by name.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not trace.tb_frame.f_globals.get("__name__", "").startswith("fisherfast."):
        return False
    return linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno).lstrip().startswith("raise ")
