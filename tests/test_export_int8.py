"""INT8 files: they compute what the simulation computes, on integer kernels, and say so when they don't."""

import warnings

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from torch import nn

from mep.deploy import ExportError, optimized_ops, read_meta, run
from mep.quant.export import Check, MismatchError, export_int8
from mep.quant.sim import Clip, quantize
from mep.train import recalibrate_bn, small_mobilenet, small_resnet


def pictures(n=8, size=16, c=3, seed=0):
    return torch.randn(n, c, size, size, generator=torch.Generator().manual_seed(seed))


def export(model, path, x=None, int4=True, min_sqnr_db=35, **kw):
    "Quantize and export, without bars and warnings; returns the check and the quantized network"
    x = pictures() if x is None else x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qm = quantize(model, x, progress=False, **kw)
        return export_int8(qm, path, int4=int4, min_sqnr_db=min_sqnr_db), qm


def agrees(check):
    return check.sqnr_db > 50  # every bit on x86; elsewhere a rare step of an addition


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("int8") / "net.onnx"


@pytest.fixture(scope="module")
def resnet():
    return recalibrate_bn(small_resnet(5, width=8), pictures(32)).eval()


@pytest.fixture(scope="module")
def mobilenet():
    return recalibrate_bn(small_mobilenet(5, width=0.5, se=True), pictures(32)).eval()


class Net(nn.Module):
    def __init__(self, forward, **modules):
        super().__init__()
        self.run = forward
        for name, m in modules.items():
            self.add_module(name, m)

    def forward(self, x):
        return self.run(self, x)


# Whole networks


@pytest.mark.parametrize(
    "kw",
    [
        {},
        dict(per_channel=True),
        dict(w_bits=4),
        dict(w_bits=4, int4=False),
        dict(w_bits=3, a_bits=6, per_channel=True),
        dict(w_bits=2, a_bits=4),
        dict(w_bits=7, a_bits=7),
        dict(ranges="minmax"),
        dict(ranges="percentile"),
        dict(layer_bits={"blocks.0*": (5, 3)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_small_networks_run_on_integers_alone(request, path, name, kw):
    check, qm = export(request.getfixturevalue(name), path, **kw)
    assert agrees(check) and check.float_layers == 0 and check.integer_layers == len(qm.layers())
    assert not {"Conv", "Gemm", "Relu", "BatchNormalization", "Add", "Mul", "Sigmoid"} & set(
        check.ops
    )


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"]
)
def test_torchvision_agrees_at_full_optimisation(path, name):
    torch.manual_seed(0)
    x = pictures(8, 64)
    net = recalibrate_bn(getattr(torchvision.models, name)(weights=None), x).eval()
    check, qm = export(net, path, x, per_channel=True)
    assert (
        check.sqnr_db > 35 and check.float_layers == 0 and check.integer_layers == len(qm.layers())
    )
    assert 0.24 < check.bytes / check.float_bytes < 0.29


@pytest.mark.parametrize(
    "kw",
    [
        dict(w_bits=None),
        dict(a_bits=None),
        dict(a_bits=None, w_bits=4),
        dict(skip=["blocks.1.body.3"]),
        dict(skip=["*"]),
        dict(skip=["stem.0", "head*"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_what_is_float_stays_float(request, path, name, kw):
    "onnxruntime would quantize float weights between DQ and Q by itself"
    check, qm = export(request.getfixturevalue(name), path, **kw)
    assert agrees(check)
    integer = sum(m.on and m.source is not None and m.source.on for m in qm.layers().values())
    assert check.integer_layers == integer


def test_switched_off_layers_are_written_as_float(resnet, path):
    _, qm = export(resnet, path)
    qm.set_enabled("blocks.0*", weights=False).set_enabled("blocks.2.body.0", activations=False)
    check = export_int8(qm, path)
    assert agrees(check) and check.float_layers >= 2


# Networks of every kind


def shared(s, x):
    return torch.cat([y := s.relu(s.conv(x)), z := s.relu(s.conv(y)), y + z], 1)


def shuffle(s, x):
    a, b = s.conv(x).chunk(2, 1)
    x = torch.cat([a, s.out(b).relu()], 1)
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w).flip(3)[:, :, ::2]


def float_parts(s, x):
    return s.norm(F.gelu(s.conv(x))).mean(-1) + 0.5


def two_outputs(s, x):
    return {"a": s.out(y := s.conv(x)).relu(), "b": F.avg_pool2d(y, 3, 2, 1)}


def option_a(s, x):
    return F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3)) + s.conv(x))


NETS = {
    "shared module": (Net(shared, conv=nn.Conv2d(3, 3, 3, padding=1, groups=3), relu=nn.ReLU()), 1),
    "grouped and dilated": (
        nn.Sequential(
            nn.Conv2d(3, 12, 3, 2, (1, 2), 2),
            nn.ReLU6(),
            nn.Conv2d(12, 12, (3, 5), padding="same", groups=4),
            nn.MaxPool2d(3, 2, 1, ceil_mode=True),
            nn.Conv2d(12, 4, 1, bias=False),
        ),
        1,
    ),
    "linear only": (
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(768, 20),
            nn.Hardswish(),
            nn.Linear(20, 9, bias=False),
            nn.BatchNorm1d(9),
            nn.ReLU(),
            nn.Linear(9, 4),
        ),
        1,
    ),
    "batch norm first": (
        nn.Sequential(
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Conv2d(3, 8, 3),
            nn.SiLU(),
            nn.AvgPool2d(3, 2, 1, count_include_pad=False),
            nn.Conv2d(8, 4, 1),
        ),
        1,
    ),
    "shuffle": (Net(shuffle, conv=nn.Conv2d(3, 8, 3, padding=1), out=nn.Conv2d(4, 4, 1)), 1),
    "zero-padded shortcut": (Net(option_a, conv=nn.Conv2d(3, 8, 3, 2, 1)), 1),
    "caps per channel": (
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            Clip(0, torch.linspace(0.1, 3, 8)),
            nn.Conv2d(8, 8, 3, groups=8),
            Clip(torch.linspace(-1, 0, 8), 2.0),
            nn.Conv2d(8, 4, 1),
        ),
        1,
    ),
    "two outputs": (Net(two_outputs, conv=nn.Conv2d(3, 8, 3), out=nn.Conv2d(8, 4, 1)), 2),
    "float parts": (
        Net(
            float_parts,
            conv=nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
            norm=nn.GroupNorm(2, 8),
        ),
        1,
    ),
    "transposed": (
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 8, 2, 2),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            nn.PixelShuffle(2),
            nn.Conv2d(2, 4, 3),
        ),
        1,
    ),
    "one dimension": (
        nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 8, 5), nn.LeakyReLU(0.1), nn.Conv1d(8, 4, 1)),
        1,
    ),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kw", [dict(per_channel=True), dict(w_bits=4, a_bits=5)], ids=str)
def test_networks_of_every_kind(path, name, kw):
    net, n_outputs = NETS[name]
    torch.manual_seed(0)
    check, qm = export(net.eval(), path, **kw)
    assert agrees(check)
    for n in (1, 3, 8):  # the batch is free
        out = run(path, pictures(n, seed=n))
        assert len(out if n_outputs > 1 else out[None]) == n_outputs


@settings(deadline=None, max_examples=20)
@given(
    c=st.integers(1, 3),
    groups=st.integers(1, 3),
    k=st.integers(1, 4),
    stride=st.integers(1, 2),
    pad=st.integers(0, 2),
    bias=st.booleans(),
    w_bits=st.integers(2, 8),
    a_bits=st.integers(2, 8),
    per_channel=st.booleans(),
    act=st.sampled_from(
        [nn.Identity(), nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.5), nn.Hardswish(), nn.SiLU()]
    ),
    seed=st.integers(0, 99),
)
def test_random_layers_agree(
    path, c, groups, k, stride, pad, bias, w_bits, a_bits, per_channel, act, seed
):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(c * groups, 2 * groups, k, stride, pad, groups=groups, bias=bias),
        act,
        nn.Conv2d(2 * groups, 3, 1),
    ).eval()
    check, _ = export(
        net,
        path,
        pictures(2, 9, c * groups, seed),
        w_bits=w_bits,
        a_bits=a_bits,
        per_channel=per_channel,
    )
    assert agrees(check) and check.float_layers == 0


# What is in the file


def initializers(path):
    return {t.name: t for t in onnx.load(path).graph.initializer}


def test_weights_are_integers_and_bias_scales_are_products(mobilenet, path):
    _, qm = export(mobilenet, path, per_channel=True)
    stored = initializers(path)
    for name, layer in qm.layers().items():
        assert (
            stored[f"{name}.weight_q"].data_type == TensorProto.INT8
            and stored[f"{name}.bias_q"].data_type == TensorProto.INT32
        )
        product = layer.source.scale.numpy() * layer.weight_grid.scale.numpy()
        assert np.array_equal(numpy_helper.to_array(stored[f"{name}.bias_scale"]), product)
    floats = sum(np.prod(t.dims) for t in stored.values() if t.data_type == TensorProto.FLOAT)
    assert floats < 0.2 * sum(np.prod(t.dims) for t in stored.values())


def test_four_bits_take_half_a_byte(path):
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    sizes = {int4: export(net, path, w_bits=4, int4=int4)[0].bytes for int4 in (False, True)}
    assert sizes[True] < 0.56 * sizes[False]
    export(net, path, w_bits=4)
    assert (
        initializers(path)["0.weight_q"].data_type == TensorProto.INT4
        and onnx.load(path).opset_import[0].version == 21
    )
    assert optimized_ops(path)["QLinearConv"] == 2


def test_facts_travel_with_the_file(resnet, path):
    qm = quantize(resnet, pictures(), progress=False)
    export_int8(qm, path, meta=dict(mean=[0.5], classes=["a", "b"]))
    assert read_meta(path) == dict(mean=[0.5], classes=["a", "b"])


def test_the_same_network_gives_the_same_bytes(resnet, path):
    qm = quantize(resnet, pictures(), progress=False)
    files = []
    for _ in range(2):
        export_int8(qm, path)
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_the_quantized_network_stays_as_it_is(resnet, path):
    qm = quantize(resnet, pictures(), progress=False).train()
    state = {k: v.clone() for k, v in qm.state_dict().items()}
    export_int8(qm, path)
    assert qm.training and all(torch.equal(v, state[k]) for k, v in qm.state_dict().items())


# Refusals


@pytest.mark.parametrize("name", ["stem.0", "blocks.1.body.3", "head.2"])
def test_a_mismatch_names_the_layer_where_it_starts(resnet, path, name):
    _, qm = export(resnet, path)
    before = path.read_bytes()
    qm.layers()[name].register_forward_hook(lambda m, i, out: out * 1.1)
    with pytest.raises(MismatchError, match=f"starts at '{name}'"):
        export_int8(qm, path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_sum_that_differs_is_named(resnet, path):
    _, qm = export(resnet, path)
    qm.net.quantizers.add_1.register_forward_hook(lambda m, i, out: out + 0.3)
    with pytest.raises(MismatchError, match="starts at 'add_1'"):
        export_int8(qm, path)


def test_more_bits_than_a_byte_are_refused(resnet, path):
    for kw, layer in ((dict(w_bits=9), "stem.0"), (dict(a_bits=10), "input")):
        qm = quantize(resnet, pictures(), progress=False, **kw)
        with pytest.raises(ExportError, match=f"{layer}.*at most 8"):
            export_int8(qm, path)


def test_it_asks_for_images_if_it_has_none(resnet, path):
    qm = quantize(resnet, pictures(), progress=False)
    qm.check_batch = None
    with pytest.raises(ValueError, match="images"):
        export_int8(qm, path)
    assert isinstance(export_int8(qm, path, pictures(1)), Check)


def test_a_new_folder_is_made(resnet, tmp_path):
    export(resnet, tmp_path / "runs" / "new.onnx")
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["new.onnx"]


def test_a_path_that_cannot_be_written(resnet, tmp_path):
    qm = quantize(resnet, pictures(), progress=False)
    (tmp_path / "file").write_text("")
    for bad in (tmp_path, tmp_path / "file" / "net.onnx"):
        with pytest.raises(OSError):
            export_int8(qm, bad)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
