# SPDX-License-Identifier: Apache-2.0
"""The diagonal Fisher of a GPT-2-shaped language model on real text, against a plain step and a loop over samples.

A Hugging Face GPT-2 from its configuration (12 layers, d = 768, vocabulary 50,257), random weights, untied head. The text is ``--data FILE``, by default the documentation that ships with Python.

Each way runs in a process of its own, so that its peak memory is its own::

    python examples/gpt2_text.py                     # the table
    python examples/gpt2_text.py --data my.txt --batch 4
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fisherfast as ff

VOCABULARY = 50257


def text(path: str | None) -> str:
    """The file's text, or Python's own documentation."""
    if path is not None:
        return Path(path).read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def tokens(words: str) -> Tensor:
    """Words and marks as ids, the most frequent first (GPT-2's own tokenizer would have to be downloaded)."""
    pieces = re.findall(r"\w+|[^\w\s]|\s+", words)
    ids = {piece: i for i, (piece, _) in enumerate(Counter(pieces).most_common(VOCABULARY - 1))}
    return torch.tensor([ids.get(piece, VOCABULARY - 1) for piece in pieces])


def build(layers: int, width: int) -> nn.Module:
    """GPT-2 from its configuration, evaluation mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    heads = max(1, width // 64)
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, vocab_size=VOCABULARY, tie_word_embeddings=False, use_cache=False
    )
    return GPT2LMHeadModel(config).eval()


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Negative log-likelihood of each sequence, [N]: the sum over its next tokens."""
    logits = model(ids).logits[:, :-1]
    each = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.view(len(ids), -1).sum(1)


@contextmanager
def plain(model: nn.Module) -> Iterator[Callable[[Tensor], None]]:
    """One ordinary forward and backward pass."""

    def step(ids: Tensor) -> None:
        losses(model, ids).sum().backward()
        model.zero_grad(set_to_none=True)

    yield step


@contextmanager
def loop(model: nn.Module) -> Iterator[Callable[[Tensor], None]]:
    """The usual way: one sample at a time, square, add."""
    squares = [torch.zeros_like(p) for p in model.parameters()]

    def step(ids: Tensor) -> None:
        for one in ids.split(1):
            for square, grad in zip(
                squares, torch.autograd.grad(losses(model, one).sum(), list(model.parameters())), strict=True
            ):
                square.addcmul_(grad, grad)

    yield step


@contextmanager
def fisherfast(model: nn.Module) -> Iterator[Callable[[Tensor], None]]:
    """The same sums from the squares kernels."""
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        yield lambda ids: stats.backward(losses(model, ids))
    looped = [name for name, how in stats.result().coverage.items() if how.startswith("loop")]
    if looped:
        raise SystemExit(f"the loop over samples was needed for {looped}")


WAYS = {"plain forward+backward": plain, "fisherfast": fisherfast, "loop over samples": loop}


def measured(way: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of the first batch and of a later one (median), and peak resident bytes, of one way in this process."""
    model = build(arguments.layers, arguments.width)
    count = arguments.batch * arguments.length
    batches = tokens(text(arguments.data)).split(count)[: arguments.rounds + 1]
    seconds = []
    with WAYS[way](model) as step:
        for ids in batches:
            start = time.perf_counter()
            step(ids.view(arguments.batch, arguments.length))
            seconds.append(time.perf_counter() - start)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    parameters = sum(p.numel() for p in model.parameters())
    return {"first": seconds[0], "seconds": statistics.median(seconds[1:]), "peak": 1024 * int(peak[1]), "parameters": parameters}


def show(results: dict[str, dict[str, float]], arguments: argparse.Namespace) -> None:
    """The table, and what it says."""
    base = results["plain forward+backward"]
    size = f"{base['parameters'] / 1e6:.0f} M parameters, {arguments.batch} x {arguments.length} tokens, {torch.get_num_threads()} threads"
    table = Table(title=f"Diagonal of a GPT-2-shaped model: {size}")
    for column in ("way", "s per batch", "ratio", "first batch", "peak memory", "above plain"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, r in results.items():
        above = (r["peak"] - base["peak"]) / 2**20
        table.add_row(
            way,
            f"{r['seconds']:.2f}",
            f"{r['seconds'] / base['seconds']:.2f}",
            f"{r['first']:.2f} s",
            f"{r['peak'] / 2**20:,.0f} MiB",
            f"{above:+,.0f} MiB",
        )
    console = Console()
    console.print(table)
    console.print(
        f"The float32 result is {4 * base['parameters'] / 2**20:,.0f} MiB; fisherfast keeps sums in one such tensor (two in a run of over 64 batches)."
    )
    console.print("fisherfast's first batch includes the probe that finds the sample axis of every layer.")


def main() -> None:
    """Parse, measure each way in a fresh process, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a text file; by default the documentation that ships with Python")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=3, help="batches measured after the first")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measured(arguments.way, arguments)))
        return
    results = {}
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        results[way] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    show(results, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
