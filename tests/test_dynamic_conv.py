"""Dynamic convolutions: gathering equals masking, for any layer and mask; gates, blocks, the
criterion; bad input, save and load."""

import copy
import math

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mep.conditional.dynamic_conv import (
    DynamicBlock,
    DynamicConv2d,
    MaskUnit,
    Sparsity,
    active_macs,
    choose_tile,
    discs,
    dynamic,
    gated,
    gates_faster,
    iou,
    location_loss,
    locator,
    mean_iou,
    needed,
    open_gate,
    put,
    ready,
    small_objects,
    sparse_conv,
    take,
    tiles,
    time_calls,
)
from mep.cost import profile
from mep.moments import output_size
from mep.train import BasicBlock, fit, small_mobilenet, small_resnet


def forall(*strategies):
    return lambda test: settings(deadline=None, max_examples=60)(given(*strategies)(test))


@st.composite
def layers(draw):
    "A convolution of any kind and an input that it takes"
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    stride, dilation = (
        draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
    )
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    if draw(st.booleans()):
        stride, padding = (1, 1), "same"
    torch.manual_seed(draw(st.integers(0, 99)))
    conv = nn.Conv2d(
        4,
        4 * draw(st.integers(1, 2)),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    x = torch.randn(draw(st.integers(1, 3)), 4, draw(st.integers(9, 14)), draw(st.integers(9, 14)))
    return conv, x if draw(st.booleans()) else x.to(memory_format=torch.channels_last)


def close(a, b, eps=1e-4):
    assert a.shape == b.shape
    assert torch.allclose(a, b, atol=eps), f"{(a - b).abs().max():.2g} apart"


# Gathering


@forall(
    layers(),
    st.sampled_from([0, 1, 2, 3, 4, 8, None]),
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    st.booleans(),
)
def test_sparse_equals_masked_dense(layer, tile, share, with_base):
    conv, x = layer
    with torch.no_grad():
        dense = conv(x)
    mask = torch.rand(len(x), 1, *dense.shape[2:]) < share
    base, before = (torch.randn_like(dense), x.clone()) if with_base else (None, x.clone())
    kept = None if base is None else base.clone()
    with torch.no_grad():
        close(
            sparse_conv(x, conv, mask, base, tile),
            torch.where(mask, dense, 0.0 if base is None else base),
        )
    assert torch.equal(x, before) and (base is None or torch.equal(base, kept))


@forall(layers(), st.sampled_from([1, 2, 5]))
def test_take_and_put_are_inverse(layer, size):
    _, x = layer
    mask = torch.rand(len(x), 1, *x.shape[2:]) < 0.2
    t = tiles(mask, size)
    assert torch.equal(put(take(x, t), t, x), x)
    everywhere = tiles(torch.ones_like(mask), size)
    assert torch.equal(put(take(x, everywhere), everywhere), x)


def test_put_in_place_only_if_asked():
    base, t = (
        torch.zeros(1, 2, 4, 4).to(memory_format=torch.channels_last),
        tiles(torch.ones(1, 1, 4, 4)),
    )
    y = torch.ones(16, 2, 1, 1)
    assert put(y, t, base).sum() == 32 and base.sum() == 0
    assert put(y, t, base, inplace=True).data_ptr() == base.data_ptr() and base.sum() == 32


@forall(layers())
def test_output_size_and_what_is_needed(layer):
    conv, x = layer
    with torch.no_grad():
        y = conv(x)
    assert output_size(conv, x) == tuple(y.shape[2:])
    if conv.padding_mode != "zeros":
        return
    at = torch.zeros(1, 1, *y.shape[2:])
    at[0, 0, y.shape[2] // 2, y.shape[3] // 2] = 1
    x1 = torch.zeros_like(x[:1]).requires_grad_()
    conv(x1).mul(at).abs().sum().backward()
    touched = nn.functional.conv_transpose2d(
        at, torch.ones(1, 1, *conv.kernel_size), stride=conv.stride, dilation=conv.dilation
    )
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    full = torch.zeros(1, 1, x.shape[2] + top + bottom, x.shape[3] + left + right)
    full[:, :, : touched.shape[2], : touched.shape[3]] = touched[
        :, :, : full.shape[2], : full.shape[3]
    ]
    assert torch.equal(
        needed(at, conv, x.shape[2:]),
        (full[:, :, top : top + x.shape[2], left : left + x.shape[3]] > 0).float(),
    )


def test_nothing_and_everything_active_and_empty_batch():
    conv, x = nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 9, 7)
    for tile in (0, 1, 4, None):
        assert not sparse_conv(x, conv, torch.zeros(2, 1, 9, 7), tile=tile).any()
        close(sparse_conv(x, conv, torch.ones(2, 1, 9, 7), tile=tile), conv(x))
        assert sparse_conv(x[:0], conv, torch.ones(0, 1, 9, 7), tile=tile).shape == (0, 5, 9, 7)


def test_bad_input_is_named():
    conv, x, mask = nn.Conv2d(3, 5, 3), torch.randn(2, 3, 9, 7), torch.ones(2, 1, 7, 5)
    with pytest.raises(ValueError, match=r"\[2, 1, 7, 5\].*\[2, 1, 9, 7\]"):
        sparse_conv(x, conv, torch.ones(2, 1, 9, 7))
    with pytest.raises(ValueError, match="base must have the shape"):
        sparse_conv(x, conv, mask, torch.zeros(2, 3, 7, 5))
    with pytest.raises(ValueError, match="tile must be 0"):
        sparse_conv(x, conv, mask, tile=-1)
    with pytest.raises(TypeError, match="ConvTranspose2d"):
        sparse_conv(x, nn.ConvTranspose2d(3, 5, 3), mask)
    with pytest.raises(ValueError, match="pads by 'reflect'"):
        DynamicBlock([nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")])
    with pytest.raises(ValueError, match="MaxPool2d looks beyond"):
        DynamicBlock([nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(2)])
    with pytest.raises(ValueError, match="begins with a convolution"):
        DynamicBlock([nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1)])
    with pytest.raises(ValueError, match="skip names 'nope'"):
        dynamic(small_resnet(3), skip=["nope"])
    with pytest.raises(ValueError, match="no residual block"):
        dynamic(nn.Sequential(nn.Conv2d(3, 3, 1)))
    with pytest.raises(ValueError, match="no DynamicBlock"):
        gated(nn.Sequential(nn.Conv2d(3, 3, 1)))
    with pytest.raises(ValueError, match="theta"):
        Sparsity(0.0, 10)
    with pytest.raises(ValueError, match="steps=0"):
        Sparsity(0.5, 0)
    with pytest.raises(ValueError, match="empty batch"):
        active_macs(dynamic(locator(8, 1)), torch.zeros(0, 3, 32, 32))
    with pytest.raises(ValueError, match="one size"):
        mean_iou(torch.zeros(1, 4, 4).long(), torch.zeros(1, 4, 5).long())


def test_nan_is_named():
    net = dynamic(locator(8, 1)).eval()
    with pytest.raises(ValueError, match="NaN or infinity"), torch.no_grad():
        net(torch.full((1, 3, 32, 32), math.nan))


def test_rule_prefers_dense_where_gathering_cannot_pay():
    wide, deep = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1, groups=64)
    assert choose_tile(discs(56, 0.03), wide) == 1 and choose_tile(discs(56, 0.9), wide) == 0
    assert choose_tile(discs(56, 0.03), deep) == 0 and choose_tile(discs(7, 0.1), wide) == 0


# Gates


def test_gate_is_exact_and_has_a_slope():
    logits = torch.linspace(-5, 5, 2000).requires_grad_()
    torch.manual_seed(0)
    for noise in (True, False):
        gate = open_gate(logits, noise)
        assert set(gate.tolist()) == {0.0, 1.0}
        (slope,) = torch.autograd.grad(gate.sum(), logits)
        assert (slope > 0).all() and slope.max() <= 0.25 + 1e-6
    assert torch.equal(open_gate(logits, False), (logits >= 0).float())


def test_mask_unit_has_the_size_of_the_block():
    assert MaskUnit(4, 2)(torch.zeros(3, 4, 9, 8)).shape == (3, 1, 5, 4)


def test_criterion_is_least_at_theta_and_bounds_open():
    class Fake(DynamicConv2d):
        def __init__(self, share, total):
            super().__init__(nn.Conv2d(1, 1, 1))
            self.share, self.total = torch.tensor(share), total

    def penalty(shares, done=1.0, theta=0.3):
        p = Sparsity(theta, 10)
        p.step = int(done * 10)
        return p(nn.ModuleList([Fake(s, 100) for s in shares])).item()

    assert penalty([0.3, 0.3]) == pytest.approx(0, abs=1e-12) and penalty(
        [0.1, 0.5]
    ) == pytest.approx(0, abs=1e-12)
    assert penalty([0.1, 0.5], done=0.0) > 0 and penalty([0.6, 0.6]) > 0 and penalty([0.1, 0.1]) > 0
    assert Sparsity(0.3, 10).bounds(0.0) == pytest.approx((0.3, 0.3)) and Sparsity(0.3, 10).bounds(
        0.5
    ) == pytest.approx((0.0, 1.0))


def test_noise_ends_with_the_last_fifth():
    net, p = dynamic(locator(8, 1)).train(), Sparsity(0.5, 10)
    for step in range(10):
        net(torch.randn(2, 3, 32, 32))
        p(net)
        assert all(b.noise == (step < 8) for b in gated(net).values())


# Blocks and networks


def networks():
    r50 = torchvision.models.resnet50(weights=None, num_classes=4)
    return dict(
        resnet=small_resnet(4, width=8, stem_stride=1),
        mobilenet=small_mobilenet(4, width=0.5, stem_stride=1),
        locator=locator(8, 2),
        resnet18=torchvision.models.resnet18(weights=None, num_classes=4),
        resnet50=r50,
        mobilenet_v2=torchvision.models.mobilenet_v2(weights=None, num_classes=4),
    )


@pytest.mark.parametrize("name", networks())
def test_all_ways_to_run_a_network_agree(name):
    torch.manual_seed(0)
    net, x = networks()[name], torch.randn(2, 3, 64, 48)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
    before = copy.deepcopy(net.state_dict())
    dyn, outs = dynamic(net).eval(), []
    for b in gated(dyn).values():
        for p in b.gate.parameters():
            nn.init.normal_(p) if p.ndim == 4 else nn.init.zeros_(p)
    for tile in (0, 1, 2, 4, None):
        for b in gated(dyn).values():
            b.tile = tile
        with torch.no_grad():
            outs.append(dyn(x))
        shares = [b.share.item() for b in gated(dyn).values()]
    assert any(0 < s < 1 for s in shares)
    for out in outs[1:]:
        close(out / outs[0].abs().max(), outs[0] / outs[0].abs().max())
    for tile in (0, 4):
        with torch.no_grad():
            close(ready(dyn, tile)(x) / outs[0].abs().max(), outs[0] / outs[0].abs().max(), 1e-3)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("bias, share", [(9.0, 1.0), (-9.0, 0.0)])
def test_all_open_is_the_network_all_closed_the_shortcut(bias, share):
    net, x = locator(8, 2).eval(), torch.randn(2, 3, 32, 32)
    dyn = dynamic(net).eval()
    for b in gated(dyn).values():
        nn.init.zeros_(b.gate.conv.weight)
        nn.init.zeros_(b.gate.scene.weight)
        nn.init.constant_(b.gate.scene.bias, bias)
    with torch.no_grad():
        want = (
            net(x)
            if share
            else nn.Sequential(*[m for m in net if not isinstance(m, BasicBlock)])(x)
        )
        for tile in (0, 1, 4, None):
            for b in gated(dyn).values():
                b.tile = tile
            close(dyn(x), want)
    assert all(b.share == share for b in gated(dyn).values())


def test_macs_of_open_and_closed_networks():
    net, x = locator(8, 2), torch.randn(3, 3, 32, 32)
    dyn, full = dynamic(net).eval(), profile(net, (3, 32, 32)).macs
    blocks = sum(l.macs for l in profile(net, (3, 32, 32)).layers if ".body." in l.name)
    gates = 2 * (9 * 8 * 64 + 8)
    for bias, macs in ((9.0, full + gates), (-9.0, full + gates - blocks)):
        for b in gated(dyn).values():
            nn.init.zeros_(b.gate.conv.weight)
            nn.init.zeros_(b.gate.scene.weight)
            nn.init.constant_(b.gate.scene.bias, bias)
        assert active_macs(dyn, x) == pytest.approx(macs)


def test_training_gives_gates_a_gradient_and_a_copy_can_be_made():
    net = dynamic(locator(8, 2)).train()
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(b.gate.conv.weight.grad.abs().sum() > 0 for b in gated(net).values())
    copy.deepcopy(net)


def test_empty_batch_through_a_network():
    net = dynamic(locator(8, 2)).eval()
    with torch.no_grad():
        assert net(torch.zeros(0, 3, 32, 32)).shape == (0, 3, 8, 8)


def test_dynamic_conv_of_any_layer():
    x = torch.randn(2, 4, 10, 9)
    for conv in (nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 4, 5, groups=4), nn.Conv2d(4, 2, 1)):
        layer = DynamicConv2d(conv).eval()
        with torch.no_grad():
            close(layer(x), layer.mask * conv(x))


def test_save_and_load(tmp_path):
    net, x = dynamic(locator(8, 2), seed=1).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = net(x)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other = dynamic(locator(8, 2, seed=5), seed=7).eval()
    other.load_state_dict(torch.load(tmp_path / "net.pt"))
    with torch.no_grad():
        assert torch.equal(other(x), want)


def test_fit_with_the_criterion_moves_towards_theta():
    x, y = torch.randn(16, 3, 32, 32), torch.randint(3, (16, 8, 8))
    batches = [(x, y)] * 40
    net = fit(
        dynamic(locator(8, 2)),
        (batches, None),
        1,
        optimizer=gates_faster(2e-3, 30),
        loss=location_loss,
        penalty=Sparsity(0.2, 40),
        device="cpu",
        progress=False,
    ).model.train()
    net(x)
    assert sum(b.share.item() for b in gated(net).values()) / 2 < 0.45


def test_tools():
    x, y = small_objects(4, seed=3)
    assert (
        x.shape == (4, 3, 96, 96)
        and y.shape == (4, 24, 24)
        and set(y.unique().tolist()) <= {0, 1, 2}
    )
    assert torch.equal(small_objects(4, seed=3)[0], x) and 0.3 > (y > 0).float().mean() > 0
    assert 0 <= iou(locator(8, 1), x, y) <= 1
    assert 0.2 <= discs(40, 0.2).float().mean() < 0.3 and discs(40, 0.0).sum() == 0
    assert set(time_calls(dict(a=lambda: 1, b=lambda: 2), n=2, warmup=0)) == {"a", "b"}
