"""Skip-convolutions: where skipping pays, layer by layer, and gates of several kinds on clips of moving objects; writes results/skip_conv.json.

    python benchmarks/skip_conv.py

Everything runs on one thread; times are the quickest tenth of the calls. Takes about ten minutes; no data is needed. Resumes in runs/skip_conv if interrupted.
"""
import argparse
import json
import time
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mep.conditional.dynamic_conv import discs, location_loss, locator, mean_iou, ready, small_objects, time_calls
from mep.conditional.skip_conv import NormGate, SkipConv2d, frame_by_frame, moving_objects, skip_convert, train_gates, tune, work
from mep.deploy import machine
from mep.store import Store
from mep.train import fit

HERE = Path(__file__).parent
EPS = (.05, .1, .15, .2, .3, .5)
BUDGETS = (.002, .01)
COSTS = (.03, .1, .3)
MOVED = (0., .05, .1, .2)
LAYERS = [("3x3, 32 ch, 48 x 48", 32, 48, 3), ("3x3, 32 ch, 96 x 96", 32, 96, 3), ("3x3, 64 ch, 72 x 72", 64, 72, 3), ("3x3, 128 ch, 56 x 56", 128, 56, 3),
          ("3x3, 256 ch, 28 x 28", 256, 28, 3), ("1x1, 64 ch, 72 x 72", 64, 72, 1), ("1x1, 256 ch, 28 x 28", 256, 28, 1)]


def time_layer(name, channels, size, kernel, n):
    "Milliseconds of a layer, dense and skipping, where a share of the positions moves to and fro between two frames."
    conv = nn.Conv2d(channels, channels, kernel, padding=kernel//2).to(memory_format=torch.channels_last).eval()
    x = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    calls, shares = {"dense": partial(conv, x)}, []
    for i, share in enumerate(MOVED):
        mask = discs(size, share)
        layer, frames = SkipConv2d(conv, NormGate(.1, window=1), refresh=1.).eval(), [x, torch.where(mask, x + 1, x).contiguous(memory_format=torch.channels_last)]
        def step(layer=layer, frames=frames): frames.reverse(); layer(frames[0]); layer.shares.clear()
        calls[i] = step
        shares.append(mask.float().mean().item())
    ms = time_calls(calls, n=n)
    dense, times = ms["dense"], [ms[i] for i in range(len(MOVED))]
    even = None
    for (s0, t0), (s1, t1) in zip(zip(shares, times), zip(shares[1:], times[1:])):
        if t0 < dense: even = s1 if t1 < dense else s0 + (s1 - s0) * (dense - t0) / (t1 - t0)
    return dict(name=name, macs=size*size*conv.weight.numel(), dense_ms=dense, shares=shares, ms=times, break_even=even)


WIDTHS = {32: 3, 64: 1} # channels -> seeds


def trained(store, a, width, seed):
    "The network of a width and seed, trained once on single pictures, batch norm folded."
    net = locator(width, seed=seed)
    def train():
        start, (x, y) = time.perf_counter(), small_objects(a.n_train, seed=10 + seed)
        loader = DataLoader(TensorDataset(x, y), 16, shuffle=True, generator=torch.Generator().manual_seed(seed))
        fitted = fit(net, (loader, None), a.epochs, lr=4e-3, optimizer="adamw", loss=location_loss, device="cpu", seed=seed, progress=False).model
        return dict(fitted.state_dict()), dict(seconds=time.perf_counter() - start)
    tensors, meta = store.cached(f"{width}/{seed}/net", train)
    print(f"width {width} seed {seed}: trained in {meta['seconds']:.0f} s", flush=True)
    net.load_state_dict(tensors)
    return ready(net)


def judge(net, clips, truth):
    "Quality, work and error of a video network."
    with torch.no_grad(): z = net(clips)
    exact = frame_by_frame(net, clips)
    return dict(iou=mean_iou(z.argmax(2).flatten(0, 1), truth.flatten(0, 1)), work=work(net).item(), error=((z - exact).square().sum() / exact.square().sum()).item())


def time_nets(nets, film, n):
    "Milliseconds per frame of a clip, one network after the other in alternation."
    frames = [f.contiguous(memory_format=torch.channels_last) for f in film.unbind(1)]
    def over(net):
        if hasattr(net, "reset"): net.reset()
        for f in frames: net(f)
    return {k: v / len(frames) for k, v in time_calls({k: partial(over, m) for k, m in nets.items()}, n=n, warmup=1).items()}


def measure(store, a, width, seed):
    "All ways to set the gates of one network."
    static, rows, timed = trained(store, a, width, seed), {}, {}
    clips, truth = moving_objects(a.clips, a.frames, seed=1000 + seed)
    calib = moving_objects(2, a.frames, seed=2000 + seed)[0]
    def note(name, net, timing=False):
        rows[name] = judge(net, clips, truth)
        if timing: timed[name] = net
        print(f"width {width} seed {seed} {name:28} " + "  ".join(f"{k} {v:.4g}" for k, v in rows[name].items()), flush=True)
    note("frame by frame", skip_convert(static, 0.))
    for eps in EPS: note(f"one threshold, {eps:g}", skip_convert(static, eps), eps in (.1, .2))
    for budget in BUDGETS:
        note(f"one threshold, e={budget:g}", tune(skip_convert(static, .1), calib, budget, rounds=0))
        note(f"one per layer, e={budget:g}", tune(skip_convert(static, .1), calib, budget), budget == .01)
    note("one threshold, 4 x 4", skip_convert(static, .2, block=4), True)
    train = moving_objects(a.gate_clips, 5, seed=3000 + seed)[0]
    for cost in COSTS: note(f"learned, cost {cost:g}", train_gates(skip_convert(static, .2, gate="gumbel"), train, cost, seed=seed), cost == .1)
    film = moving_objects(1, a.frames, seed=4000 + seed, size=288)[0]
    for name, ms in time_nets({"frame by frame": static} | timed, film, a.rounds).items(): rows[name]["ms"] = ms
    for name in timed: rows[name] |= dict(speedup=rows["frame by frame"]["ms"] / rows[name]["ms"], film_work=work(timed[name]).item())
    rows["frame by frame"]["speedup"] = 1.
    return {}, rows


def spread(values): return dict(mean=mean(values), sd=stdev(values) if len(values) > 1 else 0., n=len(values), values=values)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n-train", type=int, default=500)
    p.add_argument("--epochs", type=int, default=6)
    p.add_argument("--clips", type=int, default=16, help="to judge on")
    p.add_argument("--frames", type=int, default=16)
    p.add_argument("--gate-clips", type=int, default=48, help="to train gates on")
    p.add_argument("--rounds", type=int, default=5, help="of the timing")
    p.add_argument("--store", default="runs/skip_conv")
    a = p.parse_args()
    torch.set_num_threads(1)
    store, layers = Store(a.store), []
    for layer in LAYERS:
        layers.append(store.cached(f"layer/{layer[0].replace(' ', '_').replace(',', '')}", lambda: ({}, time_layer(*layer, 6*a.rounds)))[1])
        print(f"{layers[-1]['name']:24} dense {layers[-1]['dense_ms']:.2f} ms, skipping {', '.join(f'{t:.2f}' for t in layers[-1]['ms'])}, break-even {layers[-1]['break_even']}", flush=True)
    networks = {}
    for width, seeds in WIDTHS.items():
        runs = [store.cached(f"{width}/{s}/measured", partial(measure, store, a, width, s))[1] for s in range(seeds)]
        networks[width] = {name: {k: spread([r[name][k] for r in runs]) for k in runs[0][name]} for name in runs[0]}
    result = dict(what="Skip-convolutions against dense ones in PyTorch, one thread, and a locator network on clips of moving objects with gates of several kinds; the first frame of a clip is counted",
                  n_train=a.n_train, epochs=a.epochs, clips=a.clips, frames=a.frames, gate_clips=a.gate_clips,
                  machine=machine(), layers=layers, networks=networks)
    (HERE / "results" / "skip_conv.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
