# SPDX-License-Identifier: Apache-2.0
"""The GPU check's arithmetic, and what it does where there is no GPU."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import gpu_check as check
import origin
import pytest
import torch
from gpu import calls, cost, sanitize, smoke

from fisherfast import _backend

BENCH = Path(__file__).parents[1] / "bench"
CEILINGS = {"copy": 4e12, "bf16": 8e14, "tf32": 4e14, "fp32": 5e13}


def test_linear_counts_products_and_every_byte_once():
    N, T, I, O = 2, 3, 5, 7
    found = cost.linear(N, T, I, O, "bf16")
    assert found.flops == sum(2 for _ in range(N * T * I * O))
    assert found.bytes == 2 * (N * T * I) + 2 * (N * T * O) + 4 * (O * I) * 2


@pytest.mark.parametrize(
    ("T", "mode", "unit"),
    [(3, "bf16", "bf16"), (3, "fp16", "bf16"), (1, "bf16", "fp32 product"), (3, "fp32", "fp32 product"), (1, "tf32", "tf32")],
)
def test_linear_multiplies_16_bit_values_but_not_their_squares_in_16_bits(T, mode, unit):
    assert cost.linear(2, T, 5, 7, mode).unit == unit


def test_a_product_of_float32_takes_the_fastest_of_its_ways():
    assert cost.rate("fp32 product", CEILINGS) == 8e14 / 6
    assert cost.rate("fp32 product", CEILINGS | {"bf16": 1.0}) == 4e14 / 3
    assert cost.rate("fp32 product", CEILINGS | {"bf16": 1.0, "tf32": 1.0}) == 5e13
    assert cost.rate("fp32", CEILINGS) == 5e13


def test_scale_reads_x_only_where_there_is_one():
    with_x, without = cost.scale(2, 3, 5, "fp32", True), cost.scale(2, 3, 5, "fp32", False)
    assert (with_x.flops, without.flops) == (60, 30)
    assert (with_x.bytes, without.bytes) == (240 + 40, 120 + 40)


def test_embedding_touches_only_the_rows_that_occur():
    found = cost.embedding(2, 3, 5, "bf16", touched=4)
    assert found.flops == 30
    assert found.bytes == 6 * 8 + 30 * 2 + 2 * 4 * 4 * 5


def test_expected_number_of_different_tokens():
    V, draws = 1000, 700
    ids = (V ** torch.rand(200, draws, dtype=torch.float64)).long()
    counted = [len(row.unique()) for row in ids]
    assert abs(cost.distinct(draws, V) - sum(counted) / len(counted)) < 4 * torch.tensor(counted).double().std() / 200**0.5 + 1


@pytest.mark.parametrize(("mode", "element", "unit"), [("bf16", 2, "bf16"), ("fp32", 4, "fp32 product"), ("tf32", 4, "tf32")])
def test_gram_counts_the_upper_triangle(mode, element, unit):
    found = cost.gram(3, 5, mode)
    upper = [(i, j) for i in range(5) for j in range(i, 5)]
    assert found == cost.Cost(2 * 3 * len(upper), element * 15 + 2 * 4 * len(upper), unit)


def test_convolutions_count_every_product_that_an_unfolded_one_takes():
    N, C, O, H, K, groups = 2, 4, 6, 5, 3, 2
    weight = torch.nn.Conv2d(C, O, K, groups=groups, padding=1).weight
    found = cost.conv(N, C, O, H, H, K, groups, "bf16")
    assert found.flops == 2 * N * H * H * weight.numel()
    assert found.bytes == 2 * N * H * H * (C + O) + 2 * 4 * weight.numel()
    assert cost.conv_gram(N, C, H, H, K, "bf16").flops == cost.gram(N * H * H, C * K * K, "bf16").flops


def test_score_and_logarithms_read_everything_once():
    assert cost.score(3, 5, "bf16").bytes == 2 * 15 * 2 + 3 * 8
    assert cost.log1p(7).bytes == 28 and cost.kron_log1p(3, 5).bytes == 32
    assert cost.kron_log1p(3, 5).flops == cost.log1p(15).flops


def test_bound_is_the_slower_of_arithmetic_and_memory():
    arithmetic = cost.Cost(flops=8 * 10**14, bytes=10**12, unit="bf16")
    assert cost.bound(arithmetic, CEILINGS) == cost.Bound(1.0, "bf16")
    memory = cost.Cost(flops=8 * 10**14, bytes=8 * 10**12, unit="bf16")
    assert cost.bound(memory, CEILINGS) == cost.Bound(2.0, "copy")


def test_fraction_is_one_at_the_bound_and_halves_with_twice_the_time():
    work = cost.linear(8, 1024, 4096, 4096, "bf16")
    least = cost.bound(work, CEILINGS).seconds
    assert cost.fraction(work, CEILINGS, least) == 1.0
    assert cost.fraction(work, CEILINGS, 2 * least) == 0.5


@pytest.mark.parametrize(
    ("error", "plain", "good"), [(2e-7, 1e-7, True), (3e-7, 1e-7, True), (3.1e-7, 1e-7, False), (1e-7, 0.0, True)]
)
def test_gate(error, plain, good):
    assert cost.passes(error, plain) is good


def test_a_result_that_is_not_a_number_does_not_pass():
    assert not cost.passes(float("nan"), 1.0) and not cost.passes(float("nan"), 1.0, "tf32")


def test_gate_of_tf32_is_at_least_what_its_operands_lose():
    four_factors_cut = 1 - (1 - 2.0**-10) ** 4
    assert cost.passes(four_factors_cut, 0.0, "tf32") and not cost.passes(four_factors_cut, 0.0)
    assert not cost.passes(2 * four_factors_cut, 0.0, "tf32")


def test_what_a_kernel_is_meant_to_reach():
    shape = {"T": 512}
    assert cost.meant("linear_sq_", "bf16", shape, "bf16") == 0.70
    assert cost.meant("linear_sq_", "bf16", {"T": 511}, "bf16") is None
    assert cost.meant("linear_sq_", "fp32", shape, "fp32 product") is None
    assert cost.meant("scale_sq_", "bf16", {}, "copy") == 0.85


def test_names():
    assert origin.slug("NVIDIA H200") == "nvidia-h200"
    assert origin.slug("NVIDIA A100-SXM4-80GB ") == "nvidia-a100-sxm4-80gb"
    assert [cost.architecture(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0))] == ["8.0", "8.9", "9.0a", "10.0a"]


def test_source_digest_sees_names_and_contents_but_not_what_was_compiled(tmp_path):
    (tmp_path / "a.cu").write_text("kernel")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.cu").write_text("other")
    first = origin.sources_sha256(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_text("cache")
    (tmp_path / "_C.abi3.so").write_text("built on this machine")
    assert origin.sources_sha256(tmp_path) == first
    (tmp_path / "a.cu").write_text("kernel 2")
    assert origin.sources_sha256(tmp_path) != first
    (tmp_path / "a.cu").write_text("kernel")
    (tmp_path / "a.cu").rename(tmp_path / "c.cu")
    assert origin.sources_sha256(tmp_path) != first


def test_a_process_that_fails_or_outlasts_its_time_fails_the_stage(tmp_path):
    def outcome(code, seconds=60.0):
        with (tmp_path / "log").open("w") as log:
            return check.run(check.Command([sys.executable, "-c", code], {"GIVEN": "yes"}), seconds, log)

    assert outcome("import os; print('said', os.environ['GIVEN'])") == check.Ended(0, ["said yes"])
    assert (tmp_path / "log").read_text() == "said yes\n"
    assert outcome("raise SystemExit(3)") == check.Ended(3, [])
    assert outcome("import time; time.sleep(60)", seconds=0.5) == check.Ended(-15, [])


def test_a_process_that_does_not_end_when_it_is_asked_to_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "GRACE", 0.5)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    with (tmp_path / "log").open("w") as log:
        assert check.run(check.Command([sys.executable, "-c", code]), 2, log) == check.Ended(-9, ["ready"])


def test_a_missing_program_fails_the_stage_and_is_named(tmp_path):
    with (tmp_path / "log").open("w") as log:
        assert check.run(check.Command(["no-such-sanitizer"], {}), 60, log).status == 127
    assert "no-such-sanitizer is not on this machine" in (tmp_path / "log").read_text()


def test_a_process_that_outlasts_its_time_ends_with_its_children(tmp_path):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    with (tmp_path / "log").open("w") as log:
        assert check.run(check.Command([sys.executable, "-c", code], {}), 0.5, log).status == -15
    assert time.monotonic() - start < 30  # the child, were it alive, would hold the output open


@pytest.mark.parametrize("name", ["smoke", "bench", "models", "test", "sanitize"])
def test_stages_name_files_that_exist(name):
    commands = check.STAGES[name]()
    named = [part for command in commands for part in command.argv if part.endswith(".py")]
    assert named and all((check.ROOT / part).exists() for part in named)
    assert len({command.name for command in commands}) == len(commands)
    assert not any(str(check.ROOT) in command.name or sys.executable in command.name for command in commands)


def test_every_test_of_an_op_on_a_gpu_runs():
    """A file that asks for a CUDA device is in the stage."""
    asked = {path for path in (check.ROOT / "tests").glob("test_*.py") if "DEVICES" in path.read_text()}
    named = {check.ROOT / part for command in check.STAGES["test"]() for part in command.argv}
    assert {check.ROOT / "tests" / "test_gpu.py", *asked} - {Path(__file__)} <= named


def test_every_test_of_a_gpu_is_in_one_part_of_the_stage():
    """By what ``-k`` asks of its name."""
    names = re.findall(r"^def (test_\w+)", (check.ROOT / "tests" / "test_gpu.py").read_text(), re.MULTILINE)
    for name in names:
        here = {word: word in name for word in ("float64", "on_the_cpu")}
        assert sum(eval(part, {}, here) for part in check.GPU_TESTS) == 1


def test_a_call_that_fails_does_not_keep_the_others_from_running(monkeypatch):
    ran = []

    def build(draw, number):
        def run(outputs):
            ran.append(number)
            if number == 1:
                raise RuntimeError("invalid argument")

        return calls.Call({}, run)

    monkeypatch.setitem(calls.CALLS, "linear_sq_", (build, [(0,), (1,), (2,)]))
    assert smoke.small("linear_sq_", "cpu", "cpu") == {"failed": ["call 1: RuntimeError: invalid argument"]}
    monkeypatch.setattr(sanitize, "GROUPS", {"some": ("linear_sq_",)})
    assert sanitize.main("some", "cpu") == 1 and ran == 3 * [0, 1, 2]  # two dtypes in Triton's interpreter
    monkeypatch.setitem(calls.CALLS, "linear_sq_", (build, [(1,), (1,)]))
    with pytest.raises(RuntimeError, match="every call failed, the first with call 0: RuntimeError: invalid argument"):
        smoke.small("linear_sq_", "cpu", "cpu")


def test_what_has_an_alternative_leaves_it_time(tmp_path):
    slow = check.Command([sys.executable, "-c", "import time; time.sleep(60)"])
    command = slow._replace(instead=check.Command([sys.executable, "-c", "print('instead')"]))
    with (tmp_path / "log").open("w") as log:
        assert check.passes(command, time.monotonic() + 4, check.Progress(tmp_path / "progress"), log)


def test_the_sanitizer_watches_every_op():
    watched = [op for group in sanitize.GROUPS.values() for op in group]
    assert sorted(watched) == sorted(_backend.OPS)
    groups = {command.argv[-1] for command in check.STAGES["sanitize"]()}
    assert groups == set(sanitize.GROUPS)


def test_a_stage_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """What has passed is not run again while the sources are the same; what failed is."""
    ran = tmp_path / "ran"

    def command(name, status, lasting=True):
        code = f"open({str(ran)!r}, 'a').write({name!r}); raise SystemExit({status})"
        return check.Command([sys.executable, "-c", code], {}, lasting=lasting)

    commands = [command("a", 0), command("b", 1), command("c", 0, lasting=False)]
    monkeypatch.setitem(check.STAGES, "test", lambda: commands)

    def run():
        ran.write_text("")
        with (tmp_path / "log").open("w") as log:
            good = check.stage("test", 60, check.Progress(tmp_path / "passed"), log)
        return good, ran.read_text()

    assert run() == (False, "abc")
    assert run() == (False, "bc")
    commands[1] = command("b", 0)
    assert run() == (True, "bc")
    assert run() == (True, "c")
    monkeypatch.setattr(check.origin, "sources_sha256", lambda folder: "other")
    assert run() == (True, "abc")


@pytest.mark.parametrize(("statuses", "ran", "good"), [([1, -9, 0], 3, True), ([1, check.record.ENDED, 0], 2, False)])
def test_a_bench_that_died_is_run_again_until_it_ends_by_itself(tmp_path, monkeypatch, statuses, ran, good):
    count = tmp_path / "count"
    count.write_text("")
    code = f"""
import os, signal, sys
assert sys.argv[1] == "--seconds" and 0 < int(sys.argv[2]) < 60
count = open({str(count)!r}, "a+"); count.write("x"); count.seek(0)
status = {statuses}[len(count.read()) - 1]; count.close()
os.kill(os.getpid(), -status) if status < 0 else sys.exit(status)
"""
    monkeypatch.setitem(check.STAGES, "bench", lambda: [check.Command([sys.executable, "-c", code], resuming=True)])
    with (tmp_path / "log").open("w") as log:
        assert check.stage("bench", 60 + check.SPARE, check.Progress(tmp_path / "progress"), log) is good
    assert len(count.read_text()) == ran and bool(check.Progress(tmp_path / "progress").failed) is not good


def test_what_tells_most_comes_first():
    assert list(check.STAGES) == ["build", "smoke", "bench", "models", "test", "sanitize"]


def test_the_property_tests_are_left_out_on_a_gpu():
    """Their marker is hypothesis' own."""
    commands = check.STAGES["test"]()
    assert all(command.argv[command.argv.index("-m", 2) + 1] == "not hypothesis" for command in commands)
    collected = [sys.executable, "-P", "-m", "pytest", "--collect-only", "-q", "-m", "hypothesis", "tests/test_log1p_sum.py"]
    listed = subprocess.run(collected, cwd=check.ROOT, capture_output=True, text=True).stdout
    assert "test_any_size" in listed and "test_matches" not in listed


def test_a_build_without_cuda_c_takes_the_place_of_one_that_fails(tmp_path, monkeypatch):
    """The failure stays on record, with its last lines, until it passes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    (command,) = check.build()
    assert command.environment == {"FISHERFAST_NATIVE": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0a"}
    assert command.instead.environment == {"FISHERFAST_NATIVE": "cpu"} and command.instead.argv == command.argv
    inside = command.instead.instead  # for a pip that installs nothing
    assert inside.environment == command.environment and inside.argv[1].endswith("in_place.py")
    monkeypatch.setattr(check, "BUILDS", tmp_path / "build" / "builds")
    code = "import os; native = os.environ['FISHERFAST_NATIVE']; print('nvcc:', native); raise SystemExit(native == os.environ['FAILING'])"

    def built(failing):
        monkeypatch.setenv("FAILING", failing)
        argv = [sys.executable, "-c", code]
        replaced = command._replace(argv=argv, instead=command.instead._replace(argv=argv))
        monkeypatch.setitem(check.STAGES, "build", lambda: [replaced])
        with (tmp_path / "log").open("w") as log:
            return check.stage("build", 60, check.Progress(tmp_path / "progress"), log)

    assert built("cuda")
    ((name, tail),) = check.Progress(tmp_path / "progress").failed.items()
    assert name.startswith("FISHERFAST_NATIVE=cuda ") and tail == ["nvcc: cuda"]
    assert {"nvcc: cuda", "nvcc: cpu"} <= set((tmp_path / "log").read_text().splitlines())
    check.BUILDS.unlink()
    assert built("none") and not check.Progress(tmp_path / "progress").failed


@pytest.mark.parametrize(
    ("ends", "again"),
    [
        ("raise SystemExit(1)", []),  # the compiler's word; what stands in its place is here
        ("os.kill(os.getpid(), 15)", ["whole"]),  # too slow for this stage, perhaps not for the next
    ],
    ids=["refused", "killed"],
)
def test_a_build_that_was_killed_is_tried_again(tmp_path, monkeypatch, ends, again):
    monkeypatch.setattr(check, "BUILDS", tmp_path / "build" / "builds")
    ran, works = tmp_path / "ran", tmp_path / "works"
    code = f"import os; open({str(ran)!r}, 'a').write('%s '); os.path.exists({str(works)!r}) or '%s' == 'less' or exec({ends!r})"
    whole, less = (
        check.Command([sys.executable, "-c", code % (name, name)], {"NAME": name}, building=True) for name in ("whole", "less")
    )
    monkeypatch.setitem(check.STAGES, "build", lambda: [whole._replace(instead=less)])

    def run():
        ran.write_text("")
        with (tmp_path / "log").open("w") as log:
            assert check.stage("build", 60, check.Progress(tmp_path / "progress"), log)
        return ran.read_text().split()

    assert run() == ["whole", "less"]
    works.touch()
    assert run() == again
    assert run() == []
    assert bool(check.Progress(tmp_path / "progress").failed) is (not again)


def test_a_build_is_not_repeated_on_the_machine_that_has_it(tmp_path, monkeypatch):
    """On another one the sources may be the same, and what was built of them is not there."""
    monkeypatch.setattr(check, "BUILDS", tmp_path / "build" / "builds")
    ran = tmp_path / "ran"
    command = check.Command([sys.executable, "-c", f"open({str(ran)!r}, 'a').write('built ')"], building=True)
    monkeypatch.setitem(check.STAGES, "build", lambda: [command])

    def run():
        with (tmp_path / "log").open("w") as log:
            return check.stage("build", 60, check.Progress(tmp_path / "progress"), log) and ran.read_text()

    assert (run(), run()) == ("built ", "built ")
    check.BUILDS.unlink()
    assert run() == "built built "
    monkeypatch.setattr(check.origin, "sources_sha256", lambda folder: "other")
    assert run() == "built built built "


def test_packages_inside_the_checkout_are_found(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(check.in_place, "KERNELS", tmp_path / "kernels")
    command = check.Command([sys.executable, "-c", "import os; print(os.environ.get('PYTHONPATH'))"])

    def path():
        with (tmp_path / "log").open("w") as log:
            return check.run(command, 60, log).tail

    assert path() == ["None"]
    check.in_place.KERNELS.symlink_to(tmp_path)
    assert path() == [str(check.ROOT)]


def test_a_stage_without_time_left_fails_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(check.STAGES, "test", lambda: [check.Command([sys.executable, "-c", ""], {})])
    with (tmp_path / "log").open("w") as log:
        assert not check.stage("test", 0, check.Progress(tmp_path / "passed"), log)
    assert "no time left" in (tmp_path / "log").read_text()


def test_results_are_collected_after_every_step(tmp_path, monkeypatch):
    out, folder = tmp_path / "out", tmp_path / "results"
    out.mkdir(), folder.mkdir()
    (folder / "2020-01-02.json").write_text("{}")
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setitem(check.STAGES, "test", lambda: [check.Command([sys.executable, "-c", ""], {}, lasting=True)])
    with (folder / "gpu-check.log").open("w") as log, check.exporting(folder):
        assert check.stage("test", 60, check.Progress(folder / "gpu-check-progress.txt"), log)
    assert sorted(path.name for path in out.iterdir()) == ["2020-01-02.json", "gpu-check-progress.txt", "gpu-check.log"]


def test_results_are_collected_while_a_step_runs(tmp_path, monkeypatch):
    """Who lent the machine may end everything before the step does."""
    out, folder = tmp_path / "out", tmp_path / "results"
    out.mkdir(), folder.mkdir()
    monkeypatch.setenv("OUT", str(out))
    with check.exporting(folder, seconds=0.05):
        (folder / "2020-01-02.json").write_text("{}")
        deadline = time.monotonic() + 30
        while not (out / "2020-01-02.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (out / "2020-01-02.json").read_text() == "{}"


def test_nothing_is_collected_without_a_place_for_it(tmp_path, monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    before = threading.active_count()
    with check.exporting(tmp_path):
        assert threading.active_count() == before


BREAKS = """
import torch

def test_breaks_the_gpu():
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize

def test_is_right():
    pass
"""


@pytest.mark.slow
def test_a_test_that_breaks_the_gpu_takes_no_other_with_it(tmp_path):
    """It is named, and a new worker runs the next one."""
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    shutil.copy(check.ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(BREAKS)
    command = [sys.executable, "-P", "-m", "pytest", "-n", "1", "-p", "no:cacheprovider", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(check.ROOT / "tests")}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "crashed while running 'test_it.py::test_breaks_the_gpu'" in result.stdout, result.stdout
    assert "1 failed, 2 passed" in result.stdout, result.stdout  # the first one's body had passed


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so gpu_check would run the whole check")
def test_without_a_gpu_it_says_so_and_succeeds():
    result = subprocess.run([sys.executable, "-P", str(BENCH / "gpu_check.py")], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout == "gpu-check: there is no NVIDIA GPU that torch can use here, so there is nothing to check.\n"


def test_an_unknown_stage_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "tests"])
    with pytest.raises(SystemExit) as refused:
        check.main()
    assert refused.value.code == 2
    assert (
        "stages: must be among ['build', 'smoke', 'bench', 'models', 'test', 'sanitize'], got ['tests']"
        in capsys.readouterr().err
    )
