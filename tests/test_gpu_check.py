# SPDX-License-Identifier: Apache-2.0
"""The GPU check's arithmetic, and what it does where there is no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
CEILINGS = {"copy": 4e12, "bf16": 8e14, "tf32": 4e14, "fp32": 5e13}


@pytest.fixture
def cost(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    from gpu import cost

    return cost


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_check

    return gpu_check


def test_linear_counts_products_and_every_byte_once(cost):
    N, T, I, O = 2, 3, 5, 7
    found = cost.linear(N, T, I, O, element=2)
    assert found.flops == sum(2 for _ in range(N * T * I * O))
    assert found.bytes == 2 * (N * T * I) + 2 * (N * T * O) + 4 * (O * I) * 2


@pytest.mark.parametrize(("T", "element", "rate"), [(3, 2, "bf16"), (1, 2, "fp32"), (3, 4, "fp32"), (1, 4, "fp32")])
def test_linear_runs_on_tensor_cores_only_for_16_bit_products(cost, T, element, rate):
    assert cost.linear(2, T, 5, 7, element).rate == rate


def test_scale_reads_x_only_where_there_is_one(cost):
    with_x, without = cost.scale(2, 3, 5, 4, True), cost.scale(2, 3, 5, 4, False)
    assert (with_x.flops, without.flops) == (60, 30)
    assert (with_x.bytes, without.bytes) == (240 + 40, 120 + 40)


def test_embedding_touches_only_the_rows_that_occur(cost):
    found = cost.embedding(2, 3, 5, element=2, touched=4)
    assert found.flops == 30
    assert found.bytes == 6 * 8 + 30 * 2 + 2 * 4 * 4 * 5


@pytest.mark.parametrize(("element", "rate"), [(2, "bf16"), (4, "fp32")])
def test_gram_counts_the_upper_triangle(cost, element, rate):
    found = cost.gram(3, 5, element)
    upper = [(i, j) for i in range(5) for j in range(i, 5)]
    assert found == cost.Cost(2 * 3 * len(upper), element * 15 + 2 * 4 * len(upper), rate)


def test_bound_is_the_slower_of_arithmetic_and_memory(cost):
    arithmetic = cost.Cost(flops=8 * 10**14, bytes=10**12, rate="bf16")
    assert cost.bound(arithmetic, CEILINGS) == cost.Bound(1.0, "bf16")
    memory = cost.Cost(flops=8 * 10**14, bytes=8 * 10**12, rate="bf16")
    assert cost.bound(memory, CEILINGS) == cost.Bound(2.0, "copy")


def test_fraction_is_one_at_the_bound_and_halves_with_twice_the_time(cost):
    work = cost.linear(8, 1024, 4096, 4096, 2)
    least = cost.bound(work, CEILINGS).seconds
    assert cost.fraction(work, CEILINGS, least) == 1.0
    assert cost.fraction(work, CEILINGS, 2 * least) == 0.5


@pytest.mark.parametrize(
    ("error", "plain", "good"), [(2e-7, 1e-7, True), (3e-7, 1e-7, True), (3.1e-7, 1e-7, False), (1e-7, 0.0, True)]
)
def test_gate(cost, error, plain, good):
    assert cost.passes(error, plain) is good


def test_a_result_that_is_not_a_number_does_not_pass(cost):
    assert not cost.passes(float("nan"), 1.0)


def test_names(cost):
    assert cost.slug("NVIDIA H200") == "nvidia-h200"
    assert cost.slug("NVIDIA A100-SXM4-80GB ") == "nvidia-a100-sxm4-80gb"
    assert [cost.architecture(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0))] == ["8.0", "8.9", "9.0a", "10.0a"]


def test_source_digest_sees_names_and_contents_but_not_caches(cost, tmp_path):
    (tmp_path / "a.cu").write_text("kernel")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.cu").write_text("other")
    first = cost.sources_sha256(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_text("cache")
    assert cost.sources_sha256(tmp_path) == first
    (tmp_path / "a.cu").write_text("kernel 2")
    assert cost.sources_sha256(tmp_path) != first
    (tmp_path / "a.cu").write_text("kernel")
    (tmp_path / "a.cu").rename(tmp_path / "c.cu")
    assert cost.sources_sha256(tmp_path) != first


def test_a_process_that_fails_or_outlasts_its_time_fails_the_stage(check, tmp_path):
    def outcome(code, seconds=60.0):
        with (tmp_path / "log").open("w") as log:
            return check.run(check.Command([sys.executable, "-c", code], {"GIVEN": "yes"}), seconds, log)

    assert outcome("import os; print('said', os.environ['GIVEN'])")
    assert (tmp_path / "log").read_text() == "said yes\n"
    assert not outcome("raise SystemExit(3)")
    assert not outcome("import time; time.sleep(60)", seconds=0.5)


def test_a_missing_program_fails_the_stage_and_is_named(check, tmp_path):
    with (tmp_path / "log").open("w") as log:
        assert not check.run(check.Command(["no-such-sanitizer"], {}), 60, log)
    assert "no-such-sanitizer is not on this machine" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("name", ["test", "sanitize", "bench"])
def test_stages_name_files_that_exist(check, name):
    named = [part for command in check.STAGES[name]() for part in command.argv if part.endswith(".py")]
    assert named and all((check.ROOT / part).exists() for part in named)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so gpu_check would run the whole check")
def test_without_a_gpu_it_says_so_and_succeeds():
    result = subprocess.run([sys.executable, "-P", str(BENCH / "gpu_check.py")], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout == "gpu-check: there is no NVIDIA GPU that torch can use here, so there is nothing to check.\n"


def test_an_unknown_stage_is_refused():
    result = subprocess.run([sys.executable, "-P", str(BENCH / "gpu_check.py"), "tests"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "stages: must be among ['build', 'test', 'sanitize', 'bench'], got ['tests']" in result.stderr
