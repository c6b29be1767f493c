"""Compressed networks without and with fine-tuning: our selection, AIMET's greedy one on the same code, every method alone; writes results/compress.json.

    MEP_DATA=/path/to/data python benchmarks/compress.py                    # everything; about an hour on 2 quiet cores
    MEP_DATA=/path/to/data python benchmarks/compress.py --only "resnet20/ours*" "resnet20/greedy*"

Networks: a pretrained CIFAR-10 ResNet-20 (MEP_DATA/weights/resnet20_cifar10.safetensors) and the MobileNetV2 of train_zoo.py. Images for the
fits come from the training set, accuracies from the 10,000 test images. Resumes in runs/compress if interrupted.
"""
import argparse
import json
import os
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from statistics import mean, stdev

import torch
from adaround_aimet import resnet20
from train_zoo import load_zoo

from mep import data, train
from mep.compress.select import DEFAULT_METHODS, compress
from mep.deploy import machine
from mep.store import Store

HERE = Path(__file__).parent
ALONE = ("spatial_svd", "weight_svd_in", "weight_svd_out", "cp", "tucker2", "tensor_train", "channel")
CURVE = (.3, .4, .5, .6, .75, .9)
SEEDS = (0, 1, 2)
FINETUNE = dict(epochs=4, lr=.006, alpha=.9, temperature=4., warmup=.1)
TALK = dict(resnet50="50 % of the MACs at 0.3 points lost, fine-tuned, ImageNet")
AIMET = dict(what="AIMET's own spatial SVD with its greedy selection, measured on this network in another run", top1=.531, share=.476, evaluations=56, seconds=82)


def network(name):
    root = Path(os.environ["MEP_DATA"])
    return resnet20(root / "weights" / "resnet20_cifar10.safetensors") if name == "resnet20" else load_zoo("mobilenet_cifar10")


def sets(name, seed):
    "CIFAR-10; the ResNet-20 wants ImageNet's mean and deviation"
    own = dict(mean=(.485, .456, .406), std=(.229, .224, .225)) if name == "resnet20" else {}
    return data.load("cifar10", n_valid=1000, seed=seed, **own)


def jobs():
    "Name -> arguments of `compress`, and whether to fine-tune"
    for net in ("resnet20", "mobilenet"):
        for seed in SEEDS: yield f"{net}/ours/{seed}", dict(macs=.5, seed=seed), {}
        for seed in SEEDS: yield f"{net}/tuned/{seed}", dict(macs=.5, seed=seed), FINETUNE
    labels = dict(macs=.5, methods=("spatial_svd",), select="greedy")
    yield "resnet20/greedy/0", dict(labels, refit=False), {}
    yield "resnet20/greedy_refit/0", labels, {}
    for select in ("uniform", "knapsack"):
        yield f"resnet20/{select}_plain/0", dict(labels, select=select, refit=False), {}
        yield f"resnet20/{select}_refit/0", dict(labels, select=select), {}
    for net in ("resnet20", "mobilenet"):
        for share in CURVE:
            yield f"{net}/all@{share}/0", dict(macs=share), {}
            for m in ALONE if net == "resnet20" else ("spatial_svd", "weight_svd_in", "channel"): yield f"{net}/{m}@{share}/0", dict(macs=share, methods=(m,)), {}


def measure(name, options, tuning, a):
    "One compressed network: what it costs, and what is left of its accuracy"
    net, seed = network(name.split("/")[0]), options.get("seed", 0)
    d = sets(name.split("/")[0], seed)
    images = data.calibration(d, a.calib, seed)
    if options.get("select") == "greedy":
        some = [b for _, b in zip(range(8), d.train)]  # as AIMET: accuracy on about a thousand images with labels
        options = dict(options, evaluate=lambda n: train.accuracy(n, some))
    start, cpu = time.perf_counter(), time.process_time()  # what an earlier job scored counts as done: `ours` runs first, and pays for all
    try: made = compress(net, images, checkpoint=Path(a.store) / "layers" / name.split("/")[0] / str(seed), progress=False, **options)
    except ValueError as e: return dict(refused=str(e))
    record = dict(share=made.report.share, macs=made.report.macs, seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu, facts=made.report.facts, load=os.getloadavg()[0])
    record |= dict(top1=train.accuracy(made.model, d.test), plan=made.report.plan.to_dict(), rows=[list(r) for r in made.report] if name.endswith("ours/0") else None)
    if tuning:
        start = time.perf_counter()
        tuned, history = train.fit(made.model, (d.train, None), teacher=net, seed=seed, device="cpu", progress=False, checkpoint=Path(a.store) / "layers" / f"{name.replace('/', '-')}.safetensors", **tuning)
        record |= dict(tuned_top1=train.accuracy(tuned, d.test), tuning_seconds=time.perf_counter() - start, tuning=tuning)
    return record


def summary(store):
    "Mean and deviation over the seeds of each job"
    runs, out = {k: store.get(k).meta for k in store.keys() if not k.startswith("layers/")}, {}
    for key, r in runs.items(): out.setdefault(key.rsplit("/", 1)[0], []).append(dict(r, seed=int(key.rsplit("/", 1)[1])))
    def spread(rows, k): return dict(mean=mean(r[k] for r in rows), sd=stdev(r[k] for r in rows) if len(rows) > 1 else None)
    table = {k: {c: spread(rows, c) for c in ("top1", "tuned_top1", "share", "seconds", "cpu_seconds") if all(c in r for r in rows)} | dict(runs=rows) for k, rows in out.items()}
    floats = {n: runs[n] for n in ("resnet20/float/0", "mobilenet/float/0") if n in runs}
    return dict(what="CIFAR-10 top-1 on 10,000 test images; fits from 1,024 training images", talk=TALK, aimet=AIMET, float={n.split("/")[0]: r["top1"] for n, r in floats.items()},
                methods=DEFAULT_METHODS, machine=machine(), threads=torch.get_num_threads(), results=table)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="*", default=["*"], help="names of jobs, with wildcards")
    p.add_argument("--calib", type=int, default=1024)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--store", default="runs/compress")
    p.add_argument("--results", default=str(HERE / "results" / "compress.json"))
    a = p.parse_args()
    if not os.environ.get("MEP_DATA"): sys.exit("MEP_DATA must name the folder that holds cifar-10-batches-py and weights/resnet20_cifar10.safetensors")
    torch.set_num_threads(a.threads)
    store = Store(a.store)
    for net in ("resnet20", "mobilenet"):
        store.cached(f"{net}/float/0", lambda: ({}, dict(top1=train.accuracy(network(net), sets(net, 0).test))))
    for name, options, tuning in jobs():
        if name in store or not any(fnmatch(name, o) for o in a.only): continue
        record = store.cached(name, lambda: ({}, measure(name, options, tuning, a))).meta
        print(name, {k: round(v, 4) if isinstance(v, float) else v for k, v in record.items() if k in ("share", "top1", "tuned_top1", "seconds", "cpu_seconds", "facts", "refused")}, flush=True)
        Path(a.results).write_text(json.dumps(summary(store), indent=1) + "\n")
    Path(a.results).write_text(json.dumps(summary(store), indent=1) + "\n")


if __name__ == "__main__":
    main()
