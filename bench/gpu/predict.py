# SPDX-License-Identifier: Apache-2.0
"""What the benchmark is expected to find, written down before it: the bound of each case over an expected share of it.

``python bench/gpu/predict.py`` writes the table into docs/gpu.md. The ceilings are leads, from a data sheet or seen once on such a
machine; the shares are guesses with a reason. When there are measurements, docs/performance.md has them, and what was wrong here
stays.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import capacity, cost, model_cases, problems, record

PAGE = record.ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- written by bench/gpu/predict.py: begin -->\n", "<!-- end -->\n"

MEMORY_BYTES = 143771 * 2**20  # as nvidia-smi showed them there
LAUNCHES = 10e-6  # seconds that the few launches of one call take at least
# A 128 x 128 tile of one sample takes 8 clocks of the tensor cores a row, then some 450 to drain, square, add and begin again.
ROW_CLOCKS, EPILOGUE_CLOCKS = 8, 450


class Prediction(NamedTuple):
    """Of one case: what bounds it, and what a kernel of today is expected to take."""

    op: str
    case: str
    shape: dict[str, int]
    mode: str
    bound: cost.Bound
    share: float
    seconds: float


def share(op: str, mode: str, shape: dict[str, int], by: str) -> float:
    """The expected share of the bound: of Triton's kernels, as they are."""
    if op == "linear_sq_" and mode == "bf16" and shape["T"] > 1:
        rows = ROW_CLOCKS * shape["T"]
        in_parts = 0.8 if shape.get("N") == 1 else 1.0  # a workspace, written and read, and a launch more
        return in_parts * 0.75 * rows / (rows + EPILOGUE_CLOCKS)  # a plain GEMM by Triton, and what the epilogue leaves of it
    if op == "embedding_sq_":
        return 0.4  # the sort, and frequent tokens, which one program each walks alone
    if op == "categorical_score_":
        # Logits are read twice: where a row is long, from memory, unless the rows under way fit the L2, as those of 16 bits should.
        return 0.8 if shape["C"] <= 2**14 or mode != "fp32" else 0.57
    if op.startswith("conv"):
        return (
            0.05 if shape.get("groups", 1) > 1 else 0.35
        )  # an address and a mask for every element; depthwise without tensor cores
    if by == "copy":
        return 0.85
    # TF32 operands lie across the sum in memory: loaded 4 bytes at a time, transposed by the threads.
    return {"bf16": 0.6, "tf32": 0.25, "fp32 product": 0.35, "fp64": 0.6}[by]


def predictions() -> list[Prediction]:
    """Of every case in every mode, by op."""
    found = []
    for op, (_, cases, modes, _) in problems.CASES.items():
        for case in cases:
            for mode in modes:
                problem = problems.build("meta", op, case, mode)
                bound = cost.bound(problem.cost, cost.LEADS)
                expected = share(op, mode, problem.shape, bound.by)
                found.append(Prediction(op, case, problem.shape, mode, bound, expected, max(LAUNCHES, bound.seconds / expected)))
    return found


def diagonal_ratio(share: float) -> float:
    """In plain steps: forward and input gradient as in a step, and the squares at a share of a matrix product's rate."""
    return (4 + 2 / share) / 6


def kfac_ratio(decoder: capacity.Decoder, depth: int, share: float) -> float:
    """The same with both factors of every layer, half of each product; the head's B is a diagonal."""
    keys = decoder.width // decoder.heads * decoder.groups
    inputs = 3 * decoder.width**2 + decoder.inner**2
    gradients = 3 * decoder.width**2 + 2 * keys**2 + 2 * decoder.inner**2
    factors = depth * (inputs + gradients) + decoder.width**2
    step = 6 * (depth * (decoder.layer() - 2 * decoder.width) + decoder.vocabulary * decoder.width)
    return 4 / 6 + factors / share / step


def render() -> str:
    """The generated part of the page."""
    return "\n".join([_ops(), _models()])


def _ops() -> str:
    by_case: dict[tuple[str, str], list[Prediction]] = {}
    for p in predictions():
        by_case.setdefault((p.op, p.case), []).append(p)
    head = ["| op | case | shape | mode: predicted ms (bound ms, by; expected share) |", "| :-- | :-- | :-- | :-- |"]
    rows = []
    for (op, case), found in by_case.items():
        cells = (f"{p.mode}: **{p.seconds * 1e3:.3g}** ({p.bound.seconds * 1e3:.3g}, {p.bound.by}; {p.share:.0%})" for p in found)
        shape = " ".join(f"{k}={v}" for k, v in found[0].shape.items())
        rows.append(f"| `{op}` | {case} | {shape} | {'; '.join(cells)} |")
    return "\n".join([*head, *rows]) + "\n"


def _models() -> str:
    squares, product = (share("linear_sq_", "bf16", {"T": T}, "bf16") for T in (512, 1024)), share("gram_", "bf16", {}, "bf16")
    short, long = squares
    most = capacity.parameters(MEMORY_BYTES)
    depth = capacity.LLAMA_8B.layers(most)
    size = capacity.LLAMA_8B.outside() + depth * capacity.LLAMA_8B.layer()
    return (
        f"- Diagonal in bf16: `(4 + 2 / share) / 6`, {diagonal_ratio(short):.2f} plain steps at T = 512, {diagonal_ratio(long):.2f} at 1024, "
        "and what norms, embedding and launches add.\n"
        f"- KFAC in bf16 of Llama 3.2 1B's shape, the head's B a diagonal: {kfac_ratio(model_cases.LLAMA_1B, 16, product):.2f} plain steps; "
        f"{kfac_ratio(model_cases.LLAMA_1B, 16, 1.0):.2f} were the products as fast as torch's.\n"
        f"- The largest diagonal: {capacity.bytes_per_parameter()} bytes a parameter at the peak of a long run (2 of the weight in bf16, "
        f"{capacity.SUM_BYTES} of the sums, which the result is made of; frozen weights have no gradient), "
        f"{capacity.RESERVE_BYTES / 1e9:.0f} GB kept free: of {MEMORY_BYTES / 1e9:.1f} GB {most / 1e9:.2f} B parameters, so {depth} layers of "
        f"Llama 3 8B's widths, {size / 1e9:.2f} B.\n"
    )


def replaced(page: str) -> str:
    """The page with the table as it is now."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + render() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text()))
    print(f"wrote {PAGE}")
