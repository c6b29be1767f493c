"""Simulated quantization: the caller's network stays as it is, the graph is the network,
integers are integers, and bad input is named."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mep.quant import sim
from mep.quant.grid import make_grid
from mep.quant.sim import (
    Clip,
    QuantAdd,
    Quantizer,
    QuantLayer,
    QuantModel,
    TraceError,
    fold_bn,
    load_quantized,
    quantize,
    save_quantized,
    sensitivity,
    trace,
)
from mep.train import recalibrate_bn, small_mobilenet, small_resnet, sqnr_db


def pictures(n=8, size=16, c=3, seed=0):
    return torch.randn(n, c, size, size, generator=torch.Generator().manual_seed(seed))


def quiet(model, x, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize(model, x, progress=False, **kw)


@pytest.fixture(scope="module")
def resnet():
    return recalibrate_bn(small_resnet(5, width=8), pictures(32)).eval()


@pytest.fixture(scope="module")
def mobilenet():
    return recalibrate_bn(small_mobilenet(5, width=0.5, se=True), pictures(32)).eval()


class Net(nn.Module):
    "A network whose forward is a given function of its modules"

    def __init__(self, forward, **modules):
        super().__init__()
        self.run = forward
        for name, m in modules.items():
            self.add_module(name, m)

    def forward(self, x):
        return self.run(self, x)


# The caller's network


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_callers_network_changes(training):
    net = small_mobilenet(5, width=0.5).train(training)
    before, modules = (
        copy.deepcopy(net.state_dict()),
        [(n, id(m), m.training) for n, m in net.named_modules()],
    )
    quiet(net, pictures()), fold_bn(net), trace(net)
    assert [(n, id(m), m.training) for n, m in net.named_modules()] == modules
    after = net.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_the_calibration_images_stay(resnet):
    x = pictures()
    before = x.clone()
    quiet(resnet, x)
    assert torch.equal(x, before)


# Folding batch norm


@settings(deadline=None, max_examples=25)
@given(
    c=st.integers(1, 6),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    affine=st.booleans(),
    stride=st.integers(1, 2),
    seed=st.integers(0, 999),
)
def test_folding_keeps_the_function(c, groups, bias, affine, stride, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2 * c, 4, 3, stride, groups=groups, bias=bias),
        nn.BatchNorm2d(4, affine=affine),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.LazyLinear(3),
        nn.BatchNorm1d(3),
    )
    x = pictures(4, 8, 2 * c, seed)
    net.train()(x)
    net(x * 2 + 1)
    net.eval()
    folded = fold_bn(net)
    assert not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in folded.modules())
    assert sqnr_db(net(x).detach(), folded(x).detach()) > 80


def test_a_batch_norm_whose_convolution_has_another_reader_is_not_folded():
    net = Net(lambda s, x: s.bn(y := s.conv(x)) + y, conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    x = pictures()
    net.train()(x)
    net.eval()
    assert sqnr_db(net(x).detach(), fold_bn(net)(x).detach()) > 90


def test_a_shared_module_gets_a_grid_for_each_call():
    net = Net(lambda s, x: s.conv(s.conv(x).relu() * 1), conv=nn.Conv2d(3, 3, 3, padding=1)).eval()
    qm = quiet(net, pictures())
    (a, b) = qm.layers().values()
    assert torch.equal(a.weight, b.weight) and a.out.scale != b.out.scale


# Spellings and placement


@pytest.mark.parametrize(
    "act",
    [
        F.relu,
        torch.relu,
        lambda x: x.relu(),
        nn.ReLU(),
        nn.ReLU(inplace=True),
        F.relu6,
        nn.ReLU6(),
        lambda x: x.clamp(0, 6),
        lambda x: torch.clamp(x, min=0.0),
        nn.Hardtanh(0, 4),
        F.hardswish,
        nn.Hardswish(),
        F.silu,
        nn.SiLU(),
        F.hardsigmoid,
        nn.Hardsigmoid(),
        torch.sigmoid,
        nn.Sigmoid(),
        F.leaky_relu,
        nn.LeakyReLU(0.2),
    ],
)
def test_every_spelling_of_an_activation_function_runs_on_integers(act):
    f = {"act": act} if isinstance(act, nn.Module) else {}
    net = Net(
        lambda s, x: s.out((s.act if f else act)(s.conv(x))),
        conv=nn.Conv2d(3, 8, 3),
        out=nn.Conv2d(8, 4, 1),
        **f,
    ).eval()
    x = pictures()
    qm = quiet(net, x)
    assert not qm.report.floats
    assert sqnr_db(net(x).detach(), qm(x).detach()) > 20


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: x.mean((2, 3), keepdim=True),
        lambda x: x.mean([-1, -2], keepdim=True),
        lambda x: F.avg_pool2d(x, x.size(3)),
        lambda x: F.avg_pool2d(x, 2),
        nn.AvgPool2d(3, 2, 1),
        nn.AdaptiveAvgPool2d((7, 7)),
        nn.AdaptiveAvgPool2d(2),
    ],
)
def test_pools_run_on_integers(pool):
    f = {"pool": pool} if isinstance(pool, nn.Module) else {}
    net = Net(
        lambda s, x: s.out((s.pool if f else pool)(s.conv(x))),
        conv=nn.Conv2d(3, 8, 3),
        out=nn.Conv2d(8, 4, 1),
        **f,
    ).eval()
    assert not quiet(net, pictures()).report.floats


def test_operators_without_a_kernel_are_named_and_stay_float():
    net = Net(
        lambda s, x: s.b(F.gelu(s.a(x))) * 2,
        a=nn.Conv2d(3, 4, 3),
        b=nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    )
    with pytest.warns(UserWarning, match="gelu.*no integer kernel"):
        qm = quantize(net, pictures(), progress=False)
    assert qm.report.floats == {
        "gelu": "no integer kernel",
        "b": "padding_mode='reflect'",
        "mul": "not of two activations",
    }
    assert list(qm.layers()) == ["a"]


def test_integers_only_on_the_grid_of_their_quantizer(mobilenet):
    qm, seen = quiet(mobilenet, pictures(), a_bits=5), {}
    for n, q in qm.quantizers().items():
        q.register_forward_hook(lambda m, i, out, n=n: seen.__setitem__(n, out))
    qm(pictures(seed=1))
    for n, out in seen.items():
        grid = qm.quantizers()[n].grid
        q = out / grid.scale + grid.zero_point
        assert (q - q.round()).abs().max() < 1e-3 and q.min() > -0.01 and q.max() < 31.01


def test_a_cap_per_channel_holds():
    cap = torch.tensor([0.1, 0.5, 2.0])
    net = Net(
        lambda s, x: s.out(s.cap(s.conv(x))),
        conv=nn.Conv2d(3, 3, 1),
        cap=Clip(0, cap),
        out=nn.Conv2d(3, 2, 1),
    ).eval()
    qm = quiet(net, pictures())
    y = qm.layers()["conv"](qm.quantizers()["input"](pictures(seed=3) * 5))
    step = qm.quantizers()["conv"].scale
    assert (
        (y.amax((0, 2, 3)) <= cap + step / 2).all()
        and (y >= 0).all()
        and qm.report[0].how == "integer, cap included"
    )


# Arithmetic


@settings(deadline=None, max_examples=25)
@given(
    c_in=st.integers(1, 8),
    c_out=st.integers(1, 6),
    k=st.sampled_from([1, 3]),
    per_channel=st.booleans(),
    w_bits=st.integers(2, 8),
    seed=st.integers(0, 999),
)
def test_a_layer_is_exact_integer_arithmetic(c_in, c_out, k, per_channel, w_bits, seed):
    torch.manual_seed(seed)
    source, out = Quantizer(), Quantizer(clip=Clip(0))
    source.grid, out.grid = make_grid(-1.0, 2.0), make_grid(0.0, 1.0)
    layer = QuantLayer(nn.Conv2d(c_in, c_out, k), w_bits, source, out)
    layer.fit("mse", per_channel)
    x = source(pictures(2, 6, c_in, seed))
    q = (x / source.scale).round().long()
    total = F.conv2d(q, layer.weight_q.long(), layer.bias_q.long())
    m = layer.total_scale / out.scale
    want = torch.round(total * (m.view(-1, 1, 1) if per_channel else m)).clamp(0, 255) * out.scale
    assert torch.equal(layer(x).detach(), want)


def test_batches_do_not_matter(mobilenet):
    qm, x = quiet(mobilenet, pictures()), pictures(seed=5)
    with torch.no_grad():
        assert torch.equal(qm(x), torch.cat([qm(i[None]) for i in x]))


def test_a_sum_is_a_sum():
    a, b, out = (Quantizer() for _ in range(3))
    a.grid, b.grid, out.grid = make_grid(-1.0, 1.0), make_grid(0.0, 3.0), make_grid(-1.0, 4.0)
    x, y = a(torch.rand(999) * 2 - 1), b(torch.rand(999) * 3)
    assert (QuantAdd([a, b], out)(x, y) - (x + y)).abs().max() <= out.scale * 0.501


def test_gradients_pass_through(resnet):
    qm, x = quiet(resnet, pictures()), pictures().requires_grad_()
    qm(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
        ),
    ],
)
def test_it_runs_where_the_network_is(resnet, device):
    qm = quiet(copy.deepcopy(resnet).to(device), pictures())
    assert qm(pictures().to(device)).device.type == device and qm.check_batch.device.type == "cpu"


# Settings


def test_more_bits_less_noise(resnet):
    x, db = pictures(), []
    with torch.no_grad():
        for b in (2, 4, 6, 8, 10):
            db.append(sqnr_db(resnet(x), quiet(resnet, x, w_bits=b, a_bits=b, per_channel=True)(x)))
    assert db == sorted(db) and db[-1] > 35


def test_weights_or_activations_alone(resnet):
    x = pictures()
    weights, activations, nothing = (
        quiet(resnet, x, w_bits=w, a_bits=a) for w, a in ((4, None), (None, 4), (None, None))
    )
    assert not weights.quantizers() and all(m.on for m in weights.layers().values())
    assert activations.quantizers() and not any(m.on for m in activations.layers().values())
    with torch.no_grad():
        assert sqnr_db(resnet(x), nothing(x)) > 90


def test_bits_by_layer_and_skipped_layers(resnet):
    qm = quiet(
        resnet,
        pictures(),
        w_bits=4,
        layer_bits={"blocks.0*": (8, 6), "stem.0": (None, 8)},
        skip=["head.2"],
    )
    grids = {n: m.grid for n, m in qm.layers().items()}
    assert (
        grids["blocks.0.body.0"].n_bits == 8 and qm.quantizers()["blocks.0.body.0"].grid.n_bits == 6
    )
    assert grids["blocks.1.body.0"].n_bits == 4 and grids["stem.0"] is None
    assert qm.report.floats == {"head.2": "skipped"} and "head.2" not in grids


def test_all_off_is_the_float_network(mobilenet):
    qm, x = quiet(mobilenet, pictures(), w_bits=3), pictures(seed=1)
    with torch.no_grad():
        assert sqnr_db(mobilenet(x), qm.set_enabled(weights=False, activations=False)(x)) > 90
        on = quiet(mobilenet, pictures(), w_bits=3)(x)
        assert torch.equal(qm.set_enabled(weights=True, activations=True)(x), on)


def test_sensitivity_names_the_bad_layer(resnet):
    qm, x = quiet(resnet, pictures(), layer_bits={"blocks.1.body.0": (2, 8)}), pictures(seed=2)
    before = copy.deepcopy(qm.state_dict())
    rows = sensitivity(qm, x, progress=False)
    assert (
        min((r for r in rows if r.weights_db is not None), key=lambda r: r.weights_db).name
        == "blocks.1.body.0"
    )
    assert [r.name for r in rows][:3] == ["input", "stem.0", "blocks.0.body.0"] and rows[
        0
    ].weights_db is None
    assert all(math.isfinite(r.sqnr_db) for r in rows)
    assert all(torch.equal(v, before[k]) for k, v in qm.state_dict().items())


def test_integer_weights_can_be_replaced(resnet):
    qm = quiet(resnet, pictures(), w_bits=4)
    layer, x = qm.layers()["stem.0"], pictures()
    with torch.no_grad():
        before = qm(x)
        layer.set_weight_q(
            (layer.weight_q + 1).clamp(layer.weight_grid.qmin, layer.weight_grid.qmax)
        )
        assert not torch.equal(qm(x), before)
    with pytest.raises(ValueError, match="do not fit"):
        layer.set_weight_q(layer.weight_q + 100)
    with pytest.raises(ValueError, match="shape"):
        layer.set_weight_q(layer.weight_q[:1])


def test_a_dead_channel_with_a_bias_keeps_its_bias():
    net = Net(lambda s, x: s.out(s.conv(x)), conv=nn.Conv2d(3, 4, 3), out=nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        net.conv.weight[0] *= 1e-13
        net.conv.weight[1] = 0
        net.conv.bias[:2] = torch.tensor([3.0, -2.0])
    x = pictures()
    for per_channel in (True, False):
        qm = quiet(net, x, per_channel=per_channel)
        y = qm.layers()["conv"](qm.quantizers()["input"](x)).detach()
        assert (y[:, 0] - 3).abs().max() < 0.05 and (y[:, 1] + 2).abs().max() < 0.05


# Copies and files


def test_copies_are_independent(resnet):
    qm, x = quiet(resnet, pictures()), pictures()
    twin = copy.deepcopy(qm)
    with torch.no_grad():
        want = qm(x)
        assert torch.equal(twin(x), want)
        twin.set_enabled("stem.0", weights=False).layers()["blocks.0.body.0"].source.scale *= 2
        assert torch.equal(qm(x), want) and not torch.equal(twin(x), want)
    assert twin.layers()["stem.0"].source is twin.quantizers()["input"]


@pytest.mark.parametrize(
    "kw",
    [
        {},
        dict(w_bits=4, per_channel=True),
        dict(a_bits=None),
        dict(skip=["stem.0"]),
        dict(layer_bits={"stem.0": (3, 5)}),
    ],
)
def test_a_saved_network_is_the_same_network(mobilenet, tmp_path, kw):
    qm, x = quiet(mobilenet, pictures(), **kw), pictures(seed=4)
    qm.set_enabled("blocks.1*", activations=False) if kw.get("a_bits", 8) else None
    save_quantized(qm, tmp_path / "q.safetensors")
    again = load_quantized(
        tmp_path / "q.safetensors", small_mobilenet(5, width=0.5, se=True, seed=9)
    )
    with torch.no_grad():
        assert torch.equal(again(x), qm(x))
    with pytest.raises(ValueError, match="another network"):
        load_quantized(tmp_path / "q.safetensors", small_resnet(5))


# Memory


@pytest.fixture
def watched(monkeypatch):
    "The sizes of all batches that pass, and the bytes of the samples kept each time ranges are chosen"
    seen = dict(batches=[], kept=[])
    forward, choose = QuantModel.forward, sim._set_ranges

    def passing(self, x):
        seen["batches"].append(len(x))
        return forward(self, x)

    def choosing(qm, ranges):
        seen["kept"].append(sum(o.kept.nbytes for o in qm.felt.values()))
        return choose(qm, ranges)

    monkeypatch.setattr(QuantModel, "forward", passing)
    monkeypatch.setattr(sim, "_set_ranges", choosing)
    return seen


@pytest.mark.parametrize("ranges", ["output", "minmax", "mse", "percentile"])
@pytest.mark.parametrize("n", [40, 400])
def test_calibration_keeps_to_its_memory(resnet, watched, ranges, n):
    each = sim._bytes_per_image(quiet(resnet, pictures(size=32)).net)
    memory = 8 * each
    watched["batches"].clear()
    watched["kept"].clear()
    quiet(resnet, pictures(n, size=32), ranges=ranges, memory=memory)
    passes = [b for b in watched["batches"] if b > 2]  # beside the trial with two images
    assert 6 == (1 - sim.KEPT) * memory / each and max(passes) * each <= memory
    assert sum(passes) >= min(n, sim.LOOKED_AT)
    assert watched["kept"] and max(watched["kept"]) <= sim.KEPT * memory


def test_one_image_at_a_time_gives_nearly_the_same(resnet, watched):
    x, want = pictures(64), None
    for memory in (1e9, 1):
        watched["batches"].clear()
        qm = quiet(resnet, x, memory=memory)
        largest = max(watched["batches"][1:])
        with torch.no_grad():
            db = sqnr_db(resnet(x), qm(x))
        want = want or db
    assert largest == 1 and abs(db - want) < 1.5


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 5000),
    st.sampled_from([600, 6000, 10**7]),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_a_sample_stands_for_all_and_keeps_both_ends(n, memory, passes, seed):
    x = torch.randn(passes, n, generator=torch.Generator().manual_seed(seed)) ** 3
    observer = sim._Observer("layer", passes, memory, "cpu")
    for part in x:
        observer(part)
    values, counts, _ = observer.kept[:, : observer.used]
    assert counts.sum().item() == pytest.approx(x.numel(), rel=1e-4)
    assert values.min() == x.min() and values.max() == x.max()
    assert observer.used * 12 <= max(memory, 12 * 12 * passes)


# Bad input


@pytest.mark.parametrize(
    "kw, words",
    [
        (dict(w_bits=1), "w_bits=1"),
        (dict(a_bits=33), "a_bits=33"),
        (dict(w_bits=4.5), "4.5"),
        (dict(layer_bits={"stem.0": (0, 8)}), "stem.0"),
        (dict(ranges="max"), "minmax"),
        (dict(skip=["stem.7"]), "stem.0"),
        (dict(layer_bits={"nothing": (4, 4)}), "nothing"),
        (dict(memory=0), "memory=0"),
        (dict(memory="2 GB"), "memory='2 GB'"),
        (dict(memory=math.inf), "memory=inf"),
    ],
)
def test_bad_settings_are_named(resnet, kw, words):
    with pytest.raises(ValueError, match=words):
        quiet(resnet, pictures(), **kw)


@pytest.mark.parametrize(
    "calib, words",
    [
        (pictures(0), "empty"),
        ([], "empty"),
        (pictures(c=1), "stem.0"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "uint8"),
        (pictures() * math.nan, "NaN"),
    ],
)
def test_bad_images_are_named(resnet, calib, words):
    with pytest.raises(ValueError, match=words):
        quiet(resnet, calib)


def test_nan_weights_are_named(resnet):
    net = copy.deepcopy(resnet)
    with torch.no_grad():
        net.blocks[1].body[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="blocks.1.body.0.weight"):
        quiet(net, pictures())


def test_an_overflow_inside_the_network_is_named():
    net = Net(lambda s, x: s.b(s.a(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        net.a.weight.fill_(3e38)
        net.b.weight.fill_(1.0)
    with pytest.raises(ValueError, match="'a'"):
        quiet(net, pictures().abs() * 10)


def test_a_network_that_cannot_be_traced_names_its_line():
    def forward(self, x):
        if x.sum() > 0:
            return x  # this very line
        return -x

    with pytest.raises(TraceError, match=r"test_sim\.py.*x\.sum\(\) > 0"):
        quiet(Net(forward), pictures())


def test_a_network_that_the_trace_misreads_is_refused():
    state = []

    def forward(self, x):
        state.append(1)
        return self.a(x) * len(state)

    with pytest.raises(TraceError, match="two answers to the same images"):
        quiet(Net(forward, a=nn.Conv2d(3, 3, 1)), pictures())

    def forward(self, x):
        return self.a(x) * (2 if isinstance(x, torch.Tensor) else 1)  # a stand-in is none

    with pytest.raises(
        TraceError, match="something else than the network; it starts behind its last layer"
    ):
        quiet(Net(forward, a=nn.Conv2d(3, 3, 1)), pictures())


def test_a_quantized_network_is_refused(resnet):
    qm = quiet(resnet, pictures())
    for model in (qm, qm.net, nn.Sequential(qm)):
        with pytest.raises(ValueError, match="already quantized"):
            quiet(model, pictures())


def test_loaders_and_one_image_will_do(resnet):
    x = pictures()
    for calib in ([(x, torch.zeros(8))], [x[:3], x[3:]], x[:1]):
        assert isinstance(quiet(resnet, calib), QuantModel)
