# SPDX-License-Identifier: Apache-2.0
"""``python bench/model_table.py``: every Hugging Face architecture of the tests, its coverage, error and time; writes
bench/results/<cpu>/architectures/latest.json and docs/models.md. ``--page`` only rewrites the page from the stored results.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))
import page

PAGE = page.ROOT / "docs" / "models.md"
FILE = "architectures/latest.json"
AUTOGRAD = ("chain", "loop", "vmap")
N, EXACT_N, WIDTH, LENGTH, ROUNDS = 8, 5, 16, 64, 7

HEAD = """\
# Models

Hugging Face architectures, built small from a configuration with random weights and measured with their code as it is, from dict batches,
every parameter covered. Written by `python bench/model_table.py` from `bench/results/*/architectures/latest.json`;
`tests/test_huggingface.py` holds each to autograd.

*error*: of the empirical diagonal of 5 samples against autograd's per-sample gradients in float64, relative to the largest entry.
Some architectures compute internally in float32 whatever their parameters' precision, and so does autograd: there 1e-7 is exact.
*ratio*: time of a batch after the first of `ff.fisher` to one plain forward and backward of it, for a model 16 times as wide as
the tests' (hidden size 256, 2 layers, 8 samples of 64 tokens, or of one image of 32 x 32), float32, 2 threads, median of 7. So
small a model spends much of its time outside the kernels, where the Fisher does more than a plain step; what larger models
cost is in [performance.md](performance.md).
*without a rule*: the share of the parameters that go through autograd instead of a kernel, and why; "chain": only through the function
that transforms them, "loop" and "vmap": through the whole model.
"""


def measure() -> dict:
    """All architectures on this machine."""
    import architectures
    import measure as bench_measure
    import torch
    import transformers

    torch.set_num_threads(bench_measure.THREADS)
    warnings.simplefilter("ignore")
    rows = [_row(name, architecture) for name, architecture in architectures.ARCHITECTURES.items()]
    machine = {**bench_measure.machine(), "transformers": transformers.__version__}
    return {"date": time.strftime("%Y-%m-%d"), "machine": machine, "rows": rows}


def _row(name: str, architecture) -> dict:
    import torch

    import fisherfast as ff

    torch.manual_seed(0)
    options = {"fisher_type": "empirical", "likelihood": architecture.likelihood, "progress": False}
    model, batch = _trainable(*architecture.make(EXACT_N))
    result = ff.fisher(model, [batch], **options)
    found, oracle = result.diagonal(dtype=torch.float64), _squares(architecture, model, batch)
    top = max(float(v.abs().max()) for v in oracle.values())
    error = max(float((found[k] - v).abs().max()) for k, v in oracle.items()) / top
    model, batch = _trainable(*architecture.make(N, torch.float32, WIDTH, LENGTH))
    shares = result.coverage.share_of_parameters()
    reasons = sorted({how for how in result.coverage.values() if how.startswith(AUTOGRAD)})
    row = {
        "name": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "covered": 1 - shares.get("missing", 0.0),
        "fallback": sum(shares.get(way, 0.0) for way in AUTOGRAD),
        "reasons": reasons,
        "error": error,
        "ratio": _ratio(architecture, model, batch, options),
    }
    print(row, flush=True)
    return row


def _trainable(model, batch):
    """Without what only serves pretraining."""
    for name, parameter in model.named_parameters():
        if "masked_spec_embed" in name:
            parameter.requires_grad_(False)
    return model, batch


def _squares(architecture, model, batch) -> dict:
    import torch

    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    squares = {name: torch.zeros_like(p) for name, p in named.items()}
    for n in range(EXACT_N):
        loss = architecture.losses(model, {key: value[n : n + 1] for key, value in batch.items()}).sum()
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for square, grad in zip(squares.values(), grads, strict=True):
            square += 0 if grad is None else grad.square() / EXACT_N
    return squares


def _ratio(architecture, model, batch, options) -> float:
    import fisherfast as ff

    def plain() -> None:
        model.zero_grad()
        architecture.losses(model, batch).sum().backward()

    ratios = []
    for _ in range(ROUNDS + 1):
        plain()
        start = time.perf_counter()
        plain()
        middle = time.perf_counter()
        marks = []
        ff.fisher(model, _marked(batch, marks), **options)
        ratios.append((marks[-1] - marks[-2]) / (middle - start))
    return statistics.median(ratios[1:])


def _marked(batch, marks):
    """Three equal batches; notes when each is asked for: the last two are further ones."""
    for _ in range(3):
        marks.append(time.perf_counter())
        yield batch
    marks.append(time.perf_counter())


def render() -> str:
    """The page, from the results of every machine."""
    parts = [HEAD]
    runs = [json.loads(path.read_text()) for path in sorted(page.RESULTS.glob(f"cpu-*/{FILE}"))]
    for place, run in enumerate(sorted(runs, key=lambda run: run.get("date", ""), reverse=True)):
        machine = run["machine"]
        older = " An earlier version: some architectures went other ways, and cost more." if place else ""
        parts.append(
            f"## {machine['cpu']}, {machine['isa']}, {machine['threads']} threads\n\ncommit {machine['commit']}, torch "
            f"{machine['versions']['torch']}, transformers {machine['transformers']}.{older}\n\n"
            "| architecture | parameters | covered | error | ratio | without a rule | why |\n| :-- | --: | --: | --: | --: | --: | :-- |\n"
            + "".join(
                f"| {r['name']} | {r['parameters']:,} | {r['covered']:.0%} | {r['error']:.0e} | {r['ratio']:.2f} | "
                f"{r['fallback']:.1%} | {'; '.join(r['reasons']) or '-'} |\n"
                for r in run["rows"]
            )
        )
    return "\n".join(parts)


def main() -> None:
    """Measure, store, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="only rewrite docs/models.md from the stored results")
    if not parser.parse_args().page:
        import performance

        performance.store(measure(), FILE)
    PAGE.write_text(render())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
