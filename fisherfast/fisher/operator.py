# SPDX-License-Identifier: Apache-2.0
"""The Fisher as an operator: ``F v`` from the model and the data, for models where even the sample gradients are too many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisherfast import _checks, _nested
from fisherfast._error import NonFiniteError
from fisherfast._names import listed
from fisherfast.capture.layout import PROBED
from fisherfast.capture.parameters import measurable, unwrapped
from fisherfast.capture.refusals import Refusals, refuse_train_mode
from fisherfast.data.batches import Batch, Output
from fisherfast.data.readings import SameReadings
from fisherfast.fisher import arguments
from fisherfast.fisher.protocol import Vector
from fisherfast.fisher.run.dependence import check_alone, check_independent, precision
from fisherfast.fisher.run.labelling import Labelling
from fisherfast.fisher.run.run import model_name
from fisherfast.likelihood import Likelihood, Predictions


class FisherOperator:
    """``F v = (1/N) sum_n E_y[s_n s_n^T v]`` by three passes through the model for each batch, and nothing kept between products.

    The output's derivative along v, ``J v``, is multiplied with each of the batch's gradients at the output, ``c``, and their sum
    ``sum_c c (c . J v)`` goes back: ``F = J^T (sum_c c c^T) J``. So "exact" costs as much as "mc". ``ff.spectral_density`` gives
    log-determinants, traces and spectra of it.

    ``data`` is read once for every product: a list of batches or a loader that does not shuffle, as for ``ff.fisher`` otherwise. A
    second product that reads other batches than the first, or in another order, is refused (drawn labels go by a sample's number), and a
    later one that reads more or fewer. A parameter that reaches no output of the first product's batches is refused, as by ``ff.fisher``;
    with ``allow_missing=True`` its part of F is zero.

    Shapes:   vectors {parameter name: tensor shaped like the parameter}, or flat in ``names`` order; the same kind comes back.
    Scale:    a mean over samples, as every Fisher's.
    Errors:   ValueError for an iterator that one product would use up, for data that change between products, for samples that depend on each other, and as ``ff.fisher``'s for arguments and batches;
              NotImplementedError for functions whose backward pass has no derivative (``nn.EmbeddingBag``);
              NonFiniteError if an output or a product is not finite.
    Numerics: derivatives in the model's precision, sums over batches in float64. ``J v`` is a derivative of the backward pass
              (Pearlmutter 1994), so attention runs torch's plain kernel, which has one.
    Source:   Schraudolph 2002, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent".
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        fisher_type: str = "mc",
        likelihood: str | Likelihood = "categorical",
        *,
        draws: int = 1,
        seed: int = 0,
        sample_offset: int = 0,
        max_passes: int = 1000,
        output: Output = None,
        allow_missing: bool = False,
    ) -> None:
        self._labelling = Labelling.of("FisherOperator", fisher_type, likelihood, draws, seed, max_passes)
        refuse_train_mode(model)
        self._labelling.check_model(unwrapped(model))
        self._readings = SameReadings(data, "FisherOperator", "in every product")  # or products are those of several matrices
        self._model, self._data, self._output = unwrapped(model), data, output
        self._refusals = Refusals(self._model)
        self._first = _checks.integer("FisherOperator", "sample_offset", sample_offset)
        self._parameters = measurable(model)
        self._checked = False  # whether samples were seen not to depend on each other
        self._missing = set(() if allow_missing else self._parameters)  # parameters that no output was seen to depend on
        self.provenance = self._labelling.provenance(model_name(model))
        self.shapes: dict[str, torch.Size] = {name: p.shape for name, p in self._parameters.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in the model's order; a tied tensor once, under its first name."""
        return tuple(self.shapes)

    @property
    def num_parameters(self) -> int:
        """How many numbers the parameters hold."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def device(self) -> torch.device:
        """The model's."""
        return next(iter(self._parameters.values())).device

    def __matmul__(self, v: Vector) -> Vector:
        """``F v``, in the dtype and on the device of v."""
        parts = arguments.split("F @ v", v, self.shapes)
        along = {name: part.to(self._parameters[name]) for name, part in parts.items()}
        sums = {name: torch.zeros(shape, dtype=torch.float64, device=self.device) for name, shape in self.shapes.items()}
        samples, total = self._first, 0.0
        batches = (Batch.of(item, self.device, self._model) for item in self._data)
        for batch in self._readings.read(batches):
            for name, product in self._product(batch, along, samples).items():
                sums[name] += product
            samples += batch.N
            total += batch.total_weight
        if not total:
            raise ValueError("FisherOperator: data must hold samples of a weight > 0, got none")
        self._check_reached()
        means = {name: (value / total).to(parts[name].device, parts[name].dtype) for name, value in sums.items()}
        if bad := [name for name, value in means.items() if not bool(value.isfinite().all())]:
            raise NonFiniteError(f"FisherOperator: F v must be finite, got others in {listed(bad)}")
        return arguments.like(v, means)

    def _check_reached(self) -> None:
        """After a first product, whose batches may each have others (experts): raise ValueError if one has no gradient in any."""
        if self._missing:
            lost = [name for name in self._parameters if name in self._missing]
            raise ValueError(
                f"model: every parameter with requires_grad must reach the output, got {len(lost)} of {len(self._parameters)} that do not, in "
                f"no batch, {listed(lost)}, or only from where autograd keeps no graph: torch.no_grad(), or gradient checkpointing with "
                "use_reentrant=True; pass use_reentrant=False, freeze them (requires_grad_(False)), or pass allow_missing=True, which makes "
                "their part of F zero"
            )

    def _product(self, batch: Batch, along: Mapping[str, Tensor], first: int) -> dict[str, Tensor]:
        """``sum_n w_n E_y[s_n s_n^T v]`` of one batch whose first sample is number ``first``; a parameter out of reach is left out."""
        self._labelling.check(batch)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            predictions = self._predictions(batch, first)
            values = predictions.values
            if batch.N > 1 and not self._checked:
                self._check_samples(batch, values.detach())
            self._labelling.num_passes(predictions)
            derivative = self._along(values, along)
            back = torch.zeros_like(derivative)
            for backward in self._labelling.passes(predictions.detached()):
                share = backward.scale * (backward.cotangent * derivative).unsqueeze(1).flatten(1).sum(1)
                share = share if batch.weight is None else share * batch.weight
                back += share.view(-1, *[1] * (back.dim() - 1)) * backward.cotangent
            gradients = torch.autograd.grad(values, list(self._parameters.values()), back, allow_unused=True)
        return {name: part.detach() for name, part in zip(self._parameters, gradients, strict=True) if part is not None}

    def _predictions(self, batch: Batch, first: int = 0) -> Predictions:
        with self._refusals:
            output = batch.copied().feed(self._model, self._output)  # the data are read again for every product
        predictions = self._labelling.predictions(batch, output, first)
        if not self._labelling.says_something(predictions):
            raise NonFiniteError("FisherOperator: the model's output must be finite, got others")
        return predictions

    @torch.no_grad()
    def _check_samples(self, batch: Batch, values: Tensor) -> None:
        """Raise ValueError if samples depend on each other; products need no batch to be taken apart, so one that cannot be is not looked at."""
        self._checked, eps = True, precision(self._model, values)
        alone = sum(map(batch.has_samples, _nested.tensors(batch.inputs))) == 1  # nothing else can be taken for samples
        try:
            few = batch.cut(0, min(batch.N, PROBED))
            of_few = values[: few.N] if alone else self._predictions(few).values
            if not alone:
                check_alone(of_few[:1], values[:1], eps)
        except Exception:  # noqa: BLE001  an input without samples that is as long as the batch, a sparse one: the model is right as it is
            return
        check_independent(lambda batch: self._predictions(batch).values, few, of_few, eps, ran=batch if alone else few)

    def _along(self, values: Tensor, v: Mapping[str, Tensor]) -> Tensor:
        """``J v``: the derivative by u of ``(J^T u) . v``, which is linear in u."""
        u = torch.zeros_like(values, requires_grad=True)
        gradients = torch.autograd.grad(values, list(self._parameters.values()), u, create_graph=True, allow_unused=True)
        found = [(name, g) for name, g in zip(self._parameters, gradients, strict=True) if g is not None]
        self._missing.difference_update(name for name, _ in found)
        if not found:
            raise ValueError("model: the output must depend on the parameters through autograd, got one that does not")
        try:
            (derivative,) = torch.autograd.grad([g for _, g in found], u, [v[name] for name, _ in found])
        except NotImplementedError as error:
            raise NotImplementedError(
                f"FisherOperator: the backward pass of every function must have a derivative, got one without ({error}); write it "
                "in other functions, or use ff.fisher"
            ) from error
        return derivative.detach()

    def __repr__(self) -> str:
        return f"FisherOperator({self.num_parameters:,} parameters, {self.provenance.fisher_type} labels)"
