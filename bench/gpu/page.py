# SPDX-License-Identifier: Apache-2.0
"""A GPU's section of docs/performance.md: a pure function of one result file, losses and failures included."""

from __future__ import annotations

from typing import Any

import markdown_table
import origin
from gpu import cost
from markdown_table import NONE

BACKENDS = ("triton", "cuda")

OPS = """\
### Ops

Time by device events, the L2 cold, median of up to 30; the share is of the time that the binding ceiling allows: operations over
the unit's rate, or bytes that must be moved over the copy bandwidth, whichever takes longer. A column with x says how many times
faster our fastest backend is than that way; below 1 we lose. The error against float64 is relative to plain torch's; the gate is 2,
and in TF32 an absolute one (`bench/gpu/cost.py`). A result that fails it by rounding has a time and is never our fastest; one that is off
by more has none.
"""
MODELS = """\
### Whole models

Time for one batch as a ratio to one plain forward and backward of it in the same mode, in turn; quartiles in brackets. Memory is the peak
above the resting model. The peers' ways are plain torch; what they leave out is said.
"""


def section(run: dict[str, Any], source: str) -> str:
    """One GPU's results; a part that a run does not have is left out."""
    parts = [_machine(run, source)]
    prepared = [r for r in run["ops"] if "shape" in r]
    ops = list(dict.fromkeys(r["op"] for r in prepared))
    parts += [OPS, *(_op([r for r in prepared if r["op"] == op]) for op in ops)] if ops else []
    tables = list(dict.fromkeys((r["case"], r["mode"], r["quantity"]) for r in run["models"]))
    parts += [MODELS, *(_model([r for r in run["models"] if _key(r) == key]) for key in tables)] if tables else []
    parts += [_largest(found) for found in run["largest"]]
    return "\n".join([*parts, _losses(run)])


def _machine(run: dict[str, Any], source: str) -> str:
    machine = run["machine"]
    found = run["ceilings"]
    rates = ", ".join(f"{name} {found[name] * 1e-12:.1f}" for name in ("bf16", "tf32", "fp32", "fp64"))
    return (
        f"## {machine['device']}\n\n"
        f"{run['date']}, commit {machine['commit'] or 'unknown'} (sha256 of {origin.hashes(machine)}); data in `{source}`.\n"
        f"Driver {machine['driver']}, {origin.versions(machine)}.\n"
        f"Ceilings measured in the same run: copy {found['copy'] * 1e-12:.2f} TB/s; TFLOP/s of matrix products (fp64: of chains of "
        f"multiply-adds): {rates}.\n"
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _by_backend(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {r["route"]: r for r in record["routes"] if r["route"] in BACKENDS}


def _best(record: dict[str, Any]) -> dict[str, Any] | None:
    """Our fastest backend's record, of those whose result is right."""
    return min((r for r in _by_backend(record).values() if r["passes"]), key=_median, default=None)


def _median(timed: dict[str, Any]) -> float:
    return timed["seconds"][1]


def _backend(route: dict[str, Any] | None) -> str:
    if route is None:
        return NONE
    if "seconds" not in route:
        return route.get("why", "wrong").partition(":")[0]
    return f"{_milliseconds(_median(route))} ({route['fraction']:.0%}{'' if route['passes'] else ', FAILS THE GATE'})"


def _beside(record: dict[str, Any], peer: str) -> str:
    """How many times faster ours is than a peer, or why the peer has no time."""
    best = _best(record)
    route = next((r for r in record["routes"] if r["route"] == peer), None)
    if route is None or (best is None and "seconds" in route):
        return NONE
    return f"{_median(route) / _median(best):.2f}" if "seconds" in route else route["why"].partition(":")[0]


def _op(records: list[dict[str, Any]]) -> str:
    peers = list(dict.fromkeys(r["route"] for record in records for r in record["routes"] if r["route"] not in BACKENDS))
    rows = []
    for record in records:
        best, plain = _best(record), record["plain_error"]
        rows.append(
            [
                record["case"],
                " ".join(map(str, record["shape"].values())),
                record["mode"],
                f"{_milliseconds(record['bound']['seconds'])} ({record['bound']['by']})",
                *(_backend(_by_backend(record).get(name)) for name in BACKENDS),
                NONE if best is None else f"{best['error'] / plain:.2f}" if plain else f"{best['error']:.1e} absolute",
                *(_beside(record, peer) for peer in peers),
            ]
        )
    head = ["case", " ".join(records[0]["shape"]), "mode", "bound ms (by)", *(f"{b} ms (of bound)" for b in BACKENDS), "error"]
    return f"**`{records[0]['op']}`**\n\n{markdown_table.table([*head, *(f'x {peer}' for peer in peers)], rows, left=3)}"


def _key(record: dict[str, Any]) -> tuple[str, str, str]:
    return record["case"], record["mode"], record["quantity"]


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _model(records: list[dict[str, Any]]) -> str:
    rows, reasons = [], []
    for record in sorted(records, key=_ratio):
        way = f"**{record['way']}**" if record["ours"] else record["way"]
        if "why" in record:
            rows.append([way, *[NONE] * 4])
            reasons.append(f"- {record['way']}: {record['why']}.")
            continue
        low, middle, high = record["ratio"]
        spread = f"[{low:.2f}, {high:.2f}]"
        rows.append([way, f"{middle:.2f}", spread, _milliseconds(_median(record)), _gibibytes(record["peak_bytes"])])
    case, mode, quantity = _key(records[0])
    timed = next((r for r in records if "why" not in r), None)
    plain = (
        ""
        if timed is None
        else f"; plain takes {_milliseconds(timed['plain_seconds'][1])} ms and {_gibibytes(timed['plain_peak_bytes'])} GiB"
    )
    title = (
        f"**{case}, {quantity}, {mode}**: {records[0]['summary']}; {records[0]['parameters'] / 1e6:,.0f} M parameters{plain}.\n"
    )
    return "\n".join(
        [
            title,
            markdown_table.table(["way", "ratio", "quartiles", "ms", "GiB"], rows, left=1),
            *reasons,
            *([""] if reasons else []),
        ]
    )


def _ratio(record: dict[str, Any]) -> float:
    return record["ratio"][1] if "ratio" in record else float("inf")


def _largest(found: dict[str, Any]) -> str:
    size = f"{found['layers']} layers of Llama 3 8B's widths, {found['parameters'] / 1e9:.2f} B parameters in bf16"
    if "why" in found:
        return f"**The largest diagonal**: {size}: {found['why']}.\n"
    return (
        f"**The largest diagonal**: {size}, a batch of one sequence in {found['seconds']:.2f} s; peak {_gibibytes(found['peak_bytes'])} GiB "
        f"with the result, {_gibibytes(found['expected_bytes'])} GiB at most in a long run by arithmetic.\n"
    )


def _losses(run: dict[str, Any]) -> str:
    lines = [f"- `{r['op']}` {r['route']}, small calls: {r['why']}." for r in run["smoke"] if "why" in r]
    for record in run["ops"]:
        best, where = _best(record), f"`{record['op']}` {record['case']} {record['mode']}"
        lines += [f"- {where}: {record['why']}."] if "why" in record else []
        missed = "misses the numerical gate: error {error:.1e}, plain torch's {plain:.1e}"
        lines += [
            f"- {where}: {r['route']} {r.get('why') or missed.format(error=r['error'], plain=record['plain_error'])}."
            for r in _by_backend(record).values()
            if not r["passes"]
        ]
        if best is None:
            continue
        others = (
            r for r in record["routes"] if r["route"] not in BACKENDS and r["error"] is not None and "seconds" in r
        )  # the same result
        lines += [
            f"- {where}: {_median(r) / _median(best):.2f} of the speed of {r['route']}."
            for r in others
            if _median(r) < _median(best)
        ]
        aim = cost.meant(record["op"], record["mode"], record["shape"], record["bound"]["by"])
        if aim is not None and best["fraction"] < aim:
            lines.append(f"- {where}: {best['fraction']:.0%} of the bound, meant to reach {aim:.0%}.")
    for record in run["models"]:
        where = f"{record['case']} {record['mode']}, {record['quantity']}"
        rivals = [r for r in run["models"] if _key(r) == _key(record) and not r["ours"] and "why" not in r]
        if record["ours"] and "why" in record:
            lines.append(f"- {where}: ours {record['why']}.")
        elif record["ours"]:
            lines += [
                f"- {where}, time: {r['way']} takes {_ratio(r):.2f} of a plain step, ours {_ratio(record):.2f}."
                for r in rivals
                if _ratio(r) < _ratio(record)
            ]
            lines += [
                f"- {where}, memory: {r['way']} peaks at {_gibibytes(r['peak_bytes'])} GiB, ours at {_gibibytes(record['peak_bytes'])}."
                for r in rivals
                if r["peak_bytes"] < record["peak_bytes"]
            ]
    return "\n".join(["### Where we lose\n", *(lines or ["Nowhere in this run."]), ""])
