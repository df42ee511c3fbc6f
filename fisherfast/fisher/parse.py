# SPDX-License-Identifier: Apache-2.0
"""What a caller asks for: structures by name or by request, and which of them read the data twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeGuard

from fisherfast.fisher.diagonal import Diagonal
from fisherfast.fisher.ekfac import EKFAC, Factors
from fisherfast.fisher.gram import Gram
from fisherfast.fisher.kfac import KFAC, KFACFisher
from fisherfast.fisher.request import Request

Requests = str | Request[Any] | tuple[str | Request[Any], ...]  # names or requests; a tuple gives a tuple of results
STRUCTURES: dict[str, type[Request]] = {"diagonal": Diagonal, "kfac": KFAC, "ekfac": EKFAC, "gram": Gram}


def parse(caller: str, structure: Requests) -> tuple[Request, ...]:
    """What is asked for. Errors: ValueError."""
    several = structure if isinstance(structure, tuple) else (structure,)
    asked = [STRUCTURES[one]() if isinstance(one, str) and one in STRUCTURES else one for one in several]
    known = tuple(one for one in asked if isinstance(one, Request))
    if not known or len(known) < len(asked):
        raise ValueError(
            f"{caller}: structure must be one of {sorted(STRUCTURES)}, a request such as ff.KFAC(), or a tuple of these, got {structure!r}"
        )
    return known


def needs_basis(asked: Request) -> TypeGuard[EKFAC]:
    """Whether it is an EKFAC without a basis, which a first pass over the data has to find."""
    return isinstance(asked, EKFAC) and asked.basis is None


def factors_first(asked: Request) -> Request:
    """What the first pass over the data is asked for: the factors behind the basis of an EKFAC; any other request unchanged."""
    return Factors(asked.max_factor_dim, asked.max_exact_dim) if needs_basis(asked) else asked


def with_basis(asked: Request, basis: KFACFisher) -> Request:
    """The request of the second pass."""
    return replace(asked, basis=basis) if needs_basis(asked) else asked
