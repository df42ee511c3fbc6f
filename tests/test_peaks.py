# SPDX-License-Identifier: Apache-2.0
"""The peak of a run with a large vocabulary: three tensors as large as the logits, as in a plain step, and none of them in float32."""

import subprocess
import sys
from pathlib import Path

import networks
import pytest
import torch
import torch.nn.functional as F
from allocations import peak_bytes
from torch import nn

import fisherfast as ff
from fisherfast._pieces import PIECE, pieces
from fisherfast.capture import layout, tagging
from fisherfast.fisher.run.dependence import dependent, same_but_rounding
from fisherfast.fisher.run.exploration import noise

V, D, MIB = 2**15, 16, 2**20
PIECES = 8 * PIECE  # one and what is made of it, in bytes


def without_table():
    return nn.Sequential(nn.Embedding(V, D), nn.Linear(D, V, bias=False))


def with_table():
    """The table has no sample axis, so that samples are looked at one by one."""
    table, embedding, head = nn.Embedding(512, D), nn.Embedding(V, D), nn.Linear(D, V, bias=False)
    return networks.Wrapped(
        lambda m, x: m.head(m.embedding(x) + m.table(torch.arange(x.shape[1]))), table=table, embedding=embedding, head=head
    )


@pytest.mark.parametrize(
    ("build", "N", "T", "batches", "options"),
    [
        (without_table, 4, 128, 1, {"fisher_type": "empirical"}),  # all samples are the few of the first look
        (without_table, 4, 128, 1, {"draws": 2}),
        (without_table, 64, 8, 3, {"fisher_type": "empirical"}),  # whose rows are whose is looked at again
        (with_table, 64, 8, 2, {"draws": 2}),
    ],
)
def test_a_run_takes_what_its_plan_says_and_little_more_than_a_plain_step(build, N, T, batches, options):
    model, x, y = build().bfloat16().eval(), torch.randint(V, (N, T)), torch.randint(V, (N, T))
    for parameter in list(model.parameters())[:-1]:
        parameter.requires_grad_(build is with_table and parameter.shape[0] == 512)
    planned = ff.plan(model, (x, y), **options)

    def plain():
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").backward()

    plain_peak = peak_bytes(plain)
    peak = peak_bytes(lambda: ff.fisher(model, [(x, y)] * batches, progress=False, **options))
    assert peak <= planned.needed_bytes + PIECES
    assert peak <= plain_peak + planned.peak_bytes + 64 * MIB


def test_pieces_are_the_tensor():
    for shape in ((3, 2, PIECE // 2 + 5), (2, PIECE + 1), (5, 7), (PIECE + 3,), (7, PIECE // 4), (0, 3)):
        whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32)
        parts = list(pieces(whole.view(shape)))
        assert torch.equal(torch.cat([part.flatten() for part in parts]), whole)
        assert all(part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for part in parts)
        assert all(part.numel() <= max(PIECE, shape[-1]) for part in parts)


def test_sizes_of_rows_are_the_same_in_pieces():
    g = noise(torch.empty(3, 5, PIECE // 4, dtype=torch.bfloat16))
    largest, total = layout._sizes(g, 1)
    assert torch.equal(largest, g.abs().amax(-1).double()) and torch.equal(total, g.abs().sum(-1, dtype=torch.float32).double())
    moments = g.float().mean(), g.float().var()
    assert torch.allclose(torch.stack(moments), torch.tensor([0.0, 1.0]), atol=5e-3)


def test_rows_left_out_are_found_in_pieces():
    g, out = torch.zeros(6, PIECE // 4, dtype=torch.bfloat16), torch.tensor([True, False] * 3)
    for row in range(6):
        g.zero_()[row, -1] = 1
        assert bool(tagging._any(g, out)) == bool(out[row])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of resident memory are Linux's")
def test_the_memory_of_a_piece_is_the_next_ones():
    """As the system sees it, with the allocator it comes with: a tensor that stays between two pieces would cost as much as they."""
    script = (
        "import re, torch\nfrom fisherfast.capture import layout\n"
        "def resident(of): return 1024 * int(re.search(of + r':\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "g = torch.ones(2048, 2**15, dtype=torch.bfloat16)\nlayout._sizes(g[:8], 1)\n"
        "open('/proc/self/clear_refs', 'w').write('5')\nbefore = resident('VmRSS')\n"
        "layout._sizes(g, 1)\nprint(resident('VmHWM') - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert int(run.stdout) < 2 * 2048 * 2**15  # what g takes; no piece in the place of another takes three times that


def test_outputs_that_round_differently_are_compared_in_little_memory():
    values = torch.randn(2, 256, V).bfloat16()  # 32 MiB
    other = torch.where(torch.rand(values.shape) < 0.1, values * (1 + 2**-8), values)
    eps = torch.finfo(torch.bfloat16).eps
    assert not torch.equal(values, other)
    assert peak_bytes(lambda: same_but_rounding(other, values, eps)) <= 3 * values.nbytes + PIECES
    assert same_but_rounding(other, values, eps) and not same_but_rounding(values.roll(1, 0), values, eps)
    batch = ff.data.batches.Batch.of((torch.zeros(2, 1), torch.zeros(2)), torch.device("cpu"), nn.Linear(1, 1))
    assert peak_bytes(lambda: dependent(lambda few: other, batch, values, eps)) <= 3 * values.nbytes / 2 + PIECES
