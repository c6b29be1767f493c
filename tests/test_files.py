"""Somebody's files: what mep did not write it neither deletes nor overwrites, and an option
that can't work is refused before the first stage."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mep.conditional.early_exit import Cascade
from mep.data import from_arrays, load, shapes
from mep.deploy import ModelFileError
from mep.nas import bkd
from mep.nas.bkd import BlockLibrary
from mep.nas.search import Deployment
from mep.nas.space import SearchSpace, choices, default_space
from mep.networks import build_network
from mep.pipeline import core
from mep.pipeline.cli import main
from mep.pipeline.convert import convert, shrink
from mep.pipeline.core import Config, check_config, run
from mep.pipeline.report import ROWS, Report, html, read, write
from mep.store import (
    LockedError,
    StoreError,
    check_writable,
    claim,
    discard,
    draft,
    save,
    write_atomic,
)

TINY = Config(data="digits", epochs=1, n_train=128, n_test=40, n_calib=16, n_latency=2)


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


# ---- claims


def test_a_name_that_something_else_has(tmp_path):
    (tmp_path / "a.txt").write_text("theirs")
    with pytest.raises(StoreError, match="a.txt: there already, and not written by mep"):
        claim(tmp_path, "a.txt", "b.txt")
    assert contents(tmp_path) == {"a.txt": b"theirs"}
    claim(tmp_path, "b.txt")
    claim(tmp_path, "a.txt", force=True)
    claim(tmp_path, "a.txt", "b.txt")


def test_a_folder_that_something_else_has(tmp_path):
    (tmp_path / "f").mkdir()
    claim(tmp_path / "f")
    (tmp_path / "f" / "theirs.txt").write_text("x")
    claim(tmp_path / "f")  # ours, with something of theirs in it
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "theirs.txt").write_text("x")
    with pytest.raises(StoreError, match="g: there already"):
        claim(tmp_path / "g")
    assert not discard(tmp_path / "f") and contents(tmp_path / "f") == {"theirs.txt": b"x"}


def test_a_note_that_is_damaged_claims_nothing(tmp_path):
    claim(tmp_path, "a.txt")
    (tmp_path / "a.txt").write_text("ours")
    for text in ("", "[]", "{}", '{"names": 3}', "\x00"):
        (tmp_path / ".mep.json").write_text(text)
        with pytest.raises(StoreError, match="a.txt"):
            claim(tmp_path, "a.txt")


def test_discard_takes_what_is_ours_and_nothing_else(tmp_path):
    folder = claim(tmp_path / "f", "numbers.npy")
    save(folder / "deep" / "a.safetensors", dict(x=torch.zeros(2)))
    (folder / "numbers.npy").write_bytes(b"ours")
    (folder / "b.safetensors").write_bytes(b"not one of mep's")
    (folder / "deep" / "notes.txt").write_text("theirs")
    assert not discard(folder)
    assert set(contents(folder)) == {"b.safetensors", "deep/notes.txt"}
    assert not discard(tmp_path / "nowhere")


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_discard_does_not_follow_links(tmp_path):
    (tmp_path / "theirs").mkdir()
    save(tmp_path / "theirs" / "a.safetensors", {})
    claim(tmp_path / "f")
    (tmp_path / "f" / "link").symlink_to(tmp_path / "theirs", target_is_directory=True)
    discard(tmp_path / "f")
    assert (tmp_path / "theirs" / "a.safetensors").exists()


def test_drafts_of_one_path_at_once(tmp_path):
    with draft(tmp_path / "x") as a, draft(tmp_path / "x") as b:
        assert a != b
        a.write_text("a")
        b.write_text("b")
        write_atomic(tmp_path / "x", b"between")  # cleans up after dead writers only
        assert a.exists() and b.exists()
    assert (tmp_path / "x").read_text() == "a"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("name", ["f/x", "d", "x" * 250, "a\0b"])
def test_files_that_could_not_be_written(name, tmp_path):
    (tmp_path / "f").write_text("a file")
    (tmp_path / "d").mkdir()
    with pytest.raises((StoreError, ValueError)):
        check_writable(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["d", "f"]


# ---- runs


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "report.html",
        "results.json",
        "fp32.onnx",
        "int8.onnx",
        "training/mine.txt",
        "store/mine.txt",
        "quantized/x.safetensors",
    ],
)
def test_a_run_in_a_folder_with_somebodys(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("theirs")
    with pytest.raises(StoreError, match=f"{Path(name).parts[0]}: there already"):
        run(replace(TINY, out=str(tmp_path)), progress=False)
    left = contents(tmp_path)
    assert left[name] == b"theirs" and not {"config.json", "results.json"} & (left.keys() - {name})


def test_force_takes_the_names_and_leaves_the_rest(tmp_path):
    (tmp_path / "report.html").write_text("theirs")
    (tmp_path / "notes.txt").write_text("theirs, too")
    run(replace(TINY, out=str(tmp_path), until="reference"), progress=False, force=True)
    assert (
        "<html" in (tmp_path / "report.html").read_text()
        and (tmp_path / "notes.txt").read_text() == "theirs, too"
    )


TYPOS = [
    dict(data="shaeps"),
    dict(model="torchvision:resnet81"),
    dict(model="small_resnt"),
    dict(model="gone.py:f"),
    dict(weights="gone.pth"),
    dict(data="folder:gone"),
    dict(exits="blocks.77"),
    dict(exits="blocks.0,"),
    dict(exits="a,a"),
    dict(n_calib=5000),
    dict(std=(0.0,)),
    dict(std=(math.nan,)),
    dict(mean=(0.1, 0.2)),
    dict(threads=1_000_000),
    dict(threads=0),
    dict(compress=1e-9),
    dict(compress=math.nan),
    dict(search=1e-9),
    dict(search=0.5, finetune=0),
    dict(search=0.8, n_search=2),
    dict(out=""),
    dict(out=" "),
    dict(class_index=(0,) * 10),
    dict(class_index=(0.5,) * 10),
    dict(exit_loss=0),
    dict(exit_loss=math.inf),
    dict(seed=-1),
    dict(seed="0"),
    dict(batch=None),
    dict(w_bits=True),
    dict(epochs=1.5),
    dict(per_channel=1),
    dict(data=3),
    dict(mean=("a",)),
    dict(resize=300),
    dict(until="mesure"),
    dict(method="nearst"),
]


@pytest.mark.parametrize("change", TYPOS, ids=str)
def test_an_option_that_cannot_work_is_found_before_the_first_stage(change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(core, "fit", lambda *a, **k: pytest.fail("training began"))
    out = tmp_path / "run"
    out.mkdir()
    config = replace(TINY, out=str(out))
    claim(out, "config.json")
    (out / "config.json").write_text("the old one")
    with pytest.raises((ValueError, FileNotFoundError, TypeError)) as e:
        run(replace(config, **change), progress=False)
    assert next(iter(change)) in str(e.value) or str(next(iter(change.values()))).split(":")[
        -1
    ] in str(e.value)
    assert (out / "config.json").read_text() == "the old one"
    assert not any(
        p.name == ".mep.json" for p in tmp_path.glob("*")
    )  # nothing was written where it wasn't asked for


def test_an_output_that_cannot_be_written_is_found_before_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "fit", lambda *a, **k: pytest.fail("training began"))
    (tmp_path / "int8.onnx").mkdir()
    with pytest.raises(StoreError, match="int8.onnx is a folder"):
        run(replace(TINY, out=str(tmp_path)), progress=False)


def test_leftovers_of_a_killed_run_are_collected(tmp_path):
    config = replace(TINY, out=str(tmp_path), until="reference")
    run(config, progress=False)
    left = [
        tmp_path / d / ".x.safetensors.0123456789ab.mep-tmp"
        for d in ("store", "training", "quantized", ".")
    ]
    for p in left:
        p.parent.mkdir(exist_ok=True)
        p.write_bytes(b"half")
    (tmp_path / "results.json").unlink()
    run(config, progress=False)
    assert not any(p.exists() for p in left[:3])


# ---- single files


@pytest.fixture(scope="module")
def net():
    return build_network("small_mobilenet", 10, (1, 8, 8)).eval()


def test_a_file_of_somebody_elses_is_not_overwritten(net, tmp_path):
    path = tmp_path / "x.onnx"
    path.write_text("theirs")
    how = dict(input_shape=(1, 8, 8), n_latency=2, progress=False)
    with pytest.raises(StoreError, match="was not written by mep"):
        convert(net, path, **how)
    assert path.read_text() == "theirs"
    convert(net, path, force=True, **how)
    convert(net, path, **how)  # now it is ours


def test_an_unfinished_folder_of_somebody_elses_is_not_emptied(net, tmp_path):
    theirs = tmp_path / "x.onnx.unfinished" / "notes.txt"
    theirs.parent.mkdir()
    theirs.write_text("theirs")
    data = load("digits", n_train=64, n_test=20)
    with pytest.raises(StoreError, match="unfinished: there already"):
        convert(net, tmp_path / "x.onnx", data, method="adaround", progress=False)
    with pytest.raises(StoreError, match="unfinished: there already"):
        shrink(net, tmp_path / "x.onnx", data, progress=False)
    convert(net, tmp_path / "x.onnx", data, method="nearest", n_latency=2, progress=False)
    assert theirs.read_text() == "theirs"


def test_weights_are_not_overwritten_by_what_is_made_of_them(net, tmp_path, capsys):
    weights = tmp_path / "net.pth"
    torch.save(net.state_dict(), weights)
    before = weights.read_bytes()
    shared = [
        "--model",
        "small_mobilenet",
        "--weights",
        str(weights),
        "--data",
        "digits",
        "--quiet",
    ]
    for words in (
        ["quantize", *shared, "-o", f"{tmp_path}/./net.pth"],
        ["compress", *shared, "-o", str(weights)],
        ["compress", *shared, "-o", f"{tmp_path}/x.onnx", "--weights-out", str(weights)],
    ):
        assert main(words) == 2
        assert "is also the file of --weights" in capsys.readouterr().err
    assert weights.read_bytes() == before
    with pytest.raises(ValueError, match="give two names"):
        shrink(
            net,
            tmp_path / "x.onnx",
            load("digits", n_train=64),
            weights=tmp_path / "x.onnx",
            progress=False,
        )


# ---- libraries


@pytest.fixture(scope="module")
def small():
    x, y, *_ = shapes(60, size=16)
    space = default_space(16, (3, 16, 16), 8, options=choices("basic", width=(1.0, 0.5)))
    return (
        from_arrays(x[:40], y[:40], x[40:], y[40:], n_valid=10),
        space,
        space.build(space.reference),
    )


def test_a_library_in_a_folder_with_maps(small, tmp_path):
    data, space, teacher = small
    theirs = tmp_path / "maps" / "my_data.txt"
    theirs.parent.mkdir()
    theirs.write_text("theirs")
    with pytest.raises(StoreError, match="maps: there already"):
        BlockLibrary(tmp_path, space, teacher).train(data, progress=False)
    assert theirs.read_text() == "theirs"


def test_the_maps_room_is_counted_together_and_taken(small, tmp_path, monkeypatch):
    data, space, teacher = small
    images = torch.cat([data.train.dataset[torch.arange(30)][0]])
    paths = bkd.teacher_maps(teacher, images, [0, 1], tmp_path)
    if hasattr(os, "posix_fallocate"):
        for p in paths.values():
            assert p.stat().st_blocks * 512 >= p.stat().st_size
    edges = [2 * 40 * c * h * w for c, h, w in space.shapes[1:]]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        bkd.shutil, "disk_usage", lambda p: usage._replace(free=max(edges) + 1)
    )  # room for each, not for all
    with pytest.raises(StoreError, match="the teacher's maps need"):
        BlockLibrary(tmp_path / "l", space, teacher).train(data, progress=False)
    assert not (tmp_path / "l" / "maps").exists()


def test_a_disk_that_fills_up_is_named(small, tmp_path, monkeypatch):
    _, _, teacher = small

    def full(path, start):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bkd, "_allocate", full)
    with pytest.raises(StoreError, match="has no room"):
        bkd.teacher_maps(teacher, torch.zeros(4, 3, 16, 16), [0], tmp_path)
    assert os.listdir(tmp_path) == []


# ---- reports and descriptions that were damaged


GOOD = dict(
    title="t",
    nets={
        "FP32": dict(accuracy=0.9, accuracy_se=0.01, ms=1.0, ms_p10=0.9, ms_p90=1.1, bytes=10),
        "INT8": dict(
            accuracy=0.9,
            accuracy_se=0.01,
            change=0.0,
            change_se=0.0,
            ms=1.0,
            ms_p10=0.9,
            ms_p90=1.1,
            bytes=5,
            smaller=2.0,
            speedup=1.0,
            speedup_lo=0.9,
            speedup_hi=1.1,
        ),
    },
    layers=[dict(net="INT8", name="conv", sqnr_db=30.0)],
    stages=[dict(stage="load_data", seconds=1.0, reused=False)],
    fronts={"a": [[1.0, 0.5]]},
)
BAD = [
    dict(nets=[]),
    dict(nets={"FP32": 3}),
    dict(nets={"FP32": dict(ms=1.0)}),
    dict(nets={"FP32": dict(accuracy="high", accuracy_se=1)}),
    dict(layers=[{}]),
    dict(layers=[dict(net="INT8", name=None, sqnr_db=1)]),
    dict(stages=[{}]),
    dict(stages={}),
    dict(notes=[1]),
    dict(fronts={"a": [1]}),
    dict(fronts={"a": []}),
    dict(title=3),
    dict(data=[]),
    dict(config="x"),
    dict(strange=1),
    dict(environment=[1]),
    dict(
        nets={
            "FP32": GOOD["nets"]["FP32"],
            "INT8": {k: v for k, v in GOOD["nets"]["INT8"].items() if k != "change_se"},
        }
    ),
]


@pytest.mark.parametrize("change", BAD, ids=lambda d: str(d)[:40])
def test_a_damaged_report_is_one_line(change, tmp_path, capsys):
    claim(tmp_path, "results.json")
    (tmp_path / "results.json").write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError, match="isn't a report of mep"):
        read(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("drop", ["accuracy", "change", "ms", "bytes", "smaller", "speedup"])
def test_a_report_that_lacks_numbers(drop, tmp_path, capsys):
    nets = {
        n: {k: v for k, v in row.items() if not k.startswith(drop)}
        for n, row in GOOD["nets"].items()
    }
    (tmp_path / "results.json").write_text(json.dumps(GOOD | dict(nets=nets)))
    assert main(["report", str(tmp_path)]) == 0


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '{"nets": null}', "\x00\x01", "{", '"x"'])
def test_no_report_at_all(text, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="isn't a report of mep"):
        read(tmp_path)


def test_a_page_of_somebody_elses(tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(GOOD))
    (tmp_path / "report.html").write_text("theirs")
    assert main(["report", str(tmp_path)]) == 2 and "not written by mep" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "theirs"
    assert main(["report", str(tmp_path), "--force"]) == 0
    assert "theirs" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name", ["a$b", "$x_1^2$", "$\\bad$", "50 % $", "<b>&"])
def test_names_that_look_like_formulas(name, tmp_path):
    report = Report(
        **GOOD
        | dict(
            layers=[
                dict(net=f"INT8 {name}", name=name, sqnr_db=3.0),
                dict(net="INT8", name=name, sqnr_db=2.0),
            ],
            fronts={name: [[1.0, 0.5]]},
        )
    )
    report.nets[f"INT8 {name}"] = GOOD["nets"]["INT8"]
    write(report, tmp_path)
    assert html(read(tmp_path))


def test_the_share_of_macs_on_integers_has_a_row():
    label, show, _ = next(r for r in ROWS if r[0] == "MACs on integers")
    assert show(dict(integer_macs=0.2727)) == "27.3 %"


@pytest.mark.parametrize(
    "change",
    [
        dict(stages=[]),
        dict(stages=None),
        dict(temperatures=[1.0]),
        dict(thresholds=[]),
        dict(settings={}),
        dict(stages=[{}]),
        dict(stages=[dict(file="../x", sha256="", macs=1)] * 2),
    ],
    ids=str,
)
def test_a_cascade_that_is_not_whole(change, tmp_path):
    whole = dict(
        format="mep cascade 2",
        stages=[dict(file="stage0.onnx", sha256="", macs=1)] * 2,
        temperatures=[1.0, 1.0],
        thresholds=[0.5],
        settings=dict(measure="entropy"),
        meta={},
    )
    (tmp_path / "cascade.json").write_text(json.dumps(whole | change))
    with pytest.raises(ModelFileError, match="cascade"):
        Cascade(tmp_path)
    (tmp_path / "cascade.json").write_text(
        json.dumps({k: v for k, v in whole.items() if k not in change})
    )
    with pytest.raises(ModelFileError, match="cascade"):
        Cascade(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"input_shape": [3, 8, 8]}',
        '{"input_shape": [3, 8, 8], "places": {}, "originals": {}, "hash": ""}',
        '{"input_shape": [3, 8, 8], "places": {"stem": {}, "head": {}}, "originals": {}, "hash": ""}',
    ],
)
def test_a_space_that_is_not_whole(text, tmp_path):
    (tmp_path / "space.json").write_text(text)
    with pytest.raises(ValueError, match="space.json"):
        SearchSpace.load(tmp_path / "space.json")


def test_threads_beyond_any_machine(capsys):
    with pytest.raises(ValueError, match="threads"):
        Deployment(threads=1_000_000)
    with pytest.raises(ValueError, match="threads"):
        check_config(Config(threads=257))
    with pytest.raises(SystemExit):
        main(["latency", "x.onnx", "--threads", "1000000"])
    assert "give a whole number from 1 to 256" in capsys.readouterr().err


def test_a_lock_is_not_somebodys_file(tmp_path):
    with core.Store(tmp_path / "store").lock(), pytest.raises(LockedError):
        run(replace(TINY, out=str(tmp_path)), progress=False)


def test_a_store_in_a_folder_that_nobody_claimed_is_not_discarded(tmp_path):
    save(tmp_path / "maps" / "mine.safetensors", dict(x=torch.zeros(1)))
    assert not discard(tmp_path / "maps") and (tmp_path / "maps" / "mine.safetensors").exists()


def test_maps_that_a_killed_run_left_are_collected(small, tmp_path):
    data, space, teacher = small
    library = BlockLibrary(tmp_path, space, teacher).train(data, progress=False)
    claim(tmp_path / "maps")
    claim(tmp_path / "maps" / "learn", "edge0.npy")
    (tmp_path / "maps" / "learn" / "edge0.npy").write_bytes(b"half")
    library.train(data, progress=False)
    assert not (tmp_path / "maps").exists()


def test_killed_while_discarding_the_rest_is_still_ours(tmp_path, monkeypatch):
    folder = claim(tmp_path / "f", "a.npy")
    claim(folder / "deep", "b.npy")
    for path in (folder / "a.npy", folder / "deep" / "b.npy"):
        path.write_bytes(b"ours")
    unlink, calls, stop = Path.unlink, [], dict(at=0)

    def dies(path, *args, **kw):
        calls.append(path)
        if len(calls) == stop["at"]:
            raise KeyboardInterrupt
        return unlink(path, *args, **kw)

    for n in (1, 2, 3):  # each time it gets a little further
        stop["at"] = n
        monkeypatch.setattr(Path, "unlink", dies)
        with pytest.raises(KeyboardInterrupt):
            discard(folder)
        monkeypatch.undo()
        calls.clear()
        claim(folder)  # no complaint
    assert discard(folder) and not folder.exists()
