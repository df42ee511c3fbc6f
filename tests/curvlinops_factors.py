# SPDX-License-Identifier: Apache-2.0
"""``python tests/curvlinops_factors.py``: writes curvlinops_factors.safetensors, the factors of two small networks by curvlinops
(bench/requirements.txt), which tests/test_kfac.py holds ours to; curvlinops itself is not needed there.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILE = Path(__file__).with_suffix(".safetensors")


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """An MLP and a CNN, in float64, with inputs; their weights are those of the file."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 4))
    cnn = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(3, 5, (2, 3), dilation=(1, 2), padding=(0, 2), bias=False), nn.Tanh(),
        nn.Flatten(), nn.Linear(5 * 3 * 4, 4),
    )  # fmt: skip
    return {"mlp": (mlp.double(), torch.randn(6, 3).double()), "cnn": (cnn.double(), torch.randn(6, 2, 8, 7).double())}


def stored() -> tuple[dict[str, Tensor], dict[str, str]]:
    """``{"NETWORK.x" | "NETWORK.y" | "NETWORK.weights.NAME" | "NETWORK.LAYER.A" | ...: tensor}``, and the versions behind it."""
    with safe_open(FILE, "pt") as file:
        return load_file(FILE), file.metadata()


def main() -> None:
    """Measure and write."""
    from importlib.metadata import version

    from curvlinops import KFACLinearOperator

    tensors = {}
    for name, (model, x) in networks().items():
        y = torch.randint(0, 4, (len(x),))
        operator = KFACLinearOperator(
            model, nn.CrossEntropyLoss(reduction="mean"), list(model.parameters()), [(x, y)],
            fisher_type="empirical", check_deterministic=False, separate_weight_and_bias=False,
        )  # fmt: skip
        operator.compute_kronecker_factors()
        state = operator.state_dict()
        tensors |= {f"{name}.x": x, f"{name}.y": y} | {f"{name}.weights.{k}": v for k, v in model.state_dict().items()}
        for key, letter in (("input_covariances", "A"), ("gradient_covariances", "B")):
            tensors |= {f"{name}.{layer}.{letter}": factor.contiguous() for layer, factor in state[key].items()}
    versions = {package: version(package) for package in ("curvlinops-for-pytorch", "torch")}
    save_file(tensors, FILE, {"versions": json.dumps(versions)})
    print(f"wrote {FILE}: {sorted(tensors)}")


if __name__ == "__main__":
    main()
