"""The zoo: its results are whole and say what the page says of them; its script refuses what it can't do."""

import argparse
import importlib.util
import json
import sys
import urllib.error
from pathlib import Path

import pytest
import torchvision

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def zoo():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("zoo", ROOT / "benchmarks" / "zoo.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    sys.path.remove(str(ROOT / "benchmarks"))
    return module


@pytest.fixture(scope="module")
def results():
    return json.loads((ROOT / "benchmarks" / "results" / "zoo.json").read_text())


def test_results_are_whole(zoo, results):
    assert set(zoo.ours(Path("."))) <= set(results)
    for z in results.values():
        assert list(z["rows"]) == ["FP32", *zoo.WAYS]
        assert z["n_test"] > 0 and z["machine"]["onnxruntime"] and "/" not in z["data"]
        for r in z["rows"].values():
            assert (
                0 <= r["accuracy"] <= 1 and r["accuracy_se"] >= 0 and r["bytes"] > 0 and r["ms"] > 0
            )
        for way in zoo.WAYS:
            r = z["rows"][way]
            assert (
                r["float_layers"] == 0
                and r["bytes"] < z["rows"]["FP32"]["bytes"]
                and r["change"]
                == pytest.approx(r["accuracy"] - z["rows"]["FP32"]["accuracy"], abs=1e-6)
            )
            assert (r["n_calib"] == 0) == way.endswith("no data")


def test_what_the_page_says(results):
    for name, z in results.items():
        r = z["rows"]
        for way in ("W8A8 dfq, per layer, no data", "W8A8 adaround, per layer"):
            assert -r[way]["change"] - r[way]["change_se"] < 0.01, name
        assert (
            r["W4A8 adaround, per channel"]["sqnr_db"]
            > r["W4A8 nearest, per channel"]["sqnr_db"] + 6
        ), name
        assert r["W8A8 adaround, per layer"]["sqnr_db"] > r["W8A8 nearest, per layer"]["sqnr_db"], (
            name
        )


def test_no_connection_is_said(zoo, monkeypatch, tmp_path):
    def offline(*args, **kw):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(
        SystemExit,
        match="no connection: the weights of resnet18 can't be fetched.*Download https://",
    ):
        zoo.from_torchvision("resnet18", "imagenette", tmp_path)


def test_unknown_networks(zoo, tmp_path):
    with pytest.raises(SystemExit, match="torchvision has no network 'resnet81'"):
        zoo.from_torchvision("resnet81", "imagenette", tmp_path)


def test_a_network_without_its_weights_is_left_out(zoo, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MEP_DATA", str(tmp_path))
    monkeypatch.setattr(zoo, "HERE", tmp_path / "benchmarks")
    zoo.main(
        argparse.Namespace(
            torchvision=[],
            only=["resnet20"],
            images="imagenette",
            seed=0,
            calib=512,
            threads=1,
            timings=2,
            redo=False,
        )
    )
    assert "resnet20 is left out" in capsys.readouterr().err
