# SPDX-License-Identifier: Apache-2.0
"""Makes this folder importable, fixes the threads, and adds to pytest-benchmark's JSON what it does not know."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import measure

_CANNOT = pytest.StashKey[list[dict[str, str]]]()


def pytest_configure(config):
    torch.set_num_threads(measure.THREADS)
    config.stash[_CANNOT] = []


@pytest.fixture
def cannot(request):
    """A list for the cases a peer cannot do: ``{"case", "way", "reason"}``."""
    return request.config.stash[_CANNOT]


@pytest.fixture(scope="session")
def fma_peak():
    return measure.fma_peak_gflops()


def pytest_benchmark_update_machine_info(machine_info):
    machine_info["fisherfast"] = measure.machine()


def pytest_benchmark_update_json(config, output_json):
    output_json["cannot"] = config.stash[_CANNOT]
