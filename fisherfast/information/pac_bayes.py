# SPDX-License-Identifier: Apache-2.0
"""PAC-Bayes: how large the loss on new data can be, given the loss on the training data and the information in the weights.

Both bounds hold with probability ``1 - delta`` over the draw of the training set, for every Q at once. What they ask for:
samples drawn independently, a loss in ``[0, max_loss]``, and a prior that was fixed before the samples were seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from fisherfast import _checks
from fisherfast._names import listed
from fisherfast._warning import warn
from fisherfast.fisher.lanczos import Estimate
from fisherfast.information import _arguments
from fisherfast.information.expected_loss import LogLoss

METHODS = ("mcallester", "kl")
_CALLER = "pac_bayes_bound"
_GRID_RATIO = math.sqrt(2)  # the bound at the best of them is at most 2.4% above the lowest
_BISECTIONS = 200  # ends sooner, where the interval has no number inside


@dataclass(frozen=True)
class Bound:
    """An upper bound on the mean loss of Q on new data, with everything it depends on; made by ``pac_bayes_bound``.

    ``value`` and the losses are in units of the loss: ``expected_loss`` as it was given, ``loss_limit`` what entered the bound, with
    ``draws`` the estimate's upper limit. ``beta`` is the one of ``num_betas`` that gave the smallest bound, None for ``method="kl"``.
    ``nats`` is KL(Q || P). ``stderr`` is that of an ``Estimate`` that was taken as exact.
    """

    value: float
    expected_loss: float
    loss_limit: float
    nats: float
    num_samples: int
    delta: float
    method: str
    max_loss: float
    beta: float | None = None
    num_betas: int = 1
    draws: int | None = None
    sample_delta: float = 0.0
    stderr: float = 0.0

    @property
    def confidence(self) -> float:
        """The probability, over the training set and the draws from Q, that the bound holds: at least this."""
        return 1 - self.delta - self.sample_delta

    @property
    def vacuous(self) -> bool:
        """Whether it says nothing: no loss is above ``max_loss``."""
        return self.value >= self.max_loss

    @property
    def lagrangian_beta(self) -> float | None:
        """``beta max_loss / N``: the price of a nat in the Lagrangian ``E_Q loss + beta KL`` that this bound is, up to a factor."""
        return None if self.beta is None else self.beta * self.max_loss / self.num_samples

    @property
    def hindsight_beta(self) -> float:
        """``(1 + sqrt(1 + 2 L / A)) / 2``, ``A = (KL + log(1 / delta)) / N``: the best beta, had it been fixed before.

        It depends on the training data, so the bound at it, if it is passed as ``beta``, is no bound; it says what a better
        grid could gain.
        """
        complexity = (self.nats - math.log(self.delta)) / self.num_samples
        return (1 + math.sqrt(1 + 2 * self.loss_limit / self.max_loss / complexity)) / 2

    def conditions(self) -> str:
        """Everything the bound depends on, in one line."""
        grid = "" if self.beta is None else f", beta = {self.beta:.3g}" + (f" of {self.num_betas}" if self.num_betas > 1 else "")
        error = f" (+- {self.stderr:.2g}, not part of delta)" if self.stderr else ""
        if self.draws is not None:
            error = f" (<= {self.loss_limit:.4g} by {self.draws:,} draws from Q, sample_delta = {self.sample_delta:g})"
        return (
            f"{self.method}{grid}, delta = {self.delta:g}, E_Q loss = {self.expected_loss:.4g}{error}, "
            f"KL = {self.nats:,.4g} nats, N = {self.num_samples:,} samples, loss in [0, {self.max_loss:g}]"
        )

    def __str__(self) -> str:
        says = f"vacuous: no loss is above {self.max_loss:g}; " if self.vacuous else ""
        return f"loss on new data <= {self.value:.4g} ({says}{self.conditions()})"


def pac_bayes_bound(
    expected_loss: float | Estimate,
    nats: float | Any,
    num_samples: int,
    *,
    delta: float = 0.05,
    beta: float | Sequence[float] | None = None,
    method: str = "mcallester",
    max_loss: float = 1.0,
    draws: int | None = None,
    sample_delta: float = 0.01,
) -> Bound:
    """``E_Q L_new <= (E_Q L + beta / N (KL + log(1 / delta))) / (1 - 1 / (2 beta))`` with probability 1 - delta.

    ``method="kl"`` instead solves ``kl(E_Q L || E_Q L_new) <= (KL + log(2 sqrt(N) / delta)) / N`` for the largest E_Q L_new,
    kl being the divergence of two coins. It has no beta and is usually the smaller one.

    ``expected_loss``  the mean training loss, averaged over weights drawn from Q: what ``expected_loss`` estimates, not the
                       loss at the trained weights. The bounds are for its true value. The error of an ``Estimate`` is not part
                       of delta: pass ``draws``, or read the bound as one for the estimated value.
    ``nats``           KL(Q || P), or an ``Information`` or posterior, of which ``.kl`` is taken, also for ``variant="paper"``.
                       The prior must not have seen the data: one with ``prior_scale="fit"`` is refused. Nor must weights that
                       are not in the nats: of parameters that were frozen when they were measured a FisherWarning says so.
                       Of a mapping of weights what it leaves out is unknown.
    ``beta``           a number above 1/2 fixed before the data were seen; or several, of which the best is taken at the price
                       of ``log(G / delta)`` for G of them (of G priors likewise: pass delta / G and take the best bound); None for a grid that depends on N and delta only: factors of sqrt 2
                       from 1 to the largest that can be best. N times the beta of ``information_in_weights`` (``lagrangian_beta``).
    ``draws``          how many independent draws of Q the mean in ``expected_loss`` is over: the ``draws`` that were passed to
                       ``ff.expected_loss``, whose two signs of one noise are one draw. The mean is then replaced by the
                       largest value it allows, ``kl(mean || E_Q L) <= log(2 / sample_delta) / draws``, and the bound holds
                       with probability ``1 - delta - sample_delta``.

    Scale:    all losses are divided by ``max_loss`` and the bound multiplied by it; beta is that of the loss in [0, 1].
    Errors:   ValueError for ``ff.expected_loss``'s estimate of a likelihood, which has no upper limit, a mean outside of [0, max_loss] (that
              single losses are inside is the caller's to know), nats below zero or of a Fisher that lacks parameters, beta of 1/2 or less,
              deltas that are not in (0, 1), counts below 1, an unknown method, a beta with ``method="kl"``, a fitted prior.
    Numerics: Python floats; the largest value allowed is found by bisection to the last bit, rounded up.
    Source:   Theorem 2.2 of arXiv:1905.12213 (McAllester 2013, arXiv:1307.2118); Seeger 2002 with the constant of Maurer 2004
              (arXiv:cs/0411099); the draws: Langford and Caruana 2001.
    """
    _checks.one_of(_CALLER, "method", method, METHODS)
    max_loss = _checks.positive(_CALLER, "max_loss", max_loss, "the bounds need a bounded loss: the 0-1 loss, or a clipped one")
    loss, stderr = _mean_and_error(expected_loss, max_loss)
    kl = _divergence(nats)
    N = _checks.integer(_CALLER, "num_samples", num_samples, 1)
    _check_probability("delta", delta)
    limit = loss / max_loss
    if draws is None:
        sample_delta = 0.0
    else:
        limit, stderr = _limit_by_draws(limit, draws, delta, sample_delta), 0.0
    value, best, num_betas = (_kl_bound if method == "kl" else _mcallester_bound)(limit, kl, N, delta, beta)
    return Bound(
        value=value * max_loss,
        expected_loss=loss,
        loss_limit=limit * max_loss,
        nats=kl,
        num_samples=N,
        delta=delta,
        method=method,
        max_loss=max_loss,
        beta=best,
        num_betas=num_betas,
        draws=draws,
        sample_delta=sample_delta,
        stderr=stderr,
    )


def _mean_and_error(expected_loss: float | Estimate, max_loss: float) -> tuple[float, float]:
    """The mean training loss, in [0, max_loss], and its standard error, 0 of a number; or ValueError."""
    if isinstance(expected_loss, LogLoss):
        raise ValueError(
            f"{_CALLER}: the loss must have an upper limit, got that of -log p, which has none; pass loss=ff.zero_one, or a clipped loss, to "
            "ff.expected_loss"
        )
    loss, stderr = expected_loss if isinstance(expected_loss, Estimate) else (expected_loss, 0.0)
    if not 0 <= loss <= max_loss:
        raise ValueError(f"{_CALLER}: expected_loss must be in [0, {max_loss:g}], got {loss!r}; clip the loss at max_loss")
    return float(loss), float(stderr)


def _limit_by_draws(mean: float, draws: int, delta: float, sample_delta: float) -> float:
    """The largest E_Q L, in [0, 1], that a mean over draws of Q allows with probability ``1 - sample_delta``."""
    _check_probability("sample_delta", sample_delta)
    if delta + sample_delta >= 1:
        raise ValueError(
            f"{_CALLER}: delta + sample_delta must be < 1, got {delta:g} + {sample_delta:g}; the bound holds for less"
        )
    return _largest(mean, math.log(2 / sample_delta) / _checks.integer(_CALLER, "draws", draws, 1))


def _kl_bound(loss: float, kl: float, N: int, delta: float, beta: Any) -> tuple[float, None, int]:
    """The bound of ``method="kl"`` for a loss in [0, 1]; no beta, of one way to choose it."""
    if beta is not None:
        raise ValueError(f"{_CALLER}: beta must be None for method='kl', which has none, got {beta!r}")
    return _largest(loss, (kl + math.log(2 * math.sqrt(N) / delta)) / N), None, 1


def _mcallester_bound(
    loss: float, kl: float, N: int, delta: float, beta: float | Sequence[float] | None
) -> tuple[float, float, int]:
    """The smallest bound of ``method="mcallester"`` for a loss in [0, 1], its beta, and of how many."""
    betas = _betas(beta, N, delta)
    complexity = (kl + math.log(len(betas) / delta)) / N
    value, best = min(((loss + b * complexity) / (1 - 1 / (2 * b)), b) for b in betas)
    return value, best, len(betas)


def _divergence(nats: Any) -> float:
    """KL(Q || P) of a number or of anything with ``.kl``; raise ValueError if its prior was fitted to the data, or it lacks parameters."""
    information = getattr(nats, "information", nats)
    if excluded := getattr(information, "excluded", ()):
        raise ValueError(
            f"{_CALLER}: nats must be of all parameters that were trained, got some that exclude {listed(excluded)}; measure them; "
            "of those that never left the prior's mean nothing is owed: pass .kl"
        )
    if frozen := getattr(information, "frozen", ()):
        warn(
            f"{_CALLER}: nats should be of all parameters that were trained, got some without {listed(frozen)}, which are frozen; the bound "
            "holds if these were fixed before the data were seen; if not, unfreeze and measure them"
        )
    if getattr(information, "prior_scale", None) == "fit":
        raise ValueError(
            f"{_CALLER}: the prior must be fixed before the data are seen, got prior_scale='fit'; give the scale of initialisation"
        )
    return _checks.non_negative(_CALLER, "nats", getattr(nats, "kl", nats), "it is KL(Q || P)")


def _betas(beta: float | Sequence[float] | None, N: int, delta: float) -> list[float]:
    """The betas to choose from: given, or those that can be best for a loss of at most 1 and a KL of at least 0."""
    if beta is None:
        largest = (1 + math.sqrt(1 + 2 * N / math.log(1 / delta))) / 2
        return [_GRID_RATIO**i for i in range(1 + math.ceil(math.log(largest, _GRID_RATIO)))]
    betas: list[float] = _arguments.as_list(beta)
    if not betas or not all(isinstance(b, Real) and math.isfinite(b) and b > 0.5 for b in betas):
        raise ValueError(
            f"{_CALLER}: beta must be > 1/2, or several such numbers, got {beta!r}; it is N times that of a mean loss"
        )
    return betas


def _largest(q: float, c: float) -> float:
    """The largest p with ``q log(q / p) + (1 - q) log((1 - q) / (1 - p)) <= c``, by bisection from q to 1; rounded up, as is what ``_coins`` rounds."""
    low, high = q, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if _coins(q, middle) <= c:
            low = middle
        else:
            high = middle
    return math.nextafter(high, 1.0)


def _coins(q: float, p: float) -> float:
    """``kl(q || p)`` for ``q < p < 1``."""
    ones = -q * math.log1p((p - q) / q) if q else 0.0
    share = (p - q) / (1 - q)  # may round to 1, where 1 - p does not to 0
    zeros = math.log1p(-share) if share < 0.5 else math.log((1 - p) / (1 - q))
    return ones - (1 - q) * zeros


def _check_probability(name: str, value: float) -> None:
    if not (isinstance(value, Real) and 0 < value < 1):
        raise ValueError(f"{_CALLER}: {name} must be in (0, 1), got {value!r}; it is the chance that the bound fails")
