# SPDX-License-Identifier: Apache-2.0
"""The performance page is a function of the stored results, and hides nothing that is in them."""

import importlib.util
import json
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "bench" / "page.py"


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("bench_page", PATH)
    module = importlib.util.module_from_spec(spec)
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
    (tmp_path / "run.json").write_text(json.dumps(run))
    text = page.render([tmp_path / "run.json"])
    assert "| small | 2 3 5 7 | 1.00 | 50 | 50 % | 0.75 | 3.00 | 2.00 | 4.00 | - | 0.50 |" in text
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


def test_performance_page_without_losses_says_so(page, run):
    run["models"] = run["models"][:1]
    assert "Nowhere in this run." in page.section(run, "run.json")
