# SPDX-License-Identifier: Apache-2.0
"""Shannon's information in the weights: what the trained weights tell of the data set, over many data sets.

Training is a channel from the data set D to the weights w. Of all priors the marginal ``Q(w) = E_D Q(w|D)`` costs least, and the
cost there is the mutual information; any other prior P costs KL(Q(w) || P) more. ``Q(w|D)`` is the law of the weights over
everything that training draws: seeds, order, initialisation. One run is one draw of those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfast import _checks
from fisherfast.fisher.lanczos import Estimate
from fisherfast.information._mixture import Mixture

_CALLER = "shannon_information"
_NORMALISED = 1e-6  # how far a row of probabilities may be from 1: float32 sums of many states

Runs = Sequence[Sequence[tuple[float | Tensor, float | Tensor]]]  # of each data set, of each run: mean and variance
Reference = Tensor | tuple[float | Tensor, float | Tensor]


@dataclass(frozen=True)
class ShannonInformation:
    """``E_D KL(Q(w|D) || P) = I(w; D) + KL(Q(w) || P)``, all three in nats; made by ``shannon_information``.

    Each is a value and its standard error over the drawn weights, 0 for tables. ``information`` is I(w; D).
    ``information_with_seed`` is I(w; D, seed), what one Gaussian per run gives: at least I(w; D), None for tables. ``ceiling`` is
    the entropy of the data sets' weights, log of their number: no estimate of I(w; D) can be above it, and one near it says only
    that there were too few data sets.
    """

    information: Estimate
    marginal_divergence: Estimate
    expected_divergence: Estimate
    information_with_seed: Estimate | None
    ceiling: float
    num_datasets: int
    num_runs: int | None = None
    samples: int | None = None

    def conditions(self) -> str:
        """Everything the nats depend on, in one line."""
        how = "exact" if self.num_runs is None else f"{self.num_runs:,} runs, {self.samples:,} draws of each"
        return f"{self.num_datasets:,} data sets (ceiling {self.ceiling:.4g}), {how}"

    def __str__(self) -> str:
        error = f" +- {self.information.stderr:.2g}" if self.samples else ""
        seed = f", {self.information_with_seed.value:.4g} with the seed" if self.information_with_seed else ""
        return f"I(w; D) = {self.information.value:.4g}{error} nats{seed}: {self.conditions()}"


@torch.no_grad()
def shannon_information(
    posteriors: Tensor | Runs,
    *,
    weights: Tensor | Sequence[float] | None = None,
    reference: Reference | None = None,
    samples: int = 100,
    seed: int = 0,
) -> ShannonInformation:
    """``I(w; D) = E_D KL(Q(w|D) || Q(w))``, ``Q(w) = E_D Q(w|D)``, and what another prior P costs beyond it.

    ``posteriors``  either a table of probabilities, a row Q(w|D) for each data set: exact. Or for each data set a list of runs
                    that differ in nothing but what training draws, each run (mean, variance) of its Gaussian: then Q(w|D) is
                    the mixture of its runs, and the nats are estimated by drawing from every run's Gaussian.
    ``weights``     the probability of each data set, in any units; equal if not given.
    ``reference``   P: a row of probabilities, or (mean, variance) of a Gaussian; the marginal if not given.
    ``samples``     how many weights are drawn from each run's Gaussian.

    A Gaussian per run taken for Q(w|D) gives I(w; D, seed) instead, which also counts what the weights tell of the seed; it can
    fall where I(w; D) rises. It is there as ``information_with_seed``. With few runs I(w; D) is estimated too high: by about
    (basins - 1) / (2 runs) nats where the runs choose between separate basins.

    Shapes:   a table [datasets, states]; means and variances are numbers or tensors [d], the same d for all: diagonal Gaussians.
    Scale:    nats.
    Errors:   ValueError for complex numbers, probabilities that are negative or do not sum to 1, variances not above zero, no data sets or runs,
              shapes that differ, weights or a reference that do not fit, and a reference of no probability where Q(w) has some.
    Numerics: float64. The same draws serve all terms, so that the identity holds to rounding; work and memory are
              (runs^2 samples d) and a part of it at a time.
    Source:   Proposition 2.3 of arXiv:1905.12213; Figure 3 is ``information_with_seed``.
    """
    if isinstance(posteriors, Tensor):
        return _of_table(posteriors, weights, reference)
    return _of_runs(posteriors, weights, reference, samples, seed)


def _of_table(table: Tensor, weights: Tensor | Sequence[float] | None, reference: Reference | None) -> ShannonInformation:
    if table.dim() != 2 or not table.numel():
        raise ValueError(f"{_CALLER}: a table must be [datasets, states], got {tuple(table.shape)}; Gaussians are given as lists")
    q = _probabilities("posteriors", table)
    pi = _dataset_weights(weights, len(q))
    marginal = pi @ q
    information = float(pi @ _divergence(q, marginal))
    beyond = 0.0
    if reference is not None:
        if not (isinstance(reference, Tensor) and reference.shape == q.shape[1:]):
            raise ValueError(
                f"{_CALLER}: reference must be a row of {q.shape[1]} probabilities, as in the table, got {reference!r}"
            )
        p = _probabilities("reference", reference[None])[0]
        if impossible := int(((p == 0) & (marginal > 0)).sum()):
            raise ValueError(
                f"{_CALLER}: reference must give every state of Q(w) some probability, got none for {impossible}; "
                "a divergence from it is infinite"
            )
        beyond = float(_divergence(marginal[None], p))
    return ShannonInformation(
        Estimate(information, 0.0), Estimate(beyond, 0.0), Estimate(information + beyond, 0.0), None, _entropy(pi), len(q)
    )


def _of_runs(
    runs: Runs, weights: Tensor | Sequence[float] | None, reference: Reference | None, samples: int, seed: int
) -> ShannonInformation:
    if not len(runs) or not all(len(of_one) for of_one in runs):
        raise ValueError(f"{_CALLER}: every data set must have at least one run, got {[len(of_one) for of_one in runs]} runs")
    samples = _checks.integer(_CALLER, "samples", samples, 2, "the error is estimated from them")
    pi = _dataset_weights(weights, len(runs))
    Q = Mixture.of_runs(_CALLER, runs, pi)
    P = None if reference is None else _gaussian(reference, Q.dimension)
    terms: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
        "information": lambda w, run, dataset, marginal: dataset - marginal,
        "information_with_seed": lambda w, run, dataset, marginal: run - marginal,
    }
    if P is not None:
        terms["marginal_divergence"] = lambda w, run, dataset, marginal: marginal - P.log_density(w)
        terms["expected_divergence"] = lambda w, run, dataset, marginal: dataset - P.log_density(w)
    estimates = Q.expectations(terms, samples, torch.Generator().manual_seed(seed))
    return ShannonInformation(
        information=estimates["information"],
        marginal_divergence=estimates.get("marginal_divergence", Estimate(0.0, 0.0)),
        expected_divergence=estimates.get("expected_divergence", estimates["information"]),
        information_with_seed=estimates["information_with_seed"],
        ceiling=_entropy(pi),
        num_datasets=len(runs),
        num_runs=len(Q.mean),
        samples=samples,
    )


def _gaussian(reference: Reference, dimension: int) -> Mixture:
    if isinstance(reference, Tensor) or len(reference) != 2:
        raise ValueError(f"{_CALLER}: reference must be (mean, variance) of a Gaussian, got {reference!r}")
    parts = [_checks.float64(_CALLER, "reference", part).flatten() for part in reference]
    if wrong := [len(part) for part in parts if len(part) not in (1, dimension)]:
        raise ValueError(
            f"{_CALLER}: reference must be of d = {dimension} weights, as the runs, or of one number each, got {wrong[0]}"
        )
    mean, variance = (part.expand(dimension) for part in parts)
    return Mixture.of_runs(_CALLER, [[(mean, variance)]], torch.ones(1, dtype=torch.float64))


def _probabilities(what: str, rows: Tensor) -> Tensor:
    """The rows in float64, summing to 1 exactly. Errors: ValueError if they are not probabilities."""
    rows = _checks.float64(_CALLER, what, rows)
    if not (rows.isfinite() & (rows >= 0)).all():
        raise ValueError(f"{_CALLER}: {what} must be probabilities, got entries that are negative or not finite")
    sums = rows.sum(1, keepdim=True)
    if (off := float((sums - 1).abs().max())) > _NORMALISED:
        raise ValueError(f"{_CALLER}: {what} must sum to 1 in every row, got a sum that is off by {off:.3g}; divide by it")
    return rows / sums


def _dataset_weights(weights: Tensor | Sequence[float] | None, datasets: int) -> Tensor:
    """The probability of each data set, in float64."""
    if weights is None:
        return torch.full((datasets,), 1 / datasets, dtype=torch.float64)
    pi = _checks.float64(_CALLER, "weights", weights)
    if pi.shape != (datasets,) or not (pi.isfinite() & (pi > 0)).all():
        raise ValueError(f"{_CALLER}: weights must be {datasets} finite numbers > 0, one for each data set, got {weights!r}")
    return pi / pi.sum()


def _divergence(q: Tensor, p: Tensor) -> Tensor:
    """``KL(q || p)`` of each row."""
    return (torch.special.xlogy(q, q) - torch.special.xlogy(q, p)).sum(1)


def _entropy(pi: Tensor) -> float:
    return 0.0 - float(torch.special.xlogy(pi, pi).sum())  # of one data set 0, not -0
