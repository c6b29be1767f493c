"""The shell command, as users call it: a process of its own, its exit status, what it says."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import fields
from functools import cache
from io import StringIO

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from mep.data import load
from mep.deploy import export_onnx, optimized_ops, run
from mep.nas.search import Front
from mep.onnx_in import rename
from mep.pipeline.cli import COMMANDS, EXAMPLES, main, parser
from mep.pipeline.core import Config
from mep.store import Store
from mep.train import accuracy, fit, small_resnet

TINY = "--data digits --epochs 1 --n-train 256 --n-test 100 --n-calib 32 --n-latency 5".split()


def hear_ctrl_c():
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # a shell's background jobs are deaf to it, and so would be what they start


def start(*words, cwd=None):
    code = "import sys; from mep.pipeline.cli import main; sys.exit(main())"
    env = os.environ | dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=env,
        preexec_fn=hear_ctrl_c if os.name == "posix" else None,
    )


def mep(*words, cwd=None):
    p = start(*words, cwd=cwd)
    out, err = p.communicate(timeout=300)
    return p.returncode, out, err


def test_help_is_there_without_pytorch(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(c in out for c in COMMANDS) and "examples:" in out
    code = (
        "import sys; from mep.pipeline.cli import main; main([]); assert 'torch' not in "
        "sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_every_field_of_config_is_an_option(capsys):
    with pytest.raises(SystemExit) as e:
        main(["run", "--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0
    assert all("--" + f.name.replace("_", "-") in out for f in fields(Config))


def test_examples_parse():
    for line in [
        line.split("    ")[0].split() for line in EXAMPLES.splitlines() if line.startswith("  mep ")
    ]:
        a, rest = parser(line[1]).parse_known_args(line[1:])
        assert not rest or "--stage" in line  # options that the user's stage brings
        assert callable(a.fn)


@cache
def trained():
    "A small network, briefly trained."
    return fit(
        small_resnet(10, in_channels=1),
        load("digits", n_train=512, n_test=100),
        epochs=1,
        progress=False,
    ).model


def digits_net(folder):
    torch.save(trained().state_dict(), folder / "digits.pth")
    return trained()


BAD = [
    ("run --data shaeps", "shaeps"),
    ("run --data folder:/nowhere/at/all", "/nowhere/at/all"),
    ("run --data fashion_mnist --root {tmp}/empty", "fashion_mnist"),
    ("run --w-bits 1", "w_bits=1"),
    ("run --w-bits 33", "w_bits=33"),
    ("run --n-calib 0", "n_calib=0"),
    ("run --epochs 0", "no weights"),
    ("run --until distil", "unknown stage 'distil'"),
    ("run --redo distil", "unknown stage 'distil'"),
    ("run --model resnet", "unknown network 'resnet'"),
    ("run --model torchvision:resnet81", "did you mean"),
    ("run --model nets.py:make", "no file nets.py"),
    ("run --weights missing.pth", "missing.pth"),
    ("run --config missing.json", "missing.json"),
    ("run --method round", "unknown method 'round': choose nearest, dfq, adaround"),
    ("run --n-calib 0 --method adaround", "only method=dfq does without"),
    (
        "quantize -o {tmp}/q.onnx --model torchvision:resnet18 --input 3,64,64",
        "would have random weights",
    ),
    ("quantize -o {tmp}/q.onnx --weights {tmp}/digits.pth", "which images does the network take?"),
    ("quantize -o {tmp}/q.onnx --weights {tmp}/missing.pth --data digits", "missing.pth"),
    ("quantize -o {tmp}/q.onnx --weights {tmp}/digits.pth --data digits --bits 33", "w_bits=33"),
    (
        "quantize -o {tmp}/q.onnx --weights {tmp}/digits.pth --data digits --method round",
        "unknown method 'round'",
    ),
    (
        "quantize -o {tmp}/q.onnx --weights {tmp}/digits.pth --data digits --method nearest,dfq",
        "one file has one method",
    ),
    (
        "quantize -o {tmp}/q.onnx --weights {tmp}/digits.pth --input 1,8,8 --method adaround",
        "adaround needs images",
    ),
    ("quantize -o {tmp}/q.onnx --weights {tmp}/digits.pth --input 3,8,8", "don't fit the network"),
    (
        "quantize -o {tmp}/q.onnx --weights {tmp}/digits.pth --model small_mobilenet --data digits",
        "don't fit the network",
    ),
    (
        "quantize -o {tmp}/q.onnx --weights {tmp}/digits.pth --data folder:/nowhere/at/all",
        "/nowhere/at/all",
    ),
    (
        "quantize -o {tmp} --weights {tmp}/digits.pth --data digits",
        "is a folder: give the file a name",
    ),
    ("run --compress 50", "compress=50.0: give the share of the MACs to keep"),
    ("compress -o {tmp}/c.onnx --weights {tmp}/digits.pth --data digits --macs 1.5", "macs=1.5"),
    ("compress -o {tmp}/c.onnx --weights {tmp}/digits.pth", "which images does the network take?"),
    (
        "quantize -o {tmp}/q.onnx --weights {tmp}/cut.safetensors --data digits",
        "cut.safetensors can't be read as weights",
    ),
    ("profile torchvision:resnet81", "did you mean"),
    ("profile torchvision:resnet18 --weights missing.pth", "missing.pth"),
    ("latency missing.onnx", "missing.onnx"),
    ("report {tmp}/nothing", "no finished run here"),
]


@pytest.mark.parametrize("line, says", BAD)
def test_an_error_is_one_line(line, says, tmp_path, capsys):
    words = line.format(tmp=tmp_path).split()
    if "digits.pth" in line:
        digits_net(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 50)
    if words[0] == "run":
        words += ["--out", str(tmp_path / "run"), "--quiet"]
        if "--data" not in words:
            words += ["--data", "digits"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"mep {words[0]}: ") and err.count("\n") == 1 and says in err


@pytest.mark.parametrize(
    "line",
    [
        "run --w-bits four",
        "run --mean a,b",
        "run --unknown 1",
        "walk",
        "latency",
        "quantize --data digits",
    ],
)
def test_argparse_names_bad_words(line, capsys):
    with pytest.raises(SystemExit) as e:
        main(line.split())
    assert e.value.code == 2 and "usage: mep" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path):
    status, _, err = mep("run", "--debug", "--data", "shaeps", "--out", tmp_path)
    assert status == 1 and "Traceback" in err and "shaeps" in err


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_folder_that_cannot_be_written(tmp_path, out, capsys):
    (tmp_path / "file").write_text("")
    assert main(["run", "--quiet", "--out", str(tmp_path / out)]) == 2
    assert "can't write to the folder" in capsys.readouterr().err


def test_a_config_with_an_unknown_key(tmp_path, capsys):
    (tmp_path / "c.json").write_text('{"epoch": 3}')
    assert main(["run", "--config", str(tmp_path / "c.json")]) == 2
    assert "did you mean 'epochs'" in capsys.readouterr().err
    (tmp_path / "c.json").write_text("{")
    assert main(["run", "--config", str(tmp_path / "c.json")]) == 2
    assert "isn't JSON" in capsys.readouterr().err


def test_data_and_version(capsys):
    assert main(["data"]) == 0
    out = capsys.readouterr().out
    assert all(
        n in out
        for n in ("shapes", "digits", "fashion_mnist", "cifar10", "imagenette", "folder:PATH")
    )
    assert main(["version"]) == 0
    assert "onnxruntime" in capsys.readouterr().out


def test_profile_and_latency(tmp_path, capsys):
    assert main("profile small_resnet --input 3,32,32 --json".split()) == 0
    p = json.loads(capsys.readouterr().out)
    assert p["macs"] > 0 and p["layers"]
    assert main("profile torchvision:squeezenet1_1 --input 3,64,64".split()) == 0
    assert "squeezenet" in capsys.readouterr().out.lower()
    assert main("latency small_resnet small_mobilenet --input 3,32,32 --n 3 --json".split()) == 0
    t = json.loads(capsys.readouterr().out)
    assert list(t) == ["small_resnet", "small_mobilenet"] and t["small_resnet"]["median_ms"] > 0


def test_a_network_of_the_users(tmp_path, capsys):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(12, 5))\ndef bad(): return 3\n"
    )
    assert main(["profile", f"{tmp_path}/nets.py:make", "--input", "3,2,2"]) == 0
    assert "60" in capsys.readouterr().out
    for name, says in (("nothing", "has no function 'nothing'"), ("bad", "not a torch.nn.Module")):
        assert main(["profile", f"{tmp_path}/nets.py:{name}", "--input", "3,2,2"]) == 2
        assert says in capsys.readouterr().err
    torch.save(
        {"1.weight": torch.ones(5, 12), "1.bias": torch.full((5,), torch.nan)}, tmp_path / "nan.pth"
    )
    assert (
        main(
            [
                "profile",
                f"{tmp_path}/nets.py:make",
                "--weights",
                str(tmp_path / "nan.pth"),
                "--input",
                "3,2,2",
            ]
        )
        == 2
    )
    assert "1.bias holds NaN" in capsys.readouterr().err


def test_quantize_makes_one_file(tmp_path, capsys):
    net = digits_net(tmp_path)
    words = (
        f"quantize --weights {tmp_path}/digits.pth --data digits --n-test 100 --n-latency 3 "
        f"-o {tmp_path}/q.onnx --quiet"
    ).split()
    assert main(words) == 0
    out = capsys.readouterr().out
    assert (
        "FP32" in out
        and "INT8" in out
        and "accuracy" in out
        and "every bit agrees" in out
        and "latency" in out
    )
    assert main([*words, "--bits", "4", "--json"]) == 0
    nets = json.loads(capsys.readouterr().out)["nets"]
    assert list(nets) == ["FP32", "W4A8 adaround"] and nets["W4A8 adaround"][
        "bytes"
    ] == os.path.getsize(tmp_path / "q.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits.pth", "q.onnx"]
    x = torch.randn(3, 1, 8, 8)
    assert torch.as_tensor(run(tmp_path / "q.onnx", x)).shape == net(x).shape


def test_quantize_a_file_of_others(tmp_path, capsys):
    torch.manual_seed(0)
    net = small_resnet(10, in_channels=1).eval()
    theirs = tmp_path / "theirs.onnx"
    export_onnx(net, theirs, (1, 8, 8))
    rename(theirs, ("picture",), ("digit",))
    ours = tmp_path / "ours.onnx"
    words = ["quantize", theirs, "--quiet", "--data", "digits", "--n-latency", "3", "-o", ours]
    assert (
        main([*map(str, words), "--n-train", "64", "--n-test", "50", "--opset", "13", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)["nets"]
    assert found["INT8"]["parity_db"] is None or found["INT8"]["parity_db"] > 60
    assert found["FP32"]["bytes"] == theirs.stat().st_size  # measured beside the file itself
    file = onnx.load(ours)
    assert [i.name for i in file.graph.input] == ["picture"]
    assert [o.name for o in file.graph.output] == ["digit"]
    assert file.opset_import[0].version == 13
    assert main(["quantize", str(theirs), "--data", "digits", "-o", str(theirs)]) == 2
    assert "is also the file of --model" in capsys.readouterr().err
    assert main(["quantize", str(theirs), "--model", "small_resnet", "-o", str(ours)]) == 2
    assert "two networks" in capsys.readouterr().err
    assert main(["profile", str(theirs)]) == 0
    assert "1x1x8x8" in capsys.readouterr().out
    assert main(["latency", str(theirs), str(ours), "--n", "3"]) == 0


def test_a_run_that_begins_with_a_file(tmp_path):
    torch.manual_seed(0)
    net = small_resnet(10, in_channels=1).eval()
    export_onnx(net, tmp_path / "net.onnx", (1, 8, 8))
    words = [w for w in TINY if w not in ("--epochs", "1")]
    out = tmp_path / "run"
    assert (
        main(["run", *words, "--model", str(tmp_path / "net.onnx"), "--out", str(out), "--quiet"])
        == 0
    )
    found = json.loads((out / "results.json").read_text())["nets"]["FP32"]["accuracy"]
    test = load("digits", n_train=256, n_test=100).test
    assert found == pytest.approx(accuracy(net, test))  # nothing was trained


def test_quantize_without_any_data(tmp_path, capsys):
    digits_net(tmp_path)
    assert (
        main(
            (
                f"quantize --weights {tmp_path}/digits.pth --input 1,8,8 --n-latency 3 -o "
                f"{tmp_path}/new/q.onnx --quiet --json"
            ).split()
        )
        == 0
    )
    nets = json.loads(capsys.readouterr().out)["nets"]
    assert (
        list(nets) == ["FP32", "INT8 dfq"]
        and "accuracy" not in nets["INT8 dfq"]
        and nets["INT8 dfq"]["float_layers"] == 0
    )
    assert optimized_ops(tmp_path / "new" / "q.onnx")["QLinearConv"] > 0


def test_quantize_with_pictures_that_nobody_labelled(tmp_path, capsys):
    (tmp_path / "pictures" / "all").mkdir(parents=True)
    for i in range(20):
        Image.fromarray(
            np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        ).save(tmp_path / "pictures" / "all" / f"{i}.png")
    (tmp_path / "nets.py").write_text(
        "from mep.train import small_resnet\ndef make(): return small_resnet(10)\n"
    )
    words = (
        f"quantize --model {tmp_path}/nets.py:make --data folder:{tmp_path}/pictures --size "
        f"16 --n-latency 3 -o {tmp_path}/q.onnx --quiet"
    ).split()
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "agrees with FP32" in out and "accuracy" not in out


def test_compress_then_quantize(tmp_path, capsys):
    digits_net(tmp_path)
    words = "--data digits --n-train 256 --n-test 100 --n-latency 3 --quiet --json".split()
    assert (
        main(
            [
                "compress",
                "--weights",
                f"{tmp_path}/digits.pth",
                "--macs",
                "0.6",
                "-o",
                f"{tmp_path}/half.onnx",
                "--weights-out",
                f"{tmp_path}/half.safetensors",
                *words,
            ]
        )
        == 0
    )
    nets = json.loads(capsys.readouterr().out)["nets"]
    assert nets["compressed"]["macs"] <= 0.6 * nets["FP32"]["macs"] and nets["compressed"][
        "bytes"
    ] == os.path.getsize(tmp_path / "half.onnx")
    assert (
        main(
            [
                "quantize",
                "--weights",
                f"{tmp_path}/half.safetensors",
                "-o",
                f"{tmp_path}/q.onnx",
                *words,
            ]
        )
        == 0
    )
    quantized = json.loads(capsys.readouterr().out)["nets"]
    assert quantized["INT8"]["macs"] == nets["compressed"]["macs"] and quantized["FP32"][
        "accuracy"
    ] == pytest.approx(nets["compressed"]["accuracy"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "digits.pth",
        "half.onnx",
        "half.safetensors",
        "q.onnx",
    ]


SEARCH = (
    "search --model small_resnet --data digits --n-train 256 --n-test 100 --n-latency 3 "
    "--networks 5 --tune 1 --quiet"
).split()


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    "One search for two scenarios: its folder, its words and what it said."
    folder = tmp_path_factory.mktemp("search")
    digits_net(folder)
    (folder / "s.json").write_text('{"Phone": {}, "server": {"threads": 2, "precision": "int8"}}')
    words = (
        f"--weights {folder}/digits.pth --finetune 2 --scenarios {folder}/s.json --library "
        f"{folder}/blocks --out {folder}/out"
    ).split()
    with redirect_stdout(StringIO()) as out:
        assert main([*SEARCH, *words]) == 0
    return folder, [*SEARCH, *words], out.getvalue()


def test_search_makes_fronts_and_files(searched):
    folder, words, out = searched
    assert (
        "phone 1" in out
        and "phone 2" in out
        and "accuracy, as predicted" in out
        and "server (2 threads, INT8)" in out
        and "report.html" in out
    )
    files = {p.name for p in (folder / "out").iterdir()}
    assert {
        "phone.json",
        "server.json",
        "phone-1.onnx",
        "phone-2.onnx",
        "fp32.onnx",
        "report.html",
        "results.json",
    } <= files
    found = Front.load(folder / "out" / "phone.json")
    assert main(words) == 0  # goes on: nothing is left to do
    assert Front.load(folder / "out" / "phone.json").points == found.points
    x = torch.randn(3, 1, 8, 8)
    assert run(folder / "out" / "phone-1.onnx", x).shape == (3, 10)


def test_search_refuses_anothers_library(searched, tmp_path, capsys):
    torch.save(small_resnet(10, 1, seed=1).state_dict(), tmp_path / "other.pth")
    assert (
        main(
            [
                *SEARCH,
                *f"--weights {tmp_path}/other.pth --library {searched[0]}/blocks --out {tmp_path}/b".split(),
            ]
        )
        == 2
    )
    assert "the library blocks was made for" in capsys.readouterr().err


@pytest.mark.parametrize(
    "scenarios, says",
    [
        ("{", "no JSON file"),
        ('{"a": {"thread": 4}}', "did you mean 'threads'"),
        ('{"a": {"threads": 0}}', "threads=0"),
    ],
)
def test_search_names_what_is_wrong_with_scenarios(tmp_path, scenarios, says, capsys):
    (tmp_path / "s.json").write_text(scenarios)
    assert (
        main(
            [
                "search",
                "--data",
                "digits",
                "--scenarios",
                str(tmp_path / "s.json"),
                "--out",
                str(tmp_path / "out"),
                "--quiet",
            ]
        )
        == 2
    )
    assert says in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_quantize_goes_on_after_ctrl_c(tmp_path):
    digits_net(tmp_path)
    words = (
        f"quantize --weights {tmp_path}/digits.pth --data digits --bits 4 --n-calib 64 "
        f"--n-latency 3 -o {tmp_path}/q.onnx --quiet --json"
    ).split()
    code = """
import os, signal, sys
from mep.store import Store
put, n = Store.put, 0
def stop(store, *args):
    global n
    put(store, *args); n += 1
    if n == 3: os.kill(os.getpid(), signal.SIGINT)
Store.put = stop
from mep.pipeline.cli import main
sys.exit(main(sys.argv[1:]))"""
    died = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=hear_ctrl_c,
    )
    assert (
        died.returncode == 130
        and "go on with: mep quantize" in died.stderr
        and not (tmp_path / "q.onnx").exists()
    )
    assert len(list((tmp_path / "q.onnx.unfinished").rglob("*.safetensors"))) == 3
    status, out, err = mep(*words)
    assert status == 0, err
    resumed = (tmp_path / "q.onnx").read_bytes()
    assert not (tmp_path / "q.onnx.unfinished").exists()
    assert mep(*words)[0] == 0 and (tmp_path / "q.onnx").read_bytes() == resumed


def test_a_run_then_its_report(tmp_path):
    status, out, err = mep("run", *TINY, "--out", "here", cwd=tmp_path)
    assert status == 0, err
    assert "FP32" in out and "INT8" in out and "here/report.html" in out
    assert "measure" in err  # the bar
    (tmp_path / "here" / "report.html").unlink()
    again = mep("report", "here", cwd=tmp_path)
    assert again[0] == 0 and again[1].split("Report:")[0].strip() == out.split("Report:")[0].strip()
    assert (tmp_path / "here" / "report.html").is_file()
    results = json.loads((tmp_path / "here" / "results.json").read_text())
    assert results["command"] == " ".join(
        ["mep run", *TINY[:2], *TINY[4:8], "--epochs 1", *TINY[8:], "--out here"]
    )


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    with Store(tmp_path / "store").lock():
        status, _, err = mep("run", *TINY, "--quiet", "--out", tmp_path)
    assert status == 2 and str(os.getpid()) in err and err.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_says_how_to_go_on(tmp_path):
    p = start("run", *TINY, "--epochs", "500", "--quiet", "--out", tmp_path)
    while not list(tmp_path.glob("training/*.safetensors")):  # the first epoch is done
        assert p.poll() is None, p.stderr.read()
        time.sleep(0.05)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130
    assert "Interrupted" in err and "mep run --data digits" in err and "Traceback" not in err
