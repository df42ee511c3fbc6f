# SPDX-License-Identifier: Apache-2.0
"""``make bench``: measure, store a trimmed JSON, write docs/performance.md and its figures from the stored JSONs.

``python bench/performance.py`` does all of it; ``--page`` only the last step, on any machine.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import page
import scaling

BENCH = Path(__file__).parent
FILES = ["test_ops.py", "test_models.py", "test_scaling.py"]


def measure() -> dict:
    """Run the benchmarks in one process; pytest-benchmark's JSON. A failed gate stops everything: no partial result."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", "-q", *(str(BENCH / f) for f in FILES), f"--benchmark-json={output}"]
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        subprocess.run([*command, "--benchmark-columns=median,rounds"], cwd=BENCH.parent, env=environment, check=True)
        return json.loads(output.read_text())


def trim(full: dict) -> dict:
    """What the page needs and nothing else: quartiles instead of every round, facts instead of the whole environment."""
    results = [benchmark["extra_info"] for benchmark in full["benchmarks"]]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": full["machine_info"]["fisherfast"],
        "ops": [r for r in results if "op" in r],
        "models": [r for r in results if "way" in r],
        "scaling": [r for r in results if "sweep" in r],
        "cannot": full["cannot"],
    }


def store(result: dict, name: str, indent: int | None = 1) -> None:
    """Write one run to ``bench/results/cpu-<processor>-<threads>-threads/<name>``."""
    path = page.RESULTS / page.slug(result["machine"]) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(result), indent=indent) + "\n")
    print(f"wrote {path}")


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--page", action="store_true", help="only rewrite docs/performance.md and its figures from the stored results"
    )
    if not parser.parse_args().page:
        result = trim(measure())
        store(result, f"{result['date']}.json")
    for path in page.newest():
        run = json.loads(path.read_text())
        if run.get("scaling"):
            scaling.draw(run["scaling"], page.figure(run["machine"]))
    page.PAGE.write_text(page.render())
    print(f"wrote {page.PAGE}")


if __name__ == "__main__":
    main()
