# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md from the stored results: a pure function of the JSON files, so a test can hold the page to them."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import limits
import markdown_table
import origin
import scaling
from gpu import page as gpu_page
from gpu import record as gpu_record
from markdown_table import NONE

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"

HEAD = """\
# Performance

Written by `make bench` from the files in `bench/results/`; edit neither. How each number is taken is in `bench/README.md`.
Every result was compared with a float64 oracle before it was timed: a wrong result has no number. *meant to take* is the ratio that we
aim for (`bench/models.py`); what misses it is listed under *Where we lose*, machine by machine.

Sections are of different versions: each names its date and commit. Where the BLAS runs near its peak, as on AMD family 25 (Zen 4) and the Intel
machines, a ratio of about 1 is the best to expect. On AMD family 26 (Zen 5) it does not, and the squares kernel is faster than `torch.mm`, which
computes the plain step's weight gradients. From that machine, stored at commit 92d4495, are the seconds and bytes of a GPT-2-shaped model on
real text in `examples/results/gpt2_text.json`, written by `examples/gpt2_text.py`.
"""
QUANTITIES = {
    "diagonal": """\
### Diagonal of a whole model

Time for the empirical diagonal of one batch, as a ratio to one plain forward and backward of that batch (no optimiser, loss
summed): median over alternating rounds, quartiles in brackets. Memory is the peak above the plain step's own, each in a fresh process;
ours is allowed its result in float32 (of EKFAC the factors, and what LAPACK takes for the largest) and 64 MiB.
""",
    "exact": """\
### Exact Fisher over 10 classes

Time for the diagonal of the exact Fisher, `sum_c p_c (d log p_c)^2` summed over the batch; ratio and memory as above.
""",
    "norms": """\
### Squared norm of every sample's gradient

Time for the squared norms of the samples' gradients over all parameters; ratio and memory as above. Ours in one pass adds the
diagonal and the moments (mean and variance of the gradients).
""",
    "kfac": """\
### KFAC's factors

Time for both Kronecker factors of every layer, over the data's labels; ratio and memory as above. The peers are asked for Linear layers and
2d convolutions only, ours measures every parameter.
""",
    "ekfac": """\
### EKFAC from start to result

Factors, eigendecompositions and corrected eigenvalues of one batch; ratio and memory as above.
""",
    "ekfac bases": """\
### EKFAC's eigenvectors alone

Time for the eigenvectors of all factors, which are there already; what every peer does in this step is plain torch's. Ratio and memory as above.
""",
    "ekfac correction": """\
### EKFAC's corrected eigenvalues alone

Time for the second moments along a basis that is there already; ratio and memory as above.
""",
}
SCALING = """\
### Cost against N, T, width and classes

Least of a few runs at each point, all ways in turn, each result compared with the oracle at every point. The exponent is the
slope of log time against log extent by least squares over all points; in brackets, over the last three.
"""
GEMMS = {
    "linear_sq_": """\
### `linear_sq_`

GFLOP/s count the products only (2NTIO). A column with x says how many times faster ours is than that route; below 1 we lose.
The error against float64 is relative to plain torch's (einsum, materialised); the gate is 2.
Routes that reach the same result are plain torch; the dW GEMM, which an ordinary backward pass computes, is a yardstick, in
16 bits with a result of 16 bits. The peak is that of float32 without matrix registers: 16-bit inputs may exceed it where there are any.
""",
    "conv_sq_": """\
### `conv_sq_`

As above; images are H x H, kernels K x K. The gradient of the whole batch, which an ordinary backward pass computes, is the yardstick.
""",
    "gram_": """\
### `gram_`

GFLOP/s count the products on and above the diagonal, `M D (D + 1)`, so plain torch, which computes all of it, has twice as many to do.
""",
    "conv_gram_": """\
### `conv_gram_`

As above, D = C K K: the symmetric half of what unfolding and multiplying takes. Shifts of an image are shared between pairs of kernel
offsets, so more than the peak is possible. The product of patches that are unfolded already is the yardstick.
""",
    "ghost_norm_": """\
### `ghost_norm_`

Squared norms alone. GFLOP/s count half of two Gram matrices over positions, `N P (P + 1) (C + O)`, and nothing for offsets of a kernel;
"by squares" is `linear_sq_` or `conv_sq_` with squares that nobody wants. The gradient of the whole batch is the yardstick.
""",
}
MEMORY = """\
### Ops bound by memory

GB/s count what must be read and written once. The copy moves as many bytes, through the same caches, in the same run.
"""


def newest() -> list[Path]:
    """The latest run of every CPU that has one."""
    runs = [sorted(folder.glob("*.json")) for folder in sorted(RESULTS.glob("cpu-*"))]
    return [found[-1] for found in runs if found]


def slug(machine: dict) -> str:
    """The name of a machine's folder of results."""
    return f"cpu-{origin.slug(machine['cpu'])}-{machine['threads']}-threads"


def figure(machine: dict) -> Path:
    """Where a machine's figure of the scaling lies."""
    return PAGE.with_name(f"scaling-{slug(machine).removeprefix('cpu-')}.svg")


def render(paths: Iterable[Path] | None = None) -> str:
    """The whole page, from the latest run of every CPU and of every GPU, or from the runs given."""
    given = [*newest(), *gpu_record.newest()] if paths is None else paths
    runs = [(json.loads(path.read_text()), path.name) for path in given]
    return "\n".join([HEAD, *((section if "cpu" in run["machine"] else gpu_page.section)(run, name) for run, name in runs)])


def section(run: dict, source: str) -> str:
    """One machine's results; a part that a run does not have is left out."""
    parts = [_machine(run, source)]
    for quantity, text in QUANTITIES.items():
        cases = dict.fromkeys(r["case"] for r in run["models"] if _quantity(r) == quantity)
        parts += [text, *(_model(quantity, case, run) for case in cases)] if cases else []
    if run.get("scaling"):
        parts += [SCALING, _scaling(run)]
    for op, text in GEMMS.items():
        parts += [text, _gemm(_records(run, op))] if _records(run, op) else []
    return "\n".join([*parts, MEMORY, _memory(run), _losses(run)])


def _quantity(record: dict) -> str:
    return record.get("quantity", "diagonal")


def _machine(run: dict, source: str) -> str:
    machine = run["machine"]
    changed = " with uncommitted changes" if machine["uncommitted"] else ""
    peak = run["ops"][0]["fma_peak_gflops"]
    return (
        f"## {machine['cpu']}, {machine['isa']}, {machine['threads']} threads, float32\n\n"
        f"{run['date']}, commit {machine['commit']}{changed} (sha256 of {origin.hashes(machine)}); data in `{source}`.\n"
        f"Python {machine['python']}, {origin.versions(machine)}.\n"
        f"Float32 multiply-add peak, measured in the same run: {peak:.0f} GFLOP/s.\n"
        + (f"{run['note']}\n" if "note" in run else "")
    )


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:.0f}"


def _model(quantity: str, case: str, run: dict) -> str:
    def mine(records: list[dict]) -> list[dict]:
        return [r for r in records if _quantity(r) == quantity and r["case"] == case]

    rows = sorted(mine(run["models"]), key=_ratio)
    plain = [1e3 * r["others"]["plain"]["seconds"][1] for r in rows]
    title = (
        f"**{rows[0]['summary']}**: beside the different ways the plain step takes {min(plain):.1f} to {max(plain):.1f} ms; "
        f"it peaks {_mebibytes(rows[0]['plain_peak_bytes'])} MiB above the resting model.\n"
    )
    versions = run["machine"]["versions"]
    limited, allowed = any("limit" in r for r in rows), limits.memory(case, quantity)
    body = [
        [
            f"**{r['way']}**" if _ours(r) else r["way"],
            versions.get(r["package"], NONE),
            *([f"{r['limit']:.2f}" if "limit" in r else NONE] if limited else []),
            f"{_ratio(r):.2f}",
            "[{:.2f}, {:.2f}]".format(*r["others"]["plain"]["ratio"][::2]),
            f"{r['seconds'][1] * 1e3:.1f}",
            _mebibytes(_above_plain(r)),
            *([_held_to(r, allowed)] if allowed else []),
        ]
        for r in rows
    ]
    unable = mine(run["cannot"])
    body += [[c["way"], versions.get(c["package"], NONE), *[NONE] * (4 + limited + bool(allowed))] for c in unable]
    head = ["way", "version", *(["meant to take"] if limited else []), "ratio", "quartiles", "ms", "MiB above plain"]
    table = markdown_table.table([*head, *(["MiB allowed"] if allowed else [])], body, left=2)
    reasons = [
        f"- {c['way']} cannot: {_first_sentence(c['reason'])}." + (f" Why: {c['why']}." if c["why"] else "") for c in unable
    ]
    return "\n".join([title, table, *reasons, *([""] if reasons else [])])


def _first_sentence(reason: str) -> str:
    """Without its full stop: what a peer raises may go on for pages."""
    return reason.partition(". ")[0].rstrip(".")


def _ours(record: dict) -> bool:
    return record["package"] == "fisherfast"


def _ratio(record: dict) -> float:
    return record["others"]["plain"]["ratio"][1]


def _above_plain(record: dict) -> int:
    return record["peak_bytes"] - record["plain_peak_bytes"]


def _held_to(record: dict, allowed: int) -> str:
    if not _ours(record):
        return NONE
    return f"{_mebibytes(allowed)}, {'met' if _above_plain(record) <= allowed else 'missed'}"


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


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.0f} %"


def _gemm(records: list[dict]) -> str:
    others = list(dict.fromkeys(route for record in records for route in record["others"]))
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
    head = ["case", " ".join(records[0]["shape"]), "ms", "GFLOP/s", "of peak", "error", *(f"x {o}" for o in others)]
    mean = math.prod(_best_plain(r) for r in records) ** (1 / len(records))
    return f"{markdown_table.table(head, rows, left=2)}\nGeometric mean over the fastest plain torch route of each case: {mean:.2f}.\n"


def _memory(run: dict) -> str:
    rows = [
        [
            f"`{op}`",
            record["case"],
            " ".join(f"{k}={v}" for k, v in record["shape"].items()),
            f"{record['seconds'][1] * 1e6:.0f}",
            f"{record['bytes'] / record['seconds'][1] * 1e-9:.1f}",
            _percent(_faster(record, "copy of as many bytes")),
            _times(_faster(record, "reference")),
            _times(_best_plain(record)),
        ]
        for op in dict.fromkeys(r["op"] for r in run["ops"] if r["op"] not in GEMMS)
        for record in _records(run, op)
    ]
    return markdown_table.table(["op", "case", "shape", "us", "GB/s", "of copy", "x reference", "x plain torch"], rows, left=3)


def _scaling(run: dict) -> str:
    records = run["scaling"]
    sweeps = list(dict.fromkeys(r["sweep"] for r in records))
    curves = {sweep: scaling.labelled(records, sweep) for sweep in sweeps}
    labels = list(dict.fromkeys(label for curve in curves.values() for label in curve))
    rows = []
    for label in labels:
        cells = [curves[sweep].get(label, ([], [])) for sweep in sweeps]
        rows.append([f"**{label}**" if label.startswith("fisherfast") else label, *(_exponents(*cell) for cell in cells)])
    titles = {r["sweep"]: r["title"] for r in records}
    head = ["way", *(f"{sweep}: {titles[sweep]}" for sweep in sweeps)]
    reasons = {(r["sweep"], way): reason for r in records for way, reason in r["left_out"].items()}
    lines = [f"- {scaling.label(way)}, {sweep}: {reason}." for (sweep, way), reason in reasons.items()]
    picture = f"![{', '.join(sweeps)}: time of every way on log axes]({figure(run['machine']).name})\n"
    return "\n".join([picture, markdown_table.table(head, rows), *(["Not at every point:\n", *lines, ""] if lines else [])])


def _exponents(points: list[int], seconds: list[float]) -> str:
    if len(points) < 3:
        return NONE
    return f"{scaling.exponent(points, seconds):.2f} ({scaling.exponent(points[-3:], seconds[-3:]):.2f})"


def _losses(run: dict) -> str:
    lines = []
    for quantity, case in dict.fromkeys((_quantity(r), r["case"]) for r in run["models"]):
        rows = [r for r in run["models"] if (_quantity(r), r["case"]) == (quantity, case)]
        theirs = [r for r in rows if not _ours(r)]
        best = min((r for r in rows if _ours(r)), key=_ratio)
        case = case if quantity == "diagonal" else f"{case}, {quantity}"
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
    lines += [
        f"- {r['case']}, {_quantity(r)}: {r['way']} is meant to take {r['limit']:.2f} plain steps and takes {_ratio(r):.2f}."
        for r in run["models"]
        if _ratio(r) > r.get("limit", math.inf)
    ]
    lines += [
        f"- {r['case']}, {_quantity(r)}: {r['way']} is allowed {_mebibytes(allowed)} MiB above plain and takes "
        f"{_mebibytes(_above_plain(r))}."
        for r in run["models"]
        if _ours(r) and (allowed := limits.memory(r["case"], _quantity(r))) and _above_plain(r) > allowed
    ]
    for sweep in dict.fromkeys(r["sweep"] for r in run.get("scaling", [])):
        curves = scaling.labelled(run["scaling"], sweep)
        ours = dict(zip(*curves[scaling.STEADY], strict=True))
        faster = {way: [p for p, s in zip(*curve, strict=True) if s < ours[p]] for way, curve in curves.items()}
        lines += [
            f"- scaling, {sweep} = {', '.join(map(str, points))}: {way} takes less time than a further batch of ours."
            for way, points in faster.items()
            if points and not way.startswith(("fisherfast", scaling.PLAIN))
        ]
    for record in run["ops"]:
        gains = {route: _faster(record, route) for route in record["errors"] if route in record["others"]}
        lines += [f"- `{record['op']}` {record['case']}: {g:.2f} of the speed of {r}." for r, g in gains.items() if g < 1]
    return "\n".join(["### Where we lose\n", *(lines or ["Nowhere in this run."]), ""])
