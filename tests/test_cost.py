"""Properties of mep.cost: formulas against PyTorch's counter, memory, attribution, and that
the network is left alone."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from mep.cost import FORMULAS, Profile, Table, _live, compare, mac_energy, profile

FAST = settings(max_examples=30, deadline=None)


def meta(name, **kw):
    with torch.device("meta"):
        return models.get_model(name, **kw)


def counted(model, *xs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*xs)
    return counter.get_total_flops() // 2


# formulas


@FAST
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
)
def test_convolutions(dims, groups, ci, co, k, stride, padding, dilation, transposed, bias):
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    layer = kind(
        ci * groups,
        co * groups,
        k,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias,
    )
    x = torch.ones(1, ci * groups, *[9] * dims)
    p, y = profile(layer, tuple(x.shape[1:])), layer(x)
    positions = (x if transposed else y).shape[2:].numel()
    assert p.macs == positions * groups * ci * co * k**dims
    assert p.params == sum(q.numel() for q in layer.parameters()) and p.bytes == 4 * p.params
    assert p.layers[0].output_shape == tuple(y.shape) and p.peak_activation_bytes == 4 * (
        x.numel() + y.numel()
    )
    if not transposed:
        assert p.macs == counted(layer, x)


@FAST
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_products(b, m, k, n):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.lin = nn.Parameter(torch.ones(k, n)), nn.Linear(n, 3)
            self.register_buffer("c", torch.ones(b, 3, 3))

        def forward(self, x):
            y = self.lin(x @ self.w)
            return (
                torch.einsum("bij,bkj->bik", y, y),
                torch.baddbmm(y, y, self.c),
                torch.mv(y[0, 0][None], y[0, 0]),
            )

    net, x = Net(), torch.ones(b, m, k)
    p = profile(net, x)
    assert p.macs == b * m * k * n + b * m * n * 3 + b * m * m * 3 + b * m * 9 + 3
    assert p[""].act_macs == b * m * m * 3 + 3  # parameters and buffers are weights
    assert p["lin"].macs == b * m * n * 3


@FAST
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.booleans())
def test_attention(heads, length, source, width, fake):
    class Net(nn.Module):
        def forward(self, q, kv):
            return F.scaled_dot_product_attention(q, kv, kv)

    p = profile(Net(), [(heads, length, width), (heads, source, width)], fake=fake)
    assert p.macs == p.layers[0].act_macs == 2 * heads * length * source * width
    assert p.bops(2, 8) == p.macs * 64  # two activations: the bits of the weights play no part


def test_multihead_attention_is_charged_to_the_owner_of_the_weight():
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    for fake in (True, False):
        p = profile(net, (5, 16), fake=fake)
        assert (
            p["self_attn.out_proj"].macs == 5 * 16 * 16
            and p["self_attn"].macs == 5 * 16 * 48 + 2 * 5 * 5 * 16
        )
        assert p.params == sum(q.numel() for q in net.parameters()) and not any(
            l.note for l in p.layers
        )


@pytest.mark.parametrize("kind,gates", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("fake", [True, False])
def test_recurrent(kind, gates, fake):
    p = profile(kind(8, 16, num_layers=2, batch_first=True), (5, 8), fake=fake)
    assert p.macs == 5 * gates * 16 * (8 + 16 + 16 + 16) and not p.layers[0].note


def test_unknown_work_is_named_and_can_be_taught(monkeypatch):
    class Net(nn.Module):
        def forward(self, x):
            return torch.cdist(x, x)

    p = profile(Net(), (5, 3))
    assert p.macs == 0 and "aten::_cdist_forward not counted" in repr(p)
    monkeypatch.setitem(
        FORMULAS, "aten::_cdist_forward", lambda out, a, b, *_: out.numel() * a.shape[-1]
    )
    assert profile(Net(), (5, 3)).macs == 5 * 5 * 3


# whole networks


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet50",
        "mobilenet_v2",
        "mobilenet_v3_large",
        "mobilenet_v3_small",
        "efficientnet_b0",
        "vit_b_32",
        "swin_t",
        "swin_v2_t",
        "densenet121",
        "shufflenet_v2_x1_0",
        "squeezenet1_1",
        "convnext_tiny",
        "maxvit_t",
    ],
)
def test_published(name):
    net, w = meta(name), list(models.get_model_weights(name))[0]
    side = w.transforms().crop_size[0]
    p = profile(net, (3, side, side))
    assert p.params == w.meta["num_params"] and abs(p.macs / 1e9 - w.meta["_ops"]) < 6e-4
    assert p.macs == counted(net, torch.empty(1, 3, side, side, device="meta"))
    assert not p.notes and not any(l.note for l in p.layers)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "vit_b_32"])
def test_fake_equals_real(name):
    side = 224 if "vit" in name else 64
    net = models.get_model(name)
    a, b = (profile(net, (3, side, side), fake=fake) for fake in (True, False))
    assert (a.macs, a.params, a.bytes, a.peak_activation_bytes) == (
        b.macs,
        b.params,
        b.bytes,
        b.peak_activation_bytes,
    )
    assert [(l.name, l.macs, l.output_shape) for l in a.layers] == [
        (l.name, l.macs, l.output_shape) for l in b.layers
    ]


def test_wrappers_measure_what_they_wrap():
    net = models.resnet18()
    p = profile(net, (3, 64, 64))
    assert profile(torch.compile(net), (3, 64, 64)).macs == p.macs
    assert profile(torch.fx.symbolic_trace(net), (3, 64, 64)).macs == p.macs
    with torch.inference_mode():
        assert profile(net, (3, 64, 64)) == p
    with ThreadPoolExecutor(4) as pool:
        assert all(q == p for q in pool.map(lambda _: profile(net, (3, 64, 64)), range(8)))
    assert torch.backends.mha.get_fastpath_enabled()


def test_half_precision_and_reparametrisation():
    assert profile(models.resnet18().half(), (3, 64, 64)).bytes == 2 * 11689512
    plain = profile(nn.Conv2d(3, 4, 3), (3, 8, 8))
    for wrap in (
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
    ):
        net = wrap(nn.Conv2d(3, 4, 3))
        p = profile(net, (3, 8, 8))
        assert p[""].macs == plain.macs and p.peak_activation_bytes == plain.peak_activation_bytes
        assert p.params == sum(q.numel() for q in net.parameters())


# attribution, sharing, several inputs


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.unused = nn.Linear(4, 4), nn.Linear(3, 2)
        self.again, self.tied = self.a, nn.Linear(4, 4)
        self.tied.weight = self.a.weight

    def forward(self, x):
        return self.tied(self.again(self.a(x)))


def test_shared_modules_and_weights():
    p = profile(Shared(), (4,))
    assert p.macs == 3 * 16 and p["a"].macs == 2 * 16 and p["a"].calls == 2 and p["tied"].macs == 16
    assert p.params == 16 + 4 + 4 + 8 == sum(q.numel() for q in Shared().parameters())
    assert p["unused"].calls == 0 and "never ran" in p["unused"].note
    with pytest.raises(KeyError, match="similar names: \\['tied'\\]"):
        p["tie"]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.emb = nn.Linear(4, 4), nn.Embedding(10, 4)

    def forward(self, x, ids, scale=None):
        return {"y": [self.lin(x) + self.emb(ids)], "ids": ids}


def test_several_inputs_and_nested_outputs():
    p = profile(Two(), [(4,), torch.tensor([[1, 2, 3]])])
    assert p.macs == 16 and p.params == 60 and p.input_shapes == [(1, 4), (1, 3)]


# memory


def test_residual_keeps_the_skip_alive():
    class Net(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.c1, self.c2, self.relu = (
                nn.Conv2d(8, 8, 3, padding=1),
                nn.Conv2d(8, 8, 3, padding=1),
                nn.ReLU(inplace),
            )
            self.bn = nn.BatchNorm2d(8)

        def forward(self, x):
            return self.relu(self.bn(self.c2(self.relu(self.c1(x)))) + x)

    a, b = (profile(Net(inplace), (8, 6, 6)).peak_activation_bytes for inplace in (True, False))
    assert a == b == 3 * 4 * 8 * 36


def test_memory_of_branches_views_and_by_products():
    class Net(nn.Module):
        def forward(self, x):
            parts = [F.max_pool2d(x, 3, 1, 1) for _ in range(3)]  # its indices are never read
            return torch.cat(parts, 1).flatten(1)

    n = 4 * 2 * 36
    p = profile(Net(), (2, 6, 6))
    assert (
        p.peak_activation_bytes == 6 * n
    )  # three parts and their concatenation; the input is dead by then


@FAST
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), min_size=1, max_size=12
    ),
    st.randoms(),
)
def test_live_bounds(ops, rnd):
    events, made = [], [0]
    for i, (a, b, in_place) in enumerate(ops, 1):
        events.append(([made[a % len(made)], made[b % len(made)]], [i], in_place))
        made.append(i)
    sizes = {i: rnd.randint(1, 9) for i in made}
    live = _live(events, sizes, [0], [made[-1]])
    assert max(live) <= sum(sizes.values())
    for (reads, _, _), n in zip(events, live):
        assert n >= sum(sizes[r] for r in set(reads))
    assert live == _live([(r, b, f) for r, b, f in events], sizes, [0], [made[-1]])
    assert all(
        x <= y
        for x, y in zip(live, _live([(r, b, False) for r, b, _ in events], sizes, [0], [made[-1]]))
    )


# bits, energy, tables


def test_bops_and_size():
    p = profile(models.mobilenet_v3_small(), (3, 64, 64))
    assert p.bops(8, 8) == 64 * p.macs and p.bops({"*": 4}, 8) == 32 * p.macs and p.bops(0, 8) == 0
    assert p.bops({l.name: 4 for l in p.layers}, {l.name: 8 for l in p.layers}) == 32 * p.macs
    assert p.size(32) == p.bytes and p.size(8) == p.params
    assert p.bops({"classifier.0": 4, "*": 8}, 8) == 64 * p.macs - 32 * p["classifier.0"].macs


@pytest.mark.parametrize(
    "bits,word",
    [
        ({"conv": 8}, "'conv'"),
        ({"0": 8}, "no entry for 1 layers"),
        (-1, "-1"),
        (65, "65"),
        (float("nan"), "nan"),
        ("8", "'8'"),
        (True, "True"),
        (None, "None"),
        ({"0": 8, "1": 99}, "'1'"),
    ],
)
def test_bad_bits(bits, word):
    p = profile(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)), (1, 2, 2))
    for call in (p.bops, p.energy, p.size):
        with pytest.raises(ValueError, match="w_bits") as e:
            call(bits)
        assert word in str(e.value)


@FAST
@given(st.integers(1, 15), st.integers(1, 15))
def test_energy_grows_with_bits(w, a):
    assert mac_energy(w, a) == mac_energy(a, w) < mac_energy(w + 1, a)
    assert (
        mac_energy(32, 32) == pytest.approx(4.6)
        and mac_energy(16, 16) == pytest.approx(1.5)
        and mac_energy(0, 8) == 0
    )


def test_totals_are_sums_and_json_round_trips():
    p = profile(models.resnet18(), (3, 64, 64))
    for key in ("macs", "params", "bytes"):
        assert getattr(p, key) == sum(getattr(l, key) for l in p.layers)
    assert p.peak_activation_bytes == max(l.live_bytes for l in p.layers)
    assert p.energy(8, 8).total_uj == pytest.approx(sum(l.energy(8, 8).total_uj for l in p.layers))
    q = Profile.from_dict(json.loads(json.dumps(p.to_dict())))
    assert q == p and repr(q) == repr(p)


def test_tables():
    p = profile(models.resnet18(), (3, 64, 64))
    assert "smaller layers" in repr(p) and len(p.table(1000)) == len(p.layers) + 2
    assert repr(p).splitlines()[-2].split()[:3] == ["total", "149", "M"]
    assert p._repr_markdown_().count("|\n") == len(p.table()) + 1
    t = compare({"fp32": p, "int8": (p, 8, 8)})
    assert isinstance(t, Table) and "(6.25%)" in repr(t) and "(25%)" in repr(t)
    with pytest.raises(ValueError, match="at least one"):
        compare({})


# bad input


@pytest.mark.parametrize(
    "shape",
    [
        None,
        (),
        [],
        "abc",
        224,
        (3, float("nan"), 3),
        (3, 0, 3),
        (3, -1, 3),
        (3.0, 4, 4),
        (True, 2, 2),
        [[]],
        [(3, 4, 4), "x"],
        [(3, 4, 4), 5],
    ],
)
def test_bad_shapes(shape):
    with pytest.raises(ValueError, match="input_shape must be"):
        profile(nn.Identity(), shape)


@pytest.mark.parametrize("shape,layer", [((4, 64, 64), "conv1"), ((1, 3, 64, 64), "conv1")])
def test_wrong_shape_names_the_layer(shape, layer, caplog):
    for net in (meta("resnet18"), models.resnet18()):
        with pytest.raises(ValueError, match=f"layer '{layer}' \\(Conv2d\\) failed"):
            profile(net, shape)
    assert not caplog.records


def test_failures_deep_inside_and_at_the_top():
    with pytest.raises(ValueError, match="layer 'Mixed_6a.branch3x3.conv'"):
        profile(meta("inception_v3", init_weights=False), (3, 32, 32))
    with pytest.raises(ValueError, match="\\(network\\).*missing 1 required positional argument"):
        profile(Two(), (4,))


def test_what_cannot_be_profiled():
    with pytest.raises(TypeError, match="needs a torch.nn.Module, got function"):
        profile(lambda x: x, (3,))
    with pytest.raises(ValueError, match="'weight' of layer '1' has no shape yet"):
        profile(nn.Sequential(nn.ReLU(), nn.LazyLinear(2)), (3,))
    with pytest.raises(TypeError, match="layer '0' is TorchScript"):
        profile(nn.Sequential(torch.jit.script(nn.Linear(3, 3))), (3,))
    net = nn.Linear(3, 3)
    net.handle = (i for i in range(3))
    with pytest.raises(TypeError, match="can't be copied"):
        profile(net, (3,))


# the network is left alone


class Picky(nn.Module):
    "Data-dependent, random, stateful, and it fails on request"

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(1))
        self.calls, self.fail = 0, False

    def forward(self, x):
        self.calls += 1
        self.count += 1
        x = self.drop(self.bn(self.conv(x))) + torch.rand(1)
        if self.fail:
            raise RuntimeError("asked to")
        return x.relu() if x.sum() > 0 else x


@pytest.mark.parametrize("fail", [False, True])
def test_untouched(fail):
    net = Picky().train()
    net.bn.eval()
    net.fail = fail
    net.conv.register_forward_hook(lambda *_: None)
    state, seed, attention = (
        copy.deepcopy(net.state_dict()),
        torch.get_rng_state(),
        torch.backends.mha.get_fastpath_enabled(),
    )
    tensors = {n: id(p) for n, p in net.named_parameters()}
    if fail:
        with pytest.raises(ValueError, match="\\(network\\).*asked to"):
            profile(net, (3, 8, 8))
    else:
        assert "real data" in profile(net, (3, 8, 8)).notes[0]
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert net.calls == 0 and net.training and net.drop.training and not net.bn.training
    assert (
        len(net.conv._forward_hooks) == 1
        and not net.bn._forward_hooks
        and not any(m._forward_pre_hooks for m in net.modules())
    )
    assert tensors == {n: id(p) for n, p in net.named_parameters()} and all(
        p.grad is None for p in net.parameters()
    )
    assert (
        torch.equal(seed, torch.get_rng_state())
        and torch.is_grad_enabled()
        and torch.backends.mha.get_fastpath_enabled() == attention
    )


def test_a_layer_that_fails_and_is_caught():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bad, self.good = nn.Sequential(nn.Linear(7, 7)), nn.Linear(4, 4)

        def forward(self, x):
            try:
                return self.bad(x)
            except RuntimeError:
                return self.good(x) @ x.T

    p = profile(Net(), (4,))
    assert p["good"].macs == 16 and p[""].macs == 4


def test_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    net = models.resnet18()
    p = profile(net, (3, 64, 64))
    assert (
        profile(net.cuda(), (3, 64, 64)).macs
        == profile(net, (3, 64, 64), fake=False).macs
        == p.macs
    )
