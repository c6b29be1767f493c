"Export, run, time and compare: what goes wrong has a name, and nothing the caller owns is changed."

import copy
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mep import deploy
from mep.store import StoreError

SHAPE = (3, 16, 16)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv, self.bn, self.act = (
            nn.Conv2d(c, c, 3, padding=1, bias=False),
            nn.BatchNorm2d(c),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        return self.act(self.bn(self.conv(x)) + x)


class Net(nn.Module):
    "Stem, two blocks (whose activation is called once each), SiLU called twice, head."

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)
        )
        self.blocks, self.silu, self.drop = (
            nn.Sequential(Block(8), Block(8)),
            nn.SiLU(),
            nn.Dropout(0.5),
        )
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(
            self.drop(self.silu(self.pool(self.silu(self.blocks(self.stem(x)))).flatten(1)))
        )


def make(seed=0):
    torch.manual_seed(seed)
    net = Net()
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(16, *SHAPE))
    return net.eval()


@pytest.fixture(scope="module")
def net():
    return make()


@pytest.fixture(scope="module")
def path(net, tmp_path_factory):
    return deploy.export_onnx(net, tmp_path_factory.mktemp("deploy") / "net.onnx", SHAPE)


@pytest.fixture(scope="module")
def x():
    return torch.randn(9, *SHAPE, generator=torch.Generator().manual_seed(3))


# ---- export


def test_export_changes_nothing_of_the_callers(tmp_path):
    net = make().train()
    net.blocks[0].eval()
    flags, state, rng = (
        [m.training for m in net.modules()],
        copy.deepcopy(net.state_dict()),
        torch.get_rng_state(),
    )
    deploy.export_onnx(net, tmp_path / "a.onnx", SHAPE)
    deploy.latency(net, SHAPE, n=1, warmup=0)
    assert [m.training for m in net.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(m._forward_hooks for m in net.modules())


def test_export_is_quiet_single_and_repeatable(net, tmp_path, capfd):
    a, b = (deploy.export_onnx(net, tmp_path / n, SHAPE) for n in ("a.onnx", "b.onnx"))
    assert isinstance(a, Path) and a.read_bytes() == b.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]
    deploy.optimized_ops(a)
    assert capfd.readouterr() == ("", "")


def test_batch_norm_is_folded_and_batch_is_free(path):
    graph = onnx.load(path).graph
    assert "BatchNormalization" not in {n.op_type for n in graph.node}
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("dynamo", [False, True])
def test_no_folders_in_the_file(net, tmp_path, dynamo):
    data = deploy.export_onnx(net, tmp_path / "a.onnx", SHAPE, dynamo=dynamo).read_bytes()
    assert b"site-packages" not in data and str(Path(__file__).parent).encode() not in data


def test_meta_round_trip(net, tmp_path):
    meta = {
        "classes": ["a", "ü"],
        "preprocessing": {"mean": [0.1, 0.25]},
        "text": "5",
        "n": 5,
        "none": None,
    }
    assert deploy.read_meta(deploy.export_onnx(net, tmp_path / "a.onnx", SHAPE, meta=meta)) == meta
    with pytest.raises(TypeError, match="'bad'"):
        deploy.export_onnx(net, tmp_path / "b.onnx", SHAPE, meta=dict(bad={1, 2}))


def test_meta_of_other_tools_is_text(net, path, tmp_path):
    proto = onnx.load(path)
    onnx.helper.set_model_props(proto, {"author": "some tool"})
    onnx.save(proto, tmp_path / "other.onnx")
    assert deploy.read_meta(tmp_path / "other.onnx") == {"author": "some tool"}


def test_nan_weights_are_named(tmp_path):
    net = make()
    with torch.no_grad():
        net.head.bias[2] = float("nan")
    with pytest.raises(deploy.ExportError, match="head.bias"):
        deploy.export_onnx(net, tmp_path / "a.onnx", SHAPE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(), (3, 0, 16), (3, 16.5, 16), 224, None])
def test_bad_input_shape(net, tmp_path, shape):
    with pytest.raises(ValueError, match="input_shape"):
        deploy.export_onnx(net, tmp_path / "a.onnx", shape)


def test_wrong_channels_say_what_was_tried(net, tmp_path):
    with pytest.raises(deploy.ExportError, match=re.escape("[2, 1, 16, 16]")):
        deploy.export_onnx(net, tmp_path / "a.onnx", (1, 16, 16))


def test_not_a_module(tmp_path):
    with pytest.raises(TypeError, match="torch.nn.Module, got function"):
        deploy.export_onnx(lambda x: x, tmp_path / "a.onnx", SHAPE)


def test_unwritable_folder(net, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="a.onnx"):
        deploy.export_onnx(net, tmp_path / "file" / "a.onnx", SHAPE)


def test_a_failed_export_keeps_the_old_file(net, tmp_path):
    path = deploy.export_onnx(net, tmp_path / "a.onnx", SHAPE)
    old = path.read_bytes()

    class Frozen(nn.Module):
        def forward(self, x):
            return x - x.sum(0) / int(x.shape[0])

    with pytest.raises(deploy.ExportError, match="batch size"):
        deploy.export_onnx(Frozen(), path, SHAPE)
    assert path.read_bytes() == old


def test_several_outputs(tmp_path, x):
    class Two(nn.Module):
        def forward(self, x):
            return [x.mean((2, 3)), (x * 2, x + 1)]

    path = deploy.export_onnx(Two(), tmp_path / "a.onnx", SHAPE)
    outs = deploy.run(path, x, batch_size=4)
    assert [o.shape for o in outs] == [(9, 3), (9, *SHAPE), (9, *SHAPE)]
    assert [o.name for o in onnx.load(path).graph.output] == ["output_0", "output_1", "output_2"]
    assert torch.equal(deploy.as_model(path)(x)[2], x + 1)
    assert deploy.parity(Two(), path, x).sqnr_db > 100


def test_outputs_in_a_dict_keep_their_names(tmp_path):
    class Named(nn.Module):
        def forward(self, x):
            return {"logits": x.mean((2, 3)), "map": x * 2}

    assert [
        o.name
        for o in onnx.load(deploy.export_onnx(Named(), tmp_path / "a.onnx", SHAPE)).graph.output
    ] == ["logits", "map"]


def test_other_outputs_are_refused(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return x, "text"

    with pytest.raises(deploy.ExportError, match="returns a str"):
        deploy.export_onnx(Odd(), tmp_path / "a.onnx", SHAPE)


# ---- session and run


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 9), batch_size=st.integers(1, 12))
def test_any_batches_give_the_same(net, path, x, n, batch_size):
    with torch.no_grad():
        ref = net(x[:n]).numpy()
    np.testing.assert_allclose(deploy.run(path, x[:n], batch_size), ref, atol=1e-5)


def test_fixed_batch_is_padded(net, path, x, tmp_path):
    proto = onnx.load(path)
    for v in (proto.graph.input[0], proto.graph.output[0]):
        v.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(proto, tmp_path / "fixed.onnx")
    np.testing.assert_allclose(
        deploy.run(tmp_path / "fixed.onnx", x), deploy.run(path, x), atol=1e-5
    )


def test_run_takes_a_session_and_numpy(path, x):
    sess = deploy.session(path, threads=2, level="basic")
    np.testing.assert_allclose(deploy.run(sess, x.numpy()), deploy.run(path, x), atol=1e-5)
    assert (
        sess.get_session_options().get_session_config_entry("session.intra_op.allow_spinning")
        == "0"
    )
    assert sess.get_session_options().inter_op_num_threads == 1


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((2, 3, 16, 16)),
        np.zeros((2, 16, 16, 3), np.float32),
        np.zeros((3, 16, 16), np.float32),
        np.zeros((0, 3, 16, 16), np.float32),
    ],
)
def test_wrong_inputs_say_what_the_file_expects(path, bad):
    with pytest.raises(ValueError, match=re.escape("float32 [batch, 3, 16, 16]")) as e:
        deploy.run(path, bad)
    assert f"{bad.dtype} {list(bad.shape)}" in str(e.value)


def test_wrong_input_type(path):
    with pytest.raises(TypeError, match="list"):
        deploy.run(path, [[1.0]])


def test_missing_file(tmp_path):
    for f in (deploy.session, deploy.optimized_ops, deploy.read_meta, deploy.file_size):
        with pytest.raises(FileNotFoundError, match="nothing.onnx"):
            f(tmp_path / "nothing.onnx")


@pytest.mark.parametrize(
    "damage",
    [lambda d: d[: len(d) // 2], lambda d: b"\xff" * len(d), lambda d: b"", lambda d: b"not onnx"],
)
def test_damaged_file_is_named(path, tmp_path, damage):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(damage(path.read_bytes()))
    for f in (deploy.session, deploy.optimized_ops, deploy.latency):
        with pytest.raises(deploy.ModelFileError, match="bad.onnx"):
            f(bad)


def test_levels_and_threads_are_checked(path):
    with pytest.raises(ValueError, match="disable, basic, extended, all"):
        deploy.session(path, level="o3")
    with pytest.raises(ValueError, match="disable, basic, extended, all"):
        deploy.latency(path, level="o3")
    for threads in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match="threads"):
            deploy.session(path, threads=threads)


def test_optimiser_fuses(path):
    assert deploy.optimized_ops(path, "disable")["Relu"] == 2
    assert deploy.optimized_ops(path, "all")["Clip"] == 0


# ---- latency: structure only, never a time


def test_latency_structure(path):
    l = deploy.latency(path, batch=2, n=7, warmup=1)
    assert len(l.samples_ms) == 7 and all(t > 0 for t in l.samples_ms)
    assert l.p10_ms <= l.median_ms <= l.p90_ms and l.per_image_ms == l.median_ms / 2
    assert l.ratio is None and l.scenario == deploy.Scenario(batch=2)
    assert json.loads(json.dumps(l.to_dict()))["batch"] == 2


def test_latencies_compare_with_the_first(net, path):
    out = deploy.latencies(
        {"file": path, "net": net, "large": (net, deploy.Scenario(resolution=24, batch=3))},
        SHAPE,
        n=5,
        warmup=1,
    )
    assert list(out) == ["file", "net", "large"] and all(
        len(l.samples_ms) == 5 for l in out.values()
    )
    assert out["file"].ratio == 1 and out["file"].ratio_ci == (1, 1)
    assert all(l.ratio_ci[0] <= l.ratio_ci[1] for l in out.values())
    json.dumps(out["large"].to_dict())


def test_latency_needs_a_shape_for_a_module(net, path):
    with pytest.raises(ValueError, match="input_shape is missing"):
        deploy.latency(net)
    with pytest.raises(ValueError, match="expects"):
        deploy.latency(path, (3, 8, 8))
    with pytest.raises(ValueError, match="batch"):
        deploy.latency(path, batch=0)
    for kw in (dict(models={}), dict(models={"a": path}, n=0)):
        with pytest.raises(ValueError, match="at least one"):
            deploy.latencies(**kw)


# ---- parity


def plant_eps(net):
    net.blocks[1].bn.eps = 0.5


def plant_conv(net):
    net.blocks[0].conv.weight.data[0] *= 1.1


def plant_head(net):
    net.head.bias.data += 0.1


def plant_act(net):
    net.stem[2] = nn.Hardtanh(0.0, 1.0)


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize(
    "plant, layer",
    [
        (plant_eps, "blocks.1.bn"),
        (plant_conv, "blocks.0.bn"),
        (plant_head, "head"),
        (plant_act, "stem.2"),
    ],
)
def test_parity_finds_a_planted_difference(net, tmp_path, x, plant, layer, dynamo):
    path = deploy.export_onnx(net, tmp_path / "a.onnx", SHAPE, dynamo=dynamo)
    ok = deploy.parity(net, path, x)
    assert (
        ok.first_bad_layer is None
        and ok.sqnr_db > 90
        and ok.top1_agreement == 1
        and not ok.unmatched
    ), ok
    plant(wrong := copy.deepcopy(net))
    bad = deploy.parity(wrong, path, x)
    assert bad.first_bad_layer == layer and bad.sqnr_db < 80 and layer in bad.note
    assert {"blocks.1.bn": ("blocks.1.conv", "blocks.1.bn")}.get(layer, (layer,)) in [
        l.modules for l in bad.layers
    ] or layer == "blocks.0.bn"


def test_parity_matches_repeated_calls(net, path, x):
    assert [l.name for l in deploy.parity(net, path, x).layers].count("silu") == 2


def test_parity_without_names_says_so(net, path, x, tmp_path):
    proto = onnx.load(path)
    for i, n in enumerate(proto.graph.node):
        n.name = f"n{i}"
    onnx.save(proto, tmp_path / "nameless.onnx")
    p = deploy.parity(net, tmp_path / "nameless.onnx", x)
    assert p.first_bad_layer is None and not p.layers and "name" in p.note and p.sqnr_db > 90
    plant_eps(wrong := copy.deepcopy(net))
    assert "cannot say where" in deploy.parity(wrong, tmp_path / "nameless.onnx", x).note


def test_parity_blames_the_optimiser(net, path, x, monkeypatch):
    "A runtime that computes the right thing as written, and something else once it optimises."
    honest = deploy._expose

    def lying(proto, names, level, x):
        outs = honest(proto, names, "disable", x)
        if level == "disable":
            return outs
        order = [n.output[0] for n in proto.graph.node]
        at = order.index(
            next(
                n.output[0] for n in proto.graph.node if n.name.startswith("/blocks/blocks.1/conv")
            )
        )
        return {k: v + 0.5 * (order.index(k) >= at) for k, v in outs.items()}

    monkeypatch.setattr(deploy, "_expose", lying)
    run = deploy.run
    monkeypatch.setattr(
        deploy, "run", lambda *a, **k: run(*a, **k) + 0.5 * np.arange(5, dtype=np.float32)
    )
    p = deploy.parity(net, path, x)
    assert p.first_bad_layer == "blocks.1.bn" and "optimises" in p.note


def test_parity_of_another_network(net, path, x):
    class Other(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    with pytest.raises(ValueError, match="another network"):
        deploy.parity(Other(), path, x)


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"]
)
def test_torchvision_networks(name, tmp_path):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    net, x = getattr(models, name)(), torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        net(x)
    p = deploy.parity(net, deploy.export_onnx(net, tmp_path / "a.onnx", (3, 64, 64)), x)
    assert p.first_bad_layer is None and p.sqnr_db > 80 and not p.unmatched, p


# ---- machine


def test_machine_is_plain_and_private():
    import socket

    text = json.dumps(m := deploy.machine())
    assert {"cpu", "cores", "flags", "python", "torch", "onnxruntime"} <= set(m)
    assert socket.gethostname() not in text and str(Path.home()) not in text
    assert isinstance(deploy.has_vnni(), bool)


class Saturated(nn.Module):
    "All outputs far below the precision of 32 bits"

    def forward(self, x):
        return (x.flatten(1).mean(1) - 40).sigmoid()


def test_outputs_that_vanish_are_no_mismatch(tmp_path):
    path = deploy.export_onnx(Saturated(), tmp_path / "net.onnx", (3, 4, 4))
    assert abs(deploy.run(path, torch.randn(2, 3, 4, 4).numpy())).max() < 1e-6
