"""Bayesian Bits: nested grids equal uniform ones, exact gradients, bad input, networks of all
kinds, compacting, save and load, kill and resume."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mep.cost import profile
from mep.quant.bayesian_bits import (
    GAMMA,
    TAU,
    THRESHOLD,
    WIDTHS,
    ZETA,
    NestedQuantizer,
    _prepare,
    bayesian_bits,
    blend,
    bops,
    compact,
    expected_bits,
    is_on,
    nested_grids,
    p_on,
    sample_gate,
    shares,
    train_quantized,
    widths,
)
from mep.quant.export import export_int8
from mep.quant.grid import fake_quant
from mep.quant.sim import QuantModel, TraceError, load_quantized, quantize, save_quantized
from mep.train import small_mobilenet, small_resnet, sqnr_db


def forall(*strategies):
    return lambda test: settings(deadline=None, max_examples=30)(given(*strategies)(test))


def batches(n=2, shape=(3, 16, 16), classes=3, size=16):
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, *shape, generator=g), torch.randint(classes, (size,), generator=g))
        for _ in range(n)
    ]


def learn(net, mu=0.05, data=None, **kw):
    "A very short run; closes gates fast"
    kw = dict(epochs=1, finetune=1, gate_lr=4.0, progress=False, device="cpu") | kw
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bayesian_bits(net, batches() if data is None else data, mu, **kw)


def chain(*extra):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1),
        nn.ReLU(),
        *extra,
        nn.Flatten(),
        nn.Linear(8 * 16, 3),
    )


def prune(layer, *channels):
    for t in (layer.weight.data, layer.bias.data):
        t[list(channels)] = 0


# The nested quantizer


@forall(st.floats(0.01, 100), st.floats(-1, 0), st.booleans(), st.integers(0, 2**16))
def test_residuals_add_up_to_the_uniform_grid(hi, lo, symmetric, seed):
    hi = torch.tensor(hi, dtype=torch.float64)
    lo = -hi if symmetric else hi.float() * lo
    x = (
        torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
        - 1.5
    ) * hi
    grids = nested_grids(lo, hi, 16, symmetric)
    x = x[
        (x > grids[-1].lo) & (x < grids[-1].hi)
    ]  # the ends themselves can be ties, and what is clamped would pile up there
    total = torch.zeros_like(x)
    for g in grids:
        total = total + g.scale * ((x - total) / g.scale).round()
        far = ((total - fake_quant(x, g)).abs() > float(g.scale) * 0.05).double().mean()
        assert (
            far < 0.03
            # asymmetric scales are float32: a number within 1e-7 of a tie may round the other way, at
            # 16 bits one in a hundred
        )


@forall(st.integers(2, 5), st.integers(0, 2**16))
def test_open_gates_choose_one_grid(n, seed):
    grids = nested_grids(torch.tensor(-1.0), torch.tensor(1.0), WIDTHS[n - 1], True)
    x = torch.randn(100, generator=torch.Generator().manual_seed(seed))
    for k in range(n):
        gates = (torch.arange(n - 1) < k).float()
        want = x if grids[k] is None else fake_quant(x, grids[k])
        assert torch.equal(blend(x, grids, gates), want)


@forall(st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_shares_are_a_partition(gates):
    c = shares(torch.tensor(gates))
    assert (c >= 0).all() and abs(c.sum() - 1) < 1e-5


def test_a_finer_grid_has_the_points_of_a_coarse_one():
    grids = nested_grids(torch.tensor(-0.3), torch.tensor(1.0), 16)
    for coarse, fine in zip(grids, grids[1:]):
        points = (torch.arange(coarse.qmin, coarse.qmax + 1) - coarse.zero_point) * coarse.scale
        points = points[(points >= -0.3) & (points <= 1)]
        assert (fake_quant(points, fine) - points).abs().max() < 1e-5


def test_gradients_per_channel_and_of_32_bits():
    x = torch.randn(3, 50, dtype=torch.float64).requires_grad_()
    hi = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    t, gates = (
        torch.zeros(3, dtype=torch.float64, requires_grad=True),
        torch.tensor([0.9, 0.8, 0.6, 0.3], dtype=torch.float64, requires_grad=True),
    )
    grids, weight = nested_grids(-hi, hi, 32, True, axis=0), torch.randn(3, 50, dtype=torch.float64)
    ours = torch.autograd.grad((blend(x, grids, gates, t) * weight).sum(), (x, gates, t))
    naive = sum(
        c * (x if g is None else fake_quant(x, replace(g, scale=g.scale * t.exp())))
        for c, g in zip(shares(gates), grids)
    )
    for a, b in zip(ours, torch.autograd.grad((naive * weight).sum(), (x, gates, t))):
        assert torch.allclose(a, b, atol=1e-8)


# Gates and prices


@forall(st.floats(-8, 8))
def test_gates_at_test_time(phi):
    p_zero = torch.sigmoid(torch.tensor(TAU * math.log(-GAMMA / ZETA) - phi))
    assert bool(is_on(torch.tensor(phi))) == bool(p_zero < THRESHOLD)
    assert abs(p_on(torch.tensor(phi)) + p_zero - 1) < 1e-5


@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_the_gradient_of_a_gate_is_the_slope_of_its_expectation(target):
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    f = lambda phi: (sample_gate(phi.expand_as(u), u) - target).square().mean()
    phi = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert abs(torch.autograd.grad(f(phi), phi)[0] - (f(phi + 1e-3) - f(phi - 1e-3)) / 2e-3) < 1e-4


def test_expected_bits_by_hand():
    assert expected_bits(torch.ones(5)) == 62
    assert expected_bits(torch.tensor([0.5, 0.5])) == 2 * 0.5 + 4 * 0.25


def test_settled_gates_do_not_draw():
    q = NestedQuantizer(torch.tensor(-1.0), torch.tensor(1.0), 16, True, phi=0.0).train()
    x = torch.randn(50)
    assert any(not torch.equal(q(x), q(x)) for _ in range(20))
    q.settled = True
    assert torch.equal(q(x), q(x)) and torch.equal(q(x), q.eval()(x))
    assert torch.equal(q(x), fake_quant(x, q.grid()))


# Bad input


@pytest.mark.parametrize(
    "kw, says",
    [
        (dict(mu=-1.0), "mu"),
        (dict(mu=math.nan), "mu"),
        (dict(mu=math.inf), "mu"),
        (dict(max_bits=1), "max_bits=1"),
        (dict(max_bits=6), "max_bits=6"),
        (dict(max_bits=64), "max_bits=64"),
        (dict(skip=["nothing"]), "nothing"),
        (dict(epochs=0), "epochs"),
    ],
)
def test_settings_that_cannot_be(kw, says):
    with pytest.raises(ValueError, match=says):
        learn(chain(), **kw)


@pytest.mark.parametrize("bits", [(1, 8), (8, 1), (3, 8), (0, 8), (None, 8)])
def test_uniform_widths_that_cannot_be(bits):
    with pytest.raises(ValueError, match="_bits="):
        train_quantized(chain(), batches(), *bits)


def test_a_quantized_network_is_refused():
    with pytest.raises(ValueError, match="already quantized"):
        learn(quantize(chain(), batches()[0][0], progress=False))


def test_nan_is_named():
    net = chain()
    net[2].weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="2.weight"):
        learn(net)
    x, y = batches(1)[0]
    x[0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        learn(chain(), data=[(x, y)])


def test_data_without_labels_or_images():
    with pytest.raises(TypeError, match="labels"):
        learn(chain(), data=torch.randn(4, 3, 16, 16))
    with pytest.raises(ValueError, match="empty"):
        learn(chain(), data=[(torch.zeros(0, 3, 16, 16), torch.zeros(0, dtype=torch.long))])


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) if x.sum() > 0 else x.mean((2, 3))


def test_an_untraceable_network_is_refused():
    with pytest.raises(TraceError, match="Untraceable|sum"):
        learn(Untraceable())


def test_a_network_without_layers_is_refused():
    with pytest.raises(ValueError, match="nothing to quantize"):
        learn(nn.Sequential(nn.ReLU(), nn.Flatten()))


# Networks of all kinds


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = (
            nn.Conv2d(3, 4, 3, 2, 1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Linear(4 * 64, 3),
        )

    def forward(self, x):
        x = self.stem(x).relu()
        for _ in range(2):
            x = self.conv(x).relu()
        return self.head(x.flatten(1))


NETWORKS = dict(
    chain=chain,
    linear=lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 3)),
    one=lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 3)),
    grouped=lambda: chain(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU()),
    depthwise=lambda: chain(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU()),
    shared=Shared,
    resnet=lambda: small_resnet(3, width=8),
    mobilenet=lambda: small_mobilenet(3, width=0.25, expand=2, se=True),
)


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_is_learned_compacted_and_exported(name, tmp_path):
    torch.manual_seed(0)
    net = NETWORKS[name]()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    qm = learn(net, mu=0.5)
    assert isinstance(qm, QuantModel) and all(
        torch.equal(v, before[k]) for k, v in net.state_dict().items()
    )
    rows, x = widths(qm), batches()[0][0]
    assert all(
        w.w_bits in WIDTHS and w.a_bits in WIDTHS and 0 <= w.removable <= w.pruned <= w.channels
        for w in rows
    )
    assert rows[-1].pruned == 0  # an answer is never pruned
    small = compact(qm)
    assert torch.allclose(small(x), qm(x), atol=1e-4)
    assert math.isclose(bops(small), bops(qm), rel_tol=1e-6)
    export_int8(small, tmp_path / "net.onnx", x)


def test_a_high_price_prunes_and_a_price_of_zero_keeps_everything():
    dear, free = learn(chain(), mu=100.0, gate_lr=4.0, epochs=3), learn(chain(), mu=0.0)
    assert bops(dear) < bops(free) and all(w.w_bits == 8 and not w.pruned for w in widths(free))
    assert all(w.w_bits == 2 for w in widths(dear))
    assert math.isclose(bops(free), profile(chain(), (3, 16, 16)).bops(8, 8), rel_tol=1e-9)


def test_without_pruning_nothing_is_pruned():
    assert not any(w.pruned for w in widths(learn(chain(), mu=100.0, prune=False)))


def test_post_training_keeps_the_weights():
    net = chain()
    qm = learn(net, weights=False, prune=False)
    assert torch.equal(qm.layers()["0"].weight, net[0].weight)


def test_uniform_widths_everywhere_but_the_image():
    rows = widths(train_quantized(chain(), batches(), 4, 2, epochs=1, progress=False))
    assert [w.w_bits for w in rows] == [4, 4, 4] and [w.a_bits for w in rows] == [8, 2, 2]


def test_wide_grids_go_back_to_float_for_the_file(tmp_path):
    qm = learn(chain(), mu=0.0, max_bits=16)
    assert {w.w_bits for w in widths(qm)} == {16} and {w.stored for w in widths(qm)} == {"float"}
    export_int8(compact(qm), tmp_path / "net.onnx")
    assert {w.w_bits for w in widths(learn(chain(), mu=0.0, max_bits=32))} == {32}


def test_the_start_is_the_8_bit_network():
    torch.manual_seed(0)
    net, data = small_resnet(3, width=8).eval(), batches()
    net[0][0].weight.data.sub_(0.3)  # the largest weights are negative
    _, gated = _prepare(net, data, 8, (8, 8), True, True, ())
    assert sqnr_db(net(data[0][0]), gated.eval()(data[0][0])) > 25


# Compacting


def test_residual_channels_stay_unless_every_branch_is_pruned():
    net = small_resnet(3, width=8).eval()
    qm = quantize(net, batches()[0][0], progress=False)
    layers = qm.layers()
    first, branch = layers["blocks.0.body.0"], layers["blocks.0.body.3"]
    prune(first, 1)
    prune(branch, 2)
    rows = {w.name: w for w in widths(qm)}
    assert (
        rows["blocks.0.body.0"].removable == 1
        and rows["blocks.0.body.3"].pruned == 1
        and rows["blocks.0.body.3"].removable == 0
    )
    prune(layers["stem.0"], 2)
    assert {w.name: w for w in widths(qm)}["blocks.0.body.3"].removable == 1


def test_a_pooled_flattened_chain_shrinks():
    net = chain(nn.MaxPool2d(2))
    net[-1] = nn.Linear(8 * 4, 3)
    prune(net[0], 0, 3)
    prune(net[2], *range(8))
    x = batches()[0][0]
    qm = quantize(net, x, per_channel=True, progress=False)
    small = compact(qm)
    assert [tuple(m.weight.shape) for m in small.layers().values()] == [
        (6, 3, 3, 3),
        (1, 6, 3, 3),
        (3, 4),
    ]  # of a dead tensor one channel stays
    assert torch.equal(small(x), qm(x))


# Saved, interrupted


def test_save_and_load(tmp_path):
    net, x = small_resnet(3, width=8), batches()[0][0]
    qm = learn(net)
    save_quantized(qm, tmp_path / "net.safetensors")
    again = load_quantized(tmp_path / "net.safetensors", small_resnet(3, width=8))
    assert torch.equal(again(x), qm(x)) and repr(widths(again)) == repr(widths(qm))


class Killed(Exception):
    pass


class Dies(list):
    "Batches that end a run after so many"

    left = 10**9

    def __iter__(self):
        for b in super().__iter__():
            if self.left == 0:
                raise Killed
            self.left -= 1
            yield b


@pytest.mark.parametrize(
    "after", [5, 8]
)  # with two batches: in the third epoch of the gates, in the fine-tuning
def test_an_interrupted_run_goes_on(tmp_path, after):
    kw = dict(epochs=3, finetune=2)
    want = learn(chain_(), **kw)
    data = Dies(batches())
    data.left = after + 2  # two are looked at to start the ranges
    with pytest.raises(Killed):
        learn(chain_(), data=data, checkpoint=tmp_path / "run", **kw)
    got = learn(chain_(), data=Dies(batches()), checkpoint=tmp_path / "run", **kw)
    x = batches()[0][0]
    assert torch.equal(got(x), want(x))


def chain_():
    torch.manual_seed(1)
    return chain()
