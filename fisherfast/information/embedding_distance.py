# SPDX-License-Identifier: Apache-2.0
"""Distances between task embeddings. An embedding h stands for the Gaussian of precision ``p = h + damping`` in every filter."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fisherfast import _checks
from fisherfast._names import listed
from fisherfast.fisher import arguments
from fisherfast.fisher.protocol import Damping
from fisherfast.information.task2vec import TaskEmbedding

_CALLER = "embedding_distance"


def embedding_distance(
    first: TaskEmbedding, second: TaskEmbedding, *, kind: str = "cosine", damping: Damping = 0.0, alpha: float = 0.0
) -> float:
    """How unlike two tasks are: 0 for identical tasks; with ``alpha`` above 0, how far it is *from* the first *to* the second.

    With p and q the two precisions, ``h + damping``:

    ``"cosine"``             ``1 - cos(p / (p + q), q / (p + q))``: every filter counts alike, whatever its scale.
    ``"kl"``                 ``1/2 sum (p - q)^2 / (p q)``: both divergences of the Gaussians added.
    ``"jensen-shannon"``     ``1/4 sum log(1 + (p - q)^2 / (4 p q))``: half of both divergences from the Gaussian of mean variance.
    ``"normalized_cosine"``  ``1 - cos(damping / p, damping / q)``: of the variances, in units of the prior's.

    ``damping``  beta / lambda^2, the precision that the prior gives to a filter that the task does not need: a number, or
                 {layer or parameter name: number}. The trivial task has h = 0.
    ``alpha``    subtracts ``alpha d(first, trivial)``: a task that says more about the filters is the nearer source. To be
                 tuned; needs damping above 0.

    Shapes:   both embeddings of the same filters.
    Scale:    no unit; "cosine" and "normalized_cosine" lie in [0, 1]. Multiplying both embeddings and the damping by one number
              changes nothing.
    Errors:   ValueError for embeddings of different filters, an unknown kind, a negative damping or alpha, and for precisions
              below 0, or of 0 where the kind is not "cosine"; for a damping of 0 with alpha or "normalized_cosine"; for a distance
              that does not fit float64, as "kl" beyond ratios of 1e308.
    Numerics: float64; nothing cancels in "kl" and "jensen-shannon". A filter of no precision in both adds nothing to "cosine".
    Source:   Achille et al. 2019, Task2Vec (arXiv:1902.03545); their code adds 1e-8 to the sum in "cosine", which this does not.
    """
    _checks.one_of(_CALLER, "kind", kind, tuple(_KINDS))
    if not (isinstance(first, TaskEmbedding) and isinstance(second, TaskEmbedding)):
        got = f"{type(first).__name__} and {type(second).__name__}"
        raise TypeError(f"{_CALLER}: both must be results of task_embedding, got {got}")
    alpha = _checks.non_negative(_CALLER, "alpha", alpha, "0 is the symmetric distance")
    shapes, others = ({name: len(h) for name, h in e.filters.items()} for e in (first, second))
    if shapes != others:
        differing = [n for n in {*shapes, *others} if shapes.get(n) != others.get(n)]
        raise ValueError(
            f"{_CALLER}: both must be of the same filters, differ in {listed(differing)}; skip the layers that differ"
        )
    dampings = arguments.damping_by_name(_CALLER, damping, shapes)
    trivial = torch.cat([torch.full((count,), dampings[name], dtype=torch.float64) for name, count in shapes.items()])
    p, q = (e.vector().cpu() + trivial for e in (first, second))
    _check_precisions(kind, p, q)
    if (alpha or kind == "normalized_cosine") and not (trivial > 0).all():
        raise ValueError(
            f"{_CALLER}: damping must be > 0 with alpha and for 'normalized_cosine', got {damping!r}; beta / lambda^2"
        )
    distance = _KINDS[kind](p, q, trivial)
    distance = distance - alpha * _KINDS[kind](p, trivial, trivial) if alpha else distance
    if not math.isfinite(distance):
        raise ValueError(
            f"{_CALLER}: the distance must fit float64, got more of kind {kind!r}: two precisions are too far apart; a larger damping brings "
            "them together, and 'jensen-shannon' takes the logarithm of their ratio"
        )
    return distance


def _check_precisions(kind: str, *precisions: Tensor) -> None:
    """Raise ValueError for what is no Gaussian; "cosine" takes precisions of 0."""
    rule = ">= 0" if kind == "cosine" else "> 0"
    for p in precisions:
        good = p.isfinite() & ((p >= 0) if kind == "cosine" else (p > 0))
        if bad := int((~good).sum()):
            raise ValueError(
                f"{_CALLER}: precisions must be {rule} for {kind!r}, got {bad} of {len(p)} that are not; pass damping = beta / lambda^2"
            )


def _cosine(p: Tensor, q: Tensor, trivial: Tensor) -> float:
    total = (p + q).masked_fill(p + q == 0, 1.0)
    return _one_minus_cosine(p / total, q / total)


def _kl(p: Tensor, q: Tensor, trivial: Tensor) -> float:
    return float(_spread(p, q).sum()) / 2


def _jensen_shannon(p: Tensor, q: Tensor, trivial: Tensor) -> float:
    spread = _spread(p, q)
    far = (p.log() - q.log()).abs() - math.log(4)  # the same to rounding, where the ratio does not fit float64
    return float(torch.where(spread.isfinite(), (spread / 4).log1p(), far).sum()) / 4


def _normalized_cosine(p: Tensor, q: Tensor, trivial: Tensor) -> float:
    return _one_minus_cosine(trivial / p, trivial / q)


def _spread(p: Tensor, q: Tensor) -> Tensor:
    """``(p - q)^2 / (p q) = p / q + q / p - 2``."""
    return (p - q) / p * ((p - q) / q)


def _one_minus_cosine(a: Tensor, b: Tensor) -> float:
    """``1 - cos`` of the angle, as half the squared distance of the two directions; 1 from a vector of zeros."""
    if not (a.any() and b.any()):
        return float(bool(a.any()) != bool(b.any()))
    a, b = (v / v.max() for v in (a, b))  # so that squares neither vanish nor overflow
    return float((a / a.norm() - b / b.norm()).square().sum()) / 2


_KINDS: dict[str, Callable[[Tensor, Tensor, Tensor], float]] = {
    "cosine": _cosine,
    "kl": _kl,
    "jensen-shannon": _jensen_shannon,
    "normalized_cosine": _normalized_cosine,
}
