# SPDX-License-Identifier: Apache-2.0
"""What a way is, and the ways to the empirical diagonal of a whole model: ours, plain torch's, and every peer's.

A way prepares a model once (wrapping, extending: not timed) and returns the function that is timed, which runs one batch and
gives its result, or a function that does where reading the result is paid once per data set and not once per batch. For the
diagonal a result is ``{parameter name: sum over samples of the squared sample gradient}``; ``exact.py`` and ``norms.py`` hold
the ways to the other quantities. Each peer is used as its documentation says, in the form that was fastest here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gate
import torch
from models import loss_per_sample
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, Dataset

import fisherfast as ff

Result = dict[str, Tensor]
Run = Callable[[], Result | Callable[[], Result]]
Problem = tuple[nn.Module, Tensor, Tensor]
Prepare = Callable[[nn.Module, Tensor, Tensor], Run]

PER_POSITION = "on small feature maps it squares the gradient of each position, not that of each image"
LOOP = "loop over samples"
CHUNK = 4  # samples per vmap: the whole batch at once is slower on every case here


@dataclass(frozen=True)
class Way:
    """One way to one quantity; ``package`` is its distribution, ``why`` explains by case a result that cannot be used.

    ``mean``: the result is divided by the number of samples. ``batches``: how many a run takes; its time is divided by them.
    ``also``: further quantities that the same result holds. ``reference``: plain torch's way, of which every quantity has one: run
    in float64 it is the oracle, in float32 it sets the gate. ``limited``: the way of ours that the project has a limit for.
    """

    name: str
    quantity: str
    prepare: Prepare
    package: str | None = None
    mean: bool = False
    batches: int = 1
    also: tuple[str, ...] = ()
    reference: bool = False
    limited: bool = False
    why: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether a failure is a defect of this project instead of a fact to report."""
        return self.package == "fisherfast"


_WAYS: list[Way] = []


def of(quantity: str) -> dict[str, Way]:
    """The ways to a quantity, by name."""
    return {way.name: way for way in _WAYS if way.quantity == quantity}


def way(name: str, package: str | None = None, quantity: str = "diagonal", **options: Any) -> Callable[[Prepare], Prepare]:
    """Register the decorated function; ``options`` are the further fields of ``Way``."""

    def register(prepare: Prepare) -> Prepare:
        _WAYS.append(Way(name, quantity, prepare, package, **options))
        return prepare

    return register


def found(run: Run) -> Result:
    """What a prepared way finds, read if that is a step of its own."""
    result = run()
    return result() if callable(result) else result


def oracle(quantity: str, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Result, dict[str, float]]:
    """The result by the reference in float64, and for each of its parts the error that plain torch makes in float32.

    That error is the reference's worst at any part of this result: a small parameter's own may be nearly zero by luck.
    """
    (prepare,) = (way.prepare for way in of(quantity).values() if way.reference)
    narrow = found(prepare(model, x, y))
    wide = found(prepare(copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x, y))
    return wide, dict.fromkeys(wide, max(gate.error(narrow[k], wide[k]) for k in wide))


def wrong(result: Result, way: Way, N: int, wide: Result, plain_errors: dict[str, float]) -> str | None:
    """What is wrong with a way's result for N samples, or None."""
    missing = [k for k in wide if k not in result]
    if missing:
        return f"no result for {len(missing)} of {len(wide)} parameters ({missing[0]}, ...)"
    scale, passes = (N if way.mean else 1), (gate.passes if way.ours else gate.right)
    errors = {k: gate.error(result[k].detach().double() * scale, wide[k]) for k in wide}
    failed = {k: e for k, e in errors.items() if not passes(e, plain_errors[k])}
    if failed:
        worst = max(failed, key=failed.get)
        parts = f"{len(failed)} of {len(wide)} parameters differ, {worst}" if len(wide) > 1 else f"the {worst} differ"
        return f"another quantity: {parts} by {failed[worst]:.2g} of the maximum"
    return None


def attempt(
    way: Way, problem: Problem, oracles: Callable[[str], tuple[Result, dict[str, float]]]
) -> tuple[Run | None, str | None]:
    """Prepare and run once: what is timed, or the reason why there is nothing to time. Ours raises instead."""
    model, x, y = problem
    try:
        run = way.prepare(model, x, y)
        result = found(run)
    except Exception as error:  # whatever a peer raises is the finding
        if way.ours:
            raise
        return None, gate.reason(error)
    wide, plain_errors = oracles(way.quantity)
    for quantity in way.also:
        wide, plain_errors = (a | b for a, b in zip((wide, plain_errors), oracles(quantity), strict=True))
    reason = wrong(result, way, len(x), wide, plain_errors)
    assert reason is None or not way.ours, reason
    return (run, None) if reason is None else (None, reason)


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """The denominator: one ordinary forward and backward, gradients freed first as an optimiser's zero_grad does."""

    def run() -> None:
        model.zero_grad()
        loss_per_sample(model(x), y).sum().backward()

    return run


@way("fisherfast: ff.collect, each further batch", package="fisherfast", mean=True, limited=True)
def further_batch(model, x, y):
    stats = ff.collect(model, ff.Diagonal(), fisher_type="empirical")

    def run():
        with stats:
            stats.backward(loss_per_sample(model(x), y))
        return lambda: stats.result().diagonal()

    run()
    return run


@way("fisherfast: ff.collect, each further batch, and the step's gradients", package="fisherfast", mean=True)
def further_batch_with_gradients(model, x, y):
    stats = ff.collect(model, ff.Diagonal(), fisher_type="empirical", gradients=True)

    def run():
        model.zero_grad()
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


@way(LOOP, reference=True)
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


class OneBatch(Dataset):
    """A data set that hands over its batch whole, so that no collation is timed."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, _: list[int]) -> tuple[Tensor, Tensor]:
        return self.x, self.y


def whole(x: Tensor, y: Tensor) -> DataLoader:
    """The loader that a peer asks for, with this one batch."""
    return DataLoader(OneBatch(x, y), batch_size=len(x), collate_fn=lambda batch: batch)


@way("nngeometry", package="nngeometry", mean=True)
def nngeometry(model, x, y):
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag

    def function(x, y):
        return loss_per_sample(model(x), y)[:, None]

    def run():
        fisher = FIM(model, whole(x, y), PMatDiag, variant="regression", function=function)
        blocks = fisher.get_diag().split([p.numel() for p in model.parameters()])
        return {k: b.view_as(p) for (k, p), b in zip(model.named_parameters(), blocks, strict=True)}

    return run


def asdl_diagonal(model: nn.Module) -> Result:
    """What ASDL left at the modules, by parameter."""
    diagonals = {name: module.fisher.diag for name, module in model.named_modules() if hasattr(module, "fisher")}
    return {k: getattr(diagonals[k.rpartition(".")[0]], k.rpartition(".")[2]) for k, _ in model.named_parameters()}


@way(
    "ASDL",
    package="asdfghjkl",
    why={
        "decoder": "flattens positions into the batch: squares each position's gradient, not each sequence's",
        "all-cnn": PER_POSITION,
        "resnet18": PER_POSITION,
    },
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
        return asdl_diagonal(model)

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
