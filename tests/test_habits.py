"""Networks with the habits of today's libraries: recorded, on integers, written, and checked step by step."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

from mep.capture import exported
from mep.deploy import read_proto, run
from mep.graph import TraceError, tensors, trace, worst_sqnr_db
from mep.nas import chop  # noqa: F401  the wings load beside one another
from mep.quant import MismatchError, adaround, export_int8, quantize
from mep.quant import export as exporting

pytestmark = pytest.mark.filterwarnings("ignore")


def pictures(n=32, size=32, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


class SamePadding(nn.Module):
    "As TensorFlow pads: by the size that comes in"

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=2)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        h, w = x.size()[-2:]
        rest = max((-(-h // 2) - 1) * 2 + 3 - h, 0), max((-(-w // 2) - 1) * 2 + 3 - w, 0)
        if rest[0] > 0 or rest[1] > 0:
            x = F.pad(
                x, [rest[1] // 2, rest[1] - rest[1] // 2, rest[0] // 2, rest[0] - rest[0] // 2]
            )
        return self.head(F.relu6(self.norm(self.conv(x))).mean((2, 3)))


class Bottlenecks(nn.Module):
    "As YOLO's C2f and SPPF: a list that grows, chunks unpacked, pools of pools"

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, 2, 1)
        self.steps = nn.ModuleList(nn.Conv2d(8, 8, 3, 1, 1) for _ in range(2))
        self.last = nn.Conv2d(32, 16, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.head = nn.Conv2d(64, 6, 1)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x):
        y = list(self.act(self.first(x)).chunk(2, 1))
        y.extend(self.act(m(y[-1])) for m in self.steps)
        y = [self.act(self.last(torch.cat(y, 1)))]
        y.extend(self.pool(y[-1]) for _ in range(3))
        out = self.head(torch.cat(y, 1))
        n, c, h, w = out.shape
        boxes, scores = out.view(n, c, h * w).split((4, 2), 1)
        return {"boxes": boxes, "scores": scores.sigmoid()}


class Outputs(dict):
    "A dict with attributes, as libraries of transformers return it"

    __getattr__ = dict.__getitem__


class Hidden(nn.Module):
    "Optional arguments, a property, a dict of outputs, and a shape that is asked for"

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 8, 8)
        self.query, self.key, self.value = (nn.Linear(24, 24) for _ in range(3))
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    @property
    def heads(self):
        return 3

    def split(self, x):
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def forward(self, pixel_values, mask=None, return_dict=True):
        if pixel_values.shape[1] != 3:
            raise ValueError("three channels, please")
        x = self.embed(pixel_values).flatten(2).transpose(1, 2)
        q, k, v = (self.split(f(self.norm(x))) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + y
        return Outputs(logits=self.head(x.mean(1)), hidden=x)


class Windows(nn.Module):
    "As Swin: windows shifted by a roll, a mask built in forward, a learned bias of relative positions"

    def __init__(self, side=4, width=16):
        super().__init__()
        self.side = side
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.bias = nn.Parameter(torch.randn((2 * side - 1) ** 2, 2) * 0.1)
        at = torch.stack(
            torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ).flatten(1)
        apart = at[:, :, None] - at[:, None, :] + side - 1
        self.register_buffer("index", apart[0] * (2 * side - 1) + apart[1])
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        s = self.side
        mask = x.new_zeros((h, w))
        for i, rows in enumerate((slice(0, -s), slice(-s, -2), slice(-2, None))):
            mask[rows] = i
        mask = mask.view(h // s, s, w // s, s).permute(0, 2, 1, 3).reshape(-1, s * s)
        mask = (mask[:, None] != mask[:, :, None]).float() * -100
        y = torch.roll(self.norm(x), (-2, -2), (1, 2))
        y = y.view(n, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        q, k, v = self.qkv(y).reshape(len(y), s * s, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        a = q @ k.transpose(-2, -1) * 0.3 + self.bias[self.index].permute(2, 0, 1)
        a = (a.view(n, -1, 2, s * s, s * s) + mask[:, None]).view(-1, 2, s * s, s * s)
        y = (a.softmax(-1) @ v).transpose(1, 2).reshape(n, h // s, w // s, s, s, c)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return self.head((x + torch.roll(y, (2, 2), (1, 2))).mean((1, 2)))


class Scaled(nn.Module):
    "As ConvNeXt: a depthwise convolution, a norm over channels, a linear layer on pixels, a learned factor"

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.spread = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.rand(width))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.spread(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))) * self.gamma
        return self.head((x + y.permute(0, 3, 1, 2)).mean((-2, -1)))


class Mixer(nn.Module):
    "Linear layers over tokens and over channels"

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 8, 8)
        self.over_tokens, self.over_channels = nn.Linear(16, 16), nn.Linear(24, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2)
        x = x + F.relu(self.over_tokens(x))
        x = x.transpose(1, 2)
        return self.head((x + F.relu(self.over_channels(x))).mean(1))


class Encoder(nn.Module):
    "PyTorch's own transformer, a class token that `len` repeats, learned places"

    def __init__(self, width=24):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.1)
        self.places = nn.Parameter(torch.randn(1, 17, width) * 0.1)
        how = dict(dropout=0.1, activation="gelu", batch_first=True)
        layer = nn.TransformerEncoderLayer(width, 3, 2 * width, **how)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.blocks(x)[:, 0])


HABITS = dict(
    same_padding=SamePadding,
    bottlenecks=Bottlenecks,
    hidden=Hidden,
    windows=Windows,
    scaled=Scaled,
    mixer=Mixer,
    encoder=Encoder,
)


@pytest.fixture(scope="module", params=HABITS)
def network(request):
    torch.manual_seed(0)
    net = HABITS[request.param]().eval()
    return net, quantize(net, pictures(), per_channel=True, progress=False)


def test_the_recording_computes_the_same_for_any_number_of_images(network):
    net, _ = network
    for recorded in trace(net, x=pictures(2)), exported(copy.deepcopy(net), pictures(2)):
        for n in (1, 2, 5):
            x = pictures(n, seed=n)
            with torch.no_grad():
                assert worst_sqnr_db(net(x), recorded(x)) > 100


def test_layers_keep_their_names_and_parameters(network):
    net, _ = network
    copied = copy.deepcopy(net)
    names = {n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    recorded = exported(copied, pictures(2))
    called = {n.target for n in recorded.graph.nodes if n.op == "call_module"}
    assert {re.sub("_+$", "", n) for n in called} >= names
    weights = {p.data_ptr() for p in copied.parameters()}
    assert weights >= {p.data_ptr() for p in recorded.parameters()}


def test_all_multiplications_run_on_integers_and_the_file_agrees(network, tmp_path):
    net, qm = network
    check = export_int8(qm, tmp_path / "a.onnx")
    assert check.integer_macs > 0.95
    assert check.float_layers == 0
    assert check.sqnr_db > 60 or check.apart.small
    x = pictures(5, seed=1)
    with torch.no_grad():
        want = tensors(qm(x))
        assert worst_sqnr_db(net(x), qm(x)) > 15
        for n in (1, 5):
            got = run(tmp_path / "a.onnx", x[:n], batch_size=n)
            got = list(got.values()) if isinstance(got, dict) else got
            got = [torch.as_tensor(o) for o in (got if isinstance(got, list) else [got])]
            assert worst_sqnr_db([t[:n] for t in want], got) > 30


def test_adaptive_rounding_of_linear_layers_on_tokens():
    torch.manual_seed(0)
    net = Encoder().eval()
    x, fresh = pictures(64), pictures(32, seed=1)
    nearest = quantize(net, x, w_bits=3, per_channel=True, progress=False)
    rounded = adaround(net, x, w_bits=3, per_channel=True, progress=False)
    with torch.no_grad():
        assert worst_sqnr_db(net(fresh), rounded(fresh)) > worst_sqnr_db(net(fresh), nearest(fresh))


# ---- step by step


def deep_qm():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 8, 8), nn.Flatten(2), *[nn.Linear(16, 16), nn.LayerNorm(16)] * 1
    )
    for _ in range(6):
        net.extend([nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16), nn.LayerNorm(16)])
    return quantize(net.eval(), pictures(), per_channel=True, progress=False)


def test_a_difference_that_starts_behind_a_float_operator_is_told_from_an_error(tmp_path):
    qm = deep_qm()
    proto, writer = exporting._proto(qm, pictures(2), True, {})
    db, apart = exporting._step_by_step(qm, proto, writer, pictures(4, seed=3))
    assert db > 60 and apart.small
    assert apart.numbers > 0 and "neighbouring integer" in repr(apart)


def test_a_wrong_weight_is_found_step_by_step(tmp_path, monkeypatch):
    qm = deep_qm()
    write = exporting._proto
    changed = []

    def wrong(*args):
        proto, writer = write(*args)
        q = [c for c in proto.graph.initializer if c.name.endswith("weight_q")][5]
        changed.append(q.name.removesuffix(".weight_q"))
        values = numpy_helper.to_array(q).copy()
        values[0] = -values[0]
        q.CopyFrom(numpy_helper.from_array(values, q.name))
        return proto, writer

    monkeypatch.setattr(exporting, "_proto", wrong)
    with pytest.raises(MismatchError) as e:
        export_int8(qm, tmp_path / "a.onnx")
    assert "differ" in str(e.value) and changed
    assert not (tmp_path / "a.onnx").exists()


# ---- what can't be recorded


class ByContent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x)
        if y.mean() > 0:
            y = y * 2
        return y


class OneSize(nn.Module):
    def forward(self, x):
        return x.view(2, 3, 32, 32) * (1 if x.shape[2] % 2 else 2)


def test_what_neither_can_record_is_named_with_its_line():
    with pytest.raises(TraceError, match=r"if y.mean\(\) > 0.*torch.export can't, either"):
        trace(ByContent(), x=pictures(2))


def test_a_fixed_number_of_images_is_refused():
    with pytest.raises(TraceError, match="torch.export can't, either"):
        trace(OneSize(), x=pictures(2))


def test_without_images_only_one_way_is_tried():
    with pytest.raises(TraceError) as e:
        trace(SamePadding())
    assert "torch.export" not in str(e.value)
    assert trace(SamePadding(), x=pictures(2)) is not None


def test_files_use_todays_operators_alone(network, tmp_path):
    _, qm = network
    export_int8(qm, tmp_path / "a.onnx")
    proto = read_proto(tmp_path / "a.onnx")
    assert {i.domain for i in proto.opset_import} <= {"", "ai.onnx"}
    assert not proto.functions
    assert all(
        np.isfinite(numpy_helper.to_array(c).astype(float)).all() for c in proto.graph.initializer
    )
