# SPDX-License-Identifier: Apache-2.0
"""The performance page is a function of the stored results, and hides nothing that is in them."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import fisherfast as ff

PATH = Path(__file__).parents[1] / "bench" / "page.py"


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("bench_page", PATH)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PATH.parent)  # it imports its neighbour
        spec.loader.exec_module(module)
    return module


def op():
    def slower(times):
        return {"seconds": [0.001 * times] * 3, "ratio": [1 / times] * 3}

    return {
        "op": "linear_sq_",
        "case": "small",
        "shape": {"N": 2, "T": 3, "I": 5, "O": 7},
        "fma_peak_gflops": 100.0,
        "flops": 5 * 10**7,
        "bytes": 10**6,
        "plain": "einsum, materialised",
        "errors": {"cpu": 3e-7, "reference": 4e-7, "mm per sample": 4e-7, "einsum, materialised": 4e-7},
        "seconds": [1e-3, 1e-3, 1e-3],
        "others": {
            "reference": slower(3),
            "mm per sample": slower(2),
            "einsum, materialised": slower(4),
            "dW GEMM alone": slower(0.5),
        },
    }


def model(way, package, ratio, peak):
    return {
        "case": "toy",
        "summary": "Toy network",
        "way": way,
        "package": package,
        "seconds": [0.02, 0.03, 0.04],
        "others": {"plain": {"seconds": [0.03, 0.0321, 0.04], "ratio": [ratio - 0.01, ratio, ratio + 0.01]}},
        "plain_peak_bytes": 10 * 2**20,
        "peak_bytes": (10 + peak) * 2**20,
    }


def convolution():
    shape = {"N": 2, "C": 3, "O": 5, "H": 7, "K": 3, "stride": 1, "groups": 1}
    record = op() | {"op": "conv_sq_", "case": "tiny", "shape": shape}
    record["others"] = {"reference": record["others"]["reference"], "dW of the batch": record["others"]["dW GEMM alone"]}
    record["others"]["einsum, materialised"] = op()["others"]["einsum, materialised"]
    return record


def points(sweep, seconds, left_out=None):
    """Records of one sweep: ``{way: seconds at 1, 10, 100, ...}``."""
    count = max(map(len, seconds.values()))
    return [
        {
            "sweep": sweep,
            "title": "toy that grows",
            "point": 10**i,
            "seconds": {way: times[i] for way, times in seconds.items() if i < len(times)},
            "left_out": left_out or {},
        }
        for i in range(count)
    ]


@pytest.fixture
def run():
    return {
        "date": "2020-01-02",
        "machine": {
            "cpu": "Abacus",
            "isa": "beads",
            "threads": 2,
            "python": "3.11",
            "versions": {"fisherfast": "0.1", "peer": "1.2.3"},
            "commit": "abc1234",
            "uncommitted": False,
            "sha256": {"csrc": "0" * 64},
        },
        "ops": [op()],
        "models": [model("ours", "fisherfast", 0.9, 27), model("theirs", "peer", 0.8, 5)],
        "cannot": [{"case": "toy", "way": "other", "package": None, "reason": "raises ValueError", "why": "no such layer"}],
    }


def test_performance_page_equals_its_results(page):
    assert page.newest(), "no results are stored; run make bench"
    assert page.render() == page.PAGE.read_text(), "docs/performance.md was edited; run python bench/performance.py --page"


def test_performance_page_numbers(page, run, tmp_path):
    run["ops"].append(op() | {"case": "another"})
    run["ops"][1]["others"]["addmm of squares"] = op()["others"]["reference"]
    (tmp_path / "run.json").write_text(json.dumps(run))
    text = page.render([tmp_path / "run.json"])
    assert "| small | 2 3 5 7 | 1.00 | 50 | 50 % | 0.75 | 3.00 | 2.00 | 4.00 | 0.50 | - |" in text
    assert "| another | 2 3 5 7 | 1.00 | 50 | 50 % | 0.75 | 3.00 | 2.00 | 4.00 | 0.50 | 3.00 |" in text
    assert "| **ours** | 0.1 | 0.90 | [0.89, 0.91] | 30.0 | 27 |" in text
    assert "fastest plain torch route of each case: 2.00." in text
    assert "data in `run.json`" in text


def test_performance_page_shows_losses(page, run):
    run["ops"][0]["others"]["mm per sample"]["ratio"] = [1.9, 2.0, 2.1]
    losses = page.section(run, "run.json").partition("Where we lose")[2]
    assert losses.strip().splitlines() == [
        "- toy, time: theirs takes 0.80 of a plain step, our best 0.90.",
        "- toy, memory: theirs peaks 5 MiB above plain, our fastest 27.",
        "- `linear_sq_` small: 0.50 of the speed of mm per sample.",
    ]


def test_performance_page_shows_what_a_peer_cannot(page, run):
    text = page.section(run, "run.json")
    assert "| other | - | - | - | - | - |" in text
    assert "- other cannot: raises ValueError. Why: no such layer." in text


def test_performance_page_gives_the_first_sentence_of_what_a_peer_raises(page, run):
    run["cannot"][0]["reason"] = "raises ValueError: shape [8, 4096] is not 2.5 times [8, 128]. Call reshape. And more."
    assert "- other cannot: raises ValueError: shape [8, 4096] is not 2.5 times [8, 128]. Why:" in page.section(run, "run.json")


def test_performance_page_without_losses_says_so(page, run):
    run["models"] = run["models"][:1]
    assert "Nowhere in this run." in page.section(run, "run.json")


def test_performance_page_of_a_run_before_there_were_more_tables(page, run):
    text = page.section(run, "run.json")
    assert "### Diagonal of a whole model" in text
    assert not any(part in text for part in ("### Exact", "### Squared norm", "### Cost against", "### `conv_sq_`"))


def test_performance_page_has_a_table_per_quantity(page, run):
    run["models"] += [model("ours, exact", "fisherfast", 3.5, 20) | {"quantity": "exact"}]
    run["models"] += [model("theirs, exact", "peer", 3.25, 90) | {"quantity": "exact"}]
    run["cannot"] += [{**run["cannot"][0], "quantity": "exact", "way": "another", "why": None}]
    text = page.section(run, "run.json")
    diagonal, exact = text.split("### Exact Fisher over 10 classes")
    assert "| **ours, exact** | 0.1 | 3.50 | [3.49, 3.51] | 30.0 | 20 |" in exact and "ours, exact" not in diagonal
    assert "- another cannot: raises ValueError." in exact and "- another cannot" not in diagonal
    assert "- toy, exact, time: theirs, exact takes 3.25 of a plain step, our best 3.50." in exact


def test_performance_page_says_what_ours_is_meant_to_take(page, run):
    run["models"][0] |= {"limit": 0.85}
    text = page.section(run, "run.json")
    assert "| way | version | meant to take | ratio |" in text
    assert "| **ours** | 0.1 | 0.85 | 0.90 |" in text and "| theirs | 1.2.3 | - | 0.80 |" in text
    assert "| other | - | - | - | - | - | - |" in text
    assert "- toy, diagonal: ours is meant to take 0.85 plain steps and takes 0.90." in text.partition("Where we lose")[2]


def test_performance_page_says_what_memory_ours_is_allowed(page, run, monkeypatch):
    monkeypatch.setattr(
        page.limits, "memory", lambda case, quantity: 26 * 2**20 if (case, quantity) == ("toy", "diagonal") else None
    )
    run["models"].append(model("ours, smaller", "fisherfast", 0.95, 26))
    text = page.section(run, "run.json")
    assert "| MiB above plain | MiB allowed |" in text and "| other | - | - | - | - | - | - |" in text
    assert "| 30.0 | 27 | 26, missed |" in text and "| 30.0 | 26 | 26, met |" in text and "| 30.0 | 5 | - |" in text
    losses = text.partition("Where we lose")[2]
    assert "- toy, diagonal: ours is allowed 26 MiB above plain and takes 27." in losses and "smaller is allowed" not in losses


def test_memory_allowed_is_counted_by_hand(page):
    weights, allowance = ((784, 1024), (1024, 1024), (1024, 10)), 64 * 2**20
    assert page.limits.memory("mlp", "diagonal") == allowance + 4 * sum((I + 1) * O for I, O in weights)
    factors = 4 * sum((I + 1) ** 2 + O**2 for I, O in weights)
    assert page.limits.memory("mlp", "kfac") == allowance + factors
    assert page.limits.memory("mlp", "ekfac correction") == allowance + factors + 12 * 1025**2
    assert page.limits.memory("mlp", "norms") is page.limits.memory("toy", "kfac") is None


def test_memory_allowed_is_for_what_a_plan_says(page):
    model, x, y = page.limits.models.CASES["decoder"].build(clear=False)
    planned = ff.plan(model, (x[:2], y[:2]), "kfac", "empirical").total_bytes  # 8 bytes a number
    assert page.limits.memory("decoder", "kfac") == page.limits.ALLOWANCE + planned // 2


def test_performance_page_of_a_convolution(page, run):
    run["ops"].append(convolution())
    text = page.section(run, "run.json")
    assert (
        "| case | N C O H K stride groups | ms | GFLOP/s | of peak | error | x reference | x dW of the batch | x einsum" in text
    )
    assert "| tiny | 2 3 5 7 3 1 1 | 1.00 | 50 | 50 % | 0.75 | 3.00 | 0.50 | 4.00 |" in text


def test_performance_page_scaling(page, run):
    seconds = {
        "plain": [1.0, 10.0, 100.0],
        "fisherfast: ff.collect, each further batch": [1.5, 15.0, 150.0],
        "Peer, its way": [1.0, 100.0, 10000.0],
        "Slow": [1.0, 1000.0],
    }
    run["scaling"] = points("samples N", seconds, {"Slow": "beyond 10 takes more than 1 s a run"})
    text = page.section(run, "run.json")
    assert "(scaling-abacus-2-threads.svg)" in text
    assert "| way | samples N: toy that grows |" in text
    assert "| plain forward and backward | 1.00 (1.00) |" in text
    assert "| **fisherfast, a further batch** | 1.00 (1.00) |" in text
    assert "| Peer | 2.00 (2.00) |" in text
    assert "| Slow | - |" in text
    assert "- Slow, samples N: beyond 10 takes more than 1 s a run." in text
    losses = text.partition("Where we lose")[2]
    assert "- scaling, samples N = 1: Peer takes less time than a further batch of ours." in losses


def test_performance_page_figures_are_stored(page):
    runs = [json.loads(path.read_text()) for path in page.newest()]
    assert all(page.figure(run["machine"]).is_file() for run in runs if run.get("scaling"))


@pytest.mark.parametrize("script", ["model_table", "comparison", "information"])
def test_pages_equal_their_results(page, script):
    spec = importlib.util.spec_from_file_location(f"bench_{script}", PATH.parent / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    assert module.render() == module.PAGE.read_text(), f"{module.PAGE.name} was edited; run python bench/{script}.py --page"
    assert list(page.RESULTS.glob(f"cpu-*/{module.FILE}")), f"no results are stored; run python bench/{script}.py"
