"""Learned bit widths against uniform ones at equal cost: Fashion-MNIST, three seeds; writes
results/bayesian_bits.json.

    MEP_DATA=folder-of-data-sets python benchmarks/bayesian_bits.py

Every network starts from the same pretrained one of its seed and is trained for the same
number of epochs, ranges learned in all. Takes about twenty minutes on 2 CPU cores. Resumes
in runs/bayesian_bits if interrupted; `--part 0/2` and `--part 1/2` share the work between
two processes, and a last call without `--part` writes the file."""

import argparse
import json
import os
import platform
import time
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch

from mep.cost import profile
from mep.data import load
from mep.quant.bayesian_bits import bayesian_bits, bops, train_quantized, widths
from mep.store import Store
from mep.train import accuracy, fit, small_resnet

HERE = Path(__file__).parent
MU = (0.01, 0.03, 0.1, 0.3, 1.0)
UNIFORM = ((8, 8), (4, 8), (4, 4), (2, 4), (2, 2))
NETWORK = dict(width=8, depths=(1, 1, 1))


def pretrained(store, data, seed, a):
    "The float network of a seed, trained once."
    net = small_resnet(len(data.classes), data.input_shape[0], seed=seed, **NETWORK)

    def train():
        start = time.perf_counter()
        trained = fit(net, (data.train, None), a.pretrain, seed=seed, progress=False).model
        return dict(trained.state_dict()), dict(
            accuracy=accuracy(trained, data.test), seconds=time.perf_counter() - start
        )

    tensors, meta = store.cached(f"{seed}/float", train)
    net.load_state_dict(tensors)
    return net.eval(), meta


def measure(make, net, data):
    "Accuracy, cost and widths of a network made from `net`."
    start = time.perf_counter()
    qm = make(net)
    full = profile(
        small_resnet(len(data.classes), data.input_shape[0], **NETWORK), data.input_shape
    ).bops(32, 32)
    rows = [dict(w._asdict()) for w in widths(qm)]
    return {}, dict(
        accuracy=accuracy(qm, data.test),
        bops=bops(qm),
        share=bops(qm) / full,
        widths=rows,
        seconds=time.perf_counter() - start,
    )


def jobs(data, a, seed):
    "Name -> function from the pretrained network to a quantized one."
    common = dict(data=(data.train, None), lr=a.lr, seed=seed, device="cpu", progress=False)
    for w, b in UNIFORM:
        yield (
            f"W{w}A{b}",
            lambda net, w=w, b=b: train_quantized(
                net, w_bits=w, a_bits=b, epochs=a.epochs + a.finetune, **common
            ),
        )
    for mu in MU:
        yield (
            f"mu={mu:g}",
            lambda net, mu=mu: bayesian_bits(
                net, mu=mu, epochs=a.epochs, finetune=a.finetune, **common
            ),
        )


def work(a, store):
    "Run what is not in the store yet."
    part, parts = map(int, a.part.split("/"))
    for seed in range(a.seeds):
        data = load("fashion_mnist", n_train=a.n_train, seed=seed)
        chosen = [
            (n, f)
            for n, f in jobs(data, a, seed)
            if any(fnmatch(n, pattern) for pattern in a.only.split(","))
        ]
        todo = [(n, f) for n, f in chosen[part::parts] if f"{seed}/{n}" not in store]
        if todo:
            net, _ = pretrained(store, data, seed, a)
        for name, make in todo:
            _, meta = store.cached(f"{seed}/{name}", partial(measure, make, net, data))
            print(
                (
                    f"seed {seed} {name:8} {meta['accuracy']:.4f} at {meta['share']:.2%} of the "
                    f"BOPs, {meta['seconds']:.0f} s"
                ),
                flush=True,
            )


def spread(values):
    return dict(mean=mean(values), sd=stdev(values) if len(values) > 1 else None, n=len(values))


def summary(a, store):
    "Mean and standard deviation over seeds."
    seeds = list(range(a.seeds))
    nets = {}
    for name in ["float", *(f"W{w}A{b}" for w, b in UNIFORM), *(f"mu={mu:g}" for mu in MU)]:
        runs = [
            dict(store.get(f"{s}/{name}").meta, seed=s) for s in seeds if f"{s}/{name}" in store
        ]
        if not runs:
            continue
        nets[name] = {
            k: spread([r[k] for r in runs])
            for k in ("accuracy", "bops", "share", "seconds")
            if k in runs[0]
        }
        nets[name] |= dict(
            runs=[{k: r[k] for k in ("seed", "accuracy", "share") if k in r} for r in runs],
            widths=runs[0].get("widths"),
        )
    return dict(
        what=(
            "Bayesian Bits against uniform widths, small_resnet on Fashion-MNIST, all trained "
            "from one network per seed for the same number of epochs"
        ),
        network=NETWORK,
        n_train=a.n_train,
        pretrain=a.pretrain,
        epochs=a.epochs,
        finetune=a.finetune,
        lr=a.lr,
        seeds=seeds,
        machine=dict(
            cpu=platform.processor() or platform.machine(),
            cores=os.cpu_count(),
            torch=torch.__version__,
            python=platform.python_version(),
        ),
        nets=nets,
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--n-train", type=int, default=10000)
    p.add_argument("--pretrain", type=int, default=8, help="epochs in float")
    p.add_argument("--epochs", type=int, default=5, help="epochs that learn the gates")
    p.add_argument(
        "--finetune",
        type=int,
        default=2,
        help="epochs with settled gates; uniform networks get the sum",
    )
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--part", default="0/1", help="i/n: this process does every n-th job")
    p.add_argument("--only", default="*", help="names of jobs with wildcards, separated by commas")
    p.add_argument("--only-summary", action="store_true")
    p.add_argument("--store", default="runs/bayesian_bits")
    a = p.parse_args()
    store = Store(a.store)
    if not a.only_summary:
        work(a, store)
    if a.part == "0/1":
        result = summary(a, store)
        (HERE / "results" / "bayesian_bits.json").write_text(json.dumps(result, indent=1) + "\n")
        for name, r in result["nets"].items():
            print(
                f"{name:8} "
                + "  ".join(
                    f"{k} {v['mean']:.4g} +- {v['sd'] or 0:.2g}"
                    for k, v in r.items()
                    if isinstance(v, dict)
                )
            )


if __name__ == "__main__":
    main()
