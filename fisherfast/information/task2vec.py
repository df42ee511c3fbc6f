# SPDX-License-Identifier: Apache-2.0
"""Task2Vec: a task as a vector, the diagonal Fisher of a network trained on it, averaged over each filter.

A filter is what makes one output: a row of a linear layer, an output channel of a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fisherfast import _checks
from fisherfast._names import listed
from fisherfast.capture.parameters import unwrapped
from fisherfast.fisher import Fisher
from fisherfast.fisher.protocol import names_by_layer
from fisherfast.information import _arguments, _conditions, _prior
from fisherfast.information._prior import GivenScale

_CALLER = "task_embedding"


@dataclass(frozen=True, eq=False)
class TaskEmbedding:
    """For every filter the mean of the diagonal Fisher over its weights: {parameter: [filters]} in float64.

    Made by ``task_embedding`` from a Fisher, or by ``from_variance`` from the variances of a variational posterior; ``source``
    says of which. Two embeddings compare only if the networks are the same up to their heads.
    """

    filters: Mapping[str, Tensor] = field(repr=False)
    source: str

    @classmethod
    @torch.no_grad()
    def from_variance(
        cls,
        variance: Mapping[str, Tensor],
        model: nn.Module,
        *,
        beta: float,
        prior_scale: GivenScale,
        layers: Collection[str] | None = None,
        skip: Collection[str] = (),
        norms: bool = False,
    ) -> TaskEmbedding:
        """``h = beta (1 / sigma^2 - 1 / lambda^2)``, averaged over filters: the curvature that made the noise of each weight.

        ``variance`` are those of a Gaussian posterior trained with ``E_Q loss + beta KL``, its ``.variance()``; with
        Task2Vec's own code, whose loss lacks the 1/2 of the KL, beta is twice the one set there. More robust than the Fisher
        where the weights are at no minimum.

        A filter that the task does not need comes out as 0 up to the noise of the training, also below it; with
        ``damping = beta / lambda^2`` its precision is above 0 all the same.

        Shapes:   variance {name: tensor shaped like the parameter}; prior_scale: a number, or {layer or parameter name: number};
                  the other arguments as in ``task_embedding``.
        Scale:    that of the Fisher: a mean over samples.
        Errors:   ValueError for variances not above zero, for a beta or prior_scale not above zero, and as ``task_embedding``.
        Numerics: float64.
        Source:   Achille et al. 2019 (arXiv:1902.03545), with the scale of Proposition 2.5 of arXiv:1905.12213.
        """
        beta = _checks.positive("from_variance", "beta", beta, "it is the price of a nat that the posterior was trained with")
        scales = _prior.given("from_variance", prior_scale, names_by_layer(variance), "variance")
        for name, values in variance.items():
            _checks.real("from_variance", f"variance[{name!r}]", values)
        if bad := [name for name, values in variance.items() if not (values.isfinite() & (values > 0)).all()]:
            raise ValueError(f"from_variance: variances must be finite and > 0, got others in {listed(bad)}")
        curvature = {name: beta * (1 / values.double() - 1 / scales[name] ** 2) for name, values in variance.items()}
        source = f"posterior variances, beta = {beta:.3g}, prior scale {_prior.scale_in_words(prior_scale)}"
        return cls(_averaged(curvature, model, layers, skip, norms), source)

    def vector(self) -> Tensor:
        """All filters in one tensor, in the order of the parameters."""
        return torch.cat(list(self.filters.values()))

    def complexity(self) -> float:
        """The sum over filters: how much there is to know of the task, in units of the Fisher."""
        return math.fsum(float(h.sum()) for h in self.filters.values())

    def conditions(self) -> str:
        """Everything it depends on, in one line."""
        filters = sum(len(h) for h in self.filters.values())
        return f"{filters:,} filters of {len(self.filters)} parameters, {self.source}"

    def __str__(self) -> str:
        return f"task embedding, complexity {self.complexity():.4g}: {self.conditions()}"


@torch.no_grad()
def task_embedding(
    F: Fisher, model: nn.Module, *, layers: Collection[str] | None = None, skip: Collection[str] = (), norms: bool = False
) -> TaskEmbedding:
    """The diagonal of the Fisher, averaged over each filter: what each output of each layer matters for the task.

    ``model``   the network that F was measured on: its modules say which axis of a weight is that of the outputs.
    ``layers``  the layers to take, by name; all if not given.
    ``skip``    layers to leave out: the classifier, whose filters are other ones for every task.
    ``norms``   whether the scales of norms count, each as a filter of its own. Biases never do.

    Linear layers and convolutions have their outputs on the first axis; transposed convolutions, embeddings and
    Hugging Face's Conv1D on the second. Any other parameter of two axes or more is taken to have them on the first.

    Shapes:   {parameter: [outputs]}.
    Scale:    that of F: a mean over samples.
    Errors:   ValueError for layers that F does not have, parameters that the model does not have or that have another shape there,
              and where no parameter is left.
    Numerics: float64.
    Source:   Achille et al. 2019, Task2Vec (arXiv:1902.03545).
    """
    _arguments.check_fisher("task_embedding", F)
    return TaskEmbedding(
        _averaged(F.diagonal(dtype=torch.float64), model, layers, skip, norms), _conditions.measured_and_missing(F)
    )


def _averaged(
    diagonal: Mapping[str, Tensor], model: nn.Module, layers: Collection[str] | None, skip: Collection[str], norms: bool
) -> dict[str, Tensor]:
    """The chosen parameters, averaged over each filter."""
    measured = names_by_layer(diagonal)
    for what, names in (("layers", layers), ("skip", skip)):
        if isinstance(names, str):
            raise ValueError(f"{_CALLER}: {what} must be a collection of layer names, got the text {names!r}; pass [{names!r}]")
    if unknown := {*skip, *(layers or ())} - set(measured):
        raise ValueError(
            f"{_CALLER}: layers and skip must name layers that were measured, got {listed(unknown)}; layers: {listed(measured)}"
        )
    model = unwrapped(model)
    parameters = dict(model.named_parameters())
    filters = {}
    for name, values in diagonal.items():
        layer, _, kind = name.rpartition(".")
        if layer in skip or (layers is not None and layer not in layers):
            continue
        if name not in parameters or parameters[name].shape != values.shape:
            got = tuple(parameters[name].shape) if name in parameters else "none"
            raise ValueError(f"{_CALLER}: model must have {name!r} of shape {tuple(values.shape)}, got {got}")
        if values.dim() > 1:
            filters[name] = _filters(values, model.get_submodule(layer))
        elif values.dim() == 1 and kind == "weight" and norms:
            filters[name] = values.clone()
    if not filters:
        raise ValueError(f"{_CALLER}: at least one parameter must be left, got none of {listed(measured)}; norms need norms=True")
    return filters


def _filters(values: Tensor, module: nn.Module) -> Tensor:
    """The mean over everything that makes one output: ``[outputs]``."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):  # [I, O / groups, *kernel], the inputs in groups
        return values.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(2).mean(2).flatten()
    # Hugging Face's Conv1D by name, so that transformers is not needed here.
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or type(module).__name__ == "Conv1D":
        values = values.transpose(0, 1)
    return values.flatten(1).mean(1)
