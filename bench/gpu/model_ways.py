# SPDX-License-Identifier: Apache-2.0
"""The ways to diagonal, KFAC and EKFAC of a whole model on a GPU: ours, and the peers' in plain torch, which is all there is there.

Sums are in float32 in every mode, which ``bench/ways.py`` leaves to the model's dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import ekfac
import kfac
import torch
import ways
from gpu import problems
from models import loss_per_sample
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fisherfast as ff

LARGEST_FACTOR = ff.KFAC().max_factor_dim


def loop(model: nn.Module, x: Tensor, y: Tensor) -> ways.Run:
    """One backward pass a sample."""
    parameters = dict(model.named_parameters())

    def squares() -> ways.Result:
        found = {k: torch.zeros_like(p, dtype=torch.float32) for k, p in parameters.items()}
        for n in range(len(x)):
            loss = loss_per_sample(model(x[n : n + 1]), y[n : n + 1]).sum()
            for square, g in zip(found.values(), torch.autograd.grad(loss, list(parameters.values())), strict=True):
                problems.squared(square, g)
        return found

    return squares


def torch_func(model: nn.Module, x: Tensor, y: Tensor) -> ways.Run:
    """``vmap`` over chunks of samples."""
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_per_sample(functional_call(model, parameters, (x[None],)), y[None]).sum()

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))

    def squares() -> ways.Result:
        found = {k: torch.zeros_like(p, dtype=torch.float32) for k, p in parameters.items()}
        for some_x, some_y in zip(x.split(ways.CHUNK), y.split(ways.CHUNK), strict=True):
            for k, g in gradients(parameters, some_x, some_y).items():
                found[k] += g.float().square_().sum(0)
        return found

    return squares


def materialised(model: nn.Module, x: Tensor, y: Tensor) -> ways.Run:
    """Of each Linear and convolution the sample gradients themselves, squared and summed; other parameters are left out."""

    def squares() -> ways.Result:
        rows = kfac.uses(model, x, y)
        return {f"{name}.weight": _materialised(layer, *rows.pop(name)) for name, layer in kfac.layers(model).items()}

    return squares


def _materialised(layer: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    x = x if layer.bias is None else x[..., :-1]
    return torch.einsum("nto,nti->noi", g, x).float().square_().sum(0).view_as(layer.weight)


def factors(model: nn.Module, x: Tensor, y: Tensor) -> kfac.Factors:
    """Both factors of each layer by a whole product each; of a factor larger than ours would keep, its diagonal."""

    def product(rows: Tensor, scale: float) -> Tensor:
        if rows.shape[1] > LARGEST_FACTOR:
            return rows.float().square_().sum(0) / scale
        out = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        return problems.float_output(out, rows.mT, rows).div_(scale)

    rows, found = kfac.uses(model, x, y), {}
    for name in kfac.layers(model):
        inputs, g = rows.pop(name)
        N, T = g.shape[:2]
        found[name] = (product(inputs.flatten(0, 1), N * T), product(g.flatten(0, 1), N))
    return found


def hooked_factors(model: nn.Module, x: Tensor, y: Tensor) -> ways.Run:
    """``factors``, without the bias's column."""
    return lambda: kfac.compared(model, factors(model, x, y))


def hooked_correction(model: nn.Module, x: Tensor, y: Tensor) -> ways.Run:
    """Factors, their eigenvectors, then both rows of each sample rotated, multiplied and squared."""

    def basis(factor: Tensor) -> Tensor | None:
        return None if factor.dim() == 1 else torch.linalg.eigh(factor).eigenvectors

    def turned(rows: Tensor, vectors: Tensor | None) -> Tensor:
        return rows.float() if vectors is None else rows.float() @ vectors

    def eigenvalues() -> ways.Result:
        bases = {name: (basis(A), basis(B)) for name, (A, B) in factors(model, x, y).items()}
        rows, found = kfac.uses(model, x, y), {}
        for name, (U, V) in bases.items():
            inputs, g = rows.pop(name)
            values = torch.zeros(g.shape[2], inputs.shape[2], device=g.device)
            for x_n, g_n in zip(inputs, g, strict=True):
                problems.squared(values, turned(g_n, V).mT @ turned(x_n, U))
            found[name] = values / len(g)
        return ekfac.compared(found)

    return eigenvalues


class Way(NamedTuple):
    """A way to a quantity. From the first one that is not ours, the reference, ours must not differ."""

    name: str
    prepare: ways.Prepare
    ours: bool = False


WAYS = {
    "diagonal": [
        Way("fisherfast", ways.further_batch, ours=True),
        Way("loop over samples", loop),
        Way("einsum, materialised (Linear and convolutions only)", materialised),
        Way("torch.func, vmap(grad) in chunks", torch_func),
    ],
    "kfac": [
        Way("fisherfast", kfac.further_batch, ours=True),
        Way("hooks, unfold, whole products (Linear and convolutions only)", hooked_factors),
    ],
    "ekfac": [
        Way("fisherfast, from start to result", ekfac.whole, ours=True),
        Way("hooks, eigh, rotated rows (Linear and convolutions only)", hooked_correction),
    ],
}
