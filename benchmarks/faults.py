"""What survives: processes killed at random moments, files flipped, cut and emptied, options
of every kind; writes results/faults.json.

    python benchmarks/faults.py

Jobs are forked from one process, so that none waits for PyTorch to load: a process that has
trained nothing yet, since autograd's threads do not survive a fork. Needs a system with
`fork`; some ten minutes on one idle core."""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import torch

from mep import __version__
from mep.compress.select import load_compressed
from mep.conditional.early_exit import Cascade
from mep.data import from_arrays, load, shapes
from mep.deploy import machine
from mep.nas.bkd import BlockLibrary
from mep.nas.space import choices, default_space
from mep.networks import build_network
from mep.pipeline.cli import main as shell
from mep.pipeline.convert import convert, shrink
from mep.pipeline.core import Config, run
from mep.pipeline.report import read
from mep.pipeline.search import explore
from mep.quant.sim import load_quantized
from mep.store import Store, content_hash
from mep.store import load as load_artifact
from mep.train import fit, small_resnet

HERE = Path(__file__).parent
SMALL = Config(data="digits", n_train=256, n_test=60, epochs=6, n_calib=32, n_latency=2)


# ---- jobs, each resumes in its folder


def digits():
    return load("digits", n_train=256, n_test=60)


def network(name="small_resnet"):
    return build_network(name, 10, (1, 8, 8)).eval()


def job_run(folder):
    run(replace(SMALL, out=str(folder)), progress=False)


def job_adaround(folder):
    convert(
        network(),
        folder / "w4.onnx",
        digits(),
        method="adaround",
        w_bits=4,
        n_calib=32,
        n_latency=2,
        progress=False,
    )


def job_compress(folder):
    shrink(
        network(),
        folder / "half.onnx",
        digits(),
        macs=0.75,
        finetune=1,
        weights=folder / "half.safetensors",
        n_images=64,
        n_latency=2,
        progress=False,
    )


def pictures():
    x, y, *_ = shapes(400, size=16)
    return from_arrays(x[:300], y[:300], x[300:], y[300:], n_valid=60)


def job_library(folder):
    space = default_space(16, (3, 16, 16), 8, options=choices("basic", width=(1.0, 0.5, 0.25)))
    BlockLibrary(folder / "library", space, space.build(space.reference)).train(
        pictures(), progress=False
    )


def job_search(folder):
    net = small_resnet(16, width=8).eval()
    explore(
        pictures(), str(folder), net, networks=6, tune=1, n_blocks=100, n_latency=2, progress=False
    )


JOBS = dict(
    run=job_run,
    adaround=job_adaround,
    compress=job_compress,
    search=job_search,
    library=job_library,
)


# ---- what a job leaves


def outcome(folder):
    """A hash of all files that hold no measured times: ONNX files byte by byte, trained blocks
    number by number, accuracies."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".onnx":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        if "library/" in name and path.suffix == ".safetensors":
            found[name] = _without_times(load_artifact(path))
    return content_hash(found)


def _without_times(artifact):
    return [artifact.tensors, {k: v for k, v in artifact.meta.items() if k != "seconds"}]


def names(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


# ---- kills


def attempt(job, folder, limit=None):
    """Run a job in a process of its own, killed after `limit` seconds. Returns whether it was
    killed, and how long it ran."""
    start = time.perf_counter()
    pid = os.fork()
    if not pid:
        _child(job, folder)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        seconds = time.perf_counter() - start
        if done:
            break
        if limit is not None and seconds > limit:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            break
        time.sleep(0.002)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError((folder / "error.txt").read_text())
    died = os.WIFSIGNALED(status)
    if died and os.WTERMSIG(status) != signal.SIGKILL:
        raise RuntimeError(f"the job ended by signal {os.WTERMSIG(status)}, which nobody sent")
    return died, seconds


def _child(job, folder):
    status = 1
    try:
        torch.set_num_threads(1)  # not before the fork: the pool that it makes would be shared
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()):
            job(folder)
        status = 0
    except BaseException:
        (folder / "error.txt").write_text(traceback.format_exc())
    finally:
        os._exit(status)


def killed(name, kills, seed=0):
    "A job killed at random moments until it has died often enough, again and again from an empty folder."
    rng, job = random.Random(f"{seed} {name}"), JOBS[name]
    with tempfile.TemporaryDirectory() as d:
        whole = min(
            attempt(job, _new(d, name))[1] for name in ("cold", "whole")
        )  # the first one loads libraries
        wanted, usual = outcome(Path(d, "whole")), names(Path(d, "whole"))
        deaths, rounds, same, spent, left = 0, 0, 0, 0.0, set()
        while deaths < kills:
            folder, died, before = _new(d, f"round{rounds}"), True, deaths
            while died:
                died, seconds = attempt(
                    job, folder, rng.uniform(0.05, 1) * whole if deaths < kills else None
                )
                deaths, spent = deaths + died, spent + seconds
            if deaths == before:
                whole = min(whole, seconds)
            rounds += 1
            same += outcome(folder) == wanted
            left |= {
                n for n in names(folder) if n.split("-")[0] not in {u.split("-")[0] for u in usual}
            }
    return dict(
        job=name,
        kills=deaths,
        rounds=rounds,
        same=same,
        lost=rounds - same,
        seconds_whole=whole,
        seconds_lost_per_kill=(spent - rounds * whole) / deaths,
        left_over=sorted(left),
    )


def _new(parent, name):
    folder = Path(parent, name)
    folder.mkdir()
    return folder


# ---- damages


def spoilt(raw, how, rng):
    "The bytes of a file, flipped at one bit, cut or emptied"
    if how == "emptied":
        return b""
    at = rng.randrange(len(raw))
    return (
        raw[:at]
        if how == "cut"
        else raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]
    )


def specimens(folder):
    "Kind -> (file, how it is read): everything that mep writes and reads again"
    net, data = network(), digits()
    config = replace(SMALL, out=str(folder / "run"), exits="blocks.0", exit_epochs=1)
    run(config, progress=False)
    shrink(
        net,
        folder / "half.onnx",
        data,
        macs=0.75,
        weights=folder / "half.safetensors",
        n_images=64,
        n_latency=2,
        progress=False,
    )
    job_library(folder)
    fit(net, data, 1, checkpoint=folder / "fit.safetensors", progress=False)
    store, library = Store(folder / "run/store"), _library(folder)
    first = next(k for k in store.keys() if k.startswith("reference"))
    block = next(k for k in library.store.keys() if k != "library")
    again = lambda: run(config, progress=False).nets
    return {
        "result in a store": (store.path(first), lambda: store.get(first)),
        "block of a library": (library.store.path(block), lambda: library.store.get(block)),
        "quantized network": (
            next((folder / "run/quantized").glob("*.safetensors")),
            lambda: load_quantized(
                next((folder / "run/quantized").glob("*.safetensors")), network()
            ),
        ),
        "compressed network": (
            folder / "half.safetensors",
            lambda: load_compressed(folder / "half.safetensors", network()),
        ),
        "checkpoint of a training": (
            folder / "fit.safetensors",
            lambda: (
                fit(net, data, 1, checkpoint=folder / "fit.safetensors", progress=False).history
            ),
        ),
        "results.json": (folder / "run/results.json", lambda: read(folder / "run")),
        "stage of a cascade": (
            folder / "run/early-exit/stage0.onnx",
            lambda: Cascade(folder / "run/early-exit"),
        ),
        "ONNX file of a run": (folder / "run/int8.onnx", again),
        "cascade.json of a run": (folder / "run/early-exit/cascade.json", again),
        "result of a run": (next((folder / "run/store").glob("export-*")), again),
    }


def _library(folder):
    space = default_space(16, (3, 16, 16), 8, options=choices("basic", width=(1.0, 0.5, 0.25)))
    return BlockLibrary(folder / "library", space, space.build(space.reference))


def _answer(path, raw, use, good):
    "What a reader makes of a spoilt file"
    try:
        got = use()
    except Exception as e:
        return (
            "named"
            if path.name in str(e) or path.stem in str(e)
            else f"{type(e).__name__} without the file's name"
        )
    return "computed again" if path.read_bytes() == raw or _same(got, good) else "used"


def _same(a, b):
    "Whether two runs say the same, times apart"
    if not isinstance(a, dict):
        return False
    plain = lambda rows: {
        n: {k: v for k, v in r.items() if "ms" not in k and "speedup" not in k}
        for n, r in rows.items()
    }
    return plain(a) == plain(b)


def damaged(n, seed=0):
    "Kind -> what became of its files; slow readers get a tenth of the damages"
    rng, table = random.Random(seed), {}
    with tempfile.TemporaryDirectory() as d, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = specimens(Path(d))
        slow = [k for k in kinds if " of a run" in k]
        order = [
            k
            for k in kinds
            for _ in range(
                max(
                    1,
                    n // 40
                    if k in slow
                    else (n - len(slow) * (n // 40)) // (len(kinds) - len(slow)),
                )
            )
        ]
        for i, kind in enumerate(order):
            path, use = kinds[kind]
            raw, how = path.read_bytes(), ("flipped", "cut", "emptied")[i % 3]
            good = use() if kind in slow and kind not in table else None
            good = table.setdefault(kind, dict(good=good, answers=Counter()))["good"]
            path.write_bytes(spoilt(raw, how, rng))
            table[kind]["answers"][f"{how}: {_answer(path, raw, use, good)}"] += 1
            path.write_bytes(raw)
    return {kind: dict(row["answers"]) for kind, row in table.items()}


# ---- options


VALUES = {
    int: "0 -1 1 2 7 300 1000000 1e3 2.5 nan x".split() + [""],
    float: "0 -1 1e-9 0.5 1 2 nan inf x".split() + [""],
    tuple: "0 1,1 0,0,0 nan 1,,2 0.5,0.5,0.5 inf,1,1 x".split() + [""],
    str: ["", " ", "x", "../x", "a,b", "a,a", "x.py:f", "folder:", "\u00e4", "$", "-"],
    bool: [],
}


def answer(words):
    "How the shell answers a command: ok, one line, the usage, or a mistake of ours"
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            status = shell(words)
        except SystemExit as e:
            return "usage" if e.code == 2 else f"exit {e.code}"
        except BaseException as e:
            return f"traceback of {type(e).__name__}"
    text = err.getvalue()
    if status == 0:
        return "ok"
    return (
        "one line"
        if status == 2 and text.count("\n") == 1 and "unexpected" not in text
        else f"unexpected: {text[:160]}"
    )


def fuzzed(most=None, seed=0):
    "Every option of `mep run` with strange values, up to the data"
    pairs = [(f, v) for f in fields(Config) for v in VALUES[f.type]]
    random.Random(seed).shuffle(pairs)
    table = {}
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as d:
        os.chdir(d)
        try:
            for f, v in pairs[:most]:
                words = [
                    "run",
                    "--data",
                    "digits",
                    "--n-train",
                    "60",
                    "--n-test",
                    "20",
                    "--n-calib",
                    "8",
                    "--quiet",
                    "--until",
                    "load_data",
                    "--out",
                    "o",
                    f"--{f.name.replace('_', '-')}={v}",
                ]
                table.setdefault(f.type.__name__, Counter())[answer(words)] += 1
        finally:
            os.chdir(here)
    return {kind: dict(c) for kind, c in table.items()}


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--kills",
        default="search=8,adaround=8,compress=8,library=38,run=38",
        help="how often each job is killed",
    )
    p.add_argument("--damages", type=int, default=200, help="how many files are spoilt")
    p.add_argument("--options", type=int, help="at most so many values (default: all)")
    p.add_argument(
        "--out", type=Path, default=HERE / "results" / "faults.json", help="the file it writes"
    )
    a = p.parse_args()
    kills = {name: int(n) for name, n in (word.split("=") for word in a.kills.split(","))}
    result = dict(
        what="jobs killed at random moments, files spoilt, options fuzzed",
        seed=0,
        mep=__version__,
        load_before=os.getloadavg(),
        kills=[],
    )
    result["machine"] = machine()
    for name, n in kills.items():  # before anything trains in this process
        result["kills"].append(killed(name, n))
        _keep(result, a.out)
    torch.set_num_threads(1)
    result["fuzz"] = fuzzed(a.options)
    _keep(result, a.out)
    result["damages"] = damaged(a.damages) if a.damages else {}
    _keep(result, a.out)


def _keep(result, path):
    "Write what is known so far"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result)[-600:], flush=True)


if __name__ == "__main__":
    main()
