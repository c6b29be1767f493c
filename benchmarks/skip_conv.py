"""Skip-convolutions: where skipping pays, layer by layer, and gates of several kinds on clips
of moving objects; writes results/skip_conv.json.

    MEP_DATA=folder-of-data-sets python benchmarks/skip_conv.py

Everything runs on one thread; times are that thread's own, all calls in alternation, the
quickest tenth of each. Clips are generated, and made from real pictures: items of
Fashion-MNIST before photographs (`imagenet_val500` in MEP_DATA; without it this part is
left out), with a camera that stands still or moves. Takes about ten minutes. Resumes in
runs/skip_conv if interrupted."""

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import FashionMNIST
from torchvision.io import ImageReadMode, read_image

from mep.conditional.dynamic_conv import (
    STEP,
    discs,
    location_loss,
    locator,
    mean_iou,
    ready,
    small_objects,
    time_calls,
)
from mep.conditional.skip_conv import (
    NormGate,
    SkipConv2d,
    _path,
    frame_by_frame,
    moving_objects,
    skip_convert,
    train_gates,
    tune,
    work,
)
from mep.deploy import machine
from mep.store import Store
from mep.train import fit

HERE = Path(__file__).parent
EPS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
BUDGETS = (0.002, 0.01)
COSTS = (0.03, 0.1, 0.3)
MOVED = (0.0, 0.05, 0.1, 0.2)
LAYERS = [
    ("3x3, 32 ch, 48 x 48", 32, 48, 3),
    ("3x3, 32 ch, 96 x 96", 32, 96, 3),
    ("3x3, 64 ch, 72 x 72", 64, 72, 3),
    ("3x3, 128 ch, 56 x 56", 128, 56, 3),
    ("3x3, 256 ch, 28 x 28", 256, 28, 3),
    ("1x1, 64 ch, 72 x 72", 64, 72, 1),
    ("1x1, 256 ch, 28 x 28", 256, 28, 1),
]


def time_layer(name, channels, size, kernel, n):
    """Milliseconds of a layer, dense and skipping, where a share of the positions moves to and
    fro between two frames."""
    conv = (
        nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        .to(memory_format=torch.channels_last)
        .eval()
    )
    x = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0)).to(
        memory_format=torch.channels_last
    )
    calls, shares = {"dense": partial(conv, x)}, []
    for i, share in enumerate(MOVED):
        mask = discs(size, share)
        layer, frames = (
            SkipConv2d(conv, NormGate(0.1, window=1), refresh=1.0).eval(),
            [x, torch.where(mask, x + 1, x).contiguous(memory_format=torch.channels_last)],
        )

        def step(layer=layer, frames=frames):
            frames.reverse()
            layer(frames[0])
            layer.shares.clear()

        calls[i] = step
        shares.append(mask.float().mean().item())
    ms = time_calls(calls, n=n, clock=time.thread_time_ns)
    dense, times = ms["dense"], [ms[i] for i in range(len(MOVED))]
    even = None
    for (s0, t0), (s1, t1) in zip(zip(shares, times), zip(shares[1:], times[1:])):
        if t0 < dense:
            even = s1 if t1 < dense else s0 + (s1 - s0) * (dense - t0) / (t1 - t0)
    return dict(
        name=name,
        macs=size * size * conv.weight.numel(),
        dense_ms=dense,
        shares=shares,
        ms=times,
        break_even=even,
    )


WIDTHS = {32: 3, 64: 3}  # channels -> seeds; gates are learned in the first only
REAL_SEEDS = 2


def trained(store, a, width, seed, key="net", pictures=small_objects, n=None):
    "The network of a width and seed, trained once on single pictures, batch norm folded."
    net = locator(width, seed=seed)

    def train():
        start, (x, y) = time.perf_counter(), pictures(n or a.n_train, seed=10 + seed)
        loader = DataLoader(
            TensorDataset(x, y), 16, shuffle=True, generator=torch.Generator().manual_seed(seed)
        )
        fitted = fit(
            net,
            (loader, None),
            a.epochs,
            lr=4e-3,
            optimizer="adamw",
            loss=location_loss,
            device="cpu",
            seed=seed,
            progress=False,
        ).model
        return dict(fitted.state_dict()), dict(seconds=time.perf_counter() - start)

    tensors, meta = store.cached(f"{width}/{seed}/{key}", train)
    print(f"width {width} seed {seed} {key}: trained in {meta['seconds']:.0f} s", flush=True)
    net.load_state_dict(tensors)
    return ready(net)


def judge(net, clips, truth):
    "Quality, work and error of a video network."
    with torch.no_grad():
        z = net(clips)
    exact = frame_by_frame(net, clips)
    return dict(
        iou=mean_iou(z.argmax(2).flatten(0, 1), truth.flatten(0, 1)),
        agreement=(z.argmax(2) == exact.argmax(2)).float().mean().item(),
        work=work(net).item(),
        error=((z - exact).square().sum() / exact.square().sum()).item(),
    )


def time_nets(nets, film, n):
    "Milliseconds per frame of a clip, one network after the other in alternation."
    frames = [f.contiguous(memory_format=torch.channels_last) for f in film.unbind(1)]

    def over(net):
        if hasattr(net, "reset"):
            net.reset()
        for f in frames:
            net(f)

    return {
        k: v / len(frames)
        for k, v in time_calls(
            {k: partial(over, m) for k, m in nets.items()}, n=n, warmup=1, clock=time.thread_time_ns
        ).items()
    }


def measure(store, a, width, seed):
    "All ways to set the gates of one network."
    static, rows, timed = trained(store, a, width, seed), {}, {}
    clips, truth = moving_objects(a.clips, a.frames, seed=1000 + seed)
    calib = moving_objects(2, a.frames, seed=2000 + seed)[0]

    def note(name, net, timing=False):
        rows[name] = judge(net, clips, truth)
        if timing:
            timed[name] = net
        print(
            f"width {width} seed {seed} {name:28} "
            + "  ".join(f"{k} {v:.4g}" for k, v in rows[name].items()),
            flush=True,
        )

    note("frame by frame", skip_convert(static, 0.0))
    for eps in EPS:
        note(f"one threshold, {eps:g}", skip_convert(static, eps), eps in (0.1, 0.2))
    for budget in BUDGETS:
        note(
            f"one threshold, e={budget:g}", tune(skip_convert(static, 0.1), calib, budget, rounds=0)
        )
        note(
            f"one per layer, e={budget:g}",
            tune(skip_convert(static, 0.1), calib, budget),
            budget == 0.01,
        )
    note("one threshold, 4 x 4", skip_convert(static, 0.2, block=4), True)
    train = moving_objects(a.gate_clips, 5, seed=3000 + seed)[0]
    for cost in COSTS if width == min(WIDTHS) else ():
        note(
            f"learned, cost {cost:g}",
            train_gates(skip_convert(static, 0.2, gate="gumbel"), train, cost, seed=seed),
            cost == 0.1,
        )
    film = moving_objects(1, a.frames, seed=4000 + seed, size=288)[0]
    for name, ms in time_nets({"frame by frame": static} | timed, film, a.rounds).items():
        rows[name]["ms"] = ms
    for name in timed:
        rows[name] |= dict(
            speedup=rows["frame by frame"]["ms"] / rows[name]["ms"],
            film_work=work(timed[name]).item(),
        )
    rows["frame by frame"]["speedup"] = 1.0
    return {}, rows


# Clips of real pictures

SIZE, ITEM = 96, 28
CAMERAS = "stands still", "moves"
ACCESSORIES = 5, 7, 8, 9  # sandal, sneaker, bag, ankle boot are class 1; clothes are class 2


class Real:
    "Photographs and items, both cut in two: to train on, and to judge on"

    def __init__(self, root):
        files = sorted((Path(root) / "imagenet_val500").glob("*.JPEG"))
        self.photos = torch.stack([read_image(str(f), ImageReadMode.RGB) for f in files])
        self.items = {train: FashionMNIST(root, train=train) for train in (True, False)}

    def scene(self, train, random):
        "A photograph [3, H, W] in 0 to 1, with an empty map of classes [H, W]"
        held = len(self.photos) // 5
        photos = self.photos[held:] if train else self.photos[:held]
        photo = photos[int(torch.randint(len(photos), (), generator=random))].float() / 255
        return photo, torch.zeros(photo.shape[1:], dtype=torch.long)

    def item(self, train, random):
        "An item [3, 28, 28] in a random colour, its outline [28, 28], and its class"
        items = self.items[train]
        i = int(torch.randint(len(items.data), (), generator=random))
        grey = items.data[i].float() / 255
        return (
            grey * (0.4 + 0.6 * torch.rand(3, 1, 1, generator=random)),
            grey > 0.1,
            1 if int(items.targets[i]) in ACCESSORIES else 2,
        )

    def pictures(self, n, seed):
        """Single pictures of one to three items, to train on: normalised pixels, and classes
        of every fourth position"""
        random, found = torch.Generator().manual_seed(seed), []
        for _ in range(n):
            photo, classes = self.scene(True, random)
            corner = torch.randint(photo.shape[1] - SIZE, (2,), generator=random).tolist()
            for _ in range(int(torch.randint(1, 4, (), generator=random))):
                at = torch.randint(SIZE - ITEM, (2,), generator=random).tolist()
                photo, classes = put_item(
                    photo, classes, self.item(True, random), [a + b for a, b in zip(corner, at)]
                )
            found.append(window(photo, classes, corner))
        return normalised(found, random)

    def clips(self, n, frames, seed, camera):
        """Clips of two items. The camera stands still and one of them moves, by 1 to 3 pixels
        a frame in each direction; or both lie still, and the camera moves likewise."""
        random, found = torch.Generator().manual_seed(seed), []
        for _ in range(n):
            photo, classes = self.scene(False, random)
            room = (photo.shape[1] if camera == "moves" else SIZE) - (
                SIZE if camera == "moves" else ITEM
            )
            path = torch.cat([_path(1, frames, room, random) for _ in range(2)]).T.tolist()
            still = [photo.shape[1] // 2 - SIZE // 2] * 2
            at = [c + int(torch.randint(SIZE - ITEM, (), generator=random)) for c in still]
            photo, classes = put_item(photo, classes, self.item(False, random), at)
            item = self.item(False, random)
            for place in path:
                if camera == "moves":
                    found.append(
                        window(*put_item(photo, classes, item, [photo.shape[1] // 2] * 2), place)
                    )
                else:
                    found.append(
                        window(
                            *put_item(photo, classes, item, [c + p for c, p in zip(still, place)]),
                            still,
                        )
                    )
        return tuple(t.unflatten(0, (n, frames)) for t in normalised(found, random))


def put_item(photo, classes, item, at):
    "Copies of photograph and classes with an item whose corner is `at`"
    (pixels, solid, label), (top, left) = item, at
    photo, classes, there = (
        photo.clone(),
        classes.clone(),
        (slice(top, top + ITEM), slice(left, left + ITEM)),
    )
    photo[:, *there] = torch.where(solid, pixels, photo[:, *there])
    classes[there] = torch.where(solid, label, classes[there])
    return photo, classes


def window(photo, classes, corner):
    "What the camera sees"
    there = tuple(slice(c, c + SIZE) for c in corner)
    return photo[:, *there], classes[there][STEP // 2 :: STEP, STEP // 2 :: STEP]


def normalised(frames, random, noise=0.01):
    "Stacked, with the camera's noise"
    x, y = (torch.stack(t) for t in zip(*frames))
    return (x + noise * torch.randn(x.shape, generator=random) - 0.45) / 0.25, y


def measure_real(store, a, real, seed, width=32):
    """Norm gates on clips of real pictures, for both cameras; the network saw single pictures
    only, and neither these photographs nor these items."""
    static, rows = trained(store, a, width, seed, "real", real.pictures, a.n_real), {}
    for camera in CAMERAS:
        clips, truth = real.clips(a.clips, a.frames, 1000 + seed, camera)
        calib = real.clips(2, a.frames, 2000 + seed, camera)[0]
        nets = {"frame by frame": skip_convert(static, 0.0)} | {
            f"one threshold, {eps:g}": skip_convert(static, eps) for eps in EPS
        }
        nets |= {
            f"one per layer, e={budget:g}": tune(skip_convert(static, 0.1), calib, budget)
            for budget in BUDGETS
        }
        rows[camera] = {name: judge(net, clips, truth) for name, net in nets.items()}
        for name, r in rows[camera].items():
            print(
                f"real, camera {camera}, seed {seed} {name:28} "
                + "  ".join(f"{k} {v:.4g}" for k, v in r.items()),
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


def summary(runs):
    return {
        name: {k: spread([r[name][k] for r in runs]) for k in runs[0][name]} for name in runs[0]
    }


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--n-train", type=int, default=500)
    p.add_argument("--epochs", type=int, default=6)
    p.add_argument("--clips", type=int, default=16, help="to judge on")
    p.add_argument("--frames", type=int, default=16)
    p.add_argument("--gate-clips", type=int, default=48, help="to train gates on")
    p.add_argument("--n-real", type=int, default=1500, help="pictures of real items to train on")
    p.add_argument("--rounds", type=int, default=5, help="of the timing")
    p.add_argument("--store", default="runs/skip_conv")
    a = p.parse_args()
    torch.set_num_threads(1)
    store, layers = Store(a.store), []
    for layer in LAYERS:
        layers.append(
            store.cached(
                f"layer/{layer[0].replace(' ', '_').replace(',', '')}",
                lambda: ({}, time_layer(*layer, 6 * a.rounds)),
            )[1]
        )
        print(
            (
                f"{layers[-1]['name']:24} dense {layers[-1]['dense_ms']:.2f} ms, skipping "
                f"{', '.join(f'{t:.2f}' for t in layers[-1]['ms'])}, break-even {layers[-1]['break_even']}"
            ),
            flush=True,
        )
    networks = {}
    for width, seeds in WIDTHS.items():
        runs = [
            store.cached(f"{width}/{s}/measured", partial(measure, store, a, width, s))[1]
            for s in range(seeds)
        ]
        networks[width] = summary(runs)
    real = None
    if (root := os.environ.get("MEP_DATA")) and (Path(root) / "imagenet_val500").is_dir():
        pictures = Real(root)
        runs = [
            store.cached(f"real/{s}", partial(measure_real, store, a, pictures, s))[1]
            for s in range(REAL_SEEDS)
        ]
        real = {camera: summary([r[camera] for r in runs]) for camera in CAMERAS}
    else:
        print("no clips of real pictures: MEP_DATA does not name a folder with imagenet_val500")
    result = dict(
        what=(
            "Skip-convolutions against dense ones in PyTorch, one thread, and a locator network "
            "on clips of moving objects with gates of several kinds; the first frame of a clip is counted"
        ),
        n_train=a.n_train,
        epochs=a.epochs,
        clips=a.clips,
        frames=a.frames,
        gate_clips=a.gate_clips,
        n_real=a.n_real,
        machine=machine(),
        layers=layers,
        networks=networks,
        real=real,
    )
    (HERE / "results" / "skip_conv.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
