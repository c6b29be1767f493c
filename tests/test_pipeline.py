"""The pipeline: what is reused and what is not, killed at every stage and resumed, users' networks, bad input."""
import inspect
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import mep.pipeline
from mep.data import load
from mep.deploy import as_model
from mep.pipeline.cli import parser
from mep.pipeline.core import STAGES, Config, _relabel, build_network, check_config, choose_stages, command, config_from, fill, find_classes, load_weights, run
from mep.pipeline.report import read
from mep.store import DamagedError, LockedError, Store
from mep.train import accuracy

NAMES = [s.__name__ for s in STAGES]
TINY = Config(data="digits", epochs=1, n_train=256, n_test=100, n_calib=32, n_latency=5)


def reused(report): return [s["stage"] for s in report.stages if s["reused"]]


def facts(report):
    "What two runs of one config must share: all but the times."
    return {n: {k: v for k, v in r.items() if not k.startswith(("ms", "speedup"))} for n, r in report.nets.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A finished run, and its folder."
    config = replace(TINY, out=str(tmp_path_factory.mktemp("run")))
    return config, run(config, progress=False)


def test_names_at_the_top():
    assert mep.pipeline.run is run and mep.pipeline.Config is Config


def test_what_a_run_leaves(finished):
    config, report = finished
    assert list(report.nets) == ["FP32", "INT8"] and [s["stage"] for s in report.stages] == NAMES
    folder = os.listdir(config.out)
    assert {"config.json", "results.json", "report.html", "fp32.onnx", "int8.onnx", "store"} <= set(folder)
    assert not list((Path(config.out) / "training").glob("*"))
    assert config_from(json.loads((Path(config.out) / "config.json").read_text())) == config
    assert Store(f"{config.out}/store").verify() == []
    assert read(config.out).nets == report.nets


def test_the_report_is_true_to_the_files(finished):
    config, report = finished
    test = load(config.data, n_train=config.n_train, n_test=config.n_test).test
    for name, row in report.nets.items():
        path = f"{config.out}/{name.lower()}.onnx"
        assert row["accuracy"] == pytest.approx(accuracy(as_model(path), test)) and row["bytes"] == os.path.getsize(path)
    assert report.nets["INT8"]["bops"] * 16 == report.nets["FP32"]["bops"]
    assert report.nets["INT8"]["bytes"] < report.nets["FP32"]["bytes"]


def test_a_second_run_reuses_everything(finished):
    config, report = finished
    again = run(config, progress=False)
    assert reused(again) == NAMES[1:] and again.nets == report.nets


CHANGES = [(dict(w_bits=4), "quantize"), (dict(per_channel=False), "quantize"), (dict(n_calib=16), "quantize"), (dict(n_latency=6), "measure"),
           (dict(epochs=2), "reference"), (dict(seed=1), "reference"), (dict(n_test=50), "reference")]


@pytest.mark.parametrize("change, first", CHANGES, ids=lambda v: str(v))
def test_a_changed_option_recomputes_from_the_stage_it_affects(finished, change, first, tmp_path):
    config, _ = finished
    report = run(replace(config, **change), progress=False)
    assert reused(report) == NAMES[1:NAMES.index(first)]
    assert reused(run(config, progress=False))[:2] == ["reference", "quantize"] # the old results are still there


def test_redo(finished):
    config, _ = finished
    assert reused(run(config, progress=False, redo="measure")) == ["reference", "quantize", "export"]


def test_until(tmp_path):
    config = replace(TINY, out=str(tmp_path), until="reference")
    report = run(config, progress=False)
    assert [s["stage"] for s in report.stages] == NAMES[:2] and list(report.nets) == ["FP32"]
    assert reused(run(replace(config, until=None), progress=False)) == ["reference"]


def test_a_lost_or_altered_file_is_written_again(tmp_path):
    config = replace(TINY, out=str(tmp_path))
    before = facts(run(config, progress=False))
    (tmp_path / "int8.onnx").write_bytes(b"not a network")
    after = run(config, progress=False)
    assert "export" not in reused(after) and facts(after) == before
    (tmp_path / "fp32.onnx").unlink()
    assert facts(run(config, progress=False)) == before


def test_a_damaged_artifact_is_named(tmp_path):
    config = replace(TINY, out=str(tmp_path), until="reference")
    run(config, progress=False)
    path = next((tmp_path / "store").glob("reference-*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError, match=path.name): run(config, progress=False)


KILLED = """
import os, signal, sys
from mep.pipeline import core
keep = core.State.keep
def kill(state, *args, **kw):
    if state.stage == {stage!r} and not {after}: os.kill(os.getpid(), signal.SIGKILL)
    found = keep(state, *args, **kw)
    if state.stage == {stage!r}: os.kill(os.getpid(), signal.SIGKILL)
    return found
core.State.keep = kill
core.run({config!r}, progress=False)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("stage, after", [*((n, False) for n in NAMES), ("reference", True), ("export", True)])
def test_killed_and_resumed(finished, stage, after, tmp_path):
    _, report = finished
    config = replace(TINY, out=str(tmp_path))
    died = subprocess.run([sys.executable, "-c", KILLED.format(stage=stage, after=after, config=asdict(config))], capture_output=True, text=True, timeout=300)
    assert died.returncode == -9, died.stderr
    assert not (tmp_path / "results.json").exists()
    again = run(config, progress=False)
    done = NAMES[: NAMES.index(stage) + after]
    assert reused(again) == done[1:]
    assert facts(again) == facts(report)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_killed_in_training_and_resumed(tmp_path):
    config = replace(TINY, epochs=12, until="reference", out=str(tmp_path / "killed"))
    p = subprocess.Popen([sys.executable, "-c", f"from mep.pipeline.core import run; run({asdict(config)!r}, progress=False)"])
    while not list(tmp_path.glob("killed/training/*.safetensors")):
        assert p.poll() is None
        time.sleep(0.01)
    p.kill()
    p.wait()
    run(config, progress=False)
    whole = replace(config, out=str(tmp_path / "whole"))
    run(whole, progress=False)
    a, b = (store.get(next(k for k in store.keys() if k.startswith("reference"))) for store in (Store(f"{c.out}/store") for c in (config, whole)))
    assert a.meta["record"] == b.meta["record"]
    assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in b.tensors)


def test_two_runs_in_one_folder(tmp_path):
    with Store(tmp_path / "store").lock(), pytest.raises(LockedError, match=str(os.getpid())):
        run(replace(TINY, out=str(tmp_path)), progress=False)


# ---- options


@given(st.builds(Config, w_bits=st.integers(2, 8), a_bits=st.integers(2, 8), per_channel=st.booleans(), seed=st.integers(0, 9), n_train=st.none() | st.integers(1, 9),
                 mean=st.none() | st.tuples(st.floats(0, 1)), class_index=st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)), out=st.text(st.characters(codec="ascii", categories=["L", "Zs"]), min_size=1)))
def test_a_config_survives_json_and_the_shell(config):
    assert config_from(json.loads(json.dumps(asdict(config)))) == config
    words = shlex.split(command(config))[1:]
    a = vars(parser("run").parse_args(words))
    assert config_from({k: v for k, v in a.items() if k in Config.__dataclass_fields__}) == config


@pytest.mark.parametrize("name, value", [("w_bits", 1), ("w_bits", 33), ("a_bits", 0), ("a_bits", 9), ("w_bits", 8.0), ("w_bits", True), ("w_bits", None), ("n_calib", 0), ("n_train", 0),
                                         ("n_test", -1), ("epochs", -1), ("batch", 0), ("threads", 0), ("n_latency", 1), ("size", 0)])
def test_numbers_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name}="): check_config(Config(**{name: value}))


def test_every_option_is_read_by_a_stage():
    read = {p for s in STAGES for p in list(inspect.signature(s).parameters)[1:]}
    assert read | {"until", "out"} == {f.name for f in fields(Config)}


def test_unknown_stage():
    with pytest.raises(ValueError, match="unknown stage 'distil'; known: load_data"): choose_stages("distil")


# ---- users' networks


def test_weights_round_trip(tmp_path):
    net = build_network("small_resnet", 10, (1, 8, 8), seed=3)
    torch.save(net.state_dict(), tmp_path / "a.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}, "epoch": 3}, tmp_path / "b.pth")
    save_file(net.state_dict(), tmp_path / "c.safetensors")
    x = torch.randn(2, 1, 8, 8)
    for f in ("a.pth", "b.pth", "c.safetensors"):
        again = fill(build_network("small_resnet", 10, (1, 8, 8)), load_weights(tmp_path / f))
        assert torch.equal(again(x), net.eval()(x))


def test_bad_weights(tmp_path):
    net = build_network("small_resnet", 10, (1, 8, 8))
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 50)
    (tmp_path / "cut.pth").write_bytes(b"no weights")
    torch.save(net, tmp_path / "pickled.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for f in ("cut.safetensors", "cut.pth", "pickled.pth", "list.pth"):
        with pytest.raises(ValueError, match=f): load_weights(tmp_path / f)
    w = {k: v.clone() for k, v in net.state_dict().items()}
    w["head.2.bias"][0] = torch.inf
    torch.save(w, tmp_path / "inf.pth")
    with pytest.raises(ValueError, match="head.2.bias holds NaN or infinite"): load_weights(tmp_path / "inf.pth")
    with pytest.raises(ValueError, match="don't fit.*head.2.weight"): fill(build_network("small_resnet", 7, (1, 8, 8)), net.state_dict())
    del w["head.2.bias"]
    with pytest.raises(ValueError, match=r"1 tensors are missing \(head.2.bias\), 1 are unknown to it \(tail\)"): fill(net, w | {"tail": torch.zeros(1)})


def test_a_network_that_does_not_take_the_images(tmp_path):
    (tmp_path / "nets.py").write_text("from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(12, 10))\ndef maps(): return nn.Conv2d(1, 10, 3)\n")
    for f, says in (("make", r"doesn't take images of shape \(1, 8, 8\)"), ("maps", r"must return logits \[N, classes\]")):
        with pytest.raises(ValueError, match=says): run(replace(TINY, model=f"{tmp_path}/nets.py:{f}", out=str(tmp_path / "run")), progress=False)


USERS = '''
import torch
from torch import nn
class Branches(nn.Module):
    def __init__(self): super().__init__(); self.fc = nn.Linear(64, 10)
    def forward(self, x):
        x = x.flatten(1)
        if x.sum() > 0: x = -x
        return self.fc(x)
class Odd(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(256, 10)
    def forward(self, x): return self.fc(torch.erf(self.conv(x)).flatten(1))
'''


def test_a_network_that_cannot_be_traced(tmp_path):
    (tmp_path / "nets.py").write_text(USERS)
    with pytest.raises(ValueError, match="if x.sum"): run(replace(TINY, model=f"{tmp_path}/nets.py:Branches", out=str(tmp_path / "run")), progress=False)


def test_an_operator_that_stays_in_float_is_reported(tmp_path):
    (tmp_path / "nets.py").write_text(USERS)
    report = run(replace(TINY, model=f"{tmp_path}/nets.py:Odd", out=str(tmp_path / "run")), progress=False)
    assert any(n.startswith("Left in float: erf") for n in report.notes) and "Left in float" in str(report)


def test_heads_of_another_size(tmp_path):
    net = build_network("small_resnet", 12, (1, 8, 8))
    torch.save(net.state_dict(), tmp_path / "twelve.pth")
    config = replace(TINY, weights=str(tmp_path / "twelve.pth"), epochs=None, until="reference", out=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="the network has 12 outputs, the data 10 classes"): run(config, progress=False)
    report = run(replace(config, class_index=tuple(range(2, 12)), until=None), progress=False)
    assert "chooses among 12 classes" in report.notes[0]
    with pytest.raises(ValueError, match="class_index has 2 numbers"): run(replace(config, class_index=(1, 2)), progress=False)


def test_a_moved_weights_file_is_the_same_and_an_edited_one_is_not(tmp_path):
    net = build_network("small_resnet", 10, (1, 8, 8))
    torch.save(net.state_dict(), tmp_path / "a.pth")
    config = replace(TINY, epochs=None, until="reference", out=str(tmp_path / "run"))
    run(replace(config, weights=str(tmp_path / "a.pth")), progress=False)
    (tmp_path / "a.pth").rename(tmp_path / "b.pth")
    assert reused(run(replace(config, weights=str(tmp_path / "b.pth")), progress=False)) == ["reference"]
    torch.save(build_network("small_resnet", 10, (1, 8, 8), seed=1).state_dict(), tmp_path / "b.pth")
    assert reused(run(replace(config, weights=str(tmp_path / "b.pth")), progress=False)) == []


def test_imagenette_is_judged_by_imagenets_outputs():
    names = "tench, English springer, cassette player, chain saw, church, French horn, garbage truck, gas pump, golf ball, parachute".split(", ")
    index = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    assert find_classes(names, 1000) == index
    data = load("digits", n_train=64, n_test=50)

    class Oracle(nn.Module):
        "Right, if class c is output index[c]."
        def forward(self, x): return nn.functional.one_hot(torch.tensor(index)[self.y], 1000).float()
    oracle = Oracle()
    oracle.y = torch.cat([y for _, y in data.test])
    assert accuracy(oracle, _relabel(data, index).test) == 1


def test_real_imagenet_images_and_weights(mep_data, tmp_path):
    "A MobileNetV1 of ImageNet, given as a user gives it: a file with a function, and weights."
    (tmp_path / "v1.py").write_text('''
from collections import OrderedDict
from torch import nn

def block(i, o, k, s, groups): return nn.Sequential(OrderedDict(conv=nn.Conv2d(i, o, k, s, k // 2, groups=groups, bias=False), bn=nn.BatchNorm2d(o, eps=1e-3), act=nn.ReLU6()))

class V1(nn.Module):
    def __init__(self):
        super().__init__()
        c = [8, 16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256]
        f = OrderedDict(stem=block(3, c[0], 3, 2, 1))
        for n, s in enumerate([1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1], 1):
            f[f"dw{n}"] = block(c[n - 1], c[n - 1], 3, s, c[n - 1])
            f[f"pw{n}"] = block(c[n - 1], c[n], 1, 1, 1)
        self.features, self.pool, self.classifier = nn.Sequential(f), nn.AdaptiveAvgPool2d(1), nn.Linear(c[-1], 1000)
    def forward(self, x): return self.classifier(self.pool(self.features(x.flip(2, 3))).flatten(1))
''')
    config = Config(data=f"folder:{mep_data}/imagenet_val500", size=128, resize=146, mean=(0.5,) * 3, std=(0.5,) * 3, n_train=50, n_test=400, n_calib=50, n_latency=5,
                    model=f"{tmp_path}/v1.py:V1", weights=f"{mep_data}/weights/mobilenet_v1_0.25_128.safetensors", out=str(tmp_path / "run"))
    nets = run(config, progress=False).nets
    assert nets["FP32"]["accuracy"] == pytest.approx(0.406, abs=0.03)  # 400 of the 500 images
    assert nets["INT8"]["accuracy"] > 0.3  # per channel; per tensor it collapses to 0.07
