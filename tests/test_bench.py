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


def op(route, ratio, op="linear_sq_", case="small"):
    return {
        "op": op,
        "case": case,
        "route": route,
        "shape": {"N": 2, "T": 3, "I": 5, "O": 7},
        "fma_peak_gflops": 100.0,
        "flops": 5 * 10**7,
        "bytes": 10**6,
        "error": 3e-7,
        "plain_error": 4e-7,
        "ratio": [ratio - 0.01, ratio, ratio + 0.01],
        "seconds": [1e-3, 1e-3, 1e-3],
    }


def model(way, package, ratio):
    return {
        "case": "toy",
        "summary": "Toy network",
        "way": way,
        "package": package,
        "ratio": [ratio - 0.01, ratio, ratio + 0.01],
        "seconds": [0.02, 0.03, 0.04],
        "baseline_seconds": 0.0321,
        "plain_peak_bytes": 10 * 2**20,
        "peak_bytes": 37 * 2**20,
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
            "versions": {"torch": "9.9", "peer": "1.2.3"},
            "commit": "abc1234",
            "uncommitted": False,
            "sha256": {"csrc": "0" * 64},
        },
        "ops": [
            op("cpu", 0.5),
            op("reference", 1.5),
            op("mm per sample", 1.0),
            op("einsum, materialised", 2.0),
            op("dW GEMM alone", 0.25),
        ],
        "models": [model("ours", "fisherfast", 0.9), model("theirs", "peer", 0.8)],
        "cannot": [{"case": "toy", "way": "other", "package": None, "reason": "raises ValueError", "why": "no such layer"}],
    }


def test_performance_page_equals_its_results(page):
    assert page.newest(), "no results are stored; run make bench"
    assert page.render() == page.PAGE.read_text(), "docs/performance.md was edited; run python bench/performance.py --page"


def test_performance_page_numbers(page, run, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(run))
    text = page.render([tmp_path / "run.json"])
    assert "| small | 2 3 5 7 | 1.00 | 50 | 50 % | 0.75 | 3.00 | 2.00 | 4.00 | - | 0.50 |" in text
    assert "| **ours** | - | 0.90 | [0.89, 0.91] | 30.0 | 27 |" in text
    assert "Geometric mean over mm per sample: 2.00." in text
    assert "data in `run.json`" in text


def test_performance_page_shows_losses(page, run):
    text = page.section(run, "run.json")
    assert "- toy: theirs takes 0.80 of a plain step, our best 0.90." in text
    assert "- `linear_sq_` small: 0.50 of the speed of dW GEMM alone." in text
    assert "mm per sample." not in text.partition("Where we are slower")[2]


def test_performance_page_shows_what_a_peer_cannot(page, run):
    text = page.section(run, "run.json")
    assert "| other | - | - | - | - | - |" in text
    assert "- other cannot: raises ValueError. Why: no such layer." in text


def test_performance_page_without_losses_says_so(page, run):
    run["models"] = run["models"][:1]
    run["ops"] = [r for r in run["ops"] if r["route"] != "dW GEMM alone"]
    assert "Nowhere in this run." in page.section(run, "run.json")
