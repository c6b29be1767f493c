"""How much memory `quantize` takes beside the network and the images: the growth of the process
at its peak, each measured in a process of its own, one thread.

    python benchmarks/calibration_memory.py                 # about 40 minutes of one core
    python benchmarks/calibration_memory.py --only resnet18 # a few minutes

Networks of torchvision with random weights, their batch norms calibrated; pictures of noise at
224 px, in a tensor that is there before.
`--column before` files the numbers of an older mep (put it on PYTHONPATH) beside today's. What
stands in results/calibration_memory.json already is kept: `--anew` measures it again."""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torchvision  # noqa: E402
from torch import nn  # noqa: E402

from mep.deploy import machine  # noqa: E402
from mep.quant import quantize  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "calibration_memory.json"
BOUND = 2e9  # bytes, for 512 images of ResNet-50
RUNS = [  # network, images, ranges, memory
    ("resnet18", 64, "output", 1e9),
    ("resnet18", 512, "output", 1e9),
    ("resnet18", 512, "minmax", 1e9),
    ("resnet18", 512, "minmax", 2e8),
    ("resnet50", 512, "output", 1e9),
    ("resnet50", 64, "output", 1e9),
    ("resnet50", 512, "minmax", 1e9),
]
BOUNDED = RUNS[4]


def network(name):
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(weights=None)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None  # the plain mean over batches
    with torch.no_grad():
        net(torch.rand(8, 3, 224, 224))
    return net.eval()


def pictures(n):
    "In one piece; nothing else is left lying about that `quantize` could use"
    x = torch.empty(n, 3, 224, 224)
    random = torch.Generator().manual_seed(1)
    for part in x.split(32):
        part.uniform_(generator=random)
    return x


def resident():
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(name, images, ranges, memory):
    "Bytes and seconds of a single run, in this process"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    net = network(name)
    x = pictures(images)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = resident(), time.process_time()
    quantize(net, x, per_channel=True, ranges=ranges, memory=memory, progress=False)
    return dict(growth_bytes=peak() - before, cpu_seconds=time.process_time() - start)


def apart(run):
    "The same in a process of its own"
    words = [sys.executable, __file__, "--one", json.dumps(run)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{run} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def key(run):
    name, images, ranges, memory = run
    return f"{name}, {images} images, {ranges}, {memory / 1e9:g} GB"


def wanted(only, column, rows, anew):
    for run in RUNS:
        measured = column in rows.get(key(run), {})
        if run[0] in (only or [run[0]]) and (anew or not measured):
            yield run


def write(rows):
    most = rows.get(key(BOUNDED), {}).get("after")
    facts = dict(
        what="growth of a process at its peak while `quantize` runs, beside network and images",
        machine=machine(),
        torchvision=torchvision.__version__,
        seeds=[0, 1],
        bound=dict(run=key(BOUNDED), bytes=BOUND, holds=most and most["growth_bytes"] <= BOUND),
        runs=rows,
    )
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", help="a run as JSON: prints its numbers")
    parser.add_argument("--only", nargs="*", help="networks")
    parser.add_argument("--column", default="after", choices=["before", "after"])
    parser.add_argument("--anew", action="store_true", help="measure again what is there")
    a = parser.parse_args()
    if a.one:
        print(json.dumps(one(*json.loads(a.one))))
        return
    rows = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
    for run in wanted(a.only, a.column, rows, a.anew):
        rows.setdefault(key(run), {})[a.column] = found = apart(run)
        print(key(run), a.column, f"{found['growth_bytes'] / 1e9:.2f} GB", flush=True)
        write(rows)


if __name__ == "__main__":
    main()
