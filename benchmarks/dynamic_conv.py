"""Dynamic convolutions: where gathering pays, layer by layer, and masks learned on small
objects; writes results/dynamic_conv.json.

    python benchmarks/dynamic_conv.py

Everything runs on one thread; times are that thread's own, all calls in alternation, the
quickest tenth of each. Takes about ten minutes; no data is needed. Resumes in
runs/dynamic_conv if interrupted."""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mep.conditional.dynamic_conv import (
    Sparsity,
    active_macs,
    discs,
    dynamic,
    gated,
    gates_faster,
    iou,
    location_loss,
    locator,
    ready,
    small_objects,
    sparse_conv,
    time_calls,
)
from mep.cost import profile
from mep.deploy import machine
from mep.store import Store
from mep.train import fit

HERE = Path(__file__).parent
THETAS = (0.3, 0.15)
LAYERS = [
    ("3x3, 32 ch, 24 x 24", 32, 24, 3, 1),
    ("3x3, 32 ch, 48 x 48", 32, 48, 3, 1),
    ("3x3, 32 ch, 96 x 96", 32, 96, 3, 1),
    ("3x3, 64 ch, 56 x 56", 64, 56, 3, 1),
    ("3x3, 64 ch, 112 x 112", 64, 112, 3, 1),
    ("3x3, 128 ch, 28 x 28", 128, 28, 3, 1),
    ("3x3, 256 ch, 14 x 14", 256, 14, 3, 1),
    ("1x1, 256 ch, 28 x 28", 256, 28, 1, 1),
    ("3x3 depthwise, 64 ch, 56 x 56", 64, 56, 3, 64),
    ("3x3 depthwise, 256 ch, 28 x 28", 256, 28, 3, 256),
]
SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
TILES = (1, 4, 8)


def break_even(dense, shares, times):
    """Largest share of positions up to which the quickest tile size beats the dense layer,
    interpolated; None: it never does."""
    best, last = [min(t[i] for t in times.values()) for i in range(len(shares))], None
    for i, (s, t) in enumerate(zip(shares, best)):
        if t >= dense:
            if i == 0:
                return None
            return shares[i - 1] + (s - shares[i - 1]) * (dense - best[i - 1]) / (t - best[i - 1])
        last = s
    return last


def time_layer(name, channels, size, kernel, groups, n):
    "Dense and gathered milliseconds of one layer over shares of active positions."
    layer = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=groups).to(
        memory_format=torch.channels_last
    )
    x = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0)).to(
        memory_format=torch.channels_last
    )
    masks = [discs(size, s) for s in SHARES]
    calls = {
        (b, i): partial(sparse_conv, x, layer, m, tile=b)
        for b in TILES
        for i, m in enumerate(masks)
    }
    ms = time_calls({"dense": partial(layer, x)} | calls, n=n, clock=time.thread_time_ns)
    shares, times = (
        [m.float().mean().item() for m in masks],
        {b: [ms[b, i] for i in range(len(masks))] for b in TILES},
    )
    return dict(
        name=name,
        macs=size * size * layer.weight.numel(),
        dense_ms=ms["dense"],
        shares=shares,
        ms={str(b): t for b, t in times.items()},
        tenth={str(b): t[SHARES.index(0.1)] for b, t in times.items()},
        break_even=break_even(ms["dense"], shares, times),
    )


WIDTHS = {32: 3, 64: 3}  # channels -> seeds


def train(store, a, width, seed, theta, quiet=0.0):
    """A network trained once: static (theta None, the second half of its training) or with
    masks, from the static one; `quiet` as in `Sparsity`."""
    x, y = small_objects(a.n_train, seed=10 + seed)
    loader = DataLoader(
        TensorDataset(x, y), 16, shuffle=True, generator=torch.Generator().manual_seed(seed)
    )
    common = dict(loss=location_loss, progress=False, device="cpu", seed=seed)

    def first():
        return dict(
            fit(
                locator(width, seed=seed),
                (loader, None),
                a.epochs,
                lr=4e-3,
                optimizer="adamw",
                **common,
            ).model.state_dict()
        ), {}

    static = locator(width, seed=seed)
    static.load_state_dict(store.cached(f"{width}/{seed}/first", first)[0])
    net = static if theta is None else dynamic(static, seed=seed)

    def second():
        start, penalty = (
            time.perf_counter(),
            None if theta is None else Sparsity(theta, a.epochs * len(loader), quiet=quiet),
        )
        net2 = fit(
            net, (loader, None), a.epochs, optimizer=gates_faster(), penalty=penalty, **common
        ).model
        print(
            f"width {width} seed {seed} theta {theta} quiet {quiet}: {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        return dict(net2.state_dict()), {}

    net.load_state_dict(store.cached(f"{width}/{seed}/{theta}-{quiet}", second)[0])
    return net.eval()


def measure(store, a, width, seed):
    "Every network of a width and seed: quality, MACs, and time on larger pictures, all networks alternated."
    nets = {"static": train(store, a, width, seed, None)} | {
        f"theta {t:g}": train(store, a, width, seed, t) for t in THETAS
    }
    if width == min(WIDTHS):
        nets["theta 0.15, noise"] = train(store, a, width, seed, 0.15, quiet=0.8)
    x, y = small_objects(a.n_test, seed=99)
    big = small_objects(a.n_big, seed=98, size=288)[0].to(memory_format=torch.channels_last)

    def over(net):
        return lambda: [net(p) for p in big.split(1)]

    ms = time_calls(
        {name: over(ready(net)) for name, net in nets.items()},
        n=a.rounds,
        clock=time.thread_time_ns,
    )
    full, objects, rows = profile(nets["static"], (3, 96, 96)).macs, y[:, None] > 0, {}
    for name, net in nets.items():
        macs = full if name == "static" else active_macs(net, x)
        big_macs = profile(net, (3, 288, 288)).macs if name == "static" else active_macs(net, big)
        rows[name] = dict(
            iou=iou(net, x, y),
            macs=macs,
            share=macs / full,
            big_share=big_macs / profile(nets["static"], (3, 288, 288)).macs,
            ms=ms[name] / len(big),
            speedup=ms["static"] / ms[name],
        )
        if name != "static":
            with torch.no_grad():
                net(x)
            blocks = gated(net).values()
            rows[name] |= dict(
                on_objects=mean(b.mask[objects].mean().item() for b in blocks),
                on_background=mean(b.mask[~objects].mean().item() for b in blocks),
            )
        print(
            f"width {width} seed {seed} {name:18} "
            + "  ".join(f"{k} {v:.4g}" for k, v in rows[name].items()),
            flush=True,
        )
    return {}, rows


def spread(values):
    return dict(
        mean=mean(values),
        sd=stdev(values) if len(values) > 1 else 0.0,
        n=len(values),
        values=values,
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--n-train", type=int, default=500)
    p.add_argument("--n-test", type=int, default=300)
    p.add_argument("--n-big", type=int, default=6, help="pictures of 288 px to time")
    p.add_argument("--epochs", type=int, default=5, help="of each half of the training")
    p.add_argument("--rounds", type=int, default=10, help="of the timing")
    p.add_argument("--store", default="runs/dynamic_conv")
    a = p.parse_args()
    torch.set_num_threads(1)
    store = Store(a.store)
    layers = []
    for layer in LAYERS:
        layers.append(
            store.cached(
                f"layer/{layer[0].replace(' ', '_').replace(',', '')}",
                lambda: ({}, time_layer(*layer, 2 * a.rounds)),
            )[1]
        )
        print(
            f"{layers[-1]['name']:32} dense {layers[-1]['dense_ms']:.2f} ms, break-even {layers[-1]['break_even']}",
            flush=True,
        )
    networks = {}
    for width, seeds in WIDTHS.items():
        runs = [
            store.cached(f"{width}/{s}/measured", partial(measure, store, a, width, s))[1]
            for s in range(seeds)
        ]
        networks[width] = {
            name: {k: spread([r[name][k] for r in runs]) for k in runs[0][name]} for name in runs[0]
        }
    result = dict(
        what=(
            "Gathered convolutions against dense ones in PyTorch, one thread, masks of discs; "
            "and locator networks on pictures of small objects, static and with masks"
        ),
        n_train=a.n_train,
        n_test=a.n_test,
        epochs=2 * a.epochs,
        machine=machine(),
        layers=layers,
        networks=networks,
    )
    (HERE / "results" / "dynamic_conv.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
