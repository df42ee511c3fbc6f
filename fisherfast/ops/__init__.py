# SPDX-License-Identifier: Apache-2.0
"""The ops: for each, in one block, its schema, its check, its plain-torch reference and its documentation.

All ops accumulate in place into ``acc`` and return nothing. ``torch.ops.fisherfast.<name>`` and ``fisherfast.ops.<name>``
are the same call. A new op is a new file here (and one of the same name in ``kernels/``, ``csrc/cpu/``, ``csrc/cuda/``):
the files of this folder are found by listing it.
"""

import importlib
import pkgutil

from fisherfast._backend import OPS

for _file in pkgutil.iter_modules(__path__):
    if not _file.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_file.name}")

# Last, since importing a file puts it here under its own name, which some ops have too.
__all__ = list(OPS)
globals().update({_op.name: getattr(importlib.import_module(_op.reference.__module__), _op.name) for _op in OPS.values()})
