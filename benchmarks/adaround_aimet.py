"""AdaRound against AIMET's: one trained network, the same calibration images and bit widths,
every method in a process of its own.

    MEP_DATA=/path/to/data python benchmarks/adaround_aimet.py              # everything;
    about half an hour on 2 quiet cores
    MEP_DATA=/path/to/data python benchmarks/adaround_aimet.py --only gram_w4
    aimet_adaround_500 --repeats 3

The network is a pretrained CIFAR-10 ResNet-20
(MEP_DATA/weights/resnet20_cifar10.safetensors, 91.73 % top-1). Weights have one symmetric
scale per layer, activations 8 bits. AIMET gets its own virtual environment (--aimet-env,
default runs/aimet), made on the first run with pinned versions. Prints one JSON line per
method and run; writes benchmarks/results/adaround_resnet20.json."""

import argparse
import json
import os
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
AIMET = ["aimet-torch==2.42.0", "torch==2.15.0", "torchvision==0.29.2"]
# name -> how to make the quantized network: ("aimet", iterations or None for nearest) or (our function, its arguments)
METHODS = {
    "nearest_w4": ("quantize", dict(w_bits=4)),
    "aimet_nearest_w4": ("aimet", None),
    "gram_w4": ("adaround", dict(w_bits=4)),
    "aimet_adaround_500": ("aimet", 500),
    "gram_w4_fast": ("adaround", dict(w_bits=4, effort=0)),
    "gram_w4_best": ("adaround", dict(w_bits=4, effort=16, samples=2**17)),
    "gram_w4_plain": ("adaround", dict(w_bits=4, effort=0, refit=False, residual=False)),
    "sampled_w4_500": ("adaround", dict(w_bits=4, method="sampled", iterations=500)),
    "nearest_w3": ("quantize", dict(w_bits=3)),
    "gram_w3": ("adaround", dict(w_bits=3)),
    "nearest_w2": ("quantize", dict(w_bits=2)),
    "gram_w2": ("adaround", dict(w_bits=2)),
    "gram_w4_per_channel": ("adaround", dict(w_bits=4, per_channel=True)),
    "nearest_w8": ("quantize", dict(w_bits=8)),
    "gram_w8": ("adaround", dict(w_bits=8)),
    "mobilenet": ("zoo", dict(name="mobilenet_cifar10", widths=(4, 3))),
    "rounding_table": ("table", dict(draws=100, images=1000)),
}
DEFAULT_ITERATIONS = 15_000  # AIMET's below 8 bits


def resnet20(weights):
    "The CIFAR ResNet-20, trained"
    from networks import ResNet20
    from safetensors.torch import load_file

    net = ResNet20()
    net.load_state_dict(load_file(weights))
    return net.eval()


def cifar10(root, train):
    "All images, normalised as the network expects, and their labels"
    import numpy as np
    import torch

    files = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    parts = [
        pickle.loads((root / "cifar-10-batches-py" / f).read_bytes(), encoding="latin1")
        for f in files
    ]  # the data set's own format
    x = (
        torch.from_numpy(np.concatenate([p["data"] for p in parts]).reshape(-1, 3, 32, 32)).float()
        / 255
    )
    mean, std = (
        torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1),
        torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1),
    )
    return (x - mean) / std, torch.tensor([y for p in parts for y in p["labels"]])


def make_files(root, folder, n_calib, n_test):
    "The images that all methods get, as files"
    import torch

    x, _ = cifar10(root, train=True)
    torch.save(
        x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:n_calib]].clone(),
        folder / "calib.pt",
    )
    x, y = cifar10(root, train=False)
    torch.save((x[:n_test].clone(), y[:n_test].clone()), folder / "test.pt")
    net = resnet20(root / "weights" / "resnet20_cifar10.safetensors")
    torch.save(run(net, x[:n_test]), folder / "reference.pt")


def run(net, x):
    import torch

    with torch.no_grad():
        return torch.cat([net(b) for b in x.split(250)])


def by_aimet(net, calib, iterations, folder):
    "AIMET's AdaRound, or nearest rounding with its ranges; weights 4 bits per tensor, activations 8"
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.nn import QuantizationMixin
    from aimet_torch.nn.modules.custom import Add
    from aimet_torch.quantsim import QuantizationSimModel

    config = folder / "per_tensor.json"
    config.write_text(
        json.dumps(
            dict(
                defaults=dict(
                    ops=dict(is_output_quantized="True"),
                    params=dict(is_quantized="True", is_symmetric="True"),
                    strict_symmetric="False",
                    per_channel_quantization="False",
                ),
                params=dict(bias=dict(is_quantized="False")),
                op_type={},
                supergroups=[dict(op_list=[a, "Relu"]) for a in ("Conv", "Add", "Gemm")],
                model_input=dict(is_input_quantized="True"),
                model_output={},
            )
        )
    )
    for block in (
        *net.layer1,
        *net.layer2,
        *net.layer3,
    ):  # it quantizes modules, and knows the sum as its own; a shortcut only moves numbers
        block.add = Add()
        if type(block.shortcut).__name__ == "Shortcut":
            QuantizationMixin.ignore(type(block.shortcut))
    fold_all_batch_norms(net, (1, 3, 32, 32), calib[:1])
    scheme, common = QuantScheme.post_training_tf_enhanced, dict(default_param_bw=4)
    if iterations:
        batches = list(calib.split(32))
        params = AdaroundParameters(
            batches,
            len(batches),
            default_num_iterations=iterations,
            forward_fn=lambda model, x: model(x),
        )
        net = Adaround.apply_adaround(
            net,
            calib[:1],
            params,
            str(folder),
            "adaround",
            default_quant_scheme=scheme,
            default_config_file=str(config),
            **common,
        )
    sim = QuantizationSimModel(
        net, calib[:1], quant_scheme=scheme, default_output_bw=8, config_file=str(config), **common
    )
    if iterations:
        sim.set_and_freeze_param_encodings(str(folder / "adaround.encodings"))
    sim.compute_encodings(lambda model, _: run(model, calib), None)
    return sim.model


def by_mep(net, calib, function, options):
    import mep.quant

    return getattr(mep.quant, function)(net, calib, progress=False, **options)


def rounding_table(net, calib, folder, draws, images):
    "The talk's table: the first layer at 4 bits, everything else in float"
    import torch

    from mep.quant.sim import quantize

    qm = (
        quantize(net, calib, w_bits=4, a_bits=None, progress=False)
        .set_enabled(weights=False)
        .set_enabled("conv1", weights=True)
    )
    layer, (x, y) = qm.layers()["conv1"], torch.load(folder / "test.pt")
    steps, random = (layer.weight / layer.scale).detach(), torch.Generator().manual_seed(0)

    def top1(q):
        layer.set_weight_q(q.clamp(layer.grid.qmin, layer.grid.qmax))
        return (run(qm, x[:images]).argmax(1) == y[:images]).float().mean().item()

    table = dict(
        float=(run(net, x[:images]).argmax(1) == y[:images]).float().mean().item(),
        nearest=top1(steps.round()),
        floor=top1(steps.floor()),
        ceil=top1(steps.ceil()),
    )
    random_ones = [
        top1((steps + torch.rand(steps.shape, generator=random)).floor()) for _ in range(draws)
    ]
    return table | dict(
        stochastic_mean=statistics.mean(random_ones),
        stochastic_std=statistics.stdev(random_ones),
        stochastic_best=max(random_ones),
        better_than_nearest=sum(a > table["nearest"] for a in random_ones),
        draws=draws,
        images=images,
    )


def zoo(name, widths, calib=1024):
    "A network of MobileNetV2 type that train_zoo.py trained, at some widths of the weights"
    from train_zoo import load_zoo

    from mep import data, train
    from mep.quant import adaround, sim

    net, sets = load_zoo(name), data.load("cifar10", n_valid=1000)
    images, (want, y) = data.calibration(sets, calib), train.logits(net, sets.test)
    record = dict(
        network=name, float_top1=(want.argmax(1) == y).float().mean().item(), images=len(y)
    )
    for bits in widths:
        for how, function in (("nearest", sim.quantize), ("gram", adaround)):
            start = time.perf_counter()
            quantized = function(net, images, bits, progress=False)
            seconds, got = time.perf_counter() - start, train.logits(quantized, sets.test)[0]
            record[f"{how}_w{bits}"] = dict(
                top1=(got.argmax(1) == y).float().mean().item(),
                agreement=train.agreement(want, got),
                sqnr_db=train.sqnr_db(want, got),
                seconds=seconds,
            )
    return record


def peak_mb():
    "Most memory this process has held; getrusage would count the parent's, too"
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return (
        next(
            int(line.split()[1])
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
        * 1.024e-3
    )


def worker(name, root, folder, threads):
    "One method, in this process; prints its record as JSON"
    import torch

    torch.set_num_threads(threads)
    kind, options = METHODS[name]
    net, calib = (
        resnet20(root / "weights" / "resnet20_cifar10.safetensors"),
        torch.load(folder / "calib.pt"),
    )
    if kind == "aimet":
        import aimet_torch  # noqa: F401
    else:
        import mep.quant.adaround  # noqa: F401
    if kind == "zoo":
        print(json.dumps(dict(method=name, **zoo(**options))))
        return
    if kind == "table":
        print(json.dumps(dict(method=name, **rounding_table(net, calib, folder, **options))))
        return
    before, start, cpu = peak_mb(), time.perf_counter(), time.process_time()
    quantized = (
        by_aimet(net, calib, options, folder)
        if kind == "aimet"
        else by_mep(net, calib, kind, options)
    )
    record = dict(
        method=name,
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu,
        peak_mb=peak_mb(),
        added_mb=peak_mb() - before,
    )
    (x, y), want = torch.load(folder / "test.pt"), torch.load(folder / "reference.pt")
    got = run(quantized.eval(), x)
    noise = (want.double() - got.double()).square().sum()
    record |= dict(
        top1=(got.argmax(1) == y).float().mean().item(),
        agreement=(got.argmax(1) == want.argmax(1)).float().mean().item(),
        sqnr_db=(10 * (want.double().square().sum() / noise).log10()).item(),
        images=len(x),
    )
    print(json.dumps(record))


def aimet_python(env):
    "The interpreter of AIMET's virtual environment, made if it is not there"
    python = env / "bin" / "python"
    if not python.exists():
        print(f"making {env.name} with {', '.join(AIMET)}", file=sys.stderr)
        venv.create(env, with_pip=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *AIMET, "safetensors"], check=True
        )
    return python


def summarize(runs):
    "Per method the median of its times, and whatever does not change from run to run"
    methods = {}
    for name in dict.fromkeys(r["method"] for r in runs):
        mine = [r for r in runs if r["method"] == name]
        methods[name] = dict(mine[0], runs=len(mine)) | {
            k: statistics.median(r[k] for r in mine)
            for k in ("seconds", "cpu_seconds", "peak_mb", "added_mb")
            if k in mine[0]
        }
    if "aimet_adaround_500" in methods:
        near, some = (
            methods.get("aimet_nearest_w4", dict(seconds=0))["seconds"],
            methods["aimet_adaround_500"],
        )
        methods["aimet_adaround_defaults"] = dict(
            seconds=near + (some["seconds"] - near) * DEFAULT_ITERATIONS / 500,
            not_run=True,
            note=f"time for {DEFAULT_ITERATIONS:,} iterations, extrapolated from 500; not run",
        )
    return methods


def main(args):
    root = Path(os.environ.get("MEP_DATA", ""))
    if not (root / "cifar-10-batches-py").is_dir():
        sys.exit(
            "MEP_DATA must name the folder that holds cifar-10-batches-py and weights/resnet20_cifar10.safetensors"
        )
    os.environ.update(
        OMP_NUM_THREADS=str(args.threads), OMP_WAIT_POLICY="PASSIVE", TQDM_DISABLE="1"
    )  # before torch is imported, here and in the workers
    result, runs = HERE / "results" / "adaround_resnet20.json", []
    if args.add and result.exists():
        runs = json.loads(result.read_text())["all_runs"]
    with tempfile.TemporaryDirectory() as folder:
        make_files(root, Path(folder), args.calib, args.images)
        for _ in range(args.repeats):
            for name in args.only or METHODS:
                python = (
                    aimet_python(args.aimet_env) if METHODS[name][0] == "aimet" else sys.executable
                )
                done = subprocess.run(
                    [
                        python,
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
                    print(f"{name} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
                    continue
                runs.append(
                    json.loads(done.stdout.splitlines()[-1]) | dict(load=os.getloadavg()[0])
                )
                print(json.dumps(runs[-1]), flush=True)
                write(result, runs, args)


def write(result, runs, args):
    from mep.deploy import machine
    from mep.store import write_atomic

    about = dict(
        network="ResNet-20",
        data="CIFAR-10",
        float_top1=0.9173,
        calibration_images=args.calib,
        threads=args.threads,
        seed=0,
        aimet=AIMET,
        machine=machine(),
    )
    write_atomic(
        result,
        json.dumps(dict(about=about, methods=summarize(runs), all_runs=runs), indent=1).encode(),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=METHODS, help="methods to run; default: all")
    parser.add_argument("--repeats", type=int, default=1, help="rounds over all methods")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calib", type=int, default=1024, help="calibration images")
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument(
        "--add", action="store_true", help="keep the runs that the results file already has"
    )
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
