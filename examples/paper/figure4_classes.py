# SPDX-License-Identifier: Apache-2.0
"""Figure 4, right: the trace of the Fisher at the end of training against the number of classes, on real images, with controls.

The paper trains one network on the first k classes. More classes are also more samples and more steps, and a head for all
ten classes keeps logits that the task never uses: so the same is done with equally many samples in all, and with a head
of k logits, and each trace is also measured at a fixed logit temperature.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from common import Data, Report, cnn, images, options, train
from sweep import COLUMNS, draw, measured, verdicts

PROTOCOLS = ("equal samples per class", "equal samples in all", "head of k logits")
BATCH, LR = 64, 0.05


def run(data: Data, protocol: str, classes: int, per_class: int, steps: int, seed: int, some: int) -> list[float]:
    """Train one network on the first ``classes``; its COLUMNS. Every run takes as many steps."""
    torch.manual_seed(seed)
    network = cnn(data.x.shape[1], classes if protocol == "head of k logits" else 10)
    each = 2 * per_class // classes if protocol == "equal samples in all" else per_class
    rows = torch.cat([(data.y == label).nonzero()[:each, 0] for label in range(classes)])
    x, y = data.x[rows], data.y[rows]
    train(network, x, y, steps=steps, batch=BATCH, lr=LR, seed=seed)
    test = data.y_test < classes
    inputs = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:some]]
    return measured(network, inputs, (x, y), (data.x_test[test], data.y_test[test]))


def main(arguments: Sequence[str] | None = None) -> Report:
    """Train for every number of classes and protocol, check the trends, draw the figure."""
    given = options(__doc__ or "", arguments)
    per_class, some, steps, seeds, numbers = given.pick(
        (10, 20, 2, 1, [2, 3]), (150, 300, 500, 3, [2, 4, 6, 8, 10]), (350, 1000, 3000, 5, [2, 3, 4, 5, 6, 7, 8, 9, 10])
    )
    data = images(given.data, 5000, pool=given.pick(2, 2, 1))
    values = np.array(
        [
            [[run(data, protocol, classes, per_class, steps, seed, some) for seed in range(seeds)] for classes in numbers]
            for protocol in PROTOCOLS
        ]
    )  # [protocol, classes, seed, column]
    settings = {
        "data": data.name,
        "samples per class": per_class,
        "pixels": list(data.x.shape[2:]),
        "steps": steps,
        "batch": BATCH,
    }
    settings |= {"lr": LR, "momentum": 0.9, "Fisher": f"exact, {some} training images", "seeds": list(range(seeds))}
    report = Report(f"figure4_classes_{data.name.split('-')[0].lower()}", given, settings)
    report.numbers = {"protocols": PROTOCOLS, "classes": numbers, "columns": COLUMNS, "values": values}
    verdicts(report, "tr F rises with the number of classes", PROTOCOLS, values)
    title = f"{data.name}: the Fisher after training, by number of classes"
    draw(report, title, "number of classes k", numbers, PROTOCOLS, values)
    return report


if __name__ == "__main__":
    main()
