"""Properties of data-free quantization: the float function stays on random graphs, what is
refused is named, biases end where they should, bad input."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mep.quant.dfq import (
    absorb_bias,
    bn_images,
    clipped_normal_mean,
    correct_bias,
    dfq,
    drop_caps,
    equalize,
    find_pairs,
    prepare,
    relu6_to_relu,
    unbalance,
)
from mep.quant.export import export_int8
from mep.quant.sim import Clip, quantize
from mep.train import small_mobilenet, small_resnet, sqnr_db

ACTS = dict(
    relu=nn.ReLU,
    relu6=nn.ReLU6,
    none=nn.Identity,
    leaky=lambda: nn.LeakyReLU(0.1),
    prelu=lambda: nn.PReLU(),
    hardswish=nn.Hardswish,
)
SHAPE = (3, 8, 8)


def forall(*strategies, n=40):
    return lambda test: settings(deadline=None, max_examples=n)(given(*strategies)(test))


class Add(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


class Cat(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], 1)


class Twice(nn.Module):
    "One module called two times"

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(self.body(x))


class Gate(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x * self.body(x.mean((2, 3), keepdim=True)).sigmoid()


class Head(nn.Module):
    "Flattened in the way of older networks"

    def __init__(self, c, size):
        super().__init__()
        self.fc = nn.Linear(c * size * size, 5)

    def forward(self, x):
        return self.fc(x.view(x.size(0), -1))


def conv(draw, c_in, c_out, act, k=1, groups=1):
    bn = draw(st.booleans())
    return [
        nn.Conv2d(c_in, c_out, k, padding=k // 2, groups=groups, bias=not bn),
        *([nn.BatchNorm2d(c_out)] if bn else []),
        act(),
    ]


@st.composite
def networks(draw):
    """A random network: chains, depthwise and grouped convolutions, shortcuts, branches,
    shared modules, gates, pools, several heads"""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    act = lambda: ACTS[draw(st.sampled_from(sorted(ACTS)))]()
    c, layers, size = 4, conv(draw, 3, 4, act, 3), 8
    for kind in draw(
        st.lists(
            st.sampled_from(
                [
                    "conv",
                    "depthwise",
                    "grouped",
                    "shortcut",
                    "branch",
                    "shared",
                    "gate",
                    "max",
                    "avg",
                ]
            ),
            min_size=1,
            max_size=5,
        )
    ):
        if kind == "conv":
            layers += conv(draw, c, c, act, draw(st.sampled_from([1, 3])))
        elif kind == "depthwise":
            layers += conv(draw, c, c, act, 3, c) + conv(draw, c, c, act)
        elif kind == "grouped":
            layers += conv(draw, c, c, act, 3, 2)
        elif kind == "shortcut":
            layers.append(
                Add(nn.Sequential(*conv(draw, c, 8, act), *conv(draw, 8, c, nn.Identity)))
            )
        elif kind == "branch":
            layers.append(
                nn.Sequential(Cat(*(nn.Sequential(*conv(draw, c, 2, act)) for _ in range(2))))
            )
        elif kind == "shared":
            layers.append(Twice(nn.Sequential(*conv(draw, c, c, act))))
        elif kind == "gate":
            layers.append(Gate(nn.Conv2d(c, c, 1)))
        elif kind == "max":
            layers.append(nn.MaxPool2d(3, 1, 1))
        elif kind == "avg":
            layers.append(nn.AvgPool2d(3, 1, 1))
        c = 4
    head = draw(st.sampled_from(["pool", "view", "mlp", "none"]))
    if head == "pool":
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 5)]
    if head == "view":
        layers += [Head(c, size)]
    if head == "mlp":
        layers += [
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(c, 6),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(6, 6),
            nn.ReLU6(),
            nn.Linear(6, 5),
        ]
    return randomize(
        nn.Sequential(*layers),
        spread=draw(st.sampled_from([0.0, 1.0, 3.0])),
        dead=draw(st.booleans()),
    )


def randomize(net, spread=1.0, dead=False):
    """Batch norms with statistics that real ones may have, channels of very different size,
    and maybe a dead one"""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.2, 3)
            m.weight.data = (spread * torch.randn(m.num_features)).exp() * torch.sign(
                torch.randn(m.num_features)
            )
            m.bias.data.normal_()
            if dead:
                m.weight.data[0] = 0.0
    return net.eval()


def same(a, b, x, db=75):
    with torch.no_grad():
        ya, yb = a(x), b(x)
    assert yb.isfinite().all()
    return torch.equal(ya, yb) or sqnr_db(ya, yb) > db


def pictures(n=4, shape=SHAPE, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


# The float function


@forall(networks(), st.booleans())
def test_equalize_keeps_the_function(net, activations):
    before = copy.deepcopy(net.state_dict())
    assert same(net, equalize(net, activations), pictures())
    assert all(
        torch.equal(v, before[k]) for k, v in net.state_dict().items()
    )  # the caller's network is untouched


@forall(networks(), st.integers(0, 100))
def test_unbalance_keeps_the_function_and_equalize_undoes_it(net, seed):
    hard = unbalance(net, seed=seed)
    assert same(net, hard, pictures()) and same(net, equalize(hard), pictures())


@forall(networks())
def test_every_layer_is_paired_or_named(net):
    found = find_pairs(net)
    layers = {n for n, m in prepare(net).named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert {p.first for p in found.pairs} | set(found.refused) == layers
    assert not {p.first for p in found.pairs} & set(found.refused) and all(found.refused.values())


@forall(networks(), n=15)
def test_the_whole_way_runs(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qm = dfq(net, pictures(8), progress=False)
    assert qm(pictures()).isfinite().all() and [s.name for s in qm.steps] == [
        "quantize",
        "equalize",
        "absorb_bias",
    ]


@pytest.mark.parametrize("make", [small_mobilenet, small_resnet])
def test_our_networks(make):
    net = randomize(make(5))
    x = pictures(shape=(3, 32, 32))
    assert same(net, equalize(unbalance(net)), x)
    assert len(find_pairs(net).pairs) >= 3


# What equalize does


def widths(net, name, dim):
    return net.get_submodule(name).weight.detach().abs().transpose(0, dim).flatten(1).amax(1)


def test_weights_meet_and_do_not_depend_on_the_start():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 3)).eval()
    a, b = equalize(net), equalize(unbalance(net, std=2.0))
    assert torch.allclose(widths(a, "0", 0), widths(a, "2", 1), rtol=1e-3)
    assert torch.allclose(a.get_submodule("0").weight, b.get_submodule("0").weight, rtol=1e-3)


def test_a_triple_ends_at_the_closed_form():
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 5, 1)
    ).eval()
    r = [widths(net, "0", 0), widths(net, "2", 0), widths(net, "4", 1)]
    same_for_all = (r[0] * r[1] * r[2]) ** (1 / 3)
    done = equalize(net, tol=1e-6)
    for name, dim in (("0", 0), ("2", 0), ("4", 1)):
        assert torch.allclose(widths(done, name, dim), same_for_all, rtol=1e-3)


def test_caps_scale_along():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 2, 1)).eval()
    net[0].weight.data *= torch.tensor([1.0, 10.0, 100.0, 0.1]).view(-1, 1, 1, 1)
    done = equalize(net)
    (clip,) = (m for m in done.modules() if isinstance(m, Clip))
    s = net[0].weight[:, 0, 0, 0] / done.get_submodule("0").weight[:, 0, 0, 0]
    assert clip.hi.shape == (4,) and torch.allclose(clip.hi, 6 / s.detach(), rtol=1e-4)
    x = 50 * pictures()  # the caps are reached
    assert same(net, done, x) and not same(net, relu6_to_relu(net), x, 20)


def test_dead_channels_do_not_set_the_range():
    "A channel whose writer is zero, read by huge weights: they must shrink, and nothing may explode"
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU6(),
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU6(),
        nn.Conv2d(4, 2, 1),
    ).eval()
    net[0].weight.data[1] = 0.0
    net[3].weight.data[1] = 1e4
    done = equalize(net)
    assert same(net, done, pictures())
    rest = done.get_submodule("3").weight[[0, 2, 3]].abs().max()
    assert done.get_submodule("3").weight[1].abs().max() < 2 * rest


def test_an_all_zero_layer():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    net[0].weight.data.zero_()
    assert same(net, equalize(net), pictures())
    dfq(net, pictures(), progress=False)


@pytest.mark.parametrize(
    "block, why",
    [
        (lambda: [nn.Conv2d(3, 4, 1), nn.Hardswish(), nn.Conv2d(4, 4, 1)], "Hardswish"),
        (lambda: [nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 4, 1)], "Sigmoid"),
        (lambda: [nn.Conv2d(3, 4, 1), Add(nn.Conv2d(4, 4, 1))], "2 places"),
        (
            lambda: [Cat(nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)), nn.Conv2d(8, 4, 1)],
            "another branch",
        ),
        (lambda: [nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 2)], "ConvTranspose2d"),
        (lambda: [nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Conv2d(8, 4, 1)], "another dimension"),
        (lambda: [nn.Conv2d(3, 4, 1)], "the network's output"),
    ],
)
def test_what_is_refused_is_named(block, why):
    net = nn.Sequential(*block()).eval()
    found = find_pairs(net)
    assert any(why in reason for reason in found.refused.values()), found
    assert why in repr(found) and same(net, equalize(net), pictures())


# Means and biases


@forall(
    st.floats(-4, 8),
    st.floats(0.01, 4),
    st.sampled_from([(0.0, math.inf), (0.0, 6.0), (-1.0, 2.0), (-math.inf, math.inf)]),
)
def test_clipped_mean_is_the_integral(mean, std, clip):
    t = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    weight = torch.exp(-t * t / 2)
    want = ((mean + std * t).clamp(*clip) * weight).sum() / weight.sum()
    assert clipped_normal_mean(
        torch.tensor(mean), torch.tensor(std), *clip
    ).item() == pytest.approx(want.item(), abs=1e-4)


def test_a_deviation_of_zero():
    assert clipped_normal_mean(
        torch.tensor([-1.0, 3.0, 9.0]), torch.zeros(3), 0.0, 6.0
    ).tolist() == [0.0, 3.0, 6.0]


def gaussian_network(seed=0):
    "Batch norms that tell the truth: re-estimated on the images the test uses"
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.Conv2d(16, 8, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
            m.bias.data.uniform_(-1, 3)
    x = pictures(256)
    net.train()
    for _ in range(4):
        with torch.no_grad():
            net(x)
    return net.eval(), x


@pytest.mark.parametrize("method", ["analytic", "empirical", "auto"])
def test_correction_brings_means_back(method):
    net, x = gaussian_network()
    qm = quantize(prepare(net), x, w_bits=3, a_bits=None, progress=False)
    fixed = correct_bias(qm, x, method)
    with torch.no_grad():
        want, rounded, corrected = net(x), qm(x), fixed(x)
    assert (corrected - want).mean(0).abs().max() < 0.35 * (rounded - want).mean(0).abs().max()
    assert sqnr_db(want, corrected) > sqnr_db(want, rounded)


def test_correcting_twice_is_correcting_once():
    net, x = gaussian_network()
    for method in ("analytic", "empirical"):
        once = correct_bias(quantize(prepare(net), x, w_bits=4, progress=False), x, method)
        assert torch.allclose(once(x), correct_bias(once, x, method)(x), atol=1e-5)


def test_correction_leaves_its_input_and_the_integers():
    net, x = gaussian_network()
    qm = quantize(prepare(net), x, w_bits=4, progress=False)
    before = qm(x)
    fixed = correct_bias(qm, x)
    assert torch.equal(qm(x), before)
    assert all(
        torch.equal(a.weight_q, b.weight_q)
        for a, b in zip(qm.layers().values(), fixed.layers().values())
    )


def test_unknown_means_stay_without_images():
    "Behind a shortcut's ReLU nothing is known: those biases stay"
    net = randomize(small_resnet(5))
    qm = quantize(prepare(net), pictures(shape=(3, 32, 32)), w_bits=4, progress=False)
    fixed = correct_bias(qm)
    changed = {n for n, m in fixed.layers().items() if not torch.equal(m.bias, qm.layers()[n].bias)}
    assert changed and changed < set(qm.layers())


def test_absorbing_is_exact_where_inputs_are_high():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ).eval()
    net[1].bias.data.fill_(50.0)
    net[1].weight.data.fill_(2.0)
    net[0].weight.data.uniform_(-0.1, 0.1)
    done = absorb_bias(net)
    assert same(net, done, pictures()) and (done.get_submodule("0").out_mean < 7).all()


def test_absorbing_spares_readers_that_pad():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)
    ).eval()
    net[1].bias.data.fill_(50.0)
    assert same(net, absorb_bias(net), pictures()) and not same(
        net, absorb_bias(net, padded=True), pictures(), 40
    )


# All together


def test_without_data(tmp_path):
    net = unbalance(randomize(small_mobilenet(5, width=0.5)), std=1.5)
    x = pictures(8, (3, 32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qm = dfq(net, input_shape=(3, 32, 32), progress=False)
    naive = quantize(net, x, progress=False)
    assert sqnr_db(net(x).detach(), qm(x).detach()) > sqnr_db(net(x).detach(), naive(x).detach())
    assert export_int8(qm, tmp_path / "dfq.onnx").float_layers == 0


def test_a_step_that_hurts_is_named_and_left_out():
    "Absorbing changes this network's function: its inputs are far from Gaussian"
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()
    net[1].bias.data.fill_(9.0)
    net[1].running_var.fill_(0.01)
    with pytest.warns(UserWarning, match="dfq left out absorb_bias"):
        qm = dfq(net, pictures(16), progress=False)
    assert not qm.steps[-1].kept and "left out" in repr(qm.steps)


def test_caps_are_dropped_only_where_they_do_nothing():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 2, 1)).eval()
    net[0].weight.data *= torch.tensor([1.0, 10.0, 40.0, 0.1]).view(-1, 1, 1, 1)
    qm = quantize(equalize(net), pictures(), progress=False)
    count = lambda q: sum(m.clip.hi.ndim for m in q.quantizers().values())
    assert (
        count(qm) == 1
        and count(drop_caps(qm, pictures() / 100)) == 0
        and count(drop_caps(qm, 20 * pictures())) == 1
    )


def test_images_repeat_and_fit_the_batch_norms():
    net, _ = gaussian_network()
    a, b = (bn_images(net, SHAPE, n=8, steps=20, seed=3, progress=False) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (8, *SHAPE)
    assert not torch.equal(a, bn_images(net, SHAPE, n=8, steps=20, seed=4, progress=False))


# Bad input


def test_one_image_will_do():
    net, x = gaussian_network()
    assert dfq(net, x[:1], progress=False)(x).isfinite().all()


def test_a_network_of_linear_layers():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU6(), nn.Linear(8, 3)
    ).eval()
    x = torch.randn(16, 6)
    assert len(find_pairs(net).pairs) == 1 and "cap" in find_pairs(net).refused["2"]
    assert same(net, equalize(net), x) and dfq(net, x, progress=False)(x).isfinite().all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda net: dfq(net), "input_shape"),
        (lambda net: dfq(net, input_shape=SHAPE, progress=False), "batch norm"),
        (lambda net: dfq(net, pictures(), relu6="drop", progress=False), "carry or relu"),
        (lambda net: dfq(net, pictures(), w_bits=1, progress=False), "2 to 16 bits"),
        (lambda net: dfq(net, torch.full((2, *SHAPE), math.nan), progress=False), "NaN"),
        (lambda net: dfq(net, torch.empty(0, *SHAPE), progress=False), "empty"),
        (lambda net: equalize(quantize(net, pictures(), progress=False)), "already quantized"),
        (
            lambda net: correct_bias(quantize(net, pictures(), progress=False), method="empirical"),
            "needs images",
        ),
        (
            lambda net: correct_bias(quantize(net, pictures(), progress=False), method="x"),
            "choose auto",
        ),
        (
            lambda net: correct_bias(quantize(net, pictures(), progress=False)),
            "no layer knows its batch norm",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 2, 1)).eval()
    with pytest.raises(ValueError, match=message):
        call(net)


def test_nan_weights_are_named():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    net[2].weight.data[0] = math.nan
    with pytest.raises(ValueError, match="2.weight holds NaN"):
        equalize(net)


def test_images_of_another_shape():
    with pytest.raises((ValueError, RuntimeError)):
        dfq(small_mobilenet(5).eval(), torch.randn(4, 1, 32, 32), progress=False)
