# SPDX-License-Identifier: Apache-2.0
"""The ways to the exact diagonal Fisher over C classes, ``sum_n sum_c p_nc (d log p_nc)^2`` by parameter: see ``ways.py``."""

from __future__ import annotations

from functools import partial

import torch
import ways
from torch.func import functional_call, jacrev, vmap

import fisherfast as ff

BATCHES = 4  # of a run whose start and end are shared among them
way = partial(ways.way, quantity="exact")


@way("fisherfast: ff.fisher, one batch from start to result", package="fisherfast", mean=True)
def one_call(model, x, y):
    return lambda: ff.fisher(model, [(x, None)], fisher_type="exact", progress=False).diagonal()


@way(f"fisherfast: ff.fisher, a batch of a run over {BATCHES}", package="fisherfast", mean=True, batches=BATCHES, limited=True)
def run_of_batches(model, x, y):
    return lambda: ff.fisher(model, [(x, None)] * BATCHES, fisher_type="exact", progress=False).diagonal()


@way(ways.LOOP, reference=True)
def loop(model, x, y):
    """One forward pass a sample and one backward pass a class."""
    parameters = dict(model.named_parameters())

    def run():
        squares = {k: torch.zeros_like(p) for k, p in parameters.items()}
        for n in range(len(x)):
            log_p = model(x[n : n + 1]).log_softmax(-1)[0]
            for c, root in enumerate(log_p.detach().div(2).exp()):
                gradients = torch.autograd.grad(root * log_p[c], list(parameters.values()), retain_graph=True)
                for s, g in zip(squares.values(), gradients, strict=True):
                    s.addcmul_(g, g)
        return squares

    return run


@way(f"torch.func, vmap(jacrev), chunks of {ways.CHUNK}")
def torch_func(model, x, y):
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def scaled(parameters, x):
        log_p = functional_call(model, parameters, (x[None],)).log_softmax(-1)[0]
        return log_p * log_p.detach().div(2).exp()

    jacobians = vmap(jacrev(scaled), in_dims=(None, 0))

    def run():
        squares = {k: torch.zeros_like(p) for k, p in parameters.items()}
        for chunk in x.split(ways.CHUNK):
            for k, g in jacobians(parameters, chunk).items():
                squares[k] += g.square_().sum((0, 1))
        return squares

    return run


@way("BackPACK, DiagGGNExact", package="backpack-for-pytorch")
def backpack(model, x, y):
    from backpack import backpack as extensions
    from backpack import extend
    from backpack.extensions import DiagGGNExact

    model, loss = extend(model), extend(torch.nn.CrossEntropyLoss(reduction="sum"))

    def run():
        model.zero_grad()
        with extensions(DiagGGNExact()):
            loss(model(x), y).backward()
        return {k: p.diag_ggn_exact for k, p in model.named_parameters() if hasattr(p, "diag_ggn_exact")}

    return run


@way("nngeometry, classif_logits", package="nngeometry", mean=True)
def nngeometry(model, x, y):
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag

    def run():
        fisher = FIM(model, ways.whole(x, y), PMatDiag, variant="classif_logits", function=lambda x, y: model(x))
        blocks = fisher.get_diag().split([p.numel() for p in model.parameters()])
        return {k: b.view_as(p) for (k, p), b in zip(model.named_parameters(), blocks, strict=True)}

    return run


@way("ASDL, FISHER_EXACT", package="asdfghjkl", why={"all-cnn": ways.PER_POSITION})
def asdl(model, x, y):
    from asdl import FISHER_EXACT, SHAPE_DIAG
    from asdl.fisher import FisherConfig, get_fisher_maker
    from asdl.grad_maker import LOSS_CROSS_ENTROPY

    config = FisherConfig(fisher_type=FISHER_EXACT, fisher_shapes=[SHAPE_DIAG], data_size=1, loss_type=LOSS_CROSS_ENTROPY)
    maker = get_fisher_maker(model, config)

    def run():
        maker.setup_model_call(model, x)
        maker.forward_and_backward()
        return ways.asdl_diagonal(model)

    return run
