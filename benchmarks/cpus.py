"""One file on four kinds of processor: this machine, x86 without VNNI, ARM with and without
dot products, the last three emulated by qemu-user.

    apt install qemu-user
    MEP_DATA=/path/to/data python benchmarks/cpus.py                        # this machine
    and x86 without VNNI; about ten minutes of one core
    MEP_DATA=/path/to/data python benchmarks/cpus.py --arm /path/to/aarch64 # a folder with
    root/ (an aarch64 Debian's python3.11) and site/ (onnxruntime and numpy for it)

For each network three files of 8-bit activations and per-channel weights: ours (8 safe
bits), onnxruntime's `quantize_static` with its best settings, and the same with
`reduce_range` (7 bits), beside our own 7 bits. Asked of each: does every processor compute
the same as this one, does ours equal the simulation in every bit, and how much of the float
network's output is left. Also: which pairs of weights overflow, found by trying every pair
in every kind of layer. Results go to results/cpus.json."""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import torch  # noqa: E402
from export_parity import NETWORKS, Reader, network, pictures  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnxruntime.quantization import QuantType, quantize_static  # noqa: E402
from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: E402
from zoo import ours as zoo_configs  # noqa: E402

from mep.data import calibration  # noqa: E402
from mep.deploy import export_onnx, machine  # noqa: E402
from mep.pipeline.convert import open_network  # noqa: E402
from mep.quant import adaround, export_int8, overflows, quantize, without_vnni  # noqa: E402
from mep.train import sqnr_db  # noqa: E402

HERE = Path(__file__).resolve().parent
WORKER = """
import sys
import numpy as np
import onnxruntime as ort
for job in sys.argv[1:]:
    model, x, out = job.split(",")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    np.save(out, np.concatenate([session.run(None, {name: part[None]})[0] for part in np.load(x)]))
"""


# ---- processors


def processors(arm):
    "name -> the words in front of a Python script's name"
    found = {
        "this machine": [sys.executable],
        "x86 without VNNI": ["qemu-x86_64", "-cpu", "Haswell", sys.executable],
    }
    if arm:
        for name, cpu in (
            ("ARM without dot products", "cortex-a72"),
            ("ARM with dot products", "neoverse-n1"),
        ):
            found[name] = [
                "qemu-aarch64",
                "-cpu",
                cpu,
                "-L",
                f"{arm}/root",
                "-E",
                f"PYTHONPATH={arm}/site",
                f"{arm}/root/usr/bin/python3.11",
            ]
    return found


def run_there(words, jobs, folder):
    "Run files on a processor; `jobs` are (file, inputs, where to write the outputs)"
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    done = subprocess.run(
        [*words, str(worker), *(",".join(map(str, j)) for j in jobs)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(words[:3])} failed:\n{done.stderr[-2000:]}")
    return [np.load(out) for _, _, out in jobs]


# ---- which pairs overflow


def layer(kind, weight, shape, **attributes):
    "A file with one layer of integers: uint8 in, int8 weight, all scales 1 but the output's"
    constants = dict(
        one=np.float32(1), zero=np.uint8(0), w=weight, w_zero=np.int8(0), y_scale=np.float32(400)
    )
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "one", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "one", "w_zero"], ["wd"]),
        helper.make_node(kind, ["xd", "wd"], ["yd"], **attributes),
        helper.make_node("QuantizeLinear", ["yd", "y_scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "y_scale", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def convolution(c_in, k, groups=1, size=6, outputs=None, **attributes):
    """One output channel for each pair of weights, both 127, all others 0; returns the file,
    the input's shape and the pairs"""
    pairs = list(itertools.combinations(range(c_in * k * k), 2))[:outputs]
    pairs += pairs[: -len(pairs) % groups]
    weight = np.zeros((len(pairs), k, k, c_in), np.int8)
    for row, pair in zip(weight, pairs):
        row.reshape(-1)[list(pair)] = 127
    shape = [1, c_in * groups, size, size]
    return (
        layer(
            "Conv",
            np.ascontiguousarray(weight.transpose(0, 3, 1, 2)),
            shape,
            kernel_shape=[k, k],
            group=groups,
            **attributes,
        ),
        shape,
        pairs,
    )


def product(kind, inputs):
    pairs = list(itertools.combinations(range(inputs), 2))
    weight = np.zeros((inputs, len(pairs)), np.int8)
    for column, pair in enumerate(pairs):
        weight[list(pair), column] = 127
    return (
        (
            layer("Gemm", weight.T.copy(), [1, inputs], transB=1)
            if kind == "Gemm"
            else layer("MatMul", weight, [1, inputs])
        ),
        [1, inputs],
        pairs,
    )


def probes():
    return {
        "convolution 1x1, 8 inputs": convolution(8, 1),
        "convolution 1x1, 7 inputs": convolution(7, 1),
        "convolution 3x3, 1 input": convolution(1, 3),
        "convolution 3x3, 3 inputs": convolution(3, 3),
        "convolution 3x3, 4 inputs": convolution(4, 3),
        "convolution 3x3, 3 inputs, 5 outputs": convolution(3, 3, outputs=5),
        "convolution 3x3, stride 2": convolution(4, 3, strides=[2, 2]),
        "convolution 3x3, dilated": convolution(4, 3, dilations=[2, 2]),
        "convolution 5x5, 2 inputs": convolution(2, 5),
        "2 groups of 3 inputs, 3x3": convolution(3, 3, groups=2),
        "4 groups of 4 inputs, 1x1": convolution(4, 1, groups=4),
        "12 groups of 1 input and 3 outputs, 3x3": convolution(1, 3, groups=12),
        "depthwise, 36 channels, 3x3": convolution(1, 3, groups=36),
        "Gemm, 9 inputs": product("Gemm", 9),
        "Gemm, 16 inputs": product("Gemm", 16),
        "MatMul, 9 inputs": product("MatMul", 9),
    }


def overflowing(outputs, pairs):
    "The pairs whose sum, 255 (127 + 127), did not come out"
    rows = outputs[0].reshape(outputs.shape[1], -1)
    return [p for p, row in zip(pairs, rows) if (np.abs(row - 2 * 127 * 255) > 400).any()]


def probe(words, folder):
    found, tried = {}, probes()
    jobs = []
    for i, (file, shape, _) in enumerate(tried.values()):
        onnx.save(file, folder / f"probe{i}.onnx")
        np.save(folder / f"probe{i}.npy", np.full(shape, 255, np.uint8))
        jobs.append(
            (folder / f"probe{i}.onnx", folder / f"probe{i}.npy", folder / f"probe{i}.out.npy")
        )
    for (name, (_, _, pairs)), y in zip(tried.items(), run_there(words, jobs, folder)):
        bad = overflowing(y, pairs)
        neighbours = [p for p in pairs if p[0] % 2 == 0 and p[1] == p[0] + 1]
        found[name] = dict(
            tried=len(pairs),
            overflow=len(bad),
            neighbours=len(neighbours),
            just_the_neighbours=sorted(set(bad)) == sorted(set(neighbours)),
        )
    return found


# ---- networks


def networks(only):
    "name -> (network, calibration images, test images, how many of them the emulated processors see)"
    for name, config in zoo_configs(Path(os.environ["MEP_DATA"])).items():
        if only and name not in only:
            continue
        net, data = open_network(config)
        yield (
            name,
            net.cpu().eval(),
            calibration(data, min(1024, len(data.train.dataset)), 0),
            torch.cat([x for x, _ in data.test])[:1000],
            16,
        )
    for name in NETWORKS:
        if not only or name in only:
            yield name, network(name, 0), pictures(32, 1), pictures(32, 2), 2


def files(net, calib, test, folder):
    "name -> file, the simulations of ours, and the share of the float network's output that our 7 bits keep"
    made = {k: folder / f"{k}.onnx" for k in ("float", "ours", "static", "reduce_range")}
    export_onnx(net, made["float"], tuple(test.shape[1:]))
    qm = quantize(net, calib, per_channel=True, progress=False)
    export_int8(qm, made["ours"], min_sqnr_db=-99)
    quant_pre_process(made["float"], folder / "prepared.onnx")
    kinds = dict(activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True)
    for name in ("static", "reduce_range"):
        quantize_static(
            folder / "prepared.onnx",
            made[name],
            Reader(calib),
            reduce_range=name == "reduce_range",
            **kinds,
        )
    unbounded = quantize(net, calib, per_channel=True, progress=False, cpu="vnni")
    return made, qm, unbounded, quantize(net, calib, per_channel=True, w_bits=7, progress=False)


def outputs(net, x):
    return torch.cat([net(b) for b in x.split(8)])


@torch.no_grad()
def measure(net, calib, test, seen, where, folder):
    made, qm, unbounded, seven = files(net, calib, test, folder)
    want, few = outputs(net, test), test[:seen]
    np.save(folder / "all.npy", test.numpy())
    np.save(folder / "few.npy", few.numpy())
    ints = [k for k in made if k != "float"]
    native = dict(
        zip(
            ints,
            run_there(
                [sys.executable],
                [(made[k], folder / "all.npy", folder / f"{k}.all.npy") for k in ints],
                folder,
            ),
        )
    )
    db = lambda y: sqnr_db(want, torch.as_tensor(y))
    row = dict(
        images=len(test),
        seen=seen,
        sqnr_db={k: db(y) for k, y in native.items()}
        | dict(
            ours_7_bits=db(outputs(seven, test)), ours_without_limit=db(outputs(unbounded, test))
        ),
        overflows={k: sum(o.offending for o in overflows(made[k])) for k in ints},
        processors={},
    )
    simulated, cut = outputs(qm, few).numpy(), outputs(without_vnni(unbounded), few).numpy()
    export_int8(unbounded, made["ours"].with_name("unbounded.onnx"), min_sqnr_db=-99)
    for name, words in where.items():
        keys = [*ints, "unbounded"]
        ys = dict(
            zip(
                keys,
                run_there(
                    words,
                    [
                        (folder / f"{k}.onnx", folder / "few.npy", folder / f"{k}.few.npy")
                        for k in keys
                    ],
                    folder,
                ),
            )
        )
        here = {
            k: dict(
                sqnr_db=sqnr_db(want[:seen], torch.as_tensor(ys[k])),
                as_here=bool((ys[k] == native[k][:seen]).all()),
            )
            for k in ints
        }
        here["ours"] |= dict(
            every_bit=bool((ys["ours"] == simulated).all()),
            max_abs=float(np.abs(ys["ours"] - simulated).max()),
            parity_db=finite(sqnr_db(simulated, ys["ours"])),
        )
        here["unbounded"] = dict(
            sqnr_db=sqnr_db(want[:seen], torch.as_tensor(ys["unbounded"])),
            as_predicted=bool((ys["unbounded"] == cut).all()) if "without VNNI" in name else None,
        )
        row["processors"][name] = here
    return row


SEEDS = 3  # of adaround, whose results differ by a tenth of a decibel or two


@torch.no_grad()
def rounding(net, calib, test):
    """SQNR of 8-bit weights with the limit for pairs and without, to nearest and by adaround
    with several seeds, with a scale per channel and per layer: a list for each way"""
    want, found = outputs(net, test), {}
    for per_channel, way, cpu in itertools.product(
        (True, False), ("nearest", "adaround"), ("any", "vnni")
    ):
        scales = "per channel" if per_channel else "per layer"
        name = f"{scales}, {way}, {'limit' if cpu == 'any' else 'no limit'}"
        kw = dict(per_channel=per_channel, cpu=cpu, progress=False)
        found[name] = [sqnr_db(want, outputs(qm, test)) for qm in by_way(way, net, calib, **kw)]
    return found


def by_way(way, net, calib, **kw):
    "One network rounded to nearest, or one for each seed of adaround"
    if way == "nearest":
        yield quantize(net, calib, **kw)
        return
    for seed in range(SEEDS):
        yield adaround(net, calib, w_bits=8, seed=seed, **kw)


def means(rounded):
    return {way: sum(dbs) / len(dbs) for way, dbs in rounded.items()}


def finite(db):
    return None if db == float("inf") else db


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--arm", help="folder with an aarch64 Python and onnxruntime")
    p.add_argument("--only", nargs="*", help="networks")
    p.add_argument(
        "--rounding-only",
        action="store_true",
        help="compare roundings alone: the processors' rows stay",
    )
    p.add_argument("--results", default=str(HERE / "results" / "cpus.json"))
    a = p.parse_args()
    where = processors(a.arm)
    old = json.loads(Path(a.results).read_text()) if Path(a.results).exists() else {}
    rows, rounded, pairs = old.get("networks", {}), old.get("rounding", {}), old.get("pairs", {})
    by_seed = old.get("rounding_by_seed", {})
    if not a.rounding_only:
        with tempfile.TemporaryDirectory() as d:
            pairs = probe(where["x86 without VNNI"], Path(d))
    for name, net, calib, test, seen in networks(a.only):
        if not a.rounding_only:
            with tempfile.TemporaryDirectory() as d:
                rows[name] = measure(net, calib, test, seen, where, Path(d))
        by_seed[name] = rounding(net, calib, test)
        rounded[name] = means(by_seed[name])
        print(name, {k: round(v, 2) for k, v in rounded[name].items()}, flush=True)
        print(
            name,
            rows[name]["sqnr_db"],
            {k: v["ours"]["every_bit"] for k, v in rows[name]["processors"].items()},
            flush=True,
        )
        arm = dict(onnxruntime="1.23.2") if a.arm else {}
        result = dict(
            what="one file on several processors; SQNR of the outputs against the float network's, in dB",
            machine=machine(),
            emulated="qemu-user",
            arm=old.get("arm") or arm,
            pairs=pairs,
            networks=rows,
            rounding=rounded,
            rounding_by_seed=by_seed,
        )
        Path(a.results).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
