# SPDX-License-Identifier: Apache-2.0
"""Figure 4, left: the trace of the Fisher at the end of training against the batch size, on real images, with controls.

The paper trains for a number of epochs at one learning rate. Smaller batches then take more steps, and end nearer to the data:
so the same is done with equally many steps, with the learning rate in proportion to the batch, and each trace is also
measured at a fixed logit temperature.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from common import Data, Report, cnn, images, options, train
from sweep import COLUMNS, draw, measured, verdicts

PROTOCOLS = ("equal epochs", "equal steps", "eta/B fixed")
LR, LR_PER_SAMPLE = 0.05, 0.05 / 128


def run(data: Data, protocol: str, batch: int, epochs: int, seed: int, some: int) -> list[float]:
    """Train one network; its COLUMNS."""
    torch.manual_seed(seed)
    network = cnn(data.x.shape[1], 10)
    steps = len(data.x) * epochs // (64 if protocol == "equal steps" else batch)
    lr = LR_PER_SAMPLE * batch if protocol == "eta/B fixed" else LR
    train(network, data.x, data.y, steps=steps, batch=batch, lr=lr, seed=seed)
    return measured(network, data.x[:some], (data.x, data.y), (data.x_test, data.y_test))


def main(arguments: Sequence[str] | None = None) -> Report:
    """Train for every batch size and protocol, check the trends, draw the figure."""
    given = options(__doc__ or "", arguments)
    train_size, some, epochs, seeds, sizes = given.pick(
        (60, 20, 1, 1, [16, 32]), (1500, 300, 25, 3, [16, 32, 64, 128, 256]), (4000, 1000, 60, 5, [16, 32, 64, 128, 256, 512])
    )
    data = images(given.data, train_size, pool=given.pick(2, 2, 1))
    values = np.array(
        [[[run(data, protocol, batch, epochs, seed, some) for seed in range(seeds)] for batch in sizes] for protocol in PROTOCOLS]
    )  # [protocol, batch size, seed, column]
    settings = {"data": data.name, "samples": len(data.x), "pixels": list(data.x.shape[2:]), "epochs": epochs, "lr": LR}
    settings |= {"lr per sample": LR_PER_SAMPLE, "momentum": 0.9, "Fisher": f"exact, {some} training images"}
    report = Report(f"figure4_batch_size_{data.name.split('-')[0].lower()}", given, settings | {"seeds": list(range(seeds))})
    report.numbers = {"protocols": PROTOCOLS, "batch sizes": sizes, "columns": COLUMNS, "values": values}
    verdicts(report, "tr F rises with the batch size", PROTOCOLS, values)
    draw(report, f"{data.name}: the Fisher after training, by batch size", "batch size B", sizes, PROTOCOLS, values)
    return report


if __name__ == "__main__":
    main()
