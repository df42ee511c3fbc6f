# SPDX-License-Identifier: Apache-2.0
"""Rules: how a parameter's use by a function gives x and g.

The one idea: whatever module wrote the call, a parameter enters a network in one of a few *forms* (``forms``). A rule says,
for one torch function, which of its arguments are parameters and in which form (``functions``); everything after that is
blind to the layer. A function that is made of such functions is taken apart instead (``decompositions``, ``contractions``).
"""

from fisherfast.rules import contractions, decompositions, functions
from fisherfast.rules.convolution import Convolution
from fisherfast.rules.decompositions import DECOMPOSITIONS
from fisherfast.rules.forms import Elementwise, Form, Lookup, MatMul, Part, part
from fisherfast.rules.joining import Tied, combines, joined
from fisherfast.rules.rows import Images, Rows
from fisherfast.rules.table import RULES, Use, rule
from fisherfast.rules.windows import ALL, Entries, Window

__all__ = [
    "ALL",
    "DECOMPOSITIONS",
    "RULES",
    "Convolution",
    "Elementwise",
    "Entries",
    "Form",
    "Images",
    "Lookup",
    "MatMul",
    "Part",
    "Rows",
    "Tied",
    "Use",
    "Window",
    "combines",
    "contractions",
    "decompositions",
    "functions",
    "joined",
    "part",
    "rule",
]
