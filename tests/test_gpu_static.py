# SPDX-License-Identifier: Apache-2.0
"""The static report: how many blocks fit, what a call must do at least, and a page that is what its results say."""

import json
import re
from pathlib import Path

import machine_code
import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def static(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    from gpu import static

    return static


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "target", "blocks", "limit"),
    [
        (32, 256, 0, "sm_90", 8, "warps"),
        (128, 256, 0, "sm_90", 2, "registers"),
        (129, 256, 0, "sm_90a", 1, "registers, dealt out 256 a warp"),
        (255, 256, 0, "sm_80", 1, "registers"),
        (168, 384, 0, "sm_90", 1, "registers"),
        (16, 32, 0, "sm_100", 32, "blocks"),
        (32, 128, 100 * 1024, "sm_90", 2, "shared memory"),
        (32, 128, 100 * 1024, "sm_80", 1, "shared memory"),
        (32, 128, 227 * 1024, "sm_90", 1, "shared memory, all of it"),
        (32, 128, 164 * 1024, "sm_80", 0, "more than a block may ask for"),
    ],
)
def test_blocks_at_once(static, registers, threads, shared, target, blocks, limit):
    assert static.blocks_at_once(registers, threads, shared, target) == blocks, limit
    assert static.occupancy(registers, threads, shared, target) == blocks * (threads // 32) / 64


def test_least_work_counts_products_and_every_byte_once(static):
    arguments = {
        "acc": ([5, 7], "float32"),
        "x": ([2, 3, 7], "bfloat16"),
        "g": ([2, 3, 5], "bfloat16"),
        "weight": ([2], "float32"),
    }
    assert static.work("linear_sq bf16 T=3", arguments) == static.cost.Cost(
        2 * 2 * 3 * 5 * 7, 2 * 4 * 35 + 2 * 42 + 2 * 30 + 8, "bf16"
    )
    arguments = {"acc": ([7, 7], "float32"), "x": ([3, 7], "float32")}
    assert static.work("gram fp32 rows", arguments) == static.cost.Cost(3 * 7 * 8, 4 * 21 + 2 * 4 * 28, "fp32 as bf16x6")
    arguments = {"acc": ([100, 4], "float32"), "ids": ([2, 3], "int64"), "g": ([2, 3, 4], "bfloat16")}
    assert static.work("embedding_sq bf16", arguments) == static.cost.Cost(24, 2 * 4 * 6 * 4 + 8 * 6 + 2 * 24, "fp32")


def test_least_seconds_is_the_slower_of_arithmetic_and_memory(static):
    rate, copy = static.LEADS["bf16"], static.LEADS["copy"]
    assert static.least_seconds(static.cost.Cost(int(rate), int(copy / 2), "bf16")) == (1.0, "bf16")
    assert static.least_seconds(static.cost.Cost(int(rate), int(2 * copy), "bf16")) == (2.0, "copy")


def test_every_stored_call_has_its_least_work(static):
    for row in json.loads(static.RESULTS.read_text())["triton"]:
        assert static.work(row["call"], row["arguments"]).flops > 0


def test_page_equals_its_results(static):
    assert static.render(json.loads(static.RESULTS.read_text())) == static.PAGE.read_text(), (
        "run python bench/gpu/static.py --page"
    )


def test_page_shows_every_op_and_every_kernel(static):
    found = json.loads(static.RESULTS.read_text())
    text = static.PAGE.read_text()
    assert {row["kernel"].strip("_") for row in found["triton"]} | {row["kernel"] for row in found["cuda"]} <= set(
        re.findall(r"`([^`]*)`", text)
    )


def test_instructions_are_read_with_their_modifiers():
    listing = """
        /*0a20*/                   LDGSTS.E.BYPASS.128 [R33+0x10000], desc[UR30][R14.64], P1 ;
        /*2c00*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8].tnspA.tnspB, R24 ;
        /*2c10*/              @!P0 LDG.E.128 R4, desc[UR30][R2.64] ;
        /*2c20*/              @UP1 UTMALDG.2D [UR8], [UR4] ;
        /*2c30*/                   LDL R1, [R2] ;
"""
    found = machine_code.opcodes(listing)
    assert machine_code.summary(found) == {
        "matrix": {"HGMMA.64x128x16.F32.BF16": 1},
        "copies": {"LDGSTS.E.BYPASS.128": 1, "UTMALDG.2D": 1},
        "loads": {"LDG.E.128": 1},
        "local_accesses": 1,
        "atomics": 0,
        "instructions": 5,
    }


@pytest.mark.parametrize("folder", ["kernels", "csrc"])
def test_report_is_of_these_sources(static, folder):
    """Run ``python bench/gpu/static.py`` (four minutes) after a change of either; what it says of every target is tested."""
    import origin

    assert json.loads(static.RESULTS.read_text())["sha256"][folder] == origin.sources_sha256(static.ROOT / folder)


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_100"])
def test_cuda_kernels_of_every_target_neither_spill_nor_use_atomics(static, target):
    rows = [row for row in json.loads(static.RESULTS.read_text())["cuda"] if row["target"] == target]
    assert len(rows) >= 39
    assert [row for row in rows if row["local_bytes"] or row["local_accesses"] or row["atomics"]] == []
