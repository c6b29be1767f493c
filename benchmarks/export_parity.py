"""torchvision's networks as INT8 files: agreement with the simulation, noise against float,
speed and size, beside onnxruntime's own quantizer.

    python benchmarks/export_parity.py [--seeds 3] [--rounds 100]   # about 10 minutes;
    writes results/export_parity.json

Random weights, batch norm calibrated on `shapes` at 224 px. Each seed draws new weights and
new pictures; the files of the first seed are timed, all networks of a row in alternation,
one thread, batch 1. `quantize_static` gets the same calibration pictures."""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import onnx  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static  # noqa: E402
from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: E402

from mep.data import shapes  # noqa: E402
from mep.deploy import export_onnx, latencies, machine, optimized_ops, run  # noqa: E402
from mep.quant.export import _FLOAT, _INTEGER, export_int8  # noqa: E402
from mep.quant.sim import quantize  # noqa: E402
from mep.train import recalibrate_bn, sqnr_db  # noqa: E402

NETWORKS = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0")
SIZE, N_BN, N_CALIB, N_TEST = 224, 32, 32, 32


class Reader(CalibrationDataReader):
    "Pictures one by one, as `quantize_static` asks for them."

    def __init__(self, x):
        self.rest = iter(x.numpy())

    def get_next(self):
        return next(({"x": x[None]} for x in self.rest), None)


def pictures(n, seed):
    return (shapes(n, seed, size=SIZE).x.float() / 255 - 0.5) / 0.25


def network(name, seed):
    torch.manual_seed(seed)
    return recalibrate_bn(
        getattr(torchvision.models, name)(weights=None), pictures(N_BN, 3 * seed)
    ).eval()


def static_default(fp32, out, calib):
    quantize_static(fp32, out, Reader(calib))


def static_best(fp32, out, calib):
    quant_pre_process(fp32, out)
    quantize_static(
        out,
        out,
        Reader(calib),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )


def layers(path):
    ops = optimized_ops(path)
    return dict(
        integer_layers=sum(ops[o] for o in _INTEGER),
        float_layers=sum(ops[o] for o in _FLOAT),
        ops=dict(ops),
    )


def one(name, seed, folder):
    "Files of one network, and what they give"
    net, calib, test = (
        network(name, seed),
        pictures(N_CALIB, 3 * seed + 1),
        pictures(N_TEST, 3 * seed + 2),
    )
    files = {
        k: folder / f"{name}_{seed}_{k}.onnx"
        for k in ("fp32", "ours", "static_default", "static_best")
    }
    export_onnx(net, files["fp32"], (3, SIZE, SIZE))
    start = time.process_time()
    check = export_int8(
        quantize(net, calib, per_channel=True, progress=False),
        files["ours"],
        test,
        min_sqnr_db=-100,
    )
    seconds = {"ours": time.process_time() - start}
    for make in (static_default, static_best):
        start = time.process_time()
        make(files["fp32"], files[make.__name__], calib)
        seconds[make.__name__] = time.process_time() - start
    with torch.no_grad():
        want = torch.cat([net(x) for x in test.split(8)])
    rows = {
        k: dict(
            sqnr_db=sqnr_db(want, torch.from_numpy(run(f, test))),
            bytes=f.stat().st_size,
            cpu_seconds=seconds.get(k),
            **layers(f),
        )
        for k, f in files.items()
    }
    rows["ours"] |= dict(
        parity_db=None if check.max_abs == 0 else check.sqnr_db, exact=check.max_abs == 0
    )
    return files, rows


def spread(values):
    return dict(
        mean=statistics.mean(values),
        sd=statistics.stdev(values) if len(values) > 1 else 0.0,
        values=values,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    result = dict(
        machine=machine() | dict(torchvision=torchvision.__version__, onnx=onnx.__version__),
        load_average=os.getloadavg()[0],
        seeds=list(range(args.seeds)),
        settings=dict(
            size=SIZE,
            n_bn=N_BN,
            n_calib=N_CALIB,
            n_test=N_TEST,
            threads=1,
            batch=1,
            rounds=args.rounds,
            w_bits=8,
            a_bits=8,
            per_channel=True,
        ),
        networks={},
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            runs = [one(name, seed, Path(folder)) for seed in range(args.seeds)]
            times = latencies(runs[0][0], (3, SIZE, SIZE), threads=1, n=args.rounds)
            row = {k: v | dict(latency=times[k].to_dict()) for k, v in runs[0][1].items()}
            for k in ("ours", "static_default", "static_best"):
                row[k]["sqnr_db"] = spread([rows[k]["sqnr_db"] for _, rows in runs])
            row["fp32"].pop("sqnr_db")
            row["ours"] |= dict(
                exact=all(rows["ours"]["exact"] for _, rows in runs),
                parity_db=min(
                    (rows["ours"]["parity_db"] for _, rows in runs if not rows["ours"]["exact"]),
                    default=None,
                ),
            )
            result["networks"][name] = row
            print(
                name,
                json.dumps(
                    {
                        k: dict(
                            ms=round(v["latency"]["median_ms"], 2),
                            ratio=round(v["latency"]["ratio"], 3),
                            sqnr=v.get("sqnr_db", {}).get("mean"),
                            floats=v["float_layers"],
                        )
                        for k, v in row.items()
                    }
                ),
                "exact:",
                row["ours"]["exact"],
                flush=True,
            )
    Path(__file__).with_name("results").joinpath("export_parity.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
