# SPDX-License-Identifier: Apache-2.0
"""The ways to EKFAC of one batch over the data's labels, whole ("ekfac") or its second pass alone ("ekfac correction").

The corrected eigenvalues are ``sum_n (V^T G_n U)^2 / N``, U and V the eigenvectors of the factors of ``kfac.py``. Eigenvectors of
(nearly) equal eigenvalues are free to turn, so a result is what hardly depends on that: of each layer the sum of its corrected
eigenvalues, which is the trace of the exact Fisher in every basis, and the root of their squares' sum, the EKFAC's Frobenius norm.
"""

from __future__ import annotations

from typing import Any

import kfac
import torch
import ways
from models import loss_per_sample
from torch import Tensor, nn

import fisherfast as ff
from fisherfast.fisher.blocks.eigen import eigenbasis

Bases = dict[str, tuple[Tensor, Tensor]]


def compared(eigenvalues: dict[str, Tensor]) -> ways.Result:
    """What is compared of the corrected eigenvalues of each layer."""
    sums = {f"{name} trace": values.double().sum() for name, values in eigenvalues.items()}
    return sums | {f"{name} norm": values.double().norm() for name, values in eigenvalues.items()}


def of_layers(model: nn.Module, fisher: ff.EKFACFisher) -> ways.Result:
    """The same of ours."""
    found = {spectrum.layer: spectrum.factors[0] for spectrum in fisher.spectra()}
    return compared({name: found[name] for name in kfac.layers(model)})


@ways.way("fisherfast: ff.fisher, one batch from start to result", package="fisherfast", quantity="ekfac", limited=True)
def whole(model, x, y):
    options = {"structure": "ekfac", "fisher_type": "empirical", "progress": False}

    def run():
        result = ff.fisher(model, [(x, y)], **options)
        return lambda: of_layers(model, result)

    return run


def _basis(model: nn.Module, x: Tensor, y: Tensor) -> ff.KFACFisher:
    with ff.collect(model, ff.KFAC(keep_rows=True), fisher_type="empirical") as stats:
        stats.backward(loss_per_sample(model(x), y))
    return stats.result()


@ways.way("fisherfast: ff.collect, each further batch", package="fisherfast", quantity="ekfac correction", limited=True)
def further_batch(model, x, y):
    stats = ff.collect(model, ff.EKFAC(basis=_basis(model, x, y)), fisher_type="empirical")

    def run():
        with stats:
            stats.backward(loss_per_sample(model(x), y))
        return lambda: of_layers(model, stats.result())

    run()
    return run


def bases(factors: kfac.Factors) -> Bases:
    """Eigenvectors of A and B."""
    return {name: (torch.linalg.eigh(A).eigenvectors, torch.linalg.eigh(B).eigenvectors) for name, (A, B) in factors.items()}


def corrected(rows: dict[str, tuple[Tensor, Tensor]], bases: Bases) -> dict[str, Tensor]:
    """Rotates the rows of ``kfac.uses``, then multiplies and squares sample by sample: half the time of rotating gradients."""
    found = {}
    for name, (U, V) in bases.items():
        x, g = rows.pop(name)
        values = U.new_zeros(len(V), len(U))
        for x_n, g_n in zip(x @ U, g @ V, strict=True):
            gradient = g_n.mT @ x_n
            values.addcmul_(gradient, gradient)
        found[name] = values / len(g)
    return found


@ways.way("plain torch: hooks, eigh, rotated rows", quantity="ekfac", reference=True)
def hooks(model, x, y):
    return lambda: compared(corrected(kfac.uses(model, x, y), bases(kfac.factors(kfac.uses(model, x, y)))))


@ways.way("plain torch: hooks, rotated rows", quantity="ekfac correction", reference=True)
def hooks_correction(model, x, y):
    basis = bases(kfac.factors(kfac.uses(model, x, y)))
    return lambda: compared(corrected(kfac.uses(model, x, y), basis))


def _nngeometry(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatEKFAC

    return FIM(model, ways.whole(x, y), PMatEKFAC, **kfac.nngeometry_options(model))


def _updated(ekfac: Any, x: Tensor, y: Tensor) -> ways.Result:
    ekfac.update_diag(ways.whole(x, y))
    return compared(ekfac.data[1])


@ways.way("nngeometry, PMatEKFAC", package="nngeometry", quantity="ekfac")
def nngeometry(model, x, y):
    return lambda: _updated(_nngeometry(model, x, y), x, y)


@ways.way("nngeometry, PMatEKFAC.update_diag", package="nngeometry", quantity="ekfac correction")
def nngeometry_correction(model, x, y):
    ekfac = _nngeometry(model, x, y)
    return lambda: _updated(ekfac, x, y)


def _curvlinops(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    from curvlinops import EKFACLinearOperator

    operator = kfac.curvlinops_operator(EKFACLinearOperator, model, x, y)
    operator.compute_kronecker_factors()
    operator.compute_eigenvalue_correction()
    return operator


def _eigenvalues(operator: Any) -> ways.Result:
    """A layer without a bias has them by the position of its weight."""
    found = operator.state_dict()["corrected_eigenvalues"].items()
    whole = {name: next(iter(values.values())) if isinstance(values, dict) else values for name, values in found}
    return compared({name.removeprefix("model."): values for name, values in whole.items()})


@ways.way("curvlinops, EKFACLinearOperator", package="curvlinops-for-pytorch", quantity="ekfac")
def curvlinops(model, x, y):
    return lambda: _eigenvalues(_curvlinops(model, x, y))


@ways.way("curvlinops, its correction", package="curvlinops-for-pytorch", quantity="ekfac correction")
def curvlinops_correction(model, x, y):
    operator = _curvlinops(model, x, y)

    def run():
        operator._corrected_eigenvalues.clear()  # it would add to them
        operator.compute_eigenvalue_correction()
        return _eigenvalues(operator)

    return run


def _of_bases(factors: kfac.Factors, bases: Bases) -> ways.Result:
    """What is compared of eigenvectors: each factor's diagonal in them, as ``compared`` does."""
    pairs = {f"{name} {k}": (F, U) for name in bases for k, F, U in zip("AB", factors[name], bases[name], strict=True)}
    return compared({name: ((F @ U) * U).sum(0) for name, (F, U) in pairs.items()})


@ways.way("fisherfast: its bases, of few rows where they are", package="fisherfast", quantity="ekfac bases")
def our_bases(model, x, y):
    found = _basis(model, x, y)
    blocks = {block.place.weight.removesuffix(".weight"): block for block in found.blocks}
    chosen = {name: blocks[name] for name in kfac.layers(model)}

    def run():
        each = {
            name: (
                eigenbasis(b.A.mean(), b.few_rows[0], torch.float32)[0],
                eigenbasis(b.B.mean(), b.few_rows[1], torch.float32)[0],
            )
            for name, b in chosen.items()
        }
        return lambda: _of_bases(
            {name: (b.A.mean(torch.float32)[0], b.B.mean(torch.float32)[0]) for name, b in chosen.items()}, each
        )

    return run


@ways.way("plain torch: eigh of both factors", quantity="ekfac bases", reference=True)
def eigh(model, x, y):
    factors = kfac.factors(kfac.uses(model, x, y))

    def run():
        each = bases(factors)
        return lambda: _of_bases(factors, each)

    return run


def _lambdas(found: kfac.Kronfluence) -> ways.Result:
    lambdas = found.analyzer.load_lambda_matrices("all")
    return compared({name: values / len(found.x) for name, values in lambdas["lambda_matrix"].items()})


@ways.way("kronfluence, fit_all_factors", package="kronfluence", quantity="ekfac")
def kronfluence(model, x, y):
    found = kfac.Kronfluence(model, x, y)

    def run():
        found.analyzer.fit_all_factors(**found.given, **found.batch, factor_args=found.arguments)
        return _lambdas(found)

    return run


@ways.way("kronfluence, fit_lambda_matrices", package="kronfluence", quantity="ekfac correction")
def kronfluence_correction(model, x, y):
    found = kfac.Kronfluence(model, x, y)
    found.analyzer.fit_all_factors(**found.given, **found.batch, factor_args=found.arguments)

    def run():
        found.analyzer.fit_lambda_matrices(**found.given, **found.batch, factor_args=found.arguments)
        return _lambdas(found)

    return run
