"""INT8 with less than 1 % loss? Every pretrained network we have, quantized in six ways,
measured from the files that onnxruntime runs.

    MEP_DATA=/path/to/data python benchmarks/zoo.py                          # our networks;
    a quarter of an hour on 2 cores
    MEP_DATA=/path/to/data python benchmarks/zoo.py --only resnet20
    python benchmarks/zoo.py --torchvision resnet18 mobilenet_v2             #
    torchvision's, with ImageNet weights: needs a connection, or weights downloaded before
    python benchmarks/zoo.py --torchvision resnet50 --images folder:imagenet # judged on
    50,000 validation images: a folder with val/ and train/, or with labels.csv

Without --images, torchvision's networks are judged on Imagenette's validation images, ten
of ImageNet's classes (downloaded, too), as 1000-class networks. Calibration images are
training images. MobileNetV1 has 500 validation images: it is calibrated on 90 and judged on
400 others. Finished networks wait in runs/zoo and are not computed again; results go to
benchmarks/results/zoo.json, where other networks' results are kept."""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
import urllib.error
from pathlib import Path

import torch
import torchvision

import mep
from mep import deploy, store
from mep.data import calibration
from mep.pipeline.convert import open_network
from mep.pipeline.core import (
    Config,
    check_facts,
    cost_facts,
    measure_files,
    quantization_notes,
    quantize_by,
)
from mep.quant.export import export_int8

HERE = Path(__file__).resolve().parent
WAYS = {  # row of the table -> method, bits of the weights, a range per output channel, whether it sees images
    "W8A8 nearest, per layer": ("nearest", 8, False, True),
    "W8A8 dfq, per layer, no data": ("dfq", 8, False, False),
    "W8A8 adaround, per layer": ("adaround", 8, False, True),
    "W8A8 nearest, per channel": ("nearest", 8, True, True),
    "W4A8 nearest, per channel": ("nearest", 4, True, True),
    "W4A8 adaround, per channel": ("adaround", 4, True, True),
}
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def ours(root):
    "name -> options of `mep quantize`; weights are looked for in `root` and in benchmarks/weights"
    file, weights = HERE / "networks.py", HERE / "weights"
    nets = {
        "resnet20": dict(
            weights=root / "weights" / "resnet20_cifar10.safetensors", data="cifar10", **IMAGENET
        ),
        "mobilenet_v1": dict(
            weights=root / "weights" / "mobilenet_v1_0.25_128.safetensors",
            data=f"folder:{root}/imagenet_val500",
            size=128,
            resize=146,
            n_train=90,
            n_test=400,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
        ),
        "mobilenet_cifar10": dict(
            weights=weights / "mobilenet_cifar10.safetensors", data="cifar10"
        ),
        "resnet_cifar10": dict(weights=weights / "resnet_cifar10.safetensors", data="cifar10"),
        "mobilenet_fashion": dict(
            weights=weights / "mobilenet_fashion.safetensors", data="fashion_mnist"
        ),
    }
    return {
        name: Config(model=f"{file}:{name}", **o | dict(weights=str(o["weights"])))
        for name, o in nets.items()
    }


def from_torchvision(name, images, folder):
    "The options for a network of torchvision, whose ImageNet weights are fetched into `folder`"
    try:
        known = torchvision.models.get_model_weights(name).DEFAULT
    except ValueError:
        sys.exit(
            f"torchvision has no network {name!r}; it has "
            f"{', '.join(torchvision.models.list_models(module=torchvision.models))}"
        )
    try:
        state = known.get_state_dict(progress=True, check_hash=True)
    except (urllib.error.URLError, OSError) as e:
        sys.exit(
            f"no connection: the weights of {name} can't be fetched ({e}). Download "
            f"{known.url}\non another machine, put the file into {torch.hub.get_dir()}/checkpoints, and run this again"
        )
    path, t = folder / f"{name}.pth", known.transforms()
    torch.save(state, path)
    return Config(
        model=f"torchvision:{name}",
        weights=str(path),
        data=images,
        size=t.crop_size[0],
        resize=t.resize_size[0],
        mean=tuple(t.mean),
        std=tuple(t.std),
    )


def quantized(net, data, way, path, args):
    "Write one way's file; what is known about it"
    method, w_bits, per_channel, sees = WAYS[way]
    images, start = (
        calibration(data, min(args.calib, len(data.train.dataset)), args.seed) if sees else None,
        time.perf_counter(),
    )
    q = quantize_by(
        method,
        net,
        images,
        data.input_shape,
        w_bits,
        per_channel=per_channel,
        seed=args.seed,
        checkpoint=path.with_suffix(".unfinished"),
        progress=False,
    )
    seconds = time.perf_counter() - start
    return (
        cost_facts(net, data.input_shape, q)
        | check_facts(export_int8(q, path))
        | dict(
            seconds=seconds, n_calib=len(images) if sees else 0, notes=quantization_notes(way, q)
        )
    )


def measure(name, config, args):
    "The table of one network"
    net, data = open_network(config)
    with tempfile.TemporaryDirectory() as d:
        files = {"FP32": deploy.export_onnx(net, Path(d) / "fp32.onnx", data.input_shape)}
        facts = {"FP32": cost_facts(net, data.input_shape)}
        for i, way in enumerate(WAYS):
            files[way] = Path(d) / f"{i}.onnx"
            facts[way] = quantized(net, data, way, files[way], args)
            print(f"{name}: {way}, {facts[way]['seconds']:.1f} s", flush=True)
        rows = measure_files(files, data.test, data.input_shape, args.threads, args.timings)
        rows = {
            way: rows[way] | facts[way] | dict(bytes=deploy.file_size(f))
            for way, f in files.items()
        }
    record = dict(
        data=config.data.rpartition("/")[2],
        n_test=len(data.test.dataset),
        input_shape=list(data.input_shape),
        rows=rows,
    )
    return record | dict(
        seed=args.seed, threads=args.threads, machine=deploy.machine() | dict(mep=mep.__version__)
    )


def identity(config, args):
    "What the numbers depend on"
    digest = hashlib.sha256(Path(config.weights).read_bytes()).hexdigest()
    return store.content_hash(
        json.loads(
            json.dumps(
                [
                    WAYS,
                    digest,
                    config.data,
                    config.n_test,
                    args.seed,
                    args.calib,
                    args.threads,
                    args.timings,
                ]
            )
        )
    )[:12]


def main(args):
    root, kept = Path(os.environ.get("MEP_DATA", "data")), store.Store(HERE.parent / "runs" / "zoo")
    result = HERE / "results" / "zoo.json"
    found = json.loads(result.read_text()) if result.exists() else {}
    with tempfile.TemporaryDirectory() as d:
        nets = {n: from_torchvision(n, args.images, Path(d)) for n in args.torchvision} or ours(
            root
        )
        for name in args.only or nets:
            if not Path(nets[name].weights).is_file():
                print(
                    f"{name} is left out: {Path(nets[name].weights).name} is not there",
                    file=sys.stderr,
                )
                continue
            key = f"{name}-{identity(nets[name], args)}"
            if args.redo and key in kept:
                kept.delete(key)
            found[name] = kept.cached(key, lambda: (None, measure(name, nets[name], args))).meta
            store.write_atomic(result, (json.dumps(found, indent=1) + "\n").encode())
            show(name, found[name])


def show(name, record):
    print(f"\n{name}, {record['n_test']:,} test images of {record['data']}")
    for way, r in record["rows"].items():
        like = f"{r['agreement']:7.1%} {r['sqnr_db']:5.1f} dB" if "agreement" in r else " " * 16
        print(
            f"  {way:28} {r['accuracy']:6.2%} ± {r['accuracy_se']:.2%} {like} "
            f"{r['bytes'] / 1000:8,.0f} kB {r['ms']:7.3f} ms"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="*",
        choices=list(ours(Path("."))),
        help="networks of ours to measure; default: all",
    )
    parser.add_argument(
        "--torchvision",
        nargs="*",
        default=[],
        metavar="NAME",
        help="networks of torchvision instead of ours",
    )
    parser.add_argument(
        "--images",
        default="imagenette",
        help="data set for torchvision's networks: imagenette or folder:PATH",
    )
    parser.add_argument("--calib", type=int, default=512, help="calibration images at most")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of onnxruntime while timing"
    )
    parser.add_argument("--timings", type=int, default=200, help="of each file, in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--redo", action="store_true", help="measure again what is kept")
    main(parser.parse_args())
