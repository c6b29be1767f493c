"""MSDNet on Fashion-MNIST, anytime and for a budget, against residual networks of the same
MACs; writes results/msdnet.json.

    MEP_DATA=folder-of-data-sets python benchmarks/msdnet.py

All networks of a seed see the same batches for the same number of epochs. Thresholds are
chosen on validation data and judged on test data, by the published geometric family and
jointly. Takes about twenty minutes a seed on one CPU core. Resumes in runs/msdnet if
interrupted; `--only-measure` repeats what follows the training."""

import argparse
import copy
import json
import tempfile
from functools import partial
from pathlib import Path

import torch
from early_exit import averaged, plain, selections, spread, spread_ms, trained

from mep.conditional.early_exit import (
    Cascade,
    EarlyExit,
    MSDNet,
    calibrate,
    exit_table,
    export_cascade,
    fit_exits,
    image_latencies,
    joint_thresholds,
)
from mep.cost import profile
from mep.data import load
from mep.deploy import export_onnx, machine
from mep.store import Store
from mep.train import accuracy, fit

HERE = Path(__file__).parent
NETWORK = dict(exits=5, layers=1, channels=24, growth=12, stem_stride=2)
LOSS = dict(lr=0.1)  # the plain sum of the exits' losses, as published
STATIC = {
    "width 16": dict(width=16),
    "width 24": dict(width=24),
    "width 36": dict(width=36),
}  # about the MACs of the first, the middle and the last exit
BUDGETS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the last exit's MACs
# accuracy that the headline's thresholds may be expected to lose on validation data, against the
# last exit
MARGIN = 0.001


def networks(store, data, seed, epochs):
    "MSDNet and the static networks of a seed, trained."
    common = dict(data=(data.train, None), epochs=epochs, seed=seed)
    net = EarlyExit(
        MSDNet(len(data.classes), data.input_shape[0], seed=seed, **NETWORK),
        input_shape=data.input_shape,
        seed=seed,
    )
    net = calibrate(trained(store, f"{seed}/msdnet", net, fit_exits, **common | LOSS), data.valid)
    return net, {
        name: trained(
            store, f"{seed}/{name.replace(' ', '-')}", plain(data, seed, **kw), fit, **common
        )
        for name, kw in STATIC.items()
    }


def one_exit(k, n):
    "Thresholds with which all leave at exit k of n"
    return [1.0] * k + [0.0] * (n - 1 - k)


def choices(valid, static_macs):
    """Thresholds to run: each exit for all; jointly for the MACs of each smaller static
    network; and the fewest MACs that keep the last exit's accuracy, in the exits' own
    words."""
    n, hopes, last = (
        len(valid.costs),
        valid._replace(right=valid.expected),
        valid.expected[-1].mean().item(),
    )
    found = {f"exit {k}": one_exit(k, n) for k in range(n)}
    for name, macs in static_macs.items():
        if valid.costs[0] < macs < valid.costs[-1]:
            found[f"MACs of {name}"] = joint_thresholds(valid, macs).tolist()
    jointly = (joint_thresholds(valid, b * valid.costs[-1]) for b in BUDGETS)
    return found | {
        "as good as the last": next(
            (t.tolist() for t in jointly if hopes.outcome(t).accuracy >= last - MARGIN),
            one_exit(n - 1, n),
        )
    }


def timed(net, static, chosen, data, n):
    "Milliseconds of single test images in onnxruntime, all networks in alternation."
    with tempfile.TemporaryDirectory() as folder:
        files, cascade = (
            {
                name: export_onnx(m, Path(folder) / f"{name}.onnx", data.input_shape)
                for name, m in static.items()
            },
            Cascade(export_cascade(net, folder)),
        )
        for name, thresholds in chosen.items():
            files[name] = copy.copy(cascade)
            files[name].thresholds = thresholds
        return {
            name: spread_ms(t)
            for name, t in image_latencies(files, torch.cat([x for x, _ in data.test])[:n]).items()
        }


def measure(store, seed, a):
    data = load("fashion_mnist", seed=seed, n_train=a.n_train)
    net, static = networks(store, data, seed, a.epochs)
    valid, test = exit_table(net, data.valid), exit_table(net, data.test)
    macs = {name: profile(m, data.input_shape).macs for name, m in static.items()}
    chosen = choices(valid, macs)
    rows = {
        name: dict(accuracy=accuracy(m, data.test), macs=macs[name]) for name, m in static.items()
    }
    for name, t in chosen.items():
        o = test.outcome(t)
        rows[name] = dict(accuracy=o.accuracy, macs=o.cost, shares=o.shares, thresholds=t)
    for name, ms in timed(net, static, chosen, data, a.n_latency).items():
        rows[name] |= ms
    return dict(
        seed=seed,
        rows=rows,
        temperatures=net.temperatures.tolist(),
        selections=selections(valid, test, valid.costs[-1], BUDGETS),
    )


def headline(runs):
    """Against the static network nearest in MACs: the last exit, and thresholds that are as
    good; seed by seed, since both share its batches."""
    last, static = f"exit {NETWORK['exits'] - 1}", list(STATIC)[-1]

    def against(name):
        rows = [(r["rows"][name], r["rows"][static]) for r in runs]
        return dict(
            gain=spread([a["accuracy"] - b["accuracy"] for a, b in rows]),
            macs=spread([a["macs"] / b["macs"] for a, b in rows]),
            speedup=spread([b["mean_ms"] / a["mean_ms"] for a, b in rows]),
        )

    return {name: against(name) for name in (last, "as good as the last")}


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--epochs", type=int, default=7)
    p.add_argument("--n-train", type=int, help="default: all")
    p.add_argument("--n-latency", type=int, default=1000, help="test images to time")
    p.add_argument("--only-measure", action="store_true", help="measure again what is trained")
    p.add_argument("--store", default="runs/msdnet")
    a = p.parse_args()
    store, runs = Store(a.store), []
    torch.set_num_threads(1)
    for seed in range(a.seeds):
        if a.only_measure and f"{seed}/measured" in store:
            store.delete(f"{seed}/measured")
        runs.append(
            store.cached(
                f"{seed}/measured", partial(lambda seed: ({}, measure(store, seed, a)), seed)
            )[1]
        )
        for name, r in runs[-1]["rows"].items():
            print(
                (
                    f"seed {seed} {name:20} accuracy {r['accuracy']:.4f} at {r['macs'] / 1e6:5.2f} M "
                    f"MACs, mean {r['mean_ms']:.4f} ms"
                ),
                flush=True,
            )
    result = dict(
        what=(
            "MSDNet on Fashion-MNIST, anytime and for budgets, against residual networks of the "
            "same MACs; thresholds chosen on validation data, judged on test data"
        ),
        network=NETWORK,
        static=STATIC,
        loss=LOSS,
        n_train=a.n_train,
        epochs=a.epochs,
        margin=MARGIN,
        seeds=list(range(a.seeds)),
        machine=machine() | dict(threads=1),
        headline=headline(runs),
        rows=averaged([r["rows"] for r in runs]),
        selections=averaged([r["selections"] for r in runs]),
        runs=runs,
    )
    (HERE / "results" / "msdnet.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["headline"], indent=1))


if __name__ == "__main__":
    main()
