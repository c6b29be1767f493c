"""One network into one file: with data, with pictures alone, without anything; what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mep.data import load
from mep.deploy import as_model, read_meta
from mep.pipeline.convert import convert, open_network, shrink
from mep.pipeline.core import Config
from mep.store import Store
from mep.train import accuracy, fit, small_mobilenet

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def digits():
    data = load("digits", n_train=512, n_test=200)
    return fit(
        small_mobilenet(10, in_channels=1, width=0.5), data, epochs=2, progress=False
    ).model, data


@pytest.mark.parametrize("method", ["nearest", "dfq", "adaround"])
def test_the_report_is_true_to_the_file(digits, method, tmp_path):
    net, data = digits
    before = {k: v.clone() for k, v in net.state_dict().items()}
    report = convert(
        net, tmp_path / "q.onnx", data, method=method, n_calib=64, n_latency=3, progress=False
    )
    row = list(report.nets.values())[1]
    assert row["accuracy"] == pytest.approx(accuracy(as_model(tmp_path / "q.onnx"), data.test))
    assert report.nets["FP32"]["accuracy"] == pytest.approx(accuracy(net, data.test))
    assert row["bytes"] == (tmp_path / "q.onnx").stat().st_size and row["method"].startswith(method)
    assert read_meta(tmp_path / "q.onnx")["classes"] == data.classes
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


def test_more_calibration_images_than_there_are(digits, tmp_path):
    net, data = digits
    convert(net, tmp_path / "q.onnx", data, n_calib=100_000, n_latency=3, progress=False)


def test_no_data_and_no_batch_norm(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    with pytest.raises(ValueError, match="no layer of the network has a batch norm"):
        convert(net, tmp_path / "q.onnx", input_shape=(1, 8, 8), progress=False)
    assert not (tmp_path / "q.onnx").exists()


def test_a_path_that_cannot_be_written(digits, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="can't write to the folder"):
        convert(digits[0], tmp_path / "file" / "q.onnx", digits[1], progress=False)


def test_labels_of_another_network_are_refused(tmp_path):
    net = small_mobilenet(12, in_channels=1, width=0.5)
    torch.save(net.state_dict(), tmp_path / "twelve.pth")
    (tmp_path / "nets.py").write_text(
        "from mep.train import small_mobilenet\ndef make(): return small_mobilenet(12, in_channels=1, width=.5)\n"
    )
    config = Config(
        data="digits", model=f"{tmp_path}/nets.py:make", weights=f"{tmp_path}/twelve.pth"
    )
    with pytest.raises(ValueError, match="the network has 12 outputs, the data 10 classes"):
        open_network(config)
    _, data = open_network(replace(config, class_index=tuple(range(2, 12))))
    assert min(int(y.min()) for _, y in data.test) == 2


def test_shared_weights_as_a_user_names_them(mep_data, tmp_path):
    config = Config(
        model=f"{ROOT}/benchmarks/networks.py:resnet20",
        weights=f"{mep_data}/weights/resnet20_cifar10.safetensors",
        data="cifar10",
        n_test=500,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    net, data = open_network(config)
    report = convert(net, tmp_path / "q.onnx", data, n_calib=64, n_latency=3, progress=False)
    assert report.nets["FP32"]["accuracy"] > 0.88 and report.nets["INT8"]["agreement"] > 0.95


def test_compression_goes_on_where_it_was_interrupted(digits, tmp_path, monkeypatch):
    net, data = digits
    put, n = Store.put, 0

    def stop(store, *args):
        nonlocal n
        put(store, *args)
        n += 1
        if n == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "put", stop)
    how = dict(macs=0.7, n_images=256, n_latency=3, progress=False)
    with pytest.raises(KeyboardInterrupt):
        shrink(net, tmp_path / "c.onnx", data, **how)
    monkeypatch.undo()
    kept = {
        p: p.stat().st_mtime_ns for p in (tmp_path / "c.onnx.unfinished").rglob("*.safetensors")
    }
    assert len(kept) == 3 and not (tmp_path / "c.onnx").exists()
    shrink(net, tmp_path / "c.onnx", data, **how)
    shrink(net, tmp_path / "whole.onnx", data, **how)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(as_model(tmp_path / "c.onnx")(x), as_model(tmp_path / "whole.onnx")(x))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.onnx", "whole.onnx"]


def test_training_without_labels_is_refused(digits, tmp_path):
    net, data = digits
    with pytest.raises(ValueError, match="finetune=2, but the data has no labels"):
        shrink(net, tmp_path / "c.onnx", replace(data, classes=["all"]), finetune=2)
