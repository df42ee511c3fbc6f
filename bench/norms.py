# SPDX-License-Identifier: Apache-2.0
"""The ways to the squared norm of each sample's gradient over all parameters, ``{"squared norms": [N]}``: see ``ways.py``."""

from __future__ import annotations

from functools import partial

import torch
import ways
from models import loss_per_sample
from torch.func import functional_call, grad, vmap

import fisherfast as ff

NORMS = "squared norms"
way = partial(ways.way, quantity="norms")


@way("fisherfast: ff.collect(PerSampleNorm), each further batch", package="fisherfast", limited=True)
def further_batch(model, x, y):
    stats = ff.collect(model, ff.PerSampleNorm(), fisher_type="empirical")

    def run():
        with stats:
            stats.backward(loss_per_sample(model(x), y))
        return lambda: {NORMS: stats.result().squared_norms[-len(x) :]}

    run()
    return run


@way("fisherfast: ff.collect(PerSampleNorm), one batch from start to result", package="fisherfast")
def one_block(model, x, y):
    def run():
        with ff.collect(model, ff.PerSampleNorm(), fisher_type="empirical") as stats:
            stats.backward(loss_per_sample(model(x), y))
        return {NORMS: stats.result().squared_norms}

    return run


@way("fisherfast: diagonal, norms and moments in one pass, each further batch", package="fisherfast", also=("diagonal", "sums"))
def one_pass(model, x, y):
    stats = ff.collect(model, ff.Diagonal(), ff.PerSampleNorm(), ff.GradientMoments(), fisher_type="empirical")

    def result():
        diagonal, norms, moments = stats.results()
        squares = {k: v * len(x) for k, v in diagonal.diagonal().items()}
        sums = {f"sum of {k}": v * len(x) for k, v in moments.mean().items()}
        return {NORMS: norms.squared_norms[-len(x) :]} | squares | sums

    def run():
        with stats:
            stats.backward(loss_per_sample(model(x), y))
        return result

    run()
    return run


@way(ways.LOOP, reference=True)
def loop(model, x, y):
    parameters = list(model.parameters())

    def run():
        norms = []
        for n in range(len(x)):
            loss = loss_per_sample(model(x[n : n + 1]), y[n : n + 1]).sum()
            norms.append(sum(g.square().sum() for g in torch.autograd.grad(loss, parameters)))
        return {NORMS: torch.stack(norms)}

    return run


@way(ways.LOOP, quantity="sums", reference=True)
def gradient(model, x, y):
    """The sum of the samples' gradients: ``{"sum of " parameter name: tensor}``."""
    parameters = dict(model.named_parameters())

    def run():
        gradients = torch.autograd.grad(loss_per_sample(model(x), y).sum(), list(parameters.values()))
        return {f"sum of {k}": g for k, g in zip(parameters, gradients, strict=True)}

    return run


@way(f"torch.func, vmap(grad), chunks of {ways.CHUNK}")
def torch_func(model, x, y):
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def norm(parameters, x, y):
        def loss(parameters):
            return loss_per_sample(functional_call(model, parameters, (x[None],)), y[None]).sum()

        return sum(g.square().sum() for g in grad(loss)(parameters).values())

    norms = vmap(norm, in_dims=(None, 0, 0))
    chunks = list(zip(x.split(ways.CHUNK), y.split(ways.CHUNK), strict=True))
    return lambda: {NORMS: torch.cat([norms(parameters, *chunk) for chunk in chunks])}


@way(
    "BackPACK, BatchL2Grad",
    package="backpack-for-pytorch",
    why={"decoder": "no rule for LayerNorm: warns and leaves its parameters out"},
)
def backpack(model, x, y):
    from backpack import backpack as extensions
    from backpack import extend
    from backpack.extensions import BatchL2Grad

    model = extend(model)

    def run():
        model.zero_grad()
        with extensions(BatchL2Grad()):
            loss_per_sample(model(x), y).sum().backward()
        return {NORMS: sum(p.batch_l2 for p in model.parameters() if hasattr(p, "batch_l2"))}

    return run


@way("Opacus, norms of grad_sample", package="opacus")
def opacus(model, x, y):
    from opacus import GradSampleModule

    wrapped = GradSampleModule(model, loss_reduction="sum")

    def run():
        wrapped.zero_grad()
        loss_per_sample(wrapped(x), y).sum().backward()
        return {NORMS: sum(p.grad_sample.square_().flatten(1).sum(1) for p in model.parameters())}

    return run


@way("Opacus, ghost clipping's norms", package="opacus")
def opacus_ghost(model, x, y):
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", max_grad_norm=1.0)

    def run():
        wrapped.zero_grad()
        loss_per_sample(wrapped(x), y).sum().backward()
        return {NORMS: wrapped.get_norm_sample().square()}

    return run
