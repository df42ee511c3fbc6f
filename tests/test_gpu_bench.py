# SPDX-License-Identifier: Apache-2.0
"""The GPU bench, rehearsed on the CPU with extents of a few: its cases, ways, records, predictions, page and table of choices.

Numbers in here are made up; none leaves the test's own folder.
"""

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import gate
import origin
import page
import pytest
import torch
import ways
from gpu import (
    calls,
    capacity,
    choose,
    clock,
    cost,
    model_cases,
    model_ways,
    models,
    networks,
    predict,
    problems,
    record,
    run,
    smoke,
)
from gpu import page as gpu_page
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fisherfast as ff
from fisherfast import _backend, _choice

BENCH = Path(__file__).parents[1] / "bench"
CEILINGS = {"copy": 4e12, "bf16": 8e14, "tf32": 4e14, "fp32": 5e13, "fp64": 3e13}
EMPTY = {"smoke": [], "ops": [], "models": [], "largest": []}
MODES = [(op, mode) for op, (_, _, modes, _) in problems.CASES.items() for mode in modes]
MACHINE = {
    "device": "NVIDIA Abacus",
    "capability": "9.0",
    "driver": "1.2",
    "versions": {"torch": "2.11", "triton": "3.6", "cuda": "13.0"},
    "commit": "abc1234",
    "sha256": {"csrc": "0" * 64, "kernels": "1" * 64},
}


@pytest.fixture
def rehearsal(tmp_path):
    """A file of results, and the way to run a case or a way into it."""
    found = record.Document({"device": "rehearsal"}, tmp_path)
    found.save(ceilings=CEILINGS)
    return found


# ---- ops


def test_every_op_has_cases():
    assert sorted(problems.CASES) == sorted(_backend.OPS)


@pytest.mark.parametrize(("op", "mode"), MODES, ids=lambda v: v)
def test_every_problem_is_right(op, mode, rehearsal):
    """Ours pass the gate, and what the peers add is the same quantity."""
    torch.manual_seed(0)
    found = run.measure("cpu", rehearsal, op, next(iter(problems.CASES[op].cases)), mode, tiny=True)
    routes = {r["route"]: r for r in found["routes"]}
    assert all(routes[name]["passes"] and len(routes[name]["seconds"]) == 3 for name in ("cpu", "reference"))
    same = {"bf16": 2e-2, "fp16": 2e-3}.get(mode, 1e-5)
    assert all(r["error"] is None or r["error"] <= same for r in routes.values())
    assert found["bound"]["seconds"] > 0 and found["plain_error"] <= same
    assert json.loads(rehearsal.path.read_text())["ops"] == [{**found, "extents": [list(e) for e in found["extents"]]}]


@pytest.mark.parametrize("op", ["linear_sq_", "gram_", "conv_sq_", "conv_gram_"])
def test_the_gate_of_16_bits_is_set_by_torch_s_own_tensor_cores(op, monkeypatch):
    """On fake CUDA tensors: every product of plain torch is one of 16-bit values with a float32 result."""
    seen = []

    def patches(x, K, stride):  # as large; torch's own unfolding of fake CUDA tensors needs CUDA
        return x.new_empty(len(x), x.shape[1] * K * K, problems.positions(x.shape[2], K, stride) ** 2)

    monkeypatch.setattr(problems, "patches", patches)

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
                seen.append((func._overloadname, args[0].dtype))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Products():
        problem = problems.build("cuda", op, "", "bf16", tiny=True)
        assert problem.plain().dtype == torch.float32
    assert seen and set(seen) == {("dtype", torch.bfloat16)}


def test_products_of_16_bit_values_are_of_float32():
    a, b = torch.randn(2, 3, 5).bfloat16(), torch.randn(2, 5, 7).bfloat16()
    assert torch.equal(gate.product(a, b), a.float() @ b.float())
    assert gate.product(a.double(), b.double()).dtype == torch.float64


def test_a_wrong_result_a_failing_kernel_and_a_full_memory_have_no_time(monkeypatch, rehearsal):
    def outcome(ours=None, peer=None):
        problem = problems.build("cpu", "scale_sq_", "llama8b-norm", "fp32", tiny=True)
        problem = problem._replace(peers={"peer": peer or (lambda acc: acc.add_(problem.oracle()))})
        monkeypatch.setattr(problems, "build", lambda *_, **__: problem)
        if ours is not None:
            monkeypatch.setattr(problems.Problem, "ours", ours)
        rehearsal.save(ops=[])
        return run.measure("cpu", rehearsal, "scale_sq_", "llama8b-norm", "fp32", tiny=True)["routes"]

    def full(acc):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def breaks(problem, acc):
        raise RuntimeError("no such instruction")

    right, *_, small = outcome(peer=full)
    assert right["passes"] and "seconds" in right
    assert small == {"route": "peer", "error": None, "why": "out of memory: CUDA out of memory"}
    wrong = outcome(ours=lambda problem, acc: acc.add_(1))[0]
    assert wrong["error"] > cost.CLOSE and not wrong["passes"] and "seconds" not in wrong
    close = outcome(ours=lambda problem, acc: acc.copy_(problem.oracle() * (1 + 0.9 * cost.CLOSE)))[0]
    assert 0 < close["error"] < cost.CLOSE and not close["passes"] and len(close["seconds"]) == 3
    broken = outcome(ours=breaks)[0]
    assert not broken["passes"] and broken["why"] == "raises RuntimeError: no such instruction" and "seconds" not in broken


def test_nothing_is_blamed_on_what_follows_a_lost_device(monkeypatch, rehearsal):
    """It is left to the next process, which does not measure again what is there."""
    key = "scale_sq_", "llama8b-norm", "fp32"
    answers = iter([True, False])
    monkeypatch.setattr(run, "alive", lambda device: next(answers, True))
    found = run.measure("cpu", rehearsal, *key, tiny=True)
    assert [r["route"] for r in found["routes"]] == ["cpu"] and key in run.unfinished(rehearsal.content)
    again = run.measure("cpu", rehearsal, *key, tiny=True)
    assert again["routes"][0] == found["routes"][0] and again["left"] == []
    assert [r["route"] for r in again["routes"]] == ["cpu", "reference", "product, sum, square"]
    assert rehearsal.content["ops"] == [again] and key not in run.unfinished(rehearsal.content)


def test_a_backend_that_failed_on_small_calls_or_was_lost_twice_is_not_run(rehearsal):
    key = "scale_sq_", "llama8b-norm", "fp32"
    lost = {"op": "scale_sq_", "case": "a", "mode": "bf16", "routes": [{"route": "cpu", "why": record.LOST}]}
    rehearsal.save(smoke=[{"op": "scale_sq_", "route": "reference", "why": "raises RuntimeError: x"}], ops=[lost])
    cpu, reference, _ = run.measure("cpu", rehearsal, *key, tiny=True)["routes"]
    assert cpu["passes"]  # lost once: the lease may have ended
    assert not reference["passes"] and reference["why"] == "not run: on small calls raises RuntimeError: x"
    rehearsal.save(smoke=[], ops=[lost, lost | {"case": "b"}])
    cpu, reference, _ = run.measure("cpu", rehearsal, *key, tiny=True)["routes"]
    assert not cpu["passes"] and cpu["why"] == f"not run: {record.LOST} at a bf16 and b bf16"
    assert reference["passes"]


def test_a_case_that_cannot_be_prepared_is_recorded_and_the_next_one_is_measured(monkeypatch, rehearsal):
    def full(problem):
        raise torch.OutOfMemoryError("CUDA out of memory")

    build = problems.build
    broken = {"oracle": lambda: full(None)}
    monkeypatch.setattr(problems, "build", lambda *a, **k: build(*a, **k)._replace(**broken))
    found = run.measure("cpu", rehearsal, "scale_sq_", "llama8b-norm", "fp32", tiny=True)
    assert found == rehearsal.content["ops"][0]
    assert found["why"] == "out of memory: CUDA out of memory" and found["routes"] == []
    assert run.lines(found) == "scale_sq_ llama8b-norm fp32: out of memory: CUDA out of memory"
    assert ("scale_sq_", "llama8b-norm", "fp32") not in run.unfinished(rehearsal.content)
    broken.clear()
    assert run.measure("cpu", rehearsal, "log1p_sum", "llama1b-up", "fp32", tiny=True)["routes"]
    text = gpu_page.section(rehearsal.content | {"machine": MACHINE}, "x.json")
    assert "- `scale_sq_` llama8b-norm fp32: out of memory: CUDA out of memory." in text


def test_the_order_begins_with_what_tells_most():
    order = problems.order()
    assert len(set(order)) == len(order) == sum(len(c.cases) * len(c.modes) for c in problems.CASES.values())
    assert [op for op, *_ in order[: len(problems.CASES)]] == list(problems.CASES)
    assert all(case == next(iter(problems.CASES[op].cases)) for op, case, _ in order[: len(problems.CASES)])
    first = [problems.CASES[op].modes.index(mode) for op, _, mode in order]
    assert first == sorted(first)


def test_the_shapes_that_the_targets_name_are_there():
    shapes = set(problems.LINEAR.values())
    assert any(T >= 512 and {I, O} == {4096} for _, T, I, O in shapes)
    assert any(T >= 512 and {I, O} == {4096, 14336} for _, T, I, O in shapes)
    assert any(1 < T <= 128 and N >= 8 for N, T, *_ in shapes) and any(T == 1 for _, T, *_ in shapes)
    assert any(I >= 4096 for *_, I in problems.GRAM.values()) and any(I <= 64 for *_, I in problems.GRAM.values())


def test_tf32_is_allowed_inside_its_block_only():
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    for allowed, precision in ((True, "tf32"), (False, "ieee")):
        with clock.tf32(allowed):
            assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == precision
    assert before == (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)


def test_the_device_waits_while_a_run_is_launched(monkeypatch):
    """L2 full of what need not be written back, then the device kept busy, and only then the clock: nothing but the run is between the events."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")

        def elapsed_time(self, end):
            return 2.0

    class Flush:
        def amax(self):
            done.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    assert clock._events(lambda: done.append("run"), 2, Flush(), clock.AHEAD_CYCLES) == [2e-3, 2e-3]
    assert done == ["flush", "wait", "record", "run", "record"] * 2 + ["synchronize"]


def test_ceilings_are_measured():
    found = clock.ceilings("cuda" if torch.cuda.is_available() else "cpu")
    assert found.keys() == CEILINGS.keys() and all(value > 0 for value in found.values())


# ---- records


def test_a_run_goes_on_in_its_file_and_never_in_another_one_s(tmp_path):
    first = record.Document(MACHINE, tmp_path)
    first.save(ops=[{"op": "a"}])
    again = record.Document(MACHINE | {"commit": "another", "driver": "1.2.3"}, tmp_path)
    assert again.path == first.path and again.content["ops"] == [{"op": "a"}]
    other = record.Document(MACHINE | {"sha256": {"csrc": "2" * 64}}, tmp_path)
    other.save(ceilings={"copy": 1.0})
    assert other.path != first.path and json.loads(first.path.read_text())["ops"] == [{"op": "a"}]
    assert record.newest(tmp_path) == [other.path]
    assert not list(tmp_path.rglob("*.part"))


ENDS = """
import os, sys, time
sys.path.insert(0, {bench!r})
from pathlib import Path
from gpu import record

document = record.Document({machine!r}, Path({folder!r}))
document.attempt(document.content["ops"], {{"op": "a"}}, lambda: {{"error": 0.0}}, 60)
document.attempt(document.content["ops"], {{"op": "b"}}, lambda: {ends}, 0.5)
"""


@pytest.mark.parametrize(("ends", "status"), [("time.sleep(60)", 1), ("os.abort()", -6)])
def test_what_hangs_or_crashes_is_on_record(tmp_path, ends, status):
    """Its process ends, nothing that it had found is lost, and the next one sees what it was at."""
    code = ENDS.format(bench=str(BENCH), machine=MACHINE, folder=str(tmp_path), ends=ends)
    start = time.monotonic()
    assert subprocess.run([sys.executable, "-P", "-c", code], capture_output=True).returncode == status
    assert time.monotonic() - start < 55
    assert record.Document(MACHINE, tmp_path).content["ops"] == [{"op": "a", "error": 0.0}, {"op": "b", "why": record.LOST}]


def test_what_is_interrupted_has_no_record(rehearsal):
    """It did not hang; the next process measures it."""
    key = "scale_sq_", "llama8b-norm", "fp32"

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rehearsal.attempt(rehearsal.content["models"], {"way": "a"}, interrupted, 60)
    assert json.loads(rehearsal.path.read_text())["models"] == []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "peer", lambda *_: interrupted())  # the last route
        run.measure("cpu", rehearsal, *key, tiny=True)
    assert key in run.unfinished(rehearsal.content)
    assert len(run.measure("cpu", rehearsal, *key, tiny=True)["routes"]) == 3 and key not in run.unfinished(rehearsal.content)


def test_facts_name_the_commit_of_a_tree_without_its_history(monkeypatch):
    monkeypatch.setenv("COMMIT", "feedbee")
    facts = record.facts("cpu")
    assert facts["commit"] == "feedbee"
    assert facts["sha256"]["kernels"] == origin.sources_sha256(BENCH.parent / "kernels")


# ---- whole models


@pytest.mark.parametrize("case", model_cases.CASES)
def test_ours_agrees_with_plain_torch_on_every_model(case, rehearsal):
    bench = models.Bench(case, "fp32", "cpu", tiny=True)
    for quantity in model_cases.CASES[case].quantities:
        found = bench.measure(rehearsal, quantity, model_ways.WAYS[quantity][0])
        assert "why" not in found and found["difference"] <= 1e-4, found
        assert all(len(found[name]) == 3 for name in ("seconds", "plain_seconds", "ratio"))
        assert models.line(found).startswith(f"{case} fp32 {quantity}: fisherfast")


torch_func_is_slow = pytest.mark.filterwarnings("ignore:There is a performance drop")


@torch_func_is_slow
@pytest.mark.parametrize("quantity", model_ways.WAYS)
def test_every_way_runs_in_bfloat16(quantity, rehearsal):
    bench = models.Bench("resnet50", "bf16", "cpu", tiny=True)
    for way in model_ways.WAYS[quantity]:
        found = bench.measure(rehearsal, quantity, way)
        assert "why" not in found, found
        assert json.loads(rehearsal.path.read_text())["models"][-1] == found


@torch_func_is_slow
def test_the_ways_to_the_diagonal_agree():
    problem = model_cases.CASES["gpt2"].build("cpu", "fp32", tiny=True)
    loop, *others = (ways.found(way.prepare(*problem)) for way in model_ways.WAYS["diagonal"] if not way.ours)
    for other in others:
        assert other.keys() <= loop.keys()
        assert models.difference(loop, other, 1.0) <= 1e-4


def test_what_cannot_be_measured_of_a_model_is_recorded(rehearsal, monkeypatch):
    bench = models.Bench("gpt2", "fp32", "cpu", tiny=True)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    def double(model, x, y):
        return lambda: {k: 2 * v for k, v in ways.found(model_ways.loop(model, x, y)).items()}

    def measured(prepare, ours=False):
        return bench.measure(rehearsal, "diagonal", model_ways.Way("other", prepare, ours))

    assert measured(full)["why"] == "out of memory: CUDA out of memory. Tried to allocate"
    assert measured(lambda *_: 1 / 0)["why"] == "raises ZeroDivisionError: division by zero"
    wrong = measured(double, ours=True)
    assert wrong["difference"] > 1 and "differs from plain torch" in wrong["why"] and "seconds" not in wrong
    assert len(rehearsal.content["models"]) == 3
    bench = models.Bench("gpt2", "bf16", "cpu", tiny=True)
    monkeypatch.setattr(model_cases.Case, "build", full)
    assert measured(model_ways.loop)["why"].startswith("out of memory") and bench.head["parameters"] > 0


def test_models_come_in_bfloat16_first_and_are_done_once():
    every = list(models.left(set()))
    assert [mode for _, mode, _ in every] == sorted(mode for _, mode, _ in every)  # bf16, fp32
    assert every[0][0] == "llama-1b" and every[0][2][0][1].ours
    done = {(case, mode, q, way.name) for case, mode, ways in every for q, way in ways}
    assert list(models.left(done)) == []
    assert [len(ways) for *_, ways in models.left(done - {("gpt2", "fp32", "kfac", "fisherfast")})] == [1]


# ---- the largest model


def test_bytes_per_parameter_are_those_that_a_run_will_hold():
    model, x, y = model_cases.CASES["llama-1b"].build("cpu", "bf16", tiny=True)
    size = sum(p.numel() for p in model.parameters())
    weights = sum(p.nbytes for p in model.parameters())
    plan = ff.plan(model, (x, y), fisher_type="empirical")
    assert weights + plan.peak_bytes == capacity.bytes_per_parameter() * size


def test_a_decoder_has_the_parameters_that_are_counted():
    decoder = capacity.Decoder(16, 4, 2, 24, 31)
    for depth in (0, 1, 3):
        with torch.device("meta"):
            model = networks.Llama(**model_cases.llama(depth, decoder))
        assert sum(p.numel() for p in model.parameters()) == decoder.outside() + depth * decoder.layer()


def test_the_largest_decoder_fits_and_one_layer_more_does_not():
    memory = 10**11
    most = capacity.parameters(memory)
    assert most * capacity.bytes_per_parameter() + capacity.RESERVE_BYTES <= memory
    depth = capacity.LLAMA_8B.layers(most)
    sizes = [capacity.LLAMA_8B.outside() + n * capacity.LLAMA_8B.layer() for n in (depth, depth + 1)]
    assert sizes[0] <= most < sizes[1]
    assert capacity.parameters(10**9) == capacity.LLAMA_8B.layers(0) == 0


def test_the_largest_diagonal_is_run(rehearsal):
    found = models.largest("cpu", rehearsal, tiny=True)
    assert rehearsal.content["largest"] == [found]
    assert found["trace"] > 0 and found["expected_bytes"] == 10 * found["parameters"]


# ---- the table of choices


def route(name, median, **more):
    return {"route": name, "error": 1e-7, "passes": True, "seconds": [0.9 * median, median, 1.1 * median], "fraction": 0.5} | more


def measured(op="linear_sq_", case="a", mode="bf16", extents=((64, 32), (2, 8, 32), (2, 8, 64)), routes=None):
    bound = {"seconds": 1e-4, "by": "bf16"}
    shape = {"N": 2, "T": 8, "I": 32, "O": 64}
    head = {"op": op, "case": case, "mode": mode, "shape": shape, "extents": extents, "bound": bound, "plain_error": 2e-7}
    return head | {"routes": routes or [route("triton", 2e-4), route("cuda", 1e-4), route("peer", 3e-4)]}


def document(tmp_path, ops, **more):
    """A result file of a device, made up."""
    run = {"date": "2020-01-02", "machine": MACHINE, "ceilings": CEILINGS, **EMPTY, "ops": ops} | more
    path = tmp_path / "nvidia-abacus" / "2020-01-02.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(run))
    return path


def test_the_faster_backend_is_chosen_and_a_draw_is_triton_s(tmp_path):
    draw = [route("triton", 1.05e-4), route("cuda", 1e-4)]
    wrong = [route("triton", 2e-4), {"route": "cuda", "error": 1.0, "passes": False}]
    one = [route("triton", 2e-4)]
    close = [route("triton", 2e-4), route("cuda", 1e-4, passes=False)]
    other = [route("triton", 1e-4, passes=False), route("cuda", 2e-4)]
    neither = [route("triton", 1e-4, passes=False), route("cuda", 2e-4, passes=False)]
    cases = enumerate((draw, wrong, one, close, other, neither))
    ops = [measured(), *(measured(case=str(n), routes=routes) for n, routes in cases)]
    table = choose.table([document(tmp_path, ops)])
    entries = table["9.0"]["ops"]["linear_sq_"]
    right = [("a", "cuda"), ("0", "triton"), ("1", "triton"), ("2", "triton"), ("3", "triton"), ("4", "cuda")]
    assert [(e["case"], e["backend"]) for e in entries] == right
    assert entries[0]["seconds"] == {"triton": 2e-4, "cuda": 1e-4}
    assert table["9.0"]["source"] == "nvidia-abacus/2020-01-02.json"
    assert choose.table([document(tmp_path, [])]) == {}


def test_the_table_is_that_of_the_stored_results():
    """Empty as long as no GPU has been measured."""
    assert choose.table(record.newest()) == json.loads(_choice.PATH.read_text())


@pytest.fixture
def choose_from(tmp_path, monkeypatch):
    """Make the table of choices from measurements."""

    def choose_from(*ops):
        table = choose.table([document(tmp_path, ops)])
        monkeypatch.setattr(_choice, "table", lambda: table)
        _choice._nearest.cache_clear()

    yield choose_from
    _choice._nearest.cache_clear()


@pytest.fixture
def two_choices(choose_from):
    """CUDA C++ was faster at a large call, Triton at a small one."""
    large = measured(case="large", extents=((640, 320), (2, 80, 320), (2, 80, 640)))
    small = measured(case="small", routes=[route("triton", 1e-4), route("cuda", 2e-4)])
    choose_from(small, large)


def linear(N, T, I, O, dtype=torch.bfloat16):
    return torch.zeros(O, I), torch.ones(N, T, I, dtype=dtype), torch.ones(N, T, O, dtype=dtype)


@pytest.mark.parametrize(("size", "faster"), [(32, "triton"), (40, "triton"), (200, "cuda"), (5000, "cuda")])
def test_the_nearest_measured_call_decides(two_choices, size, faster):
    assert _choice.fastest("linear_sq_", "9.0", linear(2, size // 4, size, 2 * size), {}) == faster


def test_what_was_not_measured_has_no_choice(two_choices):
    args = linear(2, 8, 32, 64)
    packed = (args[0], args[1].flatten(0, 1), args[2].flatten(0, 1))
    assert _choice.fastest("linear_sq_", "8.0", args, {}) is None
    assert _choice.fastest("gram_", "9.0", args[:2], {}) is None
    assert _choice.fastest("linear_sq_", "9.0", packed, {}) is None
    assert _choice.fastest("linear_sq_", "9.0", linear(2, 8, 32, 64, torch.float32), {}) is None
    assert _choice.preferred("linear_sq_", "9.0") == {"triton", "cuda"} and _choice.preferred("linear_sq_", "8.0") == set()


def test_options_that_were_not_measured_have_no_choice(two_choices):
    """Other kernels are for them, which no measured call says anything of."""
    for name in ("weight", "total", "offsets"):
        assert _choice.fastest("linear_sq_", "9.0", linear(2, 80, 320, 640), {name: torch.ones(2)}) is None
    assert _choice.fastest("linear_sq_", "9.0", linear(2, 80, 320, 640), {"flag": torch.ones(1), "weight": None}) == "cuda"


def test_what_kfac_calls_has_a_choice(choose_from, monkeypatch):
    """The bench measures ``gram_`` with the axes that KFAC gives it, of sequences and of single rows."""
    problem = problems.build("cpu", "gram_", "llama8b-in", "fp32", tiny=True)
    choose_from(measured(op="gram_", mode="fp32", extents=_choice.extents((problem.acc, *problem.inputs))))
    calls, op = [], _backend.OPS["gram_"]
    check = op.check
    monkeypatch.setattr(op, "check", lambda *args, **options: calls.append((args, options)) or check(*args, **options))
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3, bias=False))
    for x, y in (
        (torch.randn(2, 4, 5), torch.zeros(2, 4, dtype=torch.int64)),
        (torch.randn(2, 5), torch.zeros(2, dtype=torch.int64)),
    ):
        ff.fisher(model, [(x, y)], structure="kfac", fisher_type="empirical", progress=False)
    assert len(calls) >= 8 and all(_choice.fastest("gram_", "9.0", *call) == "cuda" for call in calls)


def test_the_router_takes_the_chosen_backend_first_and_then_the_others(two_choices, monkeypatch):
    monkeypatch.setattr(_choice, "capability", lambda device: "9.0")
    op = _backend.OPS["linear_sq_"]
    assert op._order("cuda", linear(2, 80, 320, 640), {}) == ("cuda", "triton", "reference")
    assert op._order("cuda", linear(2, 8, 32, 64), {}) == ("triton", "cuda", "reference")
    assert op._order("cpu", linear(2, 80, 320, 640), {}) == ("cpu", "reference")


def test_without_measurements_triton_is_the_default(monkeypatch):
    monkeypatch.setattr(_choice, "table", dict)
    monkeypatch.setattr(_choice, "capability", lambda device: "9.0")
    assert _backend.OPS["linear_sq_"]._order("cuda", linear(2, 8, 32, 64), {}) == ("triton", "cuda", "reference")


def test_a_call_in_tf32_is_another_mode():
    args = linear(2, 3, 5, 7, torch.float32)
    with clock.tf32(True):
        assert _choice.mode(args) == "tf32" and _choice.mode(linear(2, 3, 5, 7)) == "bf16"
    with clock.tf32(False):
        assert _choice.mode(args) == "fp32"
    ids = (torch.zeros(7, 5), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, 5, dtype=torch.float16))
    assert _choice.mode(ids) == "bf16" and _choice.extents(ids) == ((7, 5), (2, 3), (2, 3, 5))


# ---- the page


def model(way, ours, ratio, peak, **more):
    times = {"seconds": [ratio / 10] * 3, "plain_seconds": [0.1] * 3, "ratio": [ratio - 0.1, ratio, ratio + 0.1]}
    head = {"case": "toy", "summary": "A toy", "mode": "bf16", "quantity": "diagonal", "parameters": 7 * 10**6}
    memory = {"peak_bytes": peak * 2**30, "plain_peak_bytes": 2**30}
    return head | {"way": way, "ours": ours} | (more if "why" in more else times | memory | {"difference": 0.01})


LARGEST = {
    "layers": 3,
    "parameters": 2 * 10**9,
    "expected_bytes": 18 * 2**30,
    "seconds": 0.5,
    "trace": 1.0,
    "peak_bytes": 14 * 2**30,
}


def test_the_page_of_a_gpu(tmp_path):
    full = {"route": "full", "error": None, "why": "out of memory: of which"}
    ops = [
        measured(),
        measured(case="yard", routes=[route("triton", 2e-4, fraction=0.75), route("other", 1e-4, error=None), full]),
    ]
    models = [model("fisherfast", True, 1.2, 3), model("loop", False, 1.5, 2)]
    models.append(model("einsum", False, 0, 0, why="out of memory"))
    text = page.render([document(tmp_path, ops, models=models, largest=[LARGEST])])
    assert text.startswith(page.HEAD) and "\n## NVIDIA Abacus\n" in text and "data in `2020-01-02.json`" in text
    assert "copy 4.00 TB/s" in text and "bf16 800.0" in text
    assert "| a | 2 8 32 64 | bf16 | 0.100 (bf16) | 0.200 (50%) | 0.100 (50%) | 0.50 | 3.00 | - | - |" in text
    assert "| yard | 2 8 32 64 | bf16 | 0.100 (bf16) | 0.200 (75%) | - | 0.50 | - | 0.50 | out of memory |" in text
    assert "**toy, diagonal, bf16**: A toy; 7 M parameters; plain takes 100 ms and 1.00 GiB." in text
    assert "| **fisherfast** | 1.20 | [1.10, 1.30] | 120 | 3.00 |" in text and "| einsum | - | - | - | - |" in text
    assert "- einsum: out of memory." in text
    assert "3 layers of Llama 3 8B's widths, 2.00 B parameters in bf16, a batch of one sequence in 0.50 s; peak 14.00 GiB" in text


def test_the_page_of_a_gpu_hides_no_loss():
    slow = measured(routes=[route("triton", 4e-4), route("cuda", 5e-4), route("peer", 3e-4), route("yard", 1e-5, error=None)])
    slow["shape"] |= {"T": 512}
    wrong = measured(case="w", routes=[{"route": "triton", "error": 1.0, "passes": False}])
    close = measured(case="c", routes=[route("triton", 2e-4, error=9e-7, passes=False), route("peer", 1e-4)])
    broken = measured(case="b", routes=[{"route": "triton", "error": None, "passes": False, "why": "raises RuntimeError: x"}])
    models = [model("fisherfast", True, 1.2, 3), model("loop", False, 1.1, 2)]
    models.append(model("fisherfast", True, 0, 0, why="differs from plain torch by 2") | {"quantity": "kfac"})
    smoke = [{"op": "gram_", "route": "cuda", "why": record.LOST}, {"op": "gram_", "route": "triton"}]
    parts = {"smoke": smoke, "ops": [slow, wrong, close, broken], "models": models, "largest": []}
    run = {"date": "d", "machine": MACHINE, "ceilings": CEILINGS, **parts}
    text = gpu_page.section(run, "x.json")
    assert text.partition("### Where we lose\n")[2].strip().splitlines() == [
        "- `gram_` cuda, small calls: hung, crashed or took too long.",
        "- `linear_sq_` a bf16: 0.75 of the speed of peer.",
        "- `linear_sq_` a bf16: 50% of the bound, meant to reach 70%.",
        "- `linear_sq_` w bf16: triton misses the numerical gate: error 1.0e+00, plain torch's 2.0e-07.",
        "- `linear_sq_` c bf16: triton misses the numerical gate: error 9.0e-07, plain torch's 2.0e-07.",
        "- `linear_sq_` b bf16: triton raises RuntimeError: x.",
        "- toy bf16, diagonal, time: loop takes 1.10 of a plain step, ours 1.20.",
        "- toy bf16, diagonal, memory: loop peaks at 2.00 GiB, ours at 3.00.",
        "- toy bf16, kfac: ours differs from plain torch by 2.",
    ]
    assert "wrong" in text.partition("| w |")[2].partition("\n")[0]
    assert "| c | 2 8 32 64 | bf16 | 0.100 (bf16) | 0.200 (50%, FAILS THE GATE) | - | - | - | - |" in text


def test_the_page_of_a_gpu_without_models_or_losses():
    run = {"date": "d", "machine": MACHINE, "ceilings": CEILINGS, **EMPTY, "ops": [measured()]}
    text = gpu_page.section(run, "x.json")
    assert "Whole models" not in text and "largest" not in text and "Nowhere in this run." in text


def test_a_rehearsal_goes_on_where_it_stopped(monkeypatch, tmp_path):
    """All three programs from the command line on; a second run finds nothing left to do."""
    monkeypatch.setattr(problems, "order", lambda: [("scale_sq_", "llama8b-norm", "fp32"), ("log1p_sum", "llama1b-up", "fp32")])
    only = model_cases.CASES["gpt2"]._replace(quantities=("kfac",))
    monkeypatch.setattr(model_cases, "CASES", {"gpt2": only})
    monkeypatch.setattr(clock, "ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(sys, "argv", ["program", "--rehearse", str(tmp_path)])
    monkeypatch.setattr(calls, "CALLS", {"scale_sq_": calls.CALLS["scale_sq_"]})
    contents = []
    for program in (smoke, run, models, smoke, run, models):
        assert program.main() == 0
        (path,) = tmp_path.rglob("*.json")
        contents.append(json.loads(path.read_text()))
    content = contents[2]
    assert contents[3:] == [content] * 3
    assert content["smoke"] == [{"op": "scale_sq_", "route": "cpu"}, {"op": "scale_sq_", "route": "reference"}]
    assert len(content["ops"]) == 2 and len(content["models"]) == 4 and content["largest"][0]["trace"] > 0


def test_a_run_without_time_says_what_is_left(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(clock, "ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(sys, "argv", ["run.py", "--rehearse", str(tmp_path), "--seconds", "0"])
    assert run.main() == record.ENDED
    assert f"{len(problems.order())} cases left, run again to go on" in capsys.readouterr().out


# ---- predictions


def test_the_page_has_the_predictions_of_today():
    text = predict.PAGE.read_text()
    assert predict.replaced(text) == text, "docs/gpu.md was edited; run python bench/gpu/predict.py"
    assert all(f"| `{op}` | {case} |" in text for op, found in problems.CASES.items() for case in found.cases)


def test_a_prediction_is_a_bound_over_a_share():
    for found in predict.predictions():
        assert 0 < found.share <= 1
        assert found.seconds == max(predict.LAUNCHES, found.bound.seconds / found.share)


def test_an_epilogue_costs_short_samples_more():
    shares = [predict.share("linear_sq_", "bf16", {"T": T}, "bf16") for T in (32, 128, 512, 4096)]
    assert all(a < b < 0.75 for a, b in pairwise(shares))


def test_a_fisher_s_steps_by_arithmetic():
    """Products as fast as torch's: the squares take the place of the weight gradients; factors half of theirs, where square."""
    assert predict.diagonal_ratio(1.0) == 1.0 and predict.diagonal_ratio(0.5) == pytest.approx(4 / 3)
    tall = capacity.Decoder(width=1, heads=1, groups=1, inner=1, vocabulary=10**9)
    assert predict.kfac_ratio(tall, 1, 1.0) == pytest.approx(4 / 6)
