"""Cells: one signature, shapes, seeds, graphs, ONNX files, MACs; the registry and what it refuses."""

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mep.cost import profile
from mep.deploy import export_onnx, run
from mep.graph import trace
from mep.nas.cells import (
    CELLS,
    Attention,
    OnTokens,
    Residual,
    Shift,
    cell,
    cell_options,
    diagram,
    make_cell,
)
from mep.train import BasicBlock, InvertedResidual, SqueezeExcite

MAPS = [name for name, c in CELLS.items() if not c.head]
each_map = pytest.mark.parametrize("name", MAPS)
each = pytest.mark.parametrize("name", list(CELLS))
each_stride = pytest.mark.parametrize("stride", [1, 2])


def forall(*strategies, n=30):
    return lambda test: settings(deadline=None, max_examples=n)(given(*strategies)(test))


@pytest.fixture
def registry():
    "Forgets what a test registers."
    before = dict(CELLS)
    yield
    CELLS.clear()
    CELLS.update(before)


def state(m):
    return torch.cat([v.flatten().float() for v in m.state_dict().values()] + [torch.zeros(1)])


# What every cell promises


@forall(
    st.sampled_from(MAPS),
    st.integers(2, 5),
    st.integers(2, 5),
    st.sampled_from([1, 2]),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_shapes(name, c_in, c_out, stride, h, w):
    out = make_cell(name, 8 * c_in, 8 * c_out, stride).eval()(torch.randn(2, 8 * c_in, h, w))
    assert out.shape == (2, 8 * c_out, -(-h // stride), -(-w // stride))
    assert out.isfinite().all()


@each
def test_the_seed_decides_and_the_global_generator_is_left_alone(name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (make_cell(name, 16, 32, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(state(a), state(b)) and not torch.equal(state(a), state(c))


@each_map
@each_stride
def test_traced_and_exported(name, stride, tmp_path):
    net, x = make_cell(name, 16, 24, stride).eval(), torch.randn(3, 16, 7, 9)
    with torch.no_grad():
        y = net(x)
    assert torch.allclose(trace(net)(x), y, atol=1e-6)
    assert torch.allclose(
        torch.as_tensor(run(export_onnx(net, tmp_path / "cell.onnx", (16, 7, 9)), x.numpy())),
        y,
        atol=1e-4,
    )


@each
def test_every_mac_is_counted_and_trained(name):
    net = make_cell(name, 16, 32)
    p = profile(net, (16, 8, 8))
    assert p.macs > 0 and not any(row.note for row in p.layers)
    net.train()(torch.randn(4, 16, 8, 8)).square().sum().backward()
    assert all(w.grad is not None for w in net.parameters())


@each_map
def test_same_names_at_any_shape(name):
    "A state dict's names follow from the options, but for a shortcut that projects and what fits the shapes."
    a, b = (make_cell(name, 16, 16, stride).state_dict().keys() for stride in (1, 1))
    assert list(a) == list(b) and all(k.startswith("body.") for k in a if name != "conv")


@pytest.mark.parametrize("name", [n for n in MAPS if n not in ("conv", "vit", "skip")])
def test_input_is_added_where_shapes_allow(name):
    net, x = make_cell(name, 16, 16).eval(), torch.rand(2, 16, 6, 6)
    for m in net.body.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.zeros_(m.weight)
    assert torch.equal(net(x), x)  # a body that gives zero leaves a non-negative input as it is


@pytest.mark.parametrize("name", [n for n, c in CELLS.items() if "se" in c.options])
@each_stride
def test_squeeze_and_excite_in_any_convolutional_cell(name, stride):
    with_, without = (
        sum(isinstance(m, SqueezeExcite) for m in make_cell(name, 16, 24, stride, se=se).modules())
        for se in (True, False)
    )
    assert (with_, without) == (1, 0)
    assert len([n for n, c in CELLS.items() if "se" in c.options]) >= 5


@pytest.mark.parametrize(
    "act, kind", [("relu", nn.ReLU), ("swish", nn.SiLU), ("hswish", nn.Hardswish)]
)
@pytest.mark.parametrize("name", ["basic", "bottleneck", "mobile", "separable", "shift", "vit"])
def test_activation_by_name(name, act, kind):
    assert any(type(m) is kind for m in make_cell(name, 16, 16, act=act, out_act="none").modules())


def test_our_reference_blocks_are_cells():
    x = torch.randn(2, 16, 8, 8)
    for mine, other in (
        (make_cell("basic", 16, 24, 2), BasicBlock(16, 24, 2)),
        (make_cell("mobile", 16, 16, kernel=5, act="relu6"), InvertedResidual(16, 16, kernel=5)),
    ):
        other.load_state_dict(mine.state_dict())
        assert torch.equal(mine.eval()(x), other.eval()(x))


@pytest.mark.parametrize(
    "name, options",
    [
        ("basic", dict(width=0.5)),
        ("mobile", dict(expansion=2)),
        ("bottleneck", dict(groups=4)),
        ("vit", dict(width=0.5)),
        ("basic", dict(groups=8)),
    ],
)
def test_smaller_options_cost_less(name, options):
    assert (
        profile(make_cell(name, 32, 32, **options), (32, 8, 8)).macs
        < profile(make_cell(name, 32, 32), (32, 8, 8)).macs
    )


# Shift and attention


@forall(
    st.sampled_from([1, 3, 5]),
    st.sampled_from([1, 2]),
    st.integers(25, 60),
    st.integers(2, 9),
    st.integers(2, 9),
)
def test_shift_is_a_depthwise_convolution_with_one_one(kernel, stride, channels, h, w):
    x, n = torch.randn(2, channels, h, w), kernel**2
    weight = torch.zeros(channels, 1, kernel, kernel)
    for i in range(n):
        weight[i * channels // n : (i + 1) * channels // n, 0, i // kernel, i % kernel] = 1
    assert torch.equal(
        Shift(channels, kernel, stride)(x),
        F.conv2d(x, weight, stride=stride, padding=kernel // 2, groups=channels),
    )


def test_shift_costs_no_macs_and_no_weights():
    p = profile(Shift(64), (64, 16, 16))
    assert (p.macs, p.params, [row.note for row in p.layers if row.note]) == (0, 0, [])


def test_attention_looks_everywhere_and_does_not_care_about_order():
    attend, x = Attention(16, 16), torch.randn(1, 6, 16)
    order = torch.randperm(6)
    assert torch.allclose(attend(x)[:, order], attend(x[:, order]), atol=1e-5)
    moved = x.clone()
    moved[0, 5] += 1
    assert not torch.allclose(attend(moved)[0, 0], attend(x)[0, 0])


def test_tokens_come_back_as_the_same_map():
    x = torch.randn(2, 4, 3, 5)
    assert torch.equal(OnTokens(nn.Identity())(x), x)
    assert Residual(nn.Identity())(x) is x


# What is refused


@pytest.mark.parametrize(
    "args, options, why",
    [
        (("basik", 8, 8), {}, "did you mean 'basic'"),
        (("basic", 8, 8), dict(with_=1), "did you mean 'width'"),
        (("basic", 8, 8), dict(kernel=2), "odd number"),
        (("basic", 8, 8), dict(kernel=3.0), "odd number"),
        (("basic", 8, 8), dict(kernel=True), "odd number"),
        (("basic", 8, 8), dict(width=0), "above 0"),
        (("basic", 8, 8), dict(width=float("nan")), "above 0"),
        (("basic", 8, 8), dict(width=float("inf")), "above 0"),
        (("basic", 8, 8), dict(act="rely"), "one of relu"),
        (("basic", 8, 8), dict(se=1), "True or False"),
        (("basic", 8, 8), dict(groups=0), "at least 1"),
        (("basic", 8, 12), dict(groups=8), "does not divide"),
        (("mobile", 8, 8, 3), {}, "stride 1 or 2"),
        (("mobile", 8, 8, 0), {}, "positive whole number"),
        (("mobile", 8.5, 8), {}, "c_in=8.5"),
        (("mobile", 8, 0), {}, "c_out=0"),
        (("shift", 8, 8), {}, "8 channels"),
        (("shift", 16, 16), dict(kernel=5), "25 groups"),
        (("vit", 12, 12), {}, "multiple of 8"),
        (("skip", 8, 8), dict(se=True), "no option 'se'"),
        (("classifier", 8, 8), dict(hidden=1.5), "of type int"),
    ],
)
def test_options_that_do_not_fit_are_named(args, options, why):
    with pytest.raises(ValueError, match=why) as e:
        make_cell(*args, **options)
    assert repr(args[0]) in str(e.value)


def test_options_are_filled_up_and_equal_ones_are_equal():
    assert cell_options("mobile", expansion=4) == cell_options("mobile") and isinstance(
        cell_options("mobile", expansion=2)["expansion"], float
    )


@pytest.mark.parametrize(
    "name, make, why",
    [
        ("two words", lambda c_in, c_out, stride: nn.Identity(), "can't be called"),
        ("a,b", lambda c_in, c_out, stride: nn.Identity(), "can't be called"),
        (3, lambda c_in, c_out, stride: nn.Identity(), "can't be called"),
        ("basic", lambda c_in, c_out, stride: nn.Identity(), "already"),
        ("bad", lambda x: x, "must begin with"),
        ("bad", lambda c_in, c_out, stride, **kw: nn.Identity(), r"takes \*kw"),
        ("bad", lambda c_in, c_out, stride, k: nn.Identity(), "needs a default"),
        ("bad", lambda c_in, c_out, stride, k=None: nn.Identity(), "needs a default"),
        ("bad", lambda c_in, c_out, stride, kernel=4: nn.Identity(), "kernel=4"),
        ("bad", lambda c_in, c_out, stride: 3, "returned a int"),
        ("bad", lambda c_in, c_out, stride: nn.Conv2d(c_in, c_out, 3, stride), "must be"),
        ("bad", lambda c_in, c_out, stride: nn.Conv2d(8, c_out, 1), "fails on a map"),
        ("bad", lambda c_in, c_out, stride, mode="a b": nn.Identity(), "may hold letters"),
    ],
)
def test_bad_registrations_are_refused_and_leave_no_trace(name, make, why):
    before = dict(CELLS)
    with pytest.raises(ValueError, match=why):
        cell(name)(make)
    assert CELLS == before


def test_a_cell_that_cannot_be_traced_is_refused():
    class Picky(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) if x.sum() > -1e9 else x

    class Wrapper(nn.Module):
        def __init__(self, *a):
            super().__init__()
            self.conv = Picky(*a)

        def forward(self, x):
            return self.conv(x) if x.mean() < 1e9 else x

    with pytest.raises(ValueError, match="can't trace"):
        cell("picky")(lambda c_in, c_out, stride: Wrapper(c_in, c_out, 1, stride))


def test_own_cells_with_own_options(registry):
    @cell("own")
    def own(c_in, c_out, stride, times=2, mode="plain", act="relu"):
        "Some convolutions"
        return nn.Sequential(
            *[nn.Conv2d(c_out if i else c_in, c_out, 1, 1 if i else stride) for i in range(times)]
        )

    assert len(make_cell("own", 8, 16, 2, times=3)) == 3 and own(8, 8, 1) is not None
    assert cell_options("own") == dict(times=2, mode="plain", act="relu")
    with pytest.raises(ValueError, match="times='a' must be of type int"):
        make_cell("own", 8, 8, times="a")
    cell("own")(own)  # the same function again, as when a notebook's cell is run twice


# The diagram


@pytest.mark.parametrize("name", MAPS)
@each_stride
def test_every_cell_can_be_drawn(name, stride):
    net = make_cell(name, 16, 16, stride)
    before = state(net)
    ax = diagram(net, 16, name)
    texts = [t.get_text() for t in ax.texts]
    if name in ("basic", "bottleneck"):
        assert "+" in texts
    if name == "basic" and stride == 2:
        assert "conv 1x1 /2" in texts  # on the arc
    assert ax.get_title(loc="left") == name and torch.equal(state(net), before)
    plt.close(ax.figure)
