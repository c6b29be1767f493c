"""Compression methods that a function tells: what they compute, how well they are fitted, whom
they may replace, and every way to choose them."""

import copy

import pytest
import torch
from torch import nn

from mep.compress import COMPRESSIONS, compress, compression
from mep.compress.methods import find_compression, weight_of
from mep.compress.select import Layer, cuts, target_of
from mep.moments import observe
from mep.train import small_resnet

OPS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1)),
    nn.Conv2d(4, 6, 5, padding=(1, 2), padding_mode="reflect", stride=3),
    nn.Conv2d(4, 6, 3, dilation=2, padding="same"),
    nn.Conv2d(4, 6, 1, stride=2),
    nn.Linear(4, 6),
]


@pytest.fixture(autouse=True)
def registry():
    "What a test registers is gone after it."
    before = dict(COMPRESSIONS)
    yield
    COMPRESSIONS.clear()
    COMPRESSIONS.update(before)


def bottleneck(layer, n):
    "As `weight_svd_in`: 1 x 1 to few channels, then the kernel"
    if isinstance(layer, nn.Linear):
        return nn.Sequential(nn.Linear(layer.in_features, n), nn.Linear(n, layer.out_features))
    geometry = layer.kernel_size, layer.stride, layer.padding
    return nn.Sequential(
        nn.Conv2d(layer.in_channels, n, 1), nn.Conv2d(n, layer.out_channels, *geometry)
    )


def images(n=64):
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(0)).cumsum(-1) / 3


@pytest.mark.parametrize("op", OPS, ids=str)
def test_weight_of_is_the_weight(op):
    plain = copy.deepcopy(op).double()
    plain.bias = None
    with torch.no_grad():
        assert torch.allclose(weight_of(op, plain), plain.weight.flatten(1), atol=1e-12)


def test_two_layers_compute_what_their_weight_says():
    op = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    chain = bottleneck(op, 2)
    for m in chain:
        m.bias = None
    one = copy.deepcopy(op)
    one.bias = None
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        one.weight.copy_(weight_of(op, chain, torch.float32).view_as(op.weight))
        assert torch.allclose(one(x), chain(x), atol=1e-5)


def test_a_fit_is_as_good_as_the_chains():
    "The same structure, told by an einsum and built by a function"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    f = observe(net, images(), ["2"], progress=False)["2"]
    t = target_of(net[2], f)
    compression("bottleneck", "few channels in between", (1, 3, 6))(bottleneck)
    found = find_compression("bottleneck").refit(t, f, [1, 3, 6], 60)
    chains = cuts(t, f, "weight_svd_in", [1, 3, 6], 60)
    for (*_, lost), (*_, least) in zip(found, chains):
        assert lost == pytest.approx(least, rel=0.1, abs=1e-3)
    w = find_compression("bottleneck").weight(net[2], 6, found[-1][1])
    whole = f.error(torch.zeros_like(w)).sum()
    assert (f.error(w).sum() / whole).item() == pytest.approx(found[-1][2], abs=5e-3)


@pytest.mark.parametrize("select", ["knapsack", "greedy", "uniform"])
@pytest.mark.parametrize("refit", [True, False])
def test_every_way_to_choose(select, refit):
    torch.manual_seed(0)
    net = small_resnet(10, width=4).eval()
    before = copy.deepcopy(net.state_dict())
    compression("bottleneck", "few channels in between", (1, 2, 3, 4, 6, 8))(bottleneck)
    how = dict(steps=2, fit_steps=4, samples=2**12, progress=False, select=select, refit=refit)
    x = torch.randn(200, 3, 16, 16)
    small = compress(net, x, macs=0.7, methods=("bottleneck",), **how)
    assert "bottleneck" in {r.method for r in small.report} <= {"", "bottleneck"}
    assert small.report.share <= 0.75
    assert small.model(x[:2]).isfinite().all()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_share_of_the_latency():
    net = small_resnet(10, width=4).eval()
    compression("bottleneck", "few channels in between", (1, 2))(bottleneck)
    how = dict(steps=1, fit_steps=2, samples=2**10, allow_closest=True, progress=False)
    x = torch.randn(200, 3, 16, 16)
    small = compress(net, x, latency=0.9, methods=("bottleneck",), multiple=1, **how)
    assert small.model(x[:2]).isfinite().all()


def test_costs_are_those_of_the_module():
    compression("bottleneck", "few channels in between", (2,))(bottleneck)
    m = find_compression("bottleneck")
    op = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    assert m.macs(op, 2, (8, 8)) == 2 * 4 * 8 * 8 + 6 * 2 * 9 * 4 * 4
    assert m.macs(op, 2) == round(2 * 4 * 4 + 6 * 2 * 9)  # at stride 2, four inputs for an output
    assert m.macs(nn.Linear(4, 6), 2) == 4 * 2 + 2 * 6
    layer = Layer(op, "", None, 6 * 4 * 9 * 16, (8, 8))
    assert m.options(op, layer, [0.3, 0.9]) == [2]
    assert m.options(op, layer, [0.3]) == []


def test_the_layer_itself_is_not_changed():
    op = nn.Conv2d(4, 6, 3)
    compression("same", "nothing", (1,))(lambda layer, n: layer)
    m = find_compression("same")
    assert m.why_not(op) is None
    assert op.bias is not None and op.weight.requires_grad
    with torch.no_grad():
        x = torch.randn(1, 4, 5, 5)
        assert torch.allclose(m.from_weights(op, 1)(x), op(x), atol=1e-4)


WRONG = {
    "a larger kernel": lambda layer, n: nn.Conv2d(4, 6, 5, padding=2),
    "another stride": lambda layer, n: nn.Conv2d(4, 6, 3, 2, 1),
    "other outputs": lambda layer, n: nn.Conv2d(4, 5, 3, padding=1),
    "other inputs": lambda layer, n: nn.Conv2d(3, 6, 3, padding=1),
    "shifted": lambda layer, n: nn.Conv2d(4, 6, (1, 2), padding=(0, 3), dilation=(1, 6)),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_replacement(what):
    compression("wrong", what, (1,))(WRONG[what])
    with pytest.raises(ValueError, match="'wrong' at 1 isn't in the shape of Conv2d"):
        find_compression("wrong").why_not(nn.Conv2d(4, 6, 3, padding=1))


def test_whom_a_method_leaves_alone():
    compression("none", "nothing fits", (1,))(lambda layer, n: None)
    m = find_compression("none")
    assert "builds nothing" in m.why_not(nn.Conv2d(4, 6, 3))
    assert "no plain" in m.why_not(nn.Conv2d(4, 4, 3, groups=4))
    assert "no plain" in m.why_not(nn.ConvTranspose2d(4, 4, 3))
    with pytest.raises(ValueError, match="can't be reached"):
        compress(
            small_resnet(10, width=4).eval(),
            torch.randn(200, 3, 16, 16),
            methods=("none",),
            progress=False,
        )


@pytest.mark.parametrize("settings", [(), (0.5,), ("a",), (True,), ((1, 0.5),)])
def test_settings_that_a_plan_could_not_hold(settings):
    with pytest.raises(ValueError, match="give whole numbers"):
        compression("bad", "", settings)(bottleneck)
