"""Data-free quantization on real networks, beside AIMET's equalization: the same images, 8-bit
activations, one weight scale per layer.

    MEP_DATA=/path/to/data python benchmarks/dfq.py                      # all networks;
    some 10 minutes on 2 cores
    MEP_DATA=/path/to/data python benchmarks/dfq.py --only mobilenet_v1  # one of them; the
    others' results are kept

Networks: MobileNetV1 x0.25 with its ImageNet weights on 500 validation images, ResNet-20 on
the CIFAR-10 test images, and a network of MobileNetV2's kind that benchmarks/train_zoo.py
trains on CIFAR-10, as it is and with its channels unbalanced. Calibration images are
training images (ImageNet: 64 of the 500). AIMET gets its own virtual environment
(--aimet-env, default runs/aimet), made on the first run with pinned versions. Writes
benchmarks/results/dfq.json."""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from adaround_aimet import AIMET, aimet_python, cifar10, resnet20, run
from networks import MobileNetV1
from torch import nn

HERE = Path(__file__).resolve().parent


def mobilenet_v1(root):
    from safetensors.torch import load_file

    net = MobileNetV1()
    net.load_state_dict(load_file(root / "weights" / "mobilenet_v1_0.25_128.safetensors"))
    return net.eval()


def imagenet(root):
    "The 500 validation images at 128 px, flipped as the weights ask for, and their labels"
    import numpy as np
    from PIL import Image
    from torchvision.transforms.functional import center_crop, resize

    rows = list(csv.DictReader((root / "imagenet_val500" / "labels.csv").open()))
    images = [
        center_crop(
            resize(Image.open(root / "imagenet_val500" / r["file"]).convert("RGB"), 146), 128
        )
        for r in rows
    ]
    x = (
        torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float()
        / 127.5
        - 1
    )
    return x.flip(2, 3).contiguous(), torch.tensor([int(r["class_index"]) for r in rows])


def networks(root):
    "name -> (network, its data: 'imagenet' or 'cifar10'); the zoo's are left out where they were not trained"
    nets = {
        "mobilenet_v1": (mobilenet_v1(root), "imagenet"),
        "resnet20": (resnet20(root / "weights" / "resnet20_cifar10.safetensors"), "cifar10"),
    }
    try:
        from train_zoo import load_zoo

        from mep.quant.dfq import unbalance

        net = load_zoo("mobilenet_cifar10")
        nets |= {
            "mobilenet_cifar10": (net, "zoo"),
            "mobilenet_cifar10_unbalanced": (unbalance(net), "zoo"),
        }
    except FileNotFoundError as e:
        print(e, file=sys.stderr)
    return nets


def images(kind, root):
    "(calibration images to draw from, test images, test labels)"
    if kind == "imagenet":
        x, y = imagenet(root)
        return x, x, y
    if kind == "cifar10":
        return (cifar10(root, train=True)[0], *cifar10(root, train=False))
    from mep import data

    sets = data.load("cifar10", root=root, seed=0, n_valid=1000)
    x, y = (torch.cat(t) for t in zip(*sets.test))
    return data.calibration(sets, 1024), x, y


def score(got, want, y):
    "What is reported of a network's logits"
    top1 = (got.argmax(1) == y).float().mean().item()
    noise = (want.double() - got.double()).square().sum()
    return dict(
        top1=top1,
        stderr=(top1 * (1 - top1) / len(y)) ** 0.5,
        agreement=(got.argmax(1) == want.argmax(1)).float().mean().item(),
        sqnr_db=(10 * (want.double().square().sum() / noise).log10()).item(),
    )


def methods(net, shape):
    "name -> function from calibration images and seed to a quantized network"
    from mep.quant.dfq import absorb_bias, correct_bias, dfq, equalize, prepare, relu6_to_relu
    from mep.quant.sim import quantize

    def q(change, fix=lambda q, c: q, **kw):
        return lambda calib, seed: fix(quantize(change(net), calib, progress=False, **kw), calib)

    def analytic(qm, calib):
        return correct_bias(qm, method="analytic")

    def empirical(qm, calib):
        return correct_bias(qm, calib, "empirical")

    def paper(net):
        return equalize(net, activations=False)

    def absorbed(net):
        return absorb_bias(equalize(net))

    found = {
        "W8A8 nearest": q(prepare),
        "W8A8 nearest, per channel": q(prepare, per_channel=True),
        "W8A8 equalized, weights alone": q(paper),
        "W8A8 equalized, weights alone, biases (analytic)": q(paper, analytic),
        "W8A8 ReLU6 -> ReLU, equalized": q(lambda net: equalize(relu6_to_relu(net))),
        "W8A8 equalized": q(equalize),
        "W8A8 equalized, absorbed": q(absorbed),
        "W8A8 equalized, biases (analytic)": q(equalize, analytic),
        "W8A8 equalized, biases (empirical)": q(equalize, empirical),
        "W8A8 dfq, no data": lambda calib, seed: dfq(
            net, input_shape=shape, seed=seed, progress=False
        ),
        "W8A8 dfq, 64 images": lambda calib, seed: dfq(net, calib, progress=False),
    }
    for bits in (6, 4):
        found |= {
            f"W{bits}A8 nearest": q(prepare, w_bits=bits),
            f"W{bits}A8 nearest, biases (empirical)": q(prepare, empirical, w_bits=bits),
            f"W{bits}A8 equalized": q(equalize, w_bits=bits),
            f"W{bits}A8 equalized, biases (analytic)": q(equalize, analytic, w_bits=bits),
            f"W{bits}A8 equalized, biases (empirical)": q(equalize, empirical, w_bits=bits),
        }
    return found


def by_aimet(net, calib, equalized, per_channel, relu, folder):
    """AIMET's fold and, if `equalized`, its equalization; 8 bits; a quantized network. Its
    equalization passes over ReLU6, which `relu` replaces"""
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.cross_layer_equalization import equalize_model
    from aimet_torch.quantsim import QuantizationSimModel

    config = folder / "config.json"
    config.write_text(
        json.dumps(
            dict(
                defaults=dict(
                    ops=dict(is_output_quantized="True"),
                    params=dict(is_quantized="True", is_symmetric="True"),
                    strict_symmetric="False",
                    per_channel_quantization=str(per_channel),
                ),
                params=dict(bias=dict(is_quantized="False")),
                op_type={},
                supergroups=[
                    dict(op_list=[a, b]) for a in ("Conv", "Add", "Gemm") for b in ("Relu", "Clip")
                ],
                model_input=dict(is_input_quantized="True"),
                model_output={},
            )
        )
    )
    if hasattr(net, "layer1"):
        from aimet_torch.nn import QuantizationMixin
        from aimet_torch.nn.modules.custom import Add

        for block in (*net.layer1, *net.layer2, *net.layer3):
            block.add = Add()
            if type(block.shortcut).__name__ == "Shortcut":
                QuantizationMixin.ignore(type(block.shortcut))
    if relu:
        for block in net.features:
            block.relu6 = nn.ReLU()
    if equalized:
        equalize_model(net, dummy_input=calib[:1])
    else:
        fold_all_batch_norms(net, tuple(calib[:1].shape))
    sim = QuantizationSimModel(
        net,
        calib[:1],
        quant_scheme=QuantScheme.post_training_tf,
        default_output_bw=8,
        default_param_bw=8,
        config_file=str(config),
    )
    for block in getattr(
        sim.model, "features", []
    ):  # its rule for Conv and ReLU6 misses depthwise layers, whose sums must not be rounded before the ReLU6
        block.conv.output_quantizers[0] = None
    sim.compute_encodings(lambda model, _: run(model, calib), None)
    return sim.model


AIMET_ROWS = {  # equalized, per channel, ReLU6 -> ReLU
    "AIMET nearest": (False, False, False),
    "AIMET nearest, per channel": (False, True, False),
    "AIMET equalized": (True, False, False),
    "AIMET ReLU6 -> ReLU, equalized": (True, False, True),
}


def worker(name, root, folder, threads):
    "AIMET's rows for one network, in AIMET's environment; prints one JSON line each"
    torch.set_num_threads(threads)
    calibs, x, y, want = torch.load(folder / "images.pt")
    for row, how in AIMET_ROWS.items():
        if how[-1] and name != "mobilenet_v1":
            continue
        for seed, calib in enumerate(calibs):
            net = (
                mobilenet_v1(root)
                if name == "mobilenet_v1"
                else resnet20(root / "weights" / "resnet20_cifar10.safetensors")
            )
            start = time.perf_counter()
            quantized = by_aimet(net, calib, *how, folder).eval()
            seconds = time.perf_counter() - start
            print(
                "RESULT "
                + json.dumps(
                    dict(name=row, seed=seed, seconds=seconds, **score(run(quantized, x), want, y))
                ),
                flush=True,
            )


def summary(runs):
    "Mean over the seeds, and the spread of what varies"
    rows = []
    for name in dict.fromkeys(r["name"] for r in runs):
        mine = [r for r in runs if r["name"] == name]
        rows.append(
            dict(name=name, seeds=len(mine))
            | {
                k: statistics.mean(r[k] for r in mine)
                for k in ("top1", "stderr", "agreement", "sqnr_db", "seconds")
            }
            | {
                f"{k}_sd": statistics.stdev(r[k] for r in mine)
                for k in ("top1", "agreement", "sqnr_db")
                if len(mine) > 1
            }
        )
    return rows


def measure(name, net, kind, root, args):
    "The table of one network"
    pool, x, y = images(kind, root)
    x, y = x[: args.images], y[: args.images]
    calibs = [
        pool[
            torch.randperm(len(pool), generator=torch.Generator().manual_seed(s))[: args.calib]
        ].clone()
        for s in range(args.seeds)
    ]
    want, runs = run(net, x), []
    for row, method in methods(net, tuple(x.shape[1:])).items():
        if args.rows and row not in args.rows:
            continue
        for seed, calib in enumerate(calibs):
            start = time.perf_counter()
            quantized = method(calib, seed)
            seconds = time.perf_counter() - start
            runs.append(
                dict(name=row, seed=seed, seconds=seconds, **score(run(quantized, x), want, y))
            )
            if hasattr(quantized, "steps"):
                runs[-1]["steps"] = [s._asdict() for s in quantized.steps]
            print(json.dumps(dict(network=name, **runs[-1])), flush=True)
    if name in ("mobilenet_v1", "resnet20") and not args.no_aimet:
        with tempfile.TemporaryDirectory() as folder:
            torch.save((calibs, x, y, want), Path(folder) / "images.pt")
            done = subprocess.run(
                [
                    aimet_python(args.aimet_env),
                    __file__,
                    "--worker",
                    name,
                    "--folder",
                    folder,
                    "--threads",
                    str(args.threads),
                ],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                print(f"AIMET failed on {name}:\n{done.stderr[-3000:]}", file=sys.stderr)
            runs += [
                json.loads(line.removeprefix("RESULT "))
                for line in done.stdout.splitlines()
                if line.startswith("RESULT ")
            ]
            for r in (r for r in runs if r["name"].startswith("AIMET")):
                print(json.dumps(dict(network=name, **r)))
    return dict(
        fp32=score(want, want, y) | dict(sqnr_db=None), images=len(y), rows=summary(runs), runs=runs
    )


def main(args):
    root = Path(os.environ.get("MEP_DATA", ""))
    if not (root / "weights").is_dir():
        sys.exit(
            "MEP_DATA must name the folder that holds weights, imagenet_val500 and cifar-10-batches-py"
        )
    import warnings

    from mep.deploy import machine
    from mep.store import write_atomic

    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    result = HERE / "results" / "dfq.json"
    for name, (net, kind) in networks(root).items():
        if not args.only or name in args.only:
            table = measure(name, net, kind, root, args)
            tables = (json.loads(result.read_text())["networks"] if result.exists() else {}) | {
                name: table
            }
            about = dict(
                calibration_images=args.calib,
                seeds=args.seeds,
                threads=args.threads,
                aimet=AIMET,
                machine=machine(),
            )
            write_atomic(result, json.dumps(dict(about=about, networks=tables), indent=1).encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="networks to measure; default: all")
    parser.add_argument("--rows", nargs="*", help="methods to measure, by name; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        help="of the calibration images, or of the noise that images are made from",
    )
    parser.add_argument("--calib", type=int, default=64, help="calibration images")
    parser.add_argument("--images", type=int, default=10_000, help="test images at most")
    parser.add_argument("--no-aimet", action="store_true", help="leave AIMET out")
    parser.add_argument(
        "--aimet-env",
        type=Path,
        default=HERE.parent / "runs" / "aimet",
        help="virtual environment of AIMET; made if it is not there",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, Path(os.environ["MEP_DATA"]), args.folder, args.threads)
    else:
        main(args)
