# SPDX-License-Identifier: Apache-2.0
"""The ways to KFAC's factors over the data's labels: see ``ways.py``; ``ekfac.py`` takes up from here.

A result is ``{"LAYER A": [I, I], "LAYER B": [O, O]}`` of the Linear layers and 2d convolutions, scaled as ours:
``A = sum_{n,t} x x^T / (N T)``, ``B = sum_{n,t} g g^T / N``. The bias's column of A, which all but BackPACK add, is not compared.
Peers are asked for these layers only; ours measures every parameter in the same pass.
"""

from __future__ import annotations

import copy
import math
import tempfile
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import ways
from models import loss_per_sample
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import fisherfast as ff

Factors = dict[str, tuple[Tensor, Tensor]]
HOOKS = "plain torch: hooks, unfold, mm"
way = partial(ways.way, quantity="kfac")


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that are compared."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}


def compared(model: nn.Module, factors: Factors) -> ways.Result:
    """The factors of these layers, without the bias's column."""
    result = {}
    for name, layer in layers(model).items():
        if name in factors:
            A, B = factors[name]
            I = layer.weight[0].numel()
            result |= {f"{name} A": A[:I, :I], f"{name} B": B}
    return result


def uses(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each layer the rows of its inputs ``[N, T, I]``, ones for a bias behind them, and of its output gradients ``[N, T, O]``."""
    seen = {}

    def keep(name: str, _: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
        seen[name] = (given[0].detach(), out)

    found = layers(model)
    handles = [layer.register_forward_hook(partial(keep, name)) for name, layer in found.items()]
    loss = loss_per_sample(model(x), y).sum()
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(loss, [seen[name][1] for name in found])
    return {name: _rows(layer, seen.pop(name)[0], g) for (name, layer), g in zip(found.items(), gradients, strict=True)}


def _rows(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(layer, nn.Conv2d):
        x = functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
        g = g.flatten(2).mT
    elif x.dim() == 2:
        x, g = x.unsqueeze(1), g.unsqueeze(1)
    return x if layer.bias is None else functional.pad(x, (0, 1), value=1.0), g


def factors(rows: dict[str, tuple[Tensor, Tensor]]) -> Factors:
    """A and B of the rows of ``uses``, which are taken out one layer at a time."""
    found = {}
    for name in list(rows):
        x, g = rows.pop(name)
        N, T = g.shape[:2]
        x, g = x.flatten(0, 1), g.flatten(0, 1)
        found[name] = (x.mT @ x / (N * T), g.mT @ g / N)
    return found


def positions(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, int]:
    """T of each layer, by which the peers' scales differ."""
    return {name: g.shape[1] for name, (_, g) in uses(model, x, y).items()}


@way("fisherfast: ff.collect, each further batch", package="fisherfast", limited=True)
def further_batch(model, x, y):
    stats = ff.collect(model, ff.KFAC(), fisher_type="empirical")

    def run():
        with stats:
            stats.backward(loss_per_sample(model(x), y))
        return lambda: compared(model, stats.result().factors())

    run()
    return run


@way("fisherfast: ff.fisher, one batch from start to result", package="fisherfast")
def one_call(model, x, y):
    def run():
        result = ff.fisher(model, [(x, y)], structure="kfac", fisher_type="empirical", progress=False)
        return lambda: compared(model, result.factors())

    return run


@way(HOOKS, reference=True)
def hooks(model, x, y):
    return lambda: compared(model, factors(uses(model, x, y)))


@way(
    "BackPACK, KFAC",
    package="backpack-for-pytorch",
    why=dict.fromkeys(("all-cnn", "resnet18"), "and of convolutions it sums g over the positions first, which makes another B")
    | {"decoder": "it has no rule for Linear layers of sequences"},
)
def backpack(model, x, y):
    from backpack import backpack as extensions
    from backpack import extend
    from backpack.core.derivatives.crossentropyloss import CrossEntropyLossDerivatives
    from backpack.extensions import KFAC
    from backpack.extensions.secondorder.hbp.losses import HBPLoss

    class OfTheData(CrossEntropyLossDerivatives):
        """BackPACK draws its labels from the model. Given those of the data instead, its factors can be compared."""

        def compute_sampled_grads(self, subsampled_input, mc_samples):
            return (subsampled_input.softmax(1) - functional.one_hot(y, subsampled_input.shape[1])).unsqueeze(0)

    names = list(layers(model))
    model, loss, kfac = extend(model), extend(nn.CrossEntropyLoss()), KFAC()
    kfac.set_module_extension(nn.CrossEntropyLoss, HBPLoss(OfTheData()), overwrite=True)

    def run():
        model.zero_grad()
        with extensions(kfac):
            loss(model(x), y).backward()
        return compared(model, {name: model.get_submodule(name).weight.kfac[::-1] for name in names})

    return run


def nngeometry_options(model: nn.Module) -> dict[str, Any]:
    """What makes its Fisher that of the data's labels and of these layers: it has KFAC for no others."""
    from nngeometry.layercollection import LayerCollection

    collection = LayerCollection()
    for layer in layers(model).values():
        collection.add_layer_from_model(model, layer)

    def function(x, y):
        return loss_per_sample(model(x), y)[:, None]

    return {"variant": "regression", "function": function, "layer_collection": collection}


@way("nngeometry, PMatKFAC", package="nngeometry", why={"decoder": "it differentiates by the inputs, which are integers here"})
def nngeometry(model, x, y):
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatKFAC

    T, options = positions(model, x, y), nngeometry_options(model)

    def run():
        blocks = FIM(model, ways.whole(x, y), PMatKFAC, **options).data
        # Over the positions of a convolution its A is a sum, its B a mean.
        return lambda: compared(model, {name: (A / T[name], B * T[name]) for name, (A, B) in blocks.items()})

    return run


@way("ASDL, SHAPE_KRON", package="asdfghjkl")
def asdl(model, x, y):
    from asdl import FISHER_EMP, SHAPE_KRON
    from asdl.fisher import FisherConfig, get_fisher_maker

    def loss(logits, y, reduction):  # called with reduction="sum"
        return loss_per_sample(logits, y).sum()

    T, found = positions(model, x, y), layers(model)
    rest = [module for module in model.modules() if not list(module.children()) and module not in found.values()]
    config = FisherConfig(fisher_type=FISHER_EMP, fisher_shapes=[SHAPE_KRON], data_size=len(x), ignore_modules=rest)
    maker = get_fisher_maker(model, config)

    def mean(name):  # over the positions of a convolution its A is a mean, over those of a Linear layer a sum
        kron = found[name].fisher.kron
        return kron.A if isinstance(found[name], nn.Conv2d) else kron.A / T[name], kron.B

    def run():
        logits = maker.setup_model_call(model, x)
        maker.setup_loss_call(loss, logits, y)
        maker.forward_and_backward()
        return lambda: compared(model, {name: mean(name) for name in found})

    return run


class ClassesSecond(nn.Module):
    """The model with its classes on axis 1, where ``CrossEntropyLoss`` looks for those of sequences."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C]`` as it is, ``[N, T, C]`` to ``[N, C, T]``."""
        logits = self.model(x)
        return logits if logits.dim() == 2 else logits.mT


def curvlinops_operator(operator: type, model: nn.Module, x: Tensor, y: Tensor) -> Any:
    """One of curvlinops's, over these layers and this batch, spared every pass that is not needed."""
    return operator(
        ClassesSecond(model),
        nn.CrossEntropyLoss(),
        [p for layer in layers(model).values() for p in layer.parameters()],
        [(x, y)],
        fisher_type="empirical",
        check_deterministic=False,
        num_data=len(x),
        num_per_example_loss_terms=math.prod(y.shape[1:]),
        separate_weight_and_bias=False,
    )


@way("curvlinops, KFACLinearOperator", package="curvlinops-for-pytorch")
def curvlinops(model, x, y):
    from curvlinops import KFACLinearOperator

    terms = math.prod(y.shape[1:])

    def run():
        operator = curvlinops_operator(KFACLinearOperator, model, x, y)
        operator.compute_kronecker_factors()
        state = operator.state_dict()
        pairs = {name: (A, state["gradient_covariances"][name]) for name, A in state["input_covariances"].items()}
        # Its B is a mean over the loss terms of a sample too.
        return lambda: compared(model, {name.removeprefix("model."): (A, B * terms) for name, (A, B) in pairs.items()})

    return run


@dataclass
class Kronfluence:
    """kronfluence on one batch: its factors go through files, which it has no way around, in a folder of their own."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.task import Task

        names = list(layers(self.model))

        class OfTheData(Task):
            """Its Fisher's labels are those of the data."""

            def compute_train_loss(self, batch, model, sample=False):
                return loss_per_sample(model(batch[0]), batch[1]).sum()

            def compute_measurement(self, batch, model):
                raise NotImplementedError  # abstract in Task; only influence scores call it

            def get_influence_tracked_modules(self):
                return names

        self.folder = tempfile.TemporaryDirectory()
        task = OfTheData()
        options = {"output_dir": self.folder.name, "disable_tqdm": True, "disable_model_save": True, "cpu": True}
        self.analyzer = Analyzer("bench", prepare_model(self.model, task), task, **options)
        self.given = {"factors_name": "all", "overwrite_output_dir": True}
        self.batch = {"dataset": TensorDataset(self.x, self.y), "per_device_batch_size": len(self.x)}
        self.arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True)

    def covariances(self) -> dict[str, dict[str, Tensor]]:
        """Its factors."""
        self.analyzer.fit_covariance_matrices(**self.given, **self.batch, factor_args=self.arguments)
        return self.analyzer.load_covariance_matrices("all")


@way("kronfluence, fit_covariance_matrices", package="kronfluence")
def kronfluence(model, x, y):
    before = copy.deepcopy(model)  # it wraps the layers
    found = Kronfluence(model, x, y)

    def run():
        sums = found.covariances()
        rows = sums["num_activation_covariance_processed"]
        pairs = {
            name: (A / rows[name], sums["gradient_covariance"][name] / len(x))
            for name, A in sums["activation_covariance"].items()
        }
        return lambda: compared(before, pairs)

    return run
