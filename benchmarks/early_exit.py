"""Early exits on Fashion-MNIST against the same network without exits, and a smaller one:
three seeds; writes results/early_exit.json.

    MEP_DATA=folder-of-data-sets python benchmarks/early_exit.py

Every network of a seed is trained for the same number of epochs on the same batches.
Thresholds are chosen on validation data and judged on test data. Takes about twenty minutes
on one CPU core. Resumes in runs/early_exit if interrupted; `--only-measure` repeats what
follows the training."""

import argparse
import json
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch

from mep.conditional.early_exit import (
    Cascade,
    EarlyExit,
    budgeted_thresholds,
    calibrate,
    evaluate,
    exit_table,
    export_cascade,
    fit_exits,
    guaranteed_thresholds,
    image_latencies,
    joint_thresholds,
    stage_inputs,
)
from mep.cost import profile
from mep.data import calibration, load
from mep.deploy import as_model, export_onnx, machine
from mep.quant import export_int8, quantize
from mep.store import Store
from mep.train import accuracy, fit, small_resnet

HERE = Path(__file__).parent
NETWORK, SMALLER = dict(width=24, depths=(2, 2, 2)), dict(width=16, depths=(2, 2, 2))
EXITS = dict(after=("blocks.0", "blocks.2"), hidden=48)
JOINT = dict(weights=(0.3, 0.5, 1), distil=0.5, lr=0.2)  # as many epochs as the plain network
FROZEN = dict(frozen=True, distil=0.5, lr=0.1, epochs=3)  # on the trained plain network
BUDGETS = (
    0.25,
    0.3,
    0.35,
    0.38,
    0.4,
    0.42,
    0.44,
    0.46,
    0.48,
    0.5,
    0.55,
    0.6,
    0.8,
)  # of the plain network's MACs
MARGIN = 0.001  # accuracy that the headline's thresholds may lose on validation data
ALPHA, DELTA, SPLITS = 0.01, 0.1, 200
by_labels = partial(
    joint_thresholds, labels=True
)  # two thresholds need no more than some thousand labels, and nothing is spent that they don't ask for


def plain(data, seed, **kw):
    return small_resnet(len(data.classes), data.input_shape[0], seed=seed, **kw)


def with_exits(net, data, seed):
    return EarlyExit(net, input_shape=data.input_shape, seed=seed, **EXITS)


# Training


def trained(store, key, net, train, epochs, **kw):
    "A network trained once; an interrupted training goes on after its last epoch."

    def job():
        start = time.process_time()
        done = train(
            net,
            **dict(
                dict(
                    epochs=epochs,
                    device="cpu",
                    progress=False,
                    checkpoint=f"{store.root}/{key.replace('/', '-')}.safetensors",
                ),
                **kw,
            ),
        )
        return dict(done.model.state_dict()), dict(cpu_seconds=time.process_time() - start)

    tensors, meta = store.cached(key, job)
    net.load_state_dict({k: torch.as_tensor(v) for k, v in tensors.items()})
    print(f"{key} trained in {meta['cpu_seconds']:.0f} CPU seconds", flush=True)
    return net.eval()


def networks(store, data, seed, epochs):
    """The trained networks of a seed: plain, smaller, exits trained on the plain one, exits
    trained with their network."""
    common = dict(data=(data.train, None), epochs=epochs, seed=seed)
    static = trained(store, f"{seed}/static", plain(data, seed, **NETWORK), fit, **common)
    smaller = trained(store, f"{seed}/smaller", plain(data, seed, **SMALLER), fit, **common)
    frozen = trained(
        store, f"{seed}/frozen", with_exits(static, data, seed), fit_exits, **common | FROZEN
    )
    joint = trained(
        store,
        f"{seed}/joint",
        with_exits(plain(data, seed, **NETWORK), data, seed),
        fit_exits,
        **common,
        **JOINT,
    )
    return dict(static=static, smaller=smaller), dict(
        frozen=calibrate(frozen, data.valid), joint=calibrate(joint, data.valid)
    )


# Measuring


def selections(valid, test, full, budgets=BUDGETS):
    "Each budget: the ways to choose thresholds, on validation and on test data."
    rows = []
    for share in budgets:
        for name, choose in dict(
            published=budgeted_thresholds, joint=joint_thresholds, labels=by_labels
        ).items():
            t = choose(valid, share * full)
            a, b = valid.outcome(t), test.outcome(t)
            rows.append(
                dict(
                    budget=share,
                    selection=name,
                    thresholds=t.tolist(),
                    valid=a.accuracy,
                    accuracy=b.accuracy,
                    macs=b.cost / full,
                    shares=b.shares,
                )
            )
    return rows


def target(valid, static, full):
    """The smallest budget, up to half of the MACs, at which the thresholds lose no more than
    the margin on validation data."""
    budgets = [b for b in BUDGETS if b <= 0.5]
    return next(
        (
            b
            for b in budgets
            if valid.outcome(by_labels(valid, b * full)).accuracy >= static - MARGIN
        ),
        budgets[-1],
    )


def promise(pool, full, n=5000):
    "How often the guarantee fails: choose on `n` samples of a pool, judge on all others."
    lost, cost = [], []
    for split in range(SPLITS):
        order = torch.randperm(
            pool.confidence.shape[1], generator=torch.Generator().manual_seed(split)
        )
        t = guaranteed_thresholds(pool.some(order[:n]), ALPHA, DELTA, seed=split).thresholds
        rest = pool.some(order[n:])
        lost.append(rest.right[-1].double().mean().item() - rest.outcome(t).accuracy)
        cost.append(rest.outcome(t).cost / full)
    return dict(
        alpha=ALPHA,
        delta=DELTA,
        splits=SPLITS,
        n=n,
        broken=mean(x > ALPHA for x in lost),
        lost=mean(lost),
        largest=max(lost),
        macs=mean(cost),
    )


def int8(net, data, folder):
    "A network with exits on integers, stage by stage."
    states = stage_inputs(net, calibration(data, 512))

    def write(k, stage, path):
        export_int8(quantize(stage, states[k], per_channel=True, progress=False), path)

    return Cascade(export_cascade(net, folder, write))


def spread_ms(latency):
    ms = np.array(latency.samples_ms)
    return dict(
        mean_ms=float(ms.mean()),
        median_ms=float(np.median(ms)),
        p10_ms=float(np.percentile(ms, 10)),
        p90_ms=float(np.percentile(ms, 90)),
        n=len(ms),
    )


def deployed(plain, exits, tables, data, full, n, folder):
    "The exported files: accuracy, and milliseconds of single test images, all networks in alternation."
    files = {
        name: export_onnx(m, folder / f"{name}.onnx", data.input_shape) for name, m in plain.items()
    }
    files["static INT8"] = folder / "static_int8.onnx"
    export_int8(
        quantize(plain["static"], calibration(data, 512), per_channel=True, progress=False),
        files["static INT8"],
    )
    static = accuracy(plain["static"], data.valid)
    for name, net in exits.items():
        budget = target(tables[name][0], static, full) * full
        net.set_thresholds(by_labels(tables[name][0], budget))
        files[name], files[f"{name} INT8"] = (
            Cascade(export_cascade(net, folder / name)),
            int8(net, data, folder / f"{name}_int8"),
        )
        files[f"{name} INT8"].thresholds = by_labels(
            exit_table(files[f"{name} INT8"], data.valid), budget
        ).tolist()
    rows = {}
    for name, f in files.items():
        if isinstance(f, Cascade):
            o = evaluate(f, data.test)
            rows[name] = dict(accuracy=o.accuracy, macs=o.cost / full, shares=o.shares)
        else:
            rows[name] = dict(
                accuracy=accuracy(as_model(f), data.test),
                macs=profile(plain[name.split()[0]], data.input_shape).macs / full,
            )
    times = image_latencies(files, torch.cat([x for x, _ in data.test])[:n])
    for name, t in times.items():
        rows[name] |= spread_ms(t)
    edges = np.linspace(0, 2.5 * rows["static"]["median_ms"], 101)
    return rows, dict(
        edges_ms=edges.tolist(),
        counts={name: np.histogram(t.samples_ms, edges)[0].tolist() for name, t in times.items()},
    )


def measure(store, seed, a):
    data = load("fashion_mnist", seed=seed, n_train=a.n_train)
    plain, exits = networks(store, data, seed, a.epochs)
    full = profile(plain["static"], data.input_shape).macs
    tables = {
        name: (exit_table(net, data.valid), exit_table(net, data.test))
        for name, net in exits.items()
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files, histogram = deployed(plain, exits, tables, data, full, a.n_latency, Path(folder))
    nets = {
        name: dict(
            exits=[r.float().mean().item() for r in test.right],
            macs=[c / full for c in test.costs],
            temperatures=exits[name].temperatures.tolist(),
            selections=selections(valid, test, full),
            promise=promise(valid.joined(test), full),
        )
        for name, (valid, test) in tables.items()
    }
    return dict(seed=seed, static_macs=full, nets=nets, files=files, histogram=histogram)


# Summary


def spread(values):
    return dict(mean=mean(values), sd=stdev(values) if len(values) > 1 else None)


def averaged(rows):
    "Mean and deviation over seeds of every number in rows with the same keys; a list becomes a list of them."
    first = rows[0]
    if isinstance(first, dict):
        return {k: averaged([r[k] for r in rows]) for k in first}
    if isinstance(first, list):
        return [averaged(list(r)) for r in zip(*rows)]
    return spread(rows) if isinstance(first, (int, float)) else first


def headline(runs, name):
    """What is to be reached: no more than 0.2 points lost, at half the MACs or less, 1.5 times
    as fast in the mean."""
    rows = [
        dict(
            seed=r["seed"],
            static=r["files"]["static"]["accuracy"],
            exits=r["files"][name]["accuracy"],
            macs=r["files"][name]["macs"],
            speedup=r["files"]["static"]["mean_ms"] / r["files"][name]["mean_ms"],
        )
        for r in runs
    ]
    return dict(
        runs=rows,
        gain=spread([r["exits"] - r["static"] for r in rows]),
        macs=spread([r["macs"] for r in rows]),
        speedup=spread([r["speedup"] for r in rows]),
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--epochs", type=int, default=5)
    p.add_argument("--n-train", type=int, default=30000)
    p.add_argument("--n-latency", type=int, default=2000, help="test images to time")
    p.add_argument("--only-measure", action="store_true", help="measure again what is trained")
    p.add_argument("--store", default="runs/early_exit")
    a = p.parse_args()
    store, runs = Store(a.store), []
    torch.set_num_threads(1)
    for seed in range(a.seeds):
        if a.only_measure and f"{seed}/measured" in store:
            store.delete(f"{seed}/measured")
        runs.append(
            store.cached(f"{seed}/measured", lambda seed=seed: ({}, measure(store, seed, a)))[1]
        )
        for name, r in runs[-1]["files"].items():
            print(
                (
                    f"seed {seed} {name:12} accuracy {r['accuracy']:.4f} at {r['macs']:.3f} of the "
                    f"MACs, mean {r['mean_ms']:.4f} ms"
                ),
                flush=True,
            )
    result = dict(
        what=(
            "early exits on Fashion-MNIST against the same network without, and a smaller one; "
            "thresholds chosen on validation data, judged on test data"
        ),
        network=NETWORK,
        smaller=SMALLER,
        exits=EXITS,
        joint=JOINT,
        frozen=FROZEN,
        n_train=a.n_train,
        epochs=a.epochs,
        margin=MARGIN,
        seeds=list(range(a.seeds)),
        machine=machine() | dict(threads=1),
        headline={name: headline(runs, name) for name in ("frozen", "joint")},
        nets=averaged([r["nets"] for r in runs]),
        files=averaged([r["files"] for r in runs]),
        histogram=runs[0]["histogram"],
        runs=runs,
    )
    (HERE / "results" / "early_exit.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["headline"], indent=1))


if __name__ == "__main__":
    main()
