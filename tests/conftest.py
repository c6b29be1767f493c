"""Fixtures that every test may use, and a line that says how much memory the tests took."""

import os
import resource
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the suite runs one process per core


@pytest.fixture(scope="session")
def mep_data():
    "The folder of real data and pretrained weights that MEP_DATA names, or a skip that says so."
    root = os.environ.get("MEP_DATA", "")
    if not root or not Path(root).is_dir():
        pytest.skip(
            "MEP_DATA does not name a folder with real data: tests on real data are skipped"
        )
    return Path(root)


PEAKS = []  # bytes, one for each process that ran tests


def pytest_sessionfinish(session):
    """A worker of pytest-xdist hands its peak of memory to the process that started it;
    without workers that is this one."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak"] = peak
    elif not PEAKS:
        PEAKS.append(peak)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    PEAKS.append(getattr(node, "workeroutput", {}).get("peak", 0))


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(
        f"peak memory: {' + '.join(f'{peak / 1e9:.1f}' for peak in PEAKS)} GB"
    )
