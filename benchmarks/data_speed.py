"""How fast pictures are drawn, and how fast the loaders hand them out, on one thread; the
generators' fingerprint.

    python benchmarks/data_speed.py [--rounds 10]   # under a minute; writes results/data_speed.json

Speeds are per second of processor time, so that other work on the machine disturbs them
little. With MEP_DATA set, the loaders of the real sets found there are timed as well."""

import argparse
import hashlib
import json
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from mep import data  # noqa: E402

SEED = 0
GENERATORS = {
    "shapes": (data.shapes, 2000),
    "shapes_detection": (data.shapes_detection, 500),
    "shapes_segmentation": (data.shapes_segmentation, 500),
    "shapes_video": (data.shapes_video, 250),
}


def per_second(work, n, rounds):
    """Mean, deviation and range of `n` things per second of processor time, after one round
    that is not counted."""
    work()
    speeds = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        speeds.append(n / (time.process_time() - start))
    return dict(
        mean=round(statistics.mean(speeds)),
        sd=round(statistics.stdev(speeds)),
        min=round(min(speeds)),
        max=round(max(speeds)),
        rounds=rounds,
    )


def fingerprint():
    "As in the chapter: SHA-256 over the pixels and answers of every generator."
    sets = (
        data.shapes(100),
        data.shapes_detection(10, objects=5),
        data.shapes_segmentation(10),
        data.shapes_video(5),
    )
    return hashlib.sha256(b"".join(v.numpy().tobytes() for s in sets for v in s)).hexdigest()


def loaders(rounds):
    "Training pictures per second, augmented and normalised, of each set that is at hand."
    speeds = {}
    for name in ("shapes", "digits", "fashion_mnist", "cifar10"):
        try:
            loader = data.load(name, seed=SEED, download=False).train
        except FileNotFoundError:
            continue  # not on this machine
        n = len(loader) * loader.sampler.batch_size
        speeds[name] = per_second(lambda loader=loader: [None for _ in loader], n, rounds) | dict(
            batch_size=loader.sampler.batch_size
        )
    return speeds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    rounds = max(parser.parse_args().rounds, 2)
    torch.set_num_threads(1)
    result = dict(
        unit="pictures (clips for shapes_video) per second of processor time, one thread",
        generators={
            name: per_second(lambda make=make, n=n: make(n, seed=SEED), n, rounds)
            for name, (make, n) in GENERATORS.items()
        },
        loaders=loaders(max(rounds // 3, 2)),
        fingerprint=fingerprint(),
        seed=SEED,
        machine=dict(
            processor=platform.machine(), system=platform.system(), cores=os.cpu_count(), threads=1
        ),
        versions=dict(
            python=platform.python_version(), numpy=np.__version__, torch=torch.__version__
        ),
    )
    (Path(__file__).parent / "results" / "data_speed.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
