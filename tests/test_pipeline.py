"""The pipeline: what is reused and what is not, killed at every stage and resumed, users'
networks, bad input."""

import inspect
import json
import multiprocessing
import os
import pickle
import shlex
import signal
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
from mep.networks import (
    build_network,
    fill,
    load_weights,
    restore_network,
)
from mep.pipeline import core
from mep.pipeline.cli import parser
from mep.pipeline.core import (
    METHODS,
    STAGES,
    Config,
    check_config,
    choose_methods,
    choose_stages,
    command,
    config_from,
    find_classes,
    measure_files,
    quantize_by,
    relabel,
    run,
)
from mep.pipeline.report import read
from mep.quant.dfq import prepare, unbalance
from mep.quant.sim import load_quantized, save_quantized
from mep.store import DamagedError, LockedError, Store
from mep.train import accuracy, recalibrate_bn

NAMES = [
    s.__name__ for s in STAGES if s.__name__ not in ("search", "compress", "early_exit")
]  # which do nothing unless asked to
TINY = Config(data="digits", epochs=1, n_train=256, n_test=100, n_calib=32, n_latency=5)


def stages(report):
    return [s["stage"].split()[0] for s in report.stages]


def reused(report):
    return [s["stage"].split()[0] for s in report.stages if s["reused"]]


def facts(report):
    "What two runs of one config must share: all but the times."
    return {
        n: {k: v for k, v in r.items() if not k.startswith(("ms", "speedup"))}
        for n, r in report.nets.items()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A finished run, and its folder."
    config = replace(TINY, out=str(tmp_path_factory.mktemp("run")))
    return config, run(config, progress=False)


def in_another_process(code):
    "Run code in a process that has mep loaded already, and return its exit code."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mep.pipeline.core"])
    process = context.Process(target=exec, args=(code, {}))
    process.start()
    process.join(300)
    return process.exitcode


def test_names_at_the_top():
    assert mep.pipeline.run is run and mep.pipeline.Config is Config


def test_what_a_run_leaves(finished):
    config, report = finished
    assert list(report.nets) == ["FP32", "INT8"] and stages(report) == NAMES
    folder = os.listdir(config.out)
    assert {"config.json", "results.json", "report.html", "fp32.onnx", "int8.onnx", "store"} <= set(
        folder
    )
    assert not list((Path(config.out) / "training").glob("*"))
    assert config_from(json.loads((Path(config.out) / "config.json").read_text())) == config
    assert Store(f"{config.out}/store").verify() == []
    assert read(config.out).nets == report.nets


def test_the_report_is_true_to_the_files(finished):
    config, report = finished
    test = load(config.data, n_train=config.n_train, n_test=config.n_test).test
    for name, row in report.nets.items():
        path = f"{config.out}/{name.lower()}.onnx"
        assert row["accuracy"] == pytest.approx(accuracy(as_model(path), test)) and row[
            "bytes"
        ] == os.path.getsize(path)
    assert report.nets["INT8"]["bops"] * 16 == report.nets["FP32"]["bops"]
    assert report.nets["INT8"]["bytes"] < report.nets["FP32"]["bytes"]


def test_a_second_run_reuses_everything(finished):
    config, report = finished
    again = run(config, progress=False)
    assert reused(again) == NAMES[1:] and again.nets == report.nets


CHANGES = [
    (dict(w_bits=4), "quantize"),
    (dict(per_channel=False), "quantize"),
    (dict(n_calib=16), "quantize"),
    (dict(n_latency=6), "measure"),
    (dict(epochs=2), "reference"),
    (dict(seed=1), "reference"),
    (dict(n_test=50), "reference"),
]


@pytest.mark.parametrize("change, first", CHANGES, ids=lambda v: str(v))
def test_a_changed_option_recomputes_from_the_stage_it_affects(finished, change, first, tmp_path):
    config, _ = finished
    report = run(replace(config, **change), progress=False)
    assert reused(report) == NAMES[1 : NAMES.index(first)]
    assert reused(run(config, progress=False))[:2] == [
        "reference",
        "quantize",
    ]  # the old results are still there


def test_redo(finished):
    config, _ = finished
    assert reused(run(config, progress=False, redo="measure")) == [
        "reference",
        "quantize",
        "export",
    ]


def test_until(tmp_path):
    config = replace(TINY, out=str(tmp_path), until="reference")
    report = run(config, progress=False)
    assert stages(report) == NAMES[:2] and list(report.nets) == ["FP32"]
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
    with pytest.raises(DamagedError, match=path.name):
        run(config, progress=False)


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
@pytest.mark.parametrize(
    "stage, after", [*((n, False) for n in NAMES), ("reference", True), ("export", True)]
)
def test_killed_and_resumed(finished, stage, after, tmp_path):
    _, report = finished
    config = replace(TINY, out=str(tmp_path))
    assert (
        in_another_process(KILLED.format(stage=stage, after=after, config=asdict(config)))
        == -signal.SIGKILL
    )
    assert not (tmp_path / "results.json").exists()
    again = run(config, progress=False)
    done = NAMES[: NAMES.index(stage) + after]
    assert reused(again) == done[1:]
    assert facts(again) == facts(report)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_killed_in_training_and_resumed(tmp_path):
    config = replace(TINY, epochs=12, until="reference", out=str(tmp_path / "killed"))
    p = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from mep.pipeline.core import run; run({asdict(config)!r}, progress=False)",
        ]
    )
    while not list(tmp_path.glob("killed/training/*.safetensors")):
        assert p.poll() is None
        time.sleep(0.01)
    p.kill()
    p.wait()
    run(config, progress=False)
    whole = replace(config, out=str(tmp_path / "whole"))
    run(whole, progress=False)
    a, b = (
        store.get(next(k for k in store.keys() if k.startswith("reference")))
        for store in (Store(f"{c.out}/store") for c in (config, whole))
    )
    assert a.meta["record"] == b.meta["record"]
    assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in b.tensors)


def test_two_runs_in_one_folder(tmp_path):
    with Store(tmp_path / "store").lock(), pytest.raises(LockedError, match=str(os.getpid())):
        run(replace(TINY, out=str(tmp_path)), progress=False)


# ---- methods


def test_methods_side_by_side(tmp_path):
    config = replace(TINY, w_bits=4, method="nearest,dfq,adaround", out=str(tmp_path))
    report = run(config, progress=False)
    assert list(report.nets) == ["FP32", "W4A8", "W4A8 dfq", "W4A8 adaround"]
    assert [s["stage"] for s in report.stages][2:5] == [
        "quantize nearest",
        "quantize dfq",
        "quantize adaround",
    ]
    assert {"w4a8.onnx", "w4a8-dfq.onnx", "w4a8-adaround.onnx"} <= set(os.listdir(tmp_path))
    nets = report.nets
    assert nets["W4A8 adaround"]["sqnr_db"] > nets["W4A8"]["sqnr_db"]
    assert [nets[n]["method"] for n in list(nets)[1:]] == [
        "nearest, a range per channel",
        "dfq, a range per layer",
        "adaround, a range per channel",
    ]
    assert {r["net"] for r in report.layers} == set(list(nets)[1:])
    assert any("after each step" in n for n in report.notes)
    assert not list((tmp_path / "quantized").glob("*/"))  # what adaround kept for a resumption


def test_one_method_more_computes_that_method(tmp_path):
    config = replace(TINY, w_bits=4, out=str(tmp_path))
    alone = run(replace(config, method="nearest"), progress=False)
    both = run(replace(config, method="nearest,adaround"), progress=False)
    assert [s["stage"] for s in both.stages if s["reused"]] == ["reference", "quantize nearest"]
    assert facts(both)["W4A8"] == facts(alone)["W4A8"]
    assert reused(run(replace(config, method=None), progress=False)) == [
        "reference",
        "quantize",
    ]  # adaround is what 4 bits mean


@pytest.mark.parametrize(
    "model", ["small_resnet", "small_mobilenet"]
)  # ReLU, and ReLU6 whose caps become one per channel
def test_every_method_is_found_again_as_it_was(model, tmp_path):
    config = replace(
        TINY, model=model, method=",".join(METHODS), out=str(tmp_path), until="quantize"
    )
    run(config, progress=False)
    report = run(replace(config, until=None), progress=False)
    assert reused(report) == ["reference", "quantize", "quantize", "quantize"]
    for row in list(report.nets.values())[1:]:
        assert row["parity_db"] is None or row["parity_db"] > 40
    for row in list(report.nets.values())[1:]:
        assert row["accuracy"] == pytest.approx(row["simulated"], abs=0.01)


def test_caps_per_channel_and_new_biases_are_found_again(tmp_path):
    "Equalization gives ReLU6 a cap per channel; bias correction gives a bias to a layer that had none."
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.ReLU6(),
        nn.Conv2d(8, 10, 3, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    x = torch.randn(16, 3, 16, 16)
    for net in (unbalance(recalibrate_bn(build_network("small_mobilenet", 10), x)), plain):
        q = quantize_by("dfq", net, x, progress=False)
        save_quantized(q, tmp_path / "q.safetensors")
        again = load_quantized(tmp_path / "q.safetensors", prepare(net))
        with torch.no_grad():
            assert torch.equal(again(x), q(x))


def test_without_images(tmp_path):
    config = replace(TINY, model="small_mobilenet", method="dfq", n_calib=0, out=str(tmp_path))
    assert run(config, progress=False).nets["INT8 dfq"]["sqnr_db"] > 10
    for method in (None, "nearest", "dfq,adaround"):
        with pytest.raises(ValueError, match="n_calib=0: (nearest|adaround) needs images"):
            check_config(replace(config, method=method))
    net = build_network("small_resnet", 10)
    with pytest.raises(ValueError, match="adaround needs images"):
        quantize_by("adaround", net)


@pytest.mark.parametrize(
    "method, says",
    [
        ("round", "unknown method 'round': choose nearest, dfq, adaround"),
        ("nearest,", "unknown method ''"),
        ("dfq,dfq", "names dfq 2 times"),
    ],
)
def test_methods_that_are_not_known(method, says):
    with pytest.raises(ValueError, match=says):
        choose_methods(method)
    with pytest.raises(ValueError, match=says):
        check_config(Config(method=method))


ROUNDING = """
import os, signal
from mep.pipeline import core
from mep.store import Store
put, n = Store.put, 0
def kill(store, key, *args):
    global n
    put(store, key, *args)
    n += "quantized" in str(store.root)
    if n == 3: os.kill(os.getpid(), signal.SIGKILL)
Store.put = kill
core.run({config!r}, progress=False)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_killed_in_adaround_and_resumed(tmp_path):
    config = replace(TINY, w_bits=4, out=str(tmp_path / "killed"))
    assert in_another_process(ROUNDING.format(config=asdict(config))) == -signal.SIGKILL
    assert len(list(tmp_path.glob("killed/quantized/*/**/*.safetensors"))) == 3
    assert facts(run(config, progress=False)) == facts(
        run(replace(config, out=str(tmp_path / "whole")), progress=False)
    )


def test_files_without_labels_are_compared_with_the_first(finished):
    config, _ = finished
    files = {n: f"{config.out}/{n}.onnx" for n in ("fp32", "int8")}
    test = load(config.data, n_test=50).test
    rows = measure_files(files, test, (1, 8, 8), n=3, labelled=False)
    assert (
        "accuracy" not in rows["int8"]
        and rows["int8"]["agreement"] > 0.8
        and "agreement" not in rows["fp32"]
    )
    assert set(measure_files(files, None, (1, 8, 8), n=3)["int8"]) >= {"ms", "speedup"}


# ---- search


QUICK = replace(TINY, search=0.8, n_search=5, finetune=1)


def test_searched_then_quantized(tmp_path):
    config = replace(QUICK, out=str(tmp_path))
    report = run(config, progress=False)
    assert list(report.nets) == ["FP32", "searched", "INT8"] and stages(report)[2] == "search"
    row = report.nets["searched"]
    assert row["macs"] < report.nets["FP32"]["macs"] and report.nets["INT8"]["macs"] == row["macs"]
    assert (
        0 < row["predicted"] < 1
        and row["predicted_ms"] > 0
        and row["accuracy"] == pytest.approx(row["simulated"], abs=0.02)
    )
    assert "accuracy, as predicted" in str(report) and any(
        n.startswith("searched: ") and "5 were trained" in n for n in report.notes
    )
    assert not list((tmp_path / "searching").glob("*"))
    again = run(config, progress=False)
    assert (
        reused(again) == ["reference", "search", "quantize", "export", "measure"]
        and again.nets == report.nets
    )
    four = run(
        replace(config, w_bits=4, method="nearest"), progress=False
    )  # puts the network together again from its record
    assert (
        reused(four) == ["reference", "search"]
        and four.nets["searched"]["simulated"] == row["simulated"]
    )
    assert reused(run(replace(config, search=None), progress=False)) == ["reference"]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_killed_while_searching_and_resumed(tmp_path, monkeypatch):
    config = replace(QUICK, out=str(tmp_path), until="search")
    assert (
        in_another_process(KILLED.format(stage="search", after=False, config=asdict(config)))
        == -signal.SIGKILL
    )
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "searching").rglob("*.safetensors")}
    assert (
        len([p for p in kept if "networks" in p.parts]) == 5
    )  # library and networks are there, the record is not
    first = core.measured_front

    def timed_anew(*args):
        return (
            *first(*args)[:2],
            1e3,
        )  # another machine, another choice: the network that was being trained is not in its way

    monkeypatch.setattr(core, "measured_front", timed_anew)
    assert reused(run(config, progress=False)) == ["reference"] and not list(
        (tmp_path / "searching").glob("*")
    )


def test_a_search_among_some_of_the_networks_classes(tmp_path):
    torch.save(build_network("small_resnet", 12, (1, 8, 8)).state_dict(), tmp_path / "twelve.pth")
    config = replace(
        QUICK,
        weights=str(tmp_path / "twelve.pth"),
        epochs=None,
        class_index=tuple(range(2, 12)),
        until="search",
        out=str(tmp_path / "run"),
    )
    assert list(run(config, progress=False).nets) == ["FP32", "searched"]


def test_relabelled_images_have_the_networks_labels():
    data = relabel(load("digits", n_train=64, n_test=50), list(range(5, 15)))
    plain = load("digits", n_train=64, n_test=50)
    at = torch.arange(10)
    assert (
        torch.equal(data.train.dataset[at][1], plain.train.dataset[at][1] + 5)
        and data.train.sampler.batch_size == 128
    )
    assert torch.equal(
        pickle.loads(pickle.dumps(data)).test.dataset[at][1], plain.test.dataset[at][1] + 5
    )


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(search=0), "search=0: give the share of the latency"),
        (dict(search=1.5), "search=1.5"),
        (dict(search=0.5, n_search=0), "n_search=0"),
        (dict(search=0.5, finetune=0), "needs training"),
    ],
)
def test_searches_that_cannot_be(change, says):
    with pytest.raises(ValueError, match=says):
        check_config(Config(**change))


def test_a_search_that_is_asked_too_much(tmp_path):
    with pytest.raises(ValueError, match="search=0.05: the quickest network takes"):
        run(replace(QUICK, search=0.05, out=str(tmp_path)), progress=False)


# ---- compression


HALF = replace(TINY, compress=0.5, finetune=1)


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    "A finished run that compresses, its folder and what it found."
    config = replace(HALF, out=str(tmp_path_factory.mktemp("halved")))
    report = run(config, progress=False)
    return config, report, facts(report)


def test_compressed_then_quantized(halved):
    config, report, _ = halved
    assert list(report.nets) == ["FP32", "compressed", "INT8"] and "compress" in stages(report)
    nets = report.nets
    assert (
        nets["compressed"]["macs"] <= 0.5 * nets["FP32"]["macs"]
        and nets["INT8"]["macs"] == nets["compressed"]["macs"]
    )
    assert any(n.startswith("compressed: ") for n in report.notes)
    for name, row in nets.items():
        assert row["accuracy"] == pytest.approx(row["simulated"], abs=0.02), name
    assert not list(Path(config.out, "compressing").glob("*"))
    again = run(config, progress=False)
    assert (
        reused(again) == ["reference", "compress", "quantize", "export", "measure"]
        and again.nets == nets
    )
    four = run(
        replace(config, w_bits=4), progress=False
    )  # builds the compressed network again from its plan
    assert (
        reused(four) == ["reference", "compress"]
        and four.nets["compressed"]["macs"] == nets["compressed"]["macs"]
    )
    assert reused(run(replace(config, compress=None), progress=False)) == ["reference"]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("after", [False, True])
def test_killed_while_compressing_and_resumed(halved, after, tmp_path):
    config = replace(HALF, out=str(tmp_path))
    assert (
        in_another_process(KILLED.format(stage="compress", after=after, config=asdict(config)))
        == -signal.SIGKILL
    )
    again = run(config, progress=False)
    assert reused(again) == ["reference", "compress"][: 1 + after] and facts(again) == halved[2]


@pytest.mark.parametrize("share", [0, 1, 50, -0.5])
def test_shares_that_cannot_be_kept(share):
    with pytest.raises(ValueError, match=f"compress={share}: give the share of the MACs to keep"):
        check_config(Config(compress=share))


# ---- early exits


def test_early_exits(tmp_path):
    config = replace(
        TINY,
        n_train=1000,
        epochs=3,
        exits="blocks.0,blocks.1",
        exit_loss=0.3,
        exit_epochs=2,
        out=str(tmp_path),
    )
    report = run(config, progress=False)
    assert (
        list(report.nets) == ["FP32", "INT8", "early exit"] and stages(report)[-1] == "early_exit"
    )
    row = report.nets["early exit"]
    assert (
        0 < row["macs"] < report.nets["FP32"]["macs"]
        and 0 <= row["agreement"] <= 1
        and row["mean_ms"] > 0
        and report.nets["FP32"]["mean_ms"] > 0
    )
    assert (tmp_path / "early-exit" / "cascade.json").is_file()
    assert any(
        n.startswith("early exit, on FP32: ") for n in report.notes
    ) and "INT8 reaches" in str(report)
    again = run(config, progress=False)
    assert (
        reused(again) == ["reference", "quantize", "export", "measure", "early_exit"]
        and again.nets == report.nets
    )
    (tmp_path / "early-exit" / "stage0.onnx").unlink()
    assert (
        "early_exit" not in reused(run(config, progress=False))
        and (tmp_path / "early-exit" / "stage0.onnx").is_file()
    )


def test_exits_after_nothing(finished):
    config, _ = finished
    with pytest.raises(ValueError, match="no exit after 'blocks.9'"):
        run(replace(config, exits="blocks.0,blocks.9"), progress=False)
    with pytest.raises(ValueError, match="exit_loss=1.5: give the share of the answers"):
        check_config(Config(exit_loss=1.5))


# ---- options


@given(
    st.builds(
        Config,
        w_bits=st.integers(2, 8),
        a_bits=st.integers(2, 8),
        per_channel=st.none() | st.booleans(),
        method=st.none() | st.sampled_from(["dfq", "nearest,adaround"]),
        compress=st.none() | st.sampled_from([0.25, 0.5]),
        search=st.none() | st.sampled_from([0.4, 0.75]),
        seed=st.integers(0, 9),
        n_train=st.none() | st.integers(1, 9),
        mean=st.none() | st.tuples(st.floats(0, 1)),
        class_index=st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)),
        out=st.text(st.characters(codec="ascii", categories=["L", "Zs"]), min_size=1),
    )
)
def test_a_config_survives_json_and_the_shell(config):
    assert config_from(json.loads(json.dumps(asdict(config)))) == config
    words = shlex.split(command(config))[1:]
    a = vars(parser("run").parse_args(words))
    assert config_from({k: v for k, v in a.items() if k in Config.__dataclass_fields__}) == config


@pytest.mark.parametrize(
    "name, value",
    [
        ("w_bits", 1),
        ("w_bits", 33),
        ("a_bits", 0),
        ("a_bits", 9),
        ("w_bits", 8.0),
        ("w_bits", True),
        ("w_bits", None),
        ("n_calib", 0),
        ("n_train", 0),
        ("n_test", -1),
        ("epochs", -1),
        ("batch", 0),
        ("threads", 0),
        ("n_latency", 1),
        ("size", 0),
    ],
)
def test_numbers_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        check_config(Config(**{name: value}))


def test_every_option_is_read_by_a_stage():
    read = {p for s in STAGES for p in list(inspect.signature(s).parameters)[1:]}
    assert read | {"stage", "until", "out"} == {f.name for f in fields(Config)}


def test_unknown_stage():
    with pytest.raises(ValueError, match="unknown stage 'distil'; known: load_data"):
        choose_stages("distil")


# ---- users' networks


def test_weights_round_trip(tmp_path):
    net = build_network("small_resnet", 10, (1, 8, 8), seed=3)
    torch.save(net.state_dict(), tmp_path / "a.pth")
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}, "epoch": 3},
        tmp_path / "b.pth",
    )
    save_file(net.state_dict(), tmp_path / "c.safetensors")
    x = torch.randn(2, 1, 8, 8)
    for f in ("a.pth", "b.pth", "c.safetensors"):
        again = fill(build_network("small_resnet", 10, (1, 8, 8)), load_weights(tmp_path / f))
        assert torch.equal(again(x), net.eval()(x))


def test_outputs_are_counted_in_whatever_order_the_weights_come():
    net = build_network("small_mobilenet", 7, (1, 8, 8))
    for state in (
        net.state_dict(),
        dict(sorted(net.state_dict().items())),
        dict(reversed(net.state_dict().items())),
    ):
        assert restore_network("small_mobilenet", state, (1, 8, 8))(
            torch.zeros(2, 1, 8, 8)
        ).shape == (2, 7)


def test_a_file_may_import_those_beside_it(tmp_path):
    (tmp_path / "beside_nets.py").write_text("from torch import nn\nclass Net(nn.Linear): pass\n")
    (tmp_path / "nets.py").write_text("from beside_nets import Net\ndef make(): return Net(3, 2)\n")
    before = list(sys.path)
    assert build_network(f"{tmp_path}/nets.py:make", 2).out_features == 2
    assert sys.path == before


def test_bad_weights(tmp_path):
    net = build_network("small_resnet", 10, (1, 8, 8))
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 50)
    (tmp_path / "cut.pth").write_bytes(b"no weights")
    torch.save(net, tmp_path / "pickled.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for f in ("cut.safetensors", "cut.pth", "pickled.pth", "list.pth"):
        with pytest.raises(ValueError, match=f):
            load_weights(tmp_path / f)
    w = {k: v.clone() for k, v in net.state_dict().items()}
    w["head.2.bias"][0] = torch.inf
    torch.save(w, tmp_path / "inf.pth")
    with pytest.raises(ValueError, match="head.2.bias holds NaN or infinite"):
        load_weights(tmp_path / "inf.pth")
    with pytest.raises(ValueError, match="don't fit.*head.2.weight"):
        fill(build_network("small_resnet", 7, (1, 8, 8)), net.state_dict())
    del w["head.2.bias"]
    with pytest.raises(
        ValueError, match=r"1 tensors are missing \(head.2.bias\), 1 are unknown to it \(tail\)"
    ):
        fill(net, w | {"tail": torch.zeros(1)})


def test_a_network_that_does_not_take_the_images(tmp_path):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(12, "
        "10))\ndef maps(): return nn.Conv2d(1, 10, 3)\n"
    )
    for f, says in (
        ("make", r"doesn't take images of shape \(1, 8, 8\)"),
        ("maps", r"must return logits \[N, classes\]"),
    ):
        with pytest.raises(ValueError, match=says):
            run(
                replace(TINY, model=f"{tmp_path}/nets.py:{f}", out=str(tmp_path / "run")),
                progress=False,
            )


USERS = """
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
"""


def test_a_network_that_cannot_be_traced(tmp_path):
    (tmp_path / "nets.py").write_text(USERS)
    with pytest.raises(ValueError, match="if x.sum"):
        run(
            replace(TINY, model=f"{tmp_path}/nets.py:Branches", out=str(tmp_path / "run")),
            progress=False,
        )


def test_an_operator_that_stays_in_float_is_reported(tmp_path):
    (tmp_path / "nets.py").write_text(USERS)
    report = run(
        replace(TINY, model=f"{tmp_path}/nets.py:Odd", out=str(tmp_path / "run")), progress=False
    )
    assert any(
        n.startswith("INT8, left in float: erf") for n in report.notes
    ) and "left in float" in str(report)


def test_heads_of_another_size(tmp_path):
    net = build_network("small_resnet", 12, (1, 8, 8))
    torch.save(net.state_dict(), tmp_path / "twelve.pth")
    config = replace(
        TINY,
        weights=str(tmp_path / "twelve.pth"),
        epochs=None,
        until="reference",
        out=str(tmp_path / "run"),
    )
    with pytest.raises(ValueError, match="the network has 12 outputs, the data 10 classes"):
        run(config, progress=False)
    report = run(replace(config, class_index=tuple(range(2, 12)), until=None), progress=False)
    assert "chooses among 12 classes" in report.notes[0]
    with pytest.raises(ValueError, match="class_index has 2 numbers"):
        run(replace(config, class_index=(1, 2)), progress=False)


def test_a_moved_weights_file_is_the_same_and_an_edited_one_is_not(tmp_path):
    net = build_network("small_resnet", 10, (1, 8, 8))
    torch.save(net.state_dict(), tmp_path / "a.pth")
    config = replace(TINY, epochs=None, until="reference", out=str(tmp_path / "run"))
    run(replace(config, weights=str(tmp_path / "a.pth")), progress=False)
    (tmp_path / "a.pth").rename(tmp_path / "b.pth")
    assert reused(run(replace(config, weights=str(tmp_path / "b.pth")), progress=False)) == [
        "reference"
    ]
    torch.save(
        build_network("small_resnet", 10, (1, 8, 8), seed=1).state_dict(), tmp_path / "b.pth"
    )
    assert reused(run(replace(config, weights=str(tmp_path / "b.pth")), progress=False)) == []


def test_imagenette_is_judged_by_imagenets_outputs():
    names = (
        "tench, English springer, cassette player, chain saw, church, French horn, garbage "
        "truck, gas pump, golf ball, parachute"
    ).split(", ")
    index = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    assert find_classes(names, 1000) == index
    data = load("digits", n_train=64, n_test=50)

    class Oracle(nn.Module):
        "Right, if class c is output index[c]."

        def forward(self, x):
            return nn.functional.one_hot(torch.tensor(index)[self.y], 1000).float()

    oracle = Oracle()
    oracle.y = torch.cat([y for _, y in data.test])
    assert accuracy(oracle, relabel(data, index).test) == 1


def test_real_imagenet_images_and_weights(mep_data, tmp_path):
    "A MobileNetV1 of ImageNet, given as a user gives it: a file with a function, and weights."
    (tmp_path / "v1.py").write_text("""
from collections import OrderedDict
from torch import nn

def block(i, o, k, s, groups):
    conv = nn.Conv2d(i, o, k, s, k // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(o, eps=1e-3), act=nn.ReLU6()))

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
""")
    config = Config(
        data=f"folder:{mep_data}/imagenet_val500",
        size=128,
        resize=146,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        n_train=50,
        n_test=400,
        n_calib=50,
        n_latency=5,
        model=f"{tmp_path}/v1.py:V1",
        weights=f"{mep_data}/weights/mobilenet_v1_0.25_128.safetensors",
        out=str(tmp_path / "run"),
    )
    nets = run(config, progress=False).nets
    assert nets["FP32"]["accuracy"] == pytest.approx(0.406, abs=0.03)  # 400 of the 500 images
    assert nets["INT8"]["accuracy"] > 0.3  # per channel; per tensor it collapses to 0.07
