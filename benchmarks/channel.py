"""Channel pruning: which channels, with and without repair, and what the MACs are in time;
writes results/channel.json.

    MEP_DATA=folder-of-data-sets python benchmarks/channel.py

Accuracy, without any training: a pretrained CIFAR-10 ResNet-20
(MEP_DATA/weights/resnet20_cifar10.safetensors, 91.73 % top-1) and the MobileNetV2-like
network of benchmarks/weights, on all 10,000 test images; every group keeps the same share
of its channels. The 512 calibration images are drawn anew for each seed. Time:
torchvision's ResNet-18 at 224 px in onnxruntime, random weights, alternated. One thread.
About twenty minutes on one core. Resumes in runs/channel if interrupted."""

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from adaround_aimet import resnet20
from train_zoo import load_zoo

from mep.compress.channel import SELECT, channel_groups, channel_prune, remove
from mep.compress.svd import spatial_svd
from mep.cost import profile
from mep.data import calibration, load
from mep.deploy import latencies, machine
from mep.store import Store
from mep.train import accuracy, fit

HERE = Path(__file__).parent
MACS = (0.75, 0.5)
SHARES = (1, 0.8, 0.7, 0.6, 0.5)  # of the channels, for the latency


def networks(root):
    "Name -> network and its data"
    imagenet = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    yield (
        "resnet20",
        resnet20(root / "weights" / "resnet20_cifar10.safetensors"),
        load("cifar10", root=root, n_valid=0, **imagenet),
    )
    yield (
        "mobilenet_cifar10",
        load_zoo("mobilenet_cifar10"),
        load("cifar10", root=root, n_valid=1000),
    )


def pruned(net, data, seed, n, test, **options):
    start = time.perf_counter()
    small = channel_prune(net, calibration(data, n, seed), seed=seed, progress=False, **options)
    seconds = time.perf_counter() - start
    return small, dict(
        options,
        seed=seed,
        seconds=seconds,
        macs_left=profile(small, data.input_shape).macs / profile(net, data.input_shape).macs,
        accuracy=accuracy(small, data.test) if test else None,
    )


def once(net, data, seed, a, **options):
    return {}, pruned(net, data, seed, a.images, True, **options)[1]


def chain(net, data, seed, a):
    "Spatial SVD to 0.75 of the MACs, then channel pruning of what is left to 0.66 of that"
    svd, start = (
        spatial_svd(net, macs=0.75, data=calibration(data, a.images, seed)),
        profile(net, data.input_shape).macs,
    )
    small, row = pruned(svd, data, seed, a.images, True, macs=0.66)
    return {}, row | dict(
        after_svd=accuracy(svd, data.test), macs_left=profile(small, data.input_shape).macs / start
    )


def tuned(net, data, seed, a, select):
    "Half of the MACs, then training with the original as teacher"
    small, row = pruned(net, data, seed, a.images, True, macs=0.5, select=select)
    out = fit(
        small,
        (data.train, None),
        epochs=a.epochs,
        lr=a.lr,
        teacher=net,
        seed=seed,
        device="cpu",
        progress=False,
    )
    return {}, row | dict(tuned=accuracy(out.model, data.test), epochs=a.epochs, lr=a.lr)


def resnet18_latency(multiple):
    "ResNet-18 with shares of its channels, rounded to a multiple"
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net, shape = resnet18(), (3, 224, 224)
    groups, full = [g for g in channel_groups(net, shape) if not g.locked], profile(net, shape).macs
    nets = {
        f"{s:g}": remove(
            net, {g: range(max(1, round(s * g.width / multiple)) * multiple) for g in groups}
        )
        for s in SHARES
    }
    return {}, {
        k: v.to_dict() | dict(macs_left=profile(nets[k], shape).macs / full)
        for k, v in latencies(nets, shape, n=30).items()
    }


def jobs(a, root):
    "Key -> function that computes the result"
    nets = list(networks(root))
    for name, net, data in nets:
        yield (
            f"{name}/float",
            lambda net=net, data=data: ({}, dict(accuracy=accuracy(net, data.test))),
        )
    for multiple in (1, 16):
        yield f"latency/{multiple}", partial(resnet18_latency, multiple)
    for seed in range(a.seeds):
        for name, net, data in nets:
            for macs in MACS:
                for select in SELECT:
                    yield (
                        f"{name}/prune/{select}/{macs:g}/{seed}",
                        partial(once, net, data, seed, a, macs=macs, select=select),
                    )
            yield f"{name}/chain/{seed}", partial(chain, net, data, seed, a)
    for name, net, data in nets:
        for select in SELECT:
            yield (
                f"{name}/unrepaired/{select}/0.5/0",
                partial(once, net, data, 0, a, macs=0.5, select=select, repair=False),
            )
        if a.epochs:
            yield f"{name}/tuned/cost/0", partial(tuned, net, data, 0, a, "cost")


def spread(rows):
    values = [r["accuracy"] for r in rows]
    return rows[0] | dict(
        accuracy=mean(values),
        sd=stdev(values) if len(values) > 1 else None,
        seeds=len(values),
        seconds=mean(r["seconds"] for r in rows),
    )


def table(results, name):
    "The means over seeds of one network"
    rows = lambda start: [v for k, v in results.items() if k.startswith(f"{name}/{start}/")]
    each = lambda start, shares: [
        spread(found) for m in shares for s in SELECT if (found := rows(f"{start}/{s}/{m:g}"))
    ]
    return dict(
        float=results[f"{name}/float"]["accuracy"],
        repaired=each("prune", MACS),
        unrepaired=each("unrepaired", (0.5,)),
        chain=[spread(found)] if (found := rows("chain")) else [],
        tuned=rows("tuned"),
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--seeds", type=int, default=3, help="of the calibration images")
    p.add_argument("--images", type=int, default=512, help="to calibrate on")
    p.add_argument("--epochs", type=int, default=2, help="of training after pruning; 0: none")
    p.add_argument("--lr", type=float, default=0.02)
    p.add_argument(
        "--only-summary", action="store_true", help="run nothing: write what is in the store"
    )
    p.add_argument("--store", default="runs/channel")
    a = p.parse_args()
    root, store, results = Path(os.environ["MEP_DATA"]), Store(a.store), {}
    torch.set_num_threads(1)
    for key, compute in jobs(a, root):
        if a.only_summary and key not in store:
            continue
        start = time.perf_counter()
        results[key] = store.cached(key, compute).meta
        print(
            f"{key:36} {time.perf_counter() - start:6.1f} s  "
            + "  ".join(
                f"{k} {v:.4f}"
                for k, v in results[key].items()
                if k in ("accuracy", "macs_left", "tuned", "after_svd")
            ),
            flush=True,
        )
    nets = {k.split("/")[0]: None for k in results if k.endswith("/float")}
    result = dict(
        what=(
            "Channel pruning of pretrained CIFAR-10 networks without training, top-1 on 10,000 "
            "test images; ResNet-18 latency in onnxruntime; one thread"
        ),
        machine=machine(),
        images=a.images,
        seeds=list(range(a.seeds)),
        epochs=a.epochs,
        nets={n: table(results, n) for n in nets},
        latency={m: results[f"latency/{m}"] for m in (1, 16) if f"latency/{m}" in results},
    )
    (HERE / "results" / "channel.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
