"""FrameExit against fixed numbers of frames and against plain confidence, on generated clips,
three seeds; writes results/frame_exit.json.

    python benchmarks/frame_exit.py

Each seed trains a backbone on single pictures and the exits on clips. Gates, as published
or looking at the answer, are trained on each half of the held-out clips for each setting of
their labels, and judged on the other half: the setting with the fewest frames at no more
than `--tolerance` accuracy lost is trained again on all of them. A threshold on the largest
softmax, which needs no training, is chosen on all held-out clips. The test clips only
measure what was chosen. Latency: batch 1 in onnxruntime, one thread and its own clock, clip
by clip in alternation with all frames in one batch. Needs no data set; ten minutes on one
quiet core. Resumes in runs/frame_exit if interrupted."""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch import nn

from mep.conditional.frame_exit import (
    Cascade,
    FrameExit,
    Point,
    Seen,
    clip_times,
    export_cascade,
    replay,
    sweep_confidence,
    train_exits,
    train_gates,
    watch,
)
from mep.cost import profile
from mep.data import CLASSES, crop_flip, from_arrays, load, shapes_video
from mep.deploy import machine
from mep.store import Store
from mep.train import evaluating, fit, small_resnet

HERE = Path(__file__).parent
FAR = 1 << 40  # the index of the first test clip: no seed trains on them
SETTINGS = {
    "gates": [dict(beta=b) for b in (0.001, 0.003, 0.005, 0.01, 0.03, 0.1)],
    "answer": [
        dict(beta=b, growth=g, sees="answer")
        for g, betas in {
            0.5: (0.005, 0.01),
            0.25: (0.03, 0.05, 0.07, 0.1),
            0.0: (0.1, 0.14, 0.2),
        }.items()
        for b in betas
    ],
}
RULES = *SETTINGS, "confidence"
REPORTED = {
    k: lambda run, rule, k=k: rule[k]
    for k in ("accuracy", "frames", "exit_ms", "all_ms", "speedup")
} | dict(lost=lambda run, rule: run["full"] - rule["accuracy"])
THRESHOLDS = (
    0.0,
    0.3,
    0.4,
    0.5,
    0.6,
    0.65,
    0.7,
    0.725,
    0.75,
    0.775,
    0.8,
    0.825,
    0.85,
    0.9,
    0.95,
    0.98,
    1.0,
)


def augment(clips, rng):
    "The same shift and flip for all frames of a clip"
    return crop_flip(clips.flatten(1, 2), rng).view_as(clips)


def clips(a, seed):
    "Training, held-out and test clips as loaders"
    film = shapes_video(
        a.n_train + a.n_held_out, seed=seed + 1, difficulty=a.difficulty, frames=a.frames
    )
    test = shapes_video(a.n_test, seed=0, difficulty=a.difficulty, frames=a.frames, start=FAR)
    return from_arrays(
        film.x,
        film.y,
        test.x,
        test.y,
        n_valid=a.n_held_out,
        batch_size=64,
        seed=seed,
        classes=CLASSES,
        augment=augment,
        name="clips",
    )


def trained(a, seed, data):
    "Weights of backbone and exits, trained"
    pictures = load(
        "shapes", n_train=a.n_pictures, n_test=100, n_valid=0, difficulty=a.difficulty, seed=seed
    )
    common = dict(seed=seed, device="cpu", progress=False)
    start = time.perf_counter()
    net = fit(
        small_resnet(len(CLASSES), width=a.width, seed=seed),
        (pictures.train, None),
        a.picture_epochs,
        **common,
    ).model
    net = train_exits(build(a, net, seed), (data.train, None), a.epochs, **common).model
    return dict(net.state_dict()), dict(seconds=time.perf_counter() - start)


def build(a, net, seed):
    "FrameExit on a classifier of pictures"
    return FrameExit(
        nn.Sequential(net.stem, net.blocks, *net.head[:2]),
        len(CLASSES),
        a.frames,
        head=net.head[2],
        seed=seed,
    )


def halves(seen):
    return Seen(*(t[0::2] for t in seen)), Seen(*(t[1::2] for t in seen))


def crosswise(net, held_out, setting, seed):
    "Frames and accuracy of a setting on all held-out clips, each judged by gates trained on the other half"
    a, b = halves(held_out)
    parts = [
        measured(train_gates(net, mine, **setting, seed=seed), theirs, 0.5, "gate")
        for mine, theirs in ((a, b), (b, a))
    ]
    return Point(setting, *(mean(p[k] for p in parts) for k in ("frames", "accuracy")))


def cheapest(points, clips, tolerance):
    "The setting with the fewest frames among those that keep the accuracy of all frames on these clips"
    full = (clips.logits[:, -1].argmax(1) == clips.y).float().mean().item()
    kept = [p for p in points if p.accuracy >= full - tolerance]
    return min(kept, key=lambda p: p.frames).setting if kept else None


@torch.no_grad()
def spaced(net, data, y, n):
    "Accuracy with k equally spaced frames, k from 1 to n, by the classifier of exit k"
    with evaluating(net):
        features = torch.cat(
            [net.backbone(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x, _ in data.test]
        )
    found = []
    for k in range(1, n + 1):
        z = features[:, [round((i + 0.5) * n / k - 0.5) for i in range(k)]].amax(1)
        found.append((net.classifiers[k - 1](z).argmax(1) == y).float().mean().item())
    return found


def measured(net, tests, setting, by):
    "Accuracy, frames and the share of clips that leave after each number of frames"
    out = replay(net, tests, setting, by)
    return dict(
        accuracy=(out.logits.argmax(1) == tests.y).float().mean().item(),
        frames=out.frames.float().mean().item(),
        left_at=[(out.frames == t + 1).float().mean().item() for t in range(tests.logits.shape[1])],
    )


def timed(a, net, data, threshold, by="gate"):
    "Latency in onnxruntime, clip by clip"
    x = torch.cat([x for x, _ in data.test])[: a.n_timed].numpy()
    with tempfile.TemporaryDirectory() as folder:
        t = clip_times(
            Cascade(export_cascade(net, folder)), x, threshold, by, clock=time.thread_time_ns
        )
    return dict(
        exit_ms=float(t.exit_ms.mean()),
        exit_ms_p95=float(np.percentile(t.exit_ms, 95)),
        all_ms=float(t.all_ms.mean()),
        timed_frames=float(t.frames.mean()),
        speedup=t.speedup,
    )


def network(a, seed, store):
    "The clips of a seed, its trained network, and how long that took"
    data = clips(a, seed)
    tensors, meta = store.cached(f"{seed}/net", partial(trained, a, seed, data))
    net = build(a, small_resnet(len(CLASSES), width=a.width), seed).eval()
    net.load_state_dict(tensors)
    return data, net, meta["seconds"]


def study(a, seed, store):
    "Accuracy and frames of one seed"
    data, net, seconds = network(a, seed, store)
    held_out, tests = watch(net, data.valid), watch(net, data.test)
    by_exit = (tests.logits.argmax(2) == tests.y[:, None]).float().mean(0).tolist()
    result = dict(
        seed=seed,
        full=by_exit[-1],
        by_exit=by_exit,
        spaced=spaced(net, data, tests.y, a.frames),
        seconds=seconds,
    )
    for rule, settings in SETTINGS.items():
        start = time.perf_counter()
        gated = [train_gates(net, held_out, **s, seed=seed) for s in settings]
        seconds = (time.perf_counter() - start) / len(settings)
        setting = cheapest(
            [crosswise(net, held_out, s, seed) for s in settings], held_out, a.tolerance
        )
        model, threshold = (gated[settings.index(setting)], 0.5) if setting else (net, 1.0)
        front = [
            dict(setting=s)
            | {k: v for k, v in measured(g, tests, 0.5, "gate").items() if k != "left_at"}
            for s, g in zip(settings, gated)
        ]
        result[rule] = measured(model, tests, threshold, "gate") | dict(
            setting=setting, seconds=seconds, front=front
        )
    threshold = cheapest(
        sweep_confidence(net, held_out, THRESHOLDS), held_out, a.tolerance
    )  # nothing to train: all of them may choose
    result["confidence"] = measured(net, tests, threshold, "confidence") | dict(
        setting=threshold, front=[p._asdict() for p in sweep_confidence(net, tests, THRESHOLDS)]
    )
    return {}, result


def timings(a, seed, store, run):
    "Latencies of the rules that `study` chose"
    data, net, _ = network(a, seed, store)
    held_out, found = watch(net, data.valid), {}
    for rule in SETTINGS:
        setting = run[rule]["setting"]
        found[rule] = (
            timed(a, train_gates(net, held_out, **setting, seed=seed), data, 0.5)
            if setting
            else timed(a, net, data, 1.0)
        )
    return {}, found | dict(
        confidence=timed(a, net, data, run["confidence"]["setting"], "confidence")
    )


def spread(values):
    return dict(mean=mean(values), sd=stdev(values) if len(values) > 1 else None, n=len(values))


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--frames", type=int, default=10)
    p.add_argument("--difficulty", type=float, default=0.3)
    p.add_argument("--width", type=int, default=16)
    p.add_argument("--n-pictures", type=int, default=4000)
    p.add_argument("--picture-epochs", type=int, default=16)
    p.add_argument("--n-train", type=int, default=2400, help="clips")
    p.add_argument("--epochs", type=int, default=6, help="over the clips")
    p.add_argument(
        "--n-held-out", type=int, default=4000, help="clips for the gates and the choice of beta"
    )
    p.add_argument("--n-test", type=int, default=3000)
    p.add_argument("--n-timed", type=int, default=500)
    p.add_argument(
        "--tolerance",
        type=float,
        default=0.003,
        help="accuracy that may be lost on the clips that choose",
    )
    p.add_argument("--store", default="runs/frame_exit")
    a = p.parse_args()
    torch.set_num_threads(1)
    store, runs = Store(a.store), []
    for seed in range(a.seeds):
        runs.append(store.cached(f"{seed}/study", partial(study, a, seed, store)).meta)
        r = runs[-1]
        for rule, ms in store.cached(
            f"{seed}/times", partial(timings, a, seed, store, r)
        ).meta.items():
            r[rule] |= ms
        print(
            f"seed {seed}: all frames {r['full']:.4f}; "
            + "; ".join(
                f"{k} {r[k]['accuracy']:.4f} with {r[k]['frames']:.2f} frames ({r[k]['setting']})"
                for k in RULES
            ),
            flush=True,
        )
    summary = {
        rule: {
            k: spread([f(r, r[rule]) for r in runs])
            for k, f in REPORTED.items()
            if k in runs[0][rule] or k == "lost"
        }
        for rule in RULES
    }
    summary["all frames"] = dict(accuracy=spread([r["full"] for r in runs]))
    result = dict(
        what="FrameExit on generated clips: gates and confidence, chosen on held-out clips, against all frames",
        machine=machine(),
        settings=vars(a),
        macs_per_frame=profile(small_resnet(len(CLASSES), width=a.width), (3, 32, 32)).macs,
        summary=summary,
        runs=runs,
    )
    (HERE / "results" / "frame_exit.json").write_text(json.dumps(result, indent=1) + "\n")
    for rule, found in summary.items():
        print(
            f"{rule:12}"
            + "  ".join(f"{k} {v['mean']:.4f} +- {v['sd'] or 0:.4f}" for k, v in found.items())
        )


if __name__ == "__main__":
    main()
