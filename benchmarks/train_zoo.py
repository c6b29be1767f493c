"""Train the networks that our quantization benchmarks use, on real data, and keep their
weights beside the training log.

    MEP_DATA=/path/to/data python benchmarks/train_zoo.py mobilenet_cifar10

The log is benchmarks/results/zoo_NAME.json, the weights are
benchmarks/weights/NAME.safetensors. An interrupted run goes on where it stopped.
`load_zoo(name)` gives the trained network back, ready to use."""

import argparse
import json
import time
from pathlib import Path

import torch

from mep import cost, data, deploy, store, train

HERE = Path(__file__).resolve().parent
# Networks, data and recipes: what to build, what to train it on, and how.
ZOO = {
    "mobilenet_cifar10": dict(
        net="small_mobilenet", options=dict(width=2.0), data="cifar10", epochs=40, lr=0.2, ema=0.999
    ),
    "resnet_cifar10": dict(
        net="small_resnet", options=dict(), data="cifar10", epochs=25, lr=0.2, ema=0.999
    ),
    "mobilenet_fashion": dict(
        net="small_mobilenet", options=dict(), data="fashion_mnist", epochs=20, lr=0.2, ema=0.999
    ),
}
SHAPES = {"cifar10": (3, 32, 32), "fashion_mnist": (1, 28, 28)}


def build(name):
    "The network of a zoo entry, with random weights."
    entry = ZOO[name]
    return train.reference(entry["net"], 10, SHAPES[entry["data"]], **entry["options"])


def load_zoo(name):
    """The trained network of a zoo entry, in eval mode. Raises ValueError for an unknown name,
    FileNotFoundError if it was not trained here."""
    if name not in ZOO:
        raise ValueError(f"unknown network {name!r}: the zoo has {', '.join(ZOO)}")
    path = HERE / "weights" / f"{name}.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"{path.name} is not there: train it with python benchmarks/train_zoo.py {name}"
        )
    net = build(name)
    net.load_state_dict(store.load(path).tensors)
    return net.eval()


def main(name, seed=0):
    entry, start = ZOO[name], time.perf_counter()
    sets = data.load(entry["data"], seed=seed, n_valid=1000)
    net, history = train.fit(
        build(name),
        sets,
        epochs=entry["epochs"],
        lr=entry["lr"],
        ema=entry["ema"],
        seed=seed,
        checkpoint=HERE.parent / "runs" / "zoo" / f"{name}.safetensors",
    )
    p = cost.profile(net, SHAPES[entry["data"]])
    record = dict(
        name=name,
        **entry,
        seed=seed,
        parameters=p.params,
        macs=p.macs,
        test_accuracy=train.accuracy(net, sets.test),
        n_test=len(sets.test.dataset),
        seconds=sum(h["seconds"] for h in history),
        wall_seconds=time.perf_counter() - start,
        threads=torch.get_num_threads(),
        machine=deploy.machine(),
        history=history,
    )
    store.save(
        HERE / "weights" / f"{name}.safetensors",
        net.state_dict(),
        dict(name=name, test_accuracy=record["test_accuracy"]),
    )
    store.write_atomic(HERE / "results" / f"zoo_{name}.json", json.dumps(record, indent=1).encode())
    print(
        f"{name}: {record['test_accuracy']:.2%} on {record['n_test']} test images, {p.params:,} "
        f"parameters, {p.macs / 1e6:.1f} MMACs, {record['seconds'] / 60:.1f} minutes"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="+", choices=ZOO)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    for n in a.name:
        main(n)
