"""Compressed networks without and with fine-tuning: our selection, AIMET's greedy one on the
same code, every method alone; writes results/compress.json.

    MEP_DATA=/path/to/data python benchmarks/compress.py                    # everything;
    about an hour on 2 quiet cores
    MEP_DATA=/path/to/data python benchmarks/compress.py --only "resnet20/ours*" "resnet20/greedy*"

Networks: a pretrained CIFAR-10 ResNet-20 (MEP_DATA/weights/resnet20_cifar10.safetensors)
and the MobileNetV2 of train_zoo.py. Images for the fits come from the training set,
accuracies from the 10,000 test images. Resumes in runs/compress if interrupted."""

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
ALONE = (
    "cp3",
    "cp",
    "spatial_svd",
    "weight_svd_in",
    "tucker2",
    "tensor_train",
    "weight_svd_out",
    "channel",
)
BEST = ("cp3", "cp", "spatial_svd")  # repeated with other images
CURVE = (0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
SEEDS = (0, 1, 2)
FROM_NOTHING = (
    "ours",
    "unchecked",
    "greedy",
)  # jobs that score everything themselves: the time that a user waits
VERSION = "v3"  # of the fit: results of another are not used
SHORT = dict(epochs=2, lr=0.005, alpha=1.0, temperature=4.0, warmup=0.1, ema=0.99)  # no labels
LONG = dict(epochs=10, lr=0.05, alpha=0.5, temperature=4.0, warmup=0.5, ema=0.999)
TALK = dict(resnet50="50 % of the MACs at 0.3 points lost, fine-tuned, ImageNet")
AIMET = dict(
    what="AIMET's own spatial SVD with its greedy selection, measured on this network in another run",
    top1=0.531,
    share=0.476,
    evaluations=56,
    seconds=82,
)


def network(name):
    root = Path(os.environ["MEP_DATA"])
    return (
        resnet20(root / "weights" / "resnet20_cifar10.safetensors")
        if name == "resnet20"
        else load_zoo("mobilenet_cifar10")
    )


def sets(name, seed):
    "CIFAR-10; the ResNet-20 wants ImageNet's mean and deviation"
    own = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)) if name == "resnet20" else {}
    return data.load("cifar10", n_valid=1000, seed=seed, **own)


def jobs():
    "Name -> arguments of `compress`, and how to fine-tune; what matters most first"

    def curve(net, methods, seed):
        return [
            (
                f"{net}/{m}@{share}/{seed}",
                dict(macs=share, seed=seed) | ({} if m == "all" else dict(methods=(m,))),
                {},
            )
            for share in CURVE
            for m in methods
        ]

    labels = dict(macs=0.5, methods=("spatial_svd",))
    for seed in SEEDS:
        for net in ("resnet20", "mobilenet"):
            yield f"{net}/ours/{seed}", dict(macs=0.5, seed=seed), {}
            yield f"{net}/unchecked/{seed}", dict(macs=0.5, seed=seed, tries=0), {}
    for seed in SEEDS:
        yield from curve("resnet20", ("all", *(BEST if seed else ALONE)), seed)
        if not seed:
            yield from curve(
                "mobilenet",
                ("all", "weight_svd_out", "weight_svd_in", "channel", "spatial_svd"),
                seed,
            )
        yield f"mobilenet/tuned/{seed}", dict(macs=0.5, seed=seed), LONG
    yield "mobilenet/tuned_shortly/0", dict(macs=0.5, seed=0), SHORT
    for select in ("uniform", "greedy", "knapsack"):
        yield f"resnet20/{select}_refit/0", dict(labels, select=select), {}
        yield (
            f"resnet20/{select}{'' if select == 'greedy' else '_plain'}/0",
            dict(labels, select=select, refit=False),
            {},
        )


def measure(name, options, tuning, a):
    "One compressed network: what it costs, and what is left of its accuracy"
    net, seed = network(name.split("/")[0]), options.get("seed", 0)
    d = sets(name.split("/")[0], seed)
    images = data.calibration(d, a.calib, seed)
    if options.get("select") == "greedy":
        some = [
            b for _, b in zip(range(8), d.train)
        ]  # as AIMET: accuracy on about a thousand images with labels
        options = dict(options, evaluate=lambda n: train.accuracy(n, some))
    kept = (
        Path(a.store) / "layers" / name.split("/")[0] / str(seed)
    )  # scored once for all shares and methods
    try:
        made = compress(
            net,
            images,
            n_jobs=a.jobs,
            checkpoint=None if name.split("/")[1] in FROM_NOTHING else kept,
            progress=False,
            **options,
        )
    except ValueError as e:
        return dict(refused=str(e))
    before, now = train.logits(net, d.test)[0], train.logits(made.model, d.test)[0]
    record = dict(
        share=made.report.share,
        macs=made.report.macs,
        facts=made.report.facts,
        load=os.getloadavg()[0],
        agreement=train.agreement(before, now),
        sqnr_db=train.sqnr_db(before, now),
    )
    record |= dict(
        top1=train.accuracy(made.model, d.test),
        plan=made.report.plan.to_dict(),
        rows=[list(r) for r in made.report] if name.endswith("ours/0") else None,
    )
    if tuning:
        start = time.perf_counter()
        tuned, history = train.fit(
            made.model,
            (d.train, None),
            teacher=net,
            seed=seed,
            device="cpu",
            progress=False,
            checkpoint=Path(a.store) / "layers" / f"{VERSION}-{name.replace('/', '-')}.safetensors",
            **tuning,
        )
        record |= dict(
            tuned_top1=train.accuracy(tuned, d.test),
            tuning_seconds=time.perf_counter() - start,
            tuning=tuning,
        )
    return record


def summary(store):
    "Mean and deviation over the seeds of each job"
    runs, out = (
        {
            k.split("/", 1)[1]: store.get(k).meta
            for k in store.keys()
            if k.startswith(f"{VERSION}/")
        },
        {},
    )
    for r in runs.values():  # networks that the check builds are evaluations too
        if "tries" in r.get("facts", {}):
            r["facts"]["evaluations"] = len(r["facts"]["tries"])
        r.pop("cpu_seconds", None)
        if "facts" in r:
            r["seconds"] = (
                r["facts"]["seconds to choose"] + r["facts"]["seconds to fit"]
            )  # as `compress` took them, without what is evaluated here
    for key, r in runs.items():
        out.setdefault(key.rsplit("/", 1)[0], []).append(dict(r, seed=int(key.rsplit("/", 1)[1])))

    def spread(rows, k):
        return dict(
            mean=mean(r[k] for r in rows), sd=stdev(r[k] for r in rows) if len(rows) > 1 else None
        )

    table = {
        k: {
            c: spread(rows, c)
            for c in ("top1", "agreement", "sqnr_db", "tuned_top1", "share", "seconds")
            if all(c in r for r in rows)
        }
        | dict(runs=rows)
        for k, rows in out.items()
    }
    floats = {n: runs[n] for n in ("resnet20/float/0", "mobilenet/float/0") if n in runs}
    return dict(
        what="CIFAR-10 top-1 on 10,000 test images; fits from 1,024 training images",
        talk=TALK,
        aimet=AIMET,
        float={n.split("/")[0]: r["top1"] for n, r in floats.items()},
        methods=DEFAULT_METHODS,
        machine=machine(),
        threads=torch.get_num_threads(),
        results=table,
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--only", nargs="*", default=["*"], help="names of jobs, with wildcards")
    p.add_argument("--calib", type=int, default=1024)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--jobs", type=int, default=1, help="processes for scoring and the check")
    p.add_argument("--store", default="runs/compress")
    p.add_argument("--results", default=str(HERE / "results" / "compress.json"))
    a = p.parse_args()
    if not os.environ.get("MEP_DATA"):
        sys.exit(
            "MEP_DATA must name the folder that holds cifar-10-batches-py and weights/resnet20_cifar10.safetensors"
        )
    torch.set_num_threads(a.threads)
    store = Store(a.store)
    for net in ("resnet20", "mobilenet"):
        store.cached(
            f"{VERSION}/{net}/float/0",
            lambda: ({}, dict(top1=train.accuracy(network(net), sets(net, 0).test))),
        )
    for name, options, tuning in jobs():
        if f"{VERSION}/{name}" in store or not any(fnmatch(name, o) for o in a.only):
            continue
        record = store.cached(
            f"{VERSION}/{name}", lambda: ({}, measure(name, options, tuning, a))
        ).meta
        print(
            name,
            {
                k: round(v, 4) if isinstance(v, float) else v
                for k, v in record.items()
                if k in ("share", "top1", "tuned_top1", "facts", "refused")
            },
            flush=True,
        )
        Path(a.results).write_text(json.dumps(summary(store), indent=1) + "\n")
    Path(a.results).write_text(json.dumps(summary(store), indent=1) + "\n")


if __name__ == "__main__":
    main()
