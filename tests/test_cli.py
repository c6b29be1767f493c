"""The shell command, as users call it: a process of its own, its exit status, what it says."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import torch

from mep.pipeline.cli import COMMANDS, EXAMPLES, main, parser
from mep.pipeline.core import Config
from mep.store import Store

TINY = "--data digits --epochs 1 --n-train 256 --n-test 100 --n-calib 32 --n-latency 5".split()


def start(*words, cwd=None):
    code = "import sys; from mep.pipeline.cli import main; sys.exit(main())"
    env = os.environ | dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=env)


def mep(*words, cwd=None):
    p = start(*words, cwd=cwd)
    out, err = p.communicate(timeout=300)
    return p.returncode, out, err


def test_help_is_there_without_pytorch(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(c in out for c in COMMANDS) and "examples:" in out
    code = "import sys; from mep.pipeline.cli import main; main([]); assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_every_field_of_config_is_an_option(capsys):
    with pytest.raises(SystemExit) as e: main(["run", "--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0
    assert all("--" + f.name.replace("_", "-") in out for f in fields(Config))


def test_examples_parse():
    for line in [line.split("    ")[0].split() for line in EXAMPLES.splitlines() if line.startswith("  mep ")]:
        a = parser(line[1]).parse_args(line[1:])
        assert callable(a.fn)


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
    ("profile torchvision:resnet81", "did you mean"),
    ("profile torchvision:resnet18 --weights missing.pth", "missing.pth"),
    ("latency missing.onnx", "missing.onnx"),
    ("report {tmp}/nothing", "no finished run here"),
]


@pytest.mark.parametrize("line, says", BAD)
def test_an_error_is_one_line(line, says, tmp_path, capsys):
    words = line.format(tmp=tmp_path).split()
    if words[0] == "run":
        words += ["--out", str(tmp_path / "run"), "--quiet"]
        if "--data" not in words: words += ["--data", "digits"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"mep {words[0]}: ") and err.count("\n") == 1 and says in err


@pytest.mark.parametrize("line", ["run --w-bits four", "run --mean a,b", "run --unknown 1", "walk", "latency"])
def test_argparse_names_bad_words(line, capsys):
    with pytest.raises(SystemExit) as e: main(line.split())
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
    assert all(n in out for n in ("shapes", "digits", "fashion_mnist", "cifar10", "imagenette", "folder:PATH"))
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
    (tmp_path / "nets.py").write_text("from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(12, 5))\ndef bad(): return 3\n")
    assert main(["profile", f"{tmp_path}/nets.py:make", "--input", "3,2,2"]) == 0
    assert "60" in capsys.readouterr().out
    for name, says in (("nothing", "has no function 'nothing'"), ("bad", "not a torch.nn.Module")):
        assert main(["profile", f"{tmp_path}/nets.py:{name}", "--input", "3,2,2"]) == 2
        assert says in capsys.readouterr().err
    torch.save({"1.weight": torch.ones(5, 12), "1.bias": torch.full((5,), torch.nan)}, tmp_path / "nan.pth")
    assert main(["profile", f"{tmp_path}/nets.py:make", "--weights", str(tmp_path / "nan.pth"), "--input", "3,2,2"]) == 2
    assert "1.bias holds NaN" in capsys.readouterr().err


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
    assert results["command"] == " ".join(["mep run", *TINY[:2], *TINY[4:8], "--epochs 1", *TINY[8:], "--out here"])


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    with Store(tmp_path / "store").lock():
        status, _, err = mep("run", *TINY, "--quiet", "--out", tmp_path)
    assert status == 2 and str(os.getpid()) in err and err.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_says_how_to_go_on(tmp_path):
    p = start("run", *TINY, "--epochs", "500", "--quiet", "--out", tmp_path)
    while not list(tmp_path.glob("training/*.safetensors")): # the first epoch is done
        assert p.poll() is None, p.stderr.read()
        time.sleep(0.05)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130
    assert "Interrupted" in err and "mep run --data digits" in err and "Traceback" not in err
