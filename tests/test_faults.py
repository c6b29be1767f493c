"""The fast part of benchmarks/faults.py: jobs killed and resumed, files spoilt, options of
every kind. Its committed result has the whole."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="jobs are forked")


@pytest.fixture(scope="module")
def faults():
    spec = importlib.util.spec_from_file_location("faults", ROOT / "benchmarks" / "faults.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults"] = module  # dataclasses and pickles look it up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("job", ["library", "run"])
def test_killed_at_random_and_resumed_it_ends_in_the_same_bytes(tmp_path, job):
    "In a process of its own: what was forked from one that has trained (as other tests here do) cannot train"
    script = [
        sys.executable,
        ROOT / "benchmarks" / "faults.py",
        "--kills",
        f"{job}=2",
        "--damages",
        "0",
        "--options",
        "0",
        "--out",
        tmp_path / "found.json",
    ]
    done = subprocess.run(script, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "found.json").read_text())["kills"]
    assert (
        found["job"] == job
        and found["kills"] == 2
        and found["same"] == found["rounds"]
        and found["left_over"] == []
    )


def test_spoilt_files_are_named_or_made_again(faults):
    table = faults.damaged(30)
    answers = {a for row in table.values() for a in row}
    assert len(table) == 10 and {a.partition(": ")[2] for a in answers} == {
        "named",
        "computed again",
    }


def test_strange_options_are_answered_in_a_line(faults):
    table = faults.fuzzed(60, seed=1)
    assert {a for row in table.values() for a in row} <= {"ok", "one line", "usage"}


def test_the_committed_result_lost_nothing():
    path = ROOT / "benchmarks" / "results" / "faults.json"
    found = json.loads(path.read_text())
    assert all(row["same"] == row["rounds"] for row in found["kills"])
    assert {a.partition(": ")[2] for row in found["damages"].values() for a in row} == {
        "named",
        "computed again",
    }
    assert {a for row in found["fuzz"].values() for a in row} <= {"ok", "one line", "usage"}
