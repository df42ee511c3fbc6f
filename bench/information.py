# SPDX-License-Identifier: Apache-2.0
"""``python bench/information.py``: the information in the weights of a model with Llama's shapes, its time and memory, each size in a
process of its own; writes bench/results/<cpu>/information/latest.json and docs/information-at-scale.md. ``--page`` only rewrites the page.

The largest needs 13 GiB: float64 sums of 1.24e9 entries and bfloat16 weights.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import page

PAGE = page.ROOT / "docs" / "information-at-scale.md"
FILE = "information/latest.json"
VOCABULARY, WIDTH, MIDDLE, KEYS = 128256, 2048, 8192, 512  # Llama 3.2 1B, its head tied to the embedding
BLOCKS = (0, 4, 16)
SAMPLES, BETA, ROUNDS = 1000, 1e-3, 3
CENTERED = 1e9  # parameters from which on there is no memory for a center

HEAD = """\
# The information in the weights, at scale

`ff.information_in_weights` reads the sums of a diagonal Fisher where they are: no copy of the diagonal, no tensor larger than a chunk of
2^16 numbers. With a scale that is given it reads every sum twice, for the traces and for the nats, and every weight once. With
`prior_scale="fit"` a sample of each layer's entries gives a first guess, and a secant method reads all of them three or four times more.

Shapes of Llama 3.2 1B (an embedding of 128,256 x 2,048 tied to the head, blocks of width 2,048), entries of the Fisher log-normal over
some ten orders of magnitude, two fifths of the embedding's rows zero: tokens that were never seen. Sums are float64, weights and center bfloat16.
*time* is what a clock on the wall says, *processor* the seconds that our threads had a processor: on a machine that others use at the same time
only these mean something. *to one read*: processor seconds, over those in which `copy_` moves the bytes of the sums and the weights (read and
written bytes both counted). *above* is the peak of resident memory above the inputs. Median of three calls, each model in a process of its
own. Written by `python bench/information.py` from `bench/results/*/information/latest.json`; edit neither.
"""


def shapes(blocks: int) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes of a Llama of ``blocks`` blocks."""
    found: dict[str, tuple[int, ...]] = {"embed.weight": (VOCABULARY, WIDTH)}
    for i in range(blocks):
        for name, shape in (
            ("q", (WIDTH, WIDTH)), ("k", (KEYS, WIDTH)), ("v", (KEYS, WIDTH)), ("o", (WIDTH, WIDTH)),
            ("gate", (MIDDLE, WIDTH)), ("up", (MIDDLE, WIDTH)), ("down", (WIDTH, MIDDLE)), ("norm1", (WIDTH,)), ("norm2", (WIDTH,)),
        ):  # fmt: skip
            found[f"blocks.{i}.{name}.weight"] = shape
    return found | {"norm.weight": (WIDTH,)}


def inputs(names: dict[str, tuple[int, ...]]) -> tuple[Any, dict[str, Any]]:
    """A Fisher and weights of these shapes: a million random numbers over and over, scaled by layer."""
    import torch

    import fisherfast as ff
    from fisherfast.fisher.counts import Counts
    from fisherfast.fisher.coverage import Coverage

    torch.manual_seed(0)
    entries, values = torch.empty(1 << 20, dtype=torch.float64).log_normal_(-12, 2.5), 0.02 * torch.randn(1 << 20).bfloat16()
    totals, weights = {}, {}
    for i, (name, shape) in enumerate(names.items()):
        total, weights[name] = torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.bfloat16)
        for start in range(0, total.numel(), len(entries)):
            to, count = slice(start, start + len(entries)), min(len(entries), total.numel() - start)
            total.view(-1)[to] = entries[:count] * 2.0 ** -(i % 5)
            weights[name].view(-1)[to] = values[:count]
        if shape[0] == VOCABULARY:
            total[torch.rand(VOCABULARY) < 0.4] = 0
        totals[name] = total
    counts = Counts(SAMPLES, SAMPLES, 0, ff.Provenance(), Coverage(), {})
    fields = {**counts.state(), "weights": dict.fromkeys(totals, SAMPLES), "spread": None}
    return ff.DiagonalFisher.from_state(totals, fields), weights  # no copies, as means would make


def calls(F: Any, weights: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What is timed."""
    import torch

    import fisherfast as ff

    def information(**options: Any) -> Callable[[], Any]:
        return lambda: ff.information_in_weights(F, weights, beta=BETA, **options)

    found = {"prior_scale=0.02": information(prior_scale=0.02), 'prior_scale="fit"': information(prior_scale="fit")}
    if F.num_parameters < CENTERED:
        center = {name: torch.roll(w.flatten(), 1).view_as(w) for name, w in weights.items()}
        found['prior_scale="fit", center=base'] = information(prior_scale="fit", center=center)
    return found


def measured(blocks: int, threads: int) -> dict[str, Any]:
    """One size, in this process."""
    import memory
    import torch

    torch.set_num_threads(threads)
    for call in calls(*inputs({"small.weight": (8, 8)})).values():
        call()  # so that what is imported and compiled once is there already
    F, weights = inputs(shapes(blocks))
    rows = {}
    for name, call in calls(F, weights).items():
        before = memory._resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        times = [_timed(call) for _ in range(ROUNDS)]
        seconds, processor = (statistics.median(column) for column in zip(*times, strict=True))
        rows[name] = {"seconds": seconds, "processor": processor, "above": memory._resident("VmHWM") - before}
    read = (8 + 2) * F.num_parameters
    return {
        "parameters": F.num_parameters,
        "tensors": len(F.names),
        "input_bytes": read,
        "read_seconds": read / copied_bytes_per_second(),  # of the processor
        "calls": rows,
    }


def _timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and processor seconds of all threads."""
    start, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - processor


def copied_bytes_per_second(count: int = 1 << 26) -> float:
    """Bytes that ``copy_`` reads and writes in a second of processor time, best of five."""
    import torch

    a, b = torch.zeros(count), torch.ones(count)
    return 2 * 4 * count / min(_timed(lambda: a.copy_(b))[1] for _ in range(5))


def measure_all(threads: int) -> dict[str, Any]:
    """All sizes on this machine."""
    import measure
    import torch

    torch.set_num_threads(threads)
    sizes = []
    for blocks in BLOCKS:
        command = [sys.executable, __file__, "--blocks", str(blocks), "--threads", str(threads)]
        sizes.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]))
        print(sizes[-1], flush=True)
    return {"machine": measure.machine(), "sizes": sizes}


def render() -> str:
    """The page, from the results of every machine."""
    parts = [HEAD]
    for path in sorted(page.RESULTS.glob(f"cpu-*/{FILE}")):
        run = json.loads(path.read_text())
        machine = run["machine"]
        parts.append(
            f"## {machine['cpu']}, {machine['isa']}, threads: {machine['threads']}\n\ncommit {machine['commit']}, torch "
            f"{machine['versions']['torch']}\n\n| parameters | tensors | inputs | call | time | processor | to one read | above |\n"
            "| --: | --: | --: | :-- | --: | --: | --: | --: |"
        )
        parts += [_line(size, name, row) for size in run["sizes"] for name, row in size["calls"].items()]
    return "\n".join(parts) + "\n"


def _line(size: dict[str, Any], name: str, row: dict[str, Any]) -> str:
    return (
        f"| {size['parameters']:,} | {size['tensors']} | {size['input_bytes'] / 2**30:.1f} GiB | `{name}` | {row['seconds']:.1f} s | "
        f"{row['processor']:.1f} s | {row['processor'] / size['read_seconds']:.1f} | {row['above'] / 2**20:.1f} MiB |"
    )


def main() -> None:
    """Measure, store, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="only rewrite the page from the stored results")
    parser.add_argument("--blocks", type=int, help="measure one size and print it")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.blocks is not None:
        print(json.dumps(measured(arguments.blocks, arguments.threads)))
        return
    if not arguments.page:
        import performance

        performance.store(measure_all(arguments.threads), FILE)
    PAGE.write_text(render())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
