# SPDX-License-Identifier: Apache-2.0
"""The distance between tasks: how much more both hold together than the first one alone. It has a direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fisherfast import _checks
from fisherfast._names import listed
from fisherfast.information import _comparable
from fisherfast.information.result import Information


@dataclass(frozen=True, eq=False)
class TaskDistances:
    """``d(i -> j) = I_ij - I_i`` for all pairs of tasks; made by ``task_distances``.

    ``joint`` [n, n] is what each pair holds together, ``alone`` [n] each task by itself, in one unit (nats, or loss).
    """

    joint: Tensor
    alone: Tensor

    @property
    def matrix(self) -> Tensor:
        """``[n, n]``: row i, column j is d(i -> j)."""
        return self.joint - self.alone[:, None]

    @property
    def explained(self) -> float:
        """The share of ``d(i -> j) - d(j -> i)`` that ``I_j - I_i`` explains: 1 where ``joint`` is symmetric, as it is of sets of data.

        ``1 - sum (I_ij - I_ji)^2 / sum (d(i -> j) - d(j -> i))^2``. Less than 1 where the second task was learned after the first.
        """
        asymmetry = self.matrix - self.matrix.T
        total = float(asymmetry.square().sum())
        return 1 - float((self.joint - self.joint.T).square().sum()) / total if total else 1.0


def task_distance(joint: float | Any, alone: float | Any) -> float:
    """``d(i -> j) = I_ij - I_i``: the information that task j needs beyond what is known from task i.

    ``joint`` is the information in weights trained on both, ``alone`` on i only: numbers of one unit, or two ``Information``
    or posteriors, of which ``.kl`` is taken; they must be of one architecture, at one beta and prior (two that are fitted are two), for only then
    are they nats of one code.

    Shapes:   numbers.
    Scale:    that of the arguments.
    Errors:   ValueError for numbers that are not finite, and Informations of different beta, prior, center, layers or kind of Fisher.
    Numerics: a difference of floats.
    Source:   Achille, Mbeng, Paolini and Soatto 2019 (arXiv:1904.03292).
    """
    joint, alone = (getattr(value, "information", value) for value in (joint, alone))
    for name in ("beta", "centered", "center_norm", "variant"):
        of_joint, of_alone = (getattr(information, name, None) for information in (joint, alone))
        if of_joint != of_alone:
            raise ValueError(f"task_distance: both must be of one {name}, got {of_joint!r} and {of_alone!r}")
    if isinstance(joint, Information) and isinstance(alone, Information):
        if problems := _comparable.differences(joint, alone):
            raise ValueError(f"task_distance: both must be of one architecture and measured alike, got {'; '.join(problems)}")
    joint_scales, alone_scales = (getattr(information, "prior_scales", {}) for information in (joint, alone))
    names = sorted({*joint_scales, *alone_scales})
    if differing := [name for name in names if joint_scales.get(name) != alone_scales.get(name)]:
        of_joint, of_alone = joint_scales.get(differing[0]), alone_scales.get(differing[0])
        raise ValueError(
            f"task_distance: both must be of one prior_scale, got {of_joint!r} and {of_alone!r} of {listed(differing)}"
        )
    joint_nats, alone_nats = (
        _checks.number("task_distance", name, getattr(value, "kl", value), "it is in nats, or in units of the loss")
        for name, value in (("joint", joint), ("alone", alone))
    )
    return joint_nats - alone_nats


def task_distances(joint: Tensor, alone: Tensor) -> TaskDistances:
    """``d(i -> j) = I_ij - I_i`` for all pairs, with ``d(i -> j) - d(j -> i) = I_j - I_i`` where ``joint`` is symmetric.

    Shapes:   joint [n, n], alone [n].
    Scale:    one unit for both.
    Errors:   ValueError for shapes that do not fit and entries that are not finite or complex.
    Numerics: float64.
    Source:   Figure 1 of Achille, Mbeng, Paolini and Soatto 2019 (arXiv:1904.03292).
    """
    joint, alone = (_checks.float64("task_distances", what, values) for what, values in (("joint", joint), ("alone", alone)))
    if alone.dim() != 1 or not len(alone) or joint.shape != (len(alone), len(alone)):
        raise ValueError(f"task_distances: must be [n, n] and [n], got joint {tuple(joint.shape)} and alone {tuple(alone.shape)}")
    if not (joint.isfinite().all() and alone.isfinite().all()):
        raise ValueError("task_distances: entries must be finite, got NaN or infinity")
    return TaskDistances(joint, alone)
