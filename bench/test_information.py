# SPDX-License-Identifier: Apache-2.0
"""The nats of a diagonal of 100 million entries beside a copy of as many bytes as it must read: gated by plain torch, then timed."""

from functools import partial

import information
import measure
import pytest
import torch

import fisherfast as ff

SHAPES = {f"{i}.weight": (5000, 5000) for i in range(4)}
SECONDS = 20.0
OPTIONS = {"given": {"prior_scale": 0.02}, "fit": {"prior_scale": "fit"}}


def plain(F, weights, scales):
    """The formula in float64, a parameter at a time."""
    total = 0.0
    for name, f in F.diagonal(dtype=torch.float64).items():
        s = f * (scales[name] ** 2 / information.BETA)
        total += (weights[name].double().square().sum() / (2 * scales[name] ** 2) + (s.log1p() - s / (1 + s)).sum() / 2).item()
    return total


@pytest.mark.parametrize("case", OPTIONS)
def test_information(case, benchmark):
    F, weights = information.inputs(SHAPES)
    run = partial(ff.information_in_weights, F, weights, beta=information.BETA, **OPTIONS[case])
    info = run()
    assert info.nats == pytest.approx(plain(F, weights, info.prior_scales), rel=1e-10)
    read = (8 + 2) * F.num_parameters
    source, target = torch.zeros(read // 2, dtype=torch.int8), torch.zeros(read // 2, dtype=torch.int8)
    benchmark.extra_info |= {"information": case, "parameters": F.num_parameters, "nats": info.nats}
    measure.interleaved(benchmark, run, {"copy": partial(target.copy_, source)}, SECONDS)
