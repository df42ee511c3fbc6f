# SPDX-License-Identifier: Apache-2.0
"""What the page says in words: warnings about the numbers at hand, and every term in one sentence."""

from __future__ import annotations

from fisherfast._names import joined
from fisherfast.fisher import Fisher
from fisherfast.information import WHOLE, Information

TERMS = {
    "nat": "The unit of information when logarithms are natural; one nat is 1.44 bits.",
    "information in the weights": (
        "How many nats it takes to write the trained weights down, given the prior, as coarsely as the loss allows: KL(Q || P)."
    ),
    "Fisher": "A matrix that says how much the network's predictions change when its weights change a little.",
    "trace": "The sum of the Fisher's eigenvalues: how sharply the predictions depend on the weights, all directions together.",
    "eigenvalue, spectrum": "The Fisher's sharpness along one direction of the weights; the spectrum is all of them, sorted.",
    "beta": "The price: how much mean loss one nat may cost; 1 / N is the Bayesian choice for N training samples, not those measured.",
    "prior, lambda": "What is assumed of the weights before training: a normal distribution of standard deviation lambda.",
    "rise of the loss": "How much the mean loss is expected to grow when the weights are written that coarsely: 1/2 tr(F Sigma).",
    "rate-distortion curve": "The fewest nats for every rise of the loss: what compressing the weights further would cost.",
    "effective dimension": "How many directions of the weights the data decide, rather than the prior.",
    "bits per parameter": "A layer's information in bits, shared out among its weights.",
    "share": "A layer's part of the information of the whole network.",
    "N, k": "The number of samples the Fisher was measured on, and the number of weights.",
    "fisher type": (
        "Whose labels the gradients are taken at: drawn from the network (mc), all of them weighted (exact) or the data's own (empirical)."
    ),
    "structure": (
        "What is kept of the Fisher: its diagonal, Kronecker factors of each layer (kfac), these with corrected eigenvalues (ekfac) "
        "or all of it (gram)."
    ),
}

_FORMULAS = {"exact": "exact", "paper": "as printed in the paper"}


def settings(F: Fisher, info: Information) -> dict[str, str]:
    """Everything the numbers depend on."""
    how = F.provenance
    return {
        "model": how.model or "unknown",
        "structure": F.structure,
        "fisher type": how.fisher_type or "unknown",
        "likelihood": how.likelihood or "unknown",
        "draws per sample": _of_drawn_labels(F, how.draws),
        "seed": _of_drawn_labels(F, how.seed),
        "samples N": f"{F.num_samples:,}",
        "labels": f"{F.num_positions:,}",
        "weights k": f"{info.num_parameters:,}",
        "beta": f"{info.beta:.6g}",
        "prior scale lambda": info.prior_in_words(ranged=True),
        "formulas": _FORMULAS[info.variant],
    }


def _of_drawn_labels(F: Fisher, value: int | None) -> str:
    """A setting of drawn labels."""
    if F.provenance.fisher_type in ("exact", "empirical"):
        return "none, labels are not drawn"
    return "unknown" if value is None else f"{value}"


def warnings(F: Fisher, info: Information) -> list[str]:
    """What a reader must know before using the numbers; none if there is nothing."""
    how = F.provenance
    notes = []
    if info.excluded:
        notes.append(f"The numbers leave out parameters that the Fisher lacks: {joined(info.excluded)}.")
    if how.fisher_type is None:
        notes.append("How this Fisher was measured is not known.")
    if how.fisher_type == "empirical":
        notes.append(
            "The empirical Fisher, at the labels of the data, is not the Fisher and can be far from it, most of all where the network fits them well."
        )
    if how.fisher_type == "mc" and how.draws == 1:
        notes.append(
            "One label was drawn per sample. Where the network is nearly certain the labels that matter are rare and the numbers noisy: "
            "compare with more draws, or with the exact Fisher."
        )
    if info.prior_scale == "fit":
        notes.append(
            "The prior was fitted to the trained weights. The nats do not pay for that choice, so they must not be put into a bound on generalization."
        )
    if flat := [name or WHOLE for name, layer in info.by_layer().items() if layer.trace == 0]:
        notes.append(f"The Fisher of these layers is zero, the predictions do not depend on their weights: {joined(flat)}.")
    if info.variant == "paper":
        notes.append("The formulas are those printed in the paper, constant factors and all; the exact ones differ.")
    if underflow := F.coverage.underflow:
        notes.append(f"Gradients in float16 lost digits in {joined(list(underflow))}: measure with a loss scale.")
    return notes
