"""Unstructured pruning on a real network: accuracy against sparsity, and what the zeros buy in
time; writes results/prune.json.

    MEP_DATA=folder-of-data-sets python benchmarks/prune.py

Accuracy: a pretrained CIFAR-10 ResNet-20 (MEP_DATA/weights/resnet20_cifar10.safetensors,
91.73 % top-1) on the 10,000 test images, pruned at once with each scope, then with batch
norm re-estimated, then trained for a short while: pruned at once, or gradually. Time:
torchvision's ResNet-18 at 224 px in onnxruntime, alternated, and one linear layer in torch
with a dense and with a compressed sparse (CSR) weight. One thread. A quarter of an hour on
one core. Resumes in runs/prune if interrupted."""

import argparse
import json
import os
import statistics
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from adaround_aimet import resnet20
from torch import nn

from mep.compress.prune import SCOPES, gradual_prune, keep_zeros, magnitude_prune, sparsity, storage
from mep.data import load
from mep.deploy import latencies, machine
from mep.store import Store
from mep.train import accuracy, fit, recalibrate_bn

HERE = Path(__file__).parent
ONESHOT = (0.5, 0.7, 0.8, 0.9, 0.95)
TRAINED = (0.9, 0.95)
LATENCY = (0, 0.5, 0.75, 0.9, 0.95)
MATMUL = (0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


def once(net, data, share, scope):
    "Pruned at once, without training"
    pruned = magnitude_prune(net, share, scope)
    recalibrated = recalibrate_bn(pruned, data.train, 20)
    rows = sparsity(pruned)
    return {}, dict(
        sparsity=share,
        scope=scope,
        accuracy=accuracy(pruned, data.test),
        recalibrated=accuracy(recalibrated, data.test),
        densest=min(r.share for r in rows),
        sparsest=max(r.share for r in rows),
        bytes=storage(pruned),
    )


def trained(net, data, share, how, a, seed):
    "Pruned and trained for `a.epochs`; `how` is once, gradual or dense (no pruning, the same training)"
    common = dict(epochs=a.epochs, warmup=0.05, seed=seed, device="cpu", progress=False)
    start = time.perf_counter()
    if how == "gradual":
        out = gradual_prune(net, (data.train, None), share, scope=a.scope, lr=a.lr, **common)
    elif how == "once":
        out = fit(
            magnitude_prune(net, share, a.scope),
            (data.train, None),
            optimizer=keep_zeros(lr=a.lr),
            **common,
        )
    else:
        out = fit(net, (data.train, None), lr=a.lr, **common)
    return {}, dict(
        sparsity=share,
        how=how,
        seed=seed,
        accuracy=accuracy(out.model, data.test),
        zeros=sparsity(out.model).total,
        seconds=time.perf_counter() - start,
    )


def resnet18_latency():
    "ResNet-18 at 224 px, random weights, dense and pruned, in one alternated run"
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net = resnet18()
    nets = {f"{s:g}": magnitude_prune(net, s) if s else net for s in LATENCY}
    return {}, {k: v.to_dict() for k, v in latencies(nets, (3, 224, 224), n=60).items()}


def matmul(size=1024, rounds=200):
    "One linear layer in torch: dense weight against CSR, milliseconds per call, alternated"
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    layer, rows = nn.Linear(size, size, bias=False).requires_grad_(False), []
    for batch in (1, 64):
        x = torch.randn(size, batch)  # column by column, as torch's sparse product takes it
        ways = {}
        for s in MATMUL:
            w = magnitude_prune(layer, s).weight.detach()
            if s:
                ways["csr", s] = partial(torch.sparse.mm, w.to_sparse_csr(), x)
            if s in (0, 0.9):
                ways["dense", s] = partial(torch.mm, w, x)
        times = {k: [] for k in ways}
        for _ in range(rounds):
            for k in np.random.default_rng(len(times[next(iter(times))])).permutation(len(ways)):
                key = list(ways)[k]
                start = time.perf_counter_ns()
                ways[key]()
                times[key].append((time.perf_counter_ns() - start) / 1e6)
        rows += [
            dict(batch=batch, kind=kind, sparsity=s, median_ms=statistics.median(t[10:]))
            for (kind, s), t in times.items()
        ]
    return {}, dict(size=size, rounds=rounds, rows=rows)


def jobs(a, net, data):
    "Key -> function that computes the result"
    yield "dense", lambda: ({}, dict(accuracy=accuracy(net, data.test), bytes=storage(net)))
    for scope in SCOPES:
        for s in ONESHOT:
            yield f"once/{scope}/{s:g}", partial(once, net, data, s, scope)
    for seed in range(a.seeds):
        yield f"train/dense/{seed}", partial(trained, net, data, 0, "dense", a, seed)
        for s in TRAINED:
            for how in ("once", "gradual"):
                yield f"train/{how}/{s:g}/{seed}", partial(trained, net, data, s, how, a, seed)
    yield "latency", resnet18_latency
    yield "matmul", matmul


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--seeds", type=int, default=1, help="of the training runs")
    p.add_argument(
        "--n-train", type=int, default=20_000, help="images that training and batch norm see"
    )
    p.add_argument("--epochs", type=int, default=1)
    p.add_argument("--lr", type=float, default=0.02)
    p.add_argument("--scope", default="lamp", help="of the trained networks")
    p.add_argument("--store", default="runs/prune")
    a = p.parse_args()
    root, store = Path(os.environ["MEP_DATA"]), Store(a.store)
    torch.set_num_threads(1)
    net = resnet20(root / "weights" / "resnet20_cifar10.safetensors")
    data = load(
        "cifar10",
        root=root,
        n_train=a.n_train,
        n_valid=0,
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
    )
    results = {}
    for key, compute in jobs(a, net, data):
        start = time.perf_counter()
        results[key] = store.cached(key, compute).meta
        print(
            f"{key:24} {time.perf_counter() - start:6.1f} s  "
            + "  ".join(
                f"{k} {v:.4f}" for k, v in results[key].items() if k in ("accuracy", "recalibrated")
            ),
            flush=True,
        )
    part = lambda name: [v for k, v in results.items() if k.split("/")[0] == name]
    result = dict(
        what=(
            "Magnitude pruning of a pretrained CIFAR-10 ResNet-20; ResNet-18 latency in "
            "onnxruntime; a linear layer dense and CSR in torch; one thread"
        ),
        machine=machine(),
        n_test=len(data.test.dataset),
        n_train=a.n_train,
        epochs=a.epochs,
        lr=a.lr,
        scope=a.scope,
        seeds=list(range(a.seeds)),
        dense=results["dense"],
        once=part("once"),
        trained=part("train"),
        latency=results["latency"],
        matmul=results["matmul"],
    )
    (HERE / "results" / "prune.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
