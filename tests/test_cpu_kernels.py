# SPDX-License-Identifier: Apache-2.0
"""Every instruction set that this processor has gives results inside the numerical gate, whatever the number of threads."""

import fisherfast._C
import pytest
import torch

import fisherfast as ff

ISAS = ("portable", "avx2", "avx512")
SHAPES = [(7, 5, 3, 11), (3, 1, 13, 17), (5, 131, 53, 101), (67, 1, 97, 61), (2, 300, 49, 8)]


@pytest.fixture(params=ISAS)
def isa(request):
    """Force one instruction set for a test; those the processor lacks are skipped."""
    force = torch.ops.fisherfast_cpp.cpu_isa
    best = force(None)
    if ISAS.index(request.param) > ISAS.index(best):
        pytest.skip(f"this processor has {best}, not {request.param}")
    assert force(request.param) == request.param
    yield request.param
    assert force(best) == best


def run(x, g, threads=2):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        acc = torch.zeros(g.shape[-1], x.shape[-1])
        with ff.backend("cpu"):
            ff.ops.linear_sq_(acc, x, g)
        return acc
    finally:
        torch.set_num_threads(before)


def assert_gate(value, plain, exact):
    top = exact.abs().max()
    assert (value - exact).abs().max() / top <= 2 * (plain - exact).abs().max() / top + 1e-7


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_sq_matches_float64(isa, shape):
    N, T, I, O = shape
    x, g = torch.randn(N, T, I), torch.randn(N, T, O)
    exact = torch.einsum("nto,nti->noi", g.double(), x.double()).square().sum(0)
    assert_gate(run(x, g), torch.einsum("nto,nti->noi", g, x).square().sum(0), exact)


def test_linear_sq_repeats_bit_by_bit(isa):
    x, g = torch.randn(13, 7, 19), torch.randn(13, 7, 23)
    assert torch.equal(run(x, g), run(x, g))


@pytest.mark.parametrize("threads", [1, 3])
def test_linear_sq_within_the_gate_for_any_number_of_threads(isa, threads):
    x, g = torch.randn(5, 37, 211), torch.randn(5, 37, 307)
    exact = torch.einsum("nto,nti->noi", g.double(), x.double()).square().sum(0)
    assert_gate(run(x, g, threads), torch.einsum("nto,nti->noi", g, x).square().sum(0), exact)


def test_scale_sq_and_embedding_sq_match_float64(isa):
    g, ids = torch.randn(13, 7, 23), torch.randint(0, 5, (13, 7))
    one_hot = torch.nn.functional.one_hot(ids, 5)
    scale, table = torch.zeros(23), torch.zeros(5, 23)
    with ff.backend("cpu"):
        ff.ops.scale_sq_(scale, None, g)
        ff.ops.embedding_sq_(table, ids, g)
    assert_gate(scale, g.sum(1).square().sum(0), g.double().sum(1).square().sum(0))
    plain, exact = (torch.einsum("ntv,ntd->nvd", one_hot.to(h.dtype), h).square().sum(0) for h in (g, g.double()))
    assert_gate(table, plain, exact)
