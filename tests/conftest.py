"""Fixtures that every test may use."""
import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the suite runs one process per core


@pytest.fixture(scope="session")
def mep_data():
    "The folder of real data and pretrained weights that MEP_DATA names, or a skip that says so."
    root = os.environ.get("MEP_DATA", "")
    if not root or not Path(root).is_dir():
        pytest.skip("MEP_DATA does not name a folder with real data: tests on real data are skipped")
    return Path(root)
