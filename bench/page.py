# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md from the stored results: a pure function of the JSON files, so a test can hold the page to them."""

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"
OURS = "cpu"  # the backend the tables are about
NONE = "-"

HEAD = """\
# Performance

Written by `make bench` from the files in `bench/results/`; edit neither. How each number is taken is in `bench/README.md`.
Every result was compared with a float64 oracle before it was timed: a wrong result has no number.
"""
MODELS = """\
### Diagonal of a whole model

Time for the empirical diagonal of one batch, as a ratio to one plain forward and backward of that batch (no optimiser, loss
summed): median of paired rounds, quartiles in brackets. Memory is the peak above the plain step's own, each in a fresh process.
"""
LINEAR = """\
### `linear_sq_`

GFLOP/s count the products only (2NTIO). A column with x says how many times faster ours is than that route; below 1 we lose.
The error against float64 is relative to plain torch's (einsum, materialised); the gate is 2.
The dW GEMM is the sum over samples that an ordinary backward pass computes: a yardstick, not the same result.
"""
MEMORY = """\
### Ops bound by memory

GB/s count what must be read and written once. The copy moves as many bytes, through the same caches, in the same run.
"""


def newest() -> list[Path]:
    """The latest run of every CPU."""
    return [max(folder.glob("*.json")) for folder in sorted(RESULTS.glob("cpu-*"))]


def render(paths: Iterable[Path] | None = None) -> str:
    """The whole page, from the latest run of every CPU or from the runs given."""
    runs = [section(json.loads(path.read_text()), path.name) for path in (newest() if paths is None else paths)]
    return "\n".join([HEAD, *runs])


def section(run: dict, source: str) -> str:
    """One machine's results."""
    models = [_model(case, run) for case in dict.fromkeys(r["case"] for r in run["models"])]
    parts = [_machine(run, source), MODELS, *models, LINEAR, _linear(run), MEMORY, _memory(run), _losses(run)]
    return "\n".join(parts)


def _machine(run: dict, source: str) -> str:
    machine = run["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    hashes = ", ".join(f"`{folder}/` {digest[:12]}" for folder, digest in machine["sha256"].items())
    changed = " with uncommitted changes" if machine["uncommitted"] else ""
    peak = run["ops"][0]["fma_peak_gflops"]
    return (
        f"## {machine['cpu']}, {machine['isa']}, {machine['threads']} threads, float32\n\n"
        f"{run['date']}, commit {machine['commit']}{changed} (sha256 of {hashes}); data in `{source}`.\n"
        f"Python {machine['python']}, {versions}.\n"
        f"Float32 multiply-add peak, measured in the same run: {peak:.0f} GFLOP/s.\n"
    )


def _table(head: list[str], rows: Iterable[list[str]], left: int = 1) -> str:
    rules = [":--"] * left + ["--:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rules, *rows)) + "\n"


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:.0f}"


def _model(case: str, run: dict) -> str:
    rows = sorted((r for r in run["models"] if r["case"] == case), key=lambda r: r["ratio"][1])
    first = rows[0]
    title = (
        f"**{first['summary']}**: the plain step takes {first['baseline_seconds'] * 1e3:.1f} ms and peaks "
        f"{_mebibytes(first['plain_peak_bytes'])} MiB above the resting model.\n"
    )
    versions = run["machine"]["versions"]
    body = [
        [
            f"**{r['way']}**" if r["package"] == "fisherfast" else r["way"],
            versions.get(r["package"], NONE),
            f"{r['ratio'][1]:.2f}",
            f"[{r['ratio'][0]:.2f}, {r['ratio'][2]:.2f}]",
            f"{r['seconds'][1] * 1e3:.1f}",
            _mebibytes(r["peak_bytes"] - r["plain_peak_bytes"]),
        ]
        for r in rows
    ]
    unable = [c for c in run["cannot"] if c["case"] == case]
    body += [[c["way"], versions.get(c["package"], NONE), *[NONE] * 4] for c in unable]
    table = _table(["way", "version", "ratio", "quartiles", "ms", "MiB above plain"], body, left=2)
    reasons = [f"- {c['way']} cannot: {c['reason']}." + (f" Why: {c['why']}." if c["why"] else "") for c in unable]
    return "\n".join([title, table, *reasons, *([""] if reasons else [])])


def _routes(run: dict, op: str) -> dict[str, dict[str, dict]]:
    """The records of an op: ``[case][route]``."""
    cases: dict[str, dict[str, dict]] = {}
    for r in run["ops"]:
        if r["op"] == op:
            cases.setdefault(r["case"], {})[r["route"]] = r
    return cases


def _faster(records: dict[str, dict], route: str) -> float | None:
    """How many times faster ours is than a route, both measured against one baseline."""
    return records[route]["ratio"][1] / records[OURS]["ratio"][1] if route in records else None


def _times(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _linear(run: dict) -> str:
    others = ["reference", "mm per sample", "einsum, materialised", "addmm of squares", "dW GEMM alone"]
    cases = _routes(run, "linear_sq_")
    rows = []
    for case, records in cases.items():
        ours = records[OURS]
        rate = ours["flops"] / ours["seconds"][1] * 1e-9
        rows.append(
            [
                case,
                " ".join(map(str, ours["shape"].values())),
                f"{ours['seconds'][1] * 1e3:.2f}",
                f"{rate:.0f}",
                f"{100 * rate / ours['fma_peak_gflops']:.0f} %",
                f"{ours['error'] / ours['plain_error']:.2f}",
                *(_times(_faster(records, route)) for route in others),
            ]
        )
    gains = [_faster(records, "mm per sample") for records in cases.values()]
    mean = f"\nGeometric mean over mm per sample: {prod(gains) ** (1 / len(gains)):.2f}.\n"
    return _table(["case", "N T I O", "ms", "GFLOP/s", "of peak", "error", *(f"x {o}" for o in others)], rows, left=2) + mean


def _memory(run: dict) -> str:
    plain = {"scale_sq_": "sum and square", "embedding_sq_": "index_add per sample"}
    rows = [
        [
            f"`{op}`",
            case,
            " ".join(f"{k}={v}" for k, v in records[OURS]["shape"].items()),
            f"{records[OURS]['seconds'][1] * 1e6:.0f}",
            f"{records[OURS]['bytes'] / records[OURS]['seconds'][1] * 1e-9:.1f}",
            f"{100 * _faster(records, 'copy of as many bytes'):.0f} %",
            _times(_faster(records, "reference")),
            _times(_faster(records, route)),
        ]
        for op, route in plain.items()
        for case, records in _routes(run, op).items()
    ]
    return _table(["op", "case", "shape", "us", "GB/s", "of copy", "x reference", "x plain torch"], rows, left=3)


def _losses(run: dict) -> str:
    lines = []
    for case in dict.fromkeys(r["case"] for r in run["models"]):
        rows = [r for r in run["models"] if r["case"] == case]
        best = min((r["ratio"][1] for r in rows if r["package"] == "fisherfast"), default=float("inf"))
        lines += [
            f"- {case}: {r['way']} takes {r['ratio'][1]:.2f} of a plain step, our best {best:.2f}."
            for r in rows
            if r["package"] != "fisherfast" and r["ratio"][1] < best
        ]
    for op in dict.fromkeys(r["op"] for r in run["ops"]):
        for case, records in _routes(run, op).items():
            gains = {route: _faster(records, route) for route in records if route != OURS}
            lines += [f"- `{op}` {case}: {gain:.2f} of the speed of {route}." for route, gain in gains.items() if gain < 1]
    return "\n".join(["### Where we are slower\n", *(lines or ["Nowhere in this run."]), ""])
