# SPDX-License-Identifier: Apache-2.0
"""More samples, images or rows of a table than the CPU's kernels take in one pass: exact in integers."""

from __future__ import annotations

from dataclasses import replace

import conv_cases
import pytest
import torch
from op_cases import NONFINITE, TARGETS, Shape, assert_exact, copies, problem

import fisherfast as ff
from fisherfast import _backend

every_target = pytest.mark.parametrize("target", TARGETS, ids=str)
compiled = pytest.mark.skipif("cpu" not in _backend.OPS["linear_sq_"].usable("cpu"), reason="fisherfast._C is not built")
CPU = {target.op: target for target in TARGETS if target.backend == "cpu"}


@compiled
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("op", ["linear_sq_", "scale_sq_", "embedding_sq_"])
def test_norms_and_weights_of_thousands_of_samples(op, ragged):
    """linear_sq_ takes 1024 at a time where norms are asked for; scale_sq_ 64 or more in a chunk."""
    case = problem(CPU[op], Shape(2100, 2, 3, 5), integers=True, weighted=True)
    if ragged:
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (torch.arange(2100) % 3).cumsum(0)])
        rows = int(offsets[-1])
        case = replace(case, first=case.first.flatten(0, 1)[:rows], g=case.g.flatten(0, 1)[:rows], offsets=offsets)
    assert_exact(case, "cpu")


@compiled
@pytest.mark.parametrize("ragged", [False, True])
def test_more_images_than_are_brought_at_a_time(ragged):
    """2 MiB of images: five of these."""
    shape = conv_cases.Geometry(11, 16, 2, (64, 64), (3, 3), before=(1, 1), after=(1, 1))
    target = CPU["linear_sq_"]._replace(op="conv_sq_")
    case = conv_cases.problem(target, shape, integers=True, weighted=True, ragged=ragged)
    case = replace(case, g=case.g * (torch.rand(case.g.shape) < 0.1))
    assert_exact(case, "cpu")


@compiled
@pytest.mark.parametrize("groups", [70, 300])
def test_many_groups_and_weighted_samples_of_a_depthwise_convolution(groups):
    shape = conv_cases.Geometry(21, groups, groups, (12,), (11,), before=(5,), after=(5,), dilation=(1,), groups=groups)
    target = CPU["linear_sq_"]._replace(op="conv_sq_")
    assert_exact(conv_cases.problem(target, shape, integers=True, weighted=True), "cpu")


@pytest.mark.parametrize(("dilation", "S"), [(1, 150), (2, 300)])
@compiled
def test_long_lines_of_a_depthwise_convolution_and_kernels_of_more_than_8_taps(dilation, S):
    shape = conv_cases.Geometry(2, 3, 3, (S,), (11,), dilation=(dilation,), before=(5,), after=(5,), groups=3)
    target = CPU["linear_sq_"]._replace(op="conv_sq_")
    assert_exact(conv_cases.problem(target, shape, integers=True, weighted=True), "cpu")


@pytest.mark.parametrize("V", [2048, 2049, 5000])
@pytest.mark.parametrize("target", [t for t in TARGETS if t.op == "embedding_sq_"], ids=str)
def test_tables_of_thousands_of_rows(target, V):
    """Ids of more than 11 bits, one digit of the sort."""
    case = problem(target, Shape(3, 40, 2, V), integers=True, weighted=True)
    case.first[:, ::3] %= 7
    case.first[:, 1::3] = case.first[:, 1::3] % 7 + V - 7
    if target.backend == "reference":
        pytest.skip("its own oracle")
    assert_exact(case, target.backend)


@pytest.mark.parametrize("value", NONFINITE, ids=str)
@pytest.mark.parametrize("asked", [("acc",), ("acc", "sqnorm"), ("acc", "total", "sqnorm")], ids=str)
@pytest.mark.parametrize("where", ["first", "g", "weight"])
@every_target
def test_flag_stops_samples_of_one_position(target, where, asked, value):
    case = problem(target, Shape(3, 1, 7, 11), weighted=True)
    if where == "first" and target.op == "embedding_sq_":
        pytest.skip("ids are integers")
    getattr(case, where).view(-1)[-1] = value
    outputs = {name: out for name, out in case.outputs(integers=True).items() if name in asked}
    flag, before = torch.zeros(1, dtype=torch.int32, device=target.device), copies(outputs)
    case.run(target.backend, outputs, flag=flag)
    assert flag.item() == 1 and all(torch.equal(outputs[name], before[name]) for name in outputs)


@pytest.mark.parametrize("shape", [Shape(3, 0, 7, 11), Shape(3, 5, 0, 11)], ids=str)
@every_target
def test_flag_is_raised_by_weights_of_nothing(target, shape):
    case = problem(target, shape, weighted=True)
    case.weight[1] = float("nan")
    flag = torch.zeros(1, dtype=torch.int32, device=target.device)
    case.run(target.backend, case.outputs(), flag=flag)
    assert flag.item() == 1


@pytest.mark.parametrize("backend", _backend.OPS["kron_log1p_sum"].usable("cpu"))
def test_kronecker_products_of_more_rows_than_a_tile(backend):
    """The CPU's have 64 rows of 1024 columns."""
    a, b = torch.rand(150, dtype=torch.float64), torch.rand(1100, dtype=torch.float64)
    acc, s = torch.zeros(2, dtype=torch.float64), a.unsqueeze(1) * b
    with ff.backend(backend):
        ff.ops.kron_log1p_sum(acc, a, b, 1.0)
    expected = torch.stack([s.log1p().sum(), (s.log1p() - s / (1 + s)).sum()])
    torch.testing.assert_close(acc, expected, rtol=1e-12, atol=0)
