# SPDX-License-Identifier: Apache-2.0
"""``python bench/comparison.py``: diagonal, KFAC and EKFAC beside the exact Fisher, on trained networks small enough for it; writes
bench/results/<cpu>/comparison/latest.json, docs/comparison.md and its figures. ``--page`` only rewrites the page and the figures.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import page

PAGE = page.ROOT / "docs" / "comparison.md"
FILE = "comparison/latest.json"
STRUCTURES = ("diagonal", "kfac", "ekfac", "gram")
SCALES = (1.0, 1e-2, 1e-4)  # dampings, in units of the mean eigenvalue
POINTS = 200  # of a spectrum that are stored, evenly in the logarithm of the rank
TEXT_LENGTH, WIDTH = 32, 48

HEAD = """\
# Diagonal, KFAC, EKFAC and the exact Fisher

How far each structure is from the truth, on trained networks small enough for the truth. Written by `python bench/comparison.py`
from `bench/results/*/comparison/latest.json`; edit neither.

*gram* is the exact Fisher of the same samples and the same labels, by its dual; what the others miss is measured against it.
*log det* is of `F + damping I`, over all parameters, in nats; in brackets, the difference to *gram* per parameter. *damping* is a multiple of the
mean eigenvalue `tr F / P`. A structure that keeps the trace and spreads it evenly over more eigenvalues has the larger log-determinant
(Hadamard's inequality for the diagonal and for EKFAC, whose values are a diagonal of F in some basis; KFAC may fall on either side).
An exact Fisher of M sample gradients has rank M at most: below the transformer's 70,496 parameters there are 2,048, and where the black curve
ends the others continue with directions that these samples never moved in.

*Information in the weights* is `ff.information_in_weights` at beta = 1/N and one prior scale for all layers and structures, the one fitted
to *gram*. How far the weights are from 0 counts the same in every row, so rows differ by their directions only: `1/2 sum_j g(lambda^2 f_j / beta)`.
The diagonal's nats are those of the best noise that is independent in every weight, EKFAC's of the best that is independent along its
eigenvectors, *gram*'s of the best of all; *too many* is what the restriction costs (KFAC's are an approximation of EKFAC's). Noise that must be
independent has to be small wherever a weight matters at all, though most combinations of such weights change nothing: in these networks
that is most of what the diagonal reports. So nats compare layers and networks within one structure, not across.
*effective dimension*: `sum_j s_j / (1 + s_j)`; of the exact Fisher at most its rank. Where a trace differs from the one above, this table was
measured on the same network trained again.

*time* is one `ff.fisher` call from start to result; *log det time* the first `logdet`, eigendecompositions included; *size* what the result holds.
"""


@dataclass(frozen=True)
class Case:
    """A trained network with the samples on which it is measured."""

    title: str
    make: Callable[[], tuple]  # model, batches
    options: dict


def _trained(model, x, y, epochs: int):
    import torch
    from torch.nn import functional

    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            logits = model(x[rows])
            functional.cross_entropy(logits.flatten(0, -2), y[rows].flatten()).backward()
            optimizer.step()
    return model.eval()


def _digits(images: bool):
    import torch
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x).float() / 16, torch.from_numpy(y)
    return (x.view(-1, 1, 8, 8) if images else x), y


def _mlp():
    from torch import nn

    x, y = _digits(images=False)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return _trained(model, x, y, 10), [(x[:512], None)]


def _cnn():
    from torch import nn

    x, y = _digits(images=True)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip
    return _trained(model, x, y, 20), [(x[:512], None)]


def _transformer():
    """Two blocks on the characters of this project's own documentation: real text that every checkout has."""
    import models
    import torch
    from torch import nn

    text = "".join((page.ROOT / "docs" / name).read_text() for name in ("design.md", "semantics.md", "likelihoods.md"))
    ids = torch.tensor([min(ord(c), 127) for c in text])
    ids = ids[: len(ids) // (TEXT_LENGTH + 1) * (TEXT_LENGTH + 1)].view(-1, TEXT_LENGTH + 1)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    class Network(nn.Module):
        """Characters in, logits out; causal attention."""

        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(128, WIDTH), nn.Embedding(TEXT_LENGTH, WIDTH)
            self.blocks = nn.Sequential(*(models.Block(WIDTH, 4) for _ in range(2)))
            self.head = nn.Linear(WIDTH, 128)

        def forward(self, ids):
            """[N, T] to [N, T, 128]."""
            return self.head(self.blocks(self.tokens(ids) + self.positions(torch.arange(ids.shape[1]).expand_as(ids))))

    return _trained(Network(), x, y, 20), [(part, None) for part in x[:512].split(128)]


CASES = {
    "mlp": Case("MLP 64-64-64-10 on digits, exact Fisher of 512 images", _mlp, {"fisher_type": "exact"}),
    "cnn": Case("CNN of three convolutions on digits, exact Fisher of 512 images", _cnn, {"fisher_type": "exact"}),
    "transformer": Case(
        "Transformer of two blocks on text, 512 sequences of 32 characters, 4 drawn labels each",
        _transformer,
        {"fisher_type": "mc", "draws": 4},
    ),
}


def measure() -> dict:
    """All cases on this machine."""
    import measure as bench_measure
    import torch

    torch.set_num_threads(bench_measure.THREADS)
    return {"machine": bench_measure.machine(), "cases": {name: _measured(case) for name, case in CASES.items()}}


def _measured(case: Case) -> dict:
    import torch

    torch.manual_seed(0)
    model, batches = case.make()
    parameters = sum(p.numel() for p in model.parameters())
    rows = {}
    for structure in reversed(STRUCTURES):  # the exact one first: its trace sets the dampings
        rows[structure] = _row(model, batches, structure, case.options, rows.get("gram"), parameters)
        print(case.title, structure, {k: v for k, v in rows[structure].items() if k != "spectrum"}, flush=True)
    return {"title": case.title, "parameters": parameters, "structures": {name: rows[name] for name in STRUCTURES}}


def _row(model, batches, structure: str, options: dict, exact: dict | None, parameters: int) -> dict:
    import fisherfast as ff

    def run():
        return ff.fisher(model, batches, structure, progress=False, **options)

    run()
    start = time.perf_counter()
    F = run()
    seconds = time.perf_counter() - start
    mean = (F.trace() if exact is None else exact["trace"]) / parameters
    start = time.perf_counter()
    first = F.logdet(SCALES[0] * mean)
    logdet_seconds = time.perf_counter() - start
    values = F.eigenvalues()
    scale = "fit" if exact is None else exact["information"]["prior_scale"]
    info = ff.information_in_weights(F, model, prior_scale=scale, beta=1 / F.num_samples)
    return {
        "seconds": seconds,
        "logdet_seconds": logdet_seconds,
        "bytes": sum(t.numel() * t.element_size() for t in F.state()[0].values()),
        "trace": F.trace(),
        "logdet": [first] + [F.logdet(scale * mean) for scale in SCALES[1:]],
        "information": {
            "nats": info.nats,
            "trace": F.trace(),
            "effective_dimension": sum(layer.effective_dimension for layer in info.by_layer().values()),
            "prior_scale": next(iter(info.prior_scales.values())),
            "num_samples": F.num_samples,
        },
        "spectrum": _thinned(values[values > 1e-12 * values[0]].tolist()),
    }


def _thinned(values: list[float]) -> list[list[float]]:
    """``[rank, eigenvalue]``, fewer and fewer as the rank rises."""
    ranks = sorted({round(math.exp(math.log(len(values)) * k / (POINTS - 1))) for k in range(POINTS)})
    return [[rank, values[rank - 1]] for rank in ranks]


def runs() -> list[tuple[Path, dict]]:
    """The stored results of every machine."""
    return [(path, json.loads(path.read_text())) for path in sorted(page.RESULTS.glob(f"cpu-*/{FILE}"))]


def figure(path: Path) -> Path:
    """Where a machine's figure lies."""
    return PAGE.parent / f"comparison-{path.parts[-3]}.svg"


def render() -> str:
    """The page, from the results of every machine."""
    parts = [HEAD]
    for path, run in runs():
        machine = run["machine"]
        parts.append(
            f"## {machine['cpu']}, {machine['isa']}, {machine['threads']} threads\n\ncommit {machine['commit']}, torch "
            f"{machine['versions']['torch']}\n\n![The eigenvalues of each structure, by rank, on logarithmic axes]({figure(path).name})\n"
        )
        parts += [_table(case) + _nats(case) for case in run["cases"].values()]
    return "\n".join(parts)


def _table(case: dict) -> str:
    exact, P = case["structures"]["gram"], case["parameters"]
    lines = [
        f"### {case['title']}\n\n{P:,} parameters.\n",
        "| structure | time | log det time | size | trace | "
        + " | ".join(f"log det, damping {scale:g}" for scale in SCALES)
        + " |\n| :-- | --: | --: | --: | --: |"
        + " --: |" * len(SCALES),
    ]
    for name, row in case["structures"].items():
        logdets = [f"{a:,.0f} ({(a - b) / P:+.3f})" for a, b in zip(row["logdet"], exact["logdet"], strict=True)]
        logdets = [f"{a:,.0f}" for a in row["logdet"]] if name == "gram" else logdets
        lines.append(
            f"| {name} | {row['seconds']:.2f} s | {row['logdet_seconds']:.2f} s | {row['bytes'] / 2**20:.1f} MiB | {row['trace']:.5g} | "
            + " | ".join(logdets)
            + " |"
        )
    return "\n".join(lines) + "\n"


def _nats(case: dict) -> str:
    """The information in the weights by each structure, at one prior scale and one beta."""
    exact = case["structures"]["gram"]["information"]
    lines = [
        f"\nInformation in the weights, beta = 1/{exact['num_samples']}, prior scale {exact['prior_scale']:.3g} around 0:\n\n"
        "| structure | trace | nats | too many | nats per parameter | effective dimension |\n| :-- | --: | --: | --: | --: | --: |"
    ]
    for name, row in case["structures"].items():
        info = row["information"]
        nats, off = info["nats"], info["nats"] - exact["nats"]
        wrong = "" if name == "gram" else f"{off:+,.0f} ({off / exact['nats']:+.0%})"
        lines.append(
            f"| {name} | {info['trace']:.5g} | {nats:,.0f} | {wrong} | {nats / case['parameters']:.3f} | "
            f"{info['effective_dimension']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


_STYLES = {  # Okabe and Ito's colours, which the colour-blind tell apart, and a dash pattern each
    "gram": {"color": "black", "linewidth": 2.2, "label": "exact (gram)"},
    "diagonal": {"color": "#E69F00", "linestyle": ":"},
    "kfac": {"color": "#D55E00", "linestyle": "--"},
    "ekfac": {"color": "#0072B2", "linestyle": "-."},
}


def draw(run: dict, path: Path) -> None:
    """The figure: a panel per network. The same results give the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.hashsalt": "fisherfast", "font.size": 9}):
        size, panels = plt.subplots(1, len(run["cases"]), figsize=(11, 3.9))
        for panel, case in zip(panels, run["cases"].values(), strict=True):
            for name, style in _STYLES.items():
                panel.plot(*zip(*case["structures"][name]["spectrum"], strict=True), **{"label": name, **style})
            panel.set(xscale="log", yscale="log", xlabel="rank", ylabel="eigenvalue (nats per unit weight squared)")
            panel.set_title(case["title"].partition(",")[0], fontsize=9)
            panel.set_ylim(bottom=1e-9 * case["structures"]["gram"]["spectrum"][0][1])
            panel.grid(True, alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
        size.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False)
        size.tight_layout(rect=(0, 0.07, 1, 1))
        size.savefig(path, metadata={"Date": None})
        plt.close(size)


def main() -> None:
    """Measure, store, draw, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="only rewrite the page and its figures from the stored results")
    if not parser.parse_args().page:
        import performance

        performance.store(measure(), FILE, indent=None)
    for path, run in runs():
        draw(run, figure(path))
    PAGE.write_text(render())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
