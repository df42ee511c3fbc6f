# SPDX-License-Identifier: Apache-2.0
"""The ops: for each, in one block, its schema, its check, its plain-torch reference and its documentation.

All ops accumulate in place into ``acc`` and return nothing. ``torch.ops.fisherfast.<name>`` and ``fisherfast.ops.<name>``
are the same call. A new op is a new file here (and one of the same name in ``kernels/``, ``csrc/cpu/``, ``csrc/cuda/``):
the files of this folder are found by listing it.
"""

import importlib
import pkgutil

__all__: list[str] = []
for _file in pkgutil.iter_modules(__path__):
    if not _file.name.startswith("_"):
        _name = f"{_file.name}_"
        globals()[_name] = getattr(importlib.import_module(f"{__name__}.{_file.name}"), _name)
        __all__.append(_name)
