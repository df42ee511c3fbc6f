# SPDX-License-Identifier: Apache-2.0
"""The ways to the empirical diagonal of a whole model: ours, plain torch's, and every peer's.

A way prepares a model once (wrapping, extending: not timed) and returns the function that is timed, which runs one batch and
gives ``{parameter name: sum over samples of the squared sample gradient}``, or a function that does where reading the result
is paid once per data set and not once per batch. Each peer is used as its documentation says, in the form that was fastest here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from models import loss_per_sample
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, Dataset

import fisherfast as ff

Squares = dict[str, Tensor]
Run = Callable[[], Squares | Callable[[], Squares]]

CHUNK = 4  # samples per vmap: the whole batch at once is slower on every case here


@dataclass(frozen=True)
class Way:
    """One way; ``package`` is its distribution, ``why`` explains by case a result that is another quantity."""

    name: str
    prepare: Callable[[nn.Module, Tensor, Tensor], Run]
    package: str | None
    mean: bool
    why: dict[str, str]

    @property
    def ours(self) -> bool:
        """Whether a failure is a defect of this project instead of a fact to report."""
        return self.package == "fisherfast"


WAYS: dict[str, Way] = {}


def way(name: str, package: str | None = None, mean: bool = False, why: dict[str, str] | None = None):
    """Register the decorated function; ``mean``: its result is divided by the number of samples."""

    def register(prepare: Callable[[nn.Module, Tensor, Tensor], Run]):
        WAYS[name] = Way(name, prepare, package, mean, why or {})
        return prepare

    return register


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """The denominator: one ordinary forward and backward, gradients freed first as an optimiser's zero_grad does."""

    def run() -> None:
        model.zero_grad()
        loss_per_sample(model(x), y).sum().backward()

    return run


@way("fisherfast: ff.collect, each further batch", package="fisherfast", mean=True)
def further_batch(model, x, y):
    stats = ff.collect(model, ff.Diagonal(), fisher_type="empirical")

    def run():
        with stats:
            stats.backward(loss_per_sample(model(x), y))
        return lambda: stats.result().diagonal()

    run()
    return run


@way("fisherfast: ff.collect, one batch from start to result", package="fisherfast", mean=True)
def one_block(model, x, y):
    def run():
        with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
            stats.backward(loss_per_sample(model(x), y))
        return stats.result().diagonal()

    return run


@way("fisherfast: ff.fisher, one batch from start to result", package="fisherfast", mean=True)
def one_call(model, x, y):
    return lambda: ff.fisher(model, [(x, y)], fisher_type="empirical", progress=False).diagonal()


@way("loop over samples")
def loop(model, x, y):
    parameters = dict(model.named_parameters())

    def run():
        squares = {k: torch.zeros_like(p) for k, p in parameters.items()}
        for n in range(len(x)):
            loss = loss_per_sample(model(x[n : n + 1]), y[n : n + 1]).sum()
            for s, g in zip(squares.values(), torch.autograd.grad(loss, list(parameters.values())), strict=True):
                s.addcmul_(g, g)
        return squares

    return run


@way(f"torch.func, vmap(grad), chunks of {CHUNK}")
def torch_func(model, x, y):
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def loss(parameters, x, y):
        return loss_per_sample(functional_call(model, parameters, (x[None],)), y[None]).sum()

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))

    def run():
        squares = {k: torch.zeros_like(p) for k, p in parameters.items()}
        for x_chunk, y_chunk in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            for k, g in gradients(parameters, x_chunk, y_chunk).items():
                squares[k] += g.square_().sum(0)
        return squares

    return run


@way("BackPACK", package="backpack-for-pytorch", why={"decoder": "no rule for LayerNorm: warns and leaves its parameters out"})
def backpack(model, x, y):
    from backpack import backpack as extensions
    from backpack import extend
    from backpack.extensions import SumGradSquared

    model = extend(model)

    def run():
        model.zero_grad()
        with extensions(SumGradSquared()):
            loss_per_sample(model(x), y).sum().backward()
        return {k: p.sum_grad_squared for k, p in model.named_parameters() if hasattr(p, "sum_grad_squared")}

    return run


class _OneBatch(Dataset):
    """A data set that hands over its batch whole, so that no collation is timed."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, _: list[int]) -> tuple[Tensor, Tensor]:
        return self.x, self.y


@way("nngeometry", package="nngeometry", mean=True)
def nngeometry(model, x, y):
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag

    loader = DataLoader(_OneBatch(x, y), batch_size=len(x), collate_fn=lambda batch: batch)

    def function(x, y):
        return loss_per_sample(model(x), y)[:, None]

    def run():
        fisher = FIM(model, loader, PMatDiag, variant="regression", function=function)
        blocks = fisher.get_diag().split([p.numel() for p in model.parameters()])
        return {k: b.view_as(p) for (k, p), b in zip(model.named_parameters(), blocks, strict=True)}

    return run


@way(
    "ASDL",
    package="asdfghjkl",
    why={"decoder": "flattens positions into the batch: squares each position's gradient, not each sequence's"},
)
def asdl(model, x, y):
    from asdl import FISHER_EMP, SHAPE_DIAG
    from asdl.fisher import FisherConfig, get_fisher_maker

    def loss(logits, y, reduction):  # called with reduction="sum"
        return loss_per_sample(logits, y).sum()

    maker = get_fisher_maker(model, FisherConfig(fisher_type=FISHER_EMP, fisher_shapes=[SHAPE_DIAG], data_size=1))

    def run():
        logits = maker.setup_model_call(model, x)
        maker.setup_loss_call(loss, logits, y)
        maker.forward_and_backward()
        diagonals = {m: module.fisher.diag for m, module in model.named_modules() if hasattr(module, "fisher")}
        return {k: getattr(diagonals[k.rpartition(".")[0]], k.rpartition(".")[2]) for k, _ in model.named_parameters()}

    return run


@way("Opacus", package="opacus")
def opacus(model, x, y):
    from opacus import GradSampleModule

    wrapped = GradSampleModule(model, loss_reduction="sum")

    def run():
        wrapped.zero_grad()
        loss_per_sample(wrapped(x), y).sum().backward()
        return {k: p.grad_sample.square_().sum(0) for k, p in model.named_parameters()}

    return run
