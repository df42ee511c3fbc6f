# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md from the stored results: a pure function of the JSON files, so a test can hold the page to them."""

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"
NONE = "-"

HEAD = """\
# Performance

Written by `make bench` from the files in `bench/results/`; edit neither. How each number is taken is in `bench/README.md`.
Every result was compared with a float64 oracle before it was timed: a wrong result has no number.
"""
MODELS = """\
### Diagonal of a whole model

Time for the empirical diagonal of one batch, as a ratio to one plain forward and backward of that batch (no optimiser, loss
summed): median over alternating rounds, quartiles in brackets. Memory is the peak above the plain step's own, each in a fresh process.
"""
LINEAR = """\
### `linear_sq_`

GFLOP/s count the products only (2NTIO). A column with x says how many times faster ours is than that route; below 1 we lose.
The error against float64 is relative to plain torch's (einsum, materialised); the gate is 2.
Routes that reach the same result are plain torch; the dW GEMM, which an ordinary backward pass computes, is a yardstick.
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
    rows = sorted((r for r in run["models"] if r["case"] == case), key=_ratio)
    plain = [1e3 * r["others"]["plain"]["seconds"][1] for r in rows]
    title = (
        f"**{rows[0]['summary']}**: beside the different ways the plain step takes {min(plain):.1f} to {max(plain):.1f} ms; "
        f"it peaks {_mebibytes(rows[0]['plain_peak_bytes'])} MiB above the resting model.\n"
    )
    versions = run["machine"]["versions"]
    body = [
        [
            f"**{r['way']}**" if _ours(r) else r["way"],
            versions.get(r["package"], NONE),
            f"{_ratio(r):.2f}",
            "[{:.2f}, {:.2f}]".format(*r["others"]["plain"]["ratio"][::2]),
            f"{r['seconds'][1] * 1e3:.1f}",
            _mebibytes(_above_plain(r)),
        ]
        for r in rows
    ]
    unable = [c for c in run["cannot"] if c["case"] == case]
    body += [[c["way"], versions.get(c["package"], NONE), *[NONE] * 4] for c in unable]
    table = _table(["way", "version", "ratio", "quartiles", "ms", "MiB above plain"], body, left=2)
    reasons = [f"- {c['way']} cannot: {c['reason']}." + (f" Why: {c['why']}." if c["why"] else "") for c in unable]
    return "\n".join([title, table, *reasons, *([""] if reasons else [])])


def _ours(record: dict) -> bool:
    return record["package"] == "fisherfast"


def _ratio(record: dict) -> float:
    return record["others"]["plain"]["ratio"][1]


def _above_plain(record: dict) -> int:
    return record["peak_bytes"] - record["plain_peak_bytes"]


def _records(run: dict, op: str) -> list[dict]:
    return [r for r in run["ops"] if r["op"] == op]


def _faster(record: dict, route: str) -> float | None:
    """How many times faster ours is than a route, measured in the same rounds; None where the case has no such route."""
    return 1 / record["others"][route]["ratio"][1] if route in record["others"] else None


def _best_plain(record: dict) -> float:
    """How many times faster ours is than the fastest plain torch route to the same result."""
    return min(_faster(record, route) for route in record["errors"] if route in record["others"] and route != "reference")


def _times(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _linear(run: dict) -> str:
    others = ["reference", "mm per sample", "einsum, materialised", "addmm of squares", "dW GEMM alone"]
    records = _records(run, "linear_sq_")
    rows = []
    for record in records:
        rate = record["flops"] / record["seconds"][1] * 1e-9
        rows.append(
            [
                record["case"],
                " ".join(map(str, record["shape"].values())),
                f"{record['seconds'][1] * 1e3:.2f}",
                f"{rate:.0f}",
                f"{100 * rate / record['fma_peak_gflops']:.0f} %",
                f"{record['errors']['cpu'] / record['errors'][record['plain']]:.2f}",
                *(_times(_faster(record, route)) for route in others),
            ]
        )
    head = ["case", "N T I O", "ms", "GFLOP/s", "of peak", "error", *(f"x {o}" for o in others)]
    mean = prod(_best_plain(r) for r in records) ** (1 / len(records))
    return f"{_table(head, rows, left=2)}\nGeometric mean over the fastest plain torch route of each case: {mean:.2f}.\n"


def _memory(run: dict) -> str:
    rows = [
        [
            f"`{op}`",
            record["case"],
            " ".join(f"{k}={v}" for k, v in record["shape"].items()),
            f"{record['seconds'][1] * 1e6:.0f}",
            f"{record['bytes'] / record['seconds'][1] * 1e-9:.1f}",
            f"{100 * _faster(record, 'copy of as many bytes'):.0f} %",
            _times(_faster(record, "reference")),
            _times(_best_plain(record)),
        ]
        for op in ("scale_sq_", "embedding_sq_")
        for record in _records(run, op)
    ]
    return _table(["op", "case", "shape", "us", "GB/s", "of copy", "x reference", "x plain torch"], rows, left=3)


def _losses(run: dict) -> str:
    lines = []
    for case in dict.fromkeys(r["case"] for r in run["models"]):
        rows = [r for r in run["models"] if r["case"] == case]
        theirs = [r for r in rows if not _ours(r)]
        best = min((r for r in rows if _ours(r)), key=_ratio)
        lines += [
            f"- {case}, time: {r['way']} takes {_ratio(r):.2f} of a plain step, our best {_ratio(best):.2f}."
            for r in theirs
            if _ratio(r) < _ratio(best)
        ]
        lines += [
            f"- {case}, memory: {r['way']} peaks {_mebibytes(_above_plain(r))} MiB above plain, our fastest "
            f"{_mebibytes(_above_plain(best))}."
            for r in theirs
            if _above_plain(r) < _above_plain(best)
        ]
    for record in run["ops"]:
        gains = {route: _faster(record, route) for route in record["errors"] if route in record["others"]}
        lines += [f"- `{record['op']}` {record['case']}: {g:.2f} of the speed of {r}." for r, g in gains.items() if g < 1]
    return "\n".join(["### Where we lose\n", *(lines or ["Nowhere in this run."]), ""])
