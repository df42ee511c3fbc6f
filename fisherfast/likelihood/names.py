# SPDX-License-Identifier: Apache-2.0
"""Likelihoods by name, and the names under which results are stored."""

from __future__ import annotations

from typing import Any

from fisherfast._warning import warn
from fisherfast.data.batches import IGNORED
from fisherfast.likelihood.bernoulli import Bernoulli
from fisherfast.likelihood.categorical import Categorical, CausalLM
from fisherfast.likelihood.gaussian import Gaussian
from fisherfast.likelihood.protocol import Likelihood

LIKELIHOODS: dict[str, Any] = {"categorical": Categorical, "bernoulli": Bernoulli, "causal_lm": CausalLM, "gaussian": Gaussian}


def resolve(likelihood: str | Likelihood) -> Likelihood:
    """A likelihood from its name; objects pass through."""
    if isinstance(likelihood, str) and likelihood in LIKELIHOODS:
        return LIKELIHOODS[likelihood]()
    if likelihood is None or isinstance(likelihood, str | type):
        raise ValueError(f"likelihood: must be one of {sorted(LIKELIHOODS)} or a likelihood object, got {likelihood!r}")
    if not hasattr(likelihood, "predictions"):  # a loss of torch.nn, say
        raise TypeError(
            f"likelihood: must be one of {sorted(LIKELIHOODS)} or a likelihood object, got {type(likelihood).__name__}; of a cross entropy "
            "that is 'categorical', of BCEWithLogitsLoss 'bernoulli', of MSELoss 'gaussian'"
        )
    return likelihood


def beside(caller: str, stored: str | None, given: str | Likelihood | None) -> Likelihood:
    """The likelihood for losses that are compared with a stored result: the argument if given, else that of the result, ``stored``.

    FisherWarning where they differ; ValueError where none is given and the name does not say how to make it again.
    """
    if given is None:
        if stored not in LIKELIHOODS:
            raise ValueError(
                f"{caller}: likelihood must be given beside nats of {stored or 'an unknown likelihood'}, got None; pass likelihood="
            )
        return resolve(stored)
    chosen = resolve(given)
    if stored is not None and stored not in (_with_settings(chosen, of_loss=False), _with_settings(chosen, of_loss=True)):
        warn(
            f"{caller}: likelihood should be that of the nats, {stored}, got {chosen.name}; loss and nats then belong to different tasks"
        )
    return chosen


def stored_name(likelihood: Likelihood, fisher_type: str) -> str:
    """What a result is stored under: the likelihood's name, with what says which labels count, and the settings of its loss where "empirical"
    looked at them.

    Class weights and label smoothing change a loss, not ``p(y | x)``: "mc" and "exact" leave them out, with a FisherWarning.
    """
    settings = getattr(likelihood, "loss_settings", "")
    if settings and fisher_type != "empirical":
        warn(f"{likelihood.name}: {settings} change the loss, not p(y | x); fisher_type={fisher_type!r} does not look at them")
    return _with_settings(likelihood, of_loss=fisher_type == "empirical")


def counting(likelihood: Likelihood) -> dict[str, str]:
    """What a likelihood's name does not say and the sums depend on, where it is not as usual."""
    usual = {"axis": -1, "ignore_index": IGNORED}
    given = {name: getattr(likelihood, name, value) for name, value in usual.items()}
    return {name: str(value) for name, value in given.items() if value != usual[name]}


def _with_settings(likelihood: Likelihood, of_loss: bool) -> str:
    each = [f"{name}={value}" for name, value in counting(likelihood).items()]
    if of_loss and (of_its_loss := getattr(likelihood, "loss_settings", "")):
        each.append(of_its_loss)
    return f"{likelihood.name}({', '.join(each)})" if each else likelihood.name
